//! A device that computes nothing: it counts. Over it, the real model tells how much memory a run needs and how many bytes
//! its steps move, on any machine and before a real device is touched.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::device::ALIGNMENT;
use super::{Argument, Device, Element, MatrixProduct};
use crate::Result;

/// What a kernel, or a kind of product, was asked to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Launches.
    pub calls: usize,
    /// Bytes read from memory, each operand counted once a launch.
    pub read: usize,
    /// Bytes written.
    pub written: usize,
    /// Multiply-adds of matrix products.
    pub multiply_adds: usize,
}

impl Work {
    /// Reads and writes.
    pub fn bytes(&self) -> usize {
        self.read + self.written
    }

    /// One launch of a kernel.
    pub(super) fn launch(arguments: &[Argument]) -> Self {
        let (read, written) = Argument::traffic(arguments);
        Self { calls: 1, read, written, multiply_adds: 0 }
    }

    /// One product.
    pub(super) fn product(product: &MatrixProduct) -> Self {
        let (m, n, k) = product.size;
        let written = m * n * product.output.size();
        let old = if product.base.is_some() { written } else { 0 };
        let read = (m * k + k * n) * Element::Bf16.size() + old;
        Self { calls: 1, read, written, multiply_adds: m * n * k }
    }

    /// Adds what was asked for elsewhere.
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.read += other.read;
        self.written += other.written;
        self.multiply_adds += other.multiply_adds;
    }
}

/// The device. What is read back from it is zero.
#[derive(Default)]
pub struct Dry {
    next: AtomicU64,
    ledger: Mutex<BTreeMap<String, Work>>,
}

impl Dry {
    /// Bytes handed out in all, each block rounded up to its alignment: what an [`super::Arena`] needs for the same work.
    pub fn bytes(&self) -> usize {
        self.next.load(Ordering::Relaxed) as usize
    }

    /// What was asked for since the last call, by kernel or kind of product.
    pub fn take_ledger(&self) -> BTreeMap<String, Work> {
        std::mem::take(&mut self.ledger.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn enter(&self, name: &str, work: &Work) {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.entry(name.into()).or_default().add(work);
    }
}

impl Device for Dry {
    /// An address nobody may follow.
    type Memory = u64;
    type Graph = ();

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let size = bytes.next_multiple_of(ALIGNMENT) as u64;
        // Nothing has address 0.
        Ok(ALIGNMENT as u64 + self.next.fetch_add(size, Ordering::Relaxed))
    }

    fn address(memory: &u64) -> u64 {
        *memory
    }

    unsafe fn write(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }

    fn expect(&self, _: usize) {}

    unsafe fn read(&self, _: u64, to: &mut [u8]) -> Result<()> {
        to.fill(0);
        Ok(())
    }

    unsafe fn clear(&self, _: u64, bytes: usize) -> Result<()> {
        self.enter("clear", &Work { calls: 1, written: bytes, ..Work::default() });
        Ok(())
    }

    unsafe fn launch(&self, kernel: &'static str, _: [usize; 3], _: usize, arguments: &[Argument]) -> Result<()> {
        self.enter(kernel, &Work::launch(arguments));
        Ok(())
    }

    unsafe fn product(&self, product: &MatrixProduct) -> Result<()> {
        self.enter("product", &Work::product(product));
        Ok(())
    }

    /// Repeated work is counted every time.
    fn records(&self) -> bool {
        false
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<()> {
        work();
        Ok(())
    }

    unsafe fn replay(&self, (): &()) -> Result<()> {
        Ok(())
    }
}
