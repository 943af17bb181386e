//! Times training and evaluation steps on made-up pictures, for `doctor` and comparisons with other programs.

use std::collections::BTreeMap;
use std::time::Instant;

use super::memory::{MemoryPlan, fit, planned_on_gpu};
use super::options::{LoraOptions, Method, TrainOptions};
use super::run::adamw;
use super::start::{Prepared, Start, Weights, on_cpu, on_gpu};
use crate::Result;
use crate::backend::cuda::{Joint, Work};
use crate::backend::{Backend, Place, Room, Sample};
use crate::dataset::Augment;
use crate::lora;
use crate::progress::Progress;
use crate::random::{Philox, Purpose};
use crate::segformer::{Model, ModelOptions, SegformerConfig, Step, StepRandom, Trainable};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// Forward, backward and update, every parameter trained.
    Fft,
    /// Forward, backward and update, adapters of rank 16 on the notebook's targets.
    Lora,
    /// Forward, loss and confusion counts.
    Eval,
}

/// What was timed.
pub struct Measured {
    /// Seconds of each step.
    pub seconds: Vec<f64>,
    /// What to know of how the device worked ([`crate::backend::Memory::remark`]).
    pub remark: Option<String>,
    /// The memory it took.
    pub plan: MemoryPlan,
}

/// How a smaller batch is asked for.
fn lower(batch: usize) -> String {
    format!("--batch-size {batch}")
}

/// Times each of `steps` steps over `batch` pictures of `size`², SegFormer-B0 with two classes, after those in which a device
/// makes what it needs, and records. A training step is one micro-batch and one update.
///
/// # Errors
/// When the worker threads cannot be started, or the device fails.
pub fn measure_step(place: &Place, kind: StepKind, size: usize, batch: usize, steps: usize) -> Result<Measured> {
    let noise = Philox::new(0, Purpose::Demo, 0, 0);
    // One picture, over and over: what it shows makes no difference to a step's time.
    let pixels: Vec<u8> = (0..size * size * 3).map(|i| noise.word(i as u64) as u8).collect();
    let labels: Vec<u8> = (0..size * size).map(|i| u8::from(i / 64 % 3 == 0)).collect();
    let sample = |index| Sample { index, pixels: &pixels, labels: &labels, augment: Augment::IDENTITY };
    let samples: Vec<Sample<'_>> = (0..batch).map(sample).collect();
    let mut place = place.clone();
    place.hold(&samples, size)?;
    let (options, prepared) = prepare(kind)?;
    let Prepared { config, tensors, trainable } = &prepared;
    let sizes = ModelOptions { size, batch };
    let (timed, plan) = match &place {
        Place::Cpu => {
            let (model, plan) = on_cpu(config, sizes, trainable, tensors, "--batch-size or --size")?;
            drop(prepared);
            (time(model, &samples, &options, kind, (1, steps)), plan)
        }
        Place::Gpu(gpu) => {
            let (model, plan) = on_gpu(gpu, config, sizes, trainable, tensors, &lower)?;
            (time(model, &samples, &options, kind, (2, steps)), plan)
        }
    };
    let (seconds, remark) = timed?;
    Ok(Measured { seconds, remark, plan })
}

/// Options and fresh weights for steps of this kind.
fn prepare(kind: StepKind) -> Result<(TrainOptions, Prepared)> {
    let lora = LoraOptions {
        rank: 16,
        alpha: 32.0,
        dropout: 0.0,
        targets: lora::preset("attention").unwrap_or_default(),
        train_head: false,
    };
    let method = if kind == StepKind::Lora { Method::Lora(lora) } else { Method::Fft };
    let options = TrainOptions { method, ..TrainOptions::default() };
    let start = Start {
        name: String::new(),
        weights: Weights::Random(SegformerConfig::default()),
        adapter: None,
        adapter_name: String::new(),
    };
    let mut prepared = start.prepare(&options, &Progress::quiet())?;
    if kind == StepKind::Eval {
        prepared.trainable = Trainable::Nothing;
    }
    Ok((options, prepared))
}

/// What a step of one kind asks of a GPU.
pub struct Demand {
    /// Memory that a run takes.
    pub plan: MemoryPlan,
    /// Bytes that it takes where activations are made again rather than kept.
    pub least_memory: usize,
    /// Bytes of it that operations share, partial sums and what is on its way from the host.
    pub rooms: [usize; 2],
    /// What is launched, by kernel: of a training step one micro-batch and one update.
    pub work: BTreeMap<String, Work>,
}

/// What a step over `batch` pictures of `size`² asks of a GPU of which `limit` bytes may be used, counted without one; an operation
/// may be taken `apart`.
///
/// # Errors
/// When the batch does not fit, with the one that would.
pub fn demand(kind: StepKind, size: usize, batch: usize, limit: Option<usize>, apart: Option<Joint>) -> Result<Demand> {
    let (_, prepared) = prepare(kind)?;
    let Prepared { config, trainable, .. } = &prepared;
    let sizes = ModelOptions { size, batch };
    let saves = match limit {
        None => false,
        Some(bytes) => {
            let room = ("a GPU", Room { bytes, limited: true });
            fit(config, sizes, trainable, room, apart, &lower)?.plan.activations_made_again
        }
    };
    let mut ledgers = Vec::new();
    let model = planned_on_gpu(config, sizes, trainable, (saves, apart), |model| {
        ledgers.push(model.backend().device().take_ledger());
    });
    let work = ledgers.swap_remove(if kind == StepKind::Eval { 2 } else { 1 });
    let plan = MemoryPlan::on_gpu(&model, limit);
    let least_memory = match saves {
        true => plan.bytes,
        false => planned_on_gpu(config, sizes, trainable, (true, apart), |_| ()).backend().device().bytes(),
    };
    Ok(Demand { plan, least_memory, rooms: model.backend().rooms(), work })
}

/// Times `steps` steps after `first` others: seconds of each, and what to know of how the device worked.
fn time<B: Backend>(
    mut model: Model<B>,
    samples: &[Sample<'_>],
    options: &TrainOptions,
    kind: StepKind,
    (first, steps): (usize, usize),
) -> Result<(Vec<f64>, Option<String>)> {
    let mut moments = model.moments();
    let decays = vec![false; moments.first.len()];
    let mut seconds = Vec::with_capacity(steps);
    for step in 0..first + steps {
        let started = Instant::now();
        if kind == StepKind::Eval {
            model.evaluate(samples);
        } else {
            let random = StepRandom { seed: options.seed, step: step as u32 };
            let update = adamw(options, options.lr, step as u64 + 1);
            let whole = Step { micro_batches: &[samples], random, update, decays: &decays };
            model.train_step(&whole, &mut moments, |_| true);
            // A device works on after the calls have returned; the norm is known when the gradients are.
            model.gradient_norm();
        }
        if step >= first {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    model.backend().check()?;
    Ok((seconds, model.backend().remark()))
}
