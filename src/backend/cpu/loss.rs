//! Cross-entropy and confusion counts at label resolution, from logits at a quarter of it.

use super::resize::source;
use super::{Cpu, Real, simd::vectorised};
use crate::backend::{Grid, Loss, Sample};

/// Interpolates one line of logits to label resolution: `line[x·labels + l]`.
#[inline(always)]
fn upsample_line<T: Real>(
    logits: &[T],
    from: Grid,
    labels: usize,
    image: usize,
    oy: usize,
    size: usize,
    columns: &[(usize, usize, T)],
    (blend, line): (&mut [T], &mut [T]),
) {
    let (y0, y1, wy) = source(oy, from.height, size);
    let row = |y: usize| &logits[(image * from.height + y) * from.width * labels..][..from.width * labels];
    let (upper, lower) = (row(y0), row(y1));
    let (w0, w1) = (T::of(1.0 - wy), T::of(wy));
    for i in 0..from.width * labels {
        blend[i] = w0 * upper[i] + w1 * lower[i];
    }
    for (out, &(x0, x1, w)) in line.chunks_exact_mut(labels).zip(columns) {
        for l in 0..labels {
            out[l] = (T::ONE - w) * blend[x0 * labels + l] + w * blend[x1 * labels + l];
        }
    }
}

/// The interpolation of every column.
fn columns<T: Real>(from: usize, to: usize) -> Vec<(usize, usize, T)> {
    (0..to)
        .map(|x| {
            let (x0, x1, w) = source(x, from, to);
            (x0, x1, T::of(w))
        })
        .collect()
}

/// The label at `(y, x)` of a sample as the model sees it, flipped if it is.
#[inline(always)]
fn label(sample: &Sample<'_>, y: usize, x: usize, size: usize) -> usize {
    let x = if sample.augment.flip { size - 1 - x } else { x };
    usize::from(sample.labels[y * size + x])
}

impl<T: Real> Loss for Cpu<T> {
    fn cross_entropy(
        &self,
        logits: &Vec<T>,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        scale: f64,
        out: &mut Vec<T>,
        mut gradient: Option<&mut Vec<T>>,
    ) {
        let columns = columns::<T>(from.width, size);
        let mut line = vec![T::ZERO; size * labels];
        let mut blend = vec![T::ZERO; from.width * labels];
        if let Some(gradient) = &mut gradient {
            gradient[..from.rows() * labels].fill(T::ZERO);
        }
        for (image, sample) in samples.iter().enumerate() {
            let mut total = 0.0f64;
            for oy in 0..size {
                vectorised(
                    #[inline(always)]
                    || {
                        upsample_line(logits, from, labels, image, oy, size, &columns, (&mut blend, &mut line));
                        let mut line_total = T::ZERO;
                        for (x, logits) in line.chunks_exact_mut(labels).enumerate() {
                            let truth = label(sample, oy, x, size);
                            if truth >= labels {
                                logits.fill(T::ZERO);
                                continue;
                            }
                            let most = logits.iter().copied().fold(logits[0], T::max);
                            let own = logits[truth];
                            let mut sum = T::ZERO;
                            for l in logits.iter_mut() {
                                *l = (*l - most).exp();
                                sum += *l;
                            }
                            line_total += sum.ln() + most - own;
                            // The logits become their gradient: softmax - one-hot.
                            let share = T::ONE / sum;
                            for l in logits.iter_mut() {
                                *l *= share;
                            }
                            logits[truth] -= T::ONE;
                        }
                        total += line_total.f64();
                        if let Some(gradient) = &mut gradient {
                            // The way back: columns first, then the two lines.
                            blend.fill(T::ZERO);
                            for (d, &(x0, x1, w)) in line.chunks_exact(labels).zip(&columns) {
                                for l in 0..labels {
                                    blend[x0 * labels + l] += (T::ONE - w) * d[l];
                                    blend[x1 * labels + l] += w * d[l];
                                }
                            }
                            let (y0, y1, wy) = source(oy, from.height, size);
                            let stride = from.width * labels;
                            for (y, weight) in [(y0, T::of(scale * (1.0 - wy))), (y1, T::of(scale * wy))] {
                                let to = &mut gradient[(image * from.height + y) * stride..][..stride];
                                for (to, d) in to.iter_mut().zip(&blend) {
                                    *to += weight * *d;
                                }
                            }
                        }
                    },
                );
            }
            out[image] += T::of(scale * total);
        }
    }

    fn confusion(
        &self,
        logits: &Vec<T>,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        counts: &mut [u64],
    ) {
        let columns = columns::<T>(from.width, size);
        let mut line = vec![T::ZERO; size * labels];
        let mut blend = vec![T::ZERO; from.width * labels];
        for (image, sample) in samples.iter().enumerate() {
            let counts = &mut counts[image * labels * labels..][..labels * labels];
            for oy in 0..size {
                vectorised(
                    #[inline(always)]
                    || {
                        upsample_line(logits, from, labels, image, oy, size, &columns, (&mut blend, &mut line));
                    },
                );
                for (x, logits) in line.chunks_exact(labels).enumerate() {
                    let truth = label(sample, oy, x, size);
                    if truth < labels {
                        let best = (1..labels).fold(0, |best, l| if logits[l] > logits[best] { l } else { best });
                        counts[truth * labels + best] += 1;
                    }
                }
            }
        }
    }
}
