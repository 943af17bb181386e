//! One block of device memory from which everything a run needs is cut.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::device::ALIGNMENT;
use super::{Argument, Device, MatrixProduct};
use crate::error::Kind;
use crate::{Error, Result};

/// A device whose memory is one block, allocated at once, so that a run that starts has all the memory it will need. Pieces are
/// handed out one behind the other and are not taken back before the whole is dropped.
pub struct Arena<D: Device> {
    device: D,
    block: D::Memory,
    size: usize,
    used: AtomicUsize,
}

impl<D: Device> Arena<D> {
    /// An arena of `size` bytes, as [`super::Dry::bytes`] counted them.
    ///
    /// # Errors
    /// When the device has not so much.
    pub fn new(device: D, size: usize) -> Result<Self> {
        let block = device.allocate(size.max(ALIGNMENT))?;
        Ok(Self { device, block, size, used: AtomicUsize::new(0) })
    }

    /// The device below.
    pub fn device(&self) -> &D {
        &self.device
    }
}

impl<D: Device> Device for Arena<D> {
    /// Where a piece starts.
    type Memory = u64;
    type Graph = D::Graph;

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let size = bytes.next_multiple_of(ALIGNMENT);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(size).filter(|&after| after <= self.size)
        });
        match taken {
            Ok(start) => Ok(D::address(&self.block) + start as u64),
            Err(used) => Err(Error::new(
                Kind::Device,
                format!(
                    "{bytes} bytes are asked for beyond the plan ({used} of {} are used): a defect in segpeft-native, please \
                     report it; smaller batches may avoid it",
                    self.size
                ),
            )),
        }
    }

    fn address(memory: &u64) -> u64 {
        *memory
    }

    unsafe fn write(&self, from: &[u8], to: u64) -> Result<()> {
        // SAFETY: the caller's, here and below.
        unsafe { self.device.write(from, to) }
    }

    fn expect(&self, bytes: usize) {
        self.device.expect(bytes);
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.device.read(from, to) }
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.device.clear(at, bytes) }
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.device.launch(kernel, grid, threads, arguments) }
    }

    unsafe fn product(&self, product: &MatrixProduct) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.device.product(product) }
    }

    fn records(&self) -> bool {
        self.device.records()
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<D::Graph> {
        self.device.record(work)
    }

    unsafe fn replay(&self, graph: &D::Graph) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.device.replay(graph) }
    }
}
