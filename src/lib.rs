//! segpeft-native: how much of full fine-tuning does LoRA keep, at which rank and alpha?
//!
//! A SegFormer trainer written down to the kernel. Imports run one way:
//! `cli` → `ablation` → `train` → `segformer`/`lora` → `backend`; `dataset`, `formats` and `report` know nothing of
//! training loops.

pub mod ablation;
pub mod backend;
pub mod cli;
pub mod dataset;
pub mod error;
pub mod files;
pub mod formats;
pub mod lora;
pub mod progress;
pub mod random;
pub mod report;
pub mod segformer;
mod system;
pub mod train;

pub use error::{Error, Result};
