//! Attention, a tile of queries at a time: the tile's scores against all keys fit into the second-level cache.

use std::cell::RefCell;

use super::buffer::LINE;
use super::layer_norm::{fold, sum};
use super::linear::{View, product};
use super::simd::{Level, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::{Attention, AttentionShape};

/// Queries of a tile.
const TILE: usize = 256;

thread_local! {
    /// Score tiles of this thread, kept from call to call, as raw 8-byte words so that one store serves every number type.
    static TILES: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with two tiles of `len` numbers that live as long as the thread.
fn with_tiles<T: Real>(len: usize, work: impl FnOnce(&mut [T], &mut [T])) {
    TILES.with_borrow_mut(|words| {
        let needed = (2 * len * size_of::<T>() + LINE).div_ceil(8);
        if words.len() < needed {
            words.resize(needed, 0);
        }
        // SAFETY: T is f32 or f64: every bit pattern is a number, and 8-byte words are aligned for both.
        let (_, numbers, _) = unsafe { words.align_to_mut::<T>() };
        let start = numbers.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        let (a, b) = numbers[start..][..2 * len].split_at_mut(len);
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

/// The largest number.
#[inline(always)]
fn largest<T: Real>(row: &[T]) -> T {
    let mut lanes = [row[0]; 16];
    let (blocks, rest) = row.as_chunks::<16>();
    for block in blocks {
        for i in 0..16 {
            lanes[i] = lanes[i].max(block[i]);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(row[0], T::max)
}

/// Replaces every x by `exp(x - shift)`; returns their sum.
#[inline(always)]
fn exponentials<T: Real>(row: &mut [T], shift: T, level: Level) -> T {
    let mut lanes = [T::ZERO; 16];
    let (blocks, rest) = row.as_chunks_mut::<16>();
    for block in blocks {
        for i in 0..16 {
            block[i] = (block[i] - shift).exp(level);
            lanes[i] += block[i];
        }
    }
    for (x, lane) in rest.iter_mut().zip(&mut lanes) {
        *x = (*x - shift).exp(level);
        *lane += *x;
    }
    fold(lanes)
}

impl<T: Real> Attention for Cpu<T> {
    fn attention(
        &self,
        q: &Buffer<T>,
        k: &Buffer<T>,
        v: &Buffer<T>,
        shape: AttentionShape,
        o: &mut Buffer<T>,
        lse: &mut Buffer<T>,
    ) {
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
                let start = token * channels + head * width;
                let mut shares = [T::ZERO; TILE];
                vectorised(
                    #[inline(always)]
                    |level| {
                        let rows = scores.chunks_exact_mut(keys).zip(shares.iter_mut().zip(lse));
                        for (row, (share, lse)) in rows {
                            let most = largest(row);
                            let total = exponentials(row, most, level);
                            *share = T::ONE / total;
                            *lse = most + total.ln(level);
                        }
                    },
                );
                product((count, width, keys), T::ONE, View::rows(scores, keys), vt, o, start, channels, false);
                // The outputs are shorter than the scores, so they are what is divided by the denominators.
                for (row, share) in shares[..count].iter().enumerate() {
                    for o in &mut o[start + row * channels..][..width] {
                        *o *= *share;
                    }
                }
            });
        });
    }

    fn attention_backward(
        &self,
        q: &Buffer<T>,
        k: &Buffer<T>,
        v: &Buffer<T>,
        o: &Buffer<T>,
        lse: &Buffer<T>,
        d_o: &Buffer<T>,
        shape: AttentionShape,
        dq: &mut Buffer<T>,
        dk: &mut Buffer<T>,
        dv: &mut Buffer<T>,
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
                    |level| {
                        for row in 0..count {
                            let at = (token + row) * channels + head * width;
                            // Σ_j p_j·dp_j = o·do (Dao et al., "FlashAttention", 2022).
                            let mean = sum([&o[at..][..width], &d_o[at..][..width]], |[o, d_o]| o * d_o);
                            let lse = lse[row];
                            let p = &mut p[row * keys..][..keys];
                            let ds = &mut ds[row * keys..][..keys];
                            for (p, ds) in p.iter_mut().zip(ds) {
                                *p = (*p - lse).exp(level);
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
