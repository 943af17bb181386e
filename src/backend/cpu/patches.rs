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
        let Window { side, stride, padding } = window;
        let grid = Grid { images: 1, height: size, width: size }.through(window);
        let row = side * side * 3;
        // A line of normalised pixels with its padding, for each line of a window.
        let line = (size + 2 * padding) * 3;
        let mut lines = vec![T::ZERO; side * line];
        for (sample, out) in samples.iter().zip(out.chunks_exact_mut(grid.area() * row)) {
            let levels = sample.augment.table();
            let table: [[T; 256]; 3] = std::array::from_fn(|c| {
                std::array::from_fn(|v| {
                    let level = f64::from(levels[v]) / 255.0;
                    T::of((level - f64::from(IMAGENET_MEAN[c])) / f64::from(IMAGENET_STD[c]))
                })
            });
            let mut done = 0;
            for (oy, out) in out.chunks_exact_mut(grid.width * row).enumerate() {
                // Lines count from the first one of padding.
                for y in done.max(oy * stride)..oy * stride + side {
                    let to = &mut lines[y % side * line..][..line];
                    let inside = (padding..size + padding).contains(&y);
                    if !inside {
                        to.fill(T::ZERO);
                        continue;
                    }
                    let from = &sample.pixels[(y - padding) * size * 3..][..size * 3];
                    let to = &mut to[padding * 3..][..size * 3];
                    let normalise = |to: &mut [T], from: &[u8]| {
                        for c in 0..3 {
                            to[c] = table[c][usize::from(from[c])];
                        }
                    };
                    if sample.augment.flip {
                        to.chunks_exact_mut(3).zip(from.rchunks_exact(3)).for_each(|(to, from)| normalise(to, from));
                    } else {
                        to.chunks_exact_mut(3).zip(from.chunks_exact(3)).for_each(|(to, from)| normalise(to, from));
                    }
                }
                done = oy * stride + side;
                for (ox, out) in out.chunks_exact_mut(row).enumerate() {
                    for (ky, out) in out.chunks_exact_mut(side * 3).enumerate() {
                        let at = (oy * stride + ky) % side * line + ox * stride * 3;
                        out.copy_from_slice(&lines[at..][..side * 3]);
                    }
                }
            }
        }
    }

    fn patches(&self, x: &Vec<T>, grid: Grid, channels: usize, window: Window, out: &mut Vec<T>) {
        let row = window.side * window.side * channels;
        vectorised(
            #[inline(always)]
            |_| {
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
            |_| {
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
