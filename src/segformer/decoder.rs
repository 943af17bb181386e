//! The MLP decoder, folded: per-stage linear, upsampling and the 1x1 fuse are all linear, and bilinear weights sum to one,
//! so stage i contributes `upsample(M_i·x_i)` with `M_i = F_i·L_i`, and the biases join into `c = Σ F_i·l_i`.
//! F_i is the fuse's block of columns for stage i; the reference concatenates the last stage first.

use super::affine::Affine;
use super::encoder::StageActs;
use super::model::{Pass, Scratch, Worker};
use super::norm::Norm;
use super::tensors::{Gradients, Id};
use crate::backend::{Backend, BatchNormView, Classifier, Dropout, Grid, Sample, Transpose};
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
    /// Before BatchNorm, `(rows, width)`.
    pub z: B::Act,
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
    /// Zeroed storage for logits on `grid`.
    pub fn acts<B: Backend>(&self, backend: &B, grid: Grid) -> DecoderActs<B> {
        let rows = grid.rows();
        DecoderActs {
            z: backend.act(rows * self.width),
            logits: backend.act(rows * self.labels),
            dlogits: backend.act(rows * self.labels),
            moments: backend.full(2 * self.width),
            sums: backend.full(2 * self.width),
        }
    }

    /// Columns of F that belong to `stage`.
    fn block(&self, stage: usize) -> usize {
        (self.linear.len() - 1 - stage) * self.width
    }

    /// Dropout before the classifier.
    fn drop<B: Backend>(&self, pass: &Pass<'_, B>, grid: Grid) -> Option<Dropout> {
        pass.dropout(Purpose::HeadDropout, 0, self.dropout, grid.area() * self.width)
    }

    /// Stage outputs to z; with `measures`, its moments too.
    pub fn forward_linear<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        stages: &[StageActs<B>],
        acts: &mut DecoderActs<B>,
        measures: bool,
        scratch: &mut Scratch<B>,
    ) {
        let to = stages[0].grid;
        let Scratch { wide: [first, second], tokens, side, .. } = scratch;
        self.folded[0].forward(pass, &stages[0].out, to.rows(), &mut acts.z, side);
        let rooms = [first, second].into_iter().chain(tokens);
        let mut parts: Vec<(&B::Act, Grid)> = Vec::with_capacity(stages.len());
        for ((folded, stage), room) in self.folded.iter().zip(stages).skip(1).zip(rooms) {
            folded.forward(pass, &stage.out, stage.grid.rows(), room, side);
            parts.push((room, stage.grid));
        }
        let moments = measures.then_some(&mut acts.moments);
        pass.backend.join_stages(&parts, to, self.width, &mut acts.z, moments);
    }

    /// Numbers that [`Decoder::forward_linear`] needs in each of `Scratch::tokens`.
    pub fn token_room(&self, grids: &[Grid]) -> usize {
        grids.iter().skip(3).map(|grid| grid.rows() * self.width).max().unwrap_or(0)
    }

    fn classifier<'a, B: Backend>(&self, pass: &Pass<'a, B>) -> Classifier<'a, B> {
        let Some(bias) = self.classifier.bias else { unreachable!("the classifier has a bias") };
        Classifier {
            weight: pass.tensors.product(self.classifier.weight),
            bias: pass.tensors.value(bias),
            labels: self.labels,
        }
    }

    /// z to logits, with the statistics of the batch or the running ones.
    pub fn forward_head<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        stats: &B::Full,
        grid: Grid,
        acts: &mut DecoderActs<B>,
        scratch: &mut Scratch<B>,
    ) {
        let (norm, drop, rows) = (self.view(pass, stats), self.drop(pass, grid), grid.rows());
        let (classifier, room) = (self.classifier(pass), &mut scratch.wide[0]);
        pass.backend.classify(&acts.z, norm, drop, rows, self.width, classifier, room, &mut acts.logits);
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
        let DecoderActs { logits, dlogits, sums, .. } = acts;
        backend.cross_entropy(logits, grid, self.labels, samples, size, scale, loss, Some(dlogits));
        if let Some(db) = self.classifier.bias.and_then(|id| gradients.get_mut(id)) {
            backend.linear_backward_bias(dlogits, rows, self.labels, db);
        }
        let (norm, drop, classifier) = (self.view(pass, stats), self.drop(pass, grid), self.classifier(pass));
        let (room, dw) = (&mut scratch.wide[0], gradients.get_mut(self.classifier.weight));
        backend.classify_backward(&acts.z, norm, drop, rows, self.width, classifier, dlogits, room, dw, sums);
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
        let rows = grid.rows();
        let Worker { scratch, out_gradients, .. } = worker;
        let Scratch { wide: [dz, own], side, .. } = scratch;
        let (norm, drop, classifier) = (self.view(pass, stats), self.drop(pass, grid), self.classifier(pass));
        let DecoderActs { z, dlogits, sums, .. } = acts;
        let total = (total, batch_rows);
        backend.classify_backward_input(z, norm, drop, rows, self.width, classifier, dlogits, total, sums, dz);
        for (i, (folded, stage)) in self.folded.iter().zip(stages).enumerate() {
            let trains = folded.trains(gradients);
            if !trains && !self.reached[i] {
                continue;
            }
            let stage_rows = stage.grid.rows();
            let dy = if stage.grid == grid {
                &*dz
            } else {
                backend.upsample_backward(dz, stage.grid, grid, self.width, own);
                &*own
            };
            if trains {
                folded.backward_params(pass, &stage.out, dy, stage_rows, gradients, side);
            }
            if self.reached[i] {
                folded.backward_input(pass, dy, stage_rows, &mut out_gradients[i], false, side);
            }
        }
    }

    fn view<'a, B: Backend>(&self, pass: &Pass<'a, B>, stats: &'a B::Full) -> BatchNormView<'a, B::Full> {
        BatchNormView { stats, gamma: pass.tensors.value(self.norm.gamma), beta: pass.tensors.value(self.norm.beta) }
    }

    /// Columns of the fuse for `stage` to `to` `(width, width)`.
    pub fn fuse_block<B: Backend>(&self, backend: &B, fuse: &B::Full, stage: usize, to: &mut B::Full) {
        backend.columns(fuse, self.linear.len() * self.width, self.block(stage), self.width, to);
    }

    /// `M_i = F_i·L_i`, L_i with its adapter merged; `block` holds F_i.
    pub fn fold_weight<B: Backend>(
        &self,
        backend: &B,
        stage: usize,
        block: &B::Full,
        linear: &B::Full,
        folded: &mut B::Full,
    ) {
        let size = (self.width, self.folded[stage].inputs, self.width);
        backend.matrix_product(block, linear, Transpose::None, size, 1.0, folded, false);
    }

    /// `c = Σ F_i·l_i`, stage by stage from 0 on.
    pub fn fold_bias<B: Backend>(
        &self,
        backend: &B,
        stage: usize,
        block: &B::Full,
        bias: &B::Full,
        folded: &mut B::Full,
    ) {
        let size = (self.width, 1, self.width);
        backend.matrix_product(block, bias, Transpose::None, size, 1.0, folded, stage > 0);
    }

    /// The stage whose linear module has the weight `id`.
    pub fn stage_of(&self, id: Id) -> Option<usize> {
        self.linear.iter().position(|(weight, _)| *weight == id)
    }

    /// Splits the gradients of M_i and c into those of F, L_i and l_i. `block` holds F_i, `linear` L_i with its adapter
    /// merged, `room` is `(width, width)`.
    pub fn unfold<B: Backend>(
        &self,
        backend: &B,
        stage: usize,
        (block, linear, bias): (&B::Full, &B::Full, &B::Full),
        room: &mut B::Full,
        gradients: &mut Gradients<B>,
    ) {
        let (width, inputs) = (self.width, self.folded[stage].inputs);
        let (weight_id, bias_id) = self.linear[stage];
        if let Some((d_folded, dl)) = gradients.pair_mut(self.folded[stage].weight, weight_id) {
            let size = (width, inputs, width);
            backend.matrix_product(block, d_folded, Transpose::Left, size, 1.0, dl, false);
        }
        if let Some((d_bias, dl)) = gradients.pair_mut(self.folded_bias, bias_id) {
            backend.matrix_product(block, d_bias, Transpose::Left, (width, 1, width), 1.0, dl, false);
        }
        if let Some((d_folded, df)) = gradients.pair_mut(self.folded[stage].weight, self.fuse) {
            let size = (width, width, inputs);
            backend.matrix_product(d_folded, linear, Transpose::Right, size, 1.0, room, false);
            backend.add_columns(room, self.linear.len() * width, self.block(stage), width, df);
        }
        if let Some((d_bias, df)) = gradients.pair_mut(self.folded_bias, self.fuse) {
            backend.matrix_product(d_bias, bias, Transpose::Right, (width, width, 1), 1.0, room, false);
            backend.add_columns(room, self.linear.len() * width, self.block(stage), width, df);
        }
    }
}
