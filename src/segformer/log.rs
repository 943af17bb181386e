//! What an evaluation has measured so far: kept on the device, so that no batch waits for the answer of the one before.

use super::model::Evaluated;
use crate::backend::Backend;

/// Bytes that wait on the device: tens of thousands of images with two classes.
const BYTES: usize = 1 << 20;

/// Losses and confusion counts, image by image.
pub struct Log<B: Backend> {
    loss: B::Full,
    /// `(room, labels²)`
    counts: B::Counts,
    labels: usize,
    /// Images that the device has room for.
    room: usize,
    /// Images there.
    held: usize,
    /// Images before those.
    read: Evaluated,
}

impl<B: Backend> Log<B> {
    /// An empty log, for at least `images` at a time.
    pub fn new(backend: &B, labels: usize, images: usize) -> Self {
        let each = size_of::<f32>() + labels * labels * size_of::<u64>();
        Self::with_room(backend, labels, images.max(BYTES / each))
    }

    fn with_room(backend: &B, labels: usize, room: usize) -> Self {
        let (loss, counts) = (backend.full(room), backend.counts(room * labels * labels));
        Self { loss, counts, labels, room, held: 0, read: Evaluated::default() }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.held = 0;
        self.read = Evaluated::default();
    }

    /// Adds what `images` pictures left, no more than there is room for: their losses and `labels²` counts each.
    pub fn add(&mut self, backend: &B, images: usize, loss: &B::Full, counts: &B::Counts) {
        if self.held + images > self.room {
            self.read(backend);
        }
        backend.note(loss, counts, images, self.labels, self.held, &mut self.loss, &mut self.counts);
        self.held += images;
    }

    fn read(&mut self, backend: &B) {
        if self.held == 0 {
            return;
        }
        self.read.loss.extend(backend.scalars(&self.loss, self.held));
        self.read.counts.extend(backend.whole(&self.counts, self.held * self.labels * self.labels));
        self.held = 0;
    }

    /// Everything, in order; the log is empty after that.
    pub fn take(&mut self, backend: &B) -> Evaluated {
        self.read(backend);
        std::mem::take(&mut self.read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{Buffer, Cpu};

    #[test]
    fn more_than_there_is_room_for_is_read_in_between() {
        let cpu = Cpu::<f64>::new(Some(1)).expect("threads");
        let mut log = Log::with_room(&cpu, 2, 5);
        for round in 0..2 {
            let (mut losses, mut all) = (Vec::new(), Vec::new());
            for (batch, images) in [3, 2, 1, 4, 5, 2].into_iter().enumerate() {
                let loss: Buffer<f64> = (0..5).map(|i| (10 * batch + i + round) as f64).collect();
                let counts: Vec<u64> = (0..20).map(|i| (100 * batch + i) as u64).collect();
                log.add(&cpu, images, &loss, &counts);
                losses.extend(&loss[..images]);
                all.extend(&counts[..4 * images]);
            }
            let found = log.take(&cpu);
            assert_eq!((found.loss, found.counts), (losses, all));
        }
        log.add(&cpu, 1, &Buffer::from(&[1.0][..]), &vec![1; 4]);
        log.clear();
        assert!(log.take(&cpu).loss.is_empty());
    }
}
