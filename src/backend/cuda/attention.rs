//! Attention on tensor cores.

use super::memory::width;
use super::{Argument, Cuda, Device};
use crate::backend::{Attention, AttentionShape};

/// Threads of a block whose warps own queries.
const QUERY_BLOCK: usize = 256;
/// Threads of a block whose warps own keys.
const KEY_BLOCK: usize = 128;
/// Blocks to aim for: a few times what a GPU holds at once, and the same on every GPU, as sums are cut by it.
const BLOCKS: usize = 1024;
/// The fewest queries worth a partial sum of their own.
const SMALLEST_SLICE: usize = 256;
/// Tiles of queries that a block takes at most, for which it has the keys at hand.
const MOST_TILES: usize = 4;

/// The kernel for heads of this many channels.
///
/// # Panics
/// Above 64: SegFormers have 32 or 64.
fn kernel_for(head: usize, narrow: &'static str, wide: &'static str) -> &'static str {
    assert!(head <= 64, "attention on CUDA takes heads of up to 64 channels, not {head}");
    if head <= 32 { narrow } else { wide }
}

/// Lengths of queries, keys and the logarithms of the denominators.
fn lengths(shape: AttentionShape) -> (usize, usize, usize) {
    let AttentionShape { images, heads, head, queries, keys } = shape;
    (images * queries * heads * head, images * keys * heads * head, images * heads * queries)
}

/// Queries, or keys, that a block of so many threads takes at a time.
fn tile(head: usize, threads: usize) -> usize {
    if head <= 32 { threads } else { threads / 2 }
}

/// Queries per block where warps own queries, and the grid.
fn query_blocks(shape: AttentionShape) -> (usize, [usize; 3]) {
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

fn scale(shape: AttentionShape) -> Argument {
    Argument::F32((1.0 / (shape.head as f64).sqrt()) as f32)
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
        let AttentionShape { heads, head, queries, keys, .. } = shape;
        let (query_len, key_len, lse_len) = lengths(shape);
        let (span, grid) = query_blocks(shape);
        let mut arguments = vec![q.at(query_len), k.at(key_len), v.at(key_len)];
        arguments.extend([heads, head, queries, keys, span].map(Argument::from));
        arguments.extend([scale(shape), o.to(query_len), lse.to(lse_len)]);
        self.launch_blocks(kernel_for(head, "attention_32", "attention_64"), grid, QUERY_BLOCK, &arguments);
    }

    fn attention_backward(
        &self,
        q: &Self::Act,
        k: &Self::Act,
        v: &Self::Act,
        o: &Self::Act,
        lse: &Self::Full,
        d_o: &Self::Act,
        shape: AttentionShape,
        dq: &mut Self::Act,
        dk: &mut Self::Act,
        dv: &mut Self::Act,
    ) {
        let AttentionShape { images, heads, head, queries, keys } = shape;
        let (query_len, key_len, lse_len) = lengths(shape);
        let (span, query_grid) = query_blocks(shape);
        let (slice, key_grid) = key_blocks(shape);
        let slices = key_grid[2];
        let partial_len = slices * 2 * key_len;
        let partial = self.scratch(partial_len + 2 * lse_len);
        let terms = Argument::pointer(partial + (partial_len * size_of::<f32>()) as u64);
        let partial = Argument::pointer(partial);

        let mut arguments = vec![q.at(query_len), k.at(key_len), v.at(key_len)];
        arguments.extend([o.at(query_len), d_o.at(query_len), lse.at(lse_len)]);
        arguments.extend([heads, head, queries, keys, span].map(Argument::from));
        arguments.extend([scale(shape), dq.to(query_len), terms]);
        let kernel = kernel_for(head, "attention_backward_queries_32", "attention_backward_queries_64");
        self.launch_blocks(kernel, query_grid, QUERY_BLOCK, &arguments);

        let mut arguments = vec![q.at(query_len), k.at(key_len), v.at(key_len), d_o.at(query_len), terms];
        arguments.extend([images, heads, head, queries, keys, slice].map(Argument::from));
        arguments.extend([scale(shape), partial]);
        let kernel = kernel_for(head, "attention_backward_keys_32", "attention_backward_keys_64");
        self.launch_blocks(kernel, key_grid, KEY_BLOCK, &arguments);

        let arguments = [partial, slices.into(), Argument::U64(key_len as u64), dk.to(key_len), dv.to(key_len)];
        self.launch("attention_backward_join", key_len / width(key_len), &arguments);
    }
}
