//! `export`: a model or adapter in another form.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::path;
use super::{Context, args};
use crate::ablation::source::{ModelSource, Source, trained_size};
use crate::dataset::DEFAULT_SIZE;
use crate::error::{Error, Result};
use crate::formats::{self, HfNames};
use crate::train::options::TrainOptions;
use crate::train::{self, Weights};

/// Write a model or adapter in another form
///
/// With --merge: the adapter folded into the model, as a full Hugging Face directory. Without: the adapter under the
/// names of transformers 4 or 5, or, if there is no --adapter, the model as config.json and model.safetensors.
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native export --model segformer-b0-ade/ --merge --out merged/ \\
    --adapter outputs/lora_r16_alpha32/final
  segpeft-native export --adapter outputs/lora_r16_alpha32/final --hf-names 5 --out adapter-5/
  segpeft-native export --model old/pytorch_model.bin --out as-safetensors/")]
pub struct Export {
    /// Hugging Face directory or weights file of a SegFormer; `random` for the fresh weights that a run began with
    #[arg(long, value_name = "PATH|random", required_unless_present = "adapter", value_parser = args::model)]
    model: Option<ModelSource>,
    /// The adapter
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Fold the adapter into the model
    #[arg(long, requires = "model", requires = "adapter")]
    merge: bool,
    /// Folder to write; new or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Module names of the adapter: those of transformers 4 or 5
    #[arg(long, value_enum, value_name = "4|5", default_value = "4", hide_possible_values = true)]
    hf_names: HfNames,
    /// Side of the images the model is for, noted in preprocessor_config.json [default: what it was trained on; else 512 for a
    /// model]
    #[arg(long, value_name = "PIXELS", value_parser = args::size)]
    size: Option<usize>,
    /// Seed of the run that `--model random` means [default: train's]
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
}

impl Export {
    pub fn run(&self, context: &Context) -> Result<()> {
        if std::fs::read_dir(&self.out).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(Error::usage(format!("--out {}: the folder is not empty; name a new one", self.out.display())));
        }
        let as_model = self.merge || self.adapter.is_none();
        let is_random = matches!(self.model, Some(ModelSource::Random(_)));
        if self.seed.is_some() && !(is_random && as_model) {
            return Err(Error::usage("--seed: is for writing --model random; leave it out"));
        }
        if self.model.is_some() && !as_model {
            return Err(Error::usage("--model: an adapter is written without it; leave it out, or give --merge"));
        }
        if is_random && self.adapter.is_some() && self.seed.is_none() {
            return Err(Error::usage(
                "--model random: which weights the adapter belongs to is not known; give the run's --seed",
            ));
        }
        let what = match (&self.model, &self.adapter) {
            (Some(model), adapter) if as_model => {
                let mut source = Source::open(model, adapter.as_deref(), &context.progress)?;
                if let ModelSource::Random(config) = model {
                    let seed = self.seed.unwrap_or(TrainOptions::default().seed);
                    source.start.weights = Weights::Checkpoint(train::fresh_checkpoint(config, seed));
                }
                let merged = train::merged(&source.start, &context.progress)?;
                let size = self.size.or(source.image_size).unwrap_or(DEFAULT_SIZE);
                formats::checkpoint::write(&self.out, &merged.config, &merged.tensors, size)?;
                if self.merge { "merged model" } else { "model" }
            }
            (_, Some(adapter)) => {
                let size = self.size.or_else(|| trained_size(adapter));
                let adapter = formats::adapter::read(adapter)?;
                formats::adapter::write(&self.out, &adapter, self.hf_names)?;
                if let Some(size) = size {
                    formats::write_image_size(&self.out, size)?;
                }
                "adapter"
            }
            // clap lets nothing else through.
            (_, None) => return Err(Error::usage("--model or --adapter is needed")),
        };
        context
            .result(&json!({ "written": what, "out": path(&self.out) }), || format!("{what}: {}\n", self.out.display()))
    }
}
