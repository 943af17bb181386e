//! Pictures on their way to the kernels: kept on the device, or brought batch by batch.

use std::any::Any;

use super::{Argument, Cuda, Device};
use crate::Result;
use crate::backend::Sample;

/// A dataset that stays on a device: the pixels of all pictures, then their labels.
pub struct Pictures {
    /// Owns the memory.
    _memory: Box<dyn Any + Send + Sync>,
    address: u64,
    /// Where each picture's pixels and labels lie on the host, by which a sample is known again.
    hosts: Vec<[usize; 2]>,
    size: usize,
}

/// What of the samples a kernel reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// `(size, size, 3)`
    Pixels,
    /// `(size, size)`
    Labels,
}

impl Part {
    fn len(self, size: usize) -> usize {
        size * size * if self == Self::Pixels { 3 } else { 1 }
    }

    fn of<'a>(self, sample: &Sample<'a>) -> &'a [u8] {
        if self == Self::Pixels { sample.pixels } else { sample.labels }
    }
}

impl Pictures {
    /// Bytes that `images` pictures of `size`² take.
    pub fn bytes(images: usize, size: usize) -> usize {
        images * (Part::Pixels.len(size) + Part::Labels.len(size))
    }

    /// Copies `samples`, which must be numbered by their positions, to the device.
    ///
    /// # Errors
    /// When it has no room for them, or fails.
    ///
    /// # Panics
    /// If a sample has another size.
    pub fn new<D: Device<Memory: 'static>>(device: &D, samples: &[Sample<'_>], size: usize) -> Result<Self> {
        let memory = device.allocate(Self::bytes(samples.len(), size).max(1))?;
        let address_on_device = D::address(&memory);
        let mut at = address_on_device;
        for part in [Part::Pixels, Part::Labels] {
            for sample in samples {
                let bytes = part.of(sample);
                assert_eq!(bytes.len(), part.len(size), "a picture of another size");
                // SAFETY: the block holds both parts of all samples.
                unsafe { device.write(bytes, at)? };
                at += bytes.len() as u64;
            }
        }
        let address = |bytes: &[u8]| bytes.as_ptr() as usize;
        let hosts = samples.iter().map(|s| [address(s.pixels), address(s.labels)]).collect();
        Ok(Self { _memory: Box::new(memory), address: address_on_device, hosts, size })
    }

    /// Where the part of the first picture lies, if all `samples` are here.
    fn find(&self, samples: &[Sample<'_>], size: usize, part: Part) -> Option<u64> {
        let host = usize::from(part == Part::Labels);
        let here =
            |s: &Sample<'_>| self.hosts.get(s.index).is_some_and(|hosts| hosts[host] == part.of(s).as_ptr() as usize);
        let start = if part == Part::Pixels { 0 } else { self.hosts.len() * Part::Pixels.len(size) };
        (self.size == size && samples.iter().all(here)).then(|| self.address + start as u64)
    }
}

impl<D: Device> Cuda<D> {
    /// A part of the samples as arguments: where pictures lie, one behind the other, and `(images)` the position of each
    /// sample among them as `int`; then `more`, copied to the device. Room is shared: the next call ends their lives.
    pub(super) fn stage_samples(
        &self,
        samples: &[Sample<'_>],
        size: usize,
        part: Part,
        more: &[&[u8]],
    ) -> (Argument, Argument, Vec<Argument>) {
        let kept = self.pictures().and_then(|pictures| pictures.find(samples, size, part));
        let position = |(i, sample): (usize, &Sample<'_>)| if kept.is_some() { sample.index as i32 } else { i as i32 };
        let positions: Vec<i32> = samples.iter().enumerate().map(position).collect();
        let mut parts: Vec<&[u8]> = vec![bytemuck::cast_slice(&positions)];
        parts.extend(more);
        if kept.is_none() {
            parts.extend(samples.iter().map(|s| &part.of(s)[..part.len(size)]));
        }
        let staged = self.stage(&parts);
        let address = kept.unwrap_or_else(|| staged[1 + more.len()]);
        let pictures = Argument::Pointer { address, read: samples.len() * part.len(size), written: 0 };
        let rest = staged[1..=more.len()].iter().map(|&at| Argument::pointer(at)).collect();
        (pictures, Argument::pointer(staged[0]), rest)
    }
}
