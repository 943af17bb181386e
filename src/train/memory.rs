//! The memory of a run: planned before anything is allocated on a GPU, and chosen so that it fits.

use serde::Serialize;

use super::options::TrainOptions;
use super::run::adamw;
use crate::backend::cuda::{Cuda, Dry, Joint};
use crate::backend::{Backend, Memory, Room, Sample};
use crate::dataset::Augment;
use crate::error::Kind;
use crate::progress::{byte_size, count};
use crate::segformer::{Model, ModelOptions, SegformerConfig, Step, StepRandom, Trainable};
use crate::{Error, Result};

/// What a run takes, its dataset aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Bytes in all.
    pub bytes: usize,
    /// Bytes that it may take: on a GPU what is free, or `--max-memory`.
    pub limit: Option<usize>,
    /// Whether a GPU makes activations again in the backward pass that it could keep. The CPU always does, and says false.
    pub activations_made_again: bool,
    /// Images of the largest batch.
    pub batch: usize,
    /// Side of the images.
    pub size: usize,
    /// Bytes by what they hold, the largest first.
    pub parts: Vec<Part>,
}

/// A part of a [`MemoryPlan`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What it holds.
    pub what: &'static str,
    /// Bytes.
    pub bytes: usize,
}

impl MemoryPlan {
    /// The plan of a model on the CPU: its own buffers, and the optimizer's.
    pub(super) fn on_cpu<B: Backend>(model: &Model<B>) -> Self {
        let parts = buffers(model);
        let bytes = parts.iter().map(|part| part.bytes).sum();
        Self::new(model, bytes, None, false, parts)
    }

    /// The plan that `model`, after all that a run does, has followed on a device that counts.
    pub(super) fn on_gpu(model: &Model<Cuda<Dry>>, limit: Option<usize>) -> Self {
        let mut parts = buffers(model);
        let [scratch, staging] = model.backend().rooms();
        parts.push(Part { what: "partial sums of single operations", bytes: scratch });
        parts.push(Part { what: "what is on its way from the host", bytes: staging });
        let bytes = model.backend().device().bytes();
        let named: usize = parts.iter().map(|part| part.bytes).sum();
        parts.push(Part { what: "tables of tensors, and alignment", bytes: bytes.saturating_sub(named) });
        Self::new(model, bytes, limit, !model.backend().remembers(), parts)
    }

    fn new<B: Backend>(
        model: &Model<B>,
        bytes: usize,
        limit: Option<usize>,
        activations_made_again: bool,
        mut parts: Vec<Part>,
    ) -> Self {
        parts.retain(|part| part.bytes > 0);
        parts.sort_by_key(|part| std::cmp::Reverse(part.bytes));
        Self { bytes, limit, activations_made_again, batch: model.batch(), size: model.size(), parts }
    }

    /// The plan in words: a line, then one for each part.
    pub fn lines(&self) -> Vec<String> {
        let of = self.limit.map_or(String::new(), |limit| format!(" of {} that may be used", byte_size(limit as u64)));
        let again = match (self.activations_made_again, self.limit) {
            (true, _) => "; some activations are made again in the backward pass, to save memory",
            (false, Some(_)) => "; all activations are kept",
            (false, None) => "",
        };
        let first = format!(
            "planned memory: {}{of}, for batches of {} at {2} x {2}{again}",
            byte_size(self.bytes as u64),
            count(self.batch, "image"),
            self.size
        );
        let part = |part: &Part| format!("  {:<36} {:>8}", part.what, byte_size(part.bytes as u64));
        [first].into_iter().chain(self.parts.iter().map(part)).collect()
    }
}

/// The model's buffers and its optimizer's.
fn buffers<B: Backend>(model: &Model<B>) -> Vec<Part> {
    let buffers = model.buffers();
    let trained: usize = model.trained().map(|(_, id)| model.plan().specs[id.0].len()).sum();
    [
        ("weights", buffers.weights),
        ("gradients", buffers.gradients),
        ("activations", buffers.activations),
        ("scratch that layers share", buffers.scratch),
        ("moments of the optimizer", 2 * trained * size_of::<f32>()),
    ]
    .map(|(what, bytes)| Part { what, bytes })
    .into()
}

/// A run's plan, with the model that followed it.
pub(super) struct Planned {
    /// The model, after all that a run does.
    pub model: Model<Cuda<Dry>>,
    /// What it took.
    pub plan: MemoryPlan,
}

/// Plans a run within `room` of the GPU called `name`: with all activations kept if that fits, else with some made again; an
/// operation may be taken `apart`. `lower` says how the user asks for smaller batches.
///
/// # Errors
/// When neither fits, with the largest batch that would.
pub(super) fn fit(
    config: &SegformerConfig,
    options: ModelOptions,
    trainable: &Trainable,
    (name, room): (&str, Room),
    apart: Option<Joint>,
    lower: &dyn Fn(usize) -> String,
) -> Result<Planned> {
    let planned = |batch, saves| {
        let options = ModelOptions { batch, ..options };
        let model = planned_on_gpu(config, options, trainable, (saves, apart), |_| ());
        Planned { plan: MemoryPlan::on_gpu(&model, Some(room.bytes)), model }
    };
    let fits = |planned: &Planned| planned.plan.bytes <= room.bytes;
    let mut best = planned(options.batch, false);
    if !fits(&best) {
        best = planned(options.batch, true);
    }
    if fits(&best) {
        return Ok(best);
    }
    // Memory grows with the batch.
    let fitting = (1..options.batch).collect::<Vec<_>>().partition_point(|&batch| fits(&planned(batch, true)));
    let (bound, more) = if room.limited { (" by --max-memory", " or raise --max-memory") } else { ("", "") };
    let remedy = match fitting {
        0 => format!("not even one fits: lower --size{more}"),
        n => format!("{n} would fit: {}", lower(n)),
    };
    Err(Error::new(
        Kind::Device,
        format!(
            "{name}: batches of {} at {3} x {3} need {}, {} may be used{bound}; {remedy}",
            count(options.batch, "image"),
            byte_size(best.plan.bytes as u64),
            byte_size(room.bytes as u64),
            options.size,
        ),
    ))
}

/// A model on a device that only counts, after all that a run does: what its device has handed out is what a run needs. `saves`
/// memory by making activations again; an operation may be taken `apart`. Calls `between` when the model is made, after a training
/// step over a whole batch (if it trains), and after an evaluation.
pub(super) fn planned_on_gpu(
    config: &SegformerConfig,
    options: ModelOptions,
    trainable: &Trainable,
    (saves, apart): (bool, Option<Joint>),
    between: impl FnMut(&Model<Cuda<Dry>>),
) -> Model<Cuda<Dry>> {
    let new = || Cuda::new(Dry::default()).saving_memory(saves).taking_apart(apart);
    // The rooms that operations share do not always grow with the batch, so every size a batch may have is tried.
    let mut scout = Model::new(new(), config, options, trainable);
    for images in 1..=options.batch {
        dry_steps(&mut scout, images, |_| ());
    }
    let backend = new();
    backend.reserve(scout.backend().rooms());
    let mut model = Model::new(backend, config, options, trainable);
    dry_steps(&mut model, options.batch, between);
    model
}

/// A training step (one micro-batch, one update) if the model trains, and an evaluation, on blank pictures.
fn dry_steps(model: &mut Model<Cuda<Dry>>, images: usize, mut between: impl FnMut(&Model<Cuda<Dry>>)) {
    let size = model.size();
    let (pixels, labels) = (vec![0; size * size * 3], vec![0; size * size]);
    let blank = |index| Sample { index, pixels: &pixels, labels: &labels, augment: Augment::IDENTITY };
    let samples: Vec<Sample<'_>> = (0..images).map(blank).collect();
    model.refresh();
    let mut moments = model.moments();
    between(model);
    if !moments.first.is_empty() {
        let options = TrainOptions::default();
        let (random, update) = (StepRandom { seed: 0, step: 0 }, adamw(&options, options.lr, 1));
        let decays = vec![true; moments.first.len()];
        let step = Step { micro_batches: &[&samples], random, update, decays: &decays };
        model.train_step(&step, &mut moments, |_| true);
    }
    between(model);
    model.evaluate(&samples);
    between(model);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: ModelOptions = ModelOptions { size: 64, batch: 6 };

    fn bytes(batch: usize, saves: bool) -> usize {
        let options = ModelOptions { batch, ..SIZES };
        let ways = (saves, None);
        let model = planned_on_gpu(&SegformerConfig::default(), options, &Trainable::Everything, ways, |_| ());
        MemoryPlan::on_gpu(&model, None).bytes
    }

    fn fitted(bytes: usize, limited: bool) -> Result<MemoryPlan> {
        let lower = |n| format!("--batch-size {n}");
        let room = ("a GPU", Room { bytes, limited });
        let planned = fit(&SegformerConfig::default(), SIZES, &Trainable::Everything, room, None, &lower)?;
        assert_eq!(planned.plan.bytes, planned.model.backend().device().bytes());
        Ok(planned.plan)
    }

    #[test]
    fn all_is_kept_where_that_fits() {
        let most = bytes(SIZES.batch, false);
        for room in [usize::MAX, most] {
            let plan = fitted(room, false).expect("it fits");
            assert_eq!((plan.bytes, plan.limit, plan.activations_made_again), (most, Some(room), false));
        }
    }

    #[test]
    fn activations_are_made_again_where_they_do_not_fit() {
        let (most, least) = (bytes(SIZES.batch, false), bytes(SIZES.batch, true));
        assert!(least < most, "{least} of {most}");
        for room in [most - 1, least] {
            let plan = fitted(room, true).expect("it fits");
            assert_eq!((plan.bytes, plan.activations_made_again), (least, true));
            assert!(plan.lines()[0].contains("made again"), "{:?}", plan.lines());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_largest_batch_that_does() {
        let least = bytes(SIZES.batch, true);
        for (room, batch) in [(least - 1, 5), (bytes(4, true), 4), (bytes(4, true) - 1, 3), (bytes(1, true), 1)] {
            let error = fitted(room, false).expect_err("too large");
            assert_eq!(error.kind, Kind::Device);
            let said = error.to_string();
            assert!(said.starts_with("a GPU: batches of 6 images at 64 x 64 need "), "{said}");
            assert!(said.ends_with(&format!("{batch} would fit: --batch-size {batch}")), "{said}");
        }
    }

    #[test]
    fn where_not_even_one_fits_that_is_said() {
        let room = bytes(1, true) - 1;
        let said = |limited| fitted(room, limited).expect_err("too large").to_string();
        assert!(said(false).ends_with("may be used; not even one fits: lower --size"), "{}", said(false));
        assert!(
            said(true).contains("by --max-memory") && said(true).ends_with("or raise --max-memory"),
            "{}",
            said(true)
        );
    }

    #[test]
    fn parts_make_the_whole() {
        let plan = fitted(usize::MAX, false).expect("it fits");
        assert_eq!(plan.parts.iter().map(|part| part.bytes).sum::<usize>(), plan.bytes);
        assert!(plan.parts.is_sorted_by(|a, b| a.bytes >= b.bytes), "{:?}", plan.parts);
        let rest = plan.parts.iter().find(|part| part.what.starts_with("tables")).expect("some");
        assert!(rest.bytes < plan.bytes / 20, "{rest:?} of {}", plan.bytes);
        assert_eq!(plan.lines().len(), 1 + plan.parts.len());
    }
}
