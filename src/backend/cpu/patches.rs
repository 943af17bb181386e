//! Gathering convolution windows.

use super::{Cpu, Real, simd::vectorised};
use crate::backend::{Grid, Patches, Sample, Window};
use crate::dataset::{IMAGENET_MEAN, IMAGENET_STD};

/// Calls `visit(window number, ky·side + kx, row-major position of the input token or None in the padding)`.
#[inline(always)]
fn each_tap(grid: Grid, window: Window, mut visit: impl FnMut(usize, usize, Option<usize>)) {
    let out = grid.through(window);
    let mut number = 0;
    for image in 0..grid.images {
        for oy in 0..out.height {
            for ox in 0..out.width {
                for ky in 0..window.side {
                    let y = (oy * window.stride + ky).wrapping_sub(window.padding);
                    for kx in 0..window.side {
                        let x = (ox * window.stride + kx).wrapping_sub(window.padding);
                        let inside = y < grid.height && x < grid.width;
                        let token = (image * grid.height + y) * grid.width + x;
                        visit(number, ky * window.side + kx, inside.then_some(token));
                    }
                }
                number += 1;
            }
        }
    }
}

impl<T: Real> Patches for Cpu<T> {
    fn pixel_patches(&self, samples: &[Sample<'_>], size: usize, window: Window, out: &mut Vec<T>) {
        let row = window.side * window.side * 3;
        let per_image = Grid { images: 1, height: size, width: size }.through(window).area() * row;
        for (sample, out) in samples.iter().zip(out.chunks_exact_mut(per_image)) {
            let levels = sample.augment.table();
            let table: [[T; 256]; 3] = std::array::from_fn(|c| {
                std::array::from_fn(|v| {
                    let level = f64::from(levels[v]) / 255.0;
                    T::of((level - f64::from(IMAGENET_MEAN[c])) / f64::from(IMAGENET_STD[c]))
                })
            });
            let grid = Grid { images: 1, height: size, width: size };
            vectorised(
                #[inline(always)]
                || {
                    each_tap(
                        grid,
                        window,
                        #[inline(always)]
                        |number, tap, token| {
                            let to = &mut out[number * row + tap * 3..][..3];
                            match token {
                                Some(token) => {
                                    let (y, x) = (token / size, token % size);
                                    let x = if sample.augment.flip { size - 1 - x } else { x };
                                    let from = &sample.pixels[(y * size + x) * 3..][..3];
                                    for c in 0..3 {
                                        to[c] = table[c][usize::from(from[c])];
                                    }
                                }
                                None => to.fill(T::ZERO),
                            }
                        },
                    );
                },
            );
        }
    }

    fn patches(&self, x: &Vec<T>, grid: Grid, channels: usize, window: Window, out: &mut Vec<T>) {
        let row = window.side * window.side * channels;
        vectorised(
            #[inline(always)]
            || {
                each_tap(
                    grid,
                    window,
                    #[inline(always)]
                    |number, tap, token| {
                        let to = &mut out[number * row + tap * channels..][..channels];
                        match token {
                            Some(token) => to.copy_from_slice(&x[token * channels..][..channels]),
                            None => to.fill(T::ZERO),
                        }
                    },
                );
            },
        );
    }

    fn patches_backward(&self, dout: &Vec<T>, grid: Grid, channels: usize, window: Window, dx: &mut Vec<T>, add: bool) {
        let row = window.side * window.side * channels;
        if !add {
            dx[..grid.rows() * channels].fill(T::ZERO);
        }
        vectorised(
            #[inline(always)]
            || {
                each_tap(
                    grid,
                    window,
                    #[inline(always)]
                    |number, tap, token| {
                        if let Some(token) = token {
                            let from = &dout[number * row + tap * channels..][..channels];
                            for (dx, d) in dx[token * channels..][..channels].iter_mut().zip(from) {
                                *dx += *d;
                            }
                        }
                    },
                );
            },
        );
    }
}
