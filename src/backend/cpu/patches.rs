//! Gathering convolution windows.

use std::ops::Range;

use super::simd::{each, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::{EmbedPixels, Grid, Patches, Sample, Window};
use crate::dataset::{IMAGENET_MEAN, IMAGENET_STD};

/// Calls `visit(window number, ky·side + kx, taps, row-major position of the first input token or None in the padding)` for
/// every run of taps that lie side by side in a window, and in the picture if they are in it; in the windows of `lines`, which
/// are numbered from 0.
#[inline(always)]
fn each_run(
    grid: Grid,
    window: Window,
    lines: Range<usize>,
    mut visit: impl FnMut(usize, usize, usize, Option<usize>),
) {
    let Window { side, stride, padding } = window;
    let out = grid.through(window);
    let mut number = 0;
    for line in lines {
        let (image, oy) = (line / out.height, line % out.height);
        for ox in 0..out.width {
            // Taps in the padding on the left, and before the padding on the right.
            let left = padding.saturating_sub(ox * stride).min(side);
            let right = (grid.width + padding).saturating_sub(ox * stride).clamp(left, side);
            for ky in 0..side {
                let y = (oy * stride + ky).wrapping_sub(padding);
                let tap = ky * side;
                if y >= grid.height || left == right {
                    visit(number, tap, side, None);
                    continue;
                }
                let token = (image * grid.height + y) * grid.width + ox * stride + left - padding;
                for (from, to, token) in [(0, left, None), (left, right, Some(token)), (right, side, None)] {
                    if from < to {
                        visit(number, tap + from, to - from, token);
                    }
                }
            }
            number += 1;
        }
    }
}

impl<T: Real> EmbedPixels for Cpu<T> {}

impl<T: Real> Patches for Cpu<T> {
    fn pixel_patches(&self, samples: &[Sample<'_>], size: usize, window: Window, out: &mut Buffer<T>) {
        let Window { side, stride, padding } = window;
        let grid = Grid { images: 1, height: size, width: size }.through(window);
        let row = side * side * 3;
        // A line of pixels with its padding.
        let line = (size + 2 * padding) * 3;
        for (sample, out) in samples.iter().zip(out.chunks_exact_mut(grid.area() * row)) {
            let levels = sample.augment.table();
            let table: [[T; 256]; 3] = std::array::from_fn(|c| {
                std::array::from_fn(|v| {
                    let level = f64::from(levels[v]) / 255.0;
                    T::of((level - f64::from(IMAGENET_MEAN[c])) / f64::from(IMAGENET_STD[c]))
                })
            });
            let share = self.share(grid.height, 1);
            self.each(out.chunks_mut(share * grid.width * row).enumerate(), |(part, out)| {
                // A line of normalised pixels with its padding, for each line of a window.
                let mut lines = vec![T::ZERO; side * line];
                let mut done = 0;
                for (oy, out) in (part * share..).zip(out.chunks_exact_mut(grid.width * row)) {
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
                            to.chunks_exact_mut(3)
                                .zip(from.rchunks_exact(3))
                                .for_each(|(to, from)| normalise(to, from));
                        } else {
                            to.chunks_exact_mut(3).zip(from.chunks_exact(3)).for_each(|(to, from)| normalise(to, from));
                        }
                    }
                    done = oy * stride + side;
                    for (ox, out) in out.chunks_exact_mut(row).enumerate() {
                        for (ky, out) in out.chunks_exact_mut(side * 3).enumerate() {
                            let from = &lines[(oy * stride + ky) % side * line + ox * stride * 3..];
                            // The model's own length as a constant, so that no call is made to copy so little.
                            match (out.first_chunk_mut::<21>(), from.first_chunk::<21>()) {
                                (Some(out), Some(from)) if side == 7 => *out = *from,
                                _ => out.copy_from_slice(&from[..side * 3]),
                            }
                        }
                    }
                }
            });
        }
    }

    fn patches(&self, x: &Buffer<T>, grid: Grid, channels: usize, window: Window, out: &mut Buffer<T>) {
        let row = window.side * window.side * channels;
        let to = grid.through(window);
        let lines = self.share(to.images * to.height, 1);
        let parts = out[..to.rows() * row].chunks_mut(lines * to.width * row);
        self.each(parts.enumerate(), |(part, out)| {
            let first = part * lines;
            let lines = first..first + out.len() / (to.width * row);
            each_run(grid, window, lines, |number, tap, taps, token| {
                let to = &mut out[number * row + tap * channels..][..taps * channels];
                match token {
                    Some(token) => to.copy_from_slice(&x[token * channels..][..taps * channels]),
                    None => to.fill(T::ZERO),
                }
            });
        });
    }

    fn patches_backward(
        &self,
        dout: &Buffer<T>,
        grid: Grid,
        channels: usize,
        window: Window,
        dx: &mut Buffer<T>,
        add: bool,
    ) {
        let row = window.side * window.side * channels;
        if !add {
            dx[..grid.rows() * channels].fill(T::ZERO);
        }
        vectorised(
            #[inline(always)]
            |_| {
                let to = grid.through(window);
                each_run(
                    grid,
                    window,
                    0..to.images * to.height,
                    #[inline(always)]
                    |number, tap, taps, token| {
                        if let Some(token) = token {
                            let from = &dout[number * row + tap * channels..][..taps * channels];
                            each([from], &mut dx[token * channels..][..taps * channels], |[d], dx| dx + d);
                        }
                    },
                );
            },
        );
    }
}
