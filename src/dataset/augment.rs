//! Training augmentation: albumentations' `HorizontalFlip(p=0.5)` and `RandomBrightnessContrast(p=0.2)` with limits 0.2,
//! brightness as a share of the largest value.

use crate::random::{Philox, Purpose, unit};

const FLIP_PROBABILITY: f32 = 0.5;
const CONTRAST_PROBABILITY: f32 = 0.2;
const LIMIT: f32 = 0.2;

/// What happens to one sample in one epoch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augment {
    /// Mirror image and mask left to right.
    pub flip: bool,
    /// Factor on pixel values, 1 for none (albumentations' alpha).
    pub contrast: f32,
    /// Added to pixel values, as a fraction of 255 (albumentations' beta).
    pub brightness: f32,
}

impl Augment {
    /// Leaves a sample as it is.
    pub const IDENTITY: Augment = Augment { flip: false, contrast: 1.0, brightness: 0.0 };

    /// The augmentation of sample `index` in `epoch`: depends on these and `seed` alone.
    pub fn draw(seed: u64, epoch: u32, index: usize) -> Self {
        let words = Philox::new(seed, Purpose::Augment, 0, epoch).block(index as u64);
        let [flip, change, contrast, brightness] = words.map(unit);
        let symmetric = |u: f32| LIMIT * (2.0 * u - 1.0);
        let flip = flip < FLIP_PROBABILITY;
        if change < CONTRAST_PROBABILITY {
            Self { flip, contrast: 1.0 + symmetric(contrast), brightness: symmetric(brightness) }
        } else {
            Self { flip, ..Self::IDENTITY }
        }
    }

    /// The new value of each 8-bit value: `x * contrast + brightness * 255` in f32, clipped, then truncated, as
    /// albumentations computes it for uint8.
    pub fn table(&self) -> [u8; 256] {
        let offset = self.brightness * 255.0;
        std::array::from_fn(|x| (x as f32 * self.contrast + offset).clamp(0.0, 255.0) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_changes_nothing() {
        assert!(Augment::IDENTITY.table().iter().enumerate().all(|(i, &v)| i == usize::from(v)));
    }

    #[test]
    fn frequencies_and_ranges() {
        let draws: Vec<Augment> = (0..10).flat_map(|e| (0..2000).map(move |i| Augment::draw(42, e, i))).collect();
        let share = |f: &dyn Fn(&Augment) -> bool| draws.iter().filter(|a| f(a)).count() as f64 / draws.len() as f64;
        assert!((share(&|a| a.flip) - 0.5).abs() < 0.015);
        assert!((share(&|a| a.contrast != 1.0) - 0.2).abs() < 0.012);
        assert!((share(&|a| a.flip && a.contrast != 1.0) - 0.1).abs() < 0.01);
        assert!(draws.iter().all(|a| (0.8..=1.2).contains(&a.contrast) && a.brightness.abs() <= 0.2));
        assert!(draws.iter().any(|a| a.contrast < 0.81) && draws.iter().any(|a| a.contrast > 1.19));
        assert!(draws.iter().any(|a| a.brightness < -0.19) && draws.iter().any(|a| a.brightness > 0.19));
    }

    #[test]
    fn depends_on_seed_epoch_and_index() {
        let flips = |seed, epoch, from: usize| -> Vec<bool> {
            (from..from + 64).map(|i| Augment::draw(seed, epoch, i).flip).collect()
        };
        assert_eq!(flips(1, 2, 0), flips(1, 2, 0));
        assert_ne!(flips(1, 2, 0), flips(2, 2, 0));
        assert_ne!(flips(1, 2, 0), flips(1, 3, 0));
        assert_ne!(flips(1, 2, 0), flips(1, 2, 64));
    }
}
