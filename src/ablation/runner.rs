//! Runs one configuration, or the grid, in folders: what is finished is kept, what is interrupted continues, what another
//! process holds is left to it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Instant;

use super::config::{self, DataIdentity, RunConfig, SplitIdentity, unfair};
use super::lock::Lock;
use super::source::{ModelSource, Source};
use crate::backend::Place;
use crate::dataset::{self, Augment, PackedDataset, Split};
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::progress::{Progress, count, duration, interrupted};
use crate::report::{self, RESULT};
use crate::train::options::{Method, Protocol, TrainOptions};
use crate::train::record::RunRecord;
use crate::train::{self, Inputs, Seat};

/// Share of the images that trains, where no split is given.
const TRAIN_FRACTION: f64 = 0.8;
const FAILURE: &str = "run_error.json";
const UNFAIR: &str = "trained under different settings, so they are not a fair comparison";

/// What all runs share, read once: the images and the starting point.
pub struct Setup {
    data: PackedDataset,
    data_identity: DataIdentity,
    source: Source,
    /// The devices; a grid's runs divide among them, a single run takes the first.
    places: Vec<Place>,
}

impl Setup {
    /// Opens the dataset `data` (an archive or folder is packed into `cache` first, at `size` pixels) and reads the model.
    ///
    /// # Errors
    /// Those of reading either, and [`Kind::Interrupted`].
    pub fn open(
        data: &Path,
        cache: &Path,
        size: Option<usize>,
        model: &ModelSource,
        adapter: Option<&Path>,
        mut places: Vec<Place>,
        progress: &Progress,
    ) -> Result<Self> {
        // The model first: it is small, and what is wrong with it should not wait for the images.
        let source = Source::open(model, adapter, progress)?;
        let packed = open_data(data, cache, size, dataset::DEFAULT_SIZE, progress)?;
        stop_if_interrupted()?;
        let data_identity = DataIdentity::new(data, &packed);
        progress.info(format!(
            "data: {} ({} at {s} x {s}); model: {}",
            data.display(),
            count(packed.len(), "image"),
            source.model.path,
            s = packed.size()
        ));
        let all: Vec<_> = (0..packed.len()).map(|i| train::sample(&packed, i, Augment::IDENTITY)).collect();
        let kinds: BTreeSet<&str> = places.iter().map(Place::kind).collect();
        if kinds.len() > 1 {
            let kinds: Vec<&str> = kinds.into_iter().collect();
            return Err(Error::usage(format!(
                "--devices: {} round differently, and a run must be able to continue on either: give devices of one kind, or \
                 start a process for each with --slice",
                kinds.join(" and ")
            )));
        }
        for place in &mut places {
            let stays = place.hold(&all, packed.size())?;
            if let Place::Gpu(gpu) = place {
                let images = if stays { "the images stay there" } else { "the images are brought batch by batch" };
                progress.info(format!("device: {}; {images}", gpu.driver.name()));
            }
        }
        drop(all);
        Ok(Self { data: packed, data_identity, source, places })
    }

    /// The device of a single run.
    fn first_place(&self) -> &Place {
        self.places.first().unwrap_or(&Place::Cpu)
    }

    /// Says what a run with `options` trains; `grid`: for all ranks at once.
    ///
    /// # Errors
    /// Those of [`train::Start::announce`].
    pub fn announce(&self, options: &TrainOptions, grid: bool, progress: &Progress) -> Result<()> {
        self.source.start.announce(options, grid, progress)
    }

    fn config(&self, name: &str, options: &TrainOptions, split: &Split, place: &Place) -> RunConfig {
        RunConfig {
            name: name.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            options: options.clone(),
            data: self.data_identity.clone(),
            split: SplitIdentity::new(split),
            model: self.source.model.clone(),
            adapter: self.source.adapter.clone(),
            device: match place {
                Place::Cpu => None,
                Place::Gpu(gpu) => Some(gpu.driver.name().into()),
            },
        }
    }
}

/// Opens a packed file, or packs an archive or folder into `cache`; one process at a time packs.
///
/// # Errors
/// Those of [`dataset::open_or_prepare`]; [`Kind::Io`] if the cache cannot be made.
pub fn open_data(
    data: &Path,
    cache: &Path,
    size: Option<usize>,
    default: usize,
    progress: &Progress,
) -> Result<PackedDataset> {
    // A packed file needs no cache; only what will be packed makes the folder.
    let packs = data.is_dir() || data.is_file() && !dataset::is_packed_file(data);
    let elsewhere = |e: Error| Error::new(e.kind, format!("{e}; --cache names another folder"));
    let lock = || Lock::wait(cache, ".lock", "prepare the data", progress).map_err(elsewhere);
    let _lock = packs.then(lock).transpose()?;
    if packs {
        files::remove_unfinished(cache);
    }
    dataset::open_or_prepare(data, cache, size, default, progress)
}

/// How the images are divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SplitPlan {
    /// By `train.txt` and `val.txt` in this folder.
    Given(PathBuf),
    /// Drawn from the seed.
    Seeded,
}

impl SplitPlan {
    /// The split for the run with number `index` of the grid (0 for a single run). Under the notebook's protocol each run
    /// draws its own.
    fn split(&self, options: &TrainOptions, index: usize, data: &PackedDataset) -> Result<Split> {
        let split = match self {
            Self::Given(folder) => Split::read(folder, data)?,
            Self::Seeded => {
                let seed = match options.protocol {
                    Protocol::Strict => options.seed,
                    Protocol::Notebook => options.seed.wrapping_add(index as u64),
                };
                Split::seeded(data.len(), TRAIN_FRACTION, seed)
            }
        };
        if split.train.is_empty() || split.val.is_empty() {
            return Err(Error::input(
                data.path(),
                format!(
                    "{} in the dataset, {} for training and {} for validation; both need at least one",
                    count(data.len(), "image"),
                    split.train.len(),
                    split.val.len()
                ),
            ));
        }
        Ok(split)
    }
}

/// Trains one configuration in `folder`, or continues it there, or reads its result if it is finished.
/// `index` is the run's number in the grid (0 for a single run).
///
/// # Errors
/// [`Kind::Busy`] if another process holds the folder; [`Kind::Usage`] if the folder holds a run with other settings; those
/// of training.
pub fn run_one(
    setup: &Setup,
    name: &str,
    options: &TrainOptions,
    split: &SplitPlan,
    index: usize,
    folder: &Path,
    progress: &Progress,
) -> Result<RunRecord> {
    run_on(setup, &mut Seat::new(setup.first_place()), name, options, split, index, folder, progress).map_err(|e| {
        match e.kind {
            Kind::Busy => Error::new(e.kind, format!("{e}; wait for it or choose another --out")),
            _ => e,
        }
    })
}

fn run_on(
    setup: &Setup,
    seat: &mut Seat<'_>,
    name: &str,
    options: &TrainOptions,
    split: &SplitPlan,
    index: usize,
    folder: &Path,
    progress: &Progress,
) -> Result<RunRecord> {
    let _lock = Lock::folder(folder)?;
    files::remove_unfinished(folder);
    files::remove_unfinished(&folder.join("final"));
    let split = split.split(options, index, &setup.data)?;
    let config = setup.config(name, options, &split, seat.place());
    config.check(folder)?;
    let result = folder.join(RESULT);
    if result.exists() {
        let record = report::read_record(&result)?;
        if !folder.join(format!("{name}_results.zip")).exists() {
            report::run::finish(folder, &record)?;
        }
        progress.info(format!("{name}: finished before, kept ({})", folder.display()));
        return Ok(record);
    }
    config.write(folder)?;
    split.write(folder, &setup.data)?;
    let inputs = Inputs { data: &setup.data, split: &split, model: &setup.source.start };
    let outcome = train::run(name, options, &inputs, seat, folder, progress);
    let failure = folder.join(FAILURE);
    match &outcome {
        Err(error) if error.kind == Kind::Diverged => {
            let report =
                serde_json::json!({ "name": name, "error": error.to_string(), "exit_code": error.exit_code() });
            files::replace_json(&failure, &report)?;
        }
        Ok(_) => files::remove(&failure)?,
        _ => {}
    }
    outcome.map_err(|error| match error.kind {
        Kind::Interrupted => Error::new(Kind::Interrupted, format!("{name}: interrupted; the same command continues")),
        _ => error,
    })
}

fn stop_if_interrupted() -> Result<()> {
    if interrupted() {
        return Err(Error::new(Kind::Interrupted, "interrupted; the same command continues"));
    }
    Ok(())
}

/// A grid, and the part of it that is to be run.
pub struct GridPlan {
    /// Every run of the grid with its method, in order.
    pub runs: Vec<(String, Method)>,
    /// Which of them this process takes, by position.
    pub selected: Vec<usize>,
    /// Everything but the method.
    pub options: TrainOptions,
    /// How the images are divided.
    pub split: SplitPlan,
    /// The folder that holds the runs' folders.
    pub out: PathBuf,
}

/// What became of a grid.
pub struct GridOutcome {
    /// Every finished run in the output folder, those of other processes included, in the order of the grid.
    pub records: Vec<RunRecord>,
    /// Names of runs that another process holds.
    pub busy: Vec<String>,
    /// Names of runs that failed, with the reason.
    pub failed: Vec<(String, Error)>,
}

/// Runs the selected part of the grid, refreshing the summary after every run. A run that diverges is recorded and the
/// others go on.
///
/// # Errors
/// Every other failure ends the grid, interruption included; finished runs are kept and the same command continues.
pub fn run_grid(setup: &Setup, plan: &GridPlan, progress: &Progress) -> Result<GridOutcome> {
    let out = &plan.out;
    let options = |index: usize| TrainOptions { method: plan.runs[index].1.clone(), ..plan.options.clone() };
    // All refusals before the first hour of training.
    let mut to_train = Vec::new();
    for &index in &plan.selected {
        let (name, _) = &plan.runs[index];
        let split = plan.split.split(&options(index), index, &setup.data)?;
        let config = setup.config(name, &options(index), &split, setup.first_place());
        config.check(&out.join(name))?;
        if !out.join(name).join(RESULT).exists() {
            to_train.push(config.leaves()?);
        }
    }
    // And a comparison that will not hold, as long as it can be avoided.
    if !to_train.is_empty()
        && let Some(settings) = unfair(&[config::finished(out), to_train].concat())
    {
        let what = "the runs there and those of this command differ in settings, so they will not be a fair comparison";
        progress.warn(format!("{}: {what}: {settings}", out.display()));
    }
    // LoRA's if there is one: it says more.
    let adapted = plan.selected.iter().find(|&&index| plan.runs[index].1 != Method::Fft).or(plan.selected.first());
    if let Some(&index) = adapted {
        setup.announce(&options(index), true, progress)?;
    }
    if plan.options.protocol == Protocol::Strict || plan.split != SplitPlan::Seeded {
        let _lock = Lock::wait(out, ".summary.lock", "write the split", progress)?;
        plan.split.split(&plan.options, 0, &setup.data)?.write(out, &setup.data)?;
    }
    let started = Instant::now();
    let queue = AtomicUsize::new(0);
    let outcome = Mutex::new((Vec::new(), Vec::new(), None));
    let outcome_now = || outcome.lock().unwrap_or_else(PoisonError::into_inner);
    // One worker per device, each taking the next run when it is done with one. A failure that is not a run's own ends all.
    let work = |place: &Place, finished: mpsc::Sender<()>| {
        let mut seat = Seat::new(place);
        while let Some((position, &index)) = next(&queue, &plan.selected) {
            if outcome_now().2.is_some() {
                return;
            }
            let (name, _) = &plan.runs[index];
            let label = format!("[{}/{}] {name}", position + 1, plan.selected.len());
            let before = if out.join(name).join(RESULT).exists() { "finished before, kept: " } else { "" };
            let part = progress.part(format!("[{}/{}]", position + 1, plan.selected.len()));
            match run_on(setup, &mut seat, name, &options(index), &plan.split, index, &out.join(name), &part) {
                Ok(record) => {
                    let dice = record.final_evaluation.eval_mean_dice.map_or("-".into(), |dice| format!("{dice:.4}"));
                    let (epoch, time) = (record.best_epoch, duration(record.training_time));
                    progress.info(format!("{label}: {before}Dice {dice} (epoch {epoch}), trained in {time}"));
                }
                Err(error) if error.kind == Kind::Busy => {
                    progress.info(format!("{label}: skipped: {error}"));
                    outcome_now().0.push(name.clone());
                    continue;
                }
                Err(error) if error.kind == Kind::Diverged => {
                    // The error names the run.
                    let others = queue.load(Ordering::Relaxed) < plan.selected.len();
                    let others = if others { "; the other runs go on" } else { "" };
                    progress.warn(format!("[{}/{}] {error}{others}", position + 1, plan.selected.len()));
                    outcome_now().1.push((name.clone(), error));
                    continue;
                }
                Err(error) => {
                    if setup.places.len() > 1 && error.kind != Kind::Interrupted {
                        progress
                            .warn(format!("{label}: {error}; the other devices end their runs, then the grid stops"));
                    }
                    outcome_now().2.get_or_insert(error);
                    return;
                }
            }
            // Nobody receives it after an error, which is in the outcome.
            let _ = finished.send(());
            if let Err(error) = stop_if_interrupted() {
                outcome_now().2.get_or_insert(error);
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        let (finished, to_summarise) = mpsc::channel();
        // The summary is written while the next runs train.
        scope.spawn(move || {
            while to_summarise.recv().is_ok() {
                while to_summarise.try_recv().is_ok() {}
                if let Err(error) = write_summary(out, progress) {
                    progress.warn(format!("{error}; the runs under way come to their end, then the grid stops"));
                    outcome_now().2.get_or_insert(error);
                    return;
                }
            }
        });
        for place in setup.places.iter().skip(1) {
            let finished = finished.clone();
            scope.spawn(|| work(place, finished));
        }
        work(setup.first_place(), finished);
    });
    let (busy, failed, stopped) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = stopped {
        return Err(error);
    }
    // Once more, for what other processes have finished meanwhile.
    let records = write_summary(out, progress)?;
    warn_if_unfair(out, progress);
    let mut counts = match plan.selected.len() - busy.len() - failed.len() {
        0 if plan.selected.is_empty() => {
            format!("no run to do: none of the grid's {} is in this part (--slice, --only)", plan.runs.len())
        }
        n => format!("{} done", count(n, "run")),
    };
    for (list, what) in [(busy.len(), "busy elsewhere"), (failed.len(), "failed")] {
        if list > 0 {
            counts += &format!(", {list} {what}");
        }
    }
    progress.info(format!("{counts}, in {}", duration(started.elapsed().as_secs_f64())));
    Ok(GridOutcome { records, busy, failed })
}

/// The next run of the queue, with its position.
fn next<'a>(queue: &AtomicUsize, runs: &'a [usize]) -> Option<(usize, &'a usize)> {
    let position = queue.fetch_add(1, Ordering::Relaxed);
    runs.get(position).map(|run| (position, run))
}

/// Writes summary, figures and page from every finished run under `out`, one process at a time, and returns the runs.
/// With no finished run nothing is written.
///
/// # Errors
/// Those of reading the results and writing the report.
pub fn write_summary(out: &Path, progress: &Progress) -> Result<Vec<RunRecord>> {
    let _lock = Lock::wait(out, ".summary.lock", "write the summary", progress)?;
    files::remove_unfinished(out);
    let records = report::read_records(out)?;
    if !records.is_empty() {
        let caution = unfair(&config::finished(out)).map(|settings| format!("These runs were {UNFAIR}: {settings}."));
        report::grid::write(out, &records, caution)?;
    }
    Ok(records)
}

/// Says so if the finished runs under `out` were trained under different settings: the summary compares them all the same.
pub fn warn_if_unfair(out: &Path, progress: &Progress) {
    if let Some(settings) = unfair(&config::finished(out)) {
        progress.warn(format!("{}: these runs were {UNFAIR}: {settings}", out.display()));
    }
}
