//! Gathering convolution windows.

use std::ops::Range;

use super::layer_norm::normalise;
use super::linear::{View, Weights, linear, product};
use super::room::{strip, take, with_room};
use super::simd::{each, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::{EmbedPixels, Grid, LayerNorm, NextNorm, Patches, Product, Sample, Window};
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

/// Gathers the windows over a picture, line by line of windows.
struct PixelWindows<'a, T> {
    sample: &'a Sample<'a>,
    size: usize,
    window: Window,
    /// What becomes of a channel's levels.
    table: [[T; 256]; 3],
    /// A line of normalised pixels with its padding, for each line of a window.
    lines: Vec<T>,
    /// Lines of the picture that have been normalised, counted from the first one of padding.
    done: usize,
}

impl<'a, T: Real> PixelWindows<'a, T> {
    fn new(sample: &'a Sample<'a>, size: usize, window: Window) -> Self {
        let levels = sample.augment.table();
        let table = std::array::from_fn(|c| {
            std::array::from_fn(|v| {
                let level = f64::from(levels[v]) / 255.0;
                T::of((level - f64::from(IMAGENET_MEAN[c])) / f64::from(IMAGENET_STD[c]))
            })
        });
        let lines = vec![T::ZERO; window.side * (size + 2 * window.padding) * 3];
        Self { sample, size, window, table, lines, done: 0 }
    }

    /// Numbers of a window.
    fn row(window: Window) -> usize {
        window.side * window.side * 3
    }

    /// Writes lines of windows to `out`, `(lines, width, side·side·3)`, from number `first` on; lines go upwards from call to call.
    fn gather(&mut self, first: usize, width: usize, out: &mut [T]) {
        let (size, Window { side, stride, padding }, row) = (self.size, self.window, Self::row(self.window));
        let line = (size + 2 * padding) * 3;
        for (oy, out) in (first..).zip(out.chunks_exact_mut(width * row)) {
            for y in self.done.max(oy * stride)..oy * stride + side {
                let to = &mut self.lines[y % side * line..][..line];
                let inside = (padding..size + padding).contains(&y);
                if !inside {
                    to.fill(T::ZERO);
                    continue;
                }
                let from = &self.sample.pixels[(y - padding) * size * 3..][..size * 3];
                let to = &mut to[padding * 3..][..size * 3];
                let normalise = |to: &mut [T], from: &[u8]| {
                    for c in 0..3 {
                        to[c] = self.table[c][usize::from(from[c])];
                    }
                };
                if self.sample.augment.flip {
                    to.chunks_exact_mut(3).zip(from.rchunks_exact(3)).for_each(|(to, from)| normalise(to, from));
                } else {
                    to.chunks_exact_mut(3).zip(from.chunks_exact(3)).for_each(|(to, from)| normalise(to, from));
                }
            }
            self.done = oy * stride + side;
            for (ox, out) in out.chunks_exact_mut(row).enumerate() {
                for (ky, out) in out.chunks_exact_mut(side * 3).enumerate() {
                    let from = &self.lines[(oy * stride + ky) % side * line + ox * stride * 3..];
                    // The model's own length as a constant, so that no call is made to copy so little.
                    match (out.first_chunk_mut::<21>(), from.first_chunk::<21>()) {
                        (Some(out), Some(from)) if side == 7 => *out = *from,
                        _ => out.copy_from_slice(&from[..side * 3]),
                    }
                }
            }
        }
    }
}

/// The windows over a picture of `size`².
fn windows(size: usize, window: Window) -> Grid {
    Grid { images: 1, height: size, width: size }.through(window)
}

impl<T: Real> EmbedPixels for Cpu<T> {
    fn embeds_pixels(&self, _: Window, _: usize) -> bool {
        true
    }

    /// Strip by strip, so that the patches stay in the second-level cache.
    fn embed_pixels(
        &self,
        samples: &[Sample<'_>],
        size: usize,
        window: Window,
        (w, bias): (&Buffer<T>, Option<&Buffer<T>>),
        norm: (&Buffer<T>, &Buffer<T>),
        channels: usize,
        y: &mut Buffer<T>,
        kept: Option<(&mut Buffer<T>, &mut Buffer<T>)>,
        next: Option<NextNorm<'_, Self>>,
    ) {
        let (grid, row) = (windows(size, window), PixelWindows::<T>::row(window));
        let (strip, line, pairs) = (strip(grid), grid.width * channels, 2 * grid.width);
        let share = self.share(grid.height.div_ceil(strip), 1) * strip;
        let (mut raw, mut stats) = kept.map(|(raw, stats)| (&mut raw[..], &mut stats[..])).unzip();
        let product = Product { rows: 0, inputs: row, outputs: channels };
        with_room([self.packed(channels, row)], |[room]| {
            let w = Weights::new(w, product, room);
            for (sample, y) in samples.iter().zip(y.chunks_mut(grid.height * line)) {
                let mut parts = Vec::new();
                for (part, y) in y.chunks_mut(share * line).enumerate() {
                    let count = y.len() / line;
                    let raw = raw.as_mut().map(|raw| take(raw, count * line));
                    let stats = stats.as_mut().map(|stats| take(stats, count * pairs));
                    parts.push((part * share, y, raw, stats));
                }
                self.each(parts.into_iter(), |(first, y, mut raw, mut stats)| {
                    let mut pixels = PixelWindows::new(sample, size, window);
                    let rooms = [strip * grid.width * row, strip * line, strip * pairs];
                    with_room(rooms, |[patches, raw_room, stats_room]| {
                        for (number, y) in y.chunks_mut(strip * line).enumerate() {
                            let (start, count) = (number * strip, y.len() / line);
                            let patches = &mut patches[..count * grid.width * row];
                            let raw = match &mut raw {
                                Some(raw) => &mut raw[start * line..][..count * line],
                                None => &mut raw_room[..count * line],
                            };
                            let stats = match &mut stats {
                                Some(stats) => &mut stats[start * pairs..][..count * pairs],
                                None => &mut stats_room[..count * pairs],
                            };
                            pixels.gather(first + start, grid.width, patches);
                            let product = Product { rows: count * grid.width, ..product };
                            linear(patches, w, bias.map(|bias| &bias[..]), product, raw, false);
                            normalise(raw, norm, channels, y, stats);
                        }
                    });
                });
            }
        });
        self.next_norm(y, samples.len() * grid.area(), channels, next);
    }

    fn embed_pixels_backward(
        &self,
        samples: &[Sample<'_>],
        size: usize,
        window: Window,
        draw: &Buffer<T>,
        channels: usize,
        dw: &mut Buffer<T>,
    ) {
        let (grid, row) = (windows(size, window), PixelWindows::<T>::row(window));
        let (strip, line) = (strip(grid), grid.width * channels);
        for (sample, draw) in samples.iter().zip(draw.chunks(grid.height * line)) {
            let mut pixels = PixelWindows::new(sample, size, window);
            with_room([strip * grid.width * row], |[patches]| {
                for (number, draw) in draw.chunks(strip * line).enumerate() {
                    let rows = draw.len() / channels;
                    let patches = &mut patches[..rows * row];
                    pixels.gather(number * strip, grid.width, patches);
                    let (d, patches) = (View::rows(draw, channels), View::rows(patches, row));
                    product((channels, row, rows), T::ONE, d.t(), patches, dw, 0, row, true);
                }
            });
        }
    }
}

impl<T: Real> Patches for Cpu<T> {
    fn pixel_patches(&self, samples: &[Sample<'_>], size: usize, window: Window, out: &mut Buffer<T>) {
        let (grid, row) = (windows(size, window), PixelWindows::<T>::row(window));
        for (sample, out) in samples.iter().zip(out.chunks_exact_mut(grid.area() * row)) {
            let share = self.share(grid.height, 1);
            self.each(out.chunks_mut(share * grid.width * row).enumerate(), |(part, out)| {
                PixelWindows::new(sample, size, window).gather(part * share, grid.width, out);
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

    fn patches_backward(&self, dout: &Buffer<T>, grid: Grid, channels: usize, window: Window, dx: &mut Buffer<T>) {
        let row = window.side * window.side * channels;
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
