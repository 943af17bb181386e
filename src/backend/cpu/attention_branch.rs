//! The queries' side of attention, a tile of queries at a time: from the normalised stream to the stream, they stay in the
//! second-level cache.

use super::attention::{Keys, TILE, Tile, attend, tiles};
use super::linear::{Weights, linear};
use super::residual::add_branch;
use super::room::with_room;
use super::{Buffer, Cpu, Real};
use crate::backend::{AttentionBranch, AttentionOutputs, AttentionShape, AttentionWeights, Dropout, Product};

impl<T: Real> AttentionBranch for Cpu<T> {
    /// In evaluation: what a backward pass needs goes to memory all the same.
    fn fuses_attention(&self, _: AttentionShape, keep: bool) -> bool {
        !keep
    }

    fn attention_branch(
        &self,
        x: &Buffer<T>,
        normed: &Buffer<T>,
        k: &Buffer<T>,
        v: &Buffer<T>,
        shape: AttentionShape,
        weights: &AttentionWeights<'_, Self>,
        drop: Option<Dropout>,
        outputs: AttentionOutputs<'_, Self>,
    ) {
        let AttentionOutputs { y, kept: None } = outputs else { unreachable!("joined in evaluation alone") };
        let channels = shape.heads * shape.head;
        let p = Product { rows: 0, inputs: channels, outputs: channels };
        let packed = self.packed(channels, channels);
        with_room([packed, packed, self.packed_keys(shape)], |[query, output, keys]| {
            let (query, output) = (Weights::new(weights.query.0, p, query), Weights::new(weights.output.0, p, output));
            let keys = Keys::new(k, v, shape, keys);
            self.each(tiles(shape, y, None), |Tile { image, token, out: y, .. }| {
                let own = token * channels..token * channels + y.len();
                let (x, normed) = (&x[own.clone()], &normed[own]);
                let p = Product { rows: y.len() / channels, ..p };
                with_room([TILE * channels, TILE * shape.keys, TILE * channels], |[q, scores, o]| {
                    let (q, o) = (&mut q[..y.len()], &mut o[..y.len()]);
                    linear(normed, query, weights.query.1.map(|bias| &bias[..]), p, q, false);
                    attend((q, 0), (keys, image), scores, o, std::iter::empty());
                    // The queries are done with.
                    let branch = q;
                    linear(o, output, weights.output.1.map(|bias| &bias[..]), p, branch, false);
                    let factor = drop.map_or(T::ONE, |drop| T::of(f64::from(drop.factor(image as u64))));
                    add_branch(x, branch, factor, y);
                });
            });
        });
    }
}
