//! From images on disk to samples in memory: read a source, resize, pack, memory-map, split, augment.

mod augment;
mod decode;
pub mod demo;
mod packed;
mod prepare;
mod resize;
mod source;
mod split;

pub use augment::Augment;
pub use decode::{RgbImage, load_image};
pub use packed::{PackedDataset, is_size};
pub use prepare::{DEFAULT_SIZE, PrepareSummary, is_packed_file, open_or_prepare, prepare};
pub use resize::{resize_bilinear, resize_nearest};
pub use source::is_picture;
pub use split::Split;

/// Channel means of ImageNet, RGB, on the 0..1 scale.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Channel standard deviations of ImageNet, RGB, on the 0..1 scale.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// 64-bit FNV-1a hash of `bytes`, continued from `hash`; start with [`FNV_BASIS`].
fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
