//! Checkpoints of a run: what Hugging Face reads (a model, or an adapter with its sidecar), and beside it what a resumed
//! run needs to continue bit for bit.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::options::{LoraOptions, Method, TrainOptions};
use super::record::HistoryRow;
use crate::backend::Backend;
use crate::formats::{
    self, Adapter, AdapterConfig, HfNames, HostData, HostTensor, StateDict, read_safetensors, write_safetensors,
};
use crate::segformer::{BATCH_COUNTER, Id, Model, Moments, Role, SegformerConfig};
use crate::{Error, Result, files};

const STATE: &str = "trainer_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

/// Where a run stands between two epochs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Epochs done.
    pub epoch: usize,
    /// Updates done.
    pub global_step: u64,
    /// Micro-batches done, which select random numbers.
    pub micro_batches: u32,
    /// Evaluations in a row without improvement.
    pub stale: usize,
    /// Smallest evaluation loss.
    pub best_metric: Option<f64>,
    /// Epoch it came from.
    pub best_epoch: usize,
    /// Updates done by then.
    pub best_step: u64,
    /// Sum over the updates of their losses.
    pub total_loss: f64,
    /// Seconds of training.
    pub seconds: f64,
    /// The history.
    pub log_history: Vec<HistoryRow>,
}

/// Folder of the checkpoint after update `step`.
pub fn folder(out: &Path, step: u64) -> PathBuf {
    out.join(format!("checkpoint-{step}"))
}

/// The stored tensors of a model with BatchNorm's counter.
pub fn stored<B: Backend>(model: &Model<B>) -> StateDict {
    tensors(model, |_, _| true)
}

fn tensors<B: Backend>(model: &Model<B>, keep: impl Fn(&str, Role) -> bool) -> StateDict {
    let plan = model.plan();
    let mut result: StateDict = (plan.specs[..plan.stored].iter().enumerate())
        .filter(|(_, spec)| keep(&spec.name, spec.role))
        .map(|(i, spec)| {
            let data = HostData::F32(model.get(Id(i)));
            (spec.name.clone(), HostTensor { shape: spec.shape.clone(), data })
        })
        .collect();
    let count = HostData::I64(vec![i64::try_from(model.batches_tracked()).unwrap_or(i64::MAX)]);
    result.insert(BATCH_COUNTER.into(), HostTensor { shape: Vec::new(), data: count });
    result
}

/// Whether a tensor is kept beside an adapter's factors. peft's file holds a module that is trained as a whole with its buffers, and
/// refuses to load without them. Of any other it loses BatchNorm's statistics, which move, and the classifier, which may have
/// been made anew.
fn is_beside(lora: &LoraOptions, name: &str, role: Role) -> bool {
    match lora.train_head {
        true => name.starts_with("decode_head."),
        false => role == Role::Statistic || name.starts_with("decode_head.classifier."),
    }
}

/// A model as Hugging Face knows it, copied from the device: all of it, or its adapter with the sidecar.
pub enum Trained {
    /// Every tensor, and the side of the images.
    Full(SegformerConfig, StateDict, usize),
    /// Factors, and what peft has no place for; and the side of the images.
    Adapter(Adapter, HfNames, usize),
}

impl Trained {
    /// Copies what a run with `options` has trained.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn of<B: Backend>(model: &Model<B>, options: &TrainOptions, base_model: &str) -> Result<Self> {
        let copy = match &options.method {
            Method::Fft => Self::Full(model.config().clone(), stored(model), model.size()),
            Method::Lora(lora) => {
                let plan = model.plan();
                let mut factors: StateDict = (plan.adapters.iter().flat_map(|a| [a.a, a.b]))
                    .map(|id| {
                        let spec = &plan.specs[id.0];
                        let data = HostData::F32(model.get(id));
                        (spec.name.clone(), HostTensor { shape: spec.shape.clone(), data })
                    })
                    .collect();
                let beside = tensors(model, |name, role| is_beside(lora, name, role));
                let sidecar = if lora.train_head {
                    factors.extend(beside);
                    StateDict::new()
                } else {
                    beside
                };
                let config = AdapterConfig {
                    r: lora.rank,
                    lora_alpha: lora.alpha,
                    lora_dropout: lora.dropout,
                    target_modules: lora.targets.clone(),
                    modules_to_save: if lora.train_head { vec!["decode_head".into()] } else { Vec::new() },
                    base_model: base_model.into(),
                    use_rslora: false,
                };
                Self::Adapter(Adapter { config, tensors: factors, sidecar }, options.hf_names, model.size())
            }
        };
        // A failed device has no numbers to keep.
        model.backend().check()?;
        Ok(copy)
    }

    /// Writes it into the folder `dir`.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        match self {
            Self::Full(config, tensors, size) => formats::checkpoint::write(dir, config, tensors, *size),
            Self::Adapter(adapter, names, size) => {
                formats::adapter::write(dir, adapter, *names)?;
                formats::write_image_size(dir, *size)
            }
        }
    }
}

/// Everything a checkpoint holds, copied from the device.
pub struct Snapshot {
    trained: Trained,
    optimizer: StateDict,
    /// Where the run stands.
    pub state: State,
}

impl Snapshot {
    /// Copies model, moments and state.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn take<B: Backend>(
        model: &Model<B>,
        moments: &Moments<B>,
        state: &State,
        options: &TrainOptions,
        base_model: &str,
    ) -> Result<Self> {
        let mut optimizer = StateDict::new();
        for (i, (name, _)) in model.trained().enumerate() {
            for (kind, moment) in [("exp_avg", &moments.first[i]), ("exp_avg_sq", &moments.second[i])] {
                let data = model.backend().download(moment);
                let tensor = HostTensor { shape: vec![data.len()], data: HostData::F32(data) };
                optimizer.insert(format!("{kind}.{name}"), tensor);
            }
        }
        Ok(Self { trained: Trained::of(model, options, base_model)?, optimizer, state: state.clone() })
    }

    /// Writes the checkpoint's folder in `out`, which appears under its name only when complete.
    ///
    /// # Errors
    /// When it cannot be written; nothing is left of it then.
    pub fn write(&self, out: &Path) -> Result<()> {
        let step = self.state.global_step;
        let target = folder(out, step);
        let unfinished = out.join(format!(".checkpoint-{step}.unfinished"));
        files::remove_folder(&unfinished)?;
        files::create_folder(&unfinished)?;
        let written = (|| {
            self.trained.write(&unfinished)?;
            write_safetensors(&unfinished.join(OPTIMIZER), &self.optimizer, &[])?;
            files::replace_json(&unfinished.join(STATE), &self.state)?;
            files::remove_folder(&target)?;
            fs::rename(&unfinished, &target).map_err(|e| Error::io(&target, "put the checkpoint in place", e))
        })();
        if written.is_err() {
            // Room on a full disk; what went wrong is reported already.
            let _ = files::remove_folder(&unfinished);
        }
        written
    }
}

/// Removes checkpoints beyond the newest and the best until `keep` are left.
///
/// # Errors
/// When one cannot be removed.
pub fn prune(out: &Path, state: &State, keep: usize) -> Result<()> {
    let mut steps = steps(out)?;
    steps.retain(|&step| step != state.global_step && step != state.best_step);
    let held = if state.global_step == state.best_step { 1 } else { 2 };
    let excess = steps.len().saturating_sub(keep.max(2) - held);
    for step in &steps[..excess] {
        files::remove_folder(&folder(out, *step))?;
    }
    Ok(())
}

/// Steps of the checkpoints in `out`, ascending.
fn steps(out: &Path) -> Result<Vec<u64>> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(out, "list the folder", e)),
    };
    let mut steps: Vec<u64> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok())
        .collect();
    steps.sort_unstable();
    Ok(steps)
}

/// The newest checkpoint's state, if there is one.
///
/// # Errors
/// When it is damaged.
pub fn latest(out: &Path) -> Result<Option<State>> {
    let Some(&step) = steps(out)?.last() else { return Ok(None) };
    let path = folder(out, step).join(STATE);
    let damaged = |e: &dyn std::fmt::Display| {
        Error::input(&path, format!("damaged checkpoint ({e}); delete its folder to continue from the one before"))
    };
    let text = fs::read_to_string(&path).map_err(|e| damaged(&e))?;
    serde_json::from_str(&text).map(Some).map_err(|e| damaged(&e))
}

/// The tensors that checkpoint `step` holds: those of the model, or the factors and what is kept beside them, all in the shapes
/// that `model` has; and BatchNorm's counter.
///
/// # Errors
/// When it is damaged.
pub fn read_tensors<B: Backend>(model: &Model<B>, out: &Path, step: u64, method: &Method) -> Result<StateDict> {
    let dir = folder(out, step);
    let plan = model.plan();
    let mut found = match method {
        Method::Fft => read_safetensors(&dir.join("model.safetensors"))?,
        Method::Lora(_) => {
            let Adapter { mut tensors, sidecar, .. } = formats::adapter::read(&dir)?;
            tensors.extend(sidecar);
            tensors
        }
    };
    let whole = plan.specs[..plan.stored].iter().filter(|spec| match method {
        Method::Fft => true,
        Method::Lora(lora) => is_beside(lora, &spec.name, spec.role),
    });
    let factors = plan.adapters.iter().flat_map(|a| [a.a, a.b]).map(|id| &plan.specs[id.0]);
    let mut tensors = StateDict::new();
    for spec in whole.chain(factors) {
        let Some((name, tensor)) = found.remove_entry(&spec.name) else {
            return Err(Error::input(&dir, format!("lacks {}; delete this checkpoint's folder", spec.name)));
        };
        tensor
            .check_shape(&spec.shape)
            .map_err(|problem| Error::input(&dir, format!("{name} {problem}; delete this checkpoint's folder")))?;
        tensors.insert(name, tensor);
    }
    tensors.extend(found.remove_entry(BATCH_COUNTER));
    Ok(tensors)
}

/// Puts checkpoint `step`'s optimizer state into `moments`.
///
/// # Errors
/// When it is damaged.
pub fn read_moments<B: Backend>(model: &Model<B>, out: &Path, step: u64, moments: &mut Moments<B>) -> Result<()> {
    let path = folder(out, step).join(OPTIMIZER);
    let tensors = read_safetensors(&path)?;
    for (i, (name, id)) in model.trained().enumerate() {
        let len = model.plan().specs[id.0].len();
        for (kind, moment) in [("exp_avg", &mut moments.first[i]), ("exp_avg_sq", &mut moments.second[i])] {
            let name = format!("{kind}.{name}");
            match tensors.get(&name) {
                Some(HostTensor { data: HostData::F32(data), .. }) if data.len() == len => {
                    model.backend().upload(data, moment);
                }
                _ => {
                    let problem = format!("{name} is missing or of another size; delete the checkpoint's folder");
                    return Err(Error::input(&path, problem));
                }
            }
        }
    }
    Ok(())
}
