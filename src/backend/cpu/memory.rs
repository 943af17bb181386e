//! Storage, and the spread of units over threads.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::{Buffer, Real};
use crate::backend::{Inputs, Memory};
use crate::{Error, Result, error::Kind};

/// Numbers of a tensor that one thread takes at a time, outside units.
pub(super) const PART: usize = 1 << 14;

/// The CPU as a device, with numbers of type `T`.
pub struct Cpu<T> {
    pool: rayon::ThreadPool,
    /// Threads of their own for each of so many units that are under way at once, where there are more threads than units.
    teams: Mutex<HashMap<usize, Arc<Vec<rayon::ThreadPool>>>>,
    /// Threads that a unit has at the moment.
    team: AtomicUsize,
    /// Whether no backward pass follows what is done at the moment.
    evaluates: AtomicBool,
    allocated: AtomicUsize,
    numbers: PhantomData<T>,
}

impl<T: Real> Cpu<T> {
    /// A device of `threads` threads; `None` takes as many as rayon's global pool has.
    ///
    /// # Errors
    /// When the operating system refuses the threads.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let pool = threads_of(threads.unwrap_or_else(rayon::current_num_threads))
            .map_err(|e| Error::new(Kind::Device, format!("cannot start the worker threads: {e}; try --threads 1")))?;
        let (teams, team, evaluates) = (Mutex::default(), AtomicUsize::new(1), AtomicBool::new(false));
        Ok(Self { pool, teams, team, evaluates, allocated: AtomicUsize::new(0), numbers: PhantomData })
    }

    /// Pools for `units` units that are under way at once; none where each has but one thread, or no more can be started.
    fn teams(&self, units: usize) -> Option<Arc<Vec<rayon::ThreadPool>>> {
        let size = self.pool.current_num_threads() / units.max(1);
        if size < 2 {
            return None;
        }
        let mut teams = self.teams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(teams) = teams.get(&units) {
            return Some(Arc::clone(teams));
        }
        let new = Arc::new((0..units).map(|_| threads_of(size)).collect::<std::result::Result<Vec<_>, _>>().ok()?);
        teams.insert(units, Arc::clone(&new));
        Some(new)
    }

    /// Threads of the unit.
    pub(super) fn team(&self) -> usize {
        self.team.load(Ordering::Relaxed)
    }

    /// Whether no backward pass follows.
    pub(super) fn evaluates(&self) -> bool {
        self.evaluates.load(Ordering::Relaxed)
    }

    /// Rows of `rows` that a thread of the unit takes, a multiple of `step`. What operations compute does not depend on it.
    pub(super) fn share(&self, rows: usize, step: usize) -> usize {
        match self.team() {
            1 => rows.max(1),
            team => rows.div_ceil(team).next_multiple_of(step).max(1),
        }
    }

    /// Does `work` on every item, on all threads of the unit.
    pub(super) fn each<I: Send>(&self, items: impl Iterator<Item = I>, work: impl Fn(I) + Send + Sync) {
        if self.team() == 1 {
            items.for_each(work);
        } else {
            items.collect::<Vec<_>>().into_par_iter().for_each(work);
        }
    }

    /// Does `work` on every item, on all threads of the device, outside units; on the caller's where there is one item.
    pub(super) fn each_on_all<I: Send>(&self, items: impl Iterator<Item = I>, work: impl Fn(I) + Send + Sync) {
        let mut items: Vec<I> = items.collect();
        if items.len() > 1 {
            self.pool.install(|| items.into_par_iter().for_each(work));
        } else if let Some(item) = items.pop() {
            work(item);
        }
    }
}

fn threads_of(number: usize) -> std::result::Result<rayon::ThreadPool, rayon::ThreadPoolBuildError> {
    rayon::ThreadPoolBuilder::new().num_threads(number).thread_name(|i| format!("cpu-{i}")).build()
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
        self.each_on_all(tensors.iter_mut(), |tensor| tensor.fill(T::ZERO));
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

    fn takes_all(&self, _: &Inputs<'_>) -> bool {
        false
    }

    fn remark(&self) -> Option<String> {
        None
    }

    fn place(&self, x: &Buffer<T>) -> u64 {
        x.as_ptr() as u64
    }

    fn evaluating<R>(&self, work: impl FnOnce() -> R) -> R {
        /// Ends evaluation also where the work panics: a training step must never multiply as it does.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::Relaxed);
            }
        }
        self.evaluates.store(true, Ordering::Relaxed);
        let _end = End(&self.evaluates);
        work()
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
        queues.retain(|queue| !queue.is_empty());
        let teams = self.teams(queues.len());
        let size = teams.as_ref().map_or(1, |teams| teams[0].current_num_threads());
        self.team.store(size, Ordering::Relaxed);
        let idle = Mutex::new(workers.iter_mut().collect::<Vec<_>>());
        let (work, idle, teams) = (&work, &idle, &teams);
        self.pool.install(|| {
            rayon::scope(|scope| {
                for (q, (queue, slot)) in queues.into_iter().zip(slots).enumerate() {
                    scope.spawn(move |_| {
                        // There are as many workers as threads, so one is free.
                        let worker = idle.lock().ok().and_then(|mut free| free.pop());
                        let Some(worker) = worker else { unreachable!("more tasks at work than threads") };
                        let run = || {
                            for (index, unit) in queue {
                                work(index, unit, slot, worker);
                            }
                        };
                        match teams {
                            Some(teams) => teams[q].install(run),
                            None => run(),
                        }
                        if let Ok(mut free) = idle.lock() {
                            free.push(worker);
                        }
                    });
                }
            });
        });
        self.team.store(1, Ordering::Relaxed);
    }
}
