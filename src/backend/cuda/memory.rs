//! Storage on the device, and launching.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;
use half::bf16;

use super::graphs::{Announced, Graphs};
use super::tables::{Span, Tables};
use super::{Argument, Device, Joint, Pictures};
use crate::backend::{Inputs, Memory};
use crate::{Error, Result};

/// Threads of a block, where nothing else is said.
pub(super) const THREADS: usize = 256;

/// Numbers of type `E` on a device.
pub struct Array<D: Device, E> {
    /// None if empty, or if the device had no room, which is a kept failure.
    memory: Option<D::Memory>,
    len: usize,
    /// Counts the backend's arrays that are gone with their memory.
    gone: Arc<AtomicUsize>,
    element: PhantomData<E>,
}

impl<D: Device, E> Drop for Array<D, E> {
    fn drop(&mut self) {
        if self.memory.is_some() {
            self.gone.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<D: Device, E> Array<D, E> {
    /// The first `n` numbers as an argument of a kernel that reads them.
    ///
    /// # Panics
    /// If there are fewer; so do the others.
    pub(super) fn at(&self, n: usize) -> Argument {
        Argument::Pointer { address: self.address(n), read: n * size_of::<E>(), written: 0 }
    }

    /// The first `n` numbers as an argument of a kernel that writes them.
    pub(super) fn to(&mut self, n: usize) -> Argument {
        Argument::Pointer { address: self.address(n), read: 0, written: n * size_of::<E>() }
    }

    /// The first `n` numbers as an argument of a kernel that reads and writes them.
    pub(super) fn both(&mut self, n: usize) -> Argument {
        let bytes = n * size_of::<E>();
        Argument::Pointer { address: self.address(n), read: bytes, written: bytes }
    }

    /// The first `n` numbers as an argument of a kernel that writes them, or adds to them.
    pub(super) fn sum_to(&mut self, n: usize, add: bool) -> Argument {
        if add { self.both(n) } else { self.to(n) }
    }

    /// The address of the first `n` numbers.
    pub(super) fn address(&self, n: usize) -> u64 {
        assert!(n <= self.len, "{n} numbers of an array of {}", self.len);
        self.memory.as_ref().map_or(0, D::address)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

/// Device memory that grows to the largest size asked for and keeps no content from operation to operation.
pub(super) struct Room<D: Device>(Mutex<(Option<D::Memory>, usize)>);

impl<D: Device> Room<D> {
    fn new() -> Self {
        Self(Mutex::new((None, 0)))
    }
}

/// A device as a backend: bf16 activations, f32 parameters.
pub struct Cuda<D: Device> {
    /// Dropped before what the recordings name.
    pub(super) graphs: Graphs<D>,
    /// Inputs of the work being repeated.
    pub(super) announced: Mutex<Option<Announced>>,
    /// Why the device does not record.
    pub(super) refusal: Mutex<Option<Error>>,
    device: D,
    /// Partial sums.
    scratch: Room<D>,
    /// What is on its way from the host.
    staging: Room<D>,
    pictures: Option<Arc<Pictures>>,
    remembers: bool,
    apart: Option<Joint>,
    pub(super) tables: Tables<D>,
    allocated: AtomicUsize,
    /// Arrays that are gone: recordings of before may name them.
    pub(super) gone: Arc<AtomicUsize>,
    pub(super) failure: Mutex<Option<Error>>,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Device> Cuda<D> {
    /// A backend on `device`.
    pub fn new(device: D) -> Self {
        Self {
            graphs: Graphs::new(),
            announced: Mutex::new(None),
            refusal: Mutex::new(None),
            device,
            scratch: Room::new(),
            staging: Room::new(),
            pictures: None,
            remembers: true,
            apart: None,
            tables: Tables::new(),
            allocated: AtomicUsize::new(0),
            gone: Arc::default(),
            failure: Mutex::new(None),
        }
    }

    /// The same, with pictures that need not be brought again.
    pub fn with_pictures(self, pictures: Option<Arc<Pictures>>) -> Self {
        Self { pictures, ..self }
    }

    /// The same, making activations again in the backward pass where it can: less memory, more time, the same bits.
    pub fn saving_memory(self, saves: bool) -> Self {
        Self { remembers: !saves, ..self }
    }

    /// The same, doing this operation's parts one by one.
    pub fn taking_apart(self, apart: Option<Joint>) -> Self {
        Self { apart, ..self }
    }

    /// The operation that is done in parts though there is a kernel for all of it.
    pub fn apart(&self) -> Option<Joint> {
        self.apart
    }

    /// Whether this operation's kernel may be used.
    pub(super) fn joins(&self, joint: Joint) -> bool {
        self.apart != Some(joint)
    }

    /// Bytes of the two rooms that operations share, after the largest so far.
    pub fn rooms(&self) -> [usize; 2] {
        [&self.scratch, &self.staging].map(|room| locked(&room.0).1)
    }

    /// Makes the rooms this large, as [`Cuda::rooms`] told of another backend that did the same work.
    pub fn reserve(&self, [scratch, staging]: [usize; 2]) {
        self.room(&self.scratch, scratch);
        self.room(&self.staging, staging);
    }

    /// The pictures that stay on the device.
    pub(super) fn pictures(&self) -> Option<&Pictures> {
        self.pictures.as_deref()
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Runs `work` unless something failed before; None, and the failure kept, if something does.
    pub(super) fn attempt<R>(&self, work: impl FnOnce(&D) -> Result<R>) -> Option<R> {
        let mut failure = locked(&self.failure);
        if failure.is_some() {
            return None;
        }
        work(&self.device).map_err(|error| *failure = Some(error)).ok()
    }

    fn array<E>(&self, len: usize) -> Array<D, E> {
        let bytes = len * size_of::<E>();
        self.allocated.fetch_add(bytes, Ordering::Relaxed);
        let make = |device: &D| {
            let memory = device.allocate(bytes)?;
            // SAFETY: the block has just been made with so many bytes.
            unsafe { device.clear(D::address(&memory), bytes)? };
            Ok(memory)
        };
        let memory = if bytes > 0 { self.attempt(make) } else { None };
        Array { memory, len, gone: Arc::clone(&self.gone), element: PhantomData }
    }

    fn room(&self, room: &Room<D>, bytes: usize) -> u64 {
        let mut room = locked(&room.0);
        if room.1 < bytes {
            self.graphs.forget();
            // The old block goes first, so that both need not fit.
            *room = (None, 0);
            room.0 = self.attempt(|device| device.allocate(bytes));
            room.1 = bytes;
            self.allocated.fetch_add(bytes, Ordering::Relaxed);
        }
        room.0.as_ref().map_or(0, D::address)
    }

    /// Room for `n` partial sums of one operation; its content does not outlive the operation.
    pub(super) fn scratch(&self, n: usize) -> u64 {
        self.room(&self.scratch, n * size_of::<f32>())
    }

    /// Copies `parts` one behind the other to the device; the address of the first.
    pub(super) fn stage(&self, parts: &[&[u8]]) -> u64 {
        let start = self.room(&self.staging, parts.iter().map(|part| part.len()).sum());
        let mut at = start;
        for part in parts {
            // SAFETY: the room holds all parts, and each lies behind the one before.
            self.attempt(|device| unsafe { device.write(part, at) });
            at += part.len() as u64;
        }
        start
    }

    /// The first `len` numbers of an array; so many times `lost` where the device has failed.
    fn fetch<E: Pod>(&self, from: &Array<D, E>, len: usize, lost: E) -> Vec<E> {
        let mut to = vec![lost; len];
        let address = from.address(len);
        // SAFETY: the array has so many numbers, as `address` asserts.
        self.attempt(|device| unsafe { device.read(address, bytemuck::cast_slice_mut(&mut to)) });
        to
    }

    /// Launches `kernel` on a grid of blocks of `threads`.
    pub(super) fn launch_blocks(&self, kernel: &'static str, grid: [usize; 3], threads: usize, arguments: &[Argument]) {
        // SAFETY: each operation states its kernel's arguments in their order, and takes addresses of arrays through
        // Array::at with the lengths the kernel documents.
        self.attempt(|device| unsafe { device.launch(kernel, grid, threads, arguments) });
    }

    /// Launches `kernel` with one thread for each of `n` pieces of work.
    pub(super) fn launch(&self, kernel: &'static str, n: usize, arguments: &[Argument]) {
        if n > 0 {
            self.launch_blocks(kernel, [n.div_ceil(THREADS), 1, 1], THREADS, arguments);
        }
    }

    /// Column-wise sums of `kinds` quantities over `rows`: launches `kernel` with what `arguments` makes of the rows per
    /// slab and the address of the partial sums, then adds them up: `outputs[kind]` receives `channels` sums, added
    /// if so told.
    pub(super) fn column_sums(
        &self,
        kernel: &'static str,
        (rows, channels): (usize, usize),
        arguments: impl FnOnce(Argument, Argument) -> Vec<Argument>,
        outputs: &[ColumnSums],
    ) {
        let kinds = outputs.iter().map(|o| o.kinds).sum::<usize>();
        let (slab, slabs) = slabs(rows);
        let sums = slabs * kinds * channels;
        let partial = self.scratch(sums);
        let grid = [channels.div_ceil(column_span(channels)), slabs, 1];
        self.launch_blocks(kernel, grid, THREADS, &arguments(slab.into(), Argument::partial(partial, sums)));
        self.sum_partials((partial, slabs, channels), kinds, outputs);
    }

    /// Adds up, slab by slab, the partial sums `(slabs, kinds, channels)` at an address, for up to three outputs; those behind the
    /// last output's nobody wants.
    pub(super) fn sum_partials(
        &self,
        (partial, slabs, channels): (u64, usize, usize),
        kinds: usize,
        outputs: &[ColumnSums],
    ) {
        assert!(outputs.len() <= 3, "{} outputs", outputs.len());
        let n: usize = outputs.iter().map(|output| output.kinds * channels).sum();
        let partial = Argument::partial_read(partial, slabs * n);
        let mut arguments = vec![partial, slabs.into(), (kinds * channels).into()];
        if let [ColumnSums { to, add, .. }] = outputs
            && (slabs <= FEW_SLABS && n == kinds * channels && n.is_multiple_of(4))
        {
            arguments.extend([*to, (*add).into()]);
            return self.launch("sum_few_partials", n / 4, &arguments);
        }
        for i in 0..3 {
            arguments.extend(match outputs.get(i) {
                Some(output) => [(output.kinds * channels).into(), output.to, output.add.into()],
                None => [0usize.into(), Argument::pointer(0), false.into()],
            });
        }
        self.launch_blocks("sum_partials", [n.div_ceil(8), 1, 1], THREADS, &arguments);
    }
}

/// Slabs that a thread sums by itself at most.
const FEW_SLABS: usize = 16;
/// Slabs that a column-wise sum is cut into at most: for each of an H100's multiprocessors twice the three blocks that it holds
/// at a time of `layer_norm_backward_both`, which sums most. A fixed number, so that results do not depend on the device.
const SLABS: usize = 792;
/// Rows of a slab at least.
const SMALLEST_SLAB: usize = 64;

/// Rows of a slab, and how many slabs `rows` make.
pub(super) fn slabs(rows: usize) -> (usize, usize) {
    let slab = rows.div_ceil(SLABS).max(SMALLEST_SLAB);
    (slab, rows.div_ceil(slab))
}

/// Channels that a block of a column-wise sum takes, as `kernels/common.cuh` has it.
pub(super) fn column_span(channels: usize) -> usize {
    let packs = width(channels);
    (channels / packs).min(32) * packs
}

/// Where column-wise sums go.
pub(super) struct ColumnSums {
    /// How many of the kernel's quantities, one behind the other.
    pub kinds: usize,
    /// `(kinds, channels)`, or null if nobody wants them and others are wanted.
    pub to: Argument,
    /// Whether `to` is added to.
    pub add: bool,
}

/// Consecutive channels per thread: 8, in one 16-byte access, where `channels` allow.
pub(super) fn width(channels: usize) -> usize {
    if channels.is_multiple_of(8) { 8 } else { 1 }
}

impl<D: Device> Memory for Cuda<D> {
    type Act = Array<D, bf16>;
    type Full = Array<D, f32>;
    type Counts = Array<D, u64>;

    fn act(&self, len: usize) -> Self::Act {
        self.array(len)
    }

    fn full(&self, len: usize) -> Self::Full {
        self.array(len)
    }

    fn counts(&self, len: usize) -> Self::Counts {
        self.array(len)
    }

    fn check(&self) -> Result<()> {
        locked(&self.failure).clone().map_or(Ok(()), Err)
    }

    fn allocated(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    fn upload(&self, from: &[f32], to: &mut Self::Full) {
        let address = to.address(from.len());
        // SAFETY: the array has room for `from`, as `address` asserts.
        self.attempt(|device| unsafe { device.write(bytemuck::cast_slice(from), address) });
    }

    fn download(&self, from: &Self::Full) -> Vec<f32> {
        self.fetch(from, from.len(), f32::NAN)
    }

    fn download_act(&self, from: &Self::Act, len: usize) -> Vec<f32> {
        self.fetch(from, len, bf16::NAN).into_iter().map(bf16::to_f32).collect()
    }

    /// NaN where the device has failed.
    fn scalars(&self, from: &Self::Full, len: usize) -> Vec<f64> {
        self.fetch(from, len, f32::NAN).into_iter().map(f64::from).collect()
    }

    /// Zeros where the device has failed.
    fn whole(&self, from: &Self::Counts, len: usize) -> Vec<u64> {
        self.fetch(from, len, 0)
    }

    fn zero(&self, x: &mut Self::Full) {
        let (address, bytes) = (x.address(x.len()), x.len() * size_of::<f32>());
        // SAFETY: the array has so many bytes.
        self.attempt(|device| unsafe { device.clear(address, bytes) });
    }

    fn zero_all(&self, tensors: &mut [&mut Self::Full]) {
        let spans: Vec<Span> = tensors.iter().map(|x| Span { x: x.address(x.len()), n: x.len() as u64 }).collect();
        let bytes = tensors.iter().map(|x| x.len() * size_of::<f32>()).sum();
        self.launch_table("zero_all", self.pieces(&spans, |span| span.n as usize), (0, bytes), &[]);
    }

    fn cast(&self, from: &Self::Full, to: &mut Self::Act) {
        let n = from.len();
        self.launch("cast", n.div_ceil(8), &[from.at(n), to.to(n), n.into()]);
    }

    fn repeat(&self, key: &[u64], inputs: &Inputs<'_>, mut work: impl FnMut()) {
        self.repeat_work(key, inputs, &mut work);
    }

    fn takes_all(&self, inputs: &Inputs<'_>) -> bool {
        self.records_all(inputs)
    }

    fn renew(&self) {
        self.graphs.renew();
    }

    fn remark(&self) -> Option<String> {
        let refusal = locked(&self.refusal);
        refusal.as_ref().map(|refusal| format!("steps are launched kernel by kernel, not as graphs: {refusal}"))
    }

    fn place(&self, x: &Self::Full) -> u64 {
        x.address(0)
    }

    /// The whole batch: a GPU wants as much at once as there is.
    fn images_per_unit(&self, images: usize) -> usize {
        images
    }

    fn remembers(&self) -> bool {
        self.remembers
    }

    fn workers(&self) -> usize {
        1
    }

    fn each_unit<U: Send, S: Send, W: Send>(
        &self,
        units: &mut [U],
        slots: &mut [S],
        workers: &mut [W],
        work: impl Fn(usize, &mut U, &mut S, &mut W) + Sync,
    ) {
        let slot_count = slots.len();
        for (u, unit) in units.iter_mut().enumerate() {
            work(u, unit, &mut slots[u % slot_count], &mut workers[0]);
        }
    }
}
