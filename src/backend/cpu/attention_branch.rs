//! No joint attention: by its parts, it goes through the caches.

use super::{Cpu, Real};
use crate::backend::AttentionBranch;

impl<T: Real> AttentionBranch for Cpu<T> {}
