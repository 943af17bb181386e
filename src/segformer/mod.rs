//! SegFormer (Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", 2021):
//! configuration, weights, forward and backward, block by block.

mod affine;
mod attention;
mod config;
mod decoder;
mod encoder;
mod log;
mod mix_ffn;
mod model;
mod modules;
mod norm;
mod patch_embed;
mod plan;
mod tensors;

pub use config::SegformerConfig;
pub use model::{Buffers, Evaluated, Model, ModelOptions, Moments, Step, StepRandom};
pub use modules::{BATCH_COUNTER, Module, ModuleKind, Role, TensorSpec, modules};
pub use plan::{AdapterPlan, Plan, Trainable};
pub use tensors::Id;
