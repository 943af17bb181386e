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
    Pixels = 0,
    /// `(size, size)`
    Labels = 1,
}

impl Part {
    /// Bytes of a picture's.
    pub fn len(self, size: usize) -> usize {
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

    /// Where the pixels and the labels of the first picture lie, if these parts of all `samples` are here.
    fn find(&self, samples: &[Sample<'_>], size: usize, parts: &[Part]) -> Option<[u64; 2]> {
        let here = |s: &Sample<'_>| {
            let same = |hosts: &[usize; 2], part: &Part| hosts[*part as usize] == part.of(s).as_ptr() as usize;
            self.hosts.get(s.index).is_some_and(|hosts| parts.iter().all(|part| same(hosts, part)))
        };
        let labels = self.address + (self.hosts.len() * Part::Pixels.len(size)) as u64;
        (self.size == size && samples.iter().all(here)).then_some([self.address, labels])
    }
}

/// Where inputs lie on the device; 0 for none.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Addresses {
    /// `unsigned`, the step of the random numbers.
    pub step: u64,
    /// f32 `(3)`, what changes from update to update.
    pub rates: u64,
    /// int `(images)`, the position of each sample among the pictures.
    pub positions: u64,
    /// u8 `(images)`, whether it is mirrored.
    pub flips: u64,
    /// u8 `(images, 256)`, its augmented levels.
    pub levels: u64,
    /// Pixels and labels of the pictures, one behind the other.
    pictures: [u64; 2],
}

impl Addresses {
    /// Where a part of the first picture lies.
    pub fn part(&self, part: Part) -> u64 {
        self.pictures[part as usize]
    }

    /// A part of `images` pictures as an argument.
    pub fn argument(&self, part: Part, images: usize, size: usize) -> Argument {
        Argument::Pointer { address: self.part(part), read: images * part.len(size), written: 0 }
    }
}

impl<D: Device> Cuda<D> {
    /// Copies inputs to the device: numbers, and of the samples what is not there yet of `parts`. Room is shared: the next
    /// call ends their lives.
    pub(super) fn bring(
        &self,
        step: u32,
        rates: [f32; 3],
        samples: &[Sample<'_>],
        size: usize,
        parts: &[Part],
    ) -> Addresses {
        let kept = self.pictures().and_then(|pictures| pictures.find(samples, size, parts));
        let position = |(i, sample): (usize, &Sample<'_>)| if kept.is_some() { sample.index as i32 } else { i as i32 };
        let mut small: Vec<u8> = bytemuck::bytes_of(&step).to_vec();
        let mut put = |bytes: &[u8]| {
            let at = small.len() as u64;
            small.extend(bytes);
            at
        };
        let rates = put(bytemuck::cast_slice(&rates));
        let positions = put(bytemuck::cast_slice(&samples.iter().enumerate().map(position).collect::<Vec<i32>>()));
        let flips = put(&samples.iter().map(|s| s.augment.flip.into()).collect::<Vec<u8>>());
        let levels = put(samples.iter().map(|s| s.augment.table()).collect::<Vec<_>>().as_flattened());
        // Kernels read pixels four bytes at a time.
        small.resize(small.len().next_multiple_of(16), 0);
        let mut all: Vec<&[u8]> = vec![&small];
        let mut pictures = [0; 2];
        let mut behind = small.len() as u64;
        for part in parts.iter().filter(|_| kept.is_none()) {
            pictures[*part as usize] = behind;
            behind += (samples.len() * part.len(size)) as u64;
            all.extend(samples.iter().map(|s| &part.of(s)[..part.len(size)]));
        }
        if all.len() > 1 {
            self.device().expect(behind as usize);
        }
        let start = self.stage(&all);
        Addresses {
            step: start,
            rates: start + rates,
            positions: start + positions,
            flips: start + flips,
            levels: start + levels,
            pictures: kept.unwrap_or(pictures.map(|at| if at == 0 { 0 } else { start + at })),
        }
    }
}
