//! Tables that let one launch work on all tensors of a model at once: which tensors there are, and which part of which
//! tensor each block takes.
//!
//! A table holds addresses, sizes and what else stays the same during a run, so it is copied to the device when it is first
//! needed and found again by its content, by the next run on the same storage too. The structures
//! are those of `kernels/tables.cuh` and of the kernels themselves.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::Mutex;

use bytemuck::{Pod, Zeroable};

use super::memory::{THREADS, locked};
use super::{Argument, Cuda, Device};

/// Numbers of a tensor that one block takes, as `PART` in `kernels/tables.cuh`.
const PART: usize = 8 * THREADS;

/// What a block takes: a part, by number, of a tensor of a table. `Piece` in `kernels/tables.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Piece {
    tensor: i32,
    part: i32,
}

/// A tensor by itself. `Span` in `kernels/tables.cuh`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Span {
    /// f32 `(n)`
    pub x: u64,
    pub n: u64,
}

/// A table on the device.
#[derive(Clone, Copy)]
pub(super) struct Table {
    /// The tensors.
    pub tensors: u64,
    /// What each block takes.
    pub parts: u64,
    /// Number of blocks.
    pub blocks: usize,
}

/// A table with the memory it lies in; none if it is empty, or after a failure.
struct Kept<D: Device> {
    table: Table,
    _memory: Option<D::Memory>,
}

/// The type and the content of a table's tensors.
type Key = (TypeId, Vec<u8>);

/// Tables that were made.
pub(super) struct Tables<D: Device>(Mutex<HashMap<Key, Kept<D>>>);

impl<D: Device> Tables<D> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

/// A number in a table.
pub(super) fn int(x: usize) -> i32 {
    match i32::try_from(x) {
        Ok(x) => x,
        Err(_) => panic!("tables hold sizes below 2^31, not {x}"),
    }
}

impl<D: Device> Cuda<D> {
    /// The table of `tensors`, with the `parts` that follow from them.
    pub(super) fn table<T: Pod, P: Pod>(&self, tensors: &[T], parts: impl FnOnce() -> Vec<P>) -> Table {
        let bytes: &[u8] = bytemuck::cast_slice(tensors);
        let make = || {
            let parts = parts();
            let behind: &[u8] = bytemuck::cast_slice(&parts);
            let len = bytes.len() + behind.len();
            let write = |device: &D| {
                let memory = device.allocate(len)?;
                let start = D::address(&memory);
                // SAFETY: the block has room for both, and nothing reads it yet.
                unsafe {
                    device.write(bytes, start)?;
                    device.write(behind, start + bytes.len() as u64)?;
                }
                Ok(memory)
            };
            let memory = if behind.is_empty() { None } else { self.attempt(write) };
            let start = memory.as_ref().map_or(0, D::address);
            let table = Table { tensors: start, parts: start + bytes.len() as u64, blocks: parts.len() };
            Kept { table, _memory: memory }
        };
        locked(&self.tables.0).entry((TypeId::of::<T>(), bytes.to_vec())).or_insert_with(make).table
    }

    /// The table of tensors of which each block takes a part of the same size; `len` is a tensor's.
    pub(super) fn pieces<T: Pod>(&self, tensors: &[T], len: impl Fn(&T) -> usize) -> Table {
        self.table(tensors, || {
            let pieces = |(i, tensor): (usize, &T)| {
                let piece = move |part| Piece { tensor: int(i), part: int(part) };
                (0..len(tensor).div_ceil(PART)).map(piece)
            };
            tensors.iter().enumerate().flat_map(pieces).collect()
        })
    }

    /// Launches `kernel` on the blocks of a table, through which it reads and writes so many bytes.
    pub(super) fn launch_table(
        &self,
        kernel: &'static str,
        table: Table,
        (read, written): (usize, usize),
        rest: &[Argument],
    ) {
        if table.blocks > 0 {
            let mut arguments =
                vec![Argument::pointer(table.parts), Argument::Pointer { address: table.tensors, read, written }];
            arguments.extend(rest);
            self.launch_blocks(kernel, [table.blocks, 1, 1], THREADS, &arguments);
        }
    }
}
