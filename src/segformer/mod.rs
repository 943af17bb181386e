//! SegFormer (Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", 2021):
//! configuration, weights, forward and backward, block by block.

mod config;

pub use config::SegformerConfig;
