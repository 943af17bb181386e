//! A GPU through the CUDA driver and cuBLASLt, both opened at run time.
//!
//! cuBLASLt is called through cudarc's raw bindings: the crate named `cublas-sys` binds CUDA 7.5, which knows neither bf16
//! nor cuBLASLt, and links at build time.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use cudarc::cublaslt::{result as blas, sys as lt};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result as cuda, sys};

use super::device::while_recording;
use super::ring::{Ring, Side};
use super::{Argument, Device, Element, MatrixProduct, Work};
use crate::error::Kind;
use crate::progress::byte_size;
use crate::{Error, Result};

/// The kernels as build.rs compiled them; none in a build without nvcc.
#[cfg(cuda_kernels)]
const KERNELS: Option<&[u8]> = Some(include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));
/// The kernels as build.rs compiled them; none in a build without nvcc.
#[cfg(not(cuda_kernels))]
const KERNELS: Option<&[u8]> = None;

/// Oldest compute capability with bf16 tensor cores and asynchronous copies.
const OLDEST_GPU: (i32, i32) = (8, 0);
/// Oldest cuBLASLt, as it numbers itself: 12.0.
const OLDEST_BLAS: usize = 120_000;
/// Bytes that products may use; the size NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// One GPU.
pub struct Driver {
    ordinal: usize,
    // Dropped before the stream and the context they belong to.
    ring: Mutex<Ring<Self>>,
    /// The ends of graphs that were launched, the oldest first.
    ahead: Mutex<VecDeque<Event>>,
    profile: Mutex<Option<Vec<Timed>>>,
    records: AtomicBool,
    products: Mutex<Products>,
    workspace: DeviceMemory,
    functions: Mutex<HashMap<&'static str, Function>>,
    module: Module,
    line: Arc<Line>,
    context: Arc<CudaContext>,
    name: String,
}

/// The one stream of a GPU, on which its work stands in line.
struct Line {
    stream: Arc<CudaStream>,
    /// The thread whose work is being recorded. What another asked for meanwhile would be recorded with it, so it waits.
    recording: Mutex<Option<ThreadId>>,
    recorded: Condvar,
}

impl Line {
    /// Waits until no other thread records; whether this one does.
    fn turn(&self) -> Turn<'_> {
        let mut turn = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        while turn.is_some_and(|thread| thread != std::thread::current().id()) {
            turn = self.recorded.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(turn)
    }
}

/// The right to ask for work. No other thread begins to record while it lives.
struct Turn<'a>(MutexGuard<'a, Option<ThreadId>>);

impl Turn<'_> {
    /// Whether this thread records.
    fn records(&self) -> bool {
        self.0.is_some()
    }

    /// Refuses `what` while this thread records.
    fn refuse(&self, what: &str) -> Result<()> {
        if self.records() { Err(while_recording(what)) } else { Ok(()) }
    }
}

/// Recorded work, ready to be launched.
pub struct Graph {
    graph: sys::CUgraphExec,
    line: Arc<Line>,
}

// SAFETY: a handle of the driver, used by one thread at a time, as there is no other copy and it is not Sync.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let _turn = self.line.turn();
        // A device that has failed cannot free, and need not.
        let _ = self.line.stream.context().bind_to_thread();
        // SAFETY: made by `record`, destroyed once; where it still runs, the driver lets it end.
        let _ = unsafe { cuda::graph::exec_destroy(self.graph) };
    }
}

/// A recording under way. Dropped, it ends.
struct Recording<'a>(&'a Line);

impl Recording<'_> {
    fn begin(line: &Line) -> std::result::Result<Recording<'_>, DriverError> {
        let mut turn = line.turn();
        // Other threads may do with their GPUs what they like; what cannot be recorded is refused to this one alone.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { cuda::stream::begin_capture(line.stream.cu_stream(), mode)? };
        *turn.0 = Some(std::thread::current().id());
        Ok(Recording(line))
    }

    /// What was recorded, to be destroyed by the caller.
    fn end(self) -> std::result::Result<sys::CUgraph, DriverError> {
        let line = self.0;
        std::mem::forget(self);
        Self::stop(line)
    }

    fn stop(line: &Line) -> std::result::Result<sys::CUgraph, DriverError> {
        let mut turn = line.turn();
        // SAFETY: begun on this stream, by this thread.
        let graph = unsafe { cuda::stream::end_capture(line.stream.cu_stream()) };
        *turn.0 = None;
        line.recorded.notify_all();
        graph
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Ok(graph) = Self::stop(self.0) {
            // SAFETY: made by the driver, and not handed on.
            let _ = unsafe { cuda::graph::destroy(graph) };
        }
    }
}

/// Graphs, at most whole steps, that wait for the device: the host need not be further ahead, and can still be interrupted.
const AHEAD: usize = 4;

/// Page-locked host memory.
pub(super) struct Pinned(*mut u8, usize);

// SAFETY: memory that belongs to its owner.
unsafe impl Send for Pinned {}

impl AsMut<[u8]> for Pinned {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with so many bytes, zeroed, and borrowed as this is.
        unsafe { std::slice::from_raw_parts_mut(self.0, self.1) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `lock_memory`, and freed once, with the driver, when nothing runs any more.
        let _ = unsafe { cuda::free_host(self.0.cast()) };
    }
}

/// A piece of work between two events.
struct Timed {
    name: String,
    work: Work,
    begin: Event,
    end: Event,
}

pub(super) struct Event(sys::CUevent);

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `mark`, destroyed once; the driver lets what waits for it go on.
        let _ = unsafe { cuda::event::destroy(self.0) };
    }
}

/// Flags of an event that tells no time, and for which a thread sleeps.
const WAITED_FOR: u32 =
    sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32 | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;

// SAFETY: a handle of the driver, as below.
unsafe impl Send for Event {}

/// Time spent in one kernel at one size, or in one kind of product.
#[derive(Clone, Debug)]
pub struct Spent {
    /// Kernel and grid, or product and sizes.
    pub name: String,
    /// What was done.
    pub work: Work,
    /// Seconds in all.
    pub seconds: f64,
}

/// Memory on a GPU.
pub struct DeviceMemory {
    address: u64,
    line: Arc<Line>,
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _turn = self.line.turn();
        // A device that has failed cannot free, and need not: errors say nothing new here.
        let _ = self.line.stream.context().bind_to_thread();
        let _ = self.line.stream.synchronize();
        // SAFETY: allocated by Driver::allocate, and freed once; no work on it is left.
        let _ = unsafe { cuda::free_sync(self.address) };
    }
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);
struct Module(sys::CUmodule);

// SAFETY: handles of the driver, which serves any thread that has the context bound.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A GPU in words.
#[derive(Clone, Debug)]
pub struct Description {
    /// As the vendor calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory, free and in all.
    pub memory: (usize, usize),
    /// Version of cuBLASLt, as it numbers itself.
    pub cublas: usize,
}

fn device_error(message: impl Into<String>) -> Error {
    Error::new(Kind::Device, message)
}

/// Why there is no GPU of this number among `count`, if there is none.
fn missing(ordinal: usize, count: i32) -> Option<String> {
    match usize::try_from(count).unwrap_or(0) {
        0 => Some("the NVIDIA driver finds no GPU: use --device cpu".into()),
        count if ordinal < count => None,
        1 => Some(format!("there is no GPU {ordinal}: one is there; use --device cuda:0")),
        count => Some(format!("there is no GPU {ordinal}: use --device cuda:0 to cuda:{}", count - 1)),
    }
}

/// What it means that a GPU of this compute capability did not take the kernels.
fn refused((major, minor): (i32, i32), code: sys::CUresult) -> String {
    use sys::CUresult as Code;
    let why = match code {
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU => format!(
            "this build holds no code for its compute capability {major}.{minor}: add it to ARCHITECTURES in build.rs and build \
             again, or use --device cpu"
        ),
        Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | Code::CUDA_ERROR_INVALID_IMAGE | Code::CUDA_ERROR_INVALID_PTX => {
            "its driver is too old for the kernels: install driver 580 or newer, or build with the CUDA of this one"
                .into()
        }
        Code::CUDA_ERROR_JIT_COMPILER_NOT_FOUND | Code::CUDA_ERROR_JIT_COMPILATION_DISABLED => format!(
            "this build holds code for its compute capability {major}.{minor} as PTX alone, which the driver does not compile \
             here: add it to ARCHITECTURES in build.rs and build again, or let the driver (CUDA_DISABLE_PTX_JIT)"
        ),
        Code::CUDA_ERROR_OUT_OF_MEMORY => {
            "has no memory free for the kernels: end other programs on it, or use another".into()
        }
        _ => "does not load the kernels: see whether nvidia-smi finds it in order, or use --device cpu".into(),
    };
    format!("{why} ({code:?})")
}

impl Driver {
    /// Opens GPU number `ordinal`, with everything the backend needs.
    ///
    /// # Errors
    /// What is missing, with its remedy: kernels in this build, the driver, the GPU, cuBLASLt, or one too old.
    pub fn open(ordinal: usize) -> Result<Self> {
        Self::open_with(KERNELS, ordinal)
    }

    fn open_with(kernels: Option<&[u8]>, ordinal: usize) -> Result<Self> {
        let Some(image) = kernels else {
            return Err(device_error(
                "this build has no CUDA kernels: run tools/get-nvcc.sh and build again, or use --device cpu",
            ));
        };
        // SAFETY: these open libraries and look for symbols.
        let (has_driver, has_blas) = unsafe { (sys::is_culib_present(), lt::is_culib_present()) };
        if !has_driver {
            return Err(device_error("no NVIDIA driver (libcuda) here: install it, or use --device cpu"));
        }
        if !has_blas {
            return Err(device_error(
                "no cuBLASLt (libcublasLt.so) here: install CUDA 13 or the nvidia-cublas wheel, and name its folder in \
                 LD_LIBRARY_PATH",
            ));
        }
        // SAFETY: the library is there.
        let version = unsafe { lt::cublasLtGetVersion() };
        if version < OLDEST_BLAS {
            return Err(device_error(format!(
                "cuBLASLt {version} is too old, 12.0 is needed: install CUDA 13, and name its folder in LD_LIBRARY_PATH"
            )));
        }
        let count = CudaContext::device_count()
            .map_err(|e| device_error(format!("the NVIDIA driver finds no GPU ({e}): use --device cpu")))?;
        if let Some(problem) = missing(ordinal, count) {
            return Err(device_error(problem));
        }
        let failed = |what: &str| {
            let what = what.to_string();
            move |e: DriverError| device_error(format!("GPU {ordinal}: {what}: {e}"))
        };
        let context = CudaContext::new(ordinal).map_err(failed("cannot be opened"))?;
        let capability = context.compute_capability().map_err(failed("does not say what it is"))?;
        if capability < OLDEST_GPU {
            return Err(device_error(format!(
                "GPU {ordinal} has compute capability {}.{}, 8.0 (Ampere) is needed: use --device cpu",
                capability.0, capability.1
            )));
        }
        let stream = context.new_stream().map_err(failed("has no room for a stream"))?;
        // SAFETY: the image is a fatbin that nvcc made.
        let module = unsafe { cuda::module::load_data(image.as_ptr().cast()) }
            .map(Module)
            .map_err(|e| device_error(format!("GPU {ordinal}: {}", refused(capability, e.0))))?;
        let products = Products::new().map_err(|e| device_error(format!("GPU {ordinal}: cuBLASLt: {e}")))?;
        let line = Arc::new(Line { stream, recording: Mutex::new(None), recorded: Condvar::new() });
        let workspace = allocate(&line, ordinal, WORKSPACE)?;
        let name = context.name().map_err(failed("does not say what it is"))?;
        Ok(Self {
            ordinal,
            ring: Mutex::new(Ring::new()),
            ahead: Mutex::default(),
            profile: Mutex::default(),
            records: AtomicBool::new(true),
            products: Mutex::new(products),
            workspace,
            functions: Mutex::default(),
            module,
            line,
            context,
            name,
        })
    }

    /// Says whether repeated work is recorded from now on, as it is if nothing is said.
    pub fn record_steps(&self, records: bool) {
        self.records.store(records, Ordering::Relaxed);
    }

    /// Times every piece of work from now on.
    pub fn start_profile(&self) {
        *self.profile.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    /// What was spent on what since [`Driver::start_profile`], the largest first.
    ///
    /// # Errors
    /// When the device fails.
    pub fn end_profile(&self) -> Result<Vec<Spent>> {
        let _turn = self.line.turn();
        let timed = self.profile.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        self.bind()?;
        self.line.stream.synchronize().map_err(|e| self.failed("failed at its work", e))?;
        let mut spent: HashMap<String, Spent> = HashMap::new();
        for Timed { name, work, begin, end } in timed {
            // SAFETY: both events were recorded.
            let milliseconds =
                unsafe { cuda::event::elapsed(begin.0, end.0) }.map_err(|e| self.failed("cannot tell the time", e))?;
            let entry = spent.entry(name.clone()).or_insert(Spent { name, work: Work::default(), seconds: 0.0 });
            entry.work.add(&work);
            entry.seconds += f64::from(milliseconds) / 1e3;
        }
        let mut spent: Vec<Spent> = spent.into_values().collect();
        spent.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(spent)
    }

    /// Calls `run`, between events if a profile is being taken. What is recorded takes no time yet, and its events would tell none.
    fn timed(
        &self,
        turn: &Turn<'_>,
        describe: impl FnOnce() -> (String, Work),
        run: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut profile = self.profile.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(profile) = profile.as_mut().filter(|_| !turn.records()) else { return run() };
        let mark = || self.event(sys::CUevent_flags::CU_EVENT_DEFAULT as u32);
        let begin = mark()?;
        run()?;
        let end = mark()?;
        let (name, work) = describe();
        profile.push(Timed { name, work, begin, end });
        Ok(())
    }

    /// An event behind all work so far.
    fn event(&self, flags: u32) -> Result<Event> {
        let mut event = ptr::null_mut();
        // SAFETY: the context is bound.
        unsafe { sys::cuEventCreate(&mut event, flags) }
            .result()
            .map_err(|e| self.failed("has no room for an event", e))?;
        let event = Event(event);
        // SAFETY: the event has just been made; the stream lives as long as the device.
        unsafe { cuda::event::record(event.0, self.stream()) }.map_err(|e| self.failed("cannot mark its work", e))?;
        Ok(event)
    }

    fn stream(&self) -> sys::CUstream {
        self.line.stream.cu_stream()
    }

    /// The GPU's name, as the vendor calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of memory that are free.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn free_memory(&self) -> Result<usize> {
        self.bind()?;
        Ok(self.context.mem_get_info().map_err(|e| self.failed("does not say what is free", e))?.0)
    }

    /// What this GPU is.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn describe(&self) -> Result<Description> {
        let failed = |e| self.failed("does not say what it is", e);
        Ok(Description {
            name: self.name.clone(),
            capability: self.context.compute_capability().map_err(failed)?,
            memory: self.context.mem_get_info().map_err(failed)?,
            // SAFETY: the library was there when the device was opened.
            cublas: unsafe { lt::cublasLtGetVersion() },
        })
    }

    fn failed(&self, what: &str, error: DriverError) -> Error {
        device_error(format!("GPU {}: {what}: {error}", self.ordinal))
    }

    /// Makes the context that of the calling thread.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.failed("is lost", e))
    }

    fn function(&self, kernel: &'static str) -> Result<Function> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(kernel) {
            return Ok(*function);
        }
        let name = CString::new(kernel).map_err(|e| device_error(e.to_string()))?;
        // SAFETY: the module is loaded and lives as long as the device.
        let function = unsafe { cuda::module::get_function(self.module.0, name) }
            .map_err(|e| self.failed(&format!("kernel {kernel}"), e))?;
        functions.insert(kernel, Function(function));
        Ok(Function(function))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        let _ = self.line.stream.synchronize();
        // SAFETY: loaded once by `open`; nothing runs any more.
        let _ = unsafe { cuda::module::unload(self.module.0) };
    }
}

impl Side for Driver {
    type Room = Pinned;
    type Mark = Event;

    fn lock_memory(&self, bytes: usize) -> Result<Pinned> {
        // SAFETY: the context is bound; Pinned owns what comes back, and holds numbers from the start.
        unsafe {
            let start = cuda::malloc_host(bytes, 0).map_err(|e| self.failed("has no room for copies", e))?;
            start.cast::<u8>().write_bytes(0, bytes);
            Ok(Pinned(start.cast(), bytes))
        }
    }

    unsafe fn copy(&self, from: &[u8], to: u64) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { cuda::memcpy_htod_async(to, from, self.stream()) }.map_err(|e| self.failed("cannot copy to it", e))
    }

    fn mark(&self) -> Result<Event> {
        self.event(WAITED_FOR)
    }

    fn is_done(&self, mark: &Event) -> Result<bool> {
        // SAFETY: the event was recorded.
        match unsafe { cuda::event::query(mark.0) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(e) => Err(self.failed("failed at its work", e)),
        }
    }

    fn wait(&self, mark: &Event) -> Result<()> {
        // SAFETY: as above.
        unsafe { cuda::event::synchronize(mark.0) }.map_err(|e| self.failed("failed at its work", e))
    }
}

fn allocate(line: &Arc<Line>, ordinal: usize, bytes: usize) -> Result<DeviceMemory> {
    // SAFETY: the context is bound; what comes back is owned by DeviceMemory.
    match unsafe { cuda::malloc_sync(bytes) } {
        Ok(address) => Ok(DeviceMemory { address, line: Arc::clone(line) }),
        Err(e) => {
            let free = cuda::mem_get_info().map_or(0, |(free, _)| free);
            Err(device_error(format!(
                "GPU {ordinal}: no room for {} more, {} are free ({e}): other programs may have taken it; end them, and give \
                 the same command again",
                byte_size(bytes as u64),
                byte_size(free as u64)
            )))
        }
    }
}

impl Device for Driver {
    type Memory = DeviceMemory;
    type Graph = Graph;

    fn allocate(&self, bytes: usize) -> Result<DeviceMemory> {
        let turn = self.line.turn();
        turn.refuse("memory is asked for")?;
        self.bind()?;
        allocate(&self.line, self.ordinal, bytes)
    }

    fn address(memory: &DeviceMemory) -> u64 {
        memory.address
    }

    unsafe fn write(&self, from: &[u8], to: u64) -> Result<()> {
        let turn = self.line.turn();
        turn.refuse("something is copied to the device")?;
        self.bind()?;
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's.
        unsafe { ring.write(self, from, to) }
    }

    fn expect(&self, bytes: usize) {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).expect(bytes);
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        let turn = self.line.turn();
        turn.refuse("something is copied from the device")?;
        self.bind()?;
        self.line.stream.synchronize().map_err(|e| self.failed("failed at its work", e))?;
        // SAFETY: the caller's.
        unsafe { cuda::memcpy_dtoh_sync(to, from) }.map_err(|e| self.failed("cannot copy from it", e))
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        let _turn = self.line.turn();
        self.bind()?;
        // SAFETY: the caller's.
        unsafe { cuda::memset_d8_async(at, 0, bytes, self.stream()) }.map_err(|e| self.failed("cannot clear memory", e))
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let turn = self.line.turn();
        self.bind()?;
        let function = self.function(kernel)?;
        let mut values: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| {
                let value: *const c_void = match argument {
                    Argument::Pointer { address: x, .. } | Argument::U64(x) => ptr::from_ref(x).cast(),
                    Argument::I32(x) => ptr::from_ref(x).cast(),
                    Argument::U32(x) => ptr::from_ref(x).cast(),
                    Argument::F32(x) => ptr::from_ref(x).cast(),
                };
                value.cast_mut()
            })
            .collect();
        let [x, y, z] = grid.map(|n| n as u32);
        self.timed(
            &turn,
            || (format!("{kernel} {x}x{y}x{z}"), Work::launch(arguments)),
            || {
                // SAFETY: the caller's; the driver only reads the values, and has done so when it returns.
                unsafe {
                    let block = (threads as u32, 1, 1);
                    cuda::launch_kernel(function.0, (x, y, z), block, 0, self.stream(), &mut values)
                }
                .map_err(|e| self.failed(&format!("kernel {kernel}"), e))
            },
        )
    }

    unsafe fn product(&self, product: &MatrixProduct) -> Result<()> {
        let turn = self.line.turn();
        self.bind()?;
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        let name = || {
            let (m, n, k) = product.size;
            let transposed = |yes: bool| if yes { "t" } else { "n" };
            let (a, b) = (transposed(product.transpose_a), transposed(product.transpose_b));
            (format!("product {a}{b} {m}x{n}x{k}"), Work::product(product))
        };
        self.timed(&turn, name, || {
            // SAFETY: the caller's, and the workspace is the device's own.
            unsafe { products.run(product, self.workspace.address, self.stream().cast()) }.map_err(|e| {
                device_error(format!("GPU {}: product of {:?}: cuBLASLt says {e}", self.ordinal, product.size))
            })
        })
    }

    /// A profile times work piece by piece.
    fn records(&self) -> bool {
        self.records.load(Ordering::Relaxed) && self.profile.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<Graph> {
        let failed = |e| self.failed("does not record a step", e);
        self.line.turn().refuse("another recording begins")?;
        self.bind()?;
        let recording = Recording::begin(&self.line).map_err(failed)?;
        work();
        let recorded = recording.end().map_err(failed)?;
        // SAFETY: recorded just now, and destroyed once; what is made of it needs it no longer.
        let graph = unsafe {
            let graph = cuda::graph::instantiate(recorded, sys::CUgraphInstantiate_flags(0));
            let _ = cuda::graph::destroy(recorded);
            Graph { graph: graph.map_err(failed)?, line: Arc::clone(&self.line) }
        };
        // Now, so that a lack of memory shows before the graph is relied on.
        let uploaded = {
            let _turn = self.line.turn();
            // SAFETY: the graph is whole, and its stream lives.
            unsafe { cuda::graph::upload(graph.graph, self.stream()) }
        };
        uploaded.map_err(failed)?;
        Ok(graph)
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<()> {
        let turn = self.line.turn();
        turn.refuse("a recording is replayed")?;
        self.bind()?;
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        if ahead.len() >= AHEAD
            && let Some(oldest) = ahead.pop_front()
        {
            self.wait(&oldest)?;
        }
        // SAFETY: the caller's; the graph is whole, and its stream this device's.
        unsafe { cuda::graph::launch(graph.graph, self.stream()) }
            .map_err(|e| self.failed("cannot repeat a step", e))?;
        ahead.push_back(self.event(WAITED_FOR)?);
        Ok(())
    }
}

/// What sets one kind of product apart from another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    size: (usize, usize, usize),
    transposes: (bool, bool),
    output: Element,
    add: bool,
    bias: bool,
}

/// A kind of product with the algorithm chosen for it.
struct Plan {
    description: lt::cublasLtMatmulDesc_t,
    left: lt::cublasLtMatrixLayout_t,
    right: lt::cublasLtMatrixLayout_t,
    result: lt::cublasLtMatrixLayout_t,
    algorithm: lt::cublasLtMatmulAlgo_t,
}

/// The library's handle, and the plans made so far: each shape is looked up in the library's heuristic once.
struct Products {
    handle: lt::cublasLtHandle_t,
    plans: HashMap<Shape, Plan>,
}

// SAFETY: handles of the library, used by one thread at a time (behind a mutex).
unsafe impl Send for Products {}

impl Drop for Products {
    fn drop(&mut self) {
        for plan in self.plans.values() {
            // SAFETY: made by `plan`, destroyed once.
            unsafe {
                let _ = blas::destroy_matmul_desc(plan.description);
                for layout in [plan.left, plan.right, plan.result] {
                    let _ = blas::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { blas::destroy_handle(self.handle) };
    }
}

impl Products {
    fn new() -> std::result::Result<Self, blas::CublasError> {
        Ok(Self { handle: blas::create_handle()?, plans: HashMap::new() })
    }

    /// # Safety
    /// As [`Device::product`]; `workspace` has [`WORKSPACE`] bytes.
    unsafe fn run(
        &mut self,
        product: &MatrixProduct,
        workspace: u64,
        stream: lt::cudaStream_t,
    ) -> std::result::Result<(), blas::CublasError> {
        let shape = Shape {
            size: product.size,
            transposes: (product.transpose_a, product.transpose_b),
            output: product.output,
            add: product.base.is_some(),
            bias: product.bias.is_some(),
        };
        if !self.plans.contains_key(&shape) {
            let plan = plan(self.handle, shape)?;
            self.plans.insert(shape, plan);
        }
        let plan = &self.plans[&shape];
        let (alpha, beta) = (1.0f32, f32::from(shape.add));
        // SAFETY: the plan is alive; addresses are the caller's.
        unsafe {
            if let Some(bias) = product.bias {
                set(plan.description, lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
            }
            blas::matmul(
                self.handle,
                plan.description,
                ptr::from_ref(&alpha).cast(),
                ptr::from_ref(&beta).cast(),
                // Row-major matrices are column-major transposes: cᵀ = op(b)ᵀ·op(a)ᵀ.
                product.b as *const c_void,
                plan.left,
                product.a as *const c_void,
                plan.right,
                product.base.unwrap_or(product.c) as *const c_void,
                plan.result,
                product.c as *mut c_void,
                plan.result,
                &plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                stream,
            )
        }
    }
}

/// Sets an attribute of a product's description.
///
/// # Safety
/// `value` must be of the attribute's type.
unsafe fn set<T>(
    description: lt::cublasLtMatmulDesc_t,
    attribute: lt::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), blas::CublasError> {
    // SAFETY: the caller's.
    unsafe { blas::set_matmul_desc_attribute(description, attribute, ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Describes a kind of product and asks the library for its best algorithm.
fn plan(handle: lt::cublasLtHandle_t, shape: Shape) -> std::result::Result<Plan, blas::CublasError> {
    use lt::cublasLtMatmulDescAttributes_t as Attribute;
    let kind = |element| match element {
        Element::Bf16 => lt::cudaDataType::CUDA_R_16BF,
        Element::F32 => lt::cudaDataType::CUDA_R_32F,
    };
    // CUBLAS_OP_N is 0, CUBLAS_OP_T 1; the bindings of cuBLASLt leave the type to those of cuBLAS.
    let operation = i32::from;
    // A row-major matrix of `rows` and `columns`, as the library's column-major transpose.
    let layout = |element, rows: usize, columns: usize| {
        blas::create_matrix_layout(kind(element), columns as u64, rows as u64, columns as i64)
    };
    let ((m, n, k), (transpose_a, transpose_b)) = (shape.size, shape.transposes);
    let (b_rows, b_columns) = if transpose_b { (n, k) } else { (k, n) };
    let (a_rows, a_columns) = if transpose_a { (k, m) } else { (m, k) };
    let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
    let description = blas::create_matmul_desc(compute, lt::cudaDataType::CUDA_R_32F)?;
    let (left, right) = (layout(Element::Bf16, b_rows, b_columns)?, layout(Element::Bf16, a_rows, a_columns)?);
    let result = layout(shape.output, m, n)?;
    let preference = blas::create_matmul_pref()?;
    // SAFETY: everything has just been made, and each value is of its attribute's type.
    let found = unsafe {
        set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &operation(transpose_b))?;
        set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &operation(transpose_a))?;
        if shape.bias {
            set(
                description,
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            )?;
        }
        blas::set_matmul_pref_attribute(
            preference,
            lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            ptr::from_ref(&WORKSPACE).cast(),
            size_of::<usize>(),
        )?;
        let found = blas::get_matmul_algo_heuristic(handle, description, left, right, result, result, preference);
        let _ = blas::destroy_matmul_pref(preference);
        found?
    };
    Ok(Plan { description, left, right, result, algorithm: found.algo })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_kernels_says_how_to_get_them() {
        let Err(error) = Driver::open_with(None, 0) else { panic!("there is nothing to run") };
        assert_eq!(error.kind, Kind::Device);
        assert!(error.to_string().contains("no CUDA kernels: run tools/get-nvcc.sh and build again"), "{error}");
    }

    #[test]
    fn a_gpu_that_is_not_there() {
        assert_eq!((missing(0, 1), missing(3, 4)), (None, None));
        for (ordinal, count, advice) in [(0, 0, "--device cpu"), (1, 1, "--device cuda:0"), (7, 4, "cuda:0 to cuda:3")]
        {
            let said = missing(ordinal, count).expect("it is not there");
            assert!(said.ends_with(advice), "{said}");
        }
    }

    #[test]
    fn kernels_that_do_not_load_have_their_reasons() {
        use sys::CUresult as Code;
        for (code, words) in [
            (Code::CUDA_ERROR_NO_BINARY_FOR_GPU, "no code for its compute capability 12.1: add it to ARCHITECTURES"),
            (Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "driver is too old for the kernels: install driver 580"),
            (Code::CUDA_ERROR_JIT_COMPILATION_DISABLED, "12.1 as PTX alone"),
            (Code::CUDA_ERROR_OUT_OF_MEMORY, "no memory free"),
            (Code::CUDA_ERROR_ECC_UNCORRECTABLE, "see whether nvidia-smi"),
        ] {
            let said = refused((12, 1), code);
            assert!(said.contains(words) && !said.contains('\n'), "{code:?}: {said}");
        }
    }
}
