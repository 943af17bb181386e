//! Merged against separate LoRA: time of a step and planned memory by rank, for adapters on one stage or on all, and the
//! loss of short trainings both ways. Prints markdown. `cargo bench --bench lora [-- SIZE [STEPS]]`
#![allow(missing_docs)]

use std::time::Instant;

use segpeft_native::backend::cpu::Cpu;
use segpeft_native::backend::{AdamW, Sample};
use segpeft_native::dataset::Augment;
use segpeft_native::dataset::demo::{Domain, draw};
use segpeft_native::lora;
use segpeft_native::random::{Philox, Purpose};
use segpeft_native::segformer::{
    Id, Model, ModelOptions, Moments, Role, SegformerConfig, StepRandom, Trainable, modules,
};

const BATCH: usize = 2;
/// Drops nothing in practice, but puts adapters on the separate path.
const NEVER: f32 = 1e-12;

struct Run {
    model: Model<Cpu<f32>>,
    moments: Moments<Cpu<f32>>,
    step: u32,
}

impl Run {
    fn new(size: usize, rank: usize, stage: Option<usize>, dropout: f32) -> Self {
        let config =
            SegformerConfig { drop_path_rate: 0.0, classifier_dropout_prob: 0.0, ..SegformerConfig::default() };
        let patterns = lora::preset("attention").expect("preset");
        let (mut matches, _) = lora::select(&modules(&config), &patterns, |_| false).expect("targets");
        if let Some(stage) = stage {
            matches.retain(|m| m.module.name.contains(&format!("encoder.block.{stage}.")));
        }
        let trainable = Trainable::Adapters { matches, rank, scale: 2.0, dropout, head: false };
        let mut model =
            Model::new(Cpu::new(None).expect("threads"), &config, ModelOptions { size, batch: BATCH }, &trainable);
        for (i, spec) in model.plan().specs.clone().iter().enumerate() {
            let stream = Philox::new(1, Purpose::Weights, i as u32, 0);
            let draw = |range: f32| (0..spec.len() as u64).map(|k| stream.normal(k) * range).collect();
            let data: Vec<f32> = match spec.role {
                _ if spec.name.contains(".folded.") || spec.name.ends_with(".scaled") => continue,
                _ if spec.name.contains("lora_B") => vec![0.0; spec.len()],
                Role::Product | Role::Depthwise => draw(0.06),
                Role::Scale => vec![1.0; spec.len()],
                Role::Statistic if spec.name.ends_with("var") => vec![1.0; spec.len()],
                Role::Bias | Role::Statistic => vec![0.0; spec.len()],
            };
            model.set(Id(i), &data);
        }
        model.refresh();
        let moments = model.moments();
        Self { model, moments, step: 0 }
    }

    /// One step: its seconds and its loss.
    fn step(&mut self, samples: &[Sample<'_>]) -> (f64, f64) {
        let started = Instant::now();
        self.model.clear_gradients();
        let pixels: usize = samples.iter().map(|s| s.labels.len()).sum();
        self.model.train_micro_batch(samples, 1.0 / pixels as f64, StepRandom { seed: 1, step: self.step });
        self.model.finish_gradients();
        self.step += 1;
        let update = AdamW {
            lr: 5e-4,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: u64::from(self.step),
            max_norm: 1.0,
        };
        let decays = vec![false; self.moments.first.len()];
        self.model.update(&update, &decays, &mut self.moments);
        (started.elapsed().as_secs_f64(), self.model.take_loss())
    }
}

fn main() {
    // Cargo adds --bench.
    let numbers: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let size = numbers.first().copied().unwrap_or(256);
    let steps = numbers.get(1).copied().unwrap_or(5);
    let pictures: Vec<(Vec<u8>, Vec<u8>)> = (0..8).map(|i| draw(Domain::Target, i, size)).collect();
    let sample = |i: usize| {
        let (pixels, labels) = &pictures[i % pictures.len()];
        Sample { index: i, pixels, labels, augment: Augment::IDENTITY }
    };

    println!("{size}x{size}, batch {BATCH}, targets: attention; fastest of {steps} interleaved steps\n");
    println!("| adapters on | rank | merged, ms | separate, ms | separate / merged | merged, MB | separate, MB |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for stage in [None, Some(0), Some(1), Some(2), Some(3)] {
        for rank in if stage.is_none() { vec![4, 8, 16, 32, 64] } else { vec![4, 16, 64] } {
            let mut runs = [0.0, NEVER].map(|dropout| Run::new(size, rank, stage, dropout));
            let samples: Vec<Sample<'_>> = (0..BATCH).map(sample).collect();
            let mut best = [f64::INFINITY; 2];
            for step in 0..=steps {
                for (run, best) in runs.iter_mut().zip(&mut best) {
                    let (seconds, _) = run.step(&samples);
                    *best = if step > 0 { best.min(seconds) } else { *best };
                }
            }
            let memory = runs.each_ref().map(|run| run.model.planned_bytes() as f64 / 1e6);
            let name = stage.map_or("all stages".into(), |s| format!("stage {s}"));
            println!(
                "| {name} | {rank} | {:.0} | {:.0} | {:.2} | {:.0} | {:.0} |",
                best[0] * 1e3,
                best[1] * 1e3,
                best[1] / best[0],
                memory[0],
                memory[1]
            );
        }
    }

    println!("\nLoss of step k, rank 16, both ways from the same start\n");
    println!("| step | merged | separate | difference |\n| --- | --- | --- | --- |");
    let mut runs = [0.0, NEVER].map(|dropout| Run::new(128, 16, None, dropout));
    let pictures: Vec<(Vec<u8>, Vec<u8>)> = (0..8).map(|i| draw(Domain::Target, i, 128)).collect();
    for step in 0..=100 {
        let samples: Vec<Sample<'_>> = (0..BATCH)
            .map(|i| {
                let (pixels, labels) = &pictures[(step * BATCH + i) % pictures.len()];
                Sample { index: i, pixels, labels, augment: Augment::IDENTITY }
            })
            .collect();
        let losses = runs.each_mut().map(|run| run.step(&samples).1);
        if step % 20 == 0 {
            println!("| {step} | {:.6} | {:.6} | {:.1e} |", losses[0], losses[1], (losses[0] - losses[1]).abs());
        }
    }
}
