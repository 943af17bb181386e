//! Attention, a tile of queries at a time: the tile's scores against all keys fit into the second-level cache.

use std::cell::RefCell;

use super::layer_norm::sum;
use super::linear::{View, product};
use super::{Cpu, Real, simd::vectorised};
use crate::backend::{Attention, AttentionShape};

/// Queries of a tile.
const TILE: usize = 128;

thread_local! {
    /// Score tiles of this thread, kept from call to call, as raw 8-byte words so that one store serves every number type.
    static TILES: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with two tiles of `len` numbers that live as long as the thread.
fn with_tiles<T: Real>(len: usize, work: impl FnOnce(&mut [T], &mut [T])) {
    TILES.with_borrow_mut(|words| {
        let needed = (2 * len * size_of::<T>()).div_ceil(8);
        if words.len() < needed {
            words.resize(needed, 0);
        }
        // SAFETY: T is f32 or f64: every bit pattern is a number, and 8-byte words are aligned for both.
        let (_, numbers, _) = unsafe { words.align_to_mut::<T>() };
        let (a, b) = numbers[..2 * len].split_at_mut(len);
        work(a, b);
    });
}

/// Calls `work(image, head, first query, queries)` for every tile.
fn each_tile(shape: AttentionShape, mut work: impl FnMut(usize, usize, usize, usize)) {
    for image in 0..shape.images {
        for head in 0..shape.heads {
            for first in (0..shape.queries).step_by(TILE) {
                work(image, head, first, TILE.min(shape.queries - first));
            }
        }
    }
}

/// The rows of one head from token `first` on.
fn head_view<T>(data: &[T], shape: AttentionShape, first: usize, head: usize) -> View<'_, T> {
    let channels = shape.heads * shape.head;
    View { data, start: first * channels + head * shape.head, row_stride: channels, column_stride: 1 }
}

impl<T: Real> Attention for Cpu<T> {
    fn attention(&self, q: &Vec<T>, k: &Vec<T>, v: &Vec<T>, shape: AttentionShape, o: &mut Vec<T>, lse: &mut Vec<T>) {
        let AttentionShape { heads, head: width, queries, keys, .. } = shape;
        let channels = heads * width;
        let scale = T::of(1.0 / (width as f64).sqrt());
        with_tiles(TILE * keys, |scores, _| {
            each_tile(shape, |image, head, first, count| {
                let token = image * queries + first;
                let (qt, kt, vt) = (
                    head_view(q, shape, token, head),
                    head_view(k, shape, image * keys, head),
                    head_view(v, shape, image * keys, head),
                );
                product((count, keys, width), scale, qt, kt.t(), scores, 0, keys, false);
                let lse = &mut lse[(image * heads + head) * queries + first..][..count];
                vectorised(
                    #[inline(always)]
                    || {
                        for (row, lse) in scores.chunks_exact_mut(keys).zip(lse) {
                            let mut largest = [row[0]; 16];
                            for part in row.chunks(16) {
                                for (m, s) in largest.iter_mut().zip(part) {
                                    *m = (*m).max(*s);
                                }
                            }
                            let most = largest.into_iter().fold(row[0], T::max);
                            for s in row.iter_mut() {
                                *s = (*s - most).exp();
                            }
                            let total = sum(keys, |i| row[i]);
                            let share = T::ONE / total;
                            for s in row.iter_mut() {
                                *s *= share;
                            }
                            *lse = most + total.ln();
                        }
                    },
                );
                let (start, p) = (token * channels + head * width, View::rows(scores, keys));
                product((count, width, keys), T::ONE, p, vt, o, start, channels, false);
            });
        });
    }

    fn attention_backward(
        &self,
        q: &Vec<T>,
        k: &Vec<T>,
        v: &Vec<T>,
        o: &Vec<T>,
        lse: &Vec<T>,
        d_o: &Vec<T>,
        shape: AttentionShape,
        dq: &mut Vec<T>,
        dk: &mut Vec<T>,
        dv: &mut Vec<T>,
    ) {
        let AttentionShape { images, heads, head: width, queries, keys } = shape;
        let channels = heads * width;
        let scale = T::of(1.0 / (width as f64).sqrt());
        dk[..images * keys * channels].fill(T::ZERO);
        dv[..images * keys * channels].fill(T::ZERO);
        with_tiles(TILE * keys, |p, ds| {
            each_tile(shape, |image, head, first, count| {
                let token = image * queries + first;
                let (qt, kt, vt, dot) = (
                    head_view(q, shape, token, head),
                    head_view(k, shape, image * keys, head),
                    head_view(v, shape, image * keys, head),
                    head_view(d_o, shape, token, head),
                );
                product((count, keys, width), scale, qt, kt.t(), p, 0, keys, false);
                product((count, keys, width), T::ONE, dot, vt.t(), ds, 0, keys, false);
                let lse = &lse[(image * heads + head) * queries + first..][..count];
                vectorised(
                    #[inline(always)]
                    || {
                        for row in 0..count {
                            let at = (token + row) * channels + head * width;
                            let (o, d_o) = (&o[at..][..width], &d_o[at..][..width]);
                            // Σ_j p_j·dp_j = o·do (Dao et al., "FlashAttention", 2022).
                            let mean = sum(width, |c| o[c] * d_o[c]);
                            let p = &mut p[row * keys..][..keys];
                            let ds = &mut ds[row * keys..][..keys];
                            for (p, ds) in p.iter_mut().zip(ds) {
                                *p = (*p - lse[row]).exp();
                                *ds = *p * (*ds - mean);
                            }
                        }
                    },
                );
                let (ds, p) = (View::rows(ds, keys), View::rows(p, keys));
                let (start, key_start) = (token * channels + head * width, image * keys * channels + head * width);
                product((count, width, keys), scale, ds, kt, dq, start, channels, false);
                product((keys, width, count), scale, ds.t(), qt, dk, key_start, channels, true);
                product((keys, width, count), T::ONE, p.t(), dot, dv, key_start, channels, true);
            });
        });
    }
}
