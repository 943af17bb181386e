//! Training a run and measuring it: options, schedule, loop, metrics, early stopping, checkpoints.

mod checkpoint;
mod evaluate;
mod keeper;
mod measure;
mod memory;
mod metrics;
pub mod options;
pub mod record;
mod run;
mod schedule;
mod start;

pub use evaluate::{Predictor, evaluate, sample};
pub use measure::{Demand, Measured, StepKind, demand, measure_step};
pub use memory::{MemoryPlan, Part};
pub use run::{Inputs, Seat, run};
pub use start::{Start, Weights, fresh_checkpoint, merged};
