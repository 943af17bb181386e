//! LayerNorm over channels.

use super::memory::{ColumnSums, THREADS, slabs, width};
use super::{Argument, Cuda, Device};
use crate::backend::LayerNorm;

/// Neighbouring lanes that share a row: as many as it has packs of channels, up to a warp.
fn lanes(channels: usize) -> usize {
    (channels / width(channels)).next_power_of_two().min(32)
}

impl<D: Device> LayerNorm for Cuda<D> {
    fn layer_norm(
        &self,
        x: &Self::Act,
        gamma: &Self::Full,
        beta: &Self::Full,
        rows: usize,
        channels: usize,
        y: &mut Self::Act,
        stats: &mut Self::Full,
    ) {
        let (n, lanes) = (rows * channels, lanes(channels));
        let (gamma, beta) = (gamma.at(channels), beta.at(channels));
        let sizes = [rows.into(), channels.into(), lanes.into()];
        let arguments = [x.at(n), gamma, beta, sizes[0], sizes[1], sizes[2], y.to(n), stats.to(2 * rows)];
        self.launch("layer_norm", rows * lanes, &arguments);
    }

    fn layer_norm_backward(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        stats: &Self::Full,
        gamma: &Self::Full,
        rows: usize,
        channels: usize,
        dx: &mut Self::Act,
        add: bool,
    ) {
        let (n, lanes) = (rows * channels, lanes(channels));
        let (stats, gamma) = (stats.at(2 * rows), gamma.at(channels));
        let sizes = [rows.into(), channels.into(), lanes.into()];
        let arguments = [dy.at(n), x.at(n), stats, gamma, sizes[0], sizes[1], sizes[2], dx.sum_to(n, add), add.into()];
        self.launch("layer_norm_backward", rows * lanes, &arguments);
    }

    fn layer_norm_backward_both(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        stats: &Self::Full,
        gamma: &Self::Full,
        rows: usize,
        channels: usize,
        (dx, add): (&mut Self::Act, bool),
        (dgamma, dbeta): (&mut Self::Full, &mut Self::Full),
    ) {
        if channels > 256 || !channels.is_multiple_of(8) {
            self.layer_norm_backward_params(dy, x, stats, rows, channels, dgamma, dbeta);
            return self.layer_norm_backward(dy, x, stats, gamma, rows, channels, dx, add);
        }
        let (n, (slab, slabs)) = (rows * channels, slabs(rows));
        let partial = self.scratch(slabs * 2 * channels);
        let mut arguments = vec![dy.at(n), x.at(n), stats.at(2 * rows), gamma.at(channels)];
        arguments.extend([rows, channels, lanes(channels), slab].map(Argument::from));
        arguments.extend([dx.sum_to(n, add), add.into(), Argument::pointer(partial)]);
        self.launch_blocks("layer_norm_backward_both", [slabs, 1, 1], THREADS, &arguments);
        let sums = |to| ColumnSums { kinds: 1, factor: 1.0, to, add: true };
        let outputs = [sums(dgamma.both(channels)), sums(dbeta.both(channels))];
        self.sum_partials((partial, slabs, channels), 2, &outputs);
    }

    fn layer_norm_backward_params(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        stats: &Self::Full,
        rows: usize,
        channels: usize,
        dgamma: &mut Self::Full,
        dbeta: &mut Self::Full,
    ) {
        let n = rows * channels;
        let sums = |to| ColumnSums { kinds: 1, factor: 1.0, to, add: true };
        self.column_sums(
            "layer_norm_backward_params",
            (rows, channels),
            |slab, partial| vec![dy.at(n), x.at(n), stats.at(2 * rows), rows.into(), channels.into(), slab, partial],
            &[sums(dgamma.both(channels)), sums(dbeta.both(channels))],
        );
    }
}
