//! Depth-wise 3x3 convolution, bias and GELU of the Mix-FFN.

use super::memory::{ColumnSums, width};
use super::{Argument, Cuda, Device};
use crate::backend::{Depthwise, Grid};

/// `(tokens, height, width, channels)` as arguments.
fn geometry(grid: Grid, channels: usize) -> [Argument; 4] {
    [grid.rows(), grid.height, grid.width, channels].map(Argument::from)
}

impl<D: Device> Depthwise for Cuda<D> {
    fn depthwise_gelu(
        &self,
        h: &Self::Act,
        w: &Self::Full,
        b: &Self::Full,
        grid: Grid,
        channels: usize,
        g: &mut Self::Act,
    ) {
        let n = grid.rows() * channels;
        let [tokens, height, across, c] = geometry(grid, channels);
        let arguments = [h.at(n), w.at(9 * channels), b.at(channels), tokens, height, across, c, g.to(n)];
        self.launch("depthwise_gelu", n / width(channels), &arguments);
    }

    fn depthwise_gelu_backward(
        &self,
        h: &Self::Act,
        w: &Self::Full,
        b: &Self::Full,
        grid: Grid,
        channels: usize,
        dg: &mut Self::Act,
        g: Option<&mut Self::Act>,
    ) {
        let n = grid.rows() * channels;
        let [tokens, height, across, c] = geometry(grid, channels);
        let g = g.map_or(Argument::pointer(0), |g| g.to(n));
        let arguments = [h.at(n), w.at(9 * channels), b.at(channels), tokens, height, across, c, dg.both(n), g];
        self.launch("depthwise_gelu_backward", n / width(channels), &arguments);
    }

    fn depthwise_backward_input(
        &self,
        du: &Self::Act,
        w: &Self::Full,
        grid: Grid,
        channels: usize,
        dh: &mut Self::Act,
    ) {
        let n = grid.rows() * channels;
        let [tokens, height, across, c] = geometry(grid, channels);
        let arguments = [du.at(n), w.at(9 * channels), tokens, height, across, c, dh.to(n)];
        self.launch("depthwise_backward_input", n / width(channels), &arguments);
    }

    fn depthwise_backward_params(
        &self,
        du: &Self::Act,
        h: &Self::Act,
        grid: Grid,
        channels: usize,
        dw: &mut Self::Full,
        db: &mut Self::Full,
    ) {
        let n = grid.rows() * channels;
        let [tokens, height, across, c] = geometry(grid, channels);
        self.column_sums(
            "depthwise_backward_params",
            (grid.rows(), channels),
            |slab, partial| vec![du.at(n), h.at(n), tokens, height, across, c, slab, partial],
            &[
                ColumnSums { kinds: 9, factor: 1.0, to: dw.both(9 * channels), add: true },
                ColumnSums { kinds: 1, factor: 1.0, to: db.both(channels), add: true },
            ],
        );
    }
}
