//! No joint Mix-FFN: by its parts, it goes through the caches.

use super::{Cpu, Real};
use crate::backend::MixFfn;

impl<T: Real> MixFfn for Cpu<T> {}
