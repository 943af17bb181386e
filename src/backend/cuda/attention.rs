//! Attention on tensor cores.

use super::{Argument, Cuda, Device};
use crate::backend::{Attention, AttentionShape};

/// Queries or keys of a block.
const TILE: usize = 64;
/// Threads of a block.
const BLOCK: usize = 128;
/// Slices of the queries that dK and dV are summed over at most.
const SLICES: usize = 16;

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
        let AttentionShape { images, heads, head, queries, keys } = shape;
        let (query_len, key_len, lse_len) = lengths(shape);
        let mut arguments = vec![q.at(query_len), k.at(key_len), v.at(key_len)];
        arguments.extend([heads, head, queries, keys].map(Argument::from));
        arguments.extend([scale(shape), o.to(query_len), lse.to(lse_len)]);
        let grid = [queries.div_ceil(TILE), images * heads, 1];
        self.launch_blocks(kernel_for(head, "attention_32", "attention_64"), grid, BLOCK, &arguments);
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
        let slice = queries.div_ceil(SLICES).max(1024).next_multiple_of(TILE);
        let slices = queries.div_ceil(slice);
        let partial_len = slices * 2 * key_len;
        let partial = self.scratch(partial_len + lse_len);
        let delta = Argument::pointer(partial + (partial_len * size_of::<f32>()) as u64);
        let partial = Argument::pointer(partial);

        let mut arguments = vec![o.at(query_len), d_o.at(query_len)];
        arguments.extend([images, heads, head, queries].map(Argument::from));
        arguments.push(delta);
        self.launch("attention_delta", lse_len, &arguments);

        let inputs = [q.at(query_len), k.at(key_len), v.at(key_len), d_o.at(query_len), lse.at(lse_len), delta];
        let mut arguments = inputs.to_vec();
        arguments.extend([heads, head, queries, keys].map(Argument::from));
        arguments.extend([scale(shape), dq.to(query_len)]);
        let kernel = kernel_for(head, "attention_backward_queries_32", "attention_backward_queries_64");
        self.launch_blocks(kernel, [queries.div_ceil(TILE), images * heads, 1], BLOCK, &arguments);

        let mut arguments = inputs.to_vec();
        arguments.extend([images, heads, head, queries, keys, slice].map(Argument::from));
        arguments.extend([scale(shape), partial]);
        let kernel = kernel_for(head, "attention_backward_keys_32", "attention_backward_keys_64");
        self.launch_blocks(kernel, [keys.div_ceil(TILE), images * heads, slices], BLOCK, &arguments);

        let arguments = [partial, slices.into(), Argument::U64(key_len as u64), dk.to(key_len), dv.to(key_len)];
        self.launch("attention_backward_join", key_len, &arguments);
    }
}
