//! BatchNorm, ReLU and dropout at the end of the decoder.

use super::{Cpu, Real, simd::vectorised};
use crate::backend::{BatchNormView, Dropout, Head};

/// Added to the variance.
const EPSILON: f64 = 1e-5;
/// Rows summed before the sum joins the total.
const BLOCK: usize = 128;

/// Adds `terms(row, channel)` over the rows to `total`, by blocks of rows.
#[inline(always)]
fn column_sums<T: Real>(rows: usize, channels: usize, total: &mut [T], term: impl Fn(usize, usize) -> T) {
    let mut partial = vec![T::ZERO; channels];
    for start in (0..rows).step_by(BLOCK) {
        partial.fill(T::ZERO);
        for row in start..rows.min(start + BLOCK) {
            for (c, partial) in partial.iter_mut().enumerate() {
                *partial += term(row, c);
            }
        }
        for (total, partial) in total.iter_mut().zip(&partial) {
            *total += *partial;
        }
    }
}

impl<T: Real> Head for Cpu<T> {
    fn batch_moments(&self, z: &Vec<T>, rows: usize, channels: usize, moments: &mut Vec<T>) {
        moments[..2 * channels].fill(T::ZERO);
        let (mean, square) = moments[..2 * channels].split_at_mut(channels);
        let z = &z[..rows * channels];
        vectorised(
            #[inline(always)]
            || {
                column_sums(
                    rows,
                    channels,
                    mean,
                    #[inline(always)]
                    |row, c| z[row * channels + c],
                );
                let share = T::of(1.0 / rows as f64);
                for mean in mean.iter_mut() {
                    *mean *= share;
                }
                let mean = &*mean;
                column_sums(
                    rows,
                    channels,
                    square,
                    #[inline(always)]
                    |row, c| {
                        let d = z[row * channels + c] - mean[c];
                        d * d
                    },
                );
            },
        );
    }

    fn batch_stats(
        &self,
        moments: &[&Vec<T>],
        rows: &[usize],
        channels: usize,
        momentum: f64,
        stats: &mut Vec<T>,
        running_mean: &mut Vec<T>,
        running_var: &mut Vec<T>,
    ) {
        let total: usize = rows.iter().sum();
        for c in 0..channels {
            let (mut count, mut mean, mut square) = (0.0f64, 0.0f64, 0.0f64);
            for (moments, &n) in moments.iter().zip(rows) {
                let n = n as f64;
                let delta = moments[c].f64() - mean;
                square += moments[channels + c].f64() + delta * delta * count * n / (count + n);
                mean += delta * n / (count + n);
                count += n;
            }
            let variance = square / total as f64;
            let unbiased = square / (total as f64 - 1.0).max(1.0);
            stats[c] = T::of(mean);
            stats[channels + c] = T::of(1.0 / (variance + EPSILON).sqrt());
            running_mean[c] = T::of((1.0 - momentum) * running_mean[c].f64() + momentum * mean);
            running_var[c] = T::of((1.0 - momentum) * running_var[c].f64() + momentum * unbiased);
        }
    }

    fn running_stats(&self, running_mean: &Vec<T>, running_var: &Vec<T>, channels: usize, stats: &mut Vec<T>) {
        for c in 0..channels {
            stats[c] = running_mean[c];
            stats[channels + c] = T::of(1.0 / (running_var[c].f64() + EPSILON).sqrt());
        }
    }

    fn head_activation(
        &self,
        z: &Vec<T>,
        norm: BatchNormView<'_, Vec<T>>,
        drop: Option<Dropout>,
        rows: usize,
        channels: usize,
        a: &mut Vec<T>,
    ) {
        let (mean, scale) = norm.stats[..2 * channels].split_at(channels);
        let (gamma, beta) = (&norm.gamma[..channels], &norm.beta[..channels]);
        vectorised(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let z = &z[row * channels..][..channels];
                    let a = &mut a[row * channels..][..channels];
                    for c in 0..channels {
                        let after = (z[c] - mean[c]) * scale[c] * gamma[c] + beta[c];
                        // Written so that a NaN passes through and shows in the loss.
                        a[c] = if after < T::ZERO { T::ZERO } else { after };
                    }
                    if let Some(drop) = drop {
                        drop.factors(
                            (row * channels) as u64,
                            channels,
                            #[inline(always)]
                            |c, f| a[c] *= T::of(f64::from(f)),
                        );
                    }
                }
            },
        );
    }

    fn head_backward(
        &self,
        z: &Vec<T>,
        norm: BatchNormView<'_, Vec<T>>,
        drop: Option<Dropout>,
        rows: usize,
        channels: usize,
        da: &mut Vec<T>,
        sums: &mut Vec<T>,
    ) {
        let (mean, scale) = norm.stats[..2 * channels].split_at(channels);
        let (gamma, beta) = (&norm.gamma[..channels], &norm.beta[..channels]);
        let z = &z[..rows * channels];
        let da = &mut da[..rows * channels];
        sums[..2 * channels].fill(T::ZERO);
        let (shift_sums, scale_sums) = sums[..2 * channels].split_at_mut(channels);
        for start in (0..rows).step_by(BLOCK) {
            let count = BLOCK.min(rows - start);
            let z = &z[start * channels..][..count * channels];
            let da = &mut da[start * channels..][..count * channels];
            vectorised(
                #[inline(always)]
                || {
                    for (row, (z, da)) in z.chunks_exact(channels).zip(da.chunks_exact_mut(channels)).enumerate() {
                        for c in 0..channels {
                            let after = (z[c] - mean[c]) * scale[c] * gamma[c] + beta[c];
                            da[c] = if after > T::ZERO { da[c] } else { T::ZERO };
                        }
                        if let Some(drop) = drop {
                            let first = ((start + row) * channels) as u64;
                            drop.factors(
                                first,
                                channels,
                                #[inline(always)]
                                |c, f| da[c] *= T::of(f64::from(f)),
                            );
                        }
                    }
                    let da = &*da;
                    column_sums(
                        count,
                        channels,
                        shift_sums,
                        #[inline(always)]
                        |row, c| da[row * channels + c],
                    );
                    column_sums(
                        count,
                        channels,
                        scale_sums,
                        #[inline(always)]
                        |row, c| da[row * channels + c] * ((z[row * channels + c] - mean[c]) * scale[c]),
                    );
                },
            );
        }
    }

    fn batch_sums(&self, sums: &[&Vec<T>], total: &mut Vec<T>) {
        total.fill(T::ZERO);
        for sums in sums {
            for (total, sum) in total.iter_mut().zip(sums.iter()) {
                *total += *sum;
            }
        }
    }

    fn batch_norm_backward(
        &self,
        z: &Vec<T>,
        norm: BatchNormView<'_, Vec<T>>,
        total: &Vec<T>,
        batch_rows: usize,
        rows: usize,
        channels: usize,
        dy: &mut Vec<T>,
    ) {
        let share = T::of(1.0 / batch_rows as f64);
        let (mean, scale) = norm.stats[..2 * channels].split_at(channels);
        let gamma = &norm.gamma[..channels];
        let (shift_sums, scale_sums) = total[..2 * channels].split_at(channels);
        vectorised(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let (z, dy) = (&z[row * channels..][..channels], &mut dy[row * channels..][..channels]);
                    for c in 0..channels {
                        let normalised = (z[c] - mean[c]) * scale[c];
                        let centred = dy[c] - share * (shift_sums[c] + normalised * scale_sums[c]);
                        dy[c] = gamma[c] * scale[c] * centred;
                    }
                }
            },
        );
    }
}
