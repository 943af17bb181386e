//! Storage, and the spread of units over threads.

use std::marker::PhantomData;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Buffer, Real};
use crate::backend::{Inputs, Memory};
use crate::{Error, Result, error::Kind};

/// The CPU as a device, with numbers of type `T`.
pub struct Cpu<T> {
    pool: rayon::ThreadPool,
    allocated: AtomicUsize,
    numbers: PhantomData<T>,
}

impl<T: Real> Cpu<T> {
    /// A device of `threads` threads; `None` takes as many as rayon's global pool has.
    ///
    /// # Errors
    /// When the operating system refuses the threads.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or_else(rayon::current_num_threads))
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .map_err(|e| Error::new(Kind::Device, format!("cannot start the worker threads: {e}; try --threads 1")))?;
        Ok(Self { pool, allocated: AtomicUsize::new(0), numbers: PhantomData })
    }

    /// Runs `work` on the device's threads, so that parallel loops inside it stay there.
    pub(super) fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}

impl<T: Real> Memory for Cpu<T> {
    type Act = Buffer<T>;
    type Full = Buffer<T>;
    type Counts = Vec<u64>;

    fn act(&self, len: usize) -> Buffer<T> {
        self.full(len)
    }

    fn full(&self, len: usize) -> Buffer<T> {
        self.allocated.fetch_add(len * size_of::<T>(), Ordering::Relaxed);
        Buffer::zeros(len)
    }

    fn counts(&self, len: usize) -> Vec<u64> {
        self.allocated.fetch_add(len * size_of::<u64>(), Ordering::Relaxed);
        vec![0; len]
    }

    /// Nothing fails short of the process.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    fn upload(&self, from: &[f32], to: &mut Buffer<T>) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::of(f64::from(*from));
        }
    }

    fn download(&self, from: &Buffer<T>) -> Vec<f32> {
        self.download_act(from, from.len())
    }

    fn download_act(&self, from: &Buffer<T>, len: usize) -> Vec<f32> {
        from[..len].iter().map(|x| x.f64() as f32).collect()
    }

    fn scalars(&self, from: &Buffer<T>, len: usize) -> Vec<f64> {
        from[..len].iter().map(|x| x.f64()).collect()
    }

    fn whole(&self, from: &Vec<u64>, len: usize) -> Vec<u64> {
        from[..len].to_vec()
    }

    fn zero(&self, x: &mut Buffer<T>) {
        x.fill(T::ZERO);
    }

    fn zero_all(&self, tensors: &mut [&mut Buffer<T>]) {
        for tensor in tensors {
            tensor.fill(T::ZERO);
        }
    }

    fn unrounded(x: &Buffer<T>) -> Option<&Buffer<T>> {
        Some(x)
    }

    fn cast(&self, from: &Buffer<T>, to: &mut Buffer<T>) {
        to.copy_from_slice(from);
    }

    /// Recording would save nothing.
    fn repeat(&self, _: &[u64], _: &Inputs<'_>, mut work: impl FnMut()) {
        work();
    }

    fn remark(&self) -> Option<String> {
        None
    }

    fn place(&self, x: &Buffer<T>) -> u64 {
        x.as_ptr() as u64
    }

    fn images_per_unit(&self, _images: usize) -> usize {
        1
    }

    /// Memory is what a CPU's user runs out of.
    fn remembers(&self) -> bool {
        false
    }

    fn workers(&self) -> usize {
        self.pool.current_num_threads()
    }

    fn each_unit<U: Send, S: Send, W: Send>(
        &self,
        units: &mut [U],
        slots: &mut [S],
        workers: &mut [W],
        work: impl Fn(usize, &mut U, &mut S, &mut W) + Sync,
    ) {
        let count = slots.len();
        let mut queues: Vec<Vec<(usize, &mut U)>> = (0..count).map(|_| Vec::new()).collect();
        for (u, unit) in units.iter_mut().enumerate() {
            queues[u % count].push((u, unit));
        }
        let idle = Mutex::new(workers.iter_mut().collect::<Vec<_>>());
        let work = &work;
        let idle = &idle;
        self.install(|| {
            rayon::scope(|scope| {
                for (queue, slot) in queues.into_iter().zip(slots) {
                    scope.spawn(move |_| {
                        // There are as many workers as threads, so one is free.
                        let worker = idle.lock().ok().and_then(|mut free| free.pop());
                        let Some(worker) = worker else { unreachable!("more tasks at work than threads") };
                        for (index, unit) in queue {
                            work(index, unit, slot, worker);
                        }
                        if let Ok(mut free) = idle.lock() {
                            free.push(worker);
                        }
                    });
                }
            });
        });
    }
}
