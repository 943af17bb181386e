//! From images on disk to samples in memory: read a source, resize, pack, memory-map, split, augment.

/// Channel means of ImageNet, RGB, on the 0..1 scale.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Channel standard deviations of ImageNet, RGB, on the 0..1 scale.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Flip, brightness and contrast of one sample. (stand-in until the module is merged)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augment {
    /// Mirror left and right.
    pub flip: bool,
    /// c
    pub contrast: f32,
    /// b
    pub brightness: f32,
}
impl Augment {
    /// Nothing is changed.
    pub const IDENTITY: Self = Self { flip: false, contrast: 1.0, brightness: 0.0 };
    /// t
    pub fn table(&self) -> [u8; 256] {
        std::array::from_fn(|i| i as u8)
    }
}
