//! A step works in what was planned before the first one: what it still allocates are lists and single lines.
#![allow(missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use segpeft_native::backend::cpu::Cpu;
use segpeft_native::backend::{AdamW, Sample};
use segpeft_native::dataset::Augment;
use segpeft_native::segformer::{Model, ModelOptions, SegformerConfig, Step, StepRandom, Trainable};

/// The system's allocator, which keeps count.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's; counting touches no memory of its.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes at once, and in one piece, that training and evaluation allocate beside the plan, and the plan.
fn beside_the_plan(size: usize) -> (usize, usize, usize) {
    let (pixels, labels) = (vec![100; size * size * 3], vec![1; size * size]);
    let sample = |index| Sample { index, pixels: &pixels, labels: &labels, augment: Augment::IDENTITY };
    let samples: Vec<Sample<'_>> = (0..2).map(sample).collect();
    // One thread: which of several need their room at the same time is chance.
    let backend = Cpu::<f32>::new(Some(1)).expect("threads");
    let options = ModelOptions { size, batch: 2 };
    let mut model = Model::new(backend, &SegformerConfig::default(), options, &Trainable::Everything);
    model.refresh();
    let mut moments = model.moments();
    let decays = vec![false; moments.first.len()];
    let mut step = |number: u32| {
        let random = StepRandom { seed: 0, step: number };
        let update = AdamW { lr: 1e-4, betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.01, step: 1, max_norm: 1.0 };
        let whole = Step { micro_batches: &[&samples], random, update, decays: &decays };
        model.train_step(&whole, &mut moments, |_| true);
        model.evaluate(&samples);
    };
    // Threads make their own room once.
    (0..3).for_each(&mut step);
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    step(3);
    (PEAK.load(Ordering::Relaxed) - before, LARGEST.load(Ordering::Relaxed), model.planned_bytes())
}

/// The `gemm` crate takes room for packed operands, as much as the caches hold; four times the pixels must not take more.
#[test]
fn a_step_allocates_nothing_that_grows_with_the_pictures() {
    let (small, _, _) = beside_the_plan(256);
    let (large, largest, plan) = beside_the_plan(512);
    println!("{small} and {large} bytes at once, {largest} in one piece, beside {plan} planned");
    assert!(large <= small + (64 << 10), "{small} bytes at 256 x 256, {large} at 512 x 512");
    assert!(large < plan / 20, "{large} bytes beside {plan} planned");
}
