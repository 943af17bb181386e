//! Checks of single values and the groups of flags that several commands share.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, ValueEnum};

use crate::ablation::SplitPlan;
use crate::ablation::source::ModelSource;
use crate::backend::{Choice, Place};
use crate::error::{Error, Result};
use crate::formats::HfNames;
use crate::lora;
use crate::progress::Progress;
use crate::train::options::{LoraOptions, Method, Protocol, TrainOptions};

type Parsed<T> = std::result::Result<T, String>;

fn integer<T: FromStr + PartialOrd + std::fmt::Display>(text: &str, least: T, most: T) -> Parsed<T> {
    let range = format!("must be a whole number from {least} to {most}");
    let value: T = text.parse().map_err(|_| range.clone())?;
    if value < least || value > most { Err(range) } else { Ok(value) }
}

fn real(text: &str, accepts: impl Fn(f64) -> bool, range: &str) -> Parsed<f64> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && accepts(value) => Ok(value),
        _ => Err(format!("must be {range}")),
    }
}

pub fn rank(text: &str) -> Parsed<usize> {
    integer(text, 1, 1024)
}

pub fn positive(text: &str) -> Parsed<f64> {
    real(text, |v| v > 0.0, "a finite number above 0")
}

pub fn not_negative(text: &str) -> Parsed<f64> {
    real(text, |v| v >= 0.0, "a finite number, 0 or more")
}

/// A probability of dropping something: below 1, for something must remain.
pub fn dropout(text: &str) -> Parsed<f32> {
    // Compared as f32, which 0.99999999 rounds to 1.
    real(text, |v| v >= 0.0 && (v as f32) < 1.0, "from 0 to below 1").map(|v| v as f32)
}

pub fn share(text: &str) -> Parsed<f64> {
    real(text, |v| (0.0..=1.0).contains(&v), "from 0 to 1")
}

/// A ratio alpha / r.
pub fn ratio(text: &str) -> Parsed<f64> {
    real(text, |v| v > 0.0 && v <= 1e6, "above 0 and at most 1000000")
}

pub fn epochs(text: &str) -> Parsed<usize> {
    integer(text, 1, 100_000)
}

pub fn count(text: &str) -> Parsed<usize> {
    integer(text, 1, 65_536)
}

/// Images of a batch that exists in memory, whatever the dataset.
pub fn images(text: &str) -> Parsed<usize> {
    integer(text, 1, 1024)
}

pub fn threads(text: &str) -> Parsed<usize> {
    integer(text, 1, 1024)
}

pub fn size(text: &str) -> Parsed<usize> {
    let wrong = "must be a multiple of 32 from 32 to 4096";
    match text.parse::<usize>() {
        Ok(value) if (32..=4096).contains(&value) && value.is_multiple_of(32) => Ok(value),
        _ => Err(wrong.into()),
    }
}

pub fn device(text: &str) -> Parsed<Choice> {
    match text.split_once(':').unwrap_or((text, "0")) {
        ("auto", _) if text == "auto" => Ok(Choice::Auto),
        ("cpu", _) if text == "cpu" => Ok(Choice::Cpu),
        ("cuda", number) => match number.parse::<u16>() {
            Ok(number) => Ok(Choice::Cuda(number.into())),
            Err(_) => Err("must be auto, cpu, cuda or cuda:N".into()),
        },
        _ => Err("must be auto, cpu, cuda or cuda:N".into()),
    }
}

/// A device of a grid: the number of a GPU, or what `--device` takes but for `auto`, which may be any of the others.
pub fn grid_device(text: &str) -> Parsed<Choice> {
    match (text.parse::<u16>(), device(text)) {
        (Ok(number), _) => Ok(Choice::Cuda(number.into())),
        (_, Ok(choice)) if choice != Choice::Auto => Ok(choice),
        _ => Err("must be numbers of GPUs, or cpu, divided by commas, such as 0,1".into()),
    }
}

#[derive(Args)]
pub struct DeviceArgs {
    /// Where the arithmetic runs: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device)]
    device: Choice,
    /// Memory of a GPU that a run may take beside the images, in GB; with less, activations are made again where that
    /// suffices: slower, the same results [default: all that is free]
    #[arg(long, value_name = "GB", value_parser = positive)]
    max_memory: Option<f64>,
}

impl DeviceArgs {
    /// The device that was asked for.
    pub fn choice(&self) -> Choice {
        self.device
    }

    /// Bytes that a run may take on a GPU, if that was bounded.
    pub fn max_bytes(&self) -> Option<usize> {
        self.max_memory.map(|gigabytes| (gigabytes * 1e9) as usize)
    }

    /// Bounds the memory of an opened device as the user asks.
    ///
    /// # Errors
    /// When that is the CPU, whose memory is not bounded.
    pub fn limit(&self, place: &mut Place) -> Result<()> {
        match (self.max_bytes(), &*place) {
            (None, _) => Ok(()),
            (Some(_), Place::Cpu) => Err(gpu_only("--max-memory")),
            (Some(bytes), Place::Gpu(_)) => {
                place.limit_memory(bytes);
                Ok(())
            }
        }
    }

    /// Opens the device. Where a GPU was left out that this machine seems to have, says why.
    pub fn open(&self, progress: &Progress) -> Result<Place> {
        let (mut place, passed_over) = Place::open(self.device)?;
        if let Some(why) = passed_over.filter(|_| nvidia_gpus() > 0) {
            progress.warn(format!("there is a GPU, but the CPU is used: {why}"));
        }
        self.limit(&mut place)?;
        Ok(place)
    }
}

/// The refusal of a flag that means nothing on the CPU.
pub fn gpu_only(flag: &str) -> Error {
    Error::usage(format!("{flag} is for a GPU, and this would run on the CPU; leave it out, or name a GPU"))
}

/// GPUs that the kernel's NVIDIA driver lists.
pub fn nvidia_gpus() -> usize {
    std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, |entries| entries.count())
}

/// Patterns of adapted modules: a preset's or the user's own.
#[derive(Clone, Debug, PartialEq)]
pub struct Targets(pub Vec<String>);

pub fn targets(text: &str) -> Parsed<Targets> {
    if let Some(patterns) = lora::preset(text) {
        return Ok(Targets(patterns));
    }
    let patterns: Vec<String> = text.split(',').map(|pattern| pattern.trim().to_string()).collect();
    match patterns.iter().any(String::is_empty) {
        true => Err("must be attention, attention+ffn, all-linear, notebook, or patterns divided by commas".into()),
        false => Ok(Targets(patterns)),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodName {
    /// Full fine-tuning: every parameter
    Fft,
    /// Low-rank adapters on frozen weights
    Lora,
}

/// Parts of LoRA that stay the same over a grid.
#[derive(Args)]
#[command(next_help_heading = "LoRA")]
pub struct LoraArgs {
    /// Dropout at the adapters' inputs [default: 0]
    #[arg(long, value_name = "P", value_parser = dropout)]
    pub lora_dropout: Option<f32>,
    /// Modules that carry adapters: attention, attention+ffn, all-linear, notebook, or patterns divided by commas, each
    /// matched against the end of module names as peft does [default: attention; notebook under that protocol]
    #[arg(long, value_name = "PRESET|PATTERNS", value_parser = targets)]
    pub targets: Option<Targets>,
    /// Train the decode head too (peft's modules_to_save)
    #[arg(long)]
    pub train_head: bool,
}

impl LoraArgs {
    /// LoRA's hyper-parameters at this rank and alpha.
    pub fn options(&self, rank: usize, alpha: f64, protocol: Protocol) -> LoraOptions {
        let preset = match protocol {
            Protocol::Strict => "attention",
            Protocol::Notebook => "notebook",
        };
        let targets = self.targets.as_ref().map(|targets| targets.0.clone());
        LoraOptions {
            rank,
            alpha,
            dropout: self.lora_dropout.unwrap_or(0.0),
            targets: targets.or_else(|| lora::preset(preset)).unwrap_or_default(),
            train_head: self.train_head,
        }
    }

    /// The first of these flags that was given.
    pub fn given(&self) -> Option<&'static str> {
        [
            ("--lora-dropout", self.lora_dropout.is_some()),
            ("--targets", self.targets.is_some()),
            ("--train-head", self.train_head),
        ]
        .into_iter()
        .find_map(|(flag, given)| given.then_some(flag))
    }
}

/// Hyper-parameters that every run of a grid shares. What is left out keeps its default.
#[derive(Args)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Passes over the training split [default: 50]
    #[arg(long, value_name = "N", value_parser = epochs)]
    pub epochs: Option<usize>,
    /// Peak learning rate [default: 0.0005]
    #[arg(long, value_name = "RATE", value_parser = positive)]
    pub lr: Option<f64>,
    /// Images per micro-batch [default: 64]
    #[arg(long, value_name = "IMAGES", value_parser = count)]
    pub batch_size: Option<usize>,
    /// Micro-batches per update [default: 4]
    #[arg(long, value_name = "N", value_parser = count)]
    pub grad_accum: Option<usize>,
    /// Images per evaluation batch [default: 128]
    #[arg(long, value_name = "IMAGES", value_parser = count)]
    pub eval_batch_size: Option<usize>,
    /// Share of the updates spent warming up [default: 0.1]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub warmup_ratio: Option<f64>,
    /// Decoupled weight decay of AdamW [default: 0]
    #[arg(long, value_name = "RATE", value_parser = not_negative)]
    pub weight_decay: Option<f64>,
    /// Evaluations without a better loss before training stops [default: 10]
    #[arg(long, value_name = "EPOCHS", value_parser = epochs)]
    pub patience: Option<usize>,
    /// Seed of everything random [default: 42]
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// strict: one split, clean evaluation, correct metrics; notebook: the original experiment, quirks and all
    #[arg(long, value_enum, value_name = "PROTOCOL", default_value = "strict", hide_possible_values = true)]
    pub protocol: Protocol,
    /// Train on the images as they are: no flips, no changes of brightness or contrast
    #[arg(long)]
    pub no_augment: bool,
    /// Keep the order of train.txt in every epoch
    #[arg(long)]
    pub no_shuffle: bool,
    /// Largest stochastic-depth rate [default: the checkpoint's]
    #[arg(long, value_name = "P", value_parser = dropout)]
    pub drop_path: Option<f32>,
    /// Dropout before the classifier [default: the checkpoint's]
    #[arg(long, value_name = "P", value_parser = dropout)]
    pub classifier_dropout: Option<f32>,
}

impl TrainingArgs {
    /// The options of a run: what was given, else what `base` says.
    pub fn options(&self, base: TrainOptions, hf_names: HfNames) -> TrainOptions {
        TrainOptions {
            epochs: self.epochs.unwrap_or(base.epochs),
            lr: self.lr.unwrap_or(base.lr),
            batch_size: self.batch_size.unwrap_or(base.batch_size),
            grad_accum: self.grad_accum.unwrap_or(base.grad_accum),
            eval_batch_size: self.eval_batch_size.unwrap_or(base.eval_batch_size),
            warmup_ratio: self.warmup_ratio.unwrap_or(base.warmup_ratio),
            weight_decay: self.weight_decay.unwrap_or(base.weight_decay),
            patience: self.patience.unwrap_or(base.patience),
            seed: self.seed.unwrap_or(base.seed),
            protocol: self.protocol,
            augment: base.augment && !self.no_augment,
            shuffle: base.shuffle && !self.no_shuffle,
            drop_path: self.drop_path.or(base.drop_path),
            classifier_dropout: self.classifier_dropout.or(base.classifier_dropout),
            hf_names,
            ..base
        }
    }
}

/// Where images, split and names come from and go to.
#[derive(Args)]
#[command(next_help_heading = "Data and files")]
pub struct FileArgs {
    /// Side to which images of an archive or folder are resized, a multiple of 32 [default: 512]
    #[arg(long, value_name = "PIXELS", value_parser = size)]
    pub size: Option<usize>,
    /// Folder with train.txt and val.txt, one stem a line, in place of a split drawn from the seed
    #[arg(long, value_name = "DIR")]
    pub split: Option<PathBuf>,
    /// Where the packed copy of an archive or folder is kept [default: `cache` beside the runs' folders]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Module names in adapters: those of transformers 4 or 5
    #[arg(long, value_enum, value_name = "4|5", default_value = "4", hide_possible_values = true)]
    pub hf_names: HfNames,
    #[command(flatten)]
    pub device: DeviceArgs,
}

impl FileArgs {
    /// How the images are divided.
    pub fn split_plan(&self) -> SplitPlan {
        self.split.clone().map_or(SplitPlan::Seeded, SplitPlan::Given)
    }

    /// The cache for runs whose folders lie in `runs`.
    pub fn cache(&self, runs: &Path) -> PathBuf {
        self.cache.clone().unwrap_or_else(|| runs.join("cache"))
    }
}

/// `--model` of the training commands: `random` or a path.
pub fn model(text: &str) -> Parsed<ModelSource> {
    match text {
        "" => Err("must be a directory, a file, or random".into()),
        "random" => Ok(ModelSource::Random(Box::default())),
        path => Ok(ModelSource::Path(path.into())),
    }
}

/// The adapters' configuration that `lora` and the flags of rank and alpha describe; alpha is twice the rank by default.
pub fn lora_method(lora: &LoraArgs, rank: usize, alpha: Option<f64>, protocol: Protocol) -> Method {
    Method::Lora(lora.options(rank, alpha.unwrap_or(2.0 * rank as f64), protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_their_range_are_refused() {
        for bad in ["0", "1025", "-1", "4.5", "", "99999999999999999999"] {
            assert!(rank(bad).is_err(), "rank {bad}");
        }
        for bad in ["0", "-1", "nan", "inf", "1e999", "x"] {
            assert!(positive(bad).is_err(), "positive {bad}");
            assert!(ratio(bad).is_err(), "ratio {bad}");
        }
        for bad in ["1", "-0.1", "0.99999999", "nan"] {
            assert!(dropout(bad).is_err(), "dropout {bad}");
        }
        for bad in ["0", "31", "100", "4128", "-32"] {
            assert!(size(bad).is_err(), "size {bad}");
        }
        assert_eq!((rank("1024"), size("4096"), dropout("0")), (Ok(1024), Ok(4096), Ok(0.0)));
    }

    #[test]
    fn devices() {
        assert_eq!((device("cuda"), device("cuda:1")), (Ok(Choice::Cuda(0)), Ok(Choice::Cuda(1))));
        assert_eq!((device("auto"), device("cpu")), (Ok(Choice::Auto), Ok(Choice::Cpu)));
        for bad in ["gpu", "cuda:", "cuda:x", "cpu:0", "auto:1", ""] {
            assert!(device(bad).is_err() && grid_device(bad).is_err(), "{bad}");
        }
        assert!(grid_device("auto").is_err(), "it may be one of the others");
        assert_eq!((grid_device("1"), grid_device("cpu")), (Ok(Choice::Cuda(1)), Ok(Choice::Cpu)));
    }

    #[test]
    fn targets_are_a_preset_or_a_list() {
        assert_eq!(targets("attention").unwrap().0.len(), 4);
        assert_eq!(targets("query, mlp.dense1").unwrap().0, ["query", "mlp.dense1"]);
        assert!(targets("query,,key").is_err());
        assert!(targets("").is_err());
    }
}
