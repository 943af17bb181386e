//! Full models in Hugging Face's layout: `config.json` beside `model.safetensors` or `pytorch_model.bin`.

use std::path::{Path, PathBuf};

use super::element::quoted;
use super::{PT_METADATA, StateDict, config, names, read_safetensors, read_torch, write_safetensors};
use crate::error::{Error, Result};
use crate::files;
use crate::segformer::SegformerConfig;

/// A full model.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Sizes and labels, validated.
    pub config: SegformerConfig,
    /// Every tensor of the file, under version-4 names. Shapes are the file's own, not yet compared with `config`.
    pub tensors: StateDict,
}

/// Reads a model from its folder, or from its weights file with `config.json` beside it.
///
/// # Errors
/// Missing or malformed files, an unsupported configuration, NaN or infinity in a tensor.
pub fn read(path: &Path) -> Result<Checkpoint> {
    let weights = if path.is_dir() { weights_in(path)? } else { path.to_path_buf() };
    if !weights.exists() {
        let remedy =
            "no such file or folder; give a folder with config.json and model.safetensors or pytorch_model.bin";
        return Err(Error::input(path, remedy));
    }
    let config = config::read(&weights.with_file_name("config.json"))?;
    let tensors = if weights.extension().is_some_and(|e| e == "safetensors") {
        read_safetensors(&weights)?
    } else {
        read_torch(&weights)?
    };
    Ok(Checkpoint { config, tensors: with_v4_names(&weights, tensors)? })
}

/// Writes a model into `dir` (made if missing) as transformers 4 and 5 read it: `config.json`, `preprocessor_config.json` for
/// images of `image_size` x `image_size` pixels, `model.safetensors`. Each file replaces its predecessor in one step, `config.json`
/// last.
///
/// # Errors
/// `dir` cannot be written.
pub fn write(dir: &Path, config: &SegformerConfig, tensors: &StateDict, image_size: usize) -> Result<()> {
    files::create_folder(dir)?;
    // The large file first: where the disk is full, nothing is left.
    write_safetensors(&dir.join("model.safetensors"), tensors, PT_METADATA)?;
    config::write_image_size(dir, image_size)?;
    config::write(&dir.join("config.json"), config)
}

/// The weights file of a model's folder.
fn weights_in(dir: &Path) -> Result<PathBuf> {
    let file = ["model.safetensors", "pytorch_model.bin"].map(|name| dir.join(name)).into_iter().find(|f| f.exists());
    file.ok_or_else(|| {
        let remedy = if dir.join("adapter_config.json").exists() {
            "holds a peft adapter, not a model; name the base model here and the adapter with --adapter"
        } else {
            "holds neither model.safetensors nor pytorch_model.bin; download one of them and config.json into it"
        };
        Error::input(dir, remedy)
    })
}

/// Renames every tensor to version 4's names.
pub(super) fn with_v4_names(path: &Path, tensors: StateDict) -> Result<StateDict> {
    let mut renamed = StateDict::new();
    for (name, tensor) in tensors {
        let v4 = names::to_v4(&name);
        if renamed.insert(v4.clone(), tensor).is_some() {
            let problem = format!("holds tensor {} under its version-4 and its version-5 name; keep one", quoted(&v4));
            return Err(Error::input(path, problem));
        }
    }
    Ok(renamed)
}
