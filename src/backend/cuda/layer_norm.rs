//! LayerNorm over channels.

use super::memory::{ColumnSums, THREADS, slabs, width};
use super::{Argument, Cuda, Device};
use crate::backend::{Dropout, Grid, InFront, LayerNorm, Linear, Memory, NextNorm, Residual};

/// Sums per channel that kernels leave for [`Cuda::sum_norm_partials`].
pub(super) const NORM_KINDS: usize = 3;

/// Neighbouring lanes that share a row: as many as it has packs of channels, up to a warp.
fn lanes(channels: usize) -> usize {
    (channels / width(channels)).next_power_of_two().min(32)
}

/// Whether a row is a warp's at most, each lane having one pack of 8 channels.
fn short(channels: usize) -> bool {
    channels <= 256 && channels.is_multiple_of(8)
}

/// A LayerNorm behind, of `rows` rows, as arguments of a kernel that makes it.
pub(super) fn behind<D: Device>(next: Option<NextNorm<'_, Cuda<D>>>, rows: usize, channels: usize) -> [Argument; 4] {
    let Some(NextNorm { norm: (gamma, beta), out, stats }) = next else { return [Argument::pointer(0); 4] };
    [gamma.at(channels), beta.at(channels), out.to(rows * channels), stats.to(2 * rows)]
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

    fn residual_norm(
        &self,
        x: &Self::Act,
        branch: &Self::Act,
        drop: Option<Dropout>,
        grid: Grid,
        channels: usize,
        (gamma, beta): (&Self::Full, &Self::Full),
        y: &mut Self::Act,
        normed: &mut Self::Act,
        stats: &mut Self::Full,
    ) {
        let rows = grid.rows();
        if !short(channels) {
            self.residual(x, branch, drop, grid, channels, y);
            return self.layer_norm(y, gamma, beta, rows, channels, normed, stats);
        }
        let (n, lanes) = (rows * channels, lanes(channels));
        let mut arguments = vec![x.at(n), branch.at(n)];
        arguments.extend(self.dropout_arguments(drop));
        arguments.extend([grid.area().into(), gamma.at(channels), beta.at(channels)]);
        arguments.extend([rows, channels, lanes].map(Argument::from));
        arguments.extend([y.to(n), normed.to(n), stats.to(2 * rows)]);
        self.launch("residual_norm", rows * lanes, &arguments);
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

    fn layer_norm_backward_all(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        stats: &Self::Full,
        gamma: &Self::Full,
        rows: usize,
        channels: usize,
        (dx, add): (&mut Self::Act, bool),
        mut parameters: Option<(&mut Self::Full, &mut Self::Full)>,
        front: InFront<'_, Self>,
    ) {
        let sums_unwritten = front.sums_unwritten();
        let InFront { mut scaled, bias } = front;
        let (n, lanes, (slab, slabs)) = (rows * channels, lanes(channels), slabs(rows));
        if let Some((dgamma, dbeta)) = parameters.take_if(|_| !short(channels)) {
            self.layer_norm_backward_params(dy, x, stats, rows, channels, dgamma, dbeta);
        }
        let mut factors = self.dropout_arguments(scaled.as_ref().map(|(drop, ..)| *drop)).to_vec();
        factors.push(scaled.as_ref().map_or(1, |(_, grid, _)| grid.area()).into());
        let room = scaled.as_mut().and_then(|(.., room)| room.as_mut());
        factors.push(room.map_or(Argument::pointer(0), |room| room.to(n)));
        let mut arguments = vec![dy.at(n), x.at(n), stats.at(2 * rows), gamma.at(channels)];
        arguments.extend([rows, channels, lanes].map(Argument::from));
        if parameters.is_some() || sums_unwritten {
            assert!(short(channels), "{channels} channels of a gradient that is not written");
            let partial = self.scratch(slabs * NORM_KINDS * channels);
            arguments.extend([slab.into(), dx.sum_to(n, add), add.into()]);
            arguments.extend(factors);
            arguments.push(Argument::partial(partial, slabs * NORM_KINDS * channels));
            self.launch_blocks("layer_norm_backward_both", [slabs, 1, 1], THREADS, &arguments);
            return self.sum_norm_partials((partial, slabs, channels), parameters, bias);
        }
        arguments.extend([dx.sum_to(n, add), add.into()]);
        let product = match scaled {
            Some((.., Some(scaled))) => {
                arguments.extend(factors);
                self.launch("layer_norm_backward_branch", rows * lanes, &arguments);
                &*scaled
            }
            _ => {
                self.launch("layer_norm_backward", rows * lanes, &arguments);
                &*dx
            }
        };
        if let Some(bias) = bias {
            self.linear_backward_bias(product, rows, channels, bias);
        }
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
        let sums = |to| ColumnSums { kinds: 1, to, add: true };
        self.column_sums(
            "layer_norm_backward_params",
            (rows, channels),
            |slab, partial| vec![dy.at(n), x.at(n), stats.at(2 * rows), rows.into(), channels.into(), slab, partial],
            &[sums(dgamma.both(channels)), sums(dbeta.both(channels))],
        );
    }
}

impl<D: Device> Cuda<D> {
    /// Adds up what slabs left of the gradients of gamma and beta, and of a bias in front, each if wanted.
    pub(super) fn sum_norm_partials(
        &self,
        partial: (u64, usize, usize),
        parameters: Option<(&mut <Self as Memory>::Full, &mut <Self as Memory>::Full)>,
        bias: Option<&mut <Self as Memory>::Full>,
    ) {
        let (dgamma, dbeta) = parameters.unzip();
        let both = |sum: &mut <Self as Memory>::Full| sum.both(partial.2);
        let mut wanted = vec![dgamma.map(both), dbeta.map(both)];
        wanted.extend(bias.map(|bias| Some(both(bias))));
        let to = |to: Option<_>| ColumnSums { kinds: 1, to: to.unwrap_or(Argument::pointer(0)), add: true };
        let outputs: Vec<_> = wanted.into_iter().map(to).collect();
        self.sum_partials(partial, NORM_KINDS, &outputs);
    }
}
