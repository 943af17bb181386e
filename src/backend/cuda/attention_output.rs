//! The way back through the output product in one kernel.

use super::attention::{all_blocks, lengths};
use super::linear::{SQUARE_BLOCK, square_blocks};
use super::memory::ColumnSums;
use super::{Argument, Cuda, Device, Joint};
use crate::backend::{AttentionOutput, AttentionShape};

impl<D: Device> AttentionOutput for Cuda<D> {
    /// In the first two stages of SegFormer-B0, where most tokens are, and where attention's way back takes the sums.
    fn joins_attention_output(&self, shape: AttentionShape) -> bool {
        let blocks = square_blocks(shape.images * shape.queries, shape.heads * shape.head);
        self.joins(Joint::AttentionOutputBackward) && blocks.is_some() && all_blocks(shape).is_some()
    }

    fn attention_output_backward(
        &self,
        d: &Self::Act,
        o: &Self::Act,
        weight: &Self::Act,
        shape: AttentionShape,
        d_o: &mut Self::Act,
        deltas: &mut Self::Full,
        dw: &mut Self::Full,
    ) {
        let AttentionShape { images, heads, head, queries, .. } = shape;
        let (rows, channels) = (images * queries, heads * head);
        let blocks = square_blocks(rows, channels).filter(|_| self.joins_attention_output(shape));
        let Some(blocks) = blocks else { panic!("{shape:?} has no joint kernel") };
        let ((n, _, deltas_len), square) = (lengths(shape), channels * channels);
        let kernel = if channels == 32 { "attention_output_backward_32" } else { "attention_output_backward_64" };
        let partial = self.scratch(blocks * square);
        let mut arguments = vec![d.at(n), o.at(n), weight.at(square), rows.into(), queries.into()];
        arguments.extend([d_o.to(n), deltas.to(deltas_len), Argument::partial(partial, blocks * square)]);
        self.launch_blocks(kernel, [blocks, 1, 1], SQUARE_BLOCK, &arguments);
        let sums = ColumnSums { kinds: channels, to: dw.both(square), add: true };
        self.sum_partials((partial, blocks, channels), channels, &[sums]);
    }
}
