//! Cross-entropy and confusion counts at label resolution.

use super::memory::THREADS;
use super::{Argument, Cuda, Device};
use crate::backend::{Grid, Loss, Sample};

impl<D: Device> Cuda<D> {
    /// Brings the samples' labels and flips to the device.
    fn stage_labels(&self, samples: &[Sample<'_>], size: usize) -> [Argument; 2] {
        let flips: Vec<u8> = samples.iter().map(|s| s.augment.flip.into()).collect();
        let mut parts: Vec<&[u8]> = vec![&flips];
        parts.extend(samples.iter().map(|s| &s.labels[..size * size]));
        let staged = self.stage(&parts);
        [staged[1], staged[0]].map(Argument::pointer)
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
        let [truths, flips] = self.stage_labels(samples, size);
        let blocks = (from.area() * labels).div_ceil(THREADS);
        let n = images * from.area() * labels;
        let partial = Argument::pointer(self.scratch(images * blocks));
        let scale = Argument::F32(scale as f32);
        let gradient = gradient.map_or(Argument::pointer(0), |gradient| gradient.to(n));
        let [height, width, labels, size] = [from.height, from.width, labels, size].map(Argument::from);
        let arguments = [logits.at(n), height, width, labels, truths, flips, size, scale, partial, gradient];
        self.launch_blocks("cross_entropy", [blocks, images, 1], THREADS, &arguments);
        self.launch_blocks("sum_losses", [images, 1, 1], THREADS, &[partial, blocks.into(), scale, out.both(images)]);
    }

    fn confusion(
        &self,
        logits: &Self::Act,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        counts: &mut [u64],
    ) {
        let images = samples.len();
        if images == 0 {
            return;
        }
        let [truths, flips] = self.stage_labels(samples, size);
        let n = images * from.area() * labels;
        let counts = &mut counts[..images * labels * labels];
        let bytes = size_of_val(counts);
        // Scratch is counted in numbers of 4 bytes.
        let address = self.scratch(2 * counts.len());
        // SAFETY: the scratch has room for the counts.
        self.attempt(|device| unsafe { device.clear(address, bytes) });
        let blocks = (size * size).div_ceil(THREADS);
        let [height, width, labels, size] = [from.height, from.width, labels, size].map(Argument::from);
        let arguments = [logits.at(n), height, width, labels, truths, flips, size, Argument::pointer(address)];
        self.launch_blocks("confusion", [blocks, images, 1], THREADS, &arguments);
        let mut found = vec![0u64; counts.len()];
        // SAFETY: the scratch has room for the counts.
        self.attempt(|device| unsafe { device.read(address, bytemuck::cast_slice_mut(&mut found)) });
        for (count, found) in counts.iter_mut().zip(found) {
            *count += found;
        }
    }
}
