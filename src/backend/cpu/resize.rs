//! Bilinear interpolation, half-pixel centres.

use super::{Cpu, Real, simd::vectorised};
use crate::backend::{Grid, Resize};

/// Where output position `i` of `to` reads among `from` inputs: the two neighbours and the second one's weight.
/// As PyTorch computes it: source = (i + ½)·from/to - ½, not below 0.
#[inline(always)]
pub(super) fn source(i: usize, from: usize, to: usize) -> (usize, usize, f64) {
    let position = ((i as f64 + 0.5) * (from as f64 / to as f64) - 0.5).max(0.0);
    let low = (position as usize).min(from - 1);
    (low, (low + 1).min(from - 1), position - low as f64)
}

impl<T: Real> Resize for Cpu<T> {
    fn upsample(&self, x: &Vec<T>, from: Grid, to: Grid, channels: usize, y: &mut Vec<T>, add: bool) {
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
        for row in 0..to.images * to.height {
            let (image, oy) = (row / to.height, row % to.height);
            let (y0, y1, wy) = source(oy, from.height, to.height);
            let line = |y: usize| &x[(image * from.height + y) * from.width * channels..][..from.width * channels];
            let (upper, lower) = (line(y0), line(y1));
            vectorised(
                #[inline(always)]
                |_| {
                    for ox in 0..to.width {
                        let (x0, x1, wx) = source(ox, from.width, to.width);
                        let weights = [(1.0 - wy) * (1.0 - wx), (1.0 - wy) * wx, wy * (1.0 - wx), wy * wx].map(T::of);
                        let out = &mut y[(row * to.width + ox) * channels..][..channels];
                        let a = &upper[x0 * channels..][..channels];
                        let b = &upper[x1 * channels..][..channels];
                        let c = &lower[x0 * channels..][..channels];
                        let d = &lower[x1 * channels..][..channels];
                        for i in 0..channels {
                            let value = weights[0] * a[i] + weights[1] * b[i] + (weights[2] * c[i] + weights[3] * d[i]);
                            out[i] = if add { out[i] + value } else { value };
                        }
                    }
                },
            );
        }
    }

    fn upsample_backward(&self, dy: &Vec<T>, from: Grid, to: Grid, channels: usize, dx: &mut Vec<T>) {
        if from == to {
            dx[..to.rows() * channels].copy_from_slice(&dy[..to.rows() * channels]);
            return;
        }
        dx[..from.rows() * channels].fill(T::ZERO);
        for row in 0..to.images * to.height {
            let (image, oy) = (row / to.height, row % to.height);
            let (y0, y1, wy) = source(oy, from.height, to.height);
            vectorised(
                #[inline(always)]
                |_| {
                    for ox in 0..to.width {
                        let (x0, x1, wx) = source(ox, from.width, to.width);
                        let d = &dy[(row * to.width + ox) * channels..][..channels];
                        for (y, x, weight) in [
                            (y0, x0, (1.0 - wy) * (1.0 - wx)),
                            (y0, x1, (1.0 - wy) * wx),
                            (y1, x0, wy * (1.0 - wx)),
                            (y1, x1, wy * wx),
                        ] {
                            let weight = T::of(weight);
                            let at = ((image * from.height + y) * from.width + x) * channels;
                            for (dx, d) in dx[at..][..channels].iter_mut().zip(d) {
                                *dx += weight * *d;
                            }
                        }
                    }
                },
            );
        }
    }
}
