//! The operations the model is written in, as traits, one per file of an implementation: an operation named `attention`
//! stands in `kernels/attention.cu`, `backend/cuda/attention.rs` and `backend/cpu/attention.rs`.
//!
//! Conventions. Tokens are stored channels last, `(images, height, width, channels)`; a matrix is row-major. Two storage
//! types keep what may be rounded apart from what may not: [`Memory::Act`] holds activations and the weights of products
//! (bf16 on a GPU), [`Memory::Full`] holds parameters, their gradients, statistics and optimizer state (at least f32).
//! Operations overwrite their outputs unless they say *adds to*. Every reduction has a fixed order, so that equal inputs
//! give equal bits.

pub mod cpu;
pub mod cuda;
mod ops;
mod place;

pub use ops::*;
pub use place::{Choice, Gpu, GpuPlace, Place, Room};

use crate::dataset::Augment;
use crate::random::{Philox, unit};

/// Pictures of tokens: `(images, height, width)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Pictures.
    pub images: usize,
    /// Rows of tokens in a picture.
    pub height: usize,
    /// Tokens in a row.
    pub width: usize,
}

impl Grid {
    /// Tokens in all pictures.
    pub fn rows(&self) -> usize {
        self.images * self.area()
    }

    /// Tokens in one picture.
    pub fn area(&self) -> usize {
        self.height * self.width
    }

    /// The grid that `window` makes of this one.
    pub fn through(&self, window: Window) -> Self {
        Self { images: self.images, height: window.out(self.height), width: window.out(self.width) }
    }
}

/// Geometry of a square convolution window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Side of the kernel.
    pub side: usize,
    /// Step between windows.
    pub stride: usize,
    /// Zeros around the picture.
    pub padding: usize,
}

impl Window {
    /// Number of windows along `extent` inputs (0 if the window does not fit).
    pub fn out(&self, extent: usize) -> usize {
        (extent + 2 * self.padding).checked_sub(self.side).map_or(0, |free| free / self.stride + 1)
    }
}

/// A product `y = x · Wᵀ`: x is `(rows, inputs)`, W `(outputs, inputs)`, y `(rows, outputs)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Rows of x and y.
    pub rows: usize,
    /// Columns of x and W.
    pub inputs: usize,
    /// Rows of W, columns of y.
    pub outputs: usize,
}

/// Multi-head attention: queries `(images, queries, heads·head)`, keys and values `(images, keys, heads·head)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Pictures; each attends to itself alone.
    pub images: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head. The scale is `1/sqrt(head)`.
    pub head: usize,
    /// Queries per picture.
    pub queries: usize,
    /// Keys per picture.
    pub keys: usize,
}

/// Random zeroing with rescaling: element (or sample) number `first + i` is kept with probability `1 - rate` and then
/// multiplied by `1 / (1 - rate)`. The numbers come from a counter, so forward and backward recompute the same mask.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Probability of zeroing, in [0, 1).
    pub rate: f32,
    /// The stream of uniform numbers.
    pub stream: Philox,
    /// Counter of the first element.
    pub first: u64,
}

impl Dropout {
    /// The factor of element `i`: 0 or `1 / (1 - rate)`.
    #[inline(always)]
    pub fn factor(&self, i: u64) -> f32 {
        self.of(self.stream.word(self.first + i))
    }

    /// Calls `each(i, factors)` with the factors of the elements from `start + i` on, part by part and in order, until
    /// `count` are done.
    #[inline(always)]
    pub fn factors(&self, start: u64, count: usize, mut each: impl FnMut(usize, &[f32])) {
        self.stream.words(
            self.first + start,
            count,
            #[inline(always)]
            |i, words| {
                let mut factors = [0.0; Philox::PART];
                for (factor, word) in factors.iter_mut().zip(words) {
                    *factor = self.of(*word);
                }
                each(i, &factors[..words.len()]);
            },
        );
    }

    #[inline(always)]
    fn of(&self, word: u32) -> f32 {
        if unit(word) < self.rate { 0.0 } else { 1.0 / (1.0 - self.rate) }
    }
}

/// One picture with its labels and its augmentation.
#[derive(Clone, Copy)]
pub struct Sample<'a> {
    /// Position in the dataset.
    pub index: usize,
    /// `(size, size, 3)` RGB.
    pub pixels: &'a [u8],
    /// `(size, size)` labels.
    pub labels: &'a [u8],
    /// Flip, brightness and contrast; the flip concerns the labels too.
    pub augment: Augment,
}

/// Step size and decay rates of one AdamW update (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this update.
    pub lr: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay of the tensors it applies to.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// Largest norm of all gradients together.
    pub max_norm: f64,
}
