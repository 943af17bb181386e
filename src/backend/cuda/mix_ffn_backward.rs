//! The way back through a Mix-FFN as one kernel.

use super::memory::ColumnSums;
use super::{Argument, Cuda, Device, Joint};
use crate::backend::{Dropout, Grid, MixFfnBackward, MixFfnExpansion, MixFfnParts, MixFfnWeights};

/// Threads of a block; hidden channels that it works on at a time; sums per hidden channel, but for those of products: as in the
/// kernels.
const BLOCK: usize = 512;
const CHUNK: usize = 128;
const KINDS: usize = 9 + 1 + 1;
/// Tokens of a step.
const STEP: usize = 32;
/// Multiprocessors that blocks are shared out to, one at a time: an H100's. A fixed number, so that sums do not depend on the
/// device.
const MULTIPROCESSORS: usize = 132;
/// What a block costs besides its rows, in rows: it reads two more on each side.
const EXTRA_ROWS: usize = 3;

/// How a launch divides its tokens.
struct Division {
    /// Blocks side by side, and on top of each other.
    blocks: [usize; 2],
    /// Rows of a block.
    rows: usize,
    /// Steps of a block, each of [`STEP`] tokens.
    steps: usize,
}

impl Division {
    /// The columns of all images lie side by side, with one between images. A step's tokens are of `rows_per_step` rows, and
    /// the first and last of each row are the neighbours'.
    fn new(grid: Grid, rows_per_step: usize) -> Self {
        let strips = (grid.images * (grid.width + 1) - 1).div_ceil(STEP / rows_per_step - 2);
        let rows = |segments| grid.height.div_ceil(segments).next_multiple_of(rows_per_step);
        let cost = |&segments: &usize| (strips * segments).div_ceil(MULTIPROCESSORS) * (rows(segments) + EXTRA_ROWS);
        let rows = rows((1..=grid.height).min_by_key(cost).unwrap_or(1));
        Self { blocks: [strips, grid.height.div_ceil(rows)], rows, steps: rows / rows_per_step }
    }
}

impl<D: Device> MixFfnBackward for Cuda<D> {
    fn joins_mix_ffn_backward(&self, grid: Grid, channels: usize, hidden: usize) -> bool {
        // Kernels count numbers in 32 bits.
        let fits = hidden == 4 * channels && grid.rows() * hidden <= 1 << 31;
        self.joins(Joint::MixFfnBackward) && [32, 64].contains(&channels) && fits
    }

    /// Of few channels, whose sums have room in registers.
    fn sums_mix_ffn_expansion(&self, channels: usize) -> bool {
        channels == 32
    }

    fn mix_ffn_backward(
        &self,
        d: &Self::Act,
        drop: Option<Dropout>,
        h: &Self::Act,
        weights: MixFfnWeights<'_, Self>,
        grid: Grid,
        channels: usize,
        hidden: usize,
        dx: &mut Self::Act,
        MixFfnParts { sums, contract, expand }: MixFfnParts<'_, Self>,
    ) {
        let (tokens, wide) = (grid.rows() * channels, grid.rows() * hidden);
        if tokens == 0 {
            return;
        }
        let sums_expansion = self.sums_mix_ffn_expansion(channels);
        let (expansion, dh) = match expand {
            Some(MixFfnExpansion::Summed { normed, dw }) => (Some((normed, dw)), None),
            Some(MixFfnExpansion::Product(dh)) => (None, Some(dh)),
            None => (None, None),
        };
        assert!(
            if sums_expansion { dh.is_none() } else { expansion.is_none() },
            "the gradient of an expansion of {channels} channels"
        );
        let adds = sums.is_some() || contract.is_some() || expansion.is_some();
        let everything = adds || dh.is_some();
        let division = Division::new(grid, if everything { 2 } else { 1 });
        let [strips, segments] = division.blocks;
        // Sums that wait from chunk to chunk, in pairs, then those of the parameters' gradients.
        let kept = if hidden > CHUNK { strips * segments * division.steps * STEP * channels / 2 } else { 0 };
        let blocks = strips * segments;
        let kinds = KINDS + if sums_expansion { 2 * channels } else { channels };
        let partials = if adds { blocks * kinds * hidden } else { 0 };
        let room = self.scratch(kept + partials);
        let partial = room + (kept * size_of::<f32>()) as u64;
        let chunks = hidden / CHUNK;
        let bytes = kept * size_of::<f32>() * (chunks - 1);
        let mut arguments = vec![d.at(tokens), h.at(wide), weights.contract.at(channels * hidden)];
        arguments.extend([
            weights.mix.at(9 * hidden),
            weights.mix_bias.at(hidden),
            weights.expand.at(hidden * channels),
        ]);
        arguments.extend([grid.images, grid.height, grid.width, division.rows].map(Argument::from));
        arguments.extend(self.dropout_arguments(drop));
        arguments.push(Self::kept_factor(drop));
        arguments.push(Argument::Pointer { address: room, read: bytes, written: bytes });
        arguments.push(dx.to(tokens));
        if everything {
            let null = || Argument::pointer(0);
            arguments.push(if sums_expansion {
                // If that is not wanted, what the kernel makes of n nobody reads, so that it may be any tokens.
                expansion.as_ref().map_or(d, |(normed, _)| normed).at(tokens)
            } else {
                dh.map_or_else(null, |dh| dh.to(wide))
            });
            arguments.push(if partials > 0 { Argument::partial(partial, partials) } else { null() });
        }
        let kernel = match (channels, everything) {
            (32, false) => "mix_ffn_backward_32",
            (32, true) => "mix_ffn_backward_all_32",
            (64, false) => "mix_ffn_backward_64",
            (64, true) => "mix_ffn_backward_all_64",
            _ => unreachable!("{channels} channels are not joined"),
        };
        self.launch_blocks(kernel, [strips, segments, 1], BLOCK, &arguments);
        let sums_to = |kinds, to| ColumnSums { kinds, to, add: true };
        if let Some([dw, db, shift]) = sums {
            let outputs = [(9, dw), (1, db), (1, shift)].map(|(n, to)| sums_to(n, to.both(n * hidden)));
            self.sum_partials((partial, blocks, hidden), kinds, &outputs);
        }
        let mut products = vec![contract];
        if sums_expansion {
            products.push(expansion.map(|(_, dw)| dw));
        }
        if products.iter().any(Option::is_some) {
            let to =
                |wanted: Option<&mut Self::Full>| wanted.map_or(Argument::pointer(0), |to| to.both(channels * hidden));
            let outputs: Vec<_> = products.into_iter().map(|wanted| sums_to(channels, to(wanted))).collect();
            let partial = partial + (KINDS * hidden * size_of::<f32>()) as u64;
            self.sum_partials((partial, blocks, hidden), kinds, &outputs);
        }
    }
}
