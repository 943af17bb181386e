//! A SegFormer on a device: its numbers, its memory, and the phases of a training step.

use std::sync::Arc;

use super::SegformerConfig;
use super::attention::AttentionLayer;
use super::decoder::DecoderActs;
use super::encoder::{self, StageActs};
use super::log::Log;
use super::plan::{Plan, Trainable};
use super::tensors::{Gradients, Id, Tensor, Tensors};
use crate::backend::{
    AdamW, Backend, Base, Batch, Dropout, Grid, Inputs, Moving, Sample, Scaled, SmallProduct, Transpose,
};
use crate::random::{Philox, Purpose};

/// Slots that sum gradients: a fixed number, so that results do not depend on the number of threads.
const SLOTS: usize = 8;
/// BatchNorm's momentum.
const MOMENTUM: f64 = 0.1;

/// Sizes that memory is planned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelOptions {
    /// Side of the square input pictures, a multiple of 32.
    pub size: usize,
    /// Largest micro-batch.
    pub batch: usize,
}

/// Selects the random numbers of one micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct StepRandom {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the micro-batch in the run.
    pub step: u32,
}

/// What one update of the weights is made of.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// Pictures by micro-batch. Each micro-batch counts the same in the loss, and each pixel of one.
    pub micro_batches: &'a [&'a [Sample<'a>]],
    /// Random numbers of the first micro-batch; those of the others count on from its step.
    pub random: StepRandom,
    /// The update.
    pub update: AdamW,
    /// Whether weight decay applies, by trained tensor.
    pub decays: &'a [bool],
}

/// What an evaluation measured, per image.
#[derive(Clone, Debug, Default)]
pub struct Evaluated {
    /// Loss summed over the image's pixels.
    pub loss: Vec<f64>,
    /// `labels²` confusion counts per image, `truth·labels + prediction`.
    pub counts: Vec<u64>,
}

/// What every layer is given on one pass over one unit.
pub struct Pass<'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// Parameters.
    pub tensors: &'a Tensors<B>,
    /// Pictures in the unit.
    pub images: usize,
    /// Random numbers; none outside training.
    random: Option<(StepRandom, usize)>,
}

impl<'a, B: Backend> Pass<'a, B> {
    /// A pass in training over the unit whose first picture is number `first` of the micro-batch.
    fn training(backend: &'a B, tensors: &'a Tensors<B>, random: StepRandom, first: usize, images: usize) -> Self {
        Self { backend, tensors, images, random: Some((random, first)) }
    }

    /// Whether a backward pass follows, which reads what layers store.
    pub fn keeps(&self) -> bool {
        self.random.is_some()
    }

    /// The dropout of a site with `per_image` numbers per picture; none outside training or at rate 0.
    pub fn dropout(&self, purpose: Purpose, site: u32, rate: f32, per_image: usize) -> Option<Dropout> {
        let (random, first_image) = self.random?;
        let stream = Philox::new(random.seed, purpose, site, random.step);
        (rate > 0.0).then_some(Dropout { rate, stream, first: (first_image * per_image) as u64 })
    }
}

/// Pieces of a run that come again and again ([`crate::backend::Memory::repeat`]).
#[derive(Clone, Copy)]
enum Phase {
    Step,
    MicroBatch,
    Gradients,
    Update,
    Logits,
    Evaluation,
}

/// Room that one worker reuses from layer to layer.
pub struct Scratch<B: Backend> {
    /// Token matrices of the largest stage.
    pub tokens: [B::Act; 6],
    /// A matrix as wide as the decoder, the Mix-FFN or gathered patches, whichever is largest of those that the backend puts into
    /// memory; and one as wide as the tokens, the Mix-FFN or the decoder behind the first stage.
    pub wide: [B::Act; 2],
    /// Sums of attention's outputs with their gradients, of all heads, where the backend makes them with the output product's
    /// way back.
    pub deltas: B::Full,
    /// LayerNorm statistics nobody keeps.
    pub stats: B::Full,
    /// Room of separate LoRA paths.
    pub side: SideScratch<B>,
}

/// Room of separate LoRA paths; empty without them.
pub struct SideScratch<B: Backend> {
    /// `(rows, inputs)`
    pub input: B::Act,
    /// `(rows, inputs)` after dropout.
    pub dropped: B::Act,
    /// `(rows, rank)`
    pub low: B::Act,
    /// Gradient of `low`.
    pub low_gradient: B::Act,
}

/// What one worker owns.
pub struct Worker<B: Backend> {
    /// Room for layers.
    pub scratch: Scratch<B>,
    /// Gradient of the residual stream.
    pub stream: B::Act,
    /// The residual stream between attention and Mix-FFN.
    pub middle: B::Act,
    /// Gradients of the stages' outputs.
    pub out_gradients: Vec<B::Act>,
}

/// The activations of pictures that are processed together.
struct Unit<B: Backend> {
    images: usize,
    stages: Vec<StageActs<B>>,
    decoder: DecoderActs<B>,
    /// Loss per image, summed over micro-batches until it is read.
    loss: B::Full,
    /// `labels²` confusion counts per image.
    counts: B::Counts,
}

impl<B: Backend> Unit<B> {
    /// Logits `(labels, height, width)` of the first `images` pictures.
    fn logits(&self, backend: &B, labels: usize, images: usize) -> Vec<Vec<f32>> {
        let area = self.stages[0].grid.area();
        let tokens = backend.download_act(&self.decoder.logits, images * area * labels);
        let planar = |image: &[f32]| (0..labels * area).map(|i| image[i % area * labels + i / area]).collect();
        tokens.chunks_exact(area * labels).map(planar).collect()
    }
}

/// A SegFormer on a device.
pub struct Model<B: Backend> {
    /// Shared, as a whole step is repeated on it while the step changes the rest of the model.
    backend: Arc<B>,
    plan: Plan,
    config: SegformerConfig,
    options: ModelOptions,
    trainable: Trainable,
    tensors: Tensors<B>,
    slots: Vec<Gradients<B>>,
    units: Vec<Unit<B>>,
    workers: Vec<Worker<B>>,
    /// F_i, the fuse's columns for each stage.
    fuse_blocks: Vec<B::Full>,
    /// Where the fuse is trained, `(width, width)` for each stage: gradients of the fuse's columns.
    fuse_gradients: Vec<B::Full>,
    stats: B::Full,
    total: B::Full,
    norm: B::Full,
    /// `(1)`, the factor of adapters' products, on the device, so that what is recorded there serves runs of any other.
    scale: B::Full,
    log: Log<B>,
    batches_tracked: u64,
    buffers: Buffers,
}

/// Bytes of a model's buffers, by what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    /// Parameters, and what is derived from them.
    pub weights: usize,
    /// Gradients of the weights.
    pub gradients: usize,
    /// What layers leave for the backward pass, and the results of evaluations.
    pub activations: usize,
    /// Room that layers use one after the other.
    pub scratch: usize,
}

impl Buffers {
    /// All together.
    pub fn total(&self) -> usize {
        self.weights + self.gradients + self.activations + self.scratch
    }
}

/// First and second moments of the trained tensors.
pub struct Moments<B: Backend> {
    /// Running mean of the gradients, by trained tensor.
    pub first: Vec<B::Full>,
    /// Running mean of their squares.
    pub second: Vec<B::Full>,
}

impl<B: Backend> Model<B> {
    /// Plans and allocates everything a run needs. All weights are zero until set.
    pub fn new(backend: B, config: &SegformerConfig, options: ModelOptions, trainable: &Trainable) -> Self {
        let plan = Plan::new(config, trainable);
        let mut counted = backend.allocated();
        // Bytes allocated since the last call.
        let mut since = |backend: &B| backend.allocated() - std::mem::replace(&mut counted, backend.allocated());
        let lengths = plan.lengths();
        let per_unit = backend.images_per_unit(options.batch).max(1);
        let trains = !plan.trained.is_empty();
        let threads = backend.workers().max(1);
        // Without training, a unit is done with when the next begins.
        let count =
            if trains { options.batch.div_ceil(per_unit) } else { options.batch.div_ceil(per_unit).min(threads) };
        let pixels = Grid { images: per_unit, height: options.size, width: options.size };
        let width = plan.decoder.width;

        let units: Vec<Unit<B>> = (0..count)
            .map(|_| {
                let mut grid = pixels;
                let stages: Vec<_> = (plan.stages.iter())
                    .map(|stage| {
                        let acts = stage.acts(&backend, grid, trains, &plan.wanted);
                        grid = acts.grid;
                        acts
                    })
                    .collect();
                let grids: Vec<Grid> = stages.iter().map(|stage| stage.grid).collect();
                Unit {
                    images: per_unit,
                    decoder: plan.decoder.acts(&backend, &grids, trains),
                    stages,
                    loss: backend.full(per_unit),
                    counts: backend.counts(per_unit * plan.decoder.labels * plan.decoder.labels),
                }
            })
            .collect();

        let log = Log::new(&backend, plan.decoder.labels, per_unit);
        let activations = since(&backend);

        let grids: Vec<Grid> = units.first().map_or(Vec::new(), |u| u.stages.iter().map(|s| s.grid).collect());
        let largest = |size: &dyn Fn(usize) -> usize| (0..grids.len()).map(size).max().unwrap_or(0);
        let tokens = largest(&|s| grids[s].rows() * plan.stages[s].channels).max(plan.decoder.token_room(&grids));
        let hidden = largest(&|s| {
            // A fused Mix-FFN keeps hidden tokens out of memory until the backward pass.
            let blocks = plan.stages[s].blocks.iter().filter(|b| trains || !b.ffn.fuses(&backend));
            grids[s].rows() * blocks.map(|b| b.ffn.hidden).max().unwrap_or(0)
        });
        let rows = largest(&|s| grids[s].rows());
        let deltas = largest(&|s| {
            let attention = plan.stages[s].blocks.iter().map(|block| &block.attention);
            let makes =
                |layer: &&AttentionLayer| plan.wanted[layer.output.weight.0] && layer.joins_output(&backend, grids[s]);
            attention.filter(makes).map(|layer| layer.heads * grids[s].rows()).max().unwrap_or(0)
        });
        let patches = largest(&|s| plan.stages[s].patch_len(&backend, if s == 0 { pixels } else { grids[s - 1] }));
        // What stands for a pass over z, unless evaluation makes none.
        let z = if trains || plan.decoder.writes_z(&backend, &grids) { rows * width } else { 0 };
        let wide = [
            hidden.max(z).max(patches),
            hidden.max(tokens).max(largest(&|s| if s == 0 { 0 } else { grids[s].rows() * width })),
        ];
        let with_side = plan.has_side_paths();
        let side_len = if with_side { tokens.max(hidden).max(patches) } else { 0 };
        let low = if with_side { rows * plan.rank } else { 0 };
        let workers = (0..threads.min(count).max(1))
            .map(|_| Worker {
                scratch: Scratch {
                    tokens: std::array::from_fn(|_| backend.act(tokens)),
                    wide: wide.map(|n| backend.act(n)),
                    deltas: backend.full(deltas),
                    stats: backend.full(2 * rows),
                    side: SideScratch {
                        input: backend.act(side_len),
                        dropped: backend.act(side_len),
                        low: backend.act(low),
                        low_gradient: backend.act(low),
                    },
                },
                stream: backend.act(tokens),
                middle: backend.act(tokens),
                out_gradients: (0..grids.len())
                    .map(|s| backend.act(grids[s].rows() * plan.stages[s].channels))
                    .collect(),
            })
            .collect();
        let scratch = since(&backend);

        let slot_count = count.min(SLOTS);
        let slots = (0..slot_count)
            .map(|slot| {
                // The first slot also receives what is derived at the end: gradients of factors and of the decoder's parts.
                Gradients::new(&backend, &lengths, |id| {
                    trains && plan.wanted[id.0] && (slot == 0 || !plan.only_derived(id))
                })
            })
            .collect();
        let fuse_gradients = (plan.stages.iter())
            .map(|_| backend.full(if plan.wanted[plan.decoder.fuse.0] { width * width } else { 0 }))
            .collect();
        let (total, norm, mut scale) = (backend.full(2 * width), backend.full(1), backend.full(1));
        backend.upload(&[trainable.scale() as f32], &mut scale);
        let gradients = since(&backend);

        let tensors = Tensors::new(
            &backend,
            &lengths,
            |id| plan.products[id.0],
            |id| plan.adapters.iter().any(|a| a.weight == id && a.scaled_b.is_none()),
        );
        let fuse_blocks = plan.stages.iter().map(|_| backend.full(width * width)).collect();
        let stats = backend.full(2 * width);
        let buffers = Buffers { weights: since(&backend), gradients, activations, scratch };
        Self {
            buffers,
            tensors,
            fuse_blocks,
            fuse_gradients,
            stats,
            total,
            norm,
            scale,
            log,
            batches_tracked: 0,
            config: config.clone(),
            options,
            trainable: trainable.clone(),
            slots,
            units,
            workers,
            plan,
            backend: Arc::new(backend),
        }
    }

    /// Makes of this model, and of its moments, what [`Model::new`] and [`Model::moments`] would make of these arguments, if that
    /// would take the same memory and do the same work, of which the device may keep recordings. Returns whether it would;
    /// if not, nothing is done.
    pub fn renew(
        &mut self,
        moments: &mut Moments<B>,
        config: &SegformerConfig,
        options: ModelOptions,
        trainable: &Trainable,
    ) -> bool {
        if self.config != *config || self.options != options || !self.trainable.same_shape(trainable) {
            return false;
        }
        self.trainable = trainable.clone();
        self.backend.renew();
        self.backend.upload(&[trainable.scale() as f32], &mut self.scale);
        for i in 0..self.plan.specs.len() {
            self.backend.zero(self.tensors.value_mut(Id(i)));
        }
        for moment in moments.first.iter_mut().chain(&mut moments.second) {
            self.backend.zero(moment);
        }
        for unit in &mut self.units {
            self.backend.zero(&mut unit.loss);
        }
        self.clear_gradients();
        self.log.clear();
        self.batches_tracked = 0;
        true
    }

    /// The configuration.
    pub fn config(&self) -> &SegformerConfig {
        &self.config
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Side of the pictures.
    pub fn size(&self) -> usize {
        self.options.size
    }

    /// Largest micro-batch.
    pub fn batch(&self) -> usize {
        self.options.batch
    }

    /// Bytes allocated with the model, by what they hold.
    pub fn buffers(&self) -> Buffers {
        self.buffers
    }

    /// Bytes allocated with the model: all but the optimizer's and what operations share.
    pub fn planned_bytes(&self) -> usize {
        self.buffers.total()
    }

    /// Batches BatchNorm has seen in training.
    pub fn batches_tracked(&self) -> u64 {
        self.batches_tracked
    }

    /// Sets the count of batches BatchNorm has seen.
    pub fn set_batches_tracked(&mut self, count: u64) {
        self.batches_tracked = count;
    }

    /// Sets a tensor from its layout on disk. Call [`Model::refresh`] when all are set.
    pub fn set(&mut self, id: Id, data: &[f32]) {
        let data = self.plan.specs[id.0].to_memory(data);
        self.backend.upload(&data, self.tensors.value_mut(id));
    }

    /// The trained tensors, by name.
    pub fn trained(&self) -> impl Iterator<Item = (&str, Id)> {
        self.plan.trained.iter().map(|&id| (self.plan.specs[id.0].name.as_str(), id))
    }

    /// A tensor in its layout on disk.
    pub fn get(&self, id: Id) -> Vec<f32> {
        self.plan.specs[id.0].to_disk(&self.backend.download(self.tensors.value(id)))
    }

    /// The gradient of a tensor in its layout on disk, after [`Model::finish_gradients`]; `None` if it is not trained.
    pub fn gradient(&self, id: Id) -> Option<Vec<f32>> {
        let gradient = self.slots.first()?.get(id)?;
        Some(self.plan.specs[id.0].to_disk(&self.backend.download(gradient)))
    }

    /// Makes everything that is derived from the parameters: products' weights, merged adapters, the folded decoder.
    pub fn refresh(&mut self) {
        for i in 0..self.plan.specs.len() {
            self.tensors.refresh(&self.backend, Id(i));
        }
        refresh_derived(&*self.backend, &self.plan, &self.scale, &mut self.tensors, &mut self.fuse_blocks, true);
    }

    /// One step: gradients of all micro-batches, their mean, and an update with it. Losses add up until [`Model::take_loss`].
    /// A device that takes all of it at once ([`crate::backend::Memory::takes_all`]) repeats it as a whole. `go_on` is told how
    /// many pictures have been taken, micro-batch by micro-batch, and says whether to go on. Returns whether it always did; if not,
    /// the step is done, or a part of it, and the model is of no more use.
    pub fn train_step(
        &mut self,
        step: &Step<'_>,
        moments: &mut Moments<B>,
        mut go_on: impl FnMut(usize) -> bool,
    ) -> bool {
        let (backend, ModelOptions { size, batch }) = (Arc::clone(&self.backend), self.options);
        let numbered = step.micro_batches.iter().zip(step.random.step..);
        let batches: Vec<Batch<'_>> = numbered.map(|(&samples, step)| Batch { samples, step }).collect();
        let inputs = Inputs { batches: &batches, size, update: Some(step.update) };
        let mut key = vec![Phase::Step as u64, step.random.seed];
        key.extend(batches.iter().map(|batch| batch.samples.len() as u64));
        key.extend(update_key(&*backend, &step.update, step.decays, moments));
        let mut parts = |model: &mut Self, go_on: &mut dyn FnMut(usize) -> bool| {
            model.clear_gradients();
            for batch in &batches {
                let pixels = batch.samples.len() * size * size;
                let random = StepRandom { step: batch.step, ..step.random };
                model.micro_batch(batch.samples, 1.0 / (pixels * batches.len()) as f64, random);
                if !go_on(batch.samples.len()) {
                    return false;
                }
            }
            model.finish_gradients();
            model.update(&step.update, step.decays, moments);
            true
        };
        let went_on = if backend.takes_all(&inputs) {
            backend.repeat(&key, &inputs, || _ = parts(self, &mut |_| true));
            batches.iter().all(|batch| go_on(batch.samples.len()))
        } else {
            parts(self, &mut go_on)
        };
        // As the last micro-batch left them, or would have, had its work not been repeated without it.
        if let Some(last) = batches.last() {
            split(&mut self.units, last.samples.len(), backend.images_per_unit(batch));
        }
        self.batches_tracked += batches.len() as u64;
        went_on
    }

    /// Forward and backward over one micro-batch; gradients and losses add up until [`Model::finish_gradients`] and
    /// [`Model::take_loss`]. `scale` is the factor of each pixel's loss.
    pub fn train_micro_batch(&mut self, samples: &[Sample<'_>], scale: f64, random: StepRandom) {
        self.micro_batch(samples, scale, random);
        self.batches_tracked += 1;
    }

    fn micro_batch(&mut self, samples: &[Sample<'_>], scale: f64, random: StepRandom) {
        let Self { backend, plan, tensors, slots, units, workers, options, stats, total, .. } = self;
        let (backend, size, decoder): (&B, _, _) = (backend, options.size, &plan.decoder);
        let per_unit = backend.images_per_unit(options.batch);
        let units = split(units, samples.len(), per_unit);
        let part = |u: usize| &samples[u * per_unit..samples.len().min((u + 1) * per_unit)];
        let rows: Vec<usize> = units.iter().map(|u| u.stages[0].grid.rows()).collect();

        let key = [Phase::MicroBatch as u64, samples.len() as u64, scale.to_bits(), random.seed];
        let inputs = Inputs { batches: &[Batch { samples, step: random.step }], size, update: None };
        backend.repeat(&key, &inputs, || {
            backend.each_unit(units, slots, workers, |u, unit, _, worker| {
                let pass = Pass::training(backend, tensors, random, u * per_unit, part(u).len());
                encoder::forward(&pass, &plan.stages, part(u), &mut unit.stages, worker);
                decoder.forward_linear(&pass, &unit.stages, &mut unit.decoder, &mut worker.scratch);
            });

            let moments: Vec<&B::Full> = units.iter().map(|u| &u.decoder.moments).collect();
            tensors.write_two(decoder.running_mean, decoder.running_var, |mean, var| {
                backend.batch_stats(&moments, &rows, decoder.width, MOMENTUM, stats, mean, var);
            });

            backend.each_unit(units, slots, workers, |u, unit, gradients, worker| {
                let pass = Pass::training(backend, tensors, random, u * per_unit, part(u).len());
                let (scratch, grid) = (&mut worker.scratch, unit.stages[0].grid);
                decoder.forward_head(&pass, stats, grid, &mut unit.decoder, scratch);
                let Unit { decoder: acts, loss, .. } = unit;
                decoder.loss_and_sums(&pass, stats, grid, part(u), (size, scale), acts, loss, gradients, scratch);
            });

            let sums: Vec<&B::Full> = units.iter().map(|u| &u.decoder.sums).collect();
            backend.zero(total);
            backend.add_all(&mut [(sums, &mut *total)]);
            if let Some((dgamma, dbeta)) = slots[0].pair_mut(decoder.norm.gamma, decoder.norm.beta) {
                backend.add_part(total, 0, dbeta);
                backend.add_part(total, decoder.width, dgamma);
            }

            let batch_rows = rows.iter().sum();
            backend.each_unit(units, slots, workers, |u, unit, gradients, worker| {
                let pass = Pass::training(backend, tensors, random, u * per_unit, part(u).len());
                let sums = (&*total, batch_rows);
                decoder.backward(&pass, stats, sums, &unit.stages, &mut unit.decoder, gradients, worker);
                encoder::backward(&pass, &plan.stages, &decoder.reached, part(u), &unit.stages, gradients, worker);
            });
        });
    }

    /// Sets gradients to zero, for the next group of micro-batches.
    pub fn clear_gradients(&mut self) {
        for slot in &mut self.slots {
            slot.clear(&*self.backend);
        }
    }

    /// Joins the slots' gradients and splits them into those of the trained tensors: adapters' factors are projected
    /// (`dB = s·dW·Aᵀ`, `dA = s·Bᵀ·dW`), the folded decoder's parts unfolded.
    pub fn finish_gradients(&mut self) {
        let Self { backend, plan, tensors, slots, fuse_blocks, fuse_gradients, norm, scale, .. } = self;
        let backend: &B = backend;
        backend.repeat(&[Phase::Gradients as u64], &Inputs::default(), || {
            let Some((gradients, others)) = slots.split_first_mut() else { return };
            gradients.add(backend, others);
            let decoder = &plan.decoder;
            decoder.unfold(backend, tensors, fuse_blocks, fuse_gradients, gradients);
            let (mut each, mut scaled, mut products) = (gradients.each(), Vec::new(), Vec::new());
            let mut project = |a, b, transpose, size, c| {
                products.push(SmallProduct { alpha: Some(scale), ..SmallProduct::new(a, b, transpose, size, c) });
            };
            let (rank, width) = (plan.rank, decoder.width);
            for adapter in &plan.adapters {
                let (outputs, inputs) = (adapter.outputs, adapter.inputs);
                let (a, b) = (tensors.value(adapter.a), tensors.value(adapter.b));
                if let Some(scaled_b) = adapter.scaled_b {
                    let (Some(x), Some(y)) = (each.take_shared(scaled_b), each.take(adapter.b)) else { continue };
                    match decoder.stage_of(adapter.weight) {
                        None => scaled.push(Scaled { x, y, product: None }),
                        Some(stage) => project(&fuse_blocks[stage], x, Transpose::Left, (width, rank, width), y),
                    }
                    continue;
                }
                let dw = each.take_shared(adapter.weight);
                if let (Some(dw), Some(db)) = (dw, each.take(adapter.b)) {
                    project(dw, a, Transpose::Right, (outputs, rank, inputs), db);
                }
                if let (Some(dw), Some(da)) = (dw, each.take(adapter.a)) {
                    project(b, dw, Transpose::Left, (rank, inputs, outputs), da);
                }
            }
            backend.scale_all(scale, &mut scaled);
            backend.small_products(&mut products);
            let trained: Vec<&B::Full> = plan.trained.iter().filter_map(|&id| gradients.get(id)).collect();
            backend.gradient_norm(&trained, norm);
        });
    }

    /// Euclidean norm of all gradients together, after [`Model::finish_gradients`].
    pub fn gradient_norm(&self) -> f64 {
        self.backend.scalars(&self.norm, 1)[0]
    }

    /// Zeroed moments for the trained tensors.
    pub fn moments(&self) -> Moments<B> {
        let zeros = || self.plan.trained.iter().map(|id| self.backend.full(self.plan.specs[id.0].len())).collect();
        Moments { first: zeros(), second: zeros() }
    }

    /// One update of the trained tensors; `decays[i]` says whether weight decay applies to trained tensor i.
    pub fn update(&mut self, adamw: &AdamW, decays: &[bool], moments: &mut Moments<B>) {
        let Self { backend, plan, tensors, slots, fuse_blocks, norm, scale, .. } = self;
        let (backend, plan): (&B, _) = (backend, &*plan);
        let mut key = vec![Phase::Update as u64];
        key.extend(update_key(backend, adamw, decays, moments));
        backend.repeat(&key, &Inputs { update: Some(*adamw), ..Inputs::default() }, || {
            let mut each = tensors.each();
            let both = moments.first.iter_mut().zip(&mut moments.second);
            let moving = plan.trained.iter().zip(decays).zip(both).filter_map(|((&id, &decays), (m, v))| {
                let Tensor { value, merged, product } = each.take(id);
                // With an adapter merged in, what products read is made after this.
                let product = product.as_mut().filter(|_| merged.is_none());
                Some(Moving { gradient: slots[0].get(id)?, parameter: value, m, v, product, decays })
            });
            backend.adamw(adamw, norm, &mut moving.collect::<Vec<_>>());
            refresh_derived(backend, plan, scale, tensors, fuse_blocks, false);
        });
    }

    /// The summed, scaled losses of all micro-batches since the last call.
    pub fn take_loss(&mut self) -> f64 {
        // The last micro-batch may have been smaller than those before.
        let images = self.backend.images_per_unit(self.options.batch).max(1);
        let mut total = 0.0;
        for unit in &mut self.units {
            total += self.backend.scalars(&unit.loss, images).iter().sum::<f64>();
            self.backend.zero(&mut unit.loss);
        }
        total
    }

    /// Loss and confusion counts of `samples` in evaluation mode. Losses that wait for [`Model::take_loss`] are lost.
    pub fn evaluate(&mut self, samples: &[Sample<'_>]) -> Evaluated {
        self.begin_evaluation();
        self.measure(samples);
        self.end_evaluation()
    }

    /// Begins an evaluation: what [`Model::measure`] measures from now on, [`Model::end_evaluation`] tells.
    pub fn begin_evaluation(&mut self) {
        self.log.clear();
    }

    /// As [`Model::evaluate`], without waiting for what comes of it.
    pub fn measure(&mut self, samples: &[Sample<'_>]) {
        let labels = self.plan.decoder.labels;
        self.each_in_evaluation(
            Phase::Evaluation,
            samples,
            |backend, size, part, unit| {
                let Unit { decoder: acts, loss, counts, stages, .. } = unit;
                let grid = stages[0].grid;
                backend.zero(loss);
                backend.cross_entropy(&acts.logits, grid, labels, part, size, 1.0, loss, None);
                backend.confusion(&acts.logits, grid, labels, part, size, counts);
            },
            |backend, images, unit, log| {
                log.add(backend, images, &unit.loss, &unit.counts);
                backend.zero(&mut unit.loss);
            },
        );
    }

    /// What was measured since [`Model::begin_evaluation`], in the order of the samples.
    pub fn end_evaluation(&mut self) -> Evaluated {
        self.log.take(&*self.backend)
    }

    /// Rows and columns of the logits of a picture: a token of the first stage each.
    pub fn logit_grid(&self) -> Grid {
        Grid { images: 1, ..self.units[0].stages[0].grid }
    }

    /// Logits `(labels, height, width)` of each sample in evaluation mode, over [`Model::logit_grid`].
    pub fn logits(&mut self, samples: &[Sample<'_>]) -> Vec<Vec<f32>> {
        let labels = self.plan.decoder.labels;
        let mut result = Vec::with_capacity(samples.len());
        self.each_in_evaluation(
            Phase::Logits,
            samples,
            |_, _, _, _| {},
            |backend, images, unit, _| result.extend(unit.logits(backend, labels, images)),
        );
        result
    }

    /// Logits `(labels, height, width)` that the last micro-batch, of `images` pictures, was trained on.
    pub fn training_logits(&self, images: usize) -> Vec<Vec<f32>> {
        let labels = self.plan.decoder.labels;
        self.units.iter().flat_map(|unit| unit.logits(&*self.backend, labels, unit.images)).take(images).collect()
    }

    /// Runs samples through the model in evaluation mode: `inside` with each unit's logits on a worker, always the same in
    /// one phase, then `collect` in order.
    fn each_in_evaluation(
        &mut self,
        phase: Phase,
        samples: &[Sample<'_>],
        inside: impl Fn(&B, usize, &[Sample<'_>], &mut Unit<B>) + Sync,
        mut collect: impl FnMut(&B, usize, &mut Unit<B>, &mut Log<B>),
    ) {
        let Self { backend, plan, tensors, units, workers, options, stats, log, .. } = self;
        let (backend, size, decoder): (&B, _, _) = (backend, options.size, &plan.decoder);
        let per_unit = backend.images_per_unit(options.batch);
        let (mean, var) = (tensors.value(decoder.running_mean), tensors.value(decoder.running_var));
        // As many units as there are workers, so that each worker's unit stays in its cache.
        let mut slots = vec![(); workers.len()];
        for batch in samples.chunks(workers.len() * per_unit) {
            let part = |u: usize| &batch[u * per_unit..batch.len().min((u + 1) * per_unit)];
            let units = split(units, batch.len(), per_unit);
            let key = [phase as u64, batch.len() as u64];
            let inputs = Inputs { batches: &[Batch { samples: batch, step: 0 }], size, update: None };
            backend.repeat(&key, &inputs, || {
                backend.running_stats(mean, var, decoder.width, stats);
                backend.evaluating(|| {
                    backend.each_unit(units, &mut slots, workers, |u, unit, (), worker| {
                        let pass = Pass { backend, tensors, images: part(u).len(), random: None };
                        encoder::forward(&pass, &plan.stages, part(u), &mut unit.stages, worker);
                        decoder.forward_evaluation(&pass, stats, &unit.stages, &mut unit.decoder, &mut worker.scratch);
                        inside(backend, size, part(u), unit);
                    });
                });
            });
            for (u, unit) in units.iter_mut().enumerate() {
                collect(backend, part(u).len(), unit, log);
            }
        }
    }
}

/// What recorded updates depend on ([`crate::backend::Memory::repeat`]).
fn update_key<B: Backend>(
    backend: &B,
    adamw: &AdamW,
    decays: &[bool],
    moments: &Moments<B>,
) -> impl Iterator<Item = u64> {
    let AdamW { betas: [beta1, beta2], epsilon, max_norm, .. } = *adamw;
    let numbers = [beta1, beta2, epsilon, max_norm].map(f64::to_bits);
    let places = moments.first.iter().chain(&moments.second).map(|x| backend.place(x));
    numbers.into_iter().chain(decays.iter().map(|&decays| u64::from(decays))).chain(places)
}

/// The units that `images` pictures fill, each told how many it holds.
fn split<B: Backend>(units: &mut [Unit<B>], images: usize, per_unit: usize) -> &mut [Unit<B>] {
    let units = &mut units[..images.div_ceil(per_unit)];
    for (u, unit) in units.iter_mut().enumerate() {
        unit.images = per_unit.min(images - u * per_unit);
        for stage in &mut unit.stages {
            stage.set_images(unit.images);
        }
    }
    units
}

/// Remakes what depends on trained tensors; with `all`, everything derived.
fn refresh_derived<B: Backend>(
    backend: &B,
    plan: &Plan,
    scale: &B::Full,
    tensors: &mut Tensors<B>,
    fuse_blocks: &mut [B::Full],
    all: bool,
) {
    let decoder = &plan.decoder;
    let mut each = tensors.each();
    let merges = plan.adapters.iter().filter(|adapter| adapter.scaled_b.is_none()).filter_map(|adapter| {
        let (a, b): (&Tensor<B>, &Tensor<B>) = (each.take(adapter.a), each.take(adapter.b));
        let Tensor { value, merged, product } = each.take(adapter.weight);
        let size = (adapter.outputs, adapter.inputs, plan.rank);
        Some(SmallProduct {
            alpha: Some(scale),
            base: Base::Of(value),
            product: product.as_mut(),
            ..SmallProduct::new(&b.value, &a.value, Transpose::None, size, merged.as_mut()?)
        })
    });
    backend.small_products(&mut merges.collect::<Vec<_>>());
    if all || decoder.folded.iter().any(|f| plan.wanted[f.weight.0]) {
        decoder.fold(backend, tensors, fuse_blocks);
    }
    let (mut each, mut scaled, mut folded) = (tensors.each(), Vec::new(), Vec::new());
    for adapter in &plan.adapters {
        let Some(scaled_b) = adapter.scaled_b else { continue };
        let (b, to): (&Tensor<B>, _) = (each.take(adapter.b), each.take(scaled_b));
        let (x, y, product) = (&b.value, &mut to.value, to.product.as_mut());
        match decoder.stage_of(adapter.weight) {
            None => scaled.push(Scaled { x, y, product }),
            Some(stage) => {
                let (block, size) = (&fuse_blocks[stage], (decoder.width, plan.rank, decoder.width));
                let new = SmallProduct::new(block, x, Transpose::None, size, y);
                folded.push(SmallProduct { alpha: Some(scale), product, ..new });
            }
        }
    }
    backend.scale_all(scale, &mut scaled);
    backend.small_products(&mut folded);
}
