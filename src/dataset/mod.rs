//! From images on disk to samples in memory: read a source, resize, pack, memory-map, split, augment.

pub mod demo;

/// Channel means of ImageNet, RGB, on the 0..1 scale.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Channel standard deviations of ImageNet, RGB, on the 0..1 scale.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];
