//! Pictures on their way to the kernels: kept on the device, or brought batch by batch.

use std::any::Any;

use super::{Argument, Cuda, Device};
use crate::Result;
use crate::backend::{Batch, Sample};

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

    /// Where the pixels and the labels of the first picture lie, if these parts of all samples are here.
    fn find(&self, batches: &[Batch<'_>], size: usize, parts: &[Part]) -> Option<[u64; 2]> {
        let here = |s: &Sample<'_>| {
            let same = |hosts: &[usize; 2], part: &Part| hosts[*part as usize] == part.of(s).as_ptr() as usize;
            self.hosts.get(s.index).is_some_and(|hosts| parts.iter().all(|part| same(hosts, part)))
        };
        let labels = self.address + (self.hosts.len() * Part::Pixels.len(size)) as u64;
        let samples = batches.iter().flat_map(|batch| batch.samples);
        (self.size == size && samples.into_iter().all(here)).then_some([self.address, labels])
    }
}

/// Where what belongs to a batch lies on the device; 0 for none.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Addresses {
    /// `unsigned`, the step of the random numbers.
    pub step: u64,
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

/// Where inputs lie on the device.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Brought {
    /// f32 `(3)`, what changes from update to update.
    pub rates: u64,
    /// What belongs to each batch.
    pub batches: Vec<Addresses>,
}

/// What of a batch lies at a multiple of this: numbers of four bytes, and pixels, which kernels read by fours.
const ALIGNED: usize = 16;

/// Bytes that [`Cuda::bring`] copies for `batches` of pictures of `size`²: of the pictures `parts`.
pub(super) fn bytes_to_bring(batches: &[Batch<'_>], size: usize, parts: &[Part]) -> usize {
    let numbers = |bytes: usize, batch: &Batch<'_>| {
        bytes.next_multiple_of(ALIGNED) + size_of::<u32>() + batch.samples.len() * (size_of::<i32>() + 1 + 256)
    };
    let pictures = |bytes: usize, batch: &Batch<'_>| {
        bytes.next_multiple_of(ALIGNED) + batch.samples.len() * parts.iter().map(|part| part.len(size)).sum::<usize>()
    };
    let bytes = batches.iter().fold(size_of::<[f32; 3]>(), numbers);
    if parts.is_empty() { bytes } else { batches.iter().fold(bytes, pictures) }
}

impl<D: Device> Cuda<D> {
    /// Where the pictures of `batches` lie, if `parts` of all of them stay on the device.
    fn kept(&self, batches: &[Batch<'_>], size: usize, parts: &[Part]) -> Option<[u64; 2]> {
        self.pictures().and_then(|pictures| pictures.find(batches, size, parts))
    }

    /// What of the `parts` of `batches` must be copied to the device: nothing if they are there.
    pub(super) fn missing<'a>(&self, batches: &[Batch<'_>], size: usize, parts: &'a [Part]) -> &'a [Part] {
        if self.kept(batches, size, parts).is_some() { &[] } else { parts }
    }

    /// Copies inputs to the device: numbers, and of the samples what is not there yet of `parts`. Room is shared: the next
    /// call ends their lives.
    pub(super) fn bring(&self, rates: [f32; 3], batches: &[Batch<'_>], size: usize, parts: &[Part]) -> Brought {
        let kept = self.kept(batches, size, parts);
        let mut small: Vec<u8> = bytemuck::cast_slice(&rates).to_vec();
        let mut numbers = |Batch { samples, step }: &Batch<'_>| {
            small.resize(small.len().next_multiple_of(ALIGNED), 0);
            let mut put = |bytes: &[u8]| {
                small.extend(bytes);
                (small.len() - bytes.len()) as u64
            };
            let position = |(i, s): (usize, &Sample<'_>)| if kept.is_some() { s.index as i32 } else { i as i32 };
            Addresses {
                step: put(bytemuck::bytes_of(step)),
                positions: put(bytemuck::cast_slice(&samples.iter().enumerate().map(position).collect::<Vec<_>>())),
                flips: put(&samples.iter().map(|s| s.augment.flip.into()).collect::<Vec<u8>>()),
                levels: put(samples.iter().map(|s| s.augment.table()).collect::<Vec<_>>().as_flattened()),
                pictures: kept.unwrap_or_default(),
            }
        };
        let mut at: Vec<Addresses> = batches.iter().map(&mut numbers).collect();
        let (mut all, mut bytes): (Vec<&[u8]>, _) = (vec![&small], small.len());
        let parts = if kept.is_some() { &[] } else { parts };
        for (batch, at) in batches.iter().zip(&mut at).filter(|_| !parts.is_empty()) {
            let padding = &[0; ALIGNED][..bytes.next_multiple_of(ALIGNED) - bytes];
            all.push(padding);
            bytes += padding.len();
            for &part in parts {
                at.pictures[part as usize] = bytes as u64;
                all.extend(batch.samples.iter().map(|s| &part.of(s)[..part.len(size)]));
                bytes += batch.samples.len() * part.len(size);
            }
        }
        debug_assert_eq!(bytes, bytes_to_bring(batches, size, parts));
        self.device().expect(bytes);
        let start = self.stage(&all);
        let moved = |at: u64| if at == 0 { 0 } else { start + at };
        for at in &mut at {
            at.step += start;
            at.positions += start;
            at.flips += start;
            at.levels += start;
            at.pictures = kept.unwrap_or(at.pictures.map(moved));
        }
        Brought { rates: start, batches: at }
    }
}
