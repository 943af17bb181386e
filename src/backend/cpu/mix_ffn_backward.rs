//! The way back through a Mix-FFN stays one operation after the other: a picture's tensors fit into a core's cache.

use super::{Cpu, Real};
use crate::backend::MixFfnBackward;

impl<T: Real> MixFfnBackward for Cpu<T> {}
