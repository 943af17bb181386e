//! The way back through the output product stays one operation after the other: a picture's tensors fit into a core's cache.

use super::{Cpu, Real};
use crate::backend::AttentionOutput;

impl<T: Real> AttentionOutput for Cpu<T> {}
