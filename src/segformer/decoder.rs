//! The MLP decoder, folded: per-stage linear, upsampling and the 1x1 fuse are all linear, and bilinear weights sum to one,
//! so stage i contributes `upsample(M_i·x_i)` with `M_i = F_i·L_i`, and the biases join into `c = Σ F_i·l_i`.
//! F_i is the fuse's block of columns for stage i; the reference concatenates the last stage first.

use super::affine::Affine;
use super::encoder::StageActs;
use super::model::{Pass, Scratch, SideScratch, Worker};
use super::norm::Norm;
use super::tensors::{Gradients, Id, Tensor, Tensors};
use crate::backend::{
    Backend, Base, BatchNormView, Classifier, Dropout, FirstGradient, FirstStage, Grid, HeadPass, Sample, SmallProduct,
    Transpose,
};
use crate::random::Purpose;

/// The layer.
pub struct Decoder {
    /// L_i and l_i.
    pub linear: Vec<(Id, Id)>,
    /// F `(width, stages·width)`.
    pub fuse: Id,
    /// M_i; the first stage's, which stands at the logits' resolution, also adds c.
    pub folded: Vec<Affine>,
    /// c.
    pub folded_bias: Id,
    /// BatchNorm's scale and shift.
    pub norm: Norm,
    /// BatchNorm's running mean.
    pub running_mean: Id,
    /// BatchNorm's running variance.
    pub running_var: Id,
    /// Classes.
    pub labels: usize,
    /// The classifier.
    pub classifier: Affine,
    /// Channels.
    pub width: usize,
    /// Dropout before the classifier.
    pub dropout: f32,
    /// Whether gradients are wanted at each stage's output.
    pub reached: Vec<bool>,
}

/// What the phases of a step hand on, per unit.
pub struct DecoderActs<B: Backend> {
    /// Before BatchNorm, `(rows, width)`; empty in a model for evaluation that [makes no use of it](Decoder::writes_z).
    pub z: B::Act,
    /// Which activations pass ReLU and dropout, where a pass back follows that reads it.
    pub passed: B::Act,
    /// `(rows, labels)`
    pub logits: B::Act,
    /// Gradient of the logits.
    pub dlogits: B::Act,
    /// Mean and squared deviations of z per channel.
    pub moments: B::Full,
    /// Sums for BatchNorm's backward pass.
    pub sums: B::Full,
}

impl Decoder {
    /// Zeroed storage for stages on `grids`; with `keep`, what a backward pass needs.
    pub fn acts<B: Backend>(&self, backend: &B, grids: &[Grid], keep: bool) -> DecoderActs<B> {
        let rows = grids[0].rows();
        let passed = if keep { backend.passed(rows, self.width, self.labels) } else { backend.act(0) };
        DecoderActs {
            z: backend.act(if keep || self.writes_z(backend, grids) { rows * self.width } else { 0 }),
            passed,
            logits: backend.act(rows * self.labels),
            dlogits: backend.act(rows * self.labels),
            moments: backend.full(2 * self.width),
            sums: backend.full(2 * self.width),
        }
    }

    /// Whether evaluation of stages on `grids` writes z, and reads it again.
    pub fn writes_z<B: Backend>(&self, backend: &B, grids: &[Grid]) -> bool {
        let first = &self.folded[0];
        first.side.is_some() || !backend.classifies_stages(first.inputs, &grids[1..], grids[0], self.width, self.labels)
    }

    /// Columns of F that belong to `stage`.
    fn block(&self, stage: usize) -> usize {
        (self.linear.len() - 1 - stage) * self.width
    }

    /// Dropout before the classifier.
    fn drop<B: Backend>(&self, pass: &Pass<'_, B>, grid: Grid) -> Option<Dropout> {
        pass.dropout(Purpose::HeadDropout, 0, self.dropout, grid.area() * self.width)
    }

    /// The parts of z that come from all stages but the first, to `rooms`, each at its resolution.
    fn parts<'s, B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        stages: &[StageActs<B>],
        rooms: impl Iterator<Item = &'s mut B::Act>,
        side: &mut SideScratch<B>,
    ) -> Vec<(&'s B::Act, Grid)> {
        let others = self.folded.iter().zip(stages).skip(1).zip(rooms);
        let part = |((folded, stage), room): ((&Affine, &StageActs<B>), &'s mut B::Act)| {
            folded.forward(pass, &stage.out, stage.grid.rows(), room, side);
            (&*room, stage.grid)
        };
        others.map(part).collect()
    }

    /// The product that makes z of the first stage; with a separate path beside it, z is made here.
    fn first<'s, B: Backend>(
        &'s self,
        pass: &Pass<'s, B>,
        stage: &'s StageActs<B>,
        z: &mut B::Act,
        side: &mut SideScratch<B>,
    ) -> Option<FirstStage<'s, B>> {
        let folded = &self.folded[0];
        if folded.side.is_some() {
            folded.forward(pass, &stage.out, stage.grid.rows(), z, side);
            return None;
        }
        let (weight, bias) = folded.operands(pass);
        Some(FirstStage { tokens: &stage.out, weight, bias, inputs: folded.inputs })
    }

    /// Stage outputs to z and its moments, in training.
    pub fn forward_linear<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        stages: &[StageActs<B>],
        acts: &mut DecoderActs<B>,
        scratch: &mut Scratch<B>,
    ) {
        let Scratch { wide, tokens, side, .. } = scratch;
        let first = self.first(pass, &stages[0], &mut acts.z, side);
        let parts = self.parts(pass, stages, wide.iter_mut().chain(tokens), side);
        pass.backend.join_stages(first, &parts, stages[0].grid, self.width, &mut acts.z, Some(&mut acts.moments));
    }

    /// Stage outputs to logits, in evaluation, whose statistics are known beforehand.
    pub fn forward_evaluation<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        stats: &B::Full,
        stages: &[StageActs<B>],
        acts: &mut DecoderActs<B>,
        scratch: &mut Scratch<B>,
    ) {
        let Scratch { wide: [room, own], tokens, side, .. } = scratch;
        let DecoderActs { z, logits, .. } = acts;
        let first = self.first(pass, &stages[0], z, side);
        let parts = self.parts(pass, stages, [own].into_iter().chain(tokens), side);
        let (norm, classifier) = self.end(pass, stats);
        pass.backend.classify_stages(first, &parts, stages[0].grid, self.width, z, norm, classifier, room, logits);
    }

    /// Numbers that the decoder needs in each of `Scratch::tokens`, where stages go that find no wide room on the way back: all
    /// from the third on.
    pub fn token_room(&self, grids: &[Grid]) -> usize {
        grids.iter().skip(2).map(|grid| grid.rows() * self.width).max().unwrap_or(0)
    }

    /// What a pass over z, from BatchNorm to the logits or back, reads.
    fn head<'a, B: Backend>(
        &self,
        pass: &Pass<'a, B>,
        stats: &'a B::Full,
        grid: Grid,
        z: &'a B::Act,
    ) -> HeadPass<'a, B> {
        let (norm, classifier) = self.end(pass, stats);
        HeadPass { z, norm, drop: self.drop(pass, grid), rows: grid.rows(), channels: self.width, classifier }
    }

    /// BatchNorm and the classifier.
    fn end<'a, B: Backend>(
        &self,
        pass: &Pass<'a, B>,
        stats: &'a B::Full,
    ) -> (BatchNormView<'a, B::Full>, Classifier<'a, B>) {
        let Some(bias) = self.classifier.bias else { unreachable!("the classifier has a bias") };
        let tensors = pass.tensors;
        let (weight, bias) = (tensors.product(self.classifier.weight), tensors.product(bias));
        (
            BatchNormView { stats, gamma: tensors.value(self.norm.gamma), beta: tensors.value(self.norm.beta) },
            Classifier { weight, bias, labels: self.labels },
        )
    }

    /// z to logits, with the statistics of the batch.
    pub fn forward_head<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        stats: &B::Full,
        grid: Grid,
        acts: &mut DecoderActs<B>,
        scratch: &mut Scratch<B>,
    ) {
        let DecoderActs { z, passed, logits, .. } = acts;
        pass.backend.classify(self.head(pass, stats, grid, z), &mut scratch.wide[0], passed, logits);
    }

    /// Logits to the loss, its gradient, the classifier's gradients and the sums BatchNorm needs. `scratch` must be as
    /// [`Decoder::forward_head`] left it. `loss` receives, added, `scale` times the loss of each image.
    pub fn loss_and_sums<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        stats: &B::Full,
        grid: Grid,
        samples: &[Sample<'_>],
        (size, scale): (usize, f64),
        acts: &mut DecoderActs<B>,
        loss: &mut B::Full,
        gradients: &mut Gradients<B>,
        scratch: &mut Scratch<B>,
    ) {
        let (backend, rows) = (pass.backend, grid.rows());
        let DecoderActs { z, passed, logits, dlogits, sums, .. } = acts;
        backend.cross_entropy(logits, grid, self.labels, samples, size, scale, loss, Some(dlogits));
        if let Some(db) = self.classifier.bias.and_then(|id| gradients.get_mut(id)) {
            backend.linear_backward_bias(dlogits, rows, self.labels, db);
        }
        let (room, dw) = (&mut scratch.wide[0], gradients.get_mut(self.classifier.weight));
        backend.classify_backward(self.head(pass, stats, grid, z), passed, dlogits, room, dw, sums);
    }

    /// From the gradient of the logits to `worker.out_gradients`, with the folded weights' gradients. `total` is the
    /// sum of all units' sums over `batch_rows` rows.
    pub fn backward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        stats: &B::Full,
        (total, batch_rows): (&B::Full, usize),
        stages: &[StageActs<B>],
        acts: &mut DecoderActs<B>,
        gradients: &mut Gradients<B>,
        worker: &mut Worker<B>,
    ) {
        let backend = pass.backend;
        let grid = stages[0].grid;
        let Worker { scratch, out_gradients, .. } = worker;
        let Scratch { wide: [dz, own], tokens, side, .. } = scratch;
        let DecoderActs { z, passed, dlogits, sums, .. } = acts;
        let head = self.head(pass, stats, grid, z);
        let folded = &self.folded[0];
        // The way back to the first stage is made with dz, unless a separate path runs beside its product.
        let joint = folded.side.is_none();
        let first = joint.then(|| FirstGradient {
            weight: folded.operands(pass).0,
            inputs: folded.inputs,
            tokens: self.reached[0].then_some(&mut out_gradients[0]),
            sum: gradients.get_mut(folded.weight).map(|dw| (&stages[0].out, dw)),
        });
        backend.classify_backward_input(head, passed, dlogits, (total, batch_rows), sums, dz, first);
        // Stages whose gradient nobody wants are left out, from the first on: what is trained lies in one piece.
        let wanted = |i: usize| self.folded[i].trains(gradients) || self.reached[i];
        let skipped = (0..stages.len()).take_while(|&i| !wanted(i)).count();
        let rooms = [own].into_iter().chain(tokens);
        let mut parts: Vec<(&mut B::Act, Grid)> = stages
            .iter()
            .map(|stage| stage.grid)
            .skip(skipped.max(1))
            .zip(rooms)
            .map(|(grid, room)| (room, grid))
            .collect();
        backend.split_stages(dz, grid, self.width, &mut parts);
        let firsts = (skipped == 0).then_some(&*dz);
        let gradients_of = firsts.into_iter().chain(parts.iter().map(|(room, _)| &**room));
        for (i, dy) in (skipped..stages.len()).zip(gradients_of) {
            let (folded, stage) = (&self.folded[i], &stages[i]);
            let stage_rows = stage.grid.rows();
            if let Some(db) = folded.bias.and_then(|id| gradients.get_mut(id)) {
                backend.shift_gradient(dy, stage_rows, self.width, db);
            }
            if i == 0 && joint {
                continue;
            }
            if folded.trains(gradients) {
                folded.backward_weights(pass, &stage.out, dy, stage_rows, gradients, side);
            }
            if self.reached[i] {
                folded.backward_input(pass, dy, stage_rows, &mut out_gradients[i], false, side);
            }
        }
    }

    /// Makes F_i, to `blocks`, and from them `M_i = F_i·L_i`, L_i with its adapter merged, and `c = Σ F_i·l_i`, summed
    /// stage by stage.
    pub fn fold<B: Backend>(&self, backend: &B, tensors: &mut Tensors<B>, blocks: &mut [B::Full]) {
        let width = self.width;
        for (stage, block) in blocks.iter_mut().enumerate() {
            let fuse = tensors.effective(self.fuse);
            backend.columns(fuse, self.linear.len() * width, self.block(stage), width, block);
        }
        let mut each = tensors.each();
        let products = self.folded.iter().zip(&self.linear).zip(&*blocks).map(|((folded, &(linear, _)), block)| {
            let (linear, to): (&Tensor<B>, _) = (each.take(linear), each.take(folded.weight));
            let (b, size) = (linear.effective(), (width, folded.inputs, width));
            let product = to.product.as_mut();
            SmallProduct { product, ..SmallProduct::new(block, b, Transpose::None, size, &mut to.value) }
        });
        backend.small_products(&mut products.collect::<Vec<_>>());
        for (stage, block) in blocks.iter().enumerate() {
            let mut each = tensors.each();
            let (bias, to): (&Tensor<B>, _) = (each.take(self.linear[stage].1), each.take(self.folded_bias));
            let size = (width, 1, width);
            backend.small_products(&mut [SmallProduct {
                base: if stage == 0 { Base::Zeros } else { Base::Itself },
                product: to.product.as_mut(),
                ..SmallProduct::new(block, &bias.value, Transpose::None, size, &mut to.value)
            }]);
        }
    }

    /// The stage whose linear module has the weight `id`.
    pub fn stage_of(&self, id: Id) -> Option<usize> {
        self.linear.iter().position(|(weight, _)| *weight == id)
    }

    /// Splits the gradients of M_i and c into those of F, L_i and l_i. `blocks` hold F_i, `room`, where F is trained, has
    /// `(width, width)` for each.
    pub fn unfold<B: Backend>(
        &self,
        backend: &B,
        tensors: &Tensors<B>,
        blocks: &[B::Full],
        room: &mut [B::Full],
        gradients: &mut Gradients<B>,
    ) {
        let width = self.width;
        let mut each = gradients.each();
        let (d_bias, d_fuse) = (each.take_shared(self.folded_bias), each.take(self.fuse));
        let mut products = Vec::new();
        for (stage, (block, d_block)) in blocks.iter().zip(&mut *room).enumerate() {
            let (inputs, (weight, bias)) = (self.folded[stage].inputs, self.linear[stage]);
            let d_folded = each.take_shared(self.folded[stage].weight);
            if let (Some(d_folded), Some(dl)) = (d_folded, each.take(weight)) {
                products.push(SmallProduct::new(block, d_folded, Transpose::Left, (width, inputs, width), dl));
            }
            if let (Some(d_bias), Some(dl)) = (d_bias, each.take(bias)) {
                products.push(SmallProduct::new(block, d_bias, Transpose::Left, (width, 1, width), dl));
            }
            if let (Some(d_folded), Some(_)) = (d_folded, &d_fuse) {
                let (linear, size) = (tensors.effective(weight), (width, width, inputs));
                products.push(SmallProduct::new(d_folded, linear, Transpose::Right, size, d_block));
            }
        }
        backend.small_products(&mut products);
        let (Some(d_bias), Some(d_fuse)) = (d_bias, d_fuse) else { return };
        let products = room.iter_mut().zip(&self.linear).map(|(d_block, &(_, bias))| {
            let (bias, size) = (tensors.value(bias), (width, width, 1));
            SmallProduct { base: Base::Itself, ..SmallProduct::new(d_bias, bias, Transpose::Right, size, d_block) }
        });
        backend.small_products(&mut products.collect::<Vec<_>>());
        for (stage, d_block) in room.iter().enumerate() {
            backend.add_columns(d_block, self.linear.len() * width, self.block(stage), width, d_fuse);
        }
    }
}
