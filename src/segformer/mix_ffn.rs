//! Mix-FFN: LayerNorm, expansion, depth-wise convolution with GELU, contraction, residual.

use super::affine::Affine;
use super::model::{Pass, Scratch};
use super::norm::{Branch, Front, Joint, Norm, Normed, Takes};
use super::tensors::{Gradients, Id};
use crate::backend::{Backend, Dropout, FfnOutputs, FfnWeights, Grid, MixFfnExpansion, MixFfnParts, MixFfnWeights};

/// The layer.
pub struct MixFfn {
    /// LayerNorm before it.
    pub norm: Norm,
    /// Channels to hidden.
    pub expand: Affine,
    /// Depth-wise kernel `(9, hidden)`.
    pub mix_weight: Id,
    /// Depth-wise bias.
    pub mix_bias: Id,
    /// Hidden to channels.
    pub contract: Affine,
    /// Channels.
    pub channels: usize,
    /// Hidden channels.
    pub hidden: usize,
    /// Whether gradients must reach its input.
    pub input_gradient: bool,
    /// Whether anything in it is trained.
    pub trains: bool,
}

/// What the backward pass needs besides the layer's input.
pub struct FfnActs<B: Backend> {
    /// Output of the expansion.
    pub h: B::Act,
    /// Input of the contraction, if kept; else the backward pass makes it again.
    pub g: Option<B::Act>,
}

impl MixFfn {
    /// Whether the backend makes the forward pass in one operation, with the LayerNorms in front and behind.
    pub fn fuses<B: Backend>(&self, backend: &B) -> bool {
        self.is_plain() && backend.fuses_mix_ffn(self.channels, self.hidden)
    }

    /// Whether the contraction's input passes through memory, so that it can be kept for the contraction's gradient.
    pub fn keeps_input<B: Backend>(&self, backend: &B, grid: Grid) -> bool {
        !self.fuses(backend) && !backend.joins_mix_ffn_backward(grid, self.channels, self.hidden)
    }

    /// Whether the backend makes the way back in one operation, from the gradient of the stream.
    pub fn joins_backward<B: Backend>(&self, backend: &B, grid: Grid, gradients: &Gradients<B>) -> bool {
        let wanted = [Some(self.mix_weight), Some(self.mix_bias), self.expand.bias];
        let wanted = wanted.map(|id| id.is_some_and(|id| gradients.get(id).is_some()));
        let all_or_none = wanted.iter().all(|&sum| sum == wanted[0]);
        let joins = all_or_none && self.is_plain() && self.goes_below(gradients);
        joins && backend.joins_mix_ffn_backward(grid, self.channels, self.hidden)
    }

    /// Whether the gradient goes on to the LayerNorm.
    fn goes_below<B: Backend>(&self, gradients: &Gradients<B>) -> bool {
        self.input_gradient || gradients.get(self.norm.gamma).is_some()
    }

    /// Whether its products are all there is: no separate path beside one.
    fn is_plain(&self) -> bool {
        self.expand.side.is_none() && self.contract.side.is_none()
    }

    /// `y = x + drop·ffn(norm(x))`, and the LayerNorm behind; `normed` is that of x, and is made here if the layer
    /// [fuses](MixFfn::fuses).
    pub fn forward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        grid: Grid,
        drop: Option<Dropout>,
        normed: &mut Normed<B>,
        acts: &mut FfnActs<B>,
        joint: Joint<'_, B>,
        scratch: &mut Scratch<B>,
    ) {
        let rows = grid.rows();
        let Scratch { tokens: [t0, t1, ..], wide: [g, _], side, .. } = scratch;
        if self.fuses(pass.backend) {
            let value = |id| pass.tensors.value(id);
            let weights = FfnWeights {
                norm: (value(self.norm.gamma), value(self.norm.beta)),
                expand: self.expand.operands(pass),
                mix: (value(self.mix_weight), value(self.mix_bias)),
                contract: self.contract.operands(pass),
                next: (value(joint.norm.gamma), value(joint.norm.beta)),
                channels: self.channels,
                hidden: self.hidden,
            };
            let Normed { out, stats } = normed;
            let outputs = FfnOutputs {
                y: joint.y,
                next: (joint.out.unwrap_or(t0), joint.stats),
                stats,
                normed: out.as_mut().filter(|_| pass.keeps()),
                h: pass.keeps().then_some(&mut acts.h),
            };
            return pass.backend.mix_ffn(x, grid, &weights, drop, outputs);
        }
        let FfnActs { h, g: kept } = acts;
        self.expand.forward(pass, normed.out.as_ref().unwrap_or(t0), rows, h, side);
        let (w, b) = (pass.tensors.value(self.mix_weight), pass.tensors.value(self.mix_bias));
        let g = kept.as_mut().filter(|_| pass.keeps()).unwrap_or(g);
        pass.backend.depthwise_gelu(h, w, b, grid, self.hidden, g);
        self.contract.join_and_norm(pass, x, g, grid, drop, t1, joint, t0, side);
    }

    /// Turns `d`, the gradient of y, into the gradient of x, and sums the parameters' gradients. With `drop`, `tokens[0]` of
    /// `scratch` holds the branch's gradient, unless the way back is [joined](MixFfn::joins_backward); it is left holding that of
    /// `before`, which was added to make x, if that wants it. If that goes back through the LayerNorm itself, `tokens[5]` is left
    /// holding the gradient of norm(x), and `d` and the LayerNorm's gradients are as they were.
    pub fn backward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        grid: Grid,
        drop: Option<Dropout>,
        before: Branch<'_>,
        normed: &Normed<B>,
        acts: &FfnActs<B>,
        d: &mut B::Act,
        gradients: &mut Gradients<B>,
        scratch: &mut Scratch<B>,
    ) {
        if !self.input_gradient && !self.trains {
            return;
        }
        let backend = pass.backend;
        let rows = grid.rows();
        let Scratch { tokens: [t0, _, t2, _, _, dn], wide: [du, other], side, stats, .. } = scratch;

        let contract_trains = self.contract.trains(gradients);
        let expand_trains = self.expand.trains(gradients);
        let below = self.goes_below(gradients);

        let (w, b) = (pass.tensors.value(self.mix_weight), pass.tensors.value(self.mix_bias));
        let joint = self.joins_backward(backend, grid, gradients);
        let dh = other;
        // Whether the joint operation sums the gradient of the expansion's weights.
        let summed = joint && backend.sums_mix_ffn_expansion(self.channels);
        if joint {
            let weights = MixFfnWeights {
                expand: pass.tensors.product(self.expand.weight),
                mix: w,
                mix_bias: b,
                contract: pass.tensors.product(self.contract.weight),
            };
            let mut each = gradients.each();
            let shift = self.expand.bias.and_then(|id| each.take(id));
            let sums = match (each.take(self.mix_weight), each.take(self.mix_bias), shift) {
                (Some(dw), Some(db), Some(shift)) => Some([dw, db, shift]),
                _ => None,
            };
            let expand = match each.take(self.expand.weight) {
                Some(dw) if summed => {
                    let normed = self.norm.output(pass, x, rows, normed, t2, stats);
                    Some(MixFfnExpansion::Summed { normed, dw })
                }
                Some(_) => Some(MixFfnExpansion::Product(&mut *dh)),
                None => None,
            };
            let parts = MixFfnParts { sums, contract: each.take(self.contract.weight), expand };
            backend.mix_ffn_backward(d, drop, &acts.h, weights, grid, self.channels, self.hidden, dn, parts);
        } else {
            let branch = if drop.is_some() { &*t0 } else { &*d };
            // Back through the contraction and the convolution; unless it was kept, the contraction's input is made again on the
            // way, where dh will be.
            self.contract.backward_input(pass, branch, rows, du, false, side);
            let (g, db) = (contract_trains && acts.g.is_none(), gradients.get_mut(self.mix_bias));
            backend.depthwise_gelu_backward(&acts.h, w, b, grid, self.hidden, du, g.then_some(&mut *dh), db);
            if contract_trains {
                let g = acts.g.as_ref().unwrap_or(dh);
                self.contract.backward_weights(pass, g, branch, rows, gradients, side);
            }
            let wanted = (below || expand_trains).then_some(&mut *dh);
            let mut each = gradients.each();
            let (dw, shift) = (each.take(self.mix_weight), self.expand.bias.and_then(|id| each.take(id)));
            backend.depthwise_backward(du, &acts.h, w, grid, self.hidden, wanted, dw, shift);
        }

        // The expansion and the LayerNorm.
        if expand_trains && !summed {
            let normed = self.norm.output(pass, x, rows, normed, t0, stats);
            self.expand.backward_weights(pass, normed, dh, rows, gradients, side);
        }
        if below {
            if !joint {
                self.expand.backward_input(pass, dh, rows, dn, false, side);
            }
            if before.takes != Takes::Normed {
                let dx = self.input_gradient.then_some((d, true));
                self.norm.backward(pass, dn, x, &normed.stats, rows, gradients, dx, Front::branch(before, grid, t0));
            }
        }
    }
}
