//! A device of the CUDA backend that is the CPU: the kernels compiled by the C++ compiler, memory poisoned, products by
//! plain loops.

use std::alloc::{Layout, alloc, dealloc};
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use host_kernels::{Order, Value};
use segpeft_native::backend::cuda::{Argument, Device, Element, MatrixProduct};
use segpeft_native::error::Kind;
use segpeft_native::{Error, Result};

/// The device, with the order in which threads take turns.
pub struct Host(pub Order);

/// A block of memory that starts as NaNs.
pub struct Block(*mut u8, Layout);

// SAFETY: the block is owned, and moves with its owner.
unsafe impl Send for Block {}
// SAFETY: access goes through the device's unsafe functions, whose callers order it.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated by Host::allocate with this layout.
        unsafe { dealloc(self.0, self.1) };
    }
}

fn failure(message: String) -> Error {
    Error::new(Kind::Device, message)
}

impl Device for Host {
    type Memory = Block;

    fn allocate(&self, bytes: usize) -> Result<Block> {
        let layout = Layout::from_size_align(bytes, 256).map_err(|e| failure(e.to_string()))?;
        assert!(bytes > 0, "nothing is asked for");
        // SAFETY: the layout is not empty; the block is filled before anyone reads it.
        unsafe {
            let start = alloc(layout);
            assert!(!start.is_null(), "no memory");
            start.write_bytes(0xff, bytes);
            Ok(Block(start, layout))
        }
    }

    fn address(memory: &Block) -> u64 {
        memory.0 as u64
    }

    unsafe fn write(&self, from: &[u8], to: u64) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
        Ok(())
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let values: Vec<Value> = arguments
            .iter()
            .map(|&argument| match argument {
                Argument::Pointer { address, .. } => Value::Pointer(address),
                Argument::I32(x) => Value::I32(x),
                Argument::U32(x) => Value::U32(x),
                Argument::U64(x) => Value::U64(x),
                Argument::F32(x) => Value::F32(x),
            })
            .collect();
        let grid = grid.map(|n| u32::try_from(n).expect("a grid"));
        // SAFETY: the caller's.
        unsafe { host_kernels::launch(kernel, grid, [threads as u32, 1, 1], 0, self.0, &values) }.map_err(failure)
    }

    unsafe fn product(&self, product: &MatrixProduct) -> Result<()> {
        let &MatrixProduct { size: (m, n, k), .. } = product;
        // SAFETY: the caller's, here and below.
        let a = unsafe { numbers(product.a, m * k, Element::Bf16) };
        let b = unsafe { numbers(product.b, k * n, Element::Bf16) };
        let bias = product.bias.map(|bias| unsafe { numbers(bias, n, Element::Bf16) });
        // Rows of b that are k apart become rows that are n apart, so that the inner loop runs along both b and c.
        let b = if product.transpose_b { transposed(&b, n, k) } else { b };
        let a = if product.transpose_a { transposed(&a, k, m) } else { a };
        let base = product.base.map(|base| unsafe { numbers(base, m * n, product.output) });
        let mut row = vec![0.0f32; n];
        for i in 0..m {
            row.fill(0.0);
            for p in 0..k {
                let factor = a[i * k + p];
                for (sum, b) in row.iter_mut().zip(&b[p * n..][..n]) {
                    *sum += factor * b;
                }
            }
            for (j, sum) in row.iter().enumerate() {
                let mut value = *sum;
                if let Some(bias) = &bias {
                    value += bias[j];
                }
                if let Some(base) = &base {
                    value += base[i * n + j];
                }
                let at = i * n + j;
                unsafe {
                    match product.output {
                        Element::F32 => *(product.c as *mut f32).add(at) = value,
                        Element::Bf16 => *(product.c as *mut bf16).add(at) = bf16::from_f32(value),
                    }
                }
            }
        }
        Ok(())
    }
}

/// The device, lost after so many launches: it then fails at everything, as a GPU does.
pub struct Lost {
    pub host: Host,
    pub launches: AtomicUsize,
}

impl Lost {
    fn there(&self) -> Result<()> {
        match self.launches.load(Ordering::Relaxed) {
            0 => Err(failure("the device is lost".into())),
            _ => Ok(()),
        }
    }
}

impl Device for Lost {
    type Memory = Block;

    fn allocate(&self, bytes: usize) -> Result<Block> {
        self.there()?;
        self.host.allocate(bytes)
    }

    fn address(memory: &Block) -> u64 {
        Host::address(memory)
    }

    unsafe fn write(&self, from: &[u8], to: u64) -> Result<()> {
        self.there()?;
        // SAFETY: the caller's, here and below.
        unsafe { self.host.write(from, to) }
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.there()?;
        // SAFETY: as above.
        unsafe { self.host.read(from, to) }
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        self.there()?;
        // SAFETY: as above.
        unsafe { self.host.clear(at, bytes) }
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        self.there()?;
        self.launches.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { self.host.launch(kernel, grid, threads, arguments) }
    }

    unsafe fn product(&self, product: &MatrixProduct) -> Result<()> {
        self.there()?;
        // SAFETY: as above.
        unsafe { self.host.product(product) }
    }
}

/// The `n` numbers at an address, widened.
///
/// # Safety
/// There must be as many.
unsafe fn numbers(at: u64, n: usize, element: Element) -> Vec<f32> {
    // SAFETY: the caller's.
    unsafe {
        match element {
            Element::F32 => slice::from_raw_parts(at as *const f32, n).to_vec(),
            Element::Bf16 => slice::from_raw_parts(at as *const bf16, n).iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// The transpose of x `(rows, columns)`.
fn transposed(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
}
