//! Times training and evaluation steps on made-up pictures, for `doctor` and comparisons with other programs.

use std::time::Instant;

use super::options::{LoraOptions, Method, TrainOptions};
use super::run::adamw;
use super::start::{Start, Weights, on_cpu, on_gpu};
use crate::Result;
use crate::backend::{Backend, Place, Sample};
use crate::dataset::Augment;
use crate::lora;
use crate::progress::Progress;
use crate::random::{Philox, Purpose};
use crate::segformer::{Model, ModelOptions, SegformerConfig, StepRandom, Trainable};

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

/// Seconds of each of `steps` steps over `batch` pictures of `size`², SegFormer-B0 with two classes, after one that is
/// not counted. A training step is one micro-batch and one update.
///
/// # Errors
/// When the worker threads cannot be started, or the device fails.
pub fn measure_step(place: &Place, kind: StepKind, size: usize, batch: usize, steps: usize) -> Result<Vec<f64>> {
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
    let prepared = start.prepare(&options, &Progress::quiet())?;
    let trainable = if kind == StepKind::Eval { Trainable::Nothing } else { prepared.trainable };
    let sizes = ModelOptions { size, batch };
    match place {
        Place::Cpu => {
            let model = on_cpu(&prepared.config, sizes, &trainable, &prepared.tensors)?;
            drop(prepared.tensors);
            time(model, &options, kind, steps)
        }
        Place::Gpu(driver) => {
            time(on_gpu(driver, &prepared.config, sizes, &trainable, &prepared.tensors)?, &options, kind, steps)
        }
    }
}

fn time<B: Backend>(mut model: Model<B>, options: &TrainOptions, kind: StepKind, steps: usize) -> Result<Vec<f64>> {
    let (size, batch) = (model.size(), model.batch());
    let noise = Philox::new(0, Purpose::Demo, 0, 0);
    let pixels: Vec<u8> = (0..batch * size * size * 3).map(|i| noise.word(i as u64) as u8).collect();
    let labels: Vec<u8> = (0..batch * size * size).map(|i| u8::from(i / 64 % 3 == 0)).collect();
    let samples: Vec<Sample<'_>> =
        (pixels.chunks_exact(size * size * 3).zip(labels.chunks_exact(size * size)).enumerate())
            .map(|(index, (pixels, labels))| Sample { index, pixels, labels, augment: Augment::IDENTITY })
            .collect();
    let mut moments = model.moments();
    let decays = vec![false; moments.first.len()];
    let mut seconds = Vec::with_capacity(steps);
    for step in 0..=steps {
        let started = Instant::now();
        if kind == StepKind::Eval {
            model.evaluate(&samples);
        } else {
            model.clear_gradients();
            let random = StepRandom { seed: options.seed, step: step as u32 };
            model.train_micro_batch(&samples, 1.0 / labels.len() as f64, random);
            model.finish_gradients();
            model.update(&adamw(options, options.lr, step as u64 + 1), &decays, &mut moments);
            // A device works on after the calls have returned; the norm is known when the gradients are.
            model.gradient_norm();
        }
        if step > 0 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    model.backend().check()?;
    Ok(seconds)
}
