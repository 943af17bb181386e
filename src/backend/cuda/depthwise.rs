//! Depth-wise 3x3 convolution, bias and GELU of the Mix-FFN.

use super::memory::{ColumnSums, THREADS};
use super::{Argument, Cuda, Device};
use crate::backend::{Depthwise, Grid};

/// Tokens side by side, rows and threads per token of a block, as in the kernels.
const COLUMNS: usize = 16;
const SEGMENT: usize = 64;
const LANES: usize = 16;
/// Threads of a block going back: a column more on each side.
const BACKWARD_THREADS: usize = (COLUMNS + 2) * LANES;

/// Blocks of a launch: by channels and columns, by rows, and by images.
fn blocks(grid: Grid, channels: usize) -> [usize; 3] {
    let width = if channels.is_multiple_of(2) { 2 } else { 1 };
    let groups = channels.div_ceil(LANES * width);
    [groups * grid.width.div_ceil(COLUMNS), grid.height.div_ceil(SEGMENT), grid.images]
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
        let [height, width, c] = [grid.height, grid.width, channels].map(Argument::from);
        let arguments = [h.at(n), w.at(9 * channels), b.at(channels), height, width, c, g.to(n)];
        self.launch_blocks("depthwise_gelu", blocks(grid, channels), THREADS, &arguments);
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
        dh: Option<&mut Self::Act>,
        parameters: Option<(&mut Self::Full, &mut Self::Full)>,
    ) {
        let n = grid.rows() * channels;
        let [height, width, c] = [grid.height, grid.width, channels].map(Argument::from);
        let [g, dh] = [g, dh].map(|x| x.map_or(Argument::pointer(0), |x| x.to(n)));
        let mut arguments = vec![h.at(n), w.at(9 * channels), b.at(channels), height, width, c, dg.at(n), g, dh];
        let blocks = blocks(grid, channels);
        let Some((dw, db)) = parameters else {
            self.launch_blocks("depthwise_gelu_backward", blocks, BACKWARD_THREADS, &arguments);
            return;
        };
        let slabs = grid.width.div_ceil(COLUMNS) * blocks[1] * blocks[2];
        let partial = self.scratch(slabs * 10 * channels);
        arguments.push(Argument::pointer(partial));
        self.launch_blocks("depthwise_gelu_backward_params", blocks, BACKWARD_THREADS, &arguments);
        self.sum_partials(
            (partial, slabs, channels),
            &[
                ColumnSums { kinds: 9, factor: 1.0, to: dw.both(9 * channels), add: true },
                ColumnSums { kinds: 1, factor: 1.0, to: db.both(channels), add: true },
            ],
        );
    }
}
