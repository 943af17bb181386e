//! Gathering convolution windows.

use super::memory::{THREADS, width};
use super::pictures::Part;
use super::{Argument, Cuda, Device};
use crate::backend::{Grid, Patches, Sample, Window};

/// Numbers of pixels that a block of `pixel_patches` keeps in shared memory at most.
const STAGED: usize = 12288;

/// `(images, height, width, channels, side, stride, padding, out_height, out_width)` as arguments.
fn geometry(grid: Grid, channels: usize, window: Window) -> [Argument; 9] {
    let out = grid.through(window);
    let Window { side, stride, padding } = window;
    [grid.images, grid.height, grid.width, channels, side, stride, padding, out.height, out.width].map(Argument::from)
}

impl<D: Device> Patches for Cuda<D> {
    fn pixel_patches(&self, samples: &[Sample<'_>], size: usize, window: Window, out: &mut Self::Act) {
        let images = samples.len();
        if images == 0 {
            return;
        }
        let out_size = window.out(size);
        let n = images * out_size * out_size * window.side * window.side * 3;
        let at = self.samples_at(samples, size, Part::Pixels);
        let pixels = at.argument(Part::Pixels, images, size);
        let [positions, levels, flips] = [at.positions, at.levels, at.flips].map(Argument::pointer);
        let Window { side, stride, padding } = window;
        let across = STAGED / (3 * side);
        assert!(side <= across, "a window of {side} x {side} pixels does not fit into shared memory");
        let strip = out_size.min((across - side) / stride + 1);
        let [size, side, stride, padding, width] = [size, side, stride, padding, out_size].map(Argument::from);
        let arguments = [pixels, positions, levels, flips, size, side, stride, padding, width, strip.into(), out.to(n)];
        self.launch_blocks("pixel_patches", [out_size.div_ceil(strip), out_size, images], THREADS, &arguments);
    }

    fn patches(&self, x: &Self::Act, grid: Grid, channels: usize, window: Window, out: &mut Self::Act) {
        let n = grid.through(window).rows() * window.side * window.side * channels;
        let mut arguments = vec![x.at(grid.rows() * channels)];
        arguments.extend(geometry(grid, channels, window));
        arguments.push(out.to(n));
        self.launch("patches", n / width(channels), &arguments);
    }

    fn patches_backward(
        &self,
        dout: &Self::Act,
        grid: Grid,
        channels: usize,
        window: Window,
        dx: &mut Self::Act,
        add: bool,
    ) {
        let gathered = grid.through(window).rows() * window.side * window.side * channels;
        let n = grid.rows() * channels;
        let mut arguments = vec![dout.at(gathered)];
        arguments.extend_from_slice(&geometry(grid, channels, window)[1..]);
        arguments.extend([dx.sum_to(n, add), add.into()]);
        let across = (grid.width * channels / width(channels)).div_ceil(THREADS);
        self.launch_blocks("patches_backward", [across, grid.height, grid.images], THREADS, &arguments);
    }
}
