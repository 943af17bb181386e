//! The training loop: what transformers' Trainer does, epoch by epoch, resumable between epochs bit for bit.

use std::path::Path;
use std::time::Instant;

use half::bf16;

use super::checkpoint::{self, Snapshot, State, Trained};
use super::evaluate::{measure, sample};
use super::keeper::Keeper;
use super::memory::MemoryPlan;
use super::options::{Method, Protocol, TrainOptions};
use super::record::{HistoryRow, RunRecord};
use super::schedule::Schedule;
use super::start::{Prepared, Start, load, on_cpu, on_gpu};
use crate::backend::cpu::Cpu;
use crate::backend::{AdamW, Backend, Gpu, Place, Sample};
use crate::dataset::{Augment, PackedDataset, Split};
use crate::error::Kind;
use crate::formats::{HostData, StateDict};
use crate::progress::{Bar, Progress, count, duration, interrupted};
use crate::random::{Philox, Purpose};
use crate::report;
use crate::segformer::{BATCH_COUNTER, Model, ModelOptions, Moments, Role, Step, StepRandom};
use crate::{Error, Result};

/// What a run works on.
pub struct Inputs<'a> {
    /// Images and masks.
    pub data: &'a PackedDataset,
    /// Which of them train and which validate.
    pub split: &'a Split,
    /// The starting point.
    pub model: &'a Start,
}

/// A device, with the model that the run before has left there. The next run takes it over if it differs in nothing that
/// shapes memory and work, and then ends as with a model of its own, to the bit; any other drops it before it makes its own.
pub struct Seat<'a> {
    place: &'a Place,
    cpu: Option<Held<Cpu<f32>>>,
    gpu: Option<Held<Gpu>>,
}

impl<'a> Seat<'a> {
    /// A device without a model.
    pub fn new(place: &'a Place) -> Self {
        Self { place, cpu: None, gpu: None }
    }

    /// The device.
    pub fn place(&self) -> &'a Place {
        self.place
    }
}

/// A model and its optimizer's state.
struct Held<B: Backend> {
    model: Model<B>,
    moments: Moments<B>,
}

/// The update number `step` (from 1) at learning rate `lr`.
pub(super) fn adamw(options: &TrainOptions, lr: f64, step: u64) -> AdamW {
    AdamW {
        lr,
        betas: options.betas,
        epsilon: options.epsilon,
        weight_decay: options.weight_decay,
        step,
        max_norm: options.max_grad_norm,
    }
}

/// Whether weight decay applies to a tensor: as transformers has it, not to biases and normalisations.
fn decays(name: &str) -> bool {
    !name.ends_with(".bias") && !name.contains("norm")
}

/// Trains one configuration in the folder `out`, or continues what was begun there with the same options: the result is
/// the same to the bit. Writes a checkpoint and the history after every epoch, and the plots at most once a second; at the
/// end `final/` and the record.
///
/// # Errors
/// [`Kind::Interrupted`] on a signal; [`Kind::Diverged`] when a loss is not finite; whatever reading the start and writing
/// the folder may bring.
pub fn run(
    name: &str,
    options: &TrainOptions,
    inputs: &Inputs<'_>,
    seat: &mut Seat<'_>,
    out: &Path,
    progress: &Progress,
) -> Result<RunRecord> {
    // What there is to say about the start has been said (`Start::announce`), once for a whole grid.
    let prepared = inputs.model.prepare(options, &Progress::silent())?;
    let batch = options.batch_size.min(inputs.split.train.len().max(1));
    let sizes = ModelOptions { size: inputs.data.size(), batch };
    let Prepared { config, tensors, trainable } = &prepared;
    let task = Task { name, options, inputs, out, progress };
    let lower = |n| format!("--batch-size {n}, and raise --grad-accum");
    match seat.place {
        Place::Cpu => {
            let remedy = "--batch-size (and raise --grad-accum) or --size";
            task.run(&mut seat.cpu, &prepared, sizes, || on_cpu(config, sizes, trainable, tensors, remedy))
        }
        Place::Gpu(gpu) => {
            task.run(&mut seat.gpu, &prepared, sizes, || on_gpu(gpu, config, sizes, trainable, tensors, &lower))
        }
    }
}

/// What [`run`] was asked to do.
#[derive(Clone, Copy)]
struct Task<'a> {
    name: &'a str,
    options: &'a TrainOptions,
    inputs: &'a Inputs<'a>,
    out: &'a Path,
    progress: &'a Progress,
}

impl Task<'_> {
    /// Runs on the model that was left, or on one that `make` makes, and leaves it if all goes well.
    fn run<B: Backend>(
        self,
        left: &mut Option<Held<B>>,
        Prepared { config, tensors, trainable }: &Prepared,
        sizes: ModelOptions,
        make: impl FnOnce() -> Result<(Model<B>, MemoryPlan)>,
    ) -> Result<RunRecord> {
        let Self { name, options, inputs, out, progress } = self;
        let taken = left.take_if(|Held { model, moments }| model.renew(moments, config, sizes, trainable));
        let mut held = match taken {
            Some(mut held) => {
                load(&mut held.model, tensors);
                held.model.backend().check()?;
                progress.detail(format!("{name}: takes over the memory of the run before"));
                held
            }
            None => {
                // First, so that both need not fit.
                *left = None;
                let (model, plan) = make()?;
                progress.details(plan.lines());
                Held { moments: model.moments(), model }
            }
        };
        let Held { model, moments } = &mut held;
        let mut run = Run { name, options, inputs, out, progress, model, moments, state: State::default() };
        run.resume()?;
        run.epochs()?;
        // Every epoch has been written by now.
        let kept = run.state.epoch;
        let record = run.finish().map_err(|error| with_what_is_kept(error, kept))?;
        *left = Some(held);
        Ok(record)
    }
}

/// A device's failure, with what there is to continue from: `kept` epochs.
fn with_what_is_kept(error: Error, kept: usize) -> Error {
    if error.kind != Kind::Device {
        return error;
    }
    let kept = match kept {
        0 => "no epoch is kept yet, and the same command begins anew".into(),
        1 => "epoch 1 is kept, and the same command continues after it".into(),
        n => format!("the epochs up to {n} are kept, and the same command continues after them"),
    };
    Error::new(Kind::Device, format!("{error}; {kept}"))
}

struct Run<'a, B: Backend> {
    name: &'a str,
    options: &'a TrainOptions,
    inputs: &'a Inputs<'a>,
    out: &'a Path,
    progress: &'a Progress,
    model: &'a mut Model<B>,
    moments: &'a mut Moments<B>,
    state: State,
}

impl<B: Backend> Run<'_, B> {
    /// Updates of one epoch.
    fn updates_per_epoch(&self) -> u64 {
        let micro_batches = self.inputs.split.train.len().div_ceil(self.options.batch_size);
        micro_batches.div_ceil(self.options.grad_accum) as u64
    }

    /// Continues from the newest checkpoint, if there is one, in a model that holds the run's start.
    fn resume(&mut self) -> Result<()> {
        let Some(state) = checkpoint::latest(self.out)? else { return Ok(()) };
        load(self.model, &self.read(state.global_step)?);
        checkpoint::read_moments(self.model, self.out, state.global_step, self.moments)?;
        self.progress.info(format!("{}: continues after epoch {}", self.name, state.epoch));
        self.state = state;
        Ok(())
    }

    /// The tensors of a checkpoint.
    fn read(&self, step: u64) -> Result<StateDict> {
        checkpoint::read_tensors(self.model, self.out, step, &self.options.method)
    }

    fn stopped_early(&self) -> bool {
        self.state.stale >= self.options.patience
    }

    fn epochs(&mut self) -> Result<()> {
        let (out, keep) = (self.out.to_path_buf(), self.options.keep_checkpoints);
        let mut keeper = Keeper::new(self.name, out, keep, self.state.epoch);
        let trained = self.epochs_kept_by(&mut keeper);
        let written = keeper.finish(trained.is_ok());
        match (trained, written) {
            // An interruption is no news beside a checkpoint that could not be written.
            (Err(interruption), Err(lost)) if interruption.kind == Kind::Interrupted => Err(lost),
            (Err(error), _) => Err(with_what_is_kept(error, keeper.kept())),
            (Ok(()), written) => written,
        }
    }

    fn epochs_kept_by(&mut self, keeper: &mut Keeper) -> Result<()> {
        let updates = self.updates_per_epoch();
        let schedule = Schedule::new(self.options.lr, self.options.warmup_ratio, updates * self.options.epochs as u64);
        while self.state.epoch < self.options.epochs && !self.stopped_early() {
            let started = Instant::now();
            let epoch = self.state.epoch + 1;
            let images = self.inputs.split.train.len() + self.inputs.split.val.len();
            let label = format!("{} epoch {epoch}/{}", self.name, self.options.epochs);
            let dice = self.state.log_history.last().and_then(|row| row.eval_mean_dice);
            let note = dice.map_or(String::new(), |dice| format!("Dice {dice:.4}"));
            let bar = self.progress.bar_noting(&label, images as u64, "images", note);
            let before = self.model.backend().remark();
            let row = self.train_epoch(&schedule, &bar)?;
            let evaluation = self.evaluate(
                &self.inputs.split.val,
                epoch as u32,
                &format!("the validation loss in epoch {epoch}"),
                &bar,
            )?;
            drop(bar);
            if let (None, Some(remark)) = (before, self.model.backend().remark()) {
                self.progress.detail(format!("{}: {remark}", self.name));
            }

            let seconds = started.elapsed().as_secs_f64();
            let (loss, dice) = (evaluation.eval_loss.unwrap_or(f64::NAN), evaluation.eval_mean_dice);
            let to_go = (self.state.seconds + seconds) / epoch as f64 * (self.options.epochs - epoch) as f64;
            let to_go = if to_go > 0.0 { format!(", about {} left", duration(to_go)) } else { String::new() };
            self.progress.info(format!(
                "{label}: loss {:.4}, validation {loss:.4}, Dice {:.4}, {:.1} images/s, {}{to_go}",
                row.loss.unwrap_or(f64::NAN),
                dice.unwrap_or(f64::NAN),
                images as f64 / seconds,
                duration(seconds),
            ));
            self.state.epoch = epoch;
            self.state.log_history.push(row);
            self.state.log_history.push(evaluation);
            if self.state.best_metric.is_none_or(|best| loss < best) {
                self.state.best_metric = Some(loss);
                self.state.best_epoch = epoch;
                self.state.best_step = self.state.global_step;
                self.state.stale = 0;
            } else {
                self.state.stale += 1;
            }
            self.state.seconds += started.elapsed().as_secs_f64();
            let base = self.base_model();
            keeper.keep(Snapshot::take(self.model, self.moments, &self.state, self.options, &base)?)?;
            if self.stopped_early() {
                self.progress.info(format!(
                    "{}: stops after epoch {epoch}, {} without improvement",
                    self.name,
                    count(self.options.patience, "evaluation")
                ));
            }
        }
        Ok(())
    }

    /// One pass over the training split; returns its row of the history.
    fn train_epoch(&mut self, schedule: &Schedule, bar: &Bar) -> Result<HistoryRow> {
        let options = self.options;
        let data = self.inputs.data;
        let epoch = self.state.epoch as u32;
        let split = &self.inputs.split.train;
        let order: Vec<usize> = if options.shuffle {
            let stream = Philox::new(options.seed, Purpose::Shuffle, 0, epoch);
            stream.permutation(split.len()).into_iter().map(|i| split[i]).collect()
        } else {
            split.clone()
        };
        let decays: Vec<bool> = self.model.trained().map(|(name, _)| decays(name)).collect();
        let micro_batches: Vec<&[usize]> = order.chunks(options.batch_size).collect();
        let before = self.state.global_step;
        let mut losses = 0.0;
        let (mut norm, mut rate) = (0.0, 0.0);
        for group in micro_batches.chunks(options.grad_accum) {
            let augment = |i| match options.augment {
                true => Augment::draw(options.seed, epoch, i),
                false => Augment::IDENTITY,
            };
            let samples = |indices: &&[usize]| indices.iter().map(|&i| sample(data, i, augment(i))).collect();
            let samples: Vec<Vec<Sample<'_>>> = group.iter().map(samples).collect();
            let micro_batches: Vec<&[Sample<'_>]> = samples.iter().map(Vec::as_slice).collect();
            rate = schedule.rate(self.state.global_step);
            let step = Step {
                micro_batches: &micro_batches,
                random: StepRandom { seed: options.seed, step: self.state.micro_batches },
                update: adamw(options, rate, self.state.global_step + 1),
                decays: &decays,
            };
            let go_on = |images| {
                bar.inc(images as u64);
                !interrupted()
            };
            if interrupted() || !self.model.train_step(&step, self.moments, go_on) {
                return Err(Error::new(Kind::Interrupted, "interrupted"));
            }
            self.model.backend().check()?;
            self.state.micro_batches += group.len() as u32;
            self.state.global_step += 1;
        }
        if !micro_batches.is_empty() {
            losses = self.model.take_loss();
            norm = self.model.gradient_norm();
            // Before a failed device's answers are taken for a diverged loss.
            self.model.backend().check()?;
        }
        self.state.total_loss += losses;
        let row = HistoryRow {
            loss: Some(losses / (self.state.global_step - before).max(1) as f64),
            grad_norm: Some(norm),
            learning_rate: Some(rate),
            epoch: f64::from(epoch + 1),
            step: self.state.global_step,
            ..HistoryRow::default()
        };
        self.finite(&format!("the training loss in epoch {}", epoch + 1), row.loss)?;
        self.finite(&format!("the gradient in epoch {}", epoch + 1), row.grad_norm)?;
        Ok(row)
    }

    /// Evaluates on `indices`. Under the notebook's protocol with the training augmentations, drawn anew by `round`.
    fn evaluate(&mut self, indices: &[usize], round: u32, what: &str, bar: &Bar) -> Result<HistoryRow> {
        let augmented = self.options.protocol == Protocol::Notebook && self.options.augment;
        // Another seed than training's, so that both draw independently.
        let seed = self.options.seed ^ 0x6576_616c;
        let augment = |i| if augmented { Augment::draw(seed, round, i) } else { Augment::IDENTITY };
        let batch = self.options.eval_batch_size;
        let row = measure(self.model, self.inputs.data, indices, batch, augment, |n| bar.inc(n))?;
        self.finite(what, row.eval_loss)?;
        Ok(HistoryRow { epoch: f64::from(round), step: self.state.global_step, ..row })
    }

    fn finite(&self, what: &str, value: Option<f64>) -> Result<()> {
        if value.is_some_and(f64::is_finite) {
            return Ok(());
        }
        Err(Error::new(
            Kind::Diverged,
            format!(
                "{}: {what} is not a finite number; lower --lr (checkpoints before it are kept in {})",
                self.name,
                self.out.display()
            ),
        ))
    }

    /// Restores the best model, evaluates it on both splits, writes `final/` and the record.
    fn finish(mut self) -> Result<RunRecord> {
        if self.state.best_step > 0 {
            self.restore_best()?;
        }
        let epochs = self.state.epoch as u32;
        let (train, val) = (&self.inputs.split.train, &self.inputs.split.val);
        let bar = self.progress.bar(&format!("{} final", self.name), (train.len() + val.len()) as u64, "images");
        let mut final_evaluation = self.evaluate(val, epochs + 1, "the final evaluation loss", &bar)?;
        let mut final_train = self.evaluate(train, epochs + 2, "the final evaluation loss", &bar)?;
        drop(bar);
        for row in [&mut final_evaluation, &mut final_train] {
            row.epoch = f64::from(epochs);
        }
        let state = &self.state;
        let total: usize = self.model.plan().specs[..self.model.plan().stored]
            .iter()
            .filter(|spec| spec.role != Role::Statistic)
            .map(|spec| spec.len())
            .sum();
        let adapters: usize = (self.model.plan().adapters.iter().flat_map(|a| [a.a, a.b]))
            .map(|id| self.model.plan().specs[id.0].len())
            .sum();
        let parameters = (total + adapters) as u64;
        let trained = self.model.trained().map(|(_, id)| self.model.plan().specs[id.0].len() as u64).sum();
        let updates = self.updates_per_epoch() * self.options.epochs as u64;
        let numbers = 3.0 * (self.inputs.data.size() as f64).powi(2) * train.len() as f64;
        let mut history = state.log_history.clone();
        history.push(HistoryRow {
            epoch: f64::from(epochs),
            step: state.global_step,
            train_runtime: Some(state.seconds),
            train_samples_per_second: Some((train.len() * self.options.epochs) as f64 / state.seconds),
            train_steps_per_second: Some(updates as f64 / state.seconds),
            // The Trainer's estimate: 6 per input number and parameter.
            total_flos: Some(6.0 * numbers * f64::from(epochs) * parameters as f64),
            train_loss: Some(state.total_loss / state.global_step.max(1) as f64),
            ..HistoryRow::default()
        });
        history.push(final_evaluation.clone());
        let final_dir = self.out.join("final");
        Trained::of(self.model, self.options, &self.base_model())?.write(&final_dir)?;
        let record = RunRecord {
            name: self.name.into(),
            method: self.options.method.clone(),
            trainable_parameters: trained,
            total_parameters: parameters,
            best_epoch: state.best_epoch,
            training_time: state.seconds,
            final_evaluation,
            final_evaluation_train: final_train,
            training_history: history,
        };
        report::run::finish(self.out, &record)?;
        Ok(record)
    }

    /// Puts the best checkpoint's tensors back. The notebook's protocol repeats the original's flaw: an adapter comes back
    /// without BatchNorm's statistics, and all weights are rounded to bf16.
    fn restore_best(&mut self) -> Result<()> {
        let mut best = self.read(self.state.best_step)?;
        if self.options.protocol == Protocol::Notebook {
            if matches!(&self.options.method, Method::Lora(lora) if !lora.train_head) {
                best.retain(|name, _| !name.contains("running_") && name != BATCH_COUNTER);
            }
            let mut all = checkpoint::stored(self.model);
            all.extend(best);
            for tensor in all.values_mut() {
                if let HostData::F32(data) = &mut tensor.data {
                    for x in data {
                        *x = bf16::from_f32(*x).to_f32();
                    }
                }
            }
            best = all;
        }
        load(self.model, &best);
        Ok(())
    }

    /// The base model's name for `adapter_config.json`.
    fn base_model(&self) -> String {
        self.inputs.model.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::backend::cuda::{Argument, Cuda, Device, Dry, MatrixProduct};
    use crate::dataset::demo::{self, Domain};
    use crate::dataset::prepare;
    use crate::lora;
    use crate::segformer::SegformerConfig;
    use crate::train::options::LoraOptions;
    use crate::train::start::Weights;

    /// A device that counts, lost after so many calls.
    #[derive(Clone, Default)]
    struct Lost {
        dry: Arc<Dry>,
        calls: Arc<AtomicUsize>,
        last: usize,
        /// Which of the calls read.
        reads: Arc<Mutex<Vec<bool>>>,
    }

    impl Lost {
        fn call(&self, reads: bool) -> Result<()> {
            self.reads.lock().expect("no panic").push(reads);
            match self.calls.fetch_add(1, Ordering::Relaxed) {
                call if call < self.last => Ok(()),
                _ => Err(Error::new(Kind::Device, "the device is lost")),
            }
        }
    }

    impl Device for Lost {
        type Memory = u64;
        type Graph = ();

        fn allocate(&self, bytes: usize) -> Result<u64> {
            self.call(false).and_then(|()| self.dry.allocate(bytes))
        }

        fn address(memory: &u64) -> u64 {
            *memory
        }

        unsafe fn write(&self, from: &[u8], to: u64) -> Result<()> {
            // SAFETY: the caller's, here and below.
            self.call(false).and_then(|()| unsafe { self.dry.write(from, to) })
        }

        fn expect(&self, _: usize) {}

        unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
            // SAFETY: as above.
            self.call(true).and_then(|()| unsafe { self.dry.read(from, to) })
        }

        unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
            // SAFETY: as above.
            self.call(false).and_then(|()| unsafe { self.dry.clear(at, bytes) })
        }

        unsafe fn launch(&self, kernel: &'static str, grid: [usize; 3], threads: usize, of: &[Argument]) -> Result<()> {
            // SAFETY: as above.
            self.call(false).and_then(|()| unsafe { self.dry.launch(kernel, grid, threads, of) })
        }

        unsafe fn product(&self, product: &MatrixProduct) -> Result<()> {
            // SAFETY: as above.
            self.call(false).and_then(|()| unsafe { self.dry.product(product) })
        }

        fn records(&self) -> bool {
            false
        }

        fn record(&self, work: &mut dyn FnMut()) -> Result<()> {
            self.dry.record(work)
        }

        unsafe fn replay(&self, (): &()) -> Result<()> {
            Ok(())
        }
    }

    /// A folder with a dataset of four pictures.
    fn folder() -> tempfile::TempDir {
        let scratch = tempfile::tempdir().expect("scratch folder");
        let (pictures, file) = (scratch.path().join("pictures"), scratch.path().join("data.pack"));
        demo::write_folder(&pictures, Domain::Source, 4, 32, &Progress::silent()).expect("drawn");
        prepare(&pictures, &file, 32, &Progress::silent()).expect("packed");
        scratch
    }

    /// Trains two epochs in a folder of `scratch`, on a device that is lost at call `last`.
    fn train(scratch: &Path, device: Lost) -> (PathBuf, Result<RunRecord>) {
        let out = scratch.join(format!("run-{}", device.last));
        let outcome = train_on(&mut None, scratch, &out, Method::Fft, || device);
        (out, outcome)
    }

    /// Trains two epochs in the folder `out`, on the model that was left or one on the device that `make` makes.
    fn train_on(
        left: &mut Option<Held<Cuda<Lost>>>,
        scratch: &Path,
        out: &Path,
        method: Method,
        make: impl FnOnce() -> Lost,
    ) -> Result<RunRecord> {
        let data = PackedDataset::open(&scratch.join("data.pack")).expect("packed");
        let hidden_sizes = vec![8, 16, 40, 64];
        let config =
            SegformerConfig { hidden_sizes, depths: vec![1; 4], decoder_hidden_size: 16, ..SegformerConfig::default() };
        let model = Start {
            name: "fresh".into(),
            weights: Weights::Random(config),
            adapter: None,
            adapter_name: String::new(),
        };
        let split = Split { train: vec![0, 1, 2], val: vec![3] };
        let inputs = Inputs { data: &data, split: &split, model: &model };
        let options = TrainOptions { method, epochs: 2, batch_size: 2, grad_accum: 1, ..TrainOptions::default() };
        let progress = Progress::silent();
        let prepared = model.prepare(&options, &progress).expect("fresh weights fit");
        let sizes = ModelOptions { size: 32, batch: 2 };
        let task = Task { name: "run", options: &options, inputs: &inputs, out, progress: &progress };
        task.run(left, &prepared, sizes, || {
            let mut model = Model::new(Cuda::new(make()), &prepared.config, sizes, &prepared.trainable);
            load(&mut model, &prepared.tensors);
            let plan = MemoryPlan::on_cpu(&model);
            Ok((model, plan))
        })
    }

    /// Adapters of a rank.
    fn lora(rank: usize, alpha: f64) -> Method {
        let targets = lora::preset("attention").expect("preset");
        Method::Lora(LoraOptions { rank, alpha, dropout: 0.0, targets, train_head: false })
    }

    /// A run of equal shape takes over the model that was left, and asks for no more memory; one of another shape drops it before it
    /// makes its own; one that fails leaves none.
    #[test]
    fn a_model_is_taken_over_or_dropped() {
        let scratch = folder();
        let mut left = None;
        let device = || Lost { last: usize::MAX, ..Lost::default() };
        let (first, second) = (device(), device());
        let mut run = |number: usize, method: Method, make: &dyn Fn() -> Lost| {
            let out = scratch.path().join(number.to_string());
            train_on(&mut left, scratch.path(), &out, method, make).map(|_| ()).map_err(|error| error.kind)
        };
        let none = || panic!("the model that was left serves");
        assert_eq!(run(0, lora(4, 4.0), &|| first.clone()), Ok(()));
        let (bytes, users) = (first.dry.bytes(), Arc::strong_count(&first.dry));
        assert_eq!(run(1, lora(4, 16.0), &none), Ok(()));
        assert_eq!((first.dry.bytes(), Arc::strong_count(&first.dry)), (bytes, users));
        assert_eq!(run(2, lora(4, 8.0), &none), Ok(()));
        assert_eq!(first.dry.bytes(), bytes);

        let make = || {
            assert_eq!(Arc::strong_count(&first.dry), users - 1, "two models at once");
            second.clone()
        };
        assert_eq!(run(3, lora(8, 8.0), &make), Ok(()));
        second.calls.store(usize::MAX, Ordering::Relaxed);
        assert_eq!(run(4, lora(8, 16.0), &none), Err(Kind::Device));
        assert_eq!(Arc::strong_count(&second.dry), 1, "a run that failed leaves nothing");
        assert_eq!(run(5, lora(8, 16.0), &device), Ok(()));
    }

    /// Wherever the device is lost, the message promises the epochs that are in the folder.
    #[test]
    fn what_is_said_to_be_kept_is_kept() {
        let scratch = folder();
        let device = Lost { last: usize::MAX, ..Lost::default() };
        let reads = Arc::clone(&device.reads);
        train(scratch.path(), device).1.expect("a device that counts does not fail");

        // The epochs' snapshots are the first calls of which a hundred read one after the other.
        let reads = reads.lock().expect("no panic").clone();
        let begins = |&i: &usize| !reads[i - 1] && reads[i..].iter().take(100).filter(|&&read| read).count() == 100;
        let snapshots: Vec<usize> = (1..reads.len()).filter(begins).collect();
        let [first, second, ..] = snapshots[..] else { panic!("two epochs, {} snapshots", snapshots.len()) };
        let cases = [(first - 50, 0), (first, 0), (first + 60, 0), (second - 50, 1), (second, 1), (second + 99, 1)];
        for (last, kept) in cases.into_iter().chain([(reads.len() - 1, 2)]) {
            let (out, outcome) = train(scratch.path(), Lost { last, ..Lost::default() });
            let error = outcome.expect_err("it is lost");
            let there = checkpoint::latest(&out).expect("whole").map_or(0, |state| state.epoch);
            let promise = ["; no epoch is kept", "; epoch 1 is kept", "; the epochs up to 2 are kept"][kept];
            assert_eq!((there, error.kind), (kept, Kind::Device), "lost at call {last}: {error}");
            assert!(error.to_string().starts_with(&format!("the device is lost{promise}")), "{error}");
        }
    }
}
