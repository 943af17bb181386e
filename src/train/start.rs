//! Where a run starts: a checkpoint or fresh weights, perhaps with an adapter, and how they enter a model.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use super::memory::{MemoryPlan, Planned, fit};
use super::options::{LoraOptions, Method, Protocol, TrainOptions};
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Gpu, GpuPlace, Memory};
use crate::error::Kind;
use crate::formats::{Adapter, Checkpoint, HostData, HostTensor, StateDict};
use crate::lora::{self, Match};
use crate::progress::Progress;
use crate::random::{Philox, Purpose};
use crate::segformer::{
    BATCH_COUNTER, Id, Model, ModelOptions, Module, ModuleKind, Role, SegformerConfig, TensorSpec, Trainable, modules,
};
use crate::system::check_memory;
use crate::{Error, Result};

/// Classes of the datasets this program reads: background and polyp.
const LABELS: usize = 2;

/// Weights to start from.
#[derive(Clone, Debug)]
pub enum Weights {
    /// Fresh ones, drawn from the run's seed.
    Random(SegformerConfig),
    /// Those of a checkpoint.
    Checkpoint(Checkpoint),
}

/// A starting point.
#[derive(Clone, Debug)]
pub struct Start {
    /// Name or path of the base model, for `adapter_config.json`.
    pub name: String,
    /// The base model.
    pub weights: Weights,
    /// An adapter on it.
    pub adapter: Option<Adapter>,
    /// Name or path of the adapter, for messages; empty without one.
    pub adapter_name: String,
}

/// A starting point made ready for training: every stored tensor by name, in the layout on disk.
pub(super) struct Prepared {
    pub config: SegformerConfig,
    pub tensors: StateDict,
    pub trainable: Trainable,
}

impl Start {
    /// The configuration with this program's labels and the overrides of `options`.
    fn config(&self, options: &TrainOptions) -> SegformerConfig {
        let mut config = match &self.weights {
            Weights::Random(config) => config.clone(),
            Weights::Checkpoint(checkpoint) => checkpoint.config.clone(),
        };
        if config.num_labels() != LABELS {
            config.id2label = SegformerConfig::default().id2label;
        }
        config.drop_path_rate = options.drop_path.unwrap_or(config.drop_path_rate);
        config.classifier_dropout_prob = options.classifier_dropout.unwrap_or(config.classifier_dropout_prob);
        config
    }

    /// Says what a run with `options` will train, and what is missing or left over in the checkpoint. For a grid, whose
    /// runs differ in rank, parameters are given per unit of rank.
    ///
    /// # Errors
    /// Those that the run itself would end in: tensors that do not fit, patterns that match nothing.
    pub fn announce(&self, options: &TrainOptions, grid: bool, progress: &Progress) -> Result<()> {
        match (self.prepare(options, progress)?.trainable, &options.method) {
            (Trainable::Adapters { matches, .. }, Method::Lora(lora)) => {
                table(&matches, lora, grid, progress);
                if matches!(self.weights, Weights::Random(_)) {
                    progress.info(format!(
                        "  they belong to random weights, which eval and predict need as a model; to write it: \
                         segpeft-native export --model random --seed {} --out DIR",
                        options.seed
                    ));
                }
            }
            _ => progress.info("full fine-tuning: every parameter is trained"),
        }
        Ok(())
    }

    /// Completes the weights for a run with `options`: fresh where the checkpoint has none that fit, the adapter's on top.
    ///
    /// # Errors
    /// When tensors are missing or of another shape, a target pattern selects nothing, or the adapter does not fit.
    pub(super) fn prepare(&self, options: &TrainOptions, progress: &Progress) -> Result<Prepared> {
        let config = self.config(options);
        let modules = modules(&config);
        let specs: Vec<TensorSpec> = modules.iter().flat_map(Module::tensors).collect();
        let mut tensors = match &self.weights {
            Weights::Random(_) => StateDict::new(),
            Weights::Checkpoint(checkpoint) => {
                let (tensors, anew) = select(&specs, &checkpoint.tensors, &self.name, progress)?;
                if !anew.is_empty() {
                    progress.info(format!("made anew, drawn from the seed: {}", anew.join(", ")));
                }
                tensors
            }
        };
        self.overlay(&specs, &mut tensors, progress)?;
        complete(&mut tensors, &specs, &config, options.seed);
        let trainable = match &options.method {
            Method::Fft => Trainable::Everything,
            Method::Lora(lora) => self.adapters(lora, options, &modules, &mut tensors, progress)?,
        };
        Ok(Prepared { config, tensors, trainable })
    }

    /// Puts what the adapter holds of whole tensors over the model's.
    fn overlay(&self, specs: &[TensorSpec], to: &mut StateDict, progress: &Progress) -> Result<()> {
        let Some(adapter) = &self.adapter else { return Ok(()) };
        let sources = [&adapter.sidecar, &adapter.tensors];
        if !sources.iter().any(|tensors| tensors.contains_key(BATCH_COUNTER)) {
            progress.warn(format!(
                "{}: comes without the classifier and BatchNorm statistics it was trained with (peft's files lose them, and \
                 there is no segpeft_sidecar.safetensors); those of {} take their place",
                self.adapter_name, self.name
            ));
        }
        for from in sources {
            for spec in specs {
                if let Some(tensor) = from.get(&spec.name) {
                    check_shape(&self.adapter_name, &spec.name, tensor, &spec.shape)?;
                    to.insert(spec.name.clone(), tensor.clone());
                }
            }
            if let Some(counter) = from.get(BATCH_COUNTER) {
                to.insert(BATCH_COUNTER.into(), counter.clone());
            }
        }
        Ok(())
    }

    /// Refuses an adapter that holds factors of other modules than `modules`.
    fn check_factors(&self, adapter: &Adapter, modules: &[&Module]) -> Result<()> {
        let known: BTreeSet<&str> = modules.iter().map(|m| m.name.as_str()).collect();
        let factors = adapter.tensors.keys().filter_map(|name| name.strip_suffix(".lora_A.weight"));
        match factors.into_iter().find(|module| !known.contains(module)) {
            None => Ok(()),
            Some(stranger) => Err(Error::input(
                &self.adapter_name,
                format!("has factors for {stranger}, which carries none in this model; it belongs to another"),
            )),
        }
    }

    fn adapters(
        &self,
        lora: &LoraOptions,
        options: &TrainOptions,
        modules: &[Module],
        tensors: &mut StateDict,
        progress: &Progress,
    ) -> Result<Trainable> {
        let excluded = |name: &str| lora.train_head && name.starts_with("decode_head.");
        let (matches, unused) = lora::select(modules, &lora.targets, excluded)?;
        if !unused.is_empty() {
            let message = format!("--targets {}: matches no module of this model", unused.join(","));
            if (options.protocol != Protocol::Notebook && self.adapter.is_none()) || matches.is_empty() {
                return Err(Error::usage(format!(
                    "{message}; its modules are named like segformer.encoder.block.0.0.attention.self.query"
                )));
            }
            progress.warn(format!("{message}, so no adapter attaches there"));
        }
        if matches.is_empty() {
            return Err(Error::usage("--targets: no module is left to carry an adapter; the head is trained whole"));
        }
        if lora.dropout > 0.0
            && let Some(m) = matches.iter().find(|m| !matches!(m.module.kind, ModuleKind::Linear))
        {
            return Err(Error::usage(format!(
                "--lora-dropout: {} is a convolution, where dropout is not supported; use --lora-dropout 0 or other targets",
                m.module.name
            )));
        }
        if let Some(adapter) = &self.adapter {
            self.check_factors(adapter, &matches.iter().map(|m| &m.module).collect::<Vec<_>>())?;
        }
        for m in &matches {
            let area = m.module.side() * m.module.side();
            let convolution = !matches!(m.module.kind, ModuleKind::Linear);
            for (factor, outer, inner) in
                [("lora_A", lora.rank, m.module.inputs * area), ("lora_B", m.module.outputs, lora.rank)]
            {
                let name = format!("{}.{factor}.weight", m.module.name);
                let side = if factor == "lora_A" { m.module.side() } else { 1 };
                let shape =
                    if convolution { vec![outer, inner / (side * side), side, side] } else { vec![outer, inner] };
                let held = self.adapter.as_ref().map(|a| a.tensors.get(&name));
                let data = match held {
                    Some(Some(tensor)) => {
                        check_shape(&self.adapter_name, &name, tensor, &shape)?;
                        tensor.data.clone()
                    }
                    Some(None) => {
                        return Err(Error::usage(format!(
                            "--adapter: it has no {name}; leave --targets to the adapter"
                        )));
                    }
                    None => HostData::F32(fresh_factor(&name, factor, outer * inner, inner, options.seed)),
                };
                tensors.insert(name, HostTensor { shape, data });
            }
        }
        Ok(Trainable::Adapters {
            matches,
            rank: lora.rank,
            scale: lora.alpha / lora.rank as f64,
            dropout: lora.dropout,
            head: lora.train_head,
        })
    }
}

/// The tensors of the checkpoint `path` that the model has. A head of another size, and a head that is missing altogether, are left
/// out; the second list names what is missing of it.
fn select(specs: &[TensorSpec], from: &StateDict, path: &str, progress: &Progress) -> Result<(StateDict, Vec<String>)> {
    let headless = !from.keys().any(|name| name.starts_with("decode_head."));
    let mut result = StateDict::new();
    let mut anew = Vec::new();
    for spec in specs {
        match from.get(&spec.name) {
            Some(tensor) if tensor.shape != spec.shape && spec.name.starts_with("decode_head.classifier.") => {
                anew.push(spec.name.clone());
            }
            Some(tensor) => {
                check_shape(path, &spec.name, tensor, &spec.shape)?;
                result.insert(spec.name.clone(), tensor.clone());
            }
            None if headless && spec.name.starts_with("decode_head.") => anew.push(spec.name.clone()),
            None => {
                let remedy = "it is not a whole SegFormer of its config.json; fetch both again";
                return Err(Error::input(path, format!("lacks {}: {remedy}", spec.name)));
            }
        }
    }
    if let Some(counter) = from.get(BATCH_COUNTER) {
        result.insert(BATCH_COUNTER.into(), counter.clone());
    }
    let strangers: Vec<&str> = from
        .keys()
        .map(String::as_str)
        .filter(|name| !result.contains_key(*name) && !anew.iter().any(|n| n == name))
        .collect();
    if !strangers.is_empty() {
        progress.warn(format!("{path}: holds tensors this model has no use for: {}", strangers.join(", ")));
    }
    Ok((result, anew))
}

/// Compares a tensor of the file or folder `from` with the shape the model needs.
fn check_shape(from: &str, name: &str, tensor: &HostTensor, shape: &[usize]) -> Result<()> {
    tensor.check_shape(shape).map_err(|problem| {
        Error::input(from, format!("{name} {problem}; use the config.json and the adapter that belong to it"))
    })
}

/// The fresh model that a run with `seed` begins with.
pub fn fresh_checkpoint(config: &SegformerConfig, seed: u64) -> Checkpoint {
    let specs: Vec<TensorSpec> = modules(config).iter().flat_map(Module::tensors).collect();
    let counter = HostTensor { shape: Vec::new(), data: HostData::I64(vec![0]) };
    let mut tensors = StateDict::from([(BATCH_COUNTER.into(), counter)]);
    complete(&mut tensors, &specs, config, seed);
    Checkpoint { config: config.clone(), tensors }
}

/// Adds what is missing of `specs`, fresh.
fn complete(tensors: &mut StateDict, specs: &[TensorSpec], config: &SegformerConfig, seed: u64) {
    for (site, spec) in specs.iter().enumerate() {
        if !tensors.contains_key(&spec.name) {
            let data = fresh(spec, site, seed, config.initializer_range);
            tensors.insert(spec.name.clone(), HostTensor { shape: spec.shape.clone(), data: HostData::F32(data) });
        }
    }
}

/// A fresh tensor as transformers makes it: N(0, range), biases 0, normalisations 1 and 0.
fn fresh(spec: &TensorSpec, site: usize, seed: u64, range: f32) -> Vec<f32> {
    match spec.role {
        Role::Product | Role::Depthwise => {
            let stream = Philox::new(seed, Purpose::Weights, site as u32, 0);
            (0..spec.len() as u64).into_par_iter().map(|i| stream.normal(i) * range).collect()
        }
        Role::Bias => vec![0.0; spec.len()],
        Role::Scale => vec![1.0; spec.len()],
        Role::Statistic => vec![if spec.name.ends_with("var") { 1.0 } else { 0.0 }; spec.len()],
    }
}

/// A fresh factor as peft makes it: A uniform in ±1/sqrt(inputs) (Kaiming with a = sqrt 5), B zero.
fn fresh_factor(name: &str, factor: &str, len: usize, inputs: usize, seed: u64) -> Vec<f32> {
    if factor == "lora_B" {
        return vec![0.0; len];
    }
    // By name, so that a module's factor does not depend on which others carry adapters.
    let stream = Philox::new(seed, Purpose::Weights, crc32fast::hash(name.as_bytes()) & 0xFF_FFFF, 1);
    let bound = 1.0 / (inputs as f32).sqrt();
    (0..len as u64).map(|i| (2.0 * stream.uniform(i) - 1.0) * bound).collect()
}

/// Shows which modules carry adapters, by pattern; with `-v` one by one. Parameters are those of the rank, or of each unit
/// of it.
fn table(matches: &[Match], lora: &LoraOptions, per_rank: bool, progress: &Progress) {
    let (rank, unit) = if per_rank { (1, " x r") } else { (lora.rank, "") };
    let mut by_pattern: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for m in matches {
        let entry = by_pattern.entry(&m.pattern).or_default();
        entry.0 += 1;
        entry.1 += m.parameters(rank);
        progress.detail(format!(
            "  {:<60} {:>5} x {:<5} {:>8}{unit} parameters",
            m.module.name,
            m.module.outputs,
            m.module.inputs * m.module.side() * m.module.side(),
            m.parameters(rank)
        ));
    }
    progress.info(match per_rank {
        true => "adapters of rank r sit on:".to_string(),
        false => format!("adapters of rank {}, alpha {} sit on:", lora.rank, lora.alpha),
    });
    let row = |name: &str, modules: usize, parameters: usize| {
        progress.info(format!("  {name:<24} {modules:>3} modules {parameters:>9}{unit} parameters"));
    };
    for (pattern, (modules, parameters)) in &by_pattern {
        row(pattern, *modules, *parameters);
    }
    row("together", matches.len(), matches.iter().map(|m| m.parameters(rank)).sum());
    if lora.train_head {
        progress.info("  and the decode head is trained whole");
    }
}

/// Channels of the widest head that the GPU's attention takes.
const WIDEST_HEAD: usize = 64;

/// Images for which buffers are reserved on trial where more are asked for.
const TRIAL: usize = 32;

/// Refuses pictures that are too small for a model.
fn check_size(config: &SegformerConfig, size: usize) -> Result<()> {
    config.check_size(size).map_err(|problem| Error::usage(format!("--model, --size: {problem}")))
}

/// A model on the CPU that holds `tensors`, and the plan of its memory. `remedy` names the options whose lower values need less.
///
/// # Errors
/// When the pictures are too small for the model, or the memory does not suffice.
pub(super) fn on_cpu(
    config: &SegformerConfig,
    options: ModelOptions,
    trainable: &Trainable,
    tensors: &StateDict,
    remedy: &str,
) -> Result<(Model<Cpu<f32>>, MemoryPlan)> {
    check_size(config, options.size)?;
    let planned = |batch: usize| {
        let model = Model::new(Cpu::new(None)?, config, ModelOptions { batch, ..options }, trainable);
        check_memory(MemoryPlan::on_cpu(&model).bytes, options.batch, options.size, remedy)?;
        Ok(model)
    };
    // An absurd number of buffers cannot even be reserved; a few tell that.
    if options.batch > TRIAL {
        planned(TRIAL)?;
    }
    let mut model = planned(options.batch)?;
    load(&mut model, tensors);
    let plan = MemoryPlan::on_cpu(&model);
    Ok((model, plan))
}

/// A model on a GPU that holds `tensors`, in one block of memory that suffices for all it will do, and the plan of that memory.
/// `lower` says how the user asks for smaller batches.
///
/// # Errors
/// When the pictures are too small for the model; when the memory does not suffice, with the batch that would fit; or when the
/// device fails.
pub(super) fn on_gpu(
    gpu: &GpuPlace,
    config: &SegformerConfig,
    options: ModelOptions,
    trainable: &Trainable,
    tensors: &StateDict,
    lower: &dyn Fn(usize) -> String,
) -> Result<(Model<Gpu>, MemoryPlan)> {
    check_size(config, options.size)?;
    let head = |(channels, heads): (&usize, &usize)| channels / heads;
    if let Some(head) = config.hidden_sizes.iter().zip(&config.num_attention_heads).map(head).find(|&h| h > WIDEST_HEAD)
    {
        return Err(Error::new(
            Kind::Device,
            format!(
                "the model's attention heads have {head} channels; on a GPU up to {WIDEST_HEAD} are supported: use --device cpu"
            ),
        ));
    }
    let room = (gpu.driver.name(), gpu.room()?);
    let Planned { model: dry, plan } = fit(config, options, trainable, room, gpu.apart, lower)?;
    let mut model = Model::new(gpu.backend(dry.backend())?, config, options, trainable);
    load(&mut model, tensors);
    model.backend().check()?;
    Ok((model, plan))
}

/// Puts tensors into a model and makes what is derived from them.
pub(super) fn load<B: Backend>(model: &mut Model<B>, tensors: &StateDict) {
    for i in 0..model.plan().specs.len() {
        if let Some(HostTensor { data: HostData::F32(data), .. }) = tensors.get(&model.plan().specs[i].name) {
            model.set(Id(i), data);
        }
    }
    if let Some(HostTensor { data: HostData::I64(count), .. }) = tensors.get(BATCH_COUNTER) {
        model.set_batches_tracked(count.first().map_or(0, |&c| c.max(0) as u64));
    }
    model.refresh();
}

/// The model with its adapter, if there is one, merged into the weights, `W + s·B·A`, as a full checkpoint.
///
/// # Errors
/// When tensors are missing or of another shape, or adapter and model do not fit together.
pub fn merged(start: &Start, progress: &Progress) -> Result<Checkpoint> {
    let Weights::Checkpoint(checkpoint) = &start.weights else {
        return Err(Error::usage("--model random: there are no weights to merge into"));
    };
    let mut config = checkpoint.config.clone();
    let held = start.adapter.iter().flat_map(|a| [&a.tensors, &a.sidecar]);
    let classifier = held.filter_map(|tensors| tensors.get("decode_head.classifier.weight")).next();
    if classifier.is_some_and(|t| t.shape.first() == Some(&LABELS)) && config.num_labels() != LABELS {
        config.id2label = SegformerConfig::default().id2label;
    }
    let modules = modules(&config);
    let specs: Vec<TensorSpec> = modules.iter().flat_map(Module::tensors).collect();
    let (mut tensors, _) = select(&specs, &checkpoint.tensors, &start.name, progress)?;
    start.overlay(&specs, &mut tensors, progress)?;
    if let Some(spec) = specs.iter().find(|spec| !tensors.contains_key(&spec.name)) {
        let problem = format!("holds no {} for {} classes; fine-tune it first (train)", spec.name, config.num_labels());
        return Err(Error::input(&start.name, problem));
    }
    let Some(adapter) = &start.adapter else { return Ok(Checkpoint { config, tensors }) };
    start.check_factors(adapter, &modules.iter().collect::<Vec<_>>())?;
    for module in &modules {
        let factor = |f: &str| adapter.tensors.get(&format!("{}.{f}.weight", module.name));
        let (Some(a), Some(b)) = (factor("lora_A"), factor("lora_B")) else { continue };
        let name = format!("{}.weight", module.name);
        let Some(weight) = tensors.get_mut(&name) else { continue };
        merge(weight, a, b, adapter.config.scale())
            .map_err(|problem| Error::input(&start.adapter_name, format!("{name}: {problem}")))?;
    }
    Ok(Checkpoint { config, tensors })
}

/// `weight += scale·B·A`, over flattened convolution kernels too.
fn merge(weight: &mut HostTensor, a: &HostTensor, b: &HostTensor, scale: f64) -> std::result::Result<(), String> {
    let outputs = weight.shape.first().copied().unwrap_or(0);
    let inputs: usize = weight.shape.iter().skip(1).product();
    let rank = a.shape.first().copied().unwrap_or(0);
    let fits = |t: &HostTensor, rows: usize, columns: usize| {
        t.shape.first() == Some(&rows) && t.shape.iter().skip(1).product::<usize>() == columns
    };
    let (HostData::F32(weight), HostData::F32(a_data), HostData::F32(b_data)) = (&mut weight.data, &a.data, &b.data)
    else {
        return Err("adapter and weight must be floating-point tensors".into());
    };
    if !fits(a, rank, inputs) || !fits(b, outputs, rank) {
        return Err(format!(
            "factors of shapes {:?} and {:?} do not fit it; the adapter belongs to another model",
            a.shape, b.shape
        ));
    }
    for o in 0..outputs {
        for i in 0..inputs {
            let sum: f64 = (0..rank).map(|r| f64::from(b_data[o * rank + r]) * f64::from(a_data[r * inputs + i])).sum();
            let w = &mut weight[o * inputs + i];
            *w = (f64::from(*w) + scale * sum) as f32;
        }
    }
    Ok(())
}
