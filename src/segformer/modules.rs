//! The modules of a SegFormer by name, with their tensors, in the order data flows through them. Names are those of
//! transformers 4, under which every full checkpoint is stored.

use super::SegformerConfig;

/// What a module computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// `nn.Linear`: weight `(out, in)`, bias.
    Linear,
    /// `nn.Conv2d`: weight `(out, in, side, side)`.
    Convolution {
        /// Side of the kernel.
        side: usize,
    },
    /// `nn.Conv2d` with one group per channel: weight `(channels, 1, 3, 3)`, bias.
    Depthwise,
    /// `nn.LayerNorm`: weight, bias.
    LayerNorm,
    /// `nn.BatchNorm2d`: weight, bias, running_mean, running_var.
    BatchNorm,
    /// A module without tensors of its own (container, activation, dropout).
    Bare,
}

/// One module.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// Full name, e.g. `segformer.encoder.block.0.0.attention.self.query`.
    pub name: String,
    /// What it computes.
    pub kind: ModuleKind,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

/// What a tensor is, which decides its layout in memory, its fresh value and its part in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Weight of a product, `(out, in)` or, from a convolution, `(out, side, side, in)` in memory.
    Product,
    /// Weight of the depth-wise convolution, `(9, channels)` in memory.
    Depthwise,
    /// Scale of a normalisation.
    Scale,
    /// Bias or shift.
    Bias,
    /// Running estimate of BatchNorm; not a parameter.
    Statistic,
}

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Name on disk.
    pub name: String,
    /// Shape on disk (PyTorch's).
    pub shape: Vec<usize>,
    /// What it is.
    pub role: Role,
}

impl TensorSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reorders `data` from the layout on disk to the one in memory: convolution kernels `(out, in, ky, kx)` become
    /// `(out, ky, kx, in)`, depth-wise kernels `(channels, 1, ky, kx)` become `(ky, kx, channels)`.
    pub fn to_memory(&self, data: &[f32]) -> Vec<f32> {
        self.reorder(data, true)
    }

    /// The inverse of [`TensorSpec::to_memory`].
    pub fn to_disk(&self, data: &[f32]) -> Vec<f32> {
        self.reorder(data, false)
    }

    fn reorder(&self, data: &[f32], to_memory: bool) -> Vec<f32> {
        let [outer, inner, height, width] = self.shape[..] else { return data.to_vec() };
        let taps = height * width;
        let mut result = vec![0.0; data.len()];
        for o in 0..outer {
            for i in 0..inner {
                for tap in 0..taps {
                    let disk = (o * inner + i) * taps + tap;
                    let memory = match self.role {
                        Role::Depthwise => tap * outer + o,
                        _ => (o * taps + tap) * inner + i,
                    };
                    let (from, to) = if to_memory { (disk, memory) } else { (memory, disk) };
                    result[to] = data[from];
                }
            }
        }
        result
    }
}

impl Module {
    fn new(name: String, kind: ModuleKind, inputs: usize, outputs: usize) -> Self {
        Self { name, kind, inputs, outputs, bias: kind != ModuleKind::Bare }
    }

    fn bare(name: impl Into<String>) -> Self {
        Self::new(name.into(), ModuleKind::Bare, 0, 0)
    }

    fn linear(name: String, inputs: usize, outputs: usize) -> Self {
        Self::new(name, ModuleKind::Linear, inputs, outputs)
    }

    fn norm(name: String, channels: usize) -> Self {
        Self::new(name, ModuleKind::LayerNorm, channels, channels)
    }

    /// Side of the convolution kernel (1 for a linear module).
    pub fn side(&self) -> usize {
        match self.kind {
            ModuleKind::Convolution { side } => side,
            ModuleKind::Depthwise => 3,
            _ => 1,
        }
    }

    /// The module's own tensors.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let spec =
            |suffix: &str, shape: Vec<usize>, role| TensorSpec { name: format!("{}.{suffix}", self.name), shape, role };
        let (inputs, outputs) = (self.inputs, self.outputs);
        let weight = match self.kind {
            ModuleKind::Bare => return Vec::new(),
            ModuleKind::Linear => spec("weight", vec![outputs, inputs], Role::Product),
            ModuleKind::Convolution { side } => spec("weight", vec![outputs, inputs, side, side], Role::Product),
            ModuleKind::Depthwise => spec("weight", vec![outputs, 1, 3, 3], Role::Depthwise),
            ModuleKind::LayerNorm | ModuleKind::BatchNorm => spec("weight", vec![outputs], Role::Scale),
        };
        let mut list = vec![weight];
        if self.bias {
            list.push(spec("bias", vec![outputs], Role::Bias));
        }
        if self.kind == ModuleKind::BatchNorm {
            list.push(spec("running_mean", vec![outputs], Role::Statistic));
            list.push(spec("running_var", vec![outputs], Role::Statistic));
        }
        list
    }
}

/// All modules, bare ones included, of a SegFormer with configuration `config`.
pub fn modules(config: &SegformerConfig) -> Vec<Module> {
    let mut list = vec![Module::bare("segformer"), Module::bare("segformer.encoder")];
    let encoder = "segformer.encoder";
    for container in ["patch_embeddings", "block", "layer_norm"] {
        list.push(Module::bare(format!("{encoder}.{container}")));
    }
    let mut previous = config.num_channels;
    let blocks: usize = config.depths.iter().sum();
    let mut block_number = 0;
    for stage in 0..config.num_encoder_blocks {
        let channels = config.hidden_sizes[stage];
        let hidden = channels * config.mlp_ratios[stage];
        let embed = format!("{encoder}.patch_embeddings.{stage}");
        list.push(Module::bare(embed.clone()));
        let side = config.patch_sizes[stage];
        list.push(Module::new(format!("{embed}.proj"), ModuleKind::Convolution { side }, previous, channels));
        list.push(Module::norm(format!("{embed}.layer_norm"), channels));
        list.push(Module::bare(format!("{encoder}.block.{stage}")));
        for index in 0..config.depths[stage] {
            let block = format!("{encoder}.block.{stage}.{index}");
            list.push(Module::bare(block.clone()));
            list.push(Module::norm(format!("{block}.layer_norm_1"), channels));
            for container in ["attention", "attention.self"] {
                list.push(Module::bare(format!("{block}.{container}")));
            }
            list.push(Module::linear(format!("{block}.attention.self.query"), channels, channels));
            let side = config.sr_ratios[stage];
            if side > 1 {
                let name = format!("{block}.attention.self.sr");
                list.push(Module::new(name, ModuleKind::Convolution { side }, channels, channels));
                list.push(Module::norm(format!("{block}.attention.self.layer_norm"), channels));
            }
            list.push(Module::linear(format!("{block}.attention.self.key"), channels, channels));
            list.push(Module::linear(format!("{block}.attention.self.value"), channels, channels));
            list.push(Module::bare(format!("{block}.attention.self.dropout")));
            list.push(Module::bare(format!("{block}.attention.output")));
            list.push(Module::linear(format!("{block}.attention.output.dense"), channels, channels));
            list.push(Module::bare(format!("{block}.attention.output.dropout")));
            if config.drop_path_rate * block_number as f32 / (blocks.max(2) - 1) as f32 > 0.0 {
                list.push(Module::bare(format!("{block}.drop_path")));
            }
            list.push(Module::norm(format!("{block}.layer_norm_2"), channels));
            list.push(Module::bare(format!("{block}.mlp")));
            list.push(Module::linear(format!("{block}.mlp.dense1"), channels, hidden));
            list.push(Module::bare(format!("{block}.mlp.dwconv")));
            list.push(Module::new(format!("{block}.mlp.dwconv.dwconv"), ModuleKind::Depthwise, hidden, hidden));
            list.push(Module::bare(format!("{block}.mlp.intermediate_act_fn")));
            list.push(Module::linear(format!("{block}.mlp.dense2"), hidden, channels));
            list.push(Module::bare(format!("{block}.mlp.dropout")));
            block_number += 1;
        }
        list.push(Module::norm(format!("{encoder}.layer_norm.{stage}"), channels));
        previous = channels;
    }
    let width = config.decoder_hidden_size;
    let head = "decode_head";
    list.push(Module::bare(head));
    list.push(Module::bare(format!("{head}.linear_c")));
    for (stage, &channels) in config.hidden_sizes.iter().enumerate() {
        list.push(Module::bare(format!("{head}.linear_c.{stage}")));
        list.push(Module::linear(format!("{head}.linear_c.{stage}.proj"), channels, width));
    }
    let mut fuse = Module::new(
        format!("{head}.linear_fuse"),
        ModuleKind::Convolution { side: 1 },
        width * config.num_encoder_blocks,
        width,
    );
    fuse.bias = false;
    list.push(fuse);
    list.push(Module::new(format!("{head}.batch_norm"), ModuleKind::BatchNorm, width, width));
    for bare in ["activation", "dropout"] {
        list.push(Module::bare(format!("{head}.{bare}")));
    }
    let labels = config.num_labels();
    list.push(Module::new(format!("{head}.classifier"), ModuleKind::Convolution { side: 1 }, width, labels));
    list
}

/// Name of BatchNorm's counter of training batches, the one integer tensor of a checkpoint.
pub const BATCH_COUNTER: &str = "decode_head.batch_norm.num_batches_tracked";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b0_has_the_reference_count_of_tensors_and_parameters() {
        let tensors: Vec<_> = modules(&SegformerConfig::default()).iter().flat_map(Module::tensors).collect();
        let parameters: usize = tensors.iter().filter(|t| t.role != Role::Statistic).map(TensorSpec::len).sum();
        assert_eq!(tensors.len() + 1, 208);
        assert_eq!(parameters, 3_714_658);
    }

    #[test]
    fn layouts_come_back() {
        for (shape, role) in [(vec![4, 3, 2, 2], Role::Product), (vec![5, 1, 3, 3], Role::Depthwise)] {
            let spec = TensorSpec { name: String::new(), shape, role };
            let data: Vec<f32> = (0..spec.len()).map(|i| i as f32).collect();
            assert_eq!(spec.to_disk(&spec.to_memory(&data)), data);
            assert_ne!(spec.to_memory(&data), data);
        }
    }
}
