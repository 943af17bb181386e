//! A LayerNorm (or the affine part of the BatchNorm) in the model.

use super::model::Pass;
use super::tensors::{Gradients, Id};
use crate::backend::Backend;

/// Scale and shift over `channels`.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Scale.
    pub gamma: Id,
    /// Shift.
    pub beta: Id,
    /// Channels.
    pub channels: usize,
}

impl Norm {
    /// `y = norm(x)` over `rows` rows; `stats` receives (mean, 1/std) per row.
    pub fn forward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        rows: usize,
        y: &mut B::Act,
        stats: &mut B::Full,
    ) {
        let (gamma, beta) = (pass.tensors.value(self.gamma), pass.tensors.value(self.beta));
        pass.backend.layer_norm(x, gamma, beta, rows, self.channels, y, stats);
    }

    /// Sums the gradients of scale and shift, if wanted; writes (or with `add` adds) the gradient towards x, if asked.
    pub fn backward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        dy: &B::Act,
        x: &B::Act,
        stats: &B::Full,
        rows: usize,
        gradients: &mut Gradients<B>,
        dx: Option<(&mut B::Act, bool)>,
    ) {
        let (backend, gamma, channels) = (pass.backend, pass.tensors.value(self.gamma), self.channels);
        match (gradients.pair_mut(self.gamma, self.beta), dx) {
            (Some(parameters), Some(dx)) => {
                backend.layer_norm_backward_both(dy, x, stats, gamma, rows, channels, dx, parameters);
            }
            (Some((dgamma, dbeta)), None) => {
                backend.layer_norm_backward_params(dy, x, stats, rows, channels, dgamma, dbeta);
            }
            (None, Some((dx, add))) => {
                backend.layer_norm_backward(dy, x, stats, gamma, rows, channels, dx, add);
            }
            (None, None) => {}
        }
    }
}
