//! `eval`: metrics of a model on a dataset.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args::{self, DeviceArgs};
use super::{Context, output};
use crate::ablation::open_data;
use crate::ablation::source::{ModelSource, Source};
use crate::dataset::{DEFAULT_SIZE, Split};
use crate::error::{Error, Result};
use crate::progress::duration;
use crate::train;

/// Evaluate a model, with or without an adapter, on a dataset
///
/// Metrics come from one confusion matrix over all pixels, images as they are (no augmentation).
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native eval --data kvasir-seg.zip --model outputs/segformer_fft_baseline/final
  segpeft-native eval --data kvasir-512.pack --model segformer-b0-ade/ \\
    --adapter outputs/lora_r16_alpha32/final --split outputs --part val --json")]
pub struct Eval {
    /// Packed file, archive (.zip), or folder that holds images/ and masks/
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Hugging Face directory or weights file of a SegFormer
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Adapter on top of the model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Folder with train.txt and val.txt, one stem a line
    #[arg(long, value_name = "DIR")]
    split: Option<PathBuf>,
    /// Which images: train, val or all [default: val with --split, else all]
    #[arg(long, value_enum, value_name = "PART", hide_possible_values = true)]
    part: Option<Part>,
    /// Images per batch
    #[arg(long, value_name = "IMAGES", default_value = "128", value_parser = args::count)]
    eval_batch_size: usize,
    /// Side to which images of an archive or folder are resized, a multiple of 32 [default: what the model was trained on,
    /// else 512]
    #[arg(long, value_name = "PIXELS", value_parser = args::size)]
    size: Option<usize>,
    /// Where the packed copy of an archive or folder is kept
    #[arg(long, value_name = "DIR", default_value = "cache")]
    cache: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Train,
    Val,
    All,
}

impl Eval {
    pub fn run(&self, context: &Context) -> Result<()> {
        let place = self.device.open(&context.progress)?;
        let part = self.part.unwrap_or(if self.split.is_some() { Part::Val } else { Part::All });
        if part != Part::All && self.split.is_none() {
            return Err(Error::usage("--part: which images are train and val is not known; give --split DIR too"));
        }
        let source = Source::open(&ModelSource::Path(self.model.clone()), self.adapter.as_deref(), &context.progress)?;
        let default = source.image_size.unwrap_or(DEFAULT_SIZE);
        let data = open_data(&self.data, &self.cache, self.size, default, &context.progress)?;
        if let Some(size) = source.image_size.filter(|&size| size != data.size()) {
            context.progress.warn(format!(
                "the model was trained on images of {size} x {size}, these are {0} x {0}: other figures than in training",
                data.size()
            ));
        }
        let split = self.split.as_ref().map(|folder| Split::read(folder, &data)).transpose()?;
        let indices = match (part, split) {
            (Part::Train, Some(split)) => split.train,
            (Part::Val, Some(split)) => split.val,
            _ => (0..data.len()).collect(),
        };
        let row = train::evaluate(&place, &source.start, &data, &indices, self.eval_batch_size, &context.progress)?;
        context.result(&row, || {
            let metric = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.4}"));
            let extra = row.extra.clone().unwrap_or_default();
            output::fields(&[
                ("images", indices.len().to_string()),
                ("loss", metric(row.eval_loss)),
                ("Dice, mean over classes", metric(row.eval_mean_dice)),
                ("IoU, mean over classes", metric(row.eval_mean_iou)),
                ("accuracy, mean over classes", metric(row.eval_accuracy)),
                ("polyp Dice, mean over images", metric(Some(extra.eval_image_mean_dice))),
                ("polyp IoU, mean over images", metric(Some(extra.eval_image_mean_iou))),
                ("time", row.eval_runtime.map_or("-".into(), duration)),
            ])
        })
    }
}
