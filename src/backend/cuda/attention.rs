//! Attention on tensor cores.

use std::ops::RangeInclusive;

use super::memory::width;
use super::{Argument, Cuda, Device};
use crate::backend::{Attention, AttentionShape, Deltas};

/// Threads of a block whose warps own queries.
pub(super) const QUERY_BLOCK: usize = 256;
/// Threads of a block whose warps own keys.
const KEY_BLOCK: usize = 128;
/// Threads of a block that makes all gradients at once.
const ALL_BLOCK: usize = 384;
/// Queries of such a block per step.
const STRIDE: usize = 32;
/// For how many keys it is there: fewer leave most of its warps idle, more do not fit.
const ALL_KEYS: RangeInclusive<usize> = 65..=256;
/// Such blocks to aim for: as many as a large GPU has multiprocessors, each of which holds one at a time. More would only leave
/// more sums to be joined.
const ALL_BLOCKS: usize = 128;
/// Blocks to aim for: a few times what a GPU holds at once, and the same on every GPU, as sums are cut by it.
const BLOCKS: usize = 1024;
/// The fewest queries worth a partial sum of their own.
const SMALLEST_SLICE: usize = 256;
/// Tiles of queries that a block takes at most, for which it has the keys at hand.
const MOST_TILES: usize = 4;

/// Channels of a head that has kernels of its own: SegFormer-B0's, and in all others it is 64.
pub(super) const NARROW: usize = 32;

/// The kernel for heads of this many channels.
///
/// # Panics
/// Above 64.
fn kernel_for(head: usize, narrow: &'static str, wide: &'static str) -> &'static str {
    assert!(head <= 64, "attention on CUDA takes heads of up to 64 channels, not {head}");
    if head == NARROW { narrow } else { wide }
}

/// Lengths of queries, keys and the logarithms of the denominators.
pub(super) fn lengths(shape: AttentionShape) -> (usize, usize, usize) {
    let AttentionShape { images, heads, head, queries, keys } = shape;
    (images * queries * heads * head, images * keys * heads * head, images * heads * queries)
}

/// Queries, or keys, that a block of so many threads takes at a time.
pub(super) fn tile(head: usize, threads: usize) -> usize {
    if head == NARROW { threads } else { threads / 2 }
}

/// Queries per block where warps own queries, and the grid.
pub(super) fn query_blocks(shape: AttentionShape) -> (usize, [usize; 3]) {
    let AttentionShape { images, heads, head, queries, .. } = shape;
    let tile = tile(head, QUERY_BLOCK);
    let span = tile * (queries.div_ceil(tile) * images * heads / BLOCKS).clamp(1, MOST_TILES);
    (span, [queries.div_ceil(span), images * heads, 1])
}

/// Queries per slice where warps own keys, and the grid.
fn key_blocks(shape: AttentionShape) -> (usize, [usize; 3]) {
    let AttentionShape { images, heads, head, queries, keys } = shape;
    let (tiles, pairs) = (keys.div_ceil(tile(head, KEY_BLOCK)), images * heads);
    let slices = BLOCKS.div_ceil(tiles * pairs).min(queries.div_ceil(SMALLEST_SLICE));
    let slice = queries.div_ceil(slices).next_multiple_of(SMALLEST_SLICE);
    (slice, [tiles, pairs, queries.div_ceil(slice)])
}

/// Queries per slice where all gradients are made at once, and the grid; None where they are not.
pub(super) fn all_blocks(shape: AttentionShape) -> Option<(usize, [usize; 3])> {
    let AttentionShape { images, heads, head, queries, keys } = shape;
    let slices = ALL_BLOCKS.div_ceil(images * heads).min(queries.div_ceil(SMALLEST_SLICE));
    let slice = queries.div_ceil(slices).next_multiple_of(STRIDE);
    (head == NARROW && ALL_KEYS.contains(&keys)).then(|| (slice, [queries.div_ceil(slice), images * heads, 1]))
}

/// Heads and, where a kernel does not know it, their channels; queries and keys.
fn sizes(shape: AttentionShape) -> impl Iterator<Item = Argument> {
    let AttentionShape { heads, head, queries, keys, .. } = shape;
    let head = (head != NARROW).then_some(head);
    [heads].into_iter().chain(head).chain([queries, keys]).map(Argument::from)
}

/// What scores are multiplied by, where a kernel does not know it.
fn scale(shape: AttentionShape) -> Option<Argument> {
    (shape.head != NARROW).then(|| Argument::F32((1.0 / (shape.head as f64).sqrt()) as f32))
}

impl<D: Device> Attention for Cuda<D> {
    fn attention(
        &self,
        q: &Self::Act,
        k: &Self::Act,
        v: &Self::Act,
        shape: AttentionShape,
        o: &mut Self::Act,
        lse: &mut Self::Full,
    ) {
        let head = shape.head;
        let (query_len, key_len, lse_len) = lengths(shape);
        let (span, grid) = query_blocks(shape);
        let mut arguments = vec![q.at(query_len), k.at(key_len), v.at(key_len)];
        arguments.extend(sizes(shape).chain([span.into()]).chain(scale(shape)));
        arguments.extend([o.to(query_len), lse.to(lse_len)]);
        self.launch_blocks(kernel_for(head, "attention_32", "attention_64"), grid, QUERY_BLOCK, &arguments);
    }

    fn attention_backward(
        &self,
        q: &Self::Act,
        k: &Self::Act,
        v: &Self::Act,
        deltas: Deltas<'_, Self>,
        lse: &Self::Full,
        d_o: &Self::Act,
        shape: AttentionShape,
        dq: &mut Self::Act,
        dk: &mut Self::Act,
        dv: &mut Self::Act,
    ) {
        let AttentionShape { images, head, .. } = shape;
        let (query_len, key_len, lse_len) = lengths(shape);
        let join = |partial, slices: usize, dk: &mut Self::Act, dv: &mut Self::Act| {
            let partial = Argument::partial_read(partial, slices * 2 * key_len);
            let arguments = [partial, slices.into(), Argument::U64(key_len as u64), dk.to(key_len), dv.to(key_len)];
            self.launch("attention_backward_join", key_len / width(key_len), &arguments);
        };
        let mut arguments = vec![q.at(query_len), k.at(key_len), v.at(key_len)];
        let behind = [d_o.at(query_len), lse.at(lse_len)];
        let none = Argument::pointer(0);
        if let Some((slice, grid)) = all_blocks(shape) {
            arguments.extend(match deltas {
                Deltas::Of(o) => [o.at(query_len), none],
                Deltas::Made(deltas) => [none, deltas.at(lse_len)],
            });
            arguments.extend(behind);
            let slices = grid[0];
            let partial_len = if slices > 1 { slices * 2 * key_len } else { 0 };
            let partial = if slices > 1 { self.scratch(partial_len) } else { 0 };
            let [dk_here, dv_here] = if slices > 1 { [none; 2] } else { [dk.to(key_len), dv.to(key_len)] };
            arguments.push(images.into());
            arguments.extend(sizes(shape).chain([slice.into()]).chain(scale(shape)));
            arguments.extend([dq.to(query_len), Argument::partial(partial, partial_len), dk_here, dv_here]);
            self.launch_blocks("attention_backward_32", grid, ALL_BLOCK, &arguments);
            if slices > 1 {
                join(partial, slices, dk, dv);
            }
            return;
        }

        let Deltas::Of(o) = deltas else { panic!("sums are made before where all gradients are made at once") };
        arguments.push(o.at(query_len));
        arguments.extend(behind);
        let (span, query_grid) = query_blocks(shape);
        let (slice, key_grid) = key_blocks(shape);
        let slices = key_grid[2];
        let partial_len = slices * 2 * key_len;
        let partial = self.scratch(partial_len + 2 * lse_len);
        let terms = Argument::pointer(partial + (partial_len * size_of::<f32>()) as u64);
        arguments.extend(sizes(shape).chain([span.into()]).chain(scale(shape)));
        arguments.extend([dq.to(query_len), terms]);
        let kernel = kernel_for(head, "attention_backward_queries_32", "attention_backward_queries_64");
        self.launch_blocks(kernel, query_grid, QUERY_BLOCK, &arguments);

        let mut arguments = vec![q.at(query_len), k.at(key_len), v.at(key_len), d_o.at(query_len), terms];
        arguments.push(images.into());
        arguments.extend(sizes(shape).chain([slice.into()]).chain(scale(shape)));
        arguments.push(Argument::partial(partial, partial_len));
        let kernel = kernel_for(head, "attention_backward_keys_32", "attention_backward_keys_64");
        self.launch_blocks(kernel, key_grid, KEY_BLOCK, &arguments);
        join(partial, slices, dk, dv);
    }

    /// Nothing is added: reading dk again would bring rounding alone.
    fn key_shift_gradient(&self, _: &Self::Act, _: usize, _: usize, _: &mut Self::Full) {}
}
