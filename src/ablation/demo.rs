//! The demo: a drawn dataset, a small model trained on a related one, and the whole grid on them. Every number that shapes
//! it stands here; the code path is that of the real thing.

use std::path::Path;

use super::lock::Lock;
use super::runner::{Setup, SplitPlan, run_one};
use super::source::ModelSource;
use crate::backend::Place;
use crate::dataset::demo::{self, Domain};
use crate::error::Result;
use crate::progress::Progress;
use crate::segformer::SegformerConfig;
use crate::train::options::{Method, TrainOptions};

/// Where the demo goes when no folder is named.
pub const FOLDER: &str = "segpeft-demo";

/// Side of the drawn images, pixels.
const SIZE: usize = 96;
/// Drawn images to pretrain on, and to adapt to.
const SOURCE_IMAGES: usize = 160;
const TARGET_IMAGES: usize = 100;
const SOURCE_EPOCHS: usize = 10;
const TARGET_EPOCHS: usize = 12;
const BATCH_SIZE: usize = 8;
const SOURCE_LR: f64 = 2e-3;
const TARGET_LR: f64 = 1e-3;

/// The hyper-parameters of the demo's runs.
pub fn options() -> TrainOptions {
    TrainOptions {
        epochs: TARGET_EPOCHS,
        lr: TARGET_LR,
        batch_size: BATCH_SIZE,
        grad_accum: 1,
        eval_batch_size: 16,
        patience: TARGET_EPOCHS,
        ..TrainOptions::default()
    }
}

/// A SegFormer of B0's shape at half its widths.
fn architecture() -> SegformerConfig {
    SegformerConfig {
        hidden_sizes: vec![16, 32, 80, 128],
        depths: vec![1, 1, 1, 1],
        decoder_hidden_size: 64,
        ..SegformerConfig::default()
    }
}

/// Draws both datasets and trains the source model, unless `out/demo` holds them already, and opens the target dataset with
/// that model as the starting point. `size` replaces the side of the images; `grid` tells the seed.
///
/// # Errors
/// Those of writing, training and reading.
pub fn setup(
    out: &Path,
    size: Option<usize>,
    grid: &TrainOptions,
    places: &[Place],
    progress: &Progress,
) -> Result<Setup> {
    let size = size.unwrap_or(SIZE);
    let folder = out.join("demo");
    let _lock = Lock::wait(&folder, ".lock", "prepare the demo", progress)?;
    let (source, target) = (folder.join(format!("source-{size}px")), folder.join(format!("target-{size}px")));
    demo::write_folder(&source, Domain::Source, SOURCE_IMAGES, size, progress)?;
    demo::write_folder(&target, Domain::Target, TARGET_IMAGES, size, progress)?;
    let cache = folder.join("cache");
    let random = ModelSource::Random(Box::new(architecture()));
    let pretraining = TrainOptions {
        method: Method::Fft,
        epochs: SOURCE_EPOCHS,
        patience: SOURCE_EPOCHS,
        lr: SOURCE_LR,
        seed: grid.seed,
        ..options()
    };
    let name = "source-model";
    let model = folder.join(name);
    progress.info("demo: a small model is first trained on plainer pictures, so that there is something to adapt");
    let part = progress.part("[demo]".into());
    let setup = Setup::open(&source, &cache, Some(size), &random, None, places.to_vec(), &part)?;
    let record = run_one(&setup, name, &pretraining, &SplitPlan::Seeded, 0, &model, &part)?;
    let dice = record.final_evaluation.eval_mean_dice.unwrap_or(f64::NAN);
    progress.info(format!("demo: it reaches Dice {dice:.4} there; now every configuration adapts it to drawn polyps"));
    Setup::open(&target, &cache, Some(size), &ModelSource::Path(model.join("final")), None, places.to_vec(), progress)
}
