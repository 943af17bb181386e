//! Attention, a tile of queries at a time: the tile's scores against all keys fit into the second-level cache.

use super::layer_norm::{fold, sum};
use super::linear::{View, product};
use super::room::{take, with_room};
use super::simd::{LANES, Level, vectorised};
use super::tiles::{self as units, Start, Step};
use super::{Buffer, Cpu, Real};
use crate::backend::{Attention, AttentionShape, Deltas};

/// Queries of a tile.
pub(super) const TILE: usize = 256;

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

/// Some queries of a picture.
pub(super) struct Tile<'a, T> {
    /// The picture.
    pub image: usize,
    /// The first of the queries, counted over all pictures.
    pub token: usize,
    /// What becomes of them, `(queries, channels)`.
    pub out: &'a mut [T],
    /// For each head, what the logarithms of their denominators go to, if they are wanted.
    pub lse: Vec<&'a mut [T]>,
}

/// Tiles of [`TILE`] queries, or what is left of a picture.
pub(super) fn tiles<'a, T: Real>(
    AttentionShape { images, heads, head, queries, .. }: AttentionShape,
    out: &'a mut [T],
    lse: Option<&'a mut [T]>,
) -> impl Iterator<Item = Tile<'a, T>> {
    let channels = heads * head;
    let per_image = queries.div_ceil(TILE);
    let mut of_heads: Vec<Vec<&mut [T]>> = (0..images * per_image).map(|_| Vec::with_capacity(heads)).collect();
    for (row, lse) in lse.into_iter().flat_map(|lse| lse[..images * heads * queries].chunks_mut(queries)).enumerate() {
        for (tile, lse) in lse.chunks_mut(TILE).enumerate() {
            of_heads[row / heads * per_image + tile].push(lse);
        }
    }
    let out = out[..images * queries * channels].chunks_mut(queries * channels);
    let out = out.flat_map(move |out| out.chunks_mut(TILE * channels));
    out.zip(of_heads).enumerate().map(move |(tile, (out, lse))| {
        let image = tile / per_image;
        Tile { image, token: image * queries + tile % per_image * TILE, out, lse }
    })
}

/// Keys and values as products read them.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a, T> {
    k: &'a [T],
    v: &'a [T],
    shape: AttentionShape,
    /// Those of each head of each picture, packed for [`units`], of numbers that are f32; empty where they are read as they are.
    packed: &'a [Step],
}

impl<'a, T: Real> Keys<'a, T> {
    /// In as much room as [`Cpu::packed_keys`] says.
    pub fn new(k: &'a [T], v: &'a [T], shape: AttentionShape, room: &'a mut [T]) -> Self {
        let AttentionShape { images, heads, head: width, keys, .. } = shape;
        let packed: &mut [Step] = bytemuck::cast_slice_mut(room);
        if !packed.is_empty() {
            let (k, v) = (bytemuck::cast_slice(k), bytemuck::cast_slice(v));
            let mut rest = &mut packed[..];
            for (image, head) in (0..images).flat_map(|image| (0..heads).map(move |head| (image, head))) {
                let of_head = |x| head_view(x, shape, image * keys, head);
                let (of_k, of_v) = (units::steps(keys, width), units::steps(width, keys));
                units::pack(of_head(k).t(), (keys, width), scale(width) as f32, take(&mut rest, of_k));
                units::pack(of_head(v), (width, keys), 1.0, take(&mut rest, of_v));
            }
        }
        Self { k, v, shape, packed }
    }

    /// The packed keys and values of a head.
    fn of_head(&self, image: usize, head: usize) -> (&'a [Step], &'a [Step]) {
        let AttentionShape { heads, head: width, keys, .. } = self.shape;
        let (of_k, of_v) = (units::steps(keys, width), units::steps(width, keys));
        self.packed[(image * heads + head) * (of_k + of_v)..][..of_k + of_v].split_at(of_k)
    }

    /// Sets `scores` to the scaled products of `count` queries with the keys.
    fn scores(&self, count: usize, q: View<'_, T>, image: usize, head: usize, scores: &mut [T]) {
        let AttentionShape { head: width, keys, .. } = self.shape;
        let size = (count, keys, width);
        if self.packed.is_empty() {
            let k = head_view(self.k, self.shape, image * keys, head);
            return product(size, T::of(scale(width)), q, k.t(), scores, 0, keys, false);
        }
        let (k, _) = self.of_head(image, head);
        units::product(size, q.cast(), k, Start::Row(None), bytemuck::cast_slice_mut(scores), keys);
    }

    /// Sets a head's columns of `count` rows of o to the products of `scores` with the values.
    fn values(&self, count: usize, scores: &[T], image: usize, head: usize, o: &mut [T]) {
        let AttentionShape { heads, head: width, keys, .. } = self.shape;
        let (size, scores, channels) = ((count, width, keys), View::rows(scores, keys), heads * width);
        if self.packed.is_empty() {
            let v = head_view(self.v, self.shape, image * keys, head);
            return product(size, T::ONE, scores, v, o, head * width, channels, false);
        }
        let (_, v) = self.of_head(image, head);
        let o = &mut bytemuck::cast_slice_mut(o)[head * width..];
        units::product(size, scores.cast(), v, Start::Row(None), o, channels);
    }
}

/// What the products of queries with keys are multiplied with.
fn scale(width: usize) -> f64 {
    1.0 / (width as f64).sqrt()
}

impl<T: Real> Cpu<T> {
    /// Numbers of room for [`Keys`].
    pub(super) fn packed_keys(&self, AttentionShape { images, heads, head, keys, .. }: AttentionShape) -> usize {
        images * heads * (self.packed(keys, head) + self.packed(head, keys))
    }
}

/// Attention of the queries q from `token` on, as many as `o` has room for, to keys and values of picture `image`; `scores` is
/// room for a number per query and key.
pub(super) fn attend<'l, T: Real>(
    (q, token): (&[T], usize),
    (key_values, image): (Keys<'_, T>, usize),
    scores: &mut [T],
    o: &mut [T],
    mut lse: impl Iterator<Item = &'l mut [T]>,
) {
    let shape = key_values.shape;
    let AttentionShape { heads, head: width, keys, .. } = shape;
    let channels = heads * width;
    let count = o.len() / channels;
    for head in 0..heads {
        key_values.scores(count, head_view(q, shape, token, head), image, head, scores);
        let (mut shares, mut logarithms) = ([T::ZERO; TILE], [T::ZERO; TILE]);
        vectorised(
            #[inline(always)]
            |level| {
                let rows = scores.chunks_exact_mut(keys).zip(shares.iter_mut().zip(&mut logarithms)).take(count);
                for (row, (share, logarithm)) in rows {
                    let most = largest(row);
                    let total = exponentials(row, most, level);
                    *share = T::ONE / total;
                    *logarithm = most + total.ln(level);
                }
            },
        );
        if let Some(lse) = lse.next() {
            lse.copy_from_slice(&logarithms[..count]);
        }
        key_values.values(count, scores, image, head, o);
        // The outputs are shorter than the scores, so they are what is divided by the denominators.
        for (o, share) in o.chunks_exact_mut(channels).zip(shares) {
            for o in &mut o[head * width..][..width] {
                *o *= share;
            }
        }
    }
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
        with_room([self.packed_keys(shape)], |[room]| {
            let keys = Keys::new(k, v, shape, room);
            self.each(tiles(shape, o, Some(lse)), |Tile { image, token, out: o, lse }| {
                with_room([TILE * shape.keys], |[scores]| {
                    attend((q, token), (keys, image), scores, o, lse.into_iter());
                });
            });
        });
    }

    fn attention_backward(
        &self,
        q: &Buffer<T>,
        k: &Buffer<T>,
        v: &Buffer<T>,
        deltas: Deltas<'_, Self>,
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
        // As many tiles at a time as the unit has threads: first each thread makes one, then each adds all of them up for some
        // of the keys, tile by tile, so that the sums do not depend on how many there are.
        let team = self.team();
        with_room([team * TILE * keys; 2], |[p, ds]| {
            for (image, dq) in dq[..images * queries * channels].chunks_mut(queries * channels).enumerate() {
                for head in 0..heads {
                    let (kt, vt) = (head_view(k, shape, image * keys, head), head_view(v, shape, image * keys, head));
                    for (group, dq) in dq.chunks_mut(team * TILE * channels).enumerate() {
                        let start = image * queries + group * team * TILE;
                        let end = start + dq.len() / channels;
                        let tile = |i: usize| {
                            let token = start + i * TILE;
                            let views = (head_view(q, shape, token, head), head_view(d_o, shape, token, head));
                            (token, TILE.min(end - token), views)
                        };
                        let rooms = p.chunks_mut(TILE * keys).zip(ds.chunks_mut(TILE * keys));
                        self.each(dq.chunks_mut(TILE * channels).zip(rooms).enumerate(), |(i, (dq, (p, ds)))| {
                            let (token, count, (qt, dot)) = tile(i);
                            product((count, keys, width), scale, qt, kt.t(), p, 0, keys, false);
                            product((count, keys, width), T::ONE, dot, vt.t(), ds, 0, keys, false);
                            let first = (image * heads + head) * queries + token - image * queries;
                            let lse = &lse[first..][..count];
                            vectorised(
                                #[inline(always)]
                                |level| {
                                    for (row, lse) in lse.iter().enumerate() {
                                        let at = (token + row) * channels + head * width;
                                        // Σ_j p_j·dp_j = o·do (Dao et al., "FlashAttention", 2022).
                                        let mean = match deltas {
                                            Deltas::Of(o) => {
                                                sum([&o[at..][..width], &d_o[at..][..width]], |[o, d_o]| o * d_o)
                                            }
                                            Deltas::Made(deltas) => deltas[first + row],
                                        };
                                        let p = &mut p[row * keys..][..keys];
                                        let ds = &mut ds[row * keys..][..keys];
                                        for (p, ds) in p.iter_mut().zip(ds) {
                                            *p = (*p - *lse).exp(level);
                                            *ds = *p * (*ds - mean);
                                        }
                                    }
                                },
                            );
                            product(
                                (count, width, keys),
                                scale,
                                View::rows(ds, keys),
                                kt,
                                dq,
                                head * width,
                                channels,
                                false,
                            );
                        });
                        let part = self.share(keys, LANES) * channels;
                        let range = image * keys * channels..(image + 1) * keys * channels;
                        let parts = dk[range.clone()].chunks_mut(part).zip(dv[range].chunks_mut(part));
                        self.each(parts.enumerate(), |(i, (dk, dv))| {
                            let of_keys = |x| View { start: i * part / channels, ..View::rows(x, keys) }.t();
                            let tiles = p.chunks(TILE * keys).zip(ds.chunks(TILE * keys));
                            for (i, (p, ds)) in tiles.enumerate().take((end - start).div_ceil(TILE)) {
                                let (_, count, (qt, dot)) = tile(i);
                                let (size, at) = ((dk.len() / channels, width, count), head * width);
                                product(size, scale, of_keys(ds), qt, dk, at, channels, true);
                                product(size, T::ONE, of_keys(p), dot, dv, at, channels, true);
                            }
                        });
                    }
                }
            }
        });
    }
}
