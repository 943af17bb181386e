//! BatchNorm, ReLU and dropout at the end of the decoder.

use super::simd::{each, vectorised};
use super::{Cpu, Real};
use crate::backend::{BatchNormView, Dropout, Head};

/// Added to the variance.
const EPSILON: f64 = 1e-5;
/// Rows summed before the sum joins the total.
const BLOCK: usize = 128;

/// Multiplies row number `row` by its elements' factors.
#[inline(always)]
fn apply<T: Real>(drop: Dropout, row: usize, x: &mut [T]) {
    drop.factors(
        (row * x.len()) as u64,
        x.len(),
        #[inline(always)]
        |start, factors| {
            for (x, f) in x[start..].iter_mut().zip(factors) {
                *x *= T::of(f64::from(*f));
            }
        },
    );
}

impl<T: Real> Head for Cpu<T> {
    fn batch_moments(&self, z: &Vec<T>, rows: usize, channels: usize, moments: &mut Vec<T>) {
        moments[..2 * channels].fill(T::ZERO);
        let (mean, square) = moments[..2 * channels].split_at_mut(channels);
        let mut own = vec![T::ZERO; 2 * channels];
        let (own_mean, own_square) = own.split_at_mut(channels);
        let z = &z[..rows * channels];
        vectorised(
            #[inline(always)]
            |level| {
                // Each block while it is in cache, then joined to the others (Chan, Golub, LeVeque, 1979).
                let mut before = 0;
                for block in z.chunks(BLOCK * channels) {
                    let count = block.len() / channels;
                    let share = T::of(1.0 / count as f64);
                    own_mean.fill(T::ZERO);
                    own_square.fill(T::ZERO);
                    for z in block.chunks_exact(channels) {
                        each([z], own_mean, |[z], sum| sum + z);
                    }
                    for mean in own_mean.iter_mut() {
                        *mean *= share;
                    }
                    for z in block.chunks_exact(channels) {
                        each([z, own_mean], own_square, |[z, mean], sum| {
                            let d = z - mean;
                            d.mul_add(d, sum, level)
                        });
                    }
                    let (n, m) = (before as f64, count as f64);
                    let (part, weight) = (T::of(m / (n + m)), T::of(n * m / (n + m)));
                    for c in 0..channels {
                        let delta = own_mean[c] - mean[c];
                        mean[c] += part * delta;
                        square[c] += own_square[c] + weight * (delta * delta);
                    }
                    before += count;
                }
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
        let z = z[..rows * channels].chunks_exact(channels);
        let a = a[..rows * channels].chunks_exact_mut(channels);
        vectorised(
            #[inline(always)]
            |level| {
                for (row, (z, a)) in z.zip(a).enumerate() {
                    each([z, mean, scale, gamma, beta], a, |[z, mean, scale, gamma, beta], _| {
                        let after = ((z - mean) * scale).mul_add(gamma, beta, level);
                        // Written so that a NaN passes through and shows in the loss.
                        if after < T::ZERO { T::ZERO } else { after }
                    });
                    if let Some(drop) = drop {
                        apply(drop, row, a);
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
        let mut partial = vec![T::ZERO; 2 * channels];
        vectorised(
            #[inline(always)]
            |level| {
                let (shift_part, scale_part) = partial.split_at_mut(channels);
                let blocks = z.chunks(BLOCK * channels).zip(da.chunks_mut(BLOCK * channels));
                for (block, (z, da)) in blocks.enumerate() {
                    shift_part.fill(T::ZERO);
                    scale_part.fill(T::ZERO);
                    for (row, (z, da)) in z.chunks_exact(channels).zip(da.chunks_exact_mut(channels)).enumerate() {
                        if let Some(drop) = drop {
                            apply(drop, block * BLOCK + row, da);
                        }
                        each([z, mean, scale, gamma, beta], da, |[z, mean, scale, gamma, beta], da| {
                            let after = ((z - mean) * scale).mul_add(gamma, beta, level);
                            if after > T::ZERO { da } else { T::ZERO }
                        });
                        each([da], shift_part, |[da], sum| sum + da);
                        each([da, z, mean, scale], scale_part, |[da, z, mean, scale], sum| {
                            da.mul_add((z - mean) * scale, sum, level)
                        });
                    }
                    for c in 0..channels {
                        shift_sums[c] += shift_part[c];
                        scale_sums[c] += scale_part[c];
                    }
                }
            },
        );
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
        let (shift_sums, scale_sums) = (&shift_sums[..channels], &scale_sums[..channels]);
        let z = z[..rows * channels].chunks_exact(channels);
        let dy = dy[..rows * channels].chunks_exact_mut(channels);
        vectorised(
            #[inline(always)]
            |level| {
                for (z, dy) in z.zip(dy) {
                    let constants = [z, mean, scale, gamma, shift_sums, scale_sums];
                    each(constants, dy, |[z, mean, scale, gamma, shift_sum, scale_sum], dy| {
                        let normalised = (z - mean) * scale;
                        let centred = dy - share * normalised.mul_add(scale_sum, shift_sum, level);
                        gamma * scale * centred
                    });
                }
            },
        );
    }
}
