//! Metrics and logits of a model in evaluation mode.

use std::time::Instant;

use super::metrics::Confusion;
use super::record::HistoryRow;
use super::start::{Start, merged, on_cpu, on_gpu};
use crate::backend::{Backend, Grid, Place, Sample};
use crate::dataset::{Augment, PackedDataset};
use crate::error::Kind;
use crate::formats::Checkpoint;
use crate::progress::{Progress, interrupted};
use crate::segformer::{Model, ModelOptions, Trainable};
use crate::{Error, Result};

/// Images whose activations are held at once when a model only evaluates on the CPU: so many, or as many as there are threads.
const CPU_BATCH: usize = 8;

/// Evaluates the images `indices` of `data`, each augmented by `augment`: loss as the mean of batch means of
/// `batch_size` images, weighted by their sizes, and all metrics. Epoch and step are left to the caller.
pub(super) fn measure<B: Backend>(
    model: &mut Model<B>,
    data: &PackedDataset,
    indices: &[usize],
    batch_size: usize,
    augment: impl Fn(usize) -> Augment,
    advance: impl Fn(u64),
) -> Result<HistoryRow> {
    let started = Instant::now();
    let (labels, model_batch) = (model.config().num_labels(), model.batch());
    model.begin_evaluation();
    let parts = || indices.chunks(batch_size).map(|batch| batch.chunks(model_batch));
    for part in parts().flatten() {
        if interrupted() {
            return Err(Error::new(Kind::Interrupted, "interrupted"));
        }
        let samples: Vec<Sample<'_>> = part.iter().map(|&i| sample(data, i, augment(i))).collect();
        model.measure(&samples);
        model.backend().check()?;
        advance(part.len() as u64);
    }
    let measured = model.end_evaluation();
    model.backend().check()?;
    let mut confusion = Confusion::new(labels);
    let (mut losses, mut counts) = (measured.loss.iter(), measured.counts.chunks_exact(labels * labels));
    let mut loss = 0.0;
    for batch in parts() {
        let (mut batch_loss, mut pixels, mut images) = (0.0, 0u64, 0);
        for part in batch {
            batch_loss += losses.by_ref().take(part.len()).sum::<f64>();
            for counts in counts.by_ref().take(part.len()) {
                pixels += counts.iter().sum::<u64>();
                confusion.add(counts);
            }
            images += part.len();
        }
        loss += batch_loss / pixels.max(1) as f64 * images as f64;
    }
    let seconds = started.elapsed().as_secs_f64();
    let batches = indices.len().div_ceil(batch_size);
    Ok(HistoryRow {
        eval_loss: Some(loss / indices.len().max(1) as f64),
        eval_runtime: Some(seconds),
        eval_samples_per_second: Some(indices.len() as f64 / seconds),
        eval_steps_per_second: Some(batches as f64 / seconds),
        ..confusion.row()
    })
}

/// Image `index` of `data` as a sample.
pub fn sample(data: &PackedDataset, index: usize, augment: Augment) -> Sample<'_> {
    Sample { index, pixels: data.pixels(index), labels: data.mask(index), augment }
}

/// A model that only evaluates, in batches of up to `batch` images, as `on_cpu` or `on_gpu` make it.
fn evaluating(
    place: &Place,
    checkpoint: &Checkpoint,
    size: usize,
    batch: usize,
    progress: &Progress,
) -> Result<Box<dyn Evaluating>> {
    let Checkpoint { config, tensors } = checkpoint;
    let nothing = &Trainable::Nothing;
    let lower = |n| format!("--eval-batch-size {n}");
    let remedy = if batch == 1 { "--size" } else { "--eval-batch-size or --size" };
    let (model, plan): (Box<dyn Evaluating>, _) = match place {
        Place::Cpu => {
            let batch = CPU_BATCH.max(rayon::current_num_threads()).min(batch);
            let (model, plan) = on_cpu(config, ModelOptions { size, batch }, nothing, tensors, remedy)?;
            (Box::new(model), plan)
        }
        Place::Gpu(gpu) => {
            let (model, plan) = on_gpu(gpu, config, ModelOptions { size, batch }, nothing, tensors, &lower)?;
            (Box::new(model), plan)
        }
    };
    progress.details(plan.lines());
    Ok(model)
}

/// A model in evaluation mode on some device.
trait Evaluating {
    fn measure(
        &mut self,
        data: &PackedDataset,
        indices: &[usize],
        batch_size: usize,
        advance: &dyn Fn(u64),
    ) -> Result<HistoryRow>;
    fn logits(&mut self, sample: Sample<'_>) -> Result<Vec<f32>>;
    fn logit_grid(&self) -> Grid;
}

impl<B: Backend> Evaluating for Model<B> {
    fn measure(
        &mut self,
        data: &PackedDataset,
        indices: &[usize],
        batch_size: usize,
        advance: &dyn Fn(u64),
    ) -> Result<HistoryRow> {
        measure(self, data, indices, batch_size, |_| Augment::IDENTITY, advance)
    }

    fn logits(&mut self, sample: Sample<'_>) -> Result<Vec<f32>> {
        let logits = Model::logits(self, &[sample]).swap_remove(0);
        self.backend().check()?;
        Ok(logits)
    }

    fn logit_grid(&self) -> Grid {
        Model::logit_grid(self)
    }
}

/// Evaluates a model on the images `indices` of `data`, without augmentation.
///
/// # Errors
/// When model and adapter do not fit together, the model does not have the dataset's classes, or on interruption.
pub fn evaluate(
    place: &Place,
    start: &Start,
    data: &PackedDataset,
    indices: &[usize],
    batch_size: usize,
    progress: &Progress,
) -> Result<HistoryRow> {
    let checkpoint = merged(start, progress)?;
    if checkpoint.config.num_labels() != 2 {
        return Err(Error::usage(format!(
            "--model: it tells {} classes apart, the dataset has 2; fine-tune it first (train)",
            checkpoint.config.num_labels()
        )));
    }
    let mut model = evaluating(place, &checkpoint, data.size(), batch_size.min(indices.len().max(1)), progress)?;
    let bar = progress.bar("evaluating", indices.len() as u64, "images");
    model.measure(data, indices, batch_size, &|n| bar.inc(n))
}

/// A model that segments single pictures.
pub struct Predictor {
    model: Box<dyn Evaluating>,
    size: usize,
    labels: usize,
}

impl Predictor {
    /// A predictor for pictures of `size` by `size` pixels.
    ///
    /// # Errors
    /// When model and adapter do not fit together, or the device cannot hold them.
    pub fn new(place: &Place, start: &Start, size: usize, progress: &Progress) -> Result<Self> {
        let checkpoint = merged(start, progress)?;
        let labels = checkpoint.config.num_labels();
        Ok(Self { model: evaluating(place, &checkpoint, size, 1, progress)?, size, labels })
    }

    /// Number of classes.
    pub fn labels(&self) -> usize {
        self.labels
    }

    /// Rows and columns of the logits.
    pub fn grid(&self) -> Grid {
        self.model.logit_grid()
    }

    /// Logits `(labels, rows, columns)` of an RGB picture `(size, size, 3)`.
    ///
    /// # Errors
    /// When the picture has another size, or the device fails.
    pub fn logits(&mut self, pixels: &[u8]) -> Result<Vec<f32>> {
        let size = self.size;
        if pixels.len() != size * size * 3 {
            return Err(Error::new(Kind::Internal, format!("the picture has {} bytes, not {size}²·3", pixels.len())));
        }
        let sample = Sample { index: 0, pixels, labels: &[], augment: Augment::IDENTITY };
        self.model.logits(sample)
    }
}
