//! Low-rank adaptation (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021): which modules carry
//! adapters.

mod targets;

pub use targets::{Match, preset, select};
