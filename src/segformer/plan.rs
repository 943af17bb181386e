//! The plan of a model: every tensor's number, every layer's sizes, what is trained, and how far back gradients go.
//! Made once, before anything is allocated.

use std::collections::HashMap;

use super::SegformerConfig;
use super::affine::{Affine, SidePath};
use super::attention::AttentionLayer;
use super::decoder::Decoder;
use super::encoder::{Block, Stage};
use super::mix_ffn::MixFfn;
use super::modules::{Module, ModuleKind, Role, TensorSpec, modules};
use super::norm::Norm;
use super::patch_embed::PatchEmbed;
use super::tensors::Id;
use crate::backend::{Product, Window};
use crate::lora::Match;

/// What is trained.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Trainable {
    /// Nothing: a model for evaluation.
    #[default]
    Nothing,
    /// Every parameter.
    Everything,
    /// Adapters on the matched modules, and the whole decode head if asked.
    Adapters {
        /// Modules that carry adapters.
        matches: Vec<Match>,
        /// Rank of the factors.
        rank: usize,
        /// Factor of the product of the factors, alpha / r.
        scale: f64,
        /// Dropout at the adapters' inputs.
        dropout: f32,
        /// Whether the decode head is trained too.
        head: bool,
    },
}

impl Trainable {
    /// Factor of the product of adapters' factors; 0 without any.
    pub fn scale(&self) -> f64 {
        if let Self::Adapters { scale, .. } = self { *scale } else { 0.0 }
    }

    /// The same with another scale, if there are adapters.
    fn scaled(mut self, by: f64) -> Self {
        if let Self::Adapters { scale, .. } = &mut self {
            *scale = by;
        }
        self
    }

    /// Whether models take the same memory and do the same work: all is equal but for the scale.
    pub fn same_shape(&self, other: &Self) -> bool {
        *self == other.clone().scaled(self.scale())
    }
}

/// An adapter's tensors and how it joins the model.
#[derive(Clone, Debug)]
pub struct AdapterPlan {
    /// Module it sits on.
    pub module: String,
    /// Weight it changes.
    pub weight: Id,
    /// Factor A `(rank, inputs)`.
    pub a: Id,
    /// Factor B `(outputs, rank)`.
    pub b: Id,
    /// Rows of the weight.
    pub outputs: usize,
    /// Columns of the weight.
    pub inputs: usize,
    /// On the separate path: `scale·B`, for the decoder `scale·F·B`.
    pub scaled_b: Option<Id>,
}

/// The plan.
pub struct Plan {
    /// Stored tensors, then adapters' factors, then derived tensors.
    pub specs: Vec<TensorSpec>,
    /// Number of tensors that stand in a full checkpoint (BatchNorm's counter aside).
    pub stored: usize,
    /// Adapters.
    pub adapters: Vec<AdapterPlan>,
    /// Rank of the adapters.
    pub rank: usize,
    /// Tensors the optimizer moves, in order.
    pub trained: Vec<Id>,
    /// Tensors whose gradient the backward pass sums.
    pub wanted: Vec<bool>,
    /// Tensors that products of tokens read: weights, biases, factors of separate paths.
    pub products: Vec<bool>,
    /// The encoder.
    pub stages: Vec<Stage>,
    /// The decoder.
    pub decoder: Decoder,
}

struct Builder {
    specs: Vec<TensorSpec>,
    index: HashMap<String, Id>,
    modules: HashMap<String, Module>,
    side_paths: HashMap<String, SidePath>,
    wanted: Vec<bool>,
}

impl Builder {
    fn id(&self, name: &str) -> Id {
        match self.index.get(name) {
            Some(id) => *id,
            None => unreachable!("the plan names {name}, which no module has"),
        }
    }

    fn push(&mut self, name: String, shape: Vec<usize>, role: Role) -> Id {
        let id = Id(self.specs.len());
        self.index.insert(name.clone(), id);
        self.specs.push(TensorSpec { name, shape, role });
        id
    }

    fn affine(&self, module: &str) -> Affine {
        let Some(m) = self.modules.get(module) else { unreachable!("the plan names {module}, which no module is") };
        Affine {
            weight: self.id(&format!("{module}.weight")),
            bias: m.bias.then(|| self.id(&format!("{module}.bias"))),
            inputs: m.inputs * m.side() * m.side(),
            outputs: m.outputs,
            side: self.side_paths.get(module).cloned(),
        }
    }

    fn norm(&self, module: &str, channels: usize) -> Norm {
        Norm { gamma: self.id(&format!("{module}.weight")), beta: self.id(&format!("{module}.bias")), channels }
    }

    fn trains(&self, affine: &Affine) -> bool {
        self.wanted[affine.weight.0] || affine.bias.is_some_and(|b| self.wanted[b.0]) || affine.side.is_some()
    }

    fn trains_norm(&self, norm: &Norm) -> bool {
        self.wanted[norm.gamma.0]
    }
}

impl Plan {
    /// Plans a model of `config` with `trainable` parameters.
    pub fn new(config: &SegformerConfig, trainable: &Trainable) -> Self {
        let list = modules(config);
        let mut b = Builder {
            specs: Vec::new(),
            index: HashMap::new(),
            modules: list.iter().map(|m| (m.name.clone(), m.clone())).collect(),
            side_paths: HashMap::new(),
            wanted: Vec::new(),
        };
        for spec in list.iter().flat_map(Module::tensors) {
            b.push(spec.name, spec.shape, spec.role);
        }
        let stored = b.specs.len();

        let (mut rank, mut rate) = (0, 0.0);
        let mut adapters = Vec::new();
        if let Trainable::Adapters { matches, rank: r, dropout, .. } = trainable {
            (rank, rate) = (*r, *dropout);
            for m in matches {
                let (module, side) = (&m.module, m.module.side());
                let name = &module.name;
                let convolution = matches!(module.kind, ModuleKind::Convolution { .. });
                let (a_shape, b_shape) = if convolution {
                    (vec![rank, module.inputs, side, side], vec![module.outputs, rank, 1, 1])
                } else {
                    (vec![rank, module.inputs], vec![module.outputs, rank])
                };
                adapters.push(AdapterPlan {
                    module: name.clone(),
                    weight: b.id(&format!("{name}.weight")),
                    a: b.push(format!("{name}.lora_A.weight"), a_shape, Role::Product),
                    b: b.push(format!("{name}.lora_B.weight"), b_shape, Role::Product),
                    outputs: module.outputs,
                    inputs: module.inputs * side * side,
                    scaled_b: None,
                });
            }
        }
        let factors_end = b.specs.len();

        // Derived tensors: the folded decoder, and the scaled B of separate paths.
        let width = config.decoder_hidden_size;
        let fused: Vec<Id> = (config.hidden_sizes.iter().enumerate())
            .map(|(stage, &c)| b.push(format!("decode_head.folded.{stage}"), vec![width, c], Role::Product))
            .collect();
        let fused_bias = b.push("decode_head.folded.bias".into(), vec![width], Role::Bias);
        if rate > 0.0 {
            for (site, adapter) in adapters.iter_mut().enumerate() {
                // The decoder's linear modules act through the fuse, so their scaled B has the fuse's height too.
                let name = format!("{}.lora_B.scaled", adapter.module);
                let scaled = b.push(name, vec![adapter.outputs, rank], Role::Product);
                adapter.scaled_b = Some(scaled);
                let side = SidePath { a: adapter.a, b: scaled, rank, rate, site: site as u32 };
                b.side_paths.insert(adapter.module.clone(), side);
            }
        }

        let parameter = |spec: &TensorSpec| spec.role != Role::Statistic;
        let in_head = |spec: &TensorSpec| spec.name.starts_with("decode_head.");
        let trained: Vec<Id> = match trainable {
            Trainable::Nothing => Vec::new(),
            Trainable::Everything => (0..stored).filter(|&i| parameter(&b.specs[i])).map(Id).collect(),
            Trainable::Adapters { head, .. } => (0..factors_end)
                .filter(|&i| i >= stored || (*head && in_head(&b.specs[i]) && parameter(&b.specs[i])))
                .map(Id)
                .collect(),
        };
        let mut wanted = vec![false; b.specs.len()];
        for id in &trained {
            wanted[id.0] = true;
        }
        for adapter in &adapters {
            match adapter.scaled_b {
                Some(scaled) => wanted[scaled.0] = true,
                None => wanted[adapter.weight.0] = true,
            }
        }
        // The folded decoder collects what its parts are owed.
        let fuse = b.id("decode_head.linear_fuse.weight");
        for (stage, id) in fused.iter().enumerate() {
            let linear = b.id(&format!("decode_head.linear_c.{stage}.proj.weight"));
            wanted[id.0] = wanted[linear.0] || wanted[fuse.0];
        }
        let linear_bias = b.id("decode_head.linear_c.0.proj.bias");
        wanted[fused_bias.0] = wanted[linear_bias.0] || wanted[fuse.0];
        b.wanted = wanted;

        let (stages, reached) = Self::encoder(config, &b);
        let decoder = Self::decoder(config, &b, fused, fused_bias, &reached);
        let mut products = vec![false; b.specs.len()];
        for affine in affines(&stages, &decoder) {
            let side = affine.side.iter().flat_map(|side| [side.a, side.b]);
            for id in [affine.weight].into_iter().chain(affine.bias).chain(side) {
                products[id.0] = true;
            }
        }
        Self { stored, adapters, rank, trained, wanted: b.wanted, products, stages, decoder, specs: b.specs }
    }

    /// The stages, and for each whether gradients must reach its output.
    fn encoder(config: &SegformerConfig, b: &Builder) -> (Vec<Stage>, Vec<bool>) {
        let total: usize = config.depths.iter().sum();
        let mut trained_so_far = false;
        let mut number = 0;
        let mut stages = Vec::new();
        let mut reached = Vec::new();
        for s in 0..config.num_encoder_blocks {
            let channels = config.hidden_sizes[s];
            let name = format!("segformer.encoder.patch_embeddings.{s}");
            let side = config.patch_sizes[s];
            let embed = PatchEmbed {
                projection: b.affine(&format!("{name}.proj")),
                norm: b.norm(&format!("{name}.layer_norm"), channels),
                window: Window { side, stride: config.strides[s], padding: side / 2 },
                reads_pixels: s == 0,
                input_gradient: trained_so_far,
                trains: b.trains(&b.affine(&format!("{name}.proj")))
                    || b.trains_norm(&b.norm(&format!("{name}.layer_norm"), channels)),
            };
            trained_so_far |= embed.trains;
            let mut blocks = Vec::new();
            for j in 0..config.depths[s] {
                let name = format!("segformer.encoder.block.{s}.{j}");
                let drop_path =
                    if total > 1 { config.drop_path_rate * number as f32 / (total - 1) as f32 } else { 0.0 };
                let ratio = config.sr_ratios[s];
                let at = format!("{name}.attention.self");
                let mut attention = AttentionLayer {
                    norm: b.norm(&format!("{name}.layer_norm_1"), channels),
                    query: b.affine(&format!("{at}.query")),
                    key: b.affine(&format!("{at}.key")),
                    value: b.affine(&format!("{at}.value")),
                    output: b.affine(&format!("{name}.attention.output.dense")),
                    reduction: (ratio > 1)
                        .then(|| (b.affine(&format!("{at}.sr")), b.norm(&format!("{at}.layer_norm"), channels))),
                    window: Window { side: ratio, stride: ratio, padding: 0 },
                    heads: config.num_attention_heads[s],
                    channels,
                    input_gradient: trained_so_far,
                    trains: false,
                };
                attention.trains = b.trains_norm(&attention.norm)
                    || [&attention.query, &attention.key, &attention.value, &attention.output]
                        .into_iter()
                        .any(|affine| b.trains(affine))
                    || attention.reduction.as_ref().is_some_and(|(c, n)| b.trains(c) || b.trains_norm(n));
                trained_so_far |= attention.trains;
                let at = format!("{name}.mlp");
                let mut ffn = MixFfn {
                    norm: b.norm(&format!("{name}.layer_norm_2"), channels),
                    expand: b.affine(&format!("{at}.dense1")),
                    mix_weight: b.id(&format!("{at}.dwconv.dwconv.weight")),
                    mix_bias: b.id(&format!("{at}.dwconv.dwconv.bias")),
                    contract: b.affine(&format!("{at}.dense2")),
                    channels,
                    hidden: channels * config.mlp_ratios[s],
                    input_gradient: trained_so_far,
                    trains: false,
                };
                ffn.trains = b.trains_norm(&ffn.norm)
                    || b.trains(&ffn.expand)
                    || b.trains(&ffn.contract)
                    || b.wanted[ffn.mix_weight.0];
                trained_so_far |= ffn.trains;
                blocks.push(Block { attention, ffn, drop_path, number: number as u32 });
                number += 1;
            }
            let norm = b.norm(&format!("segformer.encoder.layer_norm.{s}"), channels);
            trained_so_far |= b.trains_norm(&norm);
            reached.push(trained_so_far);
            stages.push(Stage { embed, blocks, norm, channels });
        }
        (stages, reached)
    }

    fn decoder(config: &SegformerConfig, b: &Builder, folded: Vec<Id>, folded_bias: Id, reached: &[bool]) -> Decoder {
        let width = config.decoder_hidden_size;
        let stages = (config.hidden_sizes.iter().zip(folded).enumerate())
            .map(|(stage, (&inputs, weight))| {
                let module = format!("decode_head.linear_c.{stage}.proj");
                let side = b.side_paths.get(&module).cloned();
                Affine { weight, bias: (stage == 0).then_some(folded_bias), inputs, outputs: width, side }
            })
            .collect();
        let classifier = b.affine("decode_head.classifier");
        Decoder {
            linear: (0..config.num_encoder_blocks)
                .map(|s| {
                    let name = format!("decode_head.linear_c.{s}.proj");
                    (b.id(&format!("{name}.weight")), b.id(&format!("{name}.bias")))
                })
                .collect(),
            fuse: b.id("decode_head.linear_fuse.weight"),
            folded: stages,
            folded_bias,
            norm: Norm {
                gamma: b.id("decode_head.batch_norm.weight"),
                beta: b.id("decode_head.batch_norm.bias"),
                channels: width,
            },
            running_mean: b.id("decode_head.batch_norm.running_mean"),
            running_var: b.id("decode_head.batch_norm.running_var"),
            labels: classifier.outputs,
            classifier,
            width,
            dropout: config.classifier_dropout_prob,
            reached: reached.to_vec(),
        }
    }

    /// Lengths of all tensors.
    pub fn lengths(&self) -> Vec<usize> {
        self.specs.iter().map(TensorSpec::len).collect()
    }

    /// Whether the gradient of `id` is only made from others' at the end of a group of micro-batches.
    pub fn only_derived(&self, id: Id) -> bool {
        let factor = |a: &AdapterPlan| a.b == id || (a.a == id && a.scaled_b.is_none());
        self.adapters.iter().any(factor)
            || id == self.decoder.fuse
            || self.decoder.linear.iter().any(|&(weight, bias)| weight == id || bias == id)
    }

    /// Number of the tensor called `name`.
    pub fn find(&self, name: &str) -> Option<Id> {
        self.specs.iter().position(|spec| spec.name == name).map(Id)
    }

    /// Whether any adapter has a path of its own.
    pub fn has_side_paths(&self) -> bool {
        self.adapters.iter().any(|a| a.scaled_b.is_some())
    }
}

/// Every product of tokens with weights.
fn affines<'a>(stages: &'a [Stage], decoder: &'a Decoder) -> impl Iterator<Item = &'a Affine> {
    let of_block = |Block { attention, ffn, .. }: &'a Block| {
        let reduction = attention.reduction.as_ref().map(|(convolution, _)| convolution);
        [&attention.query, &attention.key, &attention.value, &attention.output, &ffn.expand, &ffn.contract]
            .into_iter()
            .chain(reduction)
    };
    let of_stage =
        move |stage: &'a Stage| std::iter::once(&stage.embed.projection).chain(stage.blocks.iter().flat_map(of_block));
    stages.iter().flat_map(of_stage).chain(&decoder.folded).chain(std::iter::once(&decoder.classifier))
}

/// The sizes of a product by an [`Affine`] over `rows` rows.
pub fn product(affine: &Affine, rows: usize) -> Product {
    Product { rows, inputs: affine.inputs, outputs: affine.outputs }
}
