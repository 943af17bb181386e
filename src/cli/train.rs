//! `train`: one run in one folder.

use std::path::{Path, PathBuf};

use clap::Args;

use super::args::{self, FileArgs, LoraArgs, MethodName, TrainingArgs};
use super::{Context, signals};
use crate::ablation::source::ModelSource;
use crate::ablation::{self, Setup};
use crate::backend::Place;
use crate::error::{Error, Result};
use crate::files;
use crate::formats;
use crate::progress::Progress;
use crate::report::results_table;
use crate::train::options::{LoraOptions, Method, TrainOptions};
use crate::train::record::RunRecord;

/// Train one configuration
///
/// Everything goes into the folder that --out names: resolved configuration, split, history and plots (refreshed while
/// it trains), checkpoints, the best model, metrics, and a zip of the results. A run that was interrupted continues when the same
/// command is given again; a finished one is kept.
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native train --data kvasir-seg.zip --model segformer-b0-ade/ --out runs/r16 --rank 16
  segpeft-native train --data kvasir-512.pack --model segformer-b0-ade/ --out runs/fft --method fft
  segpeft-native train --data kvasir-512.pack --model segformer-b0-ade/ --out runs/r16-more \\
    --adapter runs/r16/final

Comparable with the reference, number by number:
  segpeft-native train --data kvasir-seg.zip --model segformer-b0-ade/ --out runs/parity \\
    --size 128 --no-augment --no-shuffle --drop-path 0 --classifier-dropout 0 --device cpu")]
pub struct Train {
    /// Packed file, archive (.zip), or folder that holds images/ and masks/
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Hugging Face directory or weights file of a SegFormer; `random` for fresh B0 weights
    #[arg(long, value_name = "PATH|random", value_parser = args::model)]
    model: ModelSource,
    /// Folder of the run
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What is trained: fft (every parameter) or lora (adapters)
    #[arg(long, value_enum, value_name = "METHOD", default_value = "lora", hide_possible_values = true)]
    method: MethodName,
    /// Start from this adapter; rank, alpha and targets are then its own
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Rank r of the adapters [default: 16]
    #[arg(long, value_name = "R", value_parser = args::rank, help_heading = "LoRA")]
    rank: Option<usize>,
    /// Numerator of the adapters' scale alpha / r [default: twice the rank]
    #[arg(long, value_name = "ALPHA", value_parser = args::positive, help_heading = "LoRA")]
    lora_alpha: Option<f64>,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    files: FileArgs,
}

impl Train {
    pub fn run(&self, context: &Context) -> Result<()> {
        let place = self.files.device.open(&context.progress)?;
        let options = TrainOptions {
            method: self.method()?,
            ..self.training.options(TrainOptions::default(), self.files.hf_names)
        };
        signals::install(&context.progress)?;
        // Made first, so that a folder that cannot be written is found before the images are packed, and its full name is
        // known even for `--out .`.
        let new = !self.out.exists();
        files::create_folder(&self.out)?;
        let outcome = self.train(place, &options, &context.progress);
        if outcome.is_err() && new {
            // Unless something stands in it, nothing came of it; what went wrong is the error to report.
            let _ = std::fs::remove_dir(&self.out);
        }
        let record = outcome?;
        context.result(&record, || {
            format!("{}results: {}\n", results_table(std::slice::from_ref(&record)), self.out.display())
        })
    }

    /// Trains in the folder, which is there.
    fn train(&self, place: Place, options: &TrainOptions, progress: &Progress) -> Result<RunRecord> {
        let full = self.out.canonicalize().map_err(|e| Error::io(&self.out, "find the folder", e))?;
        let name = full.file_name().map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned());
        let beside = self.out.parent().filter(|_| self.out.file_name().is_some()).unwrap_or(Path::new(".."));
        let setup = Setup::open(
            &self.data,
            &self.files.cache(beside),
            self.files.size,
            &self.model,
            self.adapter.as_deref(),
            vec![place],
            progress,
        )?;
        setup.announce(options, false, progress)?;
        ablation::run_one(&setup, &name, options, &self.files.split_plan(), 0, &self.out, progress)
    }

    fn method(&self) -> Result<Method> {
        if self.method == MethodName::Fft {
            let given = [
                ("--rank", self.rank.is_some()),
                ("--lora-alpha", self.lora_alpha.is_some()),
                ("--adapter", self.adapter.is_some()),
            ];
            let flag = given.into_iter().find_map(|(flag, given)| given.then_some(flag)).or_else(|| self.lora.given());
            return match flag {
                Some("--adapter") => Err(Error::usage(
                    "--adapter needs --method lora; to fine-tune all of an adapted model, merge it first (export --merge)",
                )),
                Some(flag) => Err(Error::usage(format!("{flag} needs --method lora; leave it out for --method fft"))),
                None => Ok(Method::Fft),
            };
        }
        let Some(adapter) = &self.adapter else {
            return Ok(args::lora_method(&self.lora, self.rank.unwrap_or(16), self.lora_alpha, self.training.protocol));
        };
        let there = formats::adapter::read(adapter)?.config;
        // The alpha that gives the adapter's scale as alpha / r, which is how it is trained and written here.
        let alpha = if there.use_rslora { there.scale() * there.r as f64 } else { there.lora_alpha };
        let differs = [
            ("--rank", self.rank.is_some_and(|rank| rank != there.r), there.r.to_string()),
            ("--lora-alpha", self.lora_alpha.is_some_and(|a| a != alpha), alpha.to_string()),
            (
                "--targets",
                self.lora.targets.as_ref().is_some_and(|targets| targets.0 != there.target_modules),
                there.target_modules.join(","),
            ),
        ];
        if let Some((flag, _, value)) = differs.into_iter().find(|(_, differs, _)| *differs) {
            return Err(Error::usage(format!(
                "{flag}: the adapter {} has {value}; leave {flag} out",
                adapter.display()
            )));
        }
        Ok(Method::Lora(LoraOptions {
            rank: there.r,
            alpha,
            dropout: self.lora.lora_dropout.unwrap_or(there.lora_dropout),
            targets: there.target_modules,
            train_head: self.lora.train_head || !there.modules_to_save.is_empty(),
        }))
    }
}
