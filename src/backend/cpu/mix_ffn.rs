//! The Mix-FFN, a strip of lines at a time: hidden tokens stay in the second-level cache from the expansion to the contraction.

use super::depthwise::gelu_of_convolution;
use super::layer_norm::normalise;
use super::linear::{Weights, linear};
use super::residual::add_branch;
use super::room::{strip, take, with_room};
use super::{Buffer, Cpu, Real};
use crate::backend::{Dropout, FfnOutputs, FfnWeights, Grid, MixFfn, Product};

/// Some lines of a picture.
struct Lines<'a, T> {
    first: usize,
    y: &'a mut [T],
    next: (&'a mut [T], &'a mut [T]),
    stats: &'a mut [T],
    normed: Option<&'a mut [T]>,
    h: Option<&'a mut [T]>,
}

impl<T: Real> MixFfn for Cpu<T> {
    fn fuses_mix_ffn(&self, _: usize, _: usize) -> bool {
        true
    }

    fn mix_ffn(
        &self,
        x: &Buffer<T>,
        grid: Grid,
        weights: &FfnWeights<'_, Self>,
        drop: Option<Dropout>,
        outputs: FfnOutputs<'_, Self>,
    ) {
        let FfnWeights { channels, hidden, .. } = *weights;
        let Grid { images, height, width } = grid;
        let (line, wide, pairs) = (width * channels, width * hidden, 2 * width);
        let strip = strip(grid);
        let share = self.share(height.div_ceil(strip), 1) * strip;
        let FfnOutputs { y, next: (next, next_stats), stats, normed, h } = outputs;
        let (mut y, mut next, mut next_stats, mut stats) =
            (&mut y[..], &mut next[..], &mut next_stats[..], &mut stats[..]);
        let (mut normed, mut h) = (normed.map(|x| &mut x[..]), h.map(|x| &mut x[..]));
        let expansion = Product { rows: 0, inputs: channels, outputs: hidden };
        let contraction = Product { rows: 0, inputs: hidden, outputs: channels };
        with_room([self.packed(hidden, channels), self.packed(channels, hidden)], |[expand, contract]| {
            let products = (
                Weights::new(weights.expand.0, expansion, expand),
                Weights::new(weights.contract.0, contraction, contract),
            );
            for image in 0..images {
                let x = &x[image * height * line..][..height * line];
                let factor = drop.map_or(T::ONE, |drop| T::of(f64::from(drop.factor(image as u64))));
                let mut parts = Vec::new();
                for first in (0..height).step_by(share) {
                    let count = share.min(height - first);
                    parts.push(Lines {
                        first,
                        y: take(&mut y, count * line),
                        next: (take(&mut next, count * line), take(&mut next_stats, count * pairs)),
                        stats: take(&mut stats, count * pairs),
                        normed: normed.as_mut().map(|x| take(x, count * line)),
                        h: h.as_mut().map(|x| take(x, count * wide)),
                    });
                }
                self.each(parts.into_iter(), |part| lines(x, grid, weights, products, factor, part));
            }
        });
    }
}

/// The lines of `part` of the picture x, strip by strip; `products`: weights of expansion and contraction.
fn lines<T: Real>(
    x: &[T],
    grid: Grid,
    weights: &FfnWeights<'_, Cpu<T>>,
    products: (Weights<'_, T>, Weights<'_, T>),
    factor: T,
    mut part: Lines<'_, T>,
) {
    let FfnWeights { norm, expand, mix, contract, next, channels, hidden } = *weights;
    let Grid { height, width, .. } = grid;
    let (line, wide, pairs) = (width * channels, width * hidden, 2 * width);
    let strip = strip(grid);
    let (first, end) = (part.first, part.first + part.y.len() / line);
    // Of h: a line above, and two strips.
    with_room([strip * line, strip * pairs, (2 * strip + 1) * wide, strip * wide, strip * line], |rooms| {
        let [normed, stats, h, g, branch] = rooms;
        // A strip from line `start` on, to `h`.
        let mut expand = |start: usize, h: &mut [T]| {
            let stop = height.min(start + strip);
            let count = stop - start;
            let (normed, stats) = (&mut normed[..count * line], &mut stats[..count * pairs]);
            normalise(&x[start * line..stop * line], norm, channels, normed, stats);
            let p = Product { rows: count * width, inputs: channels, outputs: hidden };
            let h = &mut h[..count * wide];
            linear(normed, products.0, expand.1.map(|bias| &bias[..]), p, h, false);
            if (first..end).contains(&start) {
                let at = start - first;
                part.stats[at * pairs..][..count * pairs].copy_from_slice(stats);
                if let Some(to) = &mut part.normed {
                    to[at * line..][..count * line].copy_from_slice(normed);
                }
                if let Some(to) = &mut part.h {
                    to[at * wide..][..count * wide].copy_from_slice(h);
                }
            }
            stop
        };
        // Lines top..bottom of h are there. A strip is made whole, also where another thread makes it too.
        let mut top = first.saturating_sub(strip);
        let mut bottom = top;
        if first > 0 {
            bottom = expand(top, h);
        }
        for start in (first..end).step_by(strip) {
            let stop = end.min(start + strip);
            let above = start.saturating_sub(1);
            h.copy_within((above - top) * wide..(bottom - top) * wide, 0);
            top = above;
            while bottom < height.min(stop + 1) {
                bottom = expand(bottom, &mut h[(bottom - top) * wide..]);
            }
            let there = Grid { images: 1, height: bottom - top, width };
            gelu_of_convolution(h, mix.0, mix.1, there, hidden, start - top..stop - top, g);
            let p = Product { rows: (stop - start) * width, inputs: hidden, outputs: channels };
            linear(g, products.1, contract.1.map(|bias| &bias[..]), p, branch, false);
            let own = (start - first) * line..(stop - first) * line;
            let y = &mut part.y[own.clone()];
            add_branch(&x[start * line..stop * line], branch, factor, y);
            let (out, stats) = &mut part.next;
            normalise(y, next, channels, &mut out[own], &mut stats[(start - first) * pairs..(stop - first) * pairs]);
        }
    });
}
