//! A device of the CUDA backend that is the CPU: the kernels compiled by the C++ compiler, memory poisoned, products by
//! plain loops.

use std::alloc::{Layout, alloc, dealloc};
use std::slice;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use host_kernels::{Order, Value};
use segpeft_native::backend::cuda::{Argument, Device, Element, MatrixProduct};
use segpeft_native::error::Kind;
use segpeft_native::{Error, Result};

/// The device.
pub struct Host {
    /// The order in which threads take turns.
    order: Order,
    /// What was asked for since recording began, if it is recording.
    recording: Mutex<Option<Vec<Call>>>,
    /// After how many calls it refuses to record, as an old driver may; with 0 it does not begin.
    refuses: Option<usize>,
    /// How often work was recorded.
    pub recordings: AtomicUsize,
    /// How often recordings were replayed.
    pub replays: AtomicUsize,
}

/// Something asked for.
#[derive(Clone)]
pub enum Call {
    Clear(u64, usize),
    Launch(&'static str, [usize; 3], usize, Vec<Argument>),
    Product(MatrixProduct),
}

impl Host {
    pub fn new(order: Order) -> Self {
        let [recordings, replays] = [0, 0].map(AtomicUsize::new);
        Self { order, recording: Mutex::new(None), refuses: None, recordings, replays }
    }

    /// A device that cannot record more than so many calls.
    pub fn refusing(order: Order, after: usize) -> Self {
        Self { refuses: Some(after), ..Self::new(order) }
    }

    /// Records a call, or does it.
    unsafe fn call(&self, call: Call) -> Result<()> {
        if let Some(recording) = &mut *self.recording.lock().expect("no panic") {
            if self.refuses == Some(recording.len()) {
                return Err(failure("cannot record".into()));
            }
            recording.push(call);
            return Ok(());
        }
        // SAFETY: the caller's.
        unsafe { self.run(&call) }
    }

    /// Does what was asked for.
    unsafe fn run(&self, call: &Call) -> Result<()> {
        // SAFETY: the caller's.
        unsafe {
            match call {
                Call::Clear(at, bytes) => (*at as *mut u8).write_bytes(0, *bytes),
                Call::Launch(kernel, grid, threads, arguments) => {
                    launch(self.order, kernel, *grid, *threads, arguments)?
                }
                Call::Product(product) => multiply(product),
            }
        }
        Ok(())
    }

    /// Refuses what no device records.
    fn not_recording(&self) -> Result<()> {
        match &*self.recording.lock().expect("no panic") {
            None => Ok(()),
            Some(_) => Err(Error::new(Kind::Internal, "memory or a copy while recording")),
        }
    }
}

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
    type Graph = Vec<Call>;

    fn allocate(&self, bytes: usize) -> Result<Block> {
        self.not_recording()?;
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
        self.not_recording()?;
        // SAFETY: the caller's.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    fn expect(&self, _: usize) {}

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.not_recording()?;
        // SAFETY: the caller's.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
        Ok(())
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's, here and below.
        unsafe { self.call(Call::Clear(at, bytes)) }
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.call(Call::Launch(kernel, grid, threads, arguments.to_vec())) }
    }

    unsafe fn product(&self, product: &MatrixProduct) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.call(Call::Product(*product)) }
    }

    fn records(&self) -> bool {
        true
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<Vec<Call>> {
        if self.refuses == Some(0) {
            return Err(failure("cannot record".into()));
        }
        self.recordings.fetch_add(1, Ordering::Relaxed);
        *self.recording.lock().expect("no panic") = Some(Vec::new());
        work();
        Ok(self.recording.lock().expect("no panic").take().expect("it records"))
    }

    unsafe fn replay(&self, graph: &Vec<Call>) -> Result<()> {
        self.replays.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        graph.iter().try_for_each(|call| unsafe { self.run(call) })
    }
}

/// Runs a kernel.
///
/// # Safety
/// As [`Device::launch`].
unsafe fn launch(order: Order, kernel: &str, grid: [usize; 3], threads: usize, arguments: &[Argument]) -> Result<()> {
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
    unsafe { host_kernels::launch(kernel, grid, [threads as u32, 1, 1], 0, order, &values) }.map_err(failure)
}

/// Multiplies matrices.
///
/// # Safety
/// As [`Device::product`].
unsafe fn multiply(product: &MatrixProduct) {
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
    type Graph = Vec<Call>;

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

    fn expect(&self, bytes: usize) {
        self.host.expect(bytes);
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

    fn records(&self) -> bool {
        self.host.records()
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<Vec<Call>> {
        self.there()?;
        self.host.record(work)
    }

    unsafe fn replay(&self, graph: &Vec<Call>) -> Result<()> {
        // SAFETY: as above.
        graph.iter().try_for_each(|call| unsafe {
            match call {
                Call::Clear(at, bytes) => self.clear(*at, *bytes),
                Call::Launch(kernel, grid, threads, arguments) => self.launch(kernel, *grid, *threads, arguments),
                Call::Product(product) => self.product(product),
            }
        })
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
