//! LayerNorm over channels.

use super::{Cpu, Real, simd::vectorised};
use crate::backend::LayerNorm;

/// Added to the variance.
const EPSILON: f64 = 1e-5;

/// Sum in a fixed order of 16 interleaved partial sums, which become vector lanes.
#[inline(always)]
pub(super) fn sum<T: Real>(n: usize, term: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; 16];
    let whole = n / 16 * 16;
    for start in (0..whole).step_by(16) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(start + lane);
        }
    }
    for i in whole..n {
        lanes[i - whole] += term(i);
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

impl<T: Real> LayerNorm for Cpu<T> {
    fn layer_norm(
        &self,
        x: &Vec<T>,
        gamma: &Vec<T>,
        beta: &Vec<T>,
        rows: usize,
        channels: usize,
        y: &mut Vec<T>,
        stats: &mut Vec<T>,
    ) {
        let share = T::of(1.0 / channels as f64);
        let (gamma, beta) = (&gamma[..channels], &beta[..channels]);
        vectorised(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let x = &x[row * channels..][..channels];
                    let y = &mut y[row * channels..][..channels];
                    let mean = sum(channels, |c| x[c]) * share;
                    let variance = sum(channels, |c| (x[c] - mean) * (x[c] - mean)) * share;
                    let scale = T::ONE / (variance + T::of(EPSILON)).sqrt();
                    for c in 0..channels {
                        y[c] = (x[c] - mean) * scale * gamma[c] + beta[c];
                    }
                    stats[2 * row] = mean;
                    stats[2 * row + 1] = scale;
                }
            },
        );
    }

    fn layer_norm_backward(
        &self,
        dy: &Vec<T>,
        x: &Vec<T>,
        stats: &Vec<T>,
        gamma: &Vec<T>,
        rows: usize,
        channels: usize,
        dx: &mut Vec<T>,
        add: bool,
    ) {
        let share = T::of(1.0 / channels as f64);
        let gamma = &gamma[..channels];
        vectorised(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let dy = &dy[row * channels..][..channels];
                    let x = &x[row * channels..][..channels];
                    let dx = &mut dx[row * channels..][..channels];
                    let (mean, scale) = (stats[2 * row], stats[2 * row + 1]);
                    let first = sum(channels, |c| dy[c] * gamma[c]) * share;
                    let second = sum(channels, |c| dy[c] * gamma[c] * (x[c] - mean)) * share * scale * scale;
                    if add {
                        for c in 0..channels {
                            dx[c] += (dy[c] * gamma[c] - first - (x[c] - mean) * second) * scale;
                        }
                    } else {
                        for c in 0..channels {
                            dx[c] = (dy[c] * gamma[c] - first - (x[c] - mean) * second) * scale;
                        }
                    }
                }
            },
        );
    }

    fn layer_norm_backward_params(
        &self,
        dy: &Vec<T>,
        x: &Vec<T>,
        stats: &Vec<T>,
        rows: usize,
        channels: usize,
        dgamma: &mut Vec<T>,
        dbeta: &mut Vec<T>,
    ) {
        vectorised(
            #[inline(always)]
            || {
                let mut partial = vec![T::ZERO; 2 * channels];
                for start in (0..rows).step_by(128) {
                    partial.fill(T::ZERO);
                    let (scale_sums, shift_sums) = partial.split_at_mut(channels);
                    for row in start..rows.min(start + 128) {
                        let dy = &dy[row * channels..][..channels];
                        let x = &x[row * channels..][..channels];
                        let (mean, scale) = (stats[2 * row], stats[2 * row + 1]);
                        for c in 0..channels {
                            scale_sums[c] += dy[c] * ((x[c] - mean) * scale);
                            shift_sums[c] += dy[c];
                        }
                    }
                    for c in 0..channels {
                        dgamma[c] += scale_sums[c];
                        dbeta[c] += shift_sums[c];
                    }
                }
            },
        );
    }
}
