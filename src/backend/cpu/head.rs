//! BatchNorm, ReLU and dropout at the end of the decoder.

use super::linear::{Weights, linear};
use super::resize::{resize_line, spread_line};
use super::room::{strip, with_room};
use super::simd::{Level, each, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::{BatchNormView, Classifier, Dropout, FirstStage, Grid, Head, Product};

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

/// `a = dropout(relu(batch_norm(z)))`, both `(rows, channels)`, the rows from number `first` on.
#[inline(always)]
fn activate<T: Real>(
    z: &[T],
    norm: BatchNormView<'_, Buffer<T>>,
    drop: Option<Dropout>,
    first: usize,
    channels: usize,
    a: &mut [T],
    level: Level,
) {
    let (mean, scale) = norm.stats[..2 * channels].split_at(channels);
    let (gamma, beta) = (&norm.gamma[..channels], &norm.beta[..channels]);
    for (row, (z, a)) in z.chunks_exact(channels).zip(a.chunks_exact_mut(channels)).enumerate() {
        each([z, mean, scale, gamma, beta], a, |[z, mean, scale, gamma, beta], _| {
            let after = ((z - mean) * scale).mul_add(gamma, beta, level);
            // Written so that a NaN passes through and shows in the loss.
            if after < T::ZERO { T::ZERO } else { after }
        });
        if let Some(drop) = drop {
            apply(drop, first + row, a);
        }
    }
}

/// Mean and squared deviations per channel of rows that come one behind the other.
struct Measure<'a, T> {
    channels: usize,
    /// Rows so far.
    rows: usize,
    mean: &'a mut [T],
    square: &'a mut [T],
    /// The same of one block.
    block: Vec<T>,
}

impl<'a, T: Real> Measure<'a, T> {
    /// Nothing yet; `moments` receives means and then squared deviations.
    fn new(moments: &'a mut [T], channels: usize) -> Self {
        let moments = &mut moments[..2 * channels];
        moments.fill(T::ZERO);
        let (mean, square) = moments.split_at_mut(channels);
        Self { channels, rows: 0, mean, square, block: vec![T::ZERO; 2 * channels] }
    }

    /// Each block of rows while it is in cache, then joined to the others (Chan, Golub, LeVeque, 1979).
    #[inline(always)]
    fn add(&mut self, z: &[T], level: Level) {
        let Self { channels, rows, mean, square, block } = self;
        let channels = *channels;
        let (own_mean, own_square) = block.split_at_mut(channels);
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
            let (n, m) = (*rows as f64, count as f64);
            let (part, weight) = (T::of(m / (n + m)), T::of(n * m / (n + m)));
            for c in 0..channels {
                let delta = own_mean[c] - mean[c];
                mean[c] += part * delta;
                square[c] += own_square[c] + weight * (delta * delta);
            }
            *rows += count;
        }
    }
}

impl<T: Real> Head for Cpu<T> {
    fn join_stages(
        &self,
        first: Option<FirstStage<'_, Self>>,
        parts: &[(&Buffer<T>, Grid)],
        to: Grid,
        channels: usize,
        z: &mut Buffer<T>,
        moments: Option<&mut Buffer<T>>,
    ) {
        if let Some(first) = first {
            first.multiply(self, to.rows(), channels, z);
        }
        // Lines that make whole blocks, so that the moments are those of `batch_moments` to the bit.
        let whole = (1..=BLOCK).find(|lines| (lines * to.width).is_multiple_of(BLOCK)).unwrap_or(BLOCK);
        let line = to.width * channels;
        let z = &mut z[..to.rows() * channels];
        let join = |first: usize, z: &mut [T]| {
            vectorised(
                #[inline(always)]
                |_| {
                    for (row, z) in z.chunks_exact_mut(line).enumerate() {
                        for (part, from) in parts {
                            resize_line(part, *from, to, channels, first + row, z, true);
                        }
                    }
                },
            );
        };
        let lines = self.share(to.images * to.height, whole);
        let shared = lines < to.images * to.height;
        if shared {
            self.each(z.chunks_mut(lines * line).enumerate(), |(part, z)| join(part * lines, z));
        }
        let mut measure = moments.map(|moments| Measure::new(moments, channels));
        for (strip, z) in z.chunks_mut(whole * line).enumerate() {
            if !shared {
                join(strip * whole, z);
            }
            if let Some(measure) = &mut measure {
                vectorised(
                    #[inline(always)]
                    |level| measure.add(z, level),
                );
            }
        }
    }

    fn classifies_stages(&self, _: usize, _: &[Grid], _: Grid, _: usize, _: usize) -> bool {
        true
    }

    /// Strip by strip, and line by line behind z, so that both stay in the second-level cache.
    fn classify_stages(
        &self,
        first: Option<FirstStage<'_, Self>>,
        parts: &[(&Buffer<T>, Grid)],
        to: Grid,
        channels: usize,
        z: &mut Buffer<T>,
        norm: BatchNormView<'_, Buffer<T>>,
        classifier: Classifier<'_, Self>,
        _: &mut Buffer<T>,
        logits: &mut Buffer<T>,
    ) {
        let Classifier { weight, bias, labels } = classifier;
        let (line, logit_line) = (to.width * channels, to.width * labels);
        let strip = strip(to);
        let lines = self.share((to.images * to.height).div_ceil(strip), 1) * strip;
        let logits = logits[..to.rows() * labels].chunks_mut(lines * logit_line);
        let inputs = first.as_ref().map_or(0, |first| first.inputs);
        with_room([self.packed(channels, inputs)], |[packed]| {
            let first = first.map(|FirstStage { tokens, weight, bias, inputs }| {
                let product = Product { rows: 0, inputs, outputs: channels };
                (tokens, Weights::new(weight, product, packed), bias, product)
            });
            self.each(logits.enumerate(), |(share, logits)| {
                with_room([strip * line, line], |[room, activation]| {
                    for (number, logits) in logits.chunks_mut(strip * logit_line).enumerate() {
                        let (start, count) = (share * lines + number * strip, logits.len() / logit_line);
                        let room = &mut room[..count * line];
                        match &first {
                            Some((tokens, weight, bias, product)) => {
                                let product = Product { rows: count * to.width, ..*product };
                                let tokens = &tokens[start * to.width * product.inputs..];
                                linear(tokens, *weight, bias.map(|bias| &bias[..]), product, room, false);
                            }
                            None => room.copy_from_slice(&z[start * line..][..count * line]),
                        }
                        for (row, (z, logits)) in
                            room.chunks_exact_mut(line).zip(logits.chunks_exact_mut(logit_line)).enumerate()
                        {
                            vectorised(
                                #[inline(always)]
                                |level| {
                                    for (part, from) in parts {
                                        resize_line(part, *from, to, channels, start + row, z, true);
                                    }
                                    activate(z, norm, None, 0, channels, activation, level);
                                },
                            );
                            let product = Product { rows: to.width, inputs: channels, outputs: labels };
                            linear(activation, Weights::Plain(weight), Some(bias), product, logits, false);
                        }
                    }
                });
            });
        });
    }

    fn split_stages(&self, dz: &Buffer<T>, from: Grid, channels: usize, parts: &mut [(&mut Buffer<T>, Grid)]) {
        let spread = |parts: &mut [(&mut Buffer<T>, Grid)]| {
            for (part, grid) in &mut *parts {
                part[..grid.rows() * channels].fill(T::ZERO);
            }
            for (row, dz) in dz[..from.rows() * channels].chunks_exact(from.width * channels).enumerate() {
                vectorised(
                    #[inline(always)]
                    |_| {
                        for (part, grid) in &mut *parts {
                            spread_line(dz, *grid, from, channels, row, part);
                        }
                    },
                );
            }
        };
        let stages = self.share(parts.len(), 1);
        self.each(parts.chunks_mut(stages), spread);
    }

    fn batch_moments(&self, z: &Buffer<T>, rows: usize, channels: usize, moments: &mut Buffer<T>) {
        let mut measure = Measure::new(moments, channels);
        vectorised(
            #[inline(always)]
            |level| measure.add(&z[..rows * channels], level),
        );
    }

    fn batch_stats(
        &self,
        moments: &[&Buffer<T>],
        rows: &[usize],
        channels: usize,
        momentum: f64,
        stats: &mut Buffer<T>,
        running_mean: &mut Buffer<T>,
        running_var: &mut Buffer<T>,
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

    fn running_stats(&self, running_mean: &Buffer<T>, running_var: &Buffer<T>, channels: usize, stats: &mut Buffer<T>) {
        for c in 0..channels {
            stats[c] = running_mean[c];
            stats[channels + c] = T::of(1.0 / (running_var[c].f64() + EPSILON).sqrt());
        }
    }

    fn head_activation(
        &self,
        z: &Buffer<T>,
        norm: BatchNormView<'_, Buffer<T>>,
        drop: Option<Dropout>,
        rows: usize,
        channels: usize,
        a: &mut Buffer<T>,
    ) {
        let part = self.share(rows, 1);
        let z = z[..rows * channels].chunks(part * channels);
        self.each(z.zip(a[..rows * channels].chunks_mut(part * channels)).enumerate(), |(share, (z, a))| {
            vectorised(
                #[inline(always)]
                |level| activate(z, norm, drop, share * part, channels, a, level),
            );
        });
    }

    fn head_backward(
        &self,
        z: &Buffer<T>,
        norm: BatchNormView<'_, Buffer<T>>,
        drop: Option<Dropout>,
        rows: usize,
        channels: usize,
        da: &mut Buffer<T>,
        sums: &mut Buffer<T>,
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

    fn batch_norm_backward(
        &self,
        z: &Buffer<T>,
        norm: BatchNormView<'_, Buffer<T>>,
        total: &Buffer<T>,
        batch_rows: usize,
        rows: usize,
        channels: usize,
        dy: &mut Buffer<T>,
    ) {
        let share = T::of(1.0 / batch_rows as f64);
        let (mean, scale) = norm.stats[..2 * channels].split_at(channels);
        let gamma = &norm.gamma[..channels];
        let (shift_sums, scale_sums) = total[..2 * channels].split_at(channels);
        let (shift_sums, scale_sums) = (&shift_sums[..channels], &scale_sums[..channels]);
        let part = self.share(rows, 1) * channels;
        let parts = z[..rows * channels].chunks(part).zip(dy[..rows * channels].chunks_mut(part));
        let work = |(z, dy): (&[T], &mut [T])| {
            vectorised(
                #[inline(always)]
                |level| {
                    for (z, dy) in z.chunks_exact(channels).zip(dy.chunks_exact_mut(channels)) {
                        let constants = [z, mean, scale, gamma, shift_sums, scale_sums];
                        each(constants, dy, |[z, mean, scale, gamma, shift_sum, scale_sum], dy| {
                            let normalised = (z - mean) * scale;
                            let centred = dy - share * normalised.mul_add(scale_sum, shift_sum, level);
                            gamma * scale * centred
                        });
                    }
                },
            )
        };
        self.each(parts, work);
    }
}
