//! Bilinear interpolation, half-pixel centres.

use super::simd::{each, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::{Grid, Resize};

/// Where output position `i` of `to` reads among `from` inputs: the two neighbours and the second one's weight.
/// As PyTorch computes it: source = (i + ½)·from/to - ½, not below 0.
#[inline(always)]
pub(super) fn source(i: usize, from: usize, to: usize) -> (usize, usize, f64) {
    let position = ((i as f64 + 0.5) * (from as f64 / to as f64) - 0.5).max(0.0);
    let low = (position as usize).min(from - 1);
    (low, (low + 1).min(from - 1), position - low as f64)
}

/// Writes (or with `add` adds) line `row` of all lines of x, resized from `from` to `to`, to y `(to.width, channels)`.
#[inline(always)]
pub(super) fn resize_line<T: Real>(x: &[T], from: Grid, to: Grid, channels: usize, row: usize, y: &mut [T], add: bool) {
    let (image, oy) = (row / to.height, row % to.height);
    let (y0, y1, wy) = source(oy, from.height, to.height);
    let line = |y: usize| &x[(image * from.height + y) * from.width * channels..][..from.width * channels];
    let (upper, lower) = (line(y0), line(y1));
    for (ox, out) in y.chunks_exact_mut(channels).enumerate() {
        let (x0, x1, wx) = source(ox, from.width, to.width);
        let weights = [(1.0 - wy) * (1.0 - wx), (1.0 - wy) * wx, wy * (1.0 - wx), wy * wx].map(T::of);
        let a = &upper[x0 * channels..][..channels];
        let b = &upper[x1 * channels..][..channels];
        let c = &lower[x0 * channels..][..channels];
        let d = &lower[x1 * channels..][..channels];
        let value = |[a, b, c, d]: [T; 4]| weights[0] * a + weights[1] * b + (weights[2] * c + weights[3] * d);
        if add {
            each([a, b, c, d], out, |from, out| out + value(from));
        } else {
            each([a, b, c, d], out, |from, _| value(from));
        }
    }
}

/// Adds to dx what the gradient of line `row` of all lines, dy `(to.width, channels)`, contributes: the transpose of
/// [`resize_line`].
#[inline(always)]
pub(super) fn spread_line<T: Real>(dy: &[T], from: Grid, to: Grid, channels: usize, row: usize, dx: &mut [T]) {
    let (image, oy) = (row / to.height, row % to.height);
    let (y0, y1, wy) = source(oy, from.height, to.height);
    for (ox, d) in dy.chunks_exact(channels).enumerate() {
        let (x0, x1, wx) = source(ox, from.width, to.width);
        for (y, x, weight) in
            [(y0, x0, (1.0 - wy) * (1.0 - wx)), (y0, x1, (1.0 - wy) * wx), (y1, x0, wy * (1.0 - wx)), (y1, x1, wy * wx)]
        {
            let weight = T::of(weight);
            let at = ((image * from.height + y) * from.width + x) * channels;
            each([d], &mut dx[at..][..channels], |[d], dx| dx + weight * d);
        }
    }
}

impl<T: Real> Resize for Cpu<T> {
    fn upsample(&self, x: &Buffer<T>, from: Grid, to: Grid, channels: usize, y: &mut Buffer<T>, add: bool) {
        let n = to.rows() * channels;
        if from == to {
            let (x, y) = (&x[..n], &mut y[..n]);
            if add {
                vectorised(
                    #[inline(always)]
                    |_| {
                        for i in 0..n {
                            y[i] += x[i];
                        }
                    },
                );
            } else {
                y.copy_from_slice(x);
            }
            return;
        }
        for (row, y) in y[..n].chunks_exact_mut(to.width * channels).enumerate() {
            vectorised(
                #[inline(always)]
                |_| resize_line(x, from, to, channels, row, y, add),
            );
        }
    }

    fn upsample_backward(&self, dy: &Buffer<T>, from: Grid, to: Grid, channels: usize, dx: &mut Buffer<T>) {
        if from == to {
            dx[..to.rows() * channels].copy_from_slice(&dy[..to.rows() * channels]);
            return;
        }
        dx[..from.rows() * channels].fill(T::ZERO);
        for (row, dy) in dy[..to.rows() * channels].chunks_exact(to.width * channels).enumerate() {
            vectorised(
                #[inline(always)]
                |_| spread_line(dy, from, to, channels, row, dx),
            );
        }
    }
}
