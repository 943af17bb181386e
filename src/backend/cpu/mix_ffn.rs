//! The Mix-FFN, by its parts.

use super::{Cpu, Real};
use crate::backend::MixFfn;

impl<T: Real> MixFfn for Cpu<T> {}
