//! The way back through the LayerNorm behind attention's branch and the branch's output product in one kernel.

use super::attention::{all_blocks, lengths};
use super::layer_norm::NORM_KINDS;
use super::linear::{SQUARE_BLOCK, square_blocks};
use super::memory::ColumnSums;
use super::{Argument, Cuda, Device, Joint};
use crate::backend::{AttentionOutput, AttentionShape, Dropout, NormBack};

impl<D: Device> AttentionOutput for Cuda<D> {
    /// In the first two stages of SegFormer-B0, where most tokens are, and where attention's way back takes the sums.
    fn joins_attention_output(&self, shape: AttentionShape) -> bool {
        let (rows, channels) = (shape.images * shape.queries, shape.heads * shape.head);
        // Kernels count numbers in 32 bits.
        let fits = square_blocks(rows, channels).is_some() && rows * channels <= 1 << 31;
        self.joins(Joint::AttentionOutputBackward) && fits && all_blocks(shape).is_some()
    }

    fn attention_output_backward(
        &self,
        NormBack { dy, x, stats, gamma }: NormBack<'_, Self>,
        drop: Option<Dropout>,
        o: &Self::Act,
        weight: &Self::Act,
        shape: AttentionShape,
        d: &mut Self::Act,
        d_o: &mut Self::Act,
        deltas: &mut Self::Full,
        dw: &mut Self::Full,
        parameters: Option<(&mut Self::Full, &mut Self::Full)>,
        bias: Option<&mut Self::Full>,
    ) {
        let AttentionShape { images, heads, head, queries, .. } = shape;
        let (rows, channels) = (images * queries, heads * head);
        let blocks = square_blocks(rows, channels).filter(|_| self.joins_attention_output(shape));
        let Some(blocks) = blocks else { panic!("{shape:?} has no joint kernel") };
        let ((n, _, deltas_len), square) = (lengths(shape), channels * channels);
        let sums = parameters.is_some() || bias.is_some();
        let norm_sums = if sums { blocks * NORM_KINDS * channels } else { 0 };
        let partial = self.scratch(blocks * square + norm_sums);
        let norm_partial = partial + (blocks * square * size_of::<f32>()) as u64;
        let mut arguments = vec![dy.at(n), x.at(n), stats.at(2 * rows), gamma.at(channels)];
        arguments.extend(self.dropout_arguments(drop));
        arguments.extend([o.at(n), weight.at(square), rows.into(), queries.into(), d.both(n)]);
        arguments.extend([d_o.to(n), deltas.to(deltas_len), Argument::partial(partial, blocks * square)]);
        if sums {
            arguments.push(Argument::partial(norm_partial, norm_sums));
        }
        let kernel = match (channels, sums) {
            (32, false) => "attention_output_backward_32",
            (32, true) => "attention_output_backward_all_32",
            (_, false) => "attention_output_backward_64",
            (_, true) => "attention_output_backward_all_64",
        };
        self.launch_blocks(kernel, [blocks, 1, 1], SQUARE_BLOCK, &arguments);
        let to = ColumnSums { kinds: channels, to: dw.both(square), add: true };
        self.sum_partials((partial, blocks, channels), channels, &[to]);
        if sums {
            self.sum_norm_partials((norm_partial, blocks, channels), parameters, bias);
        }
    }
}
