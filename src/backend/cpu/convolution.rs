//! A convolution over tokens stays one operation after the other: a picture's tensors fit into a core's cache.

use super::{Cpu, Real};
use crate::backend::Convolution;

impl<T: Real> Convolution for Cpu<T> {}
