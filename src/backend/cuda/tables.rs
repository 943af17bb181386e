//! Tables that let one launch work on all tensors of a model at once: which tensors there are, and which part of which
//! tensor each block takes.
//!
//! A table holds addresses, sizes and what else stays the same during a run, so it is copied to the device when it is first
//! needed and found again by its content. The next run on the same storage makes its own, in the memory of those. The structures
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

/// A block of memory, and its bytes.
type Block<D> = (<D as Device>::Memory, usize);

/// A table with the memory it lies in; none if it is empty, or after a failure.
struct Kept<D: Device> {
    table: Table,
    memory: Option<Block<D>>,
}

/// The type and the content of a table's tensors.
type Key = (TypeId, Vec<u8>);

/// Tables that were made, and memory of earlier ones.
struct Made<D: Device> {
    tables: HashMap<Key, Kept<D>>,
    free: Vec<Block<D>>,
}

/// The same, behind a mutex.
pub(super) struct Tables<D: Device>(Mutex<Made<D>>);

impl<D: Device> Tables<D> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Made { tables: HashMap::new(), free: Vec::new() }))
    }

    /// Gives the memory of all tables to those that will be made: as many of the same sizes, so that nothing more is asked of
    /// the device. No recording may name them any more.
    pub(super) fn renew(&self) {
        let Made { tables, free } = &mut *locked(&self.0);
        free.extend(tables.drain().filter_map(|(_, kept)| kept.memory));
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
        if let Some(announced) = &mut *locked(&self.announced) {
            announced.tables = true;
        }
        let bytes: &[u8] = bytemuck::cast_slice(tensors);
        let Made { tables, free } = &mut *locked(&self.tables.0);
        let make = || {
            let parts = parts();
            let behind: &[u8] = bytemuck::cast_slice(&parts);
            let len = bytes.len() + behind.len();
            let write = |device: &D| {
                let memory = match free.iter().position(|block| block.1 == len) {
                    Some(i) => free.swap_remove(i).0,
                    None => device.allocate(len)?,
                };
                let start = D::address(&memory);
                // SAFETY: the block has room for both, and no recorded work reads it (see `renew`).
                unsafe {
                    device.write(bytes, start)?;
                    device.write(behind, start + bytes.len() as u64)?;
                }
                Ok(memory)
            };
            let memory = if behind.is_empty() { None } else { self.attempt(write) };
            let start = memory.as_ref().map_or(0, D::address);
            let table = Table { tensors: start, parts: start + bytes.len() as u64, blocks: parts.len() };
            Kept { table, memory: memory.map(|memory| (memory, len)) }
        };
        tables.entry((TypeId::of::<T>(), bytes.to_vec())).or_insert_with(make).table
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
