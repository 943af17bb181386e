//! Cross-entropy and confusion counts at label resolution.

use super::memory::THREADS;
use super::pictures::Part;
use super::{Argument, Cuda, Device};
use crate::backend::{Grid, Loss, Sample};

/// Side of the square of logits, and rows of pixels, that a block takes of two classes.
const TILE: usize = 16;
const ROWS: usize = 32;

/// Whether there are kernels for two classes.
fn for_two(from: Grid, labels: usize, size: usize) -> bool {
    labels == 2 && size == 4 * from.height && size == 4 * from.width
}

impl<D: Device> Cuda<D> {
    /// Labels, positions and flips of the samples, as three arguments.
    fn stage_labels(&self, samples: &[Sample<'_>], size: usize) -> [Argument; 3] {
        let at = self.samples_at(samples, size, Part::Labels);
        let [positions, flips] = [at.positions, at.flips].map(Argument::pointer);
        [at.argument(Part::Labels, samples.len(), size), positions, flips]
    }
}

impl<D: Device> Loss for Cuda<D> {
    fn cross_entropy(
        &self,
        logits: &Self::Act,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        scale: f64,
        out: &mut Self::Full,
        gradient: Option<&mut Self::Act>,
    ) {
        let images = samples.len();
        if images == 0 {
            return;
        }
        let [truths, positions, flips] = self.stage_labels(samples, size);
        let n = images * from.area() * labels;
        let scale = Argument::F32(scale as f32);
        let gradient = gradient.map_or(Argument::pointer(0), |gradient| gradient.to(n));
        let [height, width] = [from.height, from.width].map(Argument::from);
        let two = for_two(from, labels, size);
        let tiles = [from.width.div_ceil(TILE), from.height.div_ceil(TILE)];
        let blocks = if two { tiles[0] * tiles[1] } else { (from.area() * labels).div_ceil(THREADS) };
        let partial = Argument::pointer(self.scratch(images * blocks));
        if two {
            let arguments = [logits.at(n), height, width, truths, positions, flips, scale, partial, gradient];
            self.launch_blocks("cross_entropy_two", [tiles[0], tiles[1], images], THREADS, &arguments);
        } else {
            let sizes = [labels, size].map(Argument::from);
            let pictures = [truths, positions, flips];
            let mut arguments = vec![logits.at(n), height, width, sizes[0]];
            arguments.extend(pictures);
            arguments.extend([sizes[1], scale, partial, gradient]);
            self.launch_blocks("cross_entropy", [blocks, images, 1], THREADS, &arguments);
        }
        self.launch_blocks("sum_losses", [images, 1, 1], THREADS, &[partial, blocks.into(), scale, out.both(images)]);
    }

    fn confusion(
        &self,
        logits: &Self::Act,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        counts: &mut Self::Counts,
    ) {
        let images = samples.len();
        if images == 0 {
            return;
        }
        let [truths, positions, flips] = self.stage_labels(samples, size);
        let n = images * from.area() * labels;
        let number = images * labels * labels;
        let address = counts.address(number);
        // SAFETY: the array holds so many counts, as `address` asserts.
        self.attempt(|device| unsafe { device.clear(address, number * size_of::<u64>()) });
        let to = Argument::pointer(address);
        let [height, width] = [from.height, from.width].map(Argument::from);
        if for_two(from, labels, size) {
            let arguments = [logits.at(n), height, width, truths, positions, flips, to];
            let blocks = [size.div_ceil(THREADS), size.div_ceil(ROWS), images];
            return self.launch_blocks("confusion_two", blocks, THREADS, &arguments);
        }
        let blocks = (size * size).div_ceil(THREADS);
        let arguments = [logits.at(n), height, width, labels.into(), truths, positions, flips, size.into(), to];
        self.launch_blocks("confusion", [blocks, images, 1], THREADS, &arguments);
    }

    fn note(
        &self,
        loss: &Self::Full,
        counts: &Self::Counts,
        images: usize,
        labels: usize,
        at: usize,
        all_losses: &mut Self::Full,
        all_counts: &mut Self::Counts,
    ) {
        let squares = labels * labels;
        let to = |address, bytes| Argument::Pointer { address, read: 0, written: bytes };
        let losses = to(all_losses.address(at + images), images * size_of::<f32>());
        let all = to(all_counts.address((at + images) * squares), images * squares * size_of::<u64>());
        let sizes = [images, squares, at].map(Argument::from);
        let arguments = [loss.at(images), counts.at(images * squares), sizes[0], sizes[1], sizes[2], losses, all];
        self.launch("note", images * squares, &arguments);
    }
}
