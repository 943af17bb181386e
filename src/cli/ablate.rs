//! `ablate`: the grid.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::args::{self, FileArgs, LoraArgs, TrainingArgs};
use super::output::path;
use super::{Context, signals};
use crate::ablation::source::ModelSource;
use crate::ablation::{self, GridOutcome, GridPlan, RANKS, RATIOS, Setup, demo};
use crate::backend::{Choice, Place};
use crate::error::{Error, Result};
use crate::report::results_table;
use crate::train::options::{Method, TrainOptions};

/// Run the grid: full fine-tuning against LoRA at every rank and alpha
///
/// Each run has its folder under --out. Summary, figures and page are refreshed after every run. Interrupted, the same
/// command continues: finished runs are kept. Several processes may share --out, each with a --slice or with --only; a run
/// that one of them holds is left to it.
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native ablate --demo
  segpeft-native ablate --data kvasir-seg.zip --model segformer-b0-ade/ --out outputs
  segpeft-native ablate --data kvasir-seg.zip --model segformer-b0-ade/ --out outputs \\
    --ranks 8,16 --ratios 2 --no-fft
  segpeft-native ablate --data kvasir-seg.zip --model segformer-b0-ade/ --out outputs \\
    --only lora_r16_alpha32

On two GPUs of this machine:
  segpeft-native ablate --data kvasir-512.pack --model segformer-b0-ade/ --out outputs \\
    --devices 0,1

As a Slurm array of four tasks (--array=1-4), then `segpeft-native report outputs`:
  segpeft-native ablate --data kvasir-512.pack --model segformer-b0-ade/ --out outputs \\
    --slice $SLURM_ARRAY_TASK_ID/4")]
pub struct Ablate {
    /// Packed file, archive (.zip), or folder that holds images/ and masks/
    #[arg(long, value_name = "PATH", required_unless_present = "demo")]
    data: Option<PathBuf>,
    /// Hugging Face directory or weights file of a SegFormer; `random` for fresh B0 weights
    #[arg(long, value_name = "PATH|random", required_unless_present = "demo", value_parser = args::model)]
    model: Option<ModelSource>,
    /// Folder of the runs' folders and the summary [default with --demo: segpeft-demo]
    #[arg(long, value_name = "DIR", required_unless_present = "demo")]
    out: Option<PathBuf>,
    /// Draw a dataset, train a small model to adapt, and run the grid on them at reduced size and length: no download, no
    /// GPU, minutes
    #[arg(long, conflicts_with_all = ["data", "model", "split", "cache"])]
    demo: bool,
    /// Ranks r [default: 4,8,16,32,64]
    #[arg(long, value_name = "R,...", value_delimiter = ',', default_values_t = RANKS, hide_default_value = true, value_parser = args::rank, help_heading = "Grid")]
    ranks: Vec<usize>,
    /// Ratios alpha / r [default: 1,2,4]
    #[arg(long, value_name = "RATIO,...", value_delimiter = ',', default_values_t = RATIOS, hide_default_value = true, value_parser = args::ratio, help_heading = "Grid")]
    ratios: Vec<f64>,
    /// Leave out full fine-tuning
    #[arg(long, help_heading = "Grid")]
    no_fft: bool,
    /// Only this run of the grid; may be repeated
    #[arg(long, value_name = "RUN", help_heading = "Grid")]
    only: Vec<String>,
    /// Only part I of N of the grid, counted from 1
    #[arg(long, value_name = "I/N", value_parser = slice, help_heading = "Grid")]
    slice: Option<(usize, usize)>,
    /// Devices that share the grid, each taking the next run when it is done with one: numbers of GPUs divided by commas,
    /// each once; or cpu, as often as runs shall share it
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = args::grid_device, conflicts_with = "device", help_heading = "Grid")]
    devices: Vec<Choice>,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    files: FileArgs,
}

fn slice(text: &str) -> std::result::Result<(usize, usize), String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match parts {
        Some((i, n)) if 1 <= i && i <= n => Ok((i, n)),
        _ => Err("must be I/N with I from 1 to N, such as 1/4".into()),
    }
}

impl Ablate {
    pub fn run(&self, context: &Context) -> Result<()> {
        let progress = &context.progress;
        let places = match self.devices.as_slice() {
            [] => vec![self.files.device.open(progress)?],
            choices => (self.distinct(choices)?.iter())
                .map(|&choice| {
                    let (mut place, _) = Place::open(choice)?;
                    self.files.device.limit(&mut place)?;
                    Ok(place)
                })
                .collect::<Result<Vec<_>>>()?,
        };
        let base = if self.demo { demo::options() } else { TrainOptions::default() };
        let options = self.training.options(base, self.files.hf_names);
        // Rank and alpha are the grid's.
        let lora = self.lora.options(1, 1.0, options.protocol);
        let runs = ablation::grid(&self.ranks, &self.ratios, !self.no_fft, &lora);
        let selected = self.select(&runs)?;
        let out = self.out.clone().unwrap_or_else(|| demo::FOLDER.into());
        signals::install(progress)?;
        let setup = match (&self.data, &self.model) {
            (Some(data), Some(model)) => {
                Setup::open(data, &self.files.cache(&out), self.files.size, model, None, places, progress)?
            }
            _ => demo::setup(&out, self.files.size, &options, &places, progress)?,
        };
        let plan = GridPlan { runs, selected, options, split: self.files.split_plan(), out };
        let outcome = ablation::run_grid(&setup, &plan, progress)?;
        self.show(&outcome, &plan.out, context)?;
        match outcome.failed.first() {
            None => Ok(()),
            Some((_, error)) => {
                let names: Vec<&str> = outcome.failed.iter().map(|(name, _)| name.as_str()).collect();
                Err(Error::new(error.kind, format!("failed: {} (run_error.json in each folder)", names.join(", "))))
            }
        }
    }

    /// The devices, each GPU at most once.
    fn distinct<'a>(&self, choices: &'a [Choice]) -> Result<&'a [Choice]> {
        let twice = |(i, choice): (usize, &Choice)| matches!(choice, Choice::Cuda(_)) && choices[..i].contains(choice);
        match choices.iter().enumerate().any(twice) {
            true => Err(Error::usage("--devices: names a GPU twice; one run at a time uses all of it: name each once")),
            false => Ok(choices),
        }
    }

    /// Positions of the runs this process takes.
    fn select(&self, runs: &[(String, Method)]) -> Result<Vec<usize>> {
        let names: Vec<&str> = runs.iter().map(|(name, _)| name.as_str()).collect();
        if let Some(unknown) = self.only.iter().find(|name| !names.contains(&name.as_str())) {
            return Err(Error::usage(format!("--only {unknown}: not in this grid; it has {}", names.join(", "))));
        }
        let (part, parts) = self.slice.unwrap_or((1, 1));
        // Dealt out in turn, so that every part has small ranks and large ones.
        let mine = |&index: &usize| {
            index % parts == part - 1 && (self.only.is_empty() || self.only.iter().any(|name| name == names[index]))
        };
        Ok((0..runs.len()).filter(mine).collect())
    }

    fn show(&self, outcome: &GridOutcome, out: &Path, context: &Context) -> Result<()> {
        let page = (!outcome.records.is_empty()).then(|| out.join("index.html"));
        let failed: Vec<_> =
            outcome.failed.iter().map(|(name, e)| json!({ "name": name, "error": e.to_string() })).collect();
        let document = json!({
            "out": path(out), "page": page.as_deref().map(path), "runs": outcome.records, "busy": outcome.busy, "failed": failed,
        });
        context.result(&document, || {
            let Some(page) = &page else { return "no run is finished yet\n".into() };
            format!("{}page: {}\n", results_table(&outcome.records), page.display())
        })
    }
}
