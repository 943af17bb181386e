//! Optimizer, schedule, loop, metrics, early stopping, checkpoints.

pub mod options;
pub mod record;
