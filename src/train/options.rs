//! What defines a run: method, hyper-parameters, protocol.

use serde::{Deserialize, Serialize};

use crate::formats::HfNames;

/// Which parameters are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Method {
    /// Full fine-tuning: every parameter.
    Fft,
    /// Low-rank adapters on frozen weights (Hu et al., 2021).
    Lora(LoraOptions),
}

/// Hyper-parameters of LoRA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraOptions {
    /// Rank r of the factors.
    pub rank: usize,
    /// Numerator of the scale alpha / r.
    pub alpha: f64,
    /// Dropout at the adapter's input.
    pub dropout: f32,
    /// Target patterns, matched as peft does: a module whose full name equals one or ends in `.` + it.
    pub targets: Vec<String>,
    /// Also train the whole decode head (peft's `modules_to_save`).
    pub train_head: bool,
}

/// Which experiment is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// One split shared by all runs, evaluation without augmentation, correct metrics, the best model truly restored.
    #[default]
    Strict,
    /// The original notebook with its quirks, for comparison with its numbers.
    Notebook,
}

/// Everything that shapes the numbers of one run. Written to the run's folder; a resumed run must match it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// Full fine-tuning or LoRA.
    pub method: Method,
    /// Passes over the training split.
    pub epochs: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Images per micro-batch.
    pub batch_size: usize,
    /// Micro-batches per update.
    pub grad_accum: usize,
    /// Images per evaluation batch.
    pub eval_batch_size: usize,
    /// Share of the updates spent warming up.
    pub warmup_ratio: f64,
    /// Decoupled weight decay, on weights of linear and convolution layers.
    pub weight_decay: f64,
    /// AdamW's decay of the first and second moment.
    pub betas: [f64; 2],
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// Largest global gradient norm.
    pub max_grad_norm: f64,
    /// Evaluations without improvement before training stops.
    pub patience: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Strict or notebook.
    pub protocol: Protocol,
    /// Augment the training images.
    pub augment: bool,
    /// Shuffle the training split each epoch; otherwise its own order is kept.
    pub shuffle: bool,
    /// Stochastic-depth rate in place of the checkpoint's.
    pub drop_path: Option<f32>,
    /// Classifier dropout in place of the checkpoint's.
    pub classifier_dropout: Option<f32>,
    /// Checkpoints kept, the best among them.
    pub keep_checkpoints: usize,
    /// Names written into adapters.
    pub hf_names: HfNames,
}

impl Default for TrainOptions {
    /// The notebook's hyper-parameters (full fine-tuning).
    fn default() -> Self {
        Self {
            method: Method::Fft,
            epochs: 50,
            lr: 5e-4,
            batch_size: 64,
            grad_accum: 4,
            eval_batch_size: 128,
            warmup_ratio: 0.1,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            patience: 10,
            seed: 42,
            protocol: Protocol::Strict,
            augment: true,
            shuffle: true,
            drop_path: None,
            classifier_dropout: None,
            keep_checkpoints: 2,
            hf_names: HfNames::V4,
        }
    }
}
