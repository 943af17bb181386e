//! What the CUDA backend needs of a device.

use std::sync::Arc;

use crate::error::Kind;
use crate::{Error, Result};

/// Alignment of a block of device memory, and of the pieces of an arena, in bytes.
pub(super) const ALIGNMENT: usize = 256;

/// Memory, launches and products. Everything but [`Device::read`] may return before the work is done; work is done in the
/// order of the calls.
pub trait Device: Send + Sync {
    /// A block of device memory, freed when dropped.
    type Memory: Send + Sync;
    /// Work that was recorded.
    type Graph: Send;

    /// Memory of undefined content, aligned to 256 bytes.
    ///
    /// # Errors
    /// When there is not so much.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;

    /// Where a block starts.
    fn address(memory: &Self::Memory) -> u64;

    /// Copies from the host; `from` may change afterwards.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// `to` must lie in a living block that has `from.len()` bytes there.
    unsafe fn write(&self, from: &[u8], to: u64) -> Result<()>;

    /// Says that so many bytes will be copied from the host at a time, again and again, while work goes on.
    fn expect(&self, bytes: usize);

    /// Copies to the host, after all work before it.
    ///
    /// # Errors
    /// When the device fails, or failed at earlier work.
    ///
    /// # Safety
    /// `from` must lie in a living block that has `to.len()` bytes there.
    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()>;

    /// Fills with zeros.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// `at` must lie in a living block that has `bytes` bytes there.
    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()>;

    /// Launches a kernel without dynamic shared memory.
    ///
    /// # Errors
    /// When there is no such kernel, or the device fails.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and its pointers lie in living blocks with the documented shapes.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: usize,
        arguments: &[Argument],
    ) -> Result<()>;

    /// Multiplies matrices.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// The operands must lie in living blocks with the stated shapes; c must overlap neither a nor b, nor
    /// base unless it is c itself.
    unsafe fn product(&self, product: &MatrixProduct) -> Result<()>;

    /// Whether work may be recorded now.
    fn records(&self) -> bool;

    /// Records what `work` asks of this device on this thread, of which nothing is done. Asking it for memory or for copies
    /// meanwhile is an error; so is what the device cannot record.
    ///
    /// # Errors
    /// When the device cannot record.
    fn record(&self, work: &mut dyn FnMut()) -> Result<Self::Graph>;

    /// Does recorded work, on the numbers that memory holds now.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// All memory that the recorded work names must still live.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<()>;
}

/// What asking for memory or copies while recording is.
pub(super) fn while_recording(what: &str) -> Error {
    Error::new(
        Kind::Internal,
        format!("{what} while a step is being recorded: a defect in segpeft-native, please report it"),
    )
}

/// One device for several backends.
impl<D: Device> Device for Arc<D> {
    type Memory = D::Memory;
    type Graph = D::Graph;

    fn allocate(&self, bytes: usize) -> Result<Self::Memory> {
        (**self).allocate(bytes)
    }

    fn address(memory: &Self::Memory) -> u64 {
        D::address(memory)
    }

    unsafe fn write(&self, from: &[u8], to: u64) -> Result<()> {
        // SAFETY: the caller's, here and below.
        unsafe { (**self).write(from, to) }
    }

    fn expect(&self, bytes: usize) {
        (**self).expect(bytes);
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        unsafe { (**self).read(from, to) }
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        unsafe { (**self).clear(at, bytes) }
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        unsafe { (**self).launch(kernel, grid, threads, arguments) }
    }

    unsafe fn product(&self, product: &MatrixProduct) -> Result<()> {
        unsafe { (**self).product(product) }
    }

    fn records(&self) -> bool {
        (**self).records()
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<Self::Graph> {
        (**self).record(work)
    }

    unsafe fn replay(&self, graph: &Self::Graph) -> Result<()> {
        unsafe { (**self).replay(graph) }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// An address, or 0 for none, and the bytes of memory that the kernel must read and write there. Partial sums, tables and
    /// what else stays in the caches counts as nothing.
    Pointer {
        /// Where.
        address: u64,
        /// Bytes read.
        read: usize,
        /// Bytes written.
        written: usize,
    },
    /// `int`
    I32(i32),
    /// `unsigned`
    U32(u32),
    /// `unsigned long long`
    U64(u64),
    /// `float`
    F32(f32),
}

impl Argument {
    /// An address whose traffic does not count.
    pub fn pointer(address: u64) -> Self {
        Self::Pointer { address, read: 0, written: 0 }
    }

    /// The address of `n` partial sums that a kernel leaves for another.
    pub(super) fn partial(address: u64, n: usize) -> Self {
        Self::Pointer { address, read: 0, written: n * size_of::<f32>() }
    }

    /// The address of `n` partial sums that another kernel has left.
    pub(super) fn partial_read(address: u64, n: usize) -> Self {
        Self::Pointer { address, read: n * size_of::<f32>(), written: 0 }
    }

    /// Bytes that a kernel with these arguments must read and write.
    pub fn traffic(arguments: &[Self]) -> (usize, usize) {
        arguments.iter().fold((0, 0), |(all_read, all_written), argument| match argument {
            Self::Pointer { read, written, .. } => (all_read + read, all_written + written),
            _ => (all_read, all_written),
        })
    }
}

impl From<usize> for Argument {
    /// A size as an `int`; kernels take larger ones as [`Argument::U64`].
    fn from(x: usize) -> Self {
        match i32::try_from(x) {
            Ok(x) => Self::I32(x),
            Err(_) => panic!("a kernel takes sizes below 2^31, not {x}"),
        }
    }
}

impl From<bool> for Argument {
    fn from(x: bool) -> Self {
        Self::I32(x.into())
    }
}

impl From<f32> for Argument {
    fn from(x: f32) -> Self {
        Self::F32(x)
    }
}

/// Storage of a matrix's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Brain float, 2 bytes.
    Bf16,
    /// Single precision.
    F32,
}

impl Element {
    /// Bytes of a number.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// `c = op(a)·op(b) + bias + base`; a and b are bf16, all row-major and contiguous, summed in f32.
#[derive(Clone, Copy, Debug)]
pub struct MatrixProduct {
    /// Rows of c, columns of c, length of the sums.
    pub size: (usize, usize, usize),
    /// `(m, k)`, or `(k, m)` if transposed.
    pub a: u64,
    /// Whether a is read transposed.
    pub transpose_a: bool,
    /// `(k, n)`, or `(n, k)` if transposed.
    pub b: u64,
    /// Whether b is read transposed.
    pub transpose_b: bool,
    /// `(m, n)`
    pub c: u64,
    /// Storage of c.
    pub output: Element,
    /// `(m, n)`, stored as c is: what the product is added to, if anything; may be c itself.
    pub base: Option<u64>,
    /// bf16 `(n)`, added to every row.
    pub bias: Option<u64>,
}
