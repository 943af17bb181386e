//! The way back in front of attention stays one operation after the other: a picture's tensors fit into a core's cache.

use super::{Cpu, Real};
use crate::backend::AttentionInput;

impl<T: Real> AttentionInput for Cpu<T> {}
