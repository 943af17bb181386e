//! LoRA adapters in peft's layout: `adapter_config.json`, `adapter_model.safetensors`, and a sidecar of this program's own.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::checkpoint::with_v4_names;
use super::element::quoted;
use super::names::{self, matches};
use super::{HfNames, HostTensor, PT_METADATA, StateDict, file, read_safetensors, write_safetensors};
use crate::error::{Error, Result};
use crate::files;

/// What every tensor's name begins with in peft's files.
const PREFIX: &str = "base_model.model.";

const CONFIG: &str = "adapter_config.json";
const MODEL: &str = "adapter_model.safetensors";
const SIDECAR: &str = "segpeft_sidecar.safetensors";

/// The hyper-parameters that `adapter_config.json` states. Names are version 4's.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank r of the factors.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Dropout at the adapter's input.
    pub lora_dropout: f32,
    /// The scale is alpha / sqrt(r) in place of alpha / r.
    pub use_rslora: bool,
    /// Patterns, by [`names::matches`], of the modules that have factors. Some may match nothing.
    pub target_modules: Vec<String>,
    /// Patterns of the modules that were trained as a whole.
    pub modules_to_save: Vec<String>,
    /// Name or path of the model the adapter belongs to.
    pub base_model: String,
}

impl AdapterConfig {
    /// The factor before B·A: alpha / r, or alpha / sqrt(r).
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }
}

/// An adapter. Names are version 4's.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Hyper-parameters.
    pub config: AdapterConfig,
    /// `<module>.lora_A.weight`, `(r, in)` or `(r, in, kh, kw)`, and `<module>.lora_B.weight`, `(out, r)` or `(out, r, 1, 1)`;
    /// beside them the tensors of the modules trained as a whole, under their names in a state dict.
    pub tensors: StateDict,
    /// Tensors of the full state dict that peft's files lose: BatchNorm's running statistics, a fresh classifier.
    pub sidecar: StateDict,
}

/// Reads an adapter's folder, written by peft under transformers 4 or 5, or by [`write`].
///
/// # Errors
/// Missing or malformed files, a variant of LoRA that computes something else (DoRA, ranks per module, ...) by the name of
/// its field, factors that do not belong together, NaN or infinity in a tensor.
pub fn read(dir: &Path) -> Result<Adapter> {
    let path = dir.join(CONFIG);
    let mut config = parse(&file::read_json(&path)?).map_err(|e| Error::input(&path, e))?;

    let path = dir.join(MODEL);
    let mut tensors = StateDict::new();
    for (name, tensor) in read_safetensors(&path)? {
        let Some(name) = name.strip_prefix(PREFIX) else {
            return Err(Error::input(&path, format!("tensor {} does not begin with {PREFIX:?}", quoted(&name))));
        };
        tensors.insert(name.to_owned(), tensor);
    }
    let tensors = with_v4_names(&path, tensors)?;
    let modules = check(&tensors, &config).map_err(|e| Error::input(&path, e))?;
    config.target_modules = covering(config.target_modules, &modules);

    let path = dir.join(SIDECAR);
    let sidecar = if path.exists() { with_v4_names(&path, read_safetensors(&path)?)? } else { StateDict::new() };
    Ok(Adapter { config, tensors, sidecar })
}

/// Writes an adapter into `dir` (made if missing) with the module names of one version of transformers. Each file replaces its
/// predecessor in one step, `adapter_config.json` last; without sidecar tensors there is no sidecar file.
///
/// # Errors
/// `dir` cannot be written.
pub fn write(dir: &Path, adapter: &Adapter, names: HfNames) -> Result<()> {
    files::create_folder(dir)?;
    type Rename = fn(&str) -> String;
    let (name, pattern): (Rename, Rename) = match names {
        HfNames::V4 => (names::to_v4, names::pattern_to_v4),
        HfNames::V5 => (names::to_v5, names::pattern_to_v5),
    };
    let sidecar = dir.join(SIDECAR);
    if !adapter.sidecar.is_empty() {
        write_safetensors(&sidecar, &adapter.sidecar, PT_METADATA)?;
    } else {
        files::remove(&sidecar)?;
    }
    let tensors: StateDict = adapter.tensors.iter().map(|(n, t)| (format!("{PREFIX}{}", name(n)), t.clone())).collect();
    write_safetensors(&dir.join(MODEL), &tensors, PT_METADATA)?;

    let modules = adapted_modules(&adapter.tensors).map(name).collect();
    let config = &adapter.config;
    let targets = covering(config.target_modules.iter().map(|p| pattern(p)).collect(), &modules);
    let saved: Vec<String> = config.modules_to_save.iter().map(|p| pattern(p)).collect();
    files::replace_json(&dir.join(CONFIG), &config_file(config, &targets, &saved))
}

/// The modules that have factors.
fn adapted_modules(tensors: &StateDict) -> impl Iterator<Item = &str> {
    tensors.keys().filter_map(|name| name.strip_suffix(".lora_A.weight"))
}

/// `patterns`, and the full names of those `modules` that none of them matches, so that peft makes factors for all.
fn covering(mut patterns: Vec<String>, modules: &BTreeSet<String>) -> Vec<String> {
    let missed = modules.iter().filter(|module| !patterns.iter().any(|p| matches(module, p)));
    let missed: Vec<String> = missed.cloned().collect();
    patterns.extend(missed);
    patterns
}

/// Checks that factors come in pairs of the configured rank and that other tensors belong to modules trained as a whole.
/// Returns the modules that have factors.
fn check(tensors: &StateDict, config: &AdapterConfig) -> std::result::Result<BTreeSet<String>, String> {
    let r = config.r;
    for (name, tensor) in tensors {
        if let Some(module) = name.strip_suffix(".lora_A.weight") {
            let b = tensors.get(&format!("{module}.lora_B.weight"));
            let b =
                b.ok_or_else(|| format!("module {} has lora_A but no lora_B; fetch the file again", quoted(module)))?;
            let fits = |t: &HostTensor, axis: usize| matches!(t.shape.len(), 2 | 4) && t.shape[axis] == r;
            if !fits(tensor, 0) || !fits(b, 1) || tensor.shape.len() != b.shape.len() {
                let shapes = format!("{:?} and {:?}", tensor.shape, b.shape);
                return Err(format!(
                    "the factors of {} have shapes {shapes}, which rank {r} does not fit",
                    quoted(module)
                ));
            }
        } else if let Some(module) = name.strip_suffix(".lora_B.weight") {
            if !tensors.contains_key(&format!("{module}.lora_A.weight")) {
                return Err(format!("module {} has lora_B but no lora_A; fetch the file again", quoted(module)));
            }
        } else if name.contains(".lora_") {
            return Err(format!("tensor {} belongs to a variant of LoRA that is not supported", quoted(name)));
        } else {
            // peft matches these patterns by the bare end of a module's name.
            let mut modules = name.match_indices('.').map(|(at, _)| &name[..at]);
            if !modules.any(|module| config.modules_to_save.iter().any(|pattern| module.ends_with(pattern.as_str()))) {
                return Err(format!("tensor {} is no factor and not among modules_to_save", quoted(name)));
            }
        }
    }
    Ok(adapted_modules(tensors).map(str::to_owned).collect())
}

/// Reads the fields of `adapter_config.json`.
fn parse(fields: &Map<String, Value>) -> std::result::Result<AdapterConfig, String> {
    let shown = |name: &str| quoted(&fields.get(name).unwrap_or(&Value::Null).to_string());
    if fields.get("peft_type") != Some(&json!("LORA")) {
        return Err(format!("peft_type is {}; only \"LORA\" is supported", shown("peft_type")));
    }
    // Each of these changes what the adapter computes, unless it has one of these values.
    let neutral = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    };
    for name in [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "fan_in_fan_out",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "monteclora_config",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    ] {
        if fields.get(name).is_some_and(|value| !neutral(value)) {
            return Err(format!("{name} is {}, which is not supported; train the adapter without it", shown(name)));
        }
    }
    if !matches!(fields.get("bias").map(Value::as_str), None | Some(Some("none"))) {
        return Err(format!("bias is {}; only \"none\" is supported", shown("bias")));
    }
    // The other initialisations (pissa, olora, ...) also change the base weights.
    if !matches!(fields.get("init_lora_weights"), None | Some(Value::Null | Value::Bool(_)))
        && !["gaussian", "eva", "orthogonal"].iter().any(|name| fields["init_lora_weights"] == *name)
    {
        let remedy = "which changes the base weights; convert it to plain LoRA with peft";
        return Err(format!("init_lora_weights is {}, {remedy}", shown("init_lora_weights")));
    }
    let r = fields.get("r").and_then(Value::as_u64).filter(|r| (1..=65_536).contains(r));
    let r = r.ok_or_else(|| format!("r is {}; it must be an integer from 1 to 65536", shown("r")))?;
    let lora_alpha = fields.get("lora_alpha").and_then(Value::as_f64);
    let lora_alpha = lora_alpha.ok_or_else(|| format!("lora_alpha is {}; it must be a number", shown("lora_alpha")))?;
    let lora_dropout = fields.get("lora_dropout").map_or(Some(0.0), Value::as_f64).filter(|p| (0.0..1.0).contains(p));
    let lora_dropout =
        lora_dropout.ok_or_else(|| format!("lora_dropout is {}; it must lie in [0, 1)", shown("lora_dropout")))?;
    let use_rslora = match fields.get("use_rslora") {
        None | Some(Value::Null) => false,
        Some(value) => {
            value.as_bool().ok_or_else(|| format!("use_rslora is {}; it must be a boolean", shown("use_rslora")))?
        }
    };
    let list = |name: &str| -> std::result::Result<Vec<String>, String> {
        let items = match fields.get(name) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(items)) => items.iter().map(Value::as_str).collect(),
            Some(_) => None,
        };
        let items: Vec<&str> = items.ok_or_else(|| format!("{name} is {}; it must be a list of names", shown(name)))?;
        Ok(items.into_iter().map(names::pattern_to_v4).collect())
    };
    let target_modules = match fields.get("target_modules") {
        // A regular expression, or peft's word for every linear layer: the modules are known by their factors.
        Some(Value::String(_)) => Vec::new(),
        _ => list("target_modules")?,
    };
    Ok(AdapterConfig {
        r: r as usize,
        lora_alpha,
        lora_dropout: lora_dropout as f32,
        use_rslora,
        target_modules,
        modules_to_save: list("modules_to_save")?,
        base_model: fields.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default().to_owned(),
    })
}

/// The contents of `adapter_config.json`: the fields of peft 0.17, which later releases read too.
fn config_file(config: &AdapterConfig, targets: &[String], saved: &[String]) -> Value {
    let alpha = if config.lora_alpha.fract() == 0.0 && config.lora_alpha.abs() < 1e15 {
        json!(config.lora_alpha as i64)
    } else {
        json!(config.lora_alpha)
    };
    // By way of its shortest decimal form: 0.1, not 0.10000000149011612.
    let dropout: f64 = config.lora_dropout.to_string().parse().unwrap_or_default();
    json!({
        "alpha_pattern": {},
        "auto_mapping": {
            "base_model_class": "SegformerForSemanticSegmentation",
            "parent_library": "transformers.models.segformer.modeling_segformer",
        },
        "base_model_name_or_path": config.base_model,
        "bias": "none",
        "corda_config": null,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": false,
        "lora_dropout": dropout,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": config.r,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "target_parameters": null,
        "task_type": null,
        "trainable_token_indices": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": config.use_rslora,
    })
}
