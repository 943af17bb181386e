//! The CPU backend: every operation over slices, f32 for work, f64 as the oracle of the tests.
//!
//! A unit is one picture. It goes through a whole phase of a step on one thread, so its activations stay near that core;
//! threads meet only where the algorithm does (BatchNorm, the update).
//!
//! Where a processor multiplies matrices in units of its own, evaluation in f32 does so (`tiles.rs`).

mod attention;
mod attention_branch;
mod attention_input;
mod attention_output;
mod buffer;
mod convolution;
mod depthwise;
mod head;
mod layer_norm;
mod linear;
mod loss;
mod matrix;
mod memory;
mod mix_ffn;
mod mix_ffn_backward;
mod optimizer;
mod patches;
mod real;
mod residual;
mod resize;
mod room;
mod simd;
mod tiles;

pub use buffer::Buffer;
pub use memory::Cpu;
pub use real::Real;
pub use simd::level as simd_level;
pub use tiles::available as has_matrix_units;
