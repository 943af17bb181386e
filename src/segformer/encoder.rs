//! The encoder: stages of patch embedding, transformer blocks and LayerNorm.

use super::affine::Affine;
use super::attention::{AttentionActs, AttentionLayer};
use super::mix_ffn::{FfnActs, MixFfn};
use super::model::{Pass, Scratch, Worker};
use super::norm::{Behind, Branch, Front, Joint, Norm, Normed, Takes};
use super::patch_embed::{EmbedActs, EmbedInput, PatchEmbed};
use super::tensors::Gradients;
use crate::backend::{Backend, Dropout, Grid, Sample, Window};
use crate::random::Purpose;

/// A transformer block.
pub struct Block {
    /// Efficient self-attention.
    pub attention: AttentionLayer,
    /// Mix-FFN.
    pub ffn: MixFfn,
    /// Stochastic-depth rate of both.
    pub drop_path: f32,
    /// Number of the block in the model.
    pub number: u32,
}

/// A stage.
pub struct Stage {
    /// Patch embedding.
    pub embed: PatchEmbed,
    /// Blocks.
    pub blocks: Vec<Block>,
    /// LayerNorm at the end.
    pub norm: Norm,
    /// Channels.
    pub channels: usize,
}

/// What the backward pass of a block needs.
pub struct BlockActs<B: Backend> {
    attention: AttentionActs<B>,
    ffn: FfnActs<B>,
    /// The residual stream between attention and Mix-FFN, if kept.
    middle: Option<B::Act>,
}

/// What the backward pass of a stage needs, and its output.
pub struct StageActs<B: Backend> {
    /// Tokens of the stage.
    pub grid: Grid,
    from: Grid,
    embed: EmbedActs<B>,
    /// The residual stream before each block and after the last; in evaluation, the first two take turns.
    stream: Vec<B::Act>,
    /// Of each block's attention, then its Mix-FFN; in evaluation, those of one block.
    norms: Vec<Normed<B>>,
    blocks: Vec<BlockActs<B>>,
    stats: B::Full,
    /// Output `(grid, channels)`.
    pub out: B::Act,
}

impl<B: Backend> StageActs<B> {
    /// Says how many pictures the storage holds from now on; no more than it was made for.
    pub fn set_images(&mut self, images: usize) {
        self.grid.images = images;
        self.from.images = images;
    }
}

impl Block {
    /// Stochastic depth of the attention (`half` 0) or Mix-FFN (1) branch.
    fn drop<B: Backend>(&self, pass: &Pass<'_, B>, half: u32) -> Option<Dropout> {
        pass.dropout(Purpose::DropPath, self.number * 2 + half, self.drop_path, 1)
    }
}

impl Stage {
    /// Zeroed storage for `from` input pictures; with `keep`, each block has its own, as a backward pass needs it that makes
    /// the gradients of `wanted` tensors.
    pub fn acts<B: Backend>(&self, backend: &B, from: Grid, keep: bool, wanted: &[bool]) -> StageActs<B> {
        let grid = from.through(self.embed.window);
        let (rows, channels) = (grid.rows(), self.channels);
        let tokens = || backend.act(rows * channels);
        let stats = || backend.full(2 * rows);
        let held = if keep { self.blocks.len() } else { self.blocks.len().min(1) };
        let remembers = keep && backend.remembers();
        // What a product reads and nothing else keeps, for the gradient of its weight.
        let inputs = |product: &Affine, rows: usize| {
            let trains = wanted[product.weight.0] || product.side.is_some();
            (remembers && trains).then(|| backend.act(rows * product.inputs))
        };
        let patches = |convolution: &Affine, from: Grid, window: Window| {
            let gathers = !convolution.sums_direct(backend, from, window);
            gathers.then(|| inputs(convolution, from.through(window).rows())).flatten()
        };
        let embedded =
            (!self.embed.is_direct(backend)).then(|| patches(&self.embed.projection, from, self.embed.window));
        let blocks = (self.blocks[..held].iter())
            .map(|block| {
                let keys = block.attention.keys(grid).rows();
                let stored = keep || !block.attention.fuses(backend, grid, keep);
                let keeps_q = stored && (!keep || block.attention.keeps_queries(backend, grid));
                BlockActs {
                    attention: AttentionActs {
                        q: keeps_q.then(tokens),
                        reduced: block.attention.reduction.is_some().then(|| {
                            let AttentionLayer { key, value, .. } = &block.attention;
                            let out = inputs(key, keys).or_else(|| inputs(value, keys));
                            (backend.act(keys * channels), Normed { out, stats: backend.full(2 * keys) })
                        }),
                        patches: (block.attention.reduction.as_ref())
                            .and_then(|(convolution, _)| patches(convolution, grid, block.attention.window)),
                        k: backend.act(keys * channels),
                        v: backend.act(keys * channels),
                        o: backend.act(if stored { rows * channels } else { 0 }),
                        lse: backend.full(if stored { rows * block.attention.heads } else { 0 }),
                    },
                    ffn: FfnActs {
                        h: backend.act(if keep || !block.ffn.fuses(backend) { rows * block.ffn.hidden } else { 0 }),
                        g: block.ffn.keeps_input(backend, grid).then(|| inputs(&block.ffn.contract, rows)).flatten(),
                    },
                    middle: remembers.then(tokens),
                }
            })
            .collect();
        let norms = self.blocks[..held].iter().flat_map(|block| [block.attention.trains, block.ffn.trains]);
        let norms = norms.map(|trains| Normed { out: (remembers && trains).then(tokens), stats: stats() }).collect();
        StageActs {
            grid,
            from,
            embed: EmbedActs { raw: tokens(), stats: stats(), patches: embedded.flatten() },
            stream: (0..=if keep { held } else { 1 }).map(|_| tokens()).collect(),
            norms,
            blocks,
            stats: stats(),
            out: tokens(),
        }
    }

    /// Largest gathered patch matrix for inputs of `from`, in numbers.
    pub fn patch_len<B: Backend>(&self, backend: &B, from: Grid) -> usize {
        let rows = from.through(self.embed.window).rows();
        let embedded = if self.embed.is_direct(backend) { 0 } else { rows * self.embed.projection.inputs };
        // The sequence reduction's windows do not overlap, so they gather no more than the tokens.
        embedded.max(rows * self.channels)
    }

    fn forward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        input: &EmbedInput<'_, '_, B>,
        acts: &mut StageActs<B>,
        middle: &mut B::Act,
        scratch: &mut Scratch<B>,
    ) {
        let StageActs { grid, from, embed, stream, norms, blocks, stats, out } = acts;
        let grid = *grid;
        let joint = match self.blocks.first() {
            Some(block) => norms[0].joint(&mut stream[0], &block.attention.norm),
            None => Joint { y: &mut stream[0], norm: &self.norm, out: Some(&mut *out), stats: &mut *stats },
        };
        self.embed.forward(pass, input, *from, embed, joint, scratch);
        // Evaluation uses the first block's storage again and again, while it is in cache.
        let (held, streams) = if pass.keeps() { (self.blocks.len(), stream.len()) } else { (1, 2) };
        for (j, block) in self.blocks.iter().enumerate() {
            let BlockActs { attention, ffn, middle: kept } = &mut blocks[j % held];
            let middle = kept.as_mut().unwrap_or(&mut *middle);
            let Ok([before, after]) = stream.get_disjoint_mut([j % streams, (j + 1) % streams]) else {
                unreachable!("a block reads and writes one buffer")
            };
            let turn = |half: usize| (2 * j + half) % (2 * held);
            let Ok([first, second]) = norms.get_disjoint_mut([turn(0), turn(1)]) else { unreachable!("of two halves") };
            let drop = block.drop(pass, 0);
            let behind = (!block.ffn.fuses(pass.backend)).then_some((&block.ffn.norm, second));
            block.attention.forward(pass, before, grid, drop, first, attention, middle, behind, scratch);
            let Ok([second, next]) = norms.get_disjoint_mut([turn(1), turn(2)]) else { unreachable!("of two halves") };
            let joint = match self.blocks.get(j + 1) {
                Some(following) => next.joint(after, &following.attention.norm),
                None => Joint { y: after, norm: &self.norm, out: Some(&mut *out), stats: &mut *stats },
            };
            block.ffn.forward(pass, middle, grid, block.drop(pass, 1), second, ffn, joint, scratch);
        }
    }

    /// From the gradient `out_gradient` of the stage's output; `below` receives, added, the gradient of its input. `d` is
    /// room for the gradient of the residual stream.
    fn backward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        input: &EmbedInput<'_, '_, B>,
        acts: &StageActs<B>,
        out_gradient: &B::Act,
        d: &mut B::Act,
        gradients: &mut Gradients<B>,
        below: Option<&mut B::Act>,
        middle: &mut B::Act,
        scratch: &mut Scratch<B>,
    ) {
        let rows = acts.grid.rows();
        let last = &acts.stream[self.blocks.len()];
        // What block j's input was made by; tokens[0] passes on the gradient of the branch that comes next, where that does not take
        // the stream's.
        let before = |j: usize, gradients: &Gradients<B>| -> Option<Branch<'_>> {
            let block = &self.blocks[j.checked_sub(1)?];
            let joins = block.ffn.joins_backward(pass.backend, acts.grid, gradients);
            let takes = if joins { Takes::Stream } else { Takes::Product };
            Some(Branch { product: &block.ffn.contract, drop: block.drop(pass, 1), takes })
        };
        let front = before(self.blocks.len(), gradients);
        let front = front.map_or(Front::none(), |front| Front::branch(front, acts.grid, &mut scratch.tokens[0]));
        self.norm.backward(pass, out_gradient, last, &acts.stats, rows, gradients, Some((&mut *d, false)), front);
        for (j, (block, saved)) in self.blocks.iter().zip(&acts.blocks).enumerate().rev() {
            let (x, drop) = (&acts.stream[j], block.drop(pass, 0));
            let middle = match &saved.middle {
                Some(middle) => middle,
                None => {
                    if block.ffn.input_gradient || block.ffn.trains {
                        block.attention.join(pass, x, acts.grid, drop, &saved.attention, middle, scratch);
                    }
                    &*middle
                }
            };
            let takes = block.attention.takes(pass.backend, acts.grid, gradients);
            let output = Branch { product: &block.attention.output, drop, takes };
            let [first, second] = [0, 1].map(|half| &acts.norms[2 * j + half]);
            let behind = Behind { norm: &block.ffn.norm, x: middle, stats: &second.stats };
            let drop_ffn = block.drop(pass, 1);
            block.ffn.backward(pass, middle, acts.grid, drop_ffn, output, second, &saved.ffn, d, gradients, scratch);
            let (attention, before) = (&block.attention, before(j, gradients));
            let (grid, acts) = (acts.grid, &saved.attention);
            attention.backward(pass, x, grid, drop, before, behind, first, acts, d, gradients, scratch);
        }
        if self.embed.input_gradient || self.embed.trains {
            self.embed.backward(pass, input, acts.from, &acts.embed, d, gradients, below, scratch);
        }
    }
}

/// All stages forward.
pub fn forward<B: Backend>(
    pass: &Pass<'_, B>,
    stages: &[Stage],
    samples: &[Sample<'_>],
    acts: &mut [StageActs<B>],
    worker: &mut Worker<B>,
) {
    let Worker { scratch, middle, .. } = worker;
    for (i, stage) in stages.iter().enumerate() {
        let (before, now) = acts.split_at_mut(i);
        let input = match before.last() {
            Some(previous) => EmbedInput::Tokens(&previous.out),
            None => EmbedInput::Pixels(samples),
        };
        stage.forward(pass, &input, &mut now[0], middle, scratch);
    }
}

/// All stages backward; `worker.out_gradients` holds the decoder's gradient of each stage's output, and is used up.
/// `reached[i]` says whether gradients are wanted at stage i's output.
pub fn backward<B: Backend>(
    pass: &Pass<'_, B>,
    stages: &[Stage],
    reached: &[bool],
    samples: &[Sample<'_>],
    acts: &[StageActs<B>],
    gradients: &mut Gradients<B>,
    worker: &mut Worker<B>,
) {
    let Worker { scratch, stream, middle, out_gradients } = worker;
    for (i, stage) in stages.iter().enumerate().rev().filter(|(i, _)| reached[*i]) {
        let input = match i {
            0 => EmbedInput::Pixels(samples),
            _ => EmbedInput::Tokens(&acts[i - 1].out),
        };
        let (lower, own) = out_gradients.split_at_mut(i);
        let below = if stage.embed.input_gradient { lower.last_mut() } else { None };
        stage.backward(pass, &input, &acts[i], &own[0], stream, gradients, below, middle, scratch);
    }
}
