//! The CUDA kernels of the parent folder, compiled for the CPU: a launch runs here, in any order of threads.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

/// The order in which the threads of a block take turns, and blocks follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Ascending.
    Forward,
    /// Descending.
    Reverse,
    /// Drawn anew for every turn, from this seed.
    Random(u64),
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// An address.
    Pointer(u64),
    /// `int`
    I32(i32),
    /// `unsigned`
    U32(u32),
    /// `unsigned long long`
    U64(u64),
    /// `float`
    F32(f32),
}

type Launch = unsafe extern "C" fn(
    name: *const c_char,
    grid: *const u32,
    block: *const u32,
    shared: usize,
    order: c_int,
    seed: u64,
    kinds: *const u8,
    values: *const *const c_void,
    count: usize,
    message: *mut c_char,
    capacity: usize,
) -> c_int;

unsafe extern "C" {
    fn host_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared: usize,
        order: c_int,
        seed: u64,
        kinds: *const u8,
        values: *const *const c_void,
        count: usize,
        message: *mut c_char,
        capacity: usize,
    ) -> c_int;
    fn host_bf16(x: f32) -> u16;
}

/// What launches kernels: those that are linked, or those in the shared library that `SEGPEFT_SANITIZED_KERNELS` names.
fn launcher() -> Launch {
    static LAUNCHER: OnceLock<Launch> = OnceLock::new();
    *LAUNCHER.get_or_init(|| {
        let Some(path) = env::var_os("SEGPEFT_SANITIZED_KERNELS") else { return host_launch };
        // SAFETY: what the build script makes of the same sources; it stays loaded.
        let found = unsafe {
            Library::new(&path).and_then(|library| {
                let library = Box::leak(Box::new(library));
                library.get::<Launch>(b"host_launch").map(|launch| *launch)
            })
        };
        found.unwrap_or_else(|error| panic!("SEGPEFT_SANITIZED_KERNELS={}: {error}", path.display()))
    })
}

/// Runs the kernel `name` to its end.
///
/// # Errors
/// What is wrong with the launch (no such kernel, wrong number or types of arguments, impossible geometry) or what went
/// wrong in it (a barrier or shuffle without all its threads).
///
/// # Safety
/// Every pointer among `values` must be valid for what the kernel does with it.
pub unsafe fn launch(
    name: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: usize,
    order: Order,
    values: &[Value],
) -> Result<(), String> {
    let c_name = CString::new(name).map_err(|_| "a kernel's name holds no zero byte".to_string())?;
    let (order, seed) = match order {
        Order::Forward => (0, 0),
        Order::Reverse => (1, 0),
        Order::Random(seed) => (2, seed),
    };
    let (kinds, addresses): (Vec<u8>, Vec<*const c_void>) = values
        .iter()
        .map(|value| match value {
            Value::Pointer(x) => (0, std::ptr::from_ref(x).cast()),
            Value::I32(x) => (1, std::ptr::from_ref(x).cast()),
            Value::U32(x) => (2, std::ptr::from_ref(x).cast()),
            Value::U64(x) => (3, std::ptr::from_ref(x).cast()),
            Value::F32(x) => (4, std::ptr::from_ref(x).cast()),
        })
        .unzip();
    let mut message = [0; 256];
    // SAFETY: the arrays are as long as stated and live through the call; the kinds are those of host::Kind; what the
    // kernel does with pointers is the caller's word.
    let failed = unsafe {
        launcher()(
            c_name.as_ptr(),
            grid.as_ptr(),
            block.as_ptr(),
            shared,
            order,
            seed,
            kinds.as_ptr(),
            addresses.as_ptr(),
            values.len(),
            message.as_mut_ptr(),
            message.len(),
        )
    };
    if failed == 0 {
        return Ok(());
    }
    // SAFETY: host_launch terminates what it writes, and the buffer started as zeros.
    let text = unsafe { CStr::from_ptr(message.as_ptr()) };
    Err(format!("{name}: {}", text.to_string_lossy()))
}

/// The bf16 nearest to `x`, as the kernels round when they are compiled for the CPU.
pub fn bf16_bits(x: f32) -> u16 {
    // SAFETY: a function of a number.
    unsafe { host_bf16(x) }
}
