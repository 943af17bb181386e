//! Cross-entropy and confusion counts at label resolution, from logits at a quarter of it. A line of pixels at a time,
//! class by class, so that loops run over pixels.

use super::resize::source;
use super::simd::{Level, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::{Grid, Loss, Sample};

/// How a line of logits is stretched to a line of pixels.
struct Stretch<T> {
    /// Per pixel: the two logits it lies between and the second one's weight.
    pixels: Vec<(usize, usize, T)>,
    /// Per logit: the first pixel it contributes to, and the weights from there on.
    logits: Vec<(usize, Vec<T>)>,
}

impl<T: Real> Stretch<T> {
    fn new(from: usize, to: usize) -> Self {
        let mut logits: Vec<(usize, Vec<T>)> = vec![(0, Vec::new()); from];
        let mut pixels = Vec::with_capacity(to);
        for x in 0..to {
            let (x0, x1, w) = source(x, from, to);
            for (at, weight) in [(x0, 1.0 - w), (x1, w)] {
                let (first, weights) = &mut logits[at];
                if weights.is_empty() {
                    *first = x;
                }
                weights.resize(x - *first + 1, T::ZERO);
                weights[x - *first] += T::of(weight);
            }
            pixels.push((x0, x1, T::of(w)));
        }
        Self { pixels, logits }
    }
}

/// Room for one line of pixels.
struct Line<T> {
    stretch: Stretch<T>,
    /// Logits of the line before stretching, `(width, labels)`.
    blend: Vec<T>,
    /// Logits of the line, `(labels, size)`.
    classes: Vec<T>,
    /// Labels of the line; what is no class is `u8::MAX`.
    truth: Vec<u8>,
    most: Vec<T>,
    sum: Vec<T>,
    own: Vec<T>,
}

impl<T: Real> Line<T> {
    fn new(width: usize, labels: usize, size: usize) -> Self {
        let zeros = |n: usize| vec![T::ZERO; n];
        Self {
            stretch: Stretch::new(width, size),
            blend: zeros(width * labels),
            classes: zeros(labels * size),
            truth: vec![0; size],
            most: zeros(size),
            sum: zeros(size),
            own: zeros(size),
        }
    }

    /// Interpolates the logits of line `oy` of a picture, and finds its labels.
    #[inline(always)]
    fn read(&mut self, logits: &[T], from: Grid, labels: usize, sample: &Sample<'_>, image: usize, oy: usize) {
        let size = self.truth.len();
        let (y0, y1, wy) = source(oy, from.height, size);
        let row = |y: usize| &logits[(image * from.height + y) * from.width * labels..][..from.width * labels];
        let (w0, w1) = (T::of(1.0 - wy), T::of(wy));
        for ((blend, upper), lower) in self.blend.iter_mut().zip(row(y0)).zip(row(y1)) {
            *blend = w0 * *upper + w1 * *lower;
        }
        for (l, class) in self.classes.chunks_exact_mut(size).enumerate() {
            for (out, &(x0, x1, w)) in class.iter_mut().zip(&self.stretch.pixels) {
                *out = (T::ONE - w) * self.blend[x0 * labels + l] + w * self.blend[x1 * labels + l];
            }
        }
        let line = &sample.labels[oy * size..][..size];
        let class = |label: u8| if usize::from(label) < labels { label } else { u8::MAX };
        if sample.augment.flip {
            for (to, from) in self.truth.iter_mut().zip(line.iter().rev()) {
                *to = class(*from);
            }
        } else {
            for (to, from) in self.truth.iter_mut().zip(line) {
                *to = class(*from);
            }
        }
    }

    /// Turns logits into the gradient of the loss, softmax - one-hot; returns the loss.
    #[inline(always)]
    fn cross_entropy(&mut self, level: Level) -> T {
        let size = self.truth.len();
        let Self { classes, truth, most, sum, own, .. } = self;
        let (truth, most, sum, own) = (&truth[..size], &mut most[..size], &mut sum[..size], &mut own[..size]);
        most.copy_from_slice(&classes[..size]);
        for class in classes.chunks_exact(size).skip(1) {
            for x in 0..size {
                most[x] = most[x].max(class[x]);
            }
        }
        sum.fill(T::ZERO);
        own.fill(T::ZERO);
        for (l, class) in classes.chunks_exact_mut(size).enumerate() {
            for x in 0..size {
                let logit = class[x] - most[x];
                own[x] = if usize::from(truth[x]) == l { logit } else { own[x] };
                class[x] = logit.exp(level);
                sum[x] += class[x];
            }
        }
        let mut lanes = [T::ZERO; 16];
        for start in (0..size).step_by(16) {
            let n = 16.min(size - start);
            for i in 0..n {
                let x = start + i;
                let counts = truth[x] != u8::MAX;
                let loss = sum[x].ln(level) - own[x];
                lanes[i] += if counts { loss } else { T::ZERO };
                sum[x] = if counts { T::ONE / sum[x] } else { T::ZERO };
            }
        }
        for (l, class) in classes.chunks_exact_mut(size).enumerate() {
            for x in 0..size {
                let hit = if usize::from(truth[x]) == l { T::ONE } else { T::ZERO };
                class[x] = class[x] * sum[x] - hit;
            }
        }
        super::layer_norm::fold(lanes)
    }
}

impl<T: Real> Loss for Cpu<T> {
    fn cross_entropy(
        &self,
        logits: &Buffer<T>,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        scale: f64,
        out: &mut Buffer<T>,
        gradient: Option<&mut Buffer<T>>,
    ) {
        let Some(gradient) = gradient else {
            let lines = self.share(size, 1);
            for (image, sample) in samples.iter().enumerate() {
                let mut losses = vec![0.0f64; size];
                self.each(losses.chunks_mut(lines).enumerate(), |(part, losses)| {
                    let mut line = Line::new(from.width, labels, size);
                    for (oy, loss) in (part * lines..).zip(losses) {
                        vectorised(
                            #[inline(always)]
                            |level| {
                                line.read(logits, from, labels, sample, image, oy);
                                *loss = line.cross_entropy(level).f64();
                            },
                        );
                    }
                });
                out[image] += T::of(scale * losses.iter().sum::<f64>());
            }
            return;
        };
        let mut line = Line::new(from.width, labels, size);
        let stride = from.width * labels;
        gradient[..from.rows() * labels].fill(T::ZERO);
        for (image, sample) in samples.iter().enumerate() {
            let mut total = 0.0f64;
            for oy in 0..size {
                vectorised(
                    #[inline(always)]
                    |level| {
                        line.read(logits, from, labels, sample, image, oy);
                        total += line.cross_entropy(level).f64();
                    },
                );
                // The way back: columns first, then the two lines.
                let Line { stretch, blend, classes, .. } = &mut line;
                for (l, class) in classes.chunks_exact(size).enumerate() {
                    for (at, (first, weights)) in stretch.logits.iter().enumerate() {
                        let mut sum = T::ZERO;
                        for (d, w) in class[*first..].iter().zip(weights) {
                            sum += *d * *w;
                        }
                        blend[at * labels + l] = sum;
                    }
                }
                let (y0, y1, wy) = source(oy, from.height, size);
                for (y, weight) in [(y0, T::of(scale * (1.0 - wy))), (y1, T::of(scale * wy))] {
                    let to = &mut gradient[(image * from.height + y) * stride..][..stride];
                    for (to, d) in to.iter_mut().zip(&*blend) {
                        *to += weight * *d;
                    }
                }
            }
            out[image] += T::of(scale * total);
        }
    }

    fn confusion(
        &self,
        logits: &Buffer<T>,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        counts: &mut Vec<u64>,
    ) {
        let lines = self.share(size, 1);
        for (counts, (image, sample)) in counts.chunks_exact_mut(labels * labels).zip(samples.iter().enumerate()) {
            let mut parts = vec![vec![0u64; labels * labels]; size.div_ceil(lines)];
            self.each(parts.iter_mut().enumerate(), |(part, counts)| {
                let mut line = Line::new(from.width, labels, size);
                let mut best = vec![0u8; size];
                for oy in part * lines..size.min((part + 1) * lines) {
                    vectorised(
                        #[inline(always)]
                        |_| {
                            line.read(logits, from, labels, sample, image, oy);
                            let (largest, others) = line.classes.split_at_mut(size);
                            best.fill(0);
                            for (l, class) in others.chunks_exact(size).enumerate() {
                                for x in 0..size {
                                    let larger = class[x] > largest[x];
                                    best[x] = if larger { l as u8 + 1 } else { best[x] };
                                    largest[x] = if larger { class[x] } else { largest[x] };
                                }
                            }
                        },
                    );
                    for (&truth, &best) in line.truth.iter().zip(&best) {
                        if truth != u8::MAX {
                            counts[usize::from(truth) * labels + usize::from(best)] += 1;
                        }
                    }
                }
            });
            counts.fill(0);
            for part in parts {
                for (count, part) in counts.iter_mut().zip(part) {
                    *count += part;
                }
            }
        }
    }

    fn note(
        &self,
        loss: &Buffer<T>,
        counts: &Vec<u64>,
        images: usize,
        labels: usize,
        at: usize,
        all_losses: &mut Buffer<T>,
        all_counts: &mut Vec<u64>,
    ) {
        let squares = labels * labels;
        all_losses[at..][..images].copy_from_slice(&loss[..images]);
        all_counts[at * squares..][..images * squares].copy_from_slice(&counts[..images * squares]);
    }
}
