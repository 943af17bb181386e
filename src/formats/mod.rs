//! Files of the Hugging Face world: safetensors, PyTorch state dicts, names of tensors, configurations, peft adapters.
//!
//! Whatever comes from outside is taken to be hostile: sizes are checked against the file's own length before anything
//! is allocated, nothing in a pickle is executed, numbers that are not finite are refused by tensor name. Whatever is
//! written replaces its predecessor in one step.

use std::collections::BTreeMap;

pub mod adapter;
pub mod checkpoint;
mod config;
mod element;
mod file;
pub mod names;
mod pickle;
mod tensor_file;
mod torch_file;

pub use adapter::{Adapter, AdapterConfig};
pub use checkpoint::Checkpoint;
pub use config::{image_size, write_image_size};
pub use tensor_file::{PT_METADATA, read_safetensors, write_safetensors};
pub use torch_file::read_torch;

/// A tensor on the host, in C order.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Extent of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// The numbers. Floating types are widened to f32 on reading.
    pub data: HostData,
}

impl HostTensor {
    /// Checks that this holds numbers of `shape`, as a model needs them.
    ///
    /// # Errors
    /// What it holds instead, to be put behind the tensor's name.
    pub fn check_shape(&self, shape: &[usize]) -> std::result::Result<(), String> {
        let problem = match &self.data {
            HostData::I64(_) => "holds integers".into(),
            HostData::F32(_) if self.shape == shape => return Ok(()),
            HostData::F32(_) => format!("has shape {:?}", self.shape),
        };
        Err(format!("{problem}, this model needs numbers of shape {shape:?}"))
    }
}

/// The numbers of a [`HostTensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum HostData {
    /// Weights, statistics.
    F32(Vec<f32>),
    /// Counters (`num_batches_tracked`).
    I64(Vec<i64>),
}

/// Tensors by name, as PyTorch's `state_dict()`. Names are those on disk in full checkpoints
/// (`segformer.encoder.block.0.0.attention.self.query.weight`), convolution weights are `(out, in/groups, kh, kw)`.
pub type StateDict = BTreeMap<String, HostTensor>;

/// Which release of transformers the module names in an adapter follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
pub enum HfNames {
    /// transformers 4: `segformer.encoder.block.0.0.attention.self.query`.
    #[default]
    #[value(name = "4")]
    #[serde(rename = "4")]
    V4,
    /// transformers 5: `segformer.stages.0.blocks.0.attention.q_proj`.
    #[value(name = "5")]
    #[serde(rename = "5")]
    V5,
}
