//! The Mix-FFN in one kernel.

use super::{Argument, Cuda, Device, Joint};
use crate::backend::{Dropout, FfnOutputs, FfnWeights, Grid, MixFfn};

/// Tokens of a block, down and across, its threads, and the hidden channels that it takes at a time, as in the kernels.
const TALL: usize = 8;
const WIDE: usize = 16;
const BLOCK: usize = 128;
const CHUNK: usize = 32;

impl<D: Device> MixFfn for Cuda<D> {
    /// In the first two stages, which memory would bound: wider ones would leave a block little room for tokens.
    fn fuses_mix_ffn(&self, channels: usize, hidden: usize) -> bool {
        self.joins(Joint::MixFfn) && matches!(channels, 32 | 64) && hidden.is_multiple_of(CHUNK)
    }

    fn mix_ffn(
        &self,
        x: &Self::Act,
        grid: Grid,
        weights: &FfnWeights<'_, Self>,
        drop: Option<Dropout>,
        outputs: FfnOutputs<'_, Self>,
    ) {
        let &FfnWeights { norm, expand, mix, contract, next, channels, hidden } = weights;
        assert!(self.fuses_mix_ffn(channels, hidden), "a Mix-FFN of {channels} channels, {hidden} hidden ones");
        let rows = grid.rows();
        let (narrow, wide, both) = (rows * channels, rows * hidden, channels * hidden);
        let absent = Argument::pointer(0);
        let mut arguments = vec![x.at(narrow), norm.0.at(channels), norm.1.at(channels), expand.0.at(both)];
        arguments.push(expand.1.map_or(absent, |bias| bias.at(hidden)));
        arguments.extend([mix.0.at(9 * hidden), mix.1.at(hidden), contract.0.at(both)]);
        arguments.push(contract.1.map_or(absent, |bias| bias.at(channels)));
        arguments.extend(self.dropout_arguments(drop));
        arguments.extend([next.0.at(channels), next.1.at(channels)]);
        arguments.extend([grid.height, grid.width, hidden].map(Argument::from));
        arguments.push(outputs.normed.map_or(absent, |normed| normed.to(narrow)));
        arguments.push(outputs.stats.to(2 * rows));
        arguments.push(outputs.h.map_or(absent, |h| h.to(wide)));
        arguments.extend([outputs.y.to(narrow), outputs.next.0.to(narrow), outputs.next.1.to(2 * rows)]);
        let blocks = [grid.width.div_ceil(WIDE), grid.height.div_ceil(TALL), grid.images];
        let kernel = if channels == 32 { "mix_ffn_32" } else { "mix_ffn_64" };
        self.launch_blocks(kernel, blocks, BLOCK, &arguments);
    }
}
