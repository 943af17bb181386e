//! The queries' side of attention in one kernel.

use half::bf16;

use super::attention::{NARROW, QUERY_BLOCK, lengths, query_blocks, tile};
use super::{Argument, Array, Cuda, Device, Joint};
use crate::backend::{AttentionBranch, AttentionOutputs, AttentionShape, AttentionWeights, Dropout};

impl<D: Device> AttentionBranch for Cuda<D> {
    /// In the first two stages of SegFormer-B0, where most tokens are: queries of more heads would leave a block no room.
    fn fuses_attention(&self, shape: AttentionShape, _keep: bool) -> bool {
        self.joins(Joint::AttentionBranch) && shape.head == NARROW && matches!(shape.heads, 1 | 2)
    }

    fn attention_branch(
        &self,
        x: &Self::Act,
        normed: &Self::Act,
        k: &Self::Act,
        v: &Self::Act,
        shape: AttentionShape,
        weights: &AttentionWeights<'_, Self>,
        drop: Option<Dropout>,
        outputs: AttentionOutputs<'_, Self>,
    ) {
        assert!(self.fuses_attention(shape, true), "{shape:?} has no joint kernel");
        let AttentionShape { images, heads, queries, keys, .. } = shape;
        let (query_len, key_len, lse_len) = lengths(shape);
        // Several tiles are worth it where the keys stay: with two heads, these take turns.
        let span = if heads == 1 { query_blocks(shape).0 } else { tile(NARROW, QUERY_BLOCK) };
        let mut arguments = vec![x.at(query_len), normed.at(query_len), k.at(key_len), v.at(key_len)];
        arguments.extend([weights.query, weights.output].into_iter().flat_map(|weight| product::<D>(heads, weight)));
        arguments.extend(self.dropout_arguments(drop));
        arguments.extend([queries, keys, span].map(Argument::from));
        arguments.push(outputs.y.to(query_len));
        arguments.extend(match outputs.kept {
            Some((q, o, lse)) => [q.to(query_len), o.to(query_len), lse.to(lse_len)],
            None => [Argument::pointer(0); 3],
        });
        let kernel = if heads == 1 { "attention_branch_32" } else { "attention_branch_64" };
        self.launch_blocks(kernel, [queries.div_ceil(span), images, 1], QUERY_BLOCK, &arguments);
    }

    fn attention_join(
        &self,
        x: &Self::Act,
        o: &Self::Act,
        shape: AttentionShape,
        output: (&Self::Act, Option<&Self::Act>),
        drop: Option<Dropout>,
        y: &mut Self::Act,
    ) {
        assert!(self.fuses_attention(shape, true), "{shape:?} has no joint kernel");
        let AttentionShape { images, heads, queries, .. } = shape;
        let (len, ..) = lengths(shape);
        let mut arguments = vec![x.at(len), o.at(len)];
        arguments.extend(product::<D>(heads, output));
        arguments.extend(self.dropout_arguments(drop));
        arguments.extend([queries.into(), y.to(len)]);
        let kernel = if heads == 1 { "attention_join_32" } else { "attention_join_64" };
        let blocks = queries.div_ceil(tile(NARROW, QUERY_BLOCK));
        self.launch_blocks(kernel, [blocks, images, 1], QUERY_BLOCK, &arguments);
    }
}

/// A weight, and its bias, if there is one.
fn product<D: Device>(heads: usize, (weight, bias): (&Array<D, bf16>, Option<&Array<D, bf16>>)) -> [Argument; 2] {
    let channels = heads * NARROW;
    [weight.at(channels * channels), bias.map_or(Argument::pointer(0), |bias| bias.at(channels))]
}
