//! A LayerNorm (or the affine part of the BatchNorm) in the model.

use super::affine::Affine;
use super::model::Pass;
use super::tensors::{Gradients, Id};
use crate::backend::{Backend, Dropout, Grid, InFront};

/// The product in front of a LayerNorm, which the gradient goes on to.
pub struct Front<'a, B: Backend> {
    /// Stochastic depth of the product; receives its gradient.
    scaled: Option<(Dropout, Grid, &'a mut B::Act)>,
    /// Whose gradient is summed, if wanted.
    bias: Option<Id>,
}

impl<'a, B: Backend> Front<'a, B> {
    /// Something other than a product.
    pub fn none() -> Self {
        Self { scaled: None, bias: None }
    }

    /// A product that is the LayerNorm's input.
    pub fn product(affine: &Affine) -> Self {
        Self { scaled: None, bias: affine.bias }
    }

    /// A product that was added to the residual stream. `room` receives its gradient where there is stochastic depth: else
    /// that is the stream's.
    pub fn branch((affine, drop): Branch<'_>, grid: Grid, room: &'a mut B::Act) -> Self {
        Self { scaled: drop.map(|drop| (drop, grid, room)), bias: affine.bias }
    }
}

/// The product at the end of a branch, and its stochastic depth.
pub type Branch<'a> = (&'a Affine, Option<Dropout>);

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

    /// Sums the gradients of scale and shift, if wanted; writes (or with `add` adds) the gradient towards x, if asked, and what
    /// `front` wants of it.
    pub fn backward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        dy: &B::Act,
        x: &B::Act,
        stats: &B::Full,
        rows: usize,
        gradients: &mut Gradients<B>,
        dx: Option<(&mut B::Act, bool)>,
        front: Front<'_, B>,
    ) {
        let (backend, gamma, channels) = (pass.backend, pass.tensors.value(self.gamma), self.channels);
        let mut each = gradients.each();
        let parameters = each.take(self.gamma).zip(each.take(self.beta));
        match (parameters, dx) {
            (parameters, Some(dx)) => {
                let front = InFront { scaled: front.scaled, bias: front.bias.and_then(|id| each.take(id)) };
                backend.layer_norm_backward_all(dy, x, stats, gamma, rows, channels, dx, parameters, front);
            }
            (Some((dgamma, dbeta)), None) => {
                backend.layer_norm_backward_params(dy, x, stats, rows, channels, dgamma, dbeta);
            }
            (None, None) => {}
        }
    }
}
