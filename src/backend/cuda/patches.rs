//! Gathering convolution windows.

use super::layer_norm::behind;
use super::memory::{ColumnSums, THREADS, width};
use super::pictures::Part;
use super::{Argument, Cuda, Device, Joint};
use crate::backend::{EmbedPixels, Grid, NextNorm, Patches, Sample, Window};

/// Numbers of pixels that a block of `pixel_patches` keeps in shared memory at most.
const STAGED: usize = 12288;

/// SegFormer's first window, numbers of pixels in it, and windows side by side that a block embeds.
const FIRST: Window = Window { side: 7, stride: 4, padding: 3 };
const TAPS: usize = FIRST.side * FIRST.side * 3;
const STRIP: usize = THREADS / 4;
/// Lines of windows of a block: its weights are fetched once. On the way back, it takes a multiple of them.
const LINES: usize = 8;
/// The fewest blocks that are left on the way back to longer ones: four for each multiprocessor of a large GPU, which holds two at a
/// time. More would only leave more sums. A fixed number, so that sums do not depend on the device.
const BLOCKS_BACK: usize = 512;

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

    fn patches_backward(&self, dout: &Self::Act, grid: Grid, channels: usize, window: Window, dx: &mut Self::Act) {
        let gathered = grid.through(window).rows() * window.side * window.side * channels;
        let n = grid.rows() * channels;
        let mut arguments = vec![dout.at(gathered)];
        arguments.extend_from_slice(&geometry(grid, channels, window)[1..]);
        arguments.push(dx.both(n));
        let across = (grid.width * channels / width(channels)).div_ceil(THREADS);
        self.launch_blocks("patches_backward", [across, grid.height, grid.images], THREADS, &arguments);
    }
}

impl<D: Device> Cuda<D> {
    /// `(pixels, positions, levels, flips, size, out_size, lines)` as arguments.
    fn embedded(&self, samples: &[Sample<'_>], size: usize, lines: usize) -> Vec<Argument> {
        assert!(size.is_multiple_of(4), "pictures of {size} x {size}: pixels are read four at a time");
        let at = self.samples_at(samples, size, Part::Pixels);
        let mut arguments = vec![at.argument(Part::Pixels, samples.len(), size)];
        arguments.extend([at.positions, at.levels, at.flips].map(Argument::pointer));
        arguments.extend([size, FIRST.out(size), lines].map(Argument::from));
        arguments
    }
}

impl<D: Device> EmbedPixels for Cuda<D> {
    fn embeds_pixels(&self, window: Window, channels: usize) -> bool {
        self.joins(Joint::EmbedPixels) && window == FIRST && matches!(channels, 32 | 64)
    }

    fn embed_pixels(
        &self,
        samples: &[Sample<'_>],
        size: usize,
        window: Window,
        (w, bias): (&Self::Act, Option<&Self::Act>),
        (gamma, beta): (&Self::Full, &Self::Full),
        channels: usize,
        y: &mut Self::Act,
        kept: Option<(&mut Self::Act, &mut Self::Full)>,
        next: Option<NextNorm<'_, Self>>,
    ) {
        let rows = samples.len() * window.out(size).pow(2);
        if rows == 0 {
            return;
        }
        let n = rows * channels;
        let mut arguments = self.embedded(samples, size, LINES);
        arguments.extend([w.at(channels * TAPS), bias.map_or(Argument::pointer(0), |bias| bias.at(channels))]);
        arguments.extend([gamma.at(channels), beta.at(channels), y.to(n)]);
        arguments.extend(match kept {
            Some((raw, stats)) => [raw.to(n), stats.to(2 * rows)],
            None => [Argument::pointer(0), Argument::pointer(0)],
        });
        arguments.extend(behind(next, rows, channels));
        let name = if channels == 32 { "embed_pixels_32" } else { "embed_pixels_64" };
        self.launch_blocks(name, blocks(samples.len(), size, LINES), THREADS, &arguments);
    }

    fn embed_pixels_backward(
        &self,
        samples: &[Sample<'_>],
        size: usize,
        window: Window,
        draw: &Self::Act,
        channels: usize,
        dw: &mut Self::Full,
    ) {
        let rows = samples.len() * window.out(size).pow(2);
        if rows == 0 {
            return;
        }
        let shares = blocks(samples.len(), size, LINES).iter().product::<usize>() / BLOCKS_BACK;
        let lines = LINES * shares.max(1);
        let (blocks, numbers) = (blocks(samples.len(), size, lines), channels * TAPS);
        let slabs = blocks.iter().product();
        let partial = self.scratch(slabs * numbers);
        let mut arguments = self.embedded(samples, size, lines);
        arguments.extend([draw.at(rows * channels), Argument::partial(partial, slabs * numbers)]);
        let name = if channels == 32 { "embed_pixels_backward_32" } else { "embed_pixels_backward_64" };
        self.launch_blocks(name, blocks, THREADS, &arguments);
        self.sum_partials((partial, slabs, numbers), 1, &[ColumnSums { kinds: 1, to: dw.both(numbers), add: true }]);
    }
}

/// Blocks that embed pictures, or go back, each by so many lines.
fn blocks(images: usize, size: usize, lines: usize) -> [usize; 3] {
    let out = FIRST.out(size);
    [out.div_ceil(STRIP), out.div_ceil(lines), images]
}
