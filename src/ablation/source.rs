//! Where a run starts: a checkpoint or fresh weights, with or without an adapter, and what identifies them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::config;
use crate::dataset::is_size;
use crate::error::Result;
use crate::formats::{self, HostData, StateDict};
use crate::progress::Progress;
use crate::segformer::SegformerConfig;
use crate::train::{Start, Weights};

/// The path of fresh weights.
const RANDOM: &str = "random";

/// The model a command starts from.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// Fresh weights of this architecture, drawn from the seed.
    Random(Box<SegformerConfig>),
    /// A Hugging Face directory, or a weights file with `config.json` beside it.
    Path(PathBuf),
}

/// What identifies a model or an adapter, independent of where and in which format it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// Where it was read from; `random` for fresh weights.
    pub path: String,
    /// CRC-32 over configuration, names, shapes and numbers, in hexadecimal.
    pub fingerprint: String,
}

/// A starting point in memory.
pub struct Source {
    /// What training starts from.
    pub start: Start,
    /// Identity of the base model.
    pub model: Identity,
    /// Identity of the adapter.
    pub adapter: Option<Identity>,
    /// Side of the images that the adapter, or the model where there is none, was trained on, if that is written beside it.
    pub image_size: Option<usize>,
}

impl Source {
    /// Reads the model, and the adapter if there is one. Warns if the run beside the adapter says that it was trained on another
    /// model.
    ///
    /// # Errors
    /// Those of [`formats::checkpoint::read`] and [`formats::adapter::read`].
    pub fn open(model: &ModelSource, adapter: Option<&Path>, progress: &Progress) -> Result<Self> {
        let (weights, path, fingerprint) = match model {
            ModelSource::Random(config) => {
                let fingerprint = identify(&**config, &StateDict::new());
                (Weights::Random((**config).clone()), RANDOM.into(), fingerprint)
            }
            ModelSource::Path(path) => {
                let checkpoint = formats::checkpoint::read(path)?;
                let fingerprint = identify(&checkpoint.config, &checkpoint.tensors);
                (Weights::Checkpoint(checkpoint), path.display().to_string(), fingerprint)
            }
        };
        let image_size = match (adapter, model) {
            (Some(path), _) => trained_size(path),
            (None, ModelSource::Path(path)) => trained_size(path),
            (None, ModelSource::Random(_)) => None,
        };
        let model = Identity { path, fingerprint };
        let Some(path) = adapter else {
            return Ok(Self {
                start: Start { name: model.path.clone(), weights, adapter: None, adapter_name: String::new() },
                model,
                adapter: None,
                image_size,
            });
        };
        let adapter = formats::adapter::read(path)?;
        let mut tensors = adapter.sidecar.clone();
        tensors.extend(adapter.tensors.clone());
        let fingerprint = identify(&adapter.config.scale(), &tensors);
        let identity = Identity { path: path.display().to_string(), fingerprint };
        if let Some(base) = base_of(path).filter(|base| base.path != RANDOM && base.fingerprint != model.fingerprint) {
            progress.warn(format!(
                "{}: was trained on another model than {} (on {}, by the {} beside it)",
                identity.path,
                model.path,
                base.path,
                config::FILE
            ));
        }
        Ok(Self {
            start: Start {
                name: model.path.clone(),
                weights,
                adapter: Some(adapter),
                adapter_name: identity.path.clone(),
            },
            model,
            adapter: Some(identity),
            image_size,
        })
    }
}

/// The model that the run trained whose folder an adapter's lies in, if it says so.
fn base_of(adapter: &Path) -> Option<Identity> {
    #[derive(Deserialize)]
    struct Trained {
        model: Identity,
    }
    let run = adapter.canonicalize().ok()?.parent()?.join(config::FILE);
    // No more than a run writes there, and nothing that never ends.
    let file = run.is_file().then(|| File::open(&run).ok())??;
    let mut text = Vec::new();
    file.take(1 << 20).read_to_end(&mut text).ok()?;
    serde_json::from_slice::<Trained>(&text).ok().map(|run| run.model)
}

/// Side of the images that a model or adapter, in a folder or a file of it, was trained on, where that is written beside it.
pub fn trained_size(path: &Path) -> Option<usize> {
    formats::image_size(if path.is_dir() { path } else { path.parent()? }).filter(|&size| is_size(size))
}

fn identify(config: &impl Serialize, tensors: &StateDict) -> String {
    let mut crc = crc32fast::Hasher::new();
    // Serialising plain numbers and strings to memory cannot fail.
    crc.update(&serde_json::to_vec(config).unwrap_or_default());
    for (name, tensor) in tensors {
        crc.update(name.as_bytes());
        for &extent in &tensor.shape {
            crc.update(&(extent as u64).to_le_bytes());
        }
        match &tensor.data {
            HostData::F32(numbers) => crc.update(bytemuck::cast_slice(numbers)),
            HostData::I64(numbers) => crc.update(bytemuck::cast_slice(numbers)),
        }
    }
    format!("{:08x}", crc.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::HostTensor;

    #[test]
    fn every_part_of_a_model_counts() {
        let tensors = |name: &str, shape: &[usize], x: f32| {
            StateDict::from([(name.into(), HostTensor { shape: shape.to_vec(), data: HostData::F32(vec![x, 1.0]) })])
        };
        let config = SegformerConfig::default();
        let base = identify(&config, &tensors("a", &[2], 0.5));
        assert_eq!(base, identify(&config, &tensors("a", &[2], 0.5)));
        assert_ne!(base, identify(&config, &tensors("b", &[2], 0.5)));
        assert_ne!(base, identify(&config, &tensors("a", &[1, 2], 0.5)));
        assert_ne!(base, identify(&config, &tensors("a", &[2], 0.25)));
        let wider = SegformerConfig { decoder_hidden_size: 512, ..config };
        assert_ne!(base, identify(&wider, &tensors("a", &[2], 0.5)));
    }
}
