//! Depth-wise 3x3 convolution, bias and GELU of the Mix-FFN.

use super::memory::{ColumnSums, THREADS};
use super::{Argument, Cuda, Device};
use crate::backend::{Depthwise, Grid, Linear};

/// Tokens side by side of a thread and strips of a block, as in the kernels.
const COLUMNS: usize = 4;
const STRIPS: usize = THREADS / 32;
/// Blocks that a launch should have, so that the last of them to end keep few others waiting.
const BLOCKS: usize = 2048;
/// Rows of a strip at least: it reads two more.
const FEWEST_ROWS: usize = 8;

/// How a launch divides its tokens and channels.
struct Division {
    /// Rows of a strip.
    rows: usize,
    /// Blocks' worth of strips.
    slabs: usize,
    blocks: [usize; 3],
}

impl Division {
    fn new(grid: Grid, channels: usize) -> Self {
        let width = if channels.is_multiple_of(2) { 2 } else { 1 };
        let chunks = channels.div_ceil(32 * width);
        let columns = grid.images * grid.width.div_ceil(COLUMNS);
        let pieces = BLOCKS.div_ceil((columns * chunks).div_ceil(STRIPS));
        let rows = grid.height.div_ceil(pieces).max(FEWEST_ROWS);
        let slabs = (columns * grid.height.div_ceil(rows)).div_ceil(STRIPS);
        Self { rows, slabs, blocks: [chunks * slabs, 1, 1] }
    }

    /// `(images, height, width, channels, rows)` as arguments.
    fn arguments(&self, grid: Grid, channels: usize) -> [Argument; 5] {
        [grid.images, grid.height, grid.width, channels, self.rows].map(Argument::from)
    }
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
        let division = Division::new(grid, channels);
        let mut arguments = vec![h.at(n), w.at(9 * channels), b.at(channels)];
        arguments.extend(division.arguments(grid, channels));
        arguments.push(g.to(n));
        self.launch_blocks("depthwise_gelu", division.blocks, THREADS, &arguments);
    }

    fn depthwise_gelu_backward(
        &self,
        h: &Self::Act,
        w: &Self::Full,
        b: &Self::Full,
        grid: Grid,
        channels: usize,
        d: &mut Self::Act,
        g: Option<&mut Self::Act>,
        db: Option<&mut Self::Full>,
    ) {
        // To the same bits as in the forward pass.
        if let Some(g) = g {
            self.depthwise_gelu(h, w, b, grid, channels, g);
        }
        let n = grid.rows() * channels;
        let division = Division::new(grid, channels);
        let mut arguments = vec![h.at(n), w.at(9 * channels), b.at(channels)];
        arguments.extend(division.arguments(grid, channels));
        let sums = if db.is_some() { division.slabs * channels } else { 0 };
        let partial = if sums > 0 { self.scratch(sums) } else { 0 };
        let (old, new) = (d.at(n), d.to(n));
        arguments.extend([old, new, Argument::partial(partial, sums)]);
        self.launch_blocks("depthwise_gelu_backward", division.blocks, THREADS, &arguments);
        if let Some(db) = db {
            let db = ColumnSums { kinds: 1, to: db.both(channels), add: true };
            self.sum_partials((partial, division.slabs, channels), 1, &[db]);
        }
    }

    fn depthwise_backward(
        &self,
        du: &Self::Act,
        h: &Self::Act,
        w: &Self::Full,
        grid: Grid,
        channels: usize,
        mut dh: Option<&mut Self::Act>,
        dw: Option<&mut Self::Full>,
        shift: Option<&mut Self::Full>,
    ) {
        let n = grid.rows() * channels;
        let division = Division::new(grid, channels);
        let sizes = division.arguments(grid, channels);
        let new = dh.as_mut().map(|dh| dh.to(n));
        if let Some(dw) = dw {
            let sums = division.slabs * 10 * channels;
            let partial = self.scratch(sums);
            let mut arguments = vec![du.at(n), h.at(n), w.at(9 * channels)];
            arguments.extend(sizes);
            arguments.extend([new.unwrap_or(Argument::pointer(0)), Argument::partial(partial, sums)]);
            self.launch_blocks("depthwise_backward_weights", division.blocks, THREADS, &arguments);
            let to = |kinds, to| ColumnSums { kinds, to, add: true };
            let dw = to(9, dw.both(9 * channels));
            let shift = shift.map(|shift| to(1, shift.both(channels)));
            let outputs: Vec<_> = [Some(dw), shift].into_iter().flatten().collect();
            self.sum_partials((partial, division.slabs, channels), 10, &outputs);
        } else if let (Some(dh), Some(new)) = (dh, new) {
            let mut arguments = vec![du.at(n), w.at(9 * channels)];
            arguments.extend(sizes);
            arguments.push(new);
            self.launch_blocks("depthwise_backward", division.blocks, THREADS, &arguments);
            if let Some(shift) = shift {
                self.linear_backward_bias(dh, grid.rows(), channels, shift);
            }
        }
    }
}
