//! LayerNorm over channels.

use super::simd::{block_by_block, each, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::LayerNorm;

/// Added to the variance.
const EPSILON: f64 = 1e-5;

/// Sum of 16 lanes, in a fixed order.
#[inline(always)]
pub(super) fn fold<T: Real>(lanes: [T; 16]) -> T {
    let eight: [T; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [T; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Sum of `term` over rows of equal length, in a fixed order of 16 interleaved partial sums, which become vector lanes.
#[inline(always)]
pub(super) fn sum<T: Real, const N: usize>(rows: [&[T]; N], term: impl Fn([T; N]) -> T) -> T {
    accumulate(rows, |row, sum| sum + term(row))
}

/// The same with sums that `join(elements, sum)` adds to.
#[inline(always)]
pub(super) fn accumulate<T: Real, const N: usize>(rows: [&[T]; N], join: impl Fn([T; N], T) -> T) -> T {
    let mut lanes = [T::ZERO; 16];
    let parts = rows.map(|row| row.as_chunks::<16>());
    for block in 0..parts[0].0.len() {
        block_by_block();
        let blocks: [&[T; 16]; N] = std::array::from_fn(|k| &parts[k].0[block]);
        for i in 0..16 {
            lanes[i] = join(std::array::from_fn(|k| blocks[k][i]), lanes[i]);
        }
    }
    for i in 0..parts[0].1.len() {
        lanes[i] = join(std::array::from_fn(|k| parts[k].1[i]), lanes[i]);
    }
    fold(lanes)
}

/// Rows of `channels`, normalised with scale and shift; `stats` receives (mean, 1/std) per row.
pub(super) fn normalise<T: Real>(
    x: &[T],
    (gamma, beta): (&Buffer<T>, &Buffer<T>),
    channels: usize,
    y: &mut [T],
    stats: &mut [T],
) {
    let share = T::of(1.0 / channels as f64);
    let (gamma, beta) = (&gamma[..channels], &beta[..channels]);
    vectorised(
        #[inline(always)]
        |level| {
            let rows = x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)).zip(stats.chunks_exact_mut(2));
            for ((x, y), stats) in rows {
                let mean = sum([x], |[x]| x) * share;
                let variance = sum([x], |[x]| (x - mean) * (x - mean)) * share;
                let scale = T::ONE / (variance + T::of(EPSILON)).sqrt();
                each([x, gamma, beta], y, |[x, gamma, beta], _| ((x - mean) * scale).mul_add(gamma, beta, level));
                stats[0] = mean;
                stats[1] = scale;
            }
        },
    );
}

impl<T: Real> LayerNorm for Cpu<T> {
    fn layer_norm(
        &self,
        x: &Buffer<T>,
        gamma: &Buffer<T>,
        beta: &Buffer<T>,
        rows: usize,
        channels: usize,
        y: &mut Buffer<T>,
        stats: &mut Buffer<T>,
    ) {
        let part = self.share(rows, 1);
        let x = x[..rows * channels].chunks(part * channels);
        let y = y[..rows * channels].chunks_mut(part * channels);
        let parts = x.zip(y).zip(stats[..2 * rows].chunks_mut(2 * part));
        self.each(parts, |((x, y), stats)| normalise(x, (gamma, beta), channels, y, stats));
    }

    fn layer_norm_backward(
        &self,
        dy: &Buffer<T>,
        x: &Buffer<T>,
        stats: &Buffer<T>,
        gamma: &Buffer<T>,
        rows: usize,
        channels: usize,
        dx: &mut Buffer<T>,
        add: bool,
    ) {
        let share = T::of(1.0 / channels as f64);
        let gamma = &gamma[..channels];
        let part = self.share(rows, 1);
        let inputs = dy[..rows * channels].chunks(part * channels).zip(x[..rows * channels].chunks(part * channels));
        let outputs = dx[..rows * channels].chunks_mut(part * channels).zip(stats[..2 * rows].chunks(2 * part));
        self.each(inputs.zip(outputs), |((dy, x), (dx, stats))| {
            vectorised(
                #[inline(always)]
                |_| {
                    let inputs = dy.chunks_exact(channels).zip(x.chunks_exact(channels));
                    let outputs = dx.chunks_exact_mut(channels).zip(stats.chunks_exact(2));
                    for ((dy, x), (dx, stats)) in inputs.zip(outputs) {
                        let (mean, scale) = (stats[0], stats[1]);
                        let first = sum([dy, gamma], |[dy, gamma]| dy * gamma) * share;
                        let second =
                            sum([dy, gamma, x], |[dy, gamma, x]| dy * gamma * (x - mean)) * share * scale * scale;
                        let gradient = |[dy, gamma, x]: [T; 3]| (dy * gamma - first - (x - mean) * second) * scale;
                        if add {
                            each([dy, gamma, x], dx, |row, dx| dx + gradient(row));
                        } else {
                            each([dy, gamma, x], dx, |row, _| gradient(row));
                        }
                    }
                },
            )
        });
    }

    fn layer_norm_backward_params(
        &self,
        dy: &Buffer<T>,
        x: &Buffer<T>,
        stats: &Buffer<T>,
        rows: usize,
        channels: usize,
        dgamma: &mut Buffer<T>,
        dbeta: &mut Buffer<T>,
    ) {
        let mut partial = vec![T::ZERO; 2 * channels];
        let (scale_part, shift_part) = partial.split_at_mut(channels);
        vectorised(
            #[inline(always)]
            |level| {
                let blocks =
                    dy[..rows * channels].chunks(128 * channels).zip(x[..rows * channels].chunks(128 * channels));
                for ((dy, x), stats) in blocks.zip(stats.chunks(256)) {
                    scale_part.fill(T::ZERO);
                    shift_part.fill(T::ZERO);
                    for row in 0..dy.len() / channels {
                        let dy = &dy[row * channels..][..channels];
                        let x = &x[row * channels..][..channels];
                        let (mean, scale) = (stats[2 * row], stats[2 * row + 1]);
                        each([dy, x], scale_part, |[dy, x], sum| dy.mul_add((x - mean) * scale, sum, level));
                        each([dy], shift_part, |[dy], sum| sum + dy);
                    }
                    each([scale_part], &mut dgamma[..channels], |[part], sum| sum + part);
                    each([shift_part], &mut dbeta[..channels], |[part], sum| sum + part);
                }
            },
        );
    }
}
