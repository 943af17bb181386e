//! A LayerNorm (or the affine part of the BatchNorm) in the model.

use super::affine::Affine;
use super::model::{Pass, SideScratch};
use super::tensors::{EachGradient, Gradients, Id};
use crate::backend::{Backend, ConvolutionNorm, Dropout, Grid, InFront, NextNorm, Window};

/// What a LayerNorm made.
pub struct Normed<B: Backend> {
    /// Output, if kept; else it goes to scratch memory.
    pub out: Option<B::Act>,
    /// (mean, 1/std) per row.
    pub stats: B::Full,
}

impl<B: Backend> Normed<B> {
    /// Where the stream begins or a branch joins it, which goes to `y`, in front of `norm`.
    pub fn joint<'a>(&'a mut self, y: &'a mut B::Act, norm: &'a Norm) -> Joint<'a, B> {
        Joint { y, norm, out: self.out.as_mut(), stats: &mut self.stats }
    }
}

/// Where the residual stream begins or a branch joins it, and what the LayerNorm behind makes of it.
pub struct Joint<'a, B: Backend> {
    /// Receives the stream.
    pub y: &'a mut B::Act,
    /// The LayerNorm.
    pub norm: &'a Norm,
    /// Its output, if kept.
    pub out: Option<&'a mut B::Act>,
    /// Its (mean, 1/std) per row.
    pub stats: &'a mut B::Full,
}

impl<'a, B: Backend> Joint<'a, B> {
    /// Where the stream goes, and the LayerNorm as operations take it; its output goes to `room` unless it is kept.
    pub fn parts(self, pass: &Pass<'a, B>, room: &'a mut B::Act) -> (&'a mut B::Act, NextNorm<'a, B>) {
        let norm = (pass.tensors.value(self.norm.gamma), pass.tensors.value(self.norm.beta));
        (self.y, NextNorm { norm, out: self.out.unwrap_or(room), stats: self.stats })
    }
}

/// The product in front of a LayerNorm, which the gradient goes on to.
pub struct Front<'a, B: Backend> {
    /// Stochastic depth of the product; receives its gradient, if wanted.
    scaled: Option<(Dropout, Grid, Option<&'a mut B::Act>)>,
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

    /// A product that was added to the residual stream. `room` receives its gradient where there is stochastic depth, unless
    /// its way back takes the stream's: else that is the stream's.
    pub fn branch(Branch { product, drop, takes }: Branch<'_>, grid: Grid, room: &'a mut B::Act) -> Self {
        let room = (takes == Takes::Product).then_some(room);
        Self { scaled: drop.map(|drop| (drop, grid, room)), bias: product.bias }
    }

    /// What an operation hands on to it.
    pub fn wanted(self, gradients: &mut EachGradient<'a, B>) -> InFront<'a, B> {
        InFront { scaled: self.scaled, bias: self.bias.and_then(|id| gradients.take(id)) }
    }
}

/// The end of a branch that is added to the residual stream.
pub struct Branch<'a> {
    /// Its last product.
    pub product: &'a Affine,
    /// Its stochastic depth.
    pub drop: Option<Dropout>,
    /// What its way back takes.
    pub takes: Takes,
}

/// What the way back through a branch begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// The gradient of its last product.
    Product,
    /// The gradient of the stream that it joins; it applies the stochastic depth itself.
    Stream,
    /// The gradient of what the LayerNorm behind made of that stream; it goes back through that itself.
    Normed,
}

/// The LayerNorm behind a branch, for a way back that [takes in](Takes::Normed) that through the LayerNorm.
pub struct Behind<'a, B: Backend> {
    /// The LayerNorm.
    pub norm: &'a Norm,
    /// Its input, the stream.
    pub x: &'a B::Act,
    /// Its (mean, 1/std) per row.
    pub stats: &'a B::Full,
}

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
    /// `y = norm(raw)`, where raw is `convolution` of `tokens` on their grid, and the LayerNorm behind y. What is kept for the pass
    /// back: patches, where there is room for them, and, if one comes, raw and its (mean, 1/std) per row. `room` is for patches.
    pub fn convolve<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        convolution: &Affine,
        (tokens, grid): (&B::Act, Grid),
        window: Window,
        (patches, raw, stats, goes_back): (Option<&mut B::Act>, &mut B::Act, &mut B::Full, bool),
        y: &mut B::Act,
        next: Option<NextNorm<'_, B>>,
        room: &mut B::Act,
        side: &mut SideScratch<B>,
    ) {
        let (backend, rows) = (pass.backend, grid.through(window).rows());
        let (inputs, outputs) = (convolution.channels(window), convolution.outputs);
        if convolution.side.is_some() || !backend.fuses_convolution(grid, window, inputs, outputs) {
            let patches = patches.unwrap_or(room);
            backend.patches(tokens, grid, inputs, window, patches);
            convolution.forward(pass, patches, rows, raw, side);
            self.forward(pass, raw, rows, y, stats);
            return backend.next_norm(y, rows, outputs, next);
        }
        if let Some(patches) = patches.filter(|_| pass.keeps()) {
            backend.patches(tokens, grid, inputs, window, patches);
        }
        let (weight, bias) = convolution.operands(pass);
        let norm = (pass.tensors.value(self.gamma), pass.tensors.value(self.beta));
        let convolution = ConvolutionNorm { window, weight, bias, norm, inputs, outputs };
        let kept = (pass.keeps() && goes_back).then_some((raw, stats));
        backend.convolution_norm(tokens, grid, &convolution, y, kept, next);
    }

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

    /// norm(x) as the forward pass kept it, or made again, in `room`.
    pub fn output<'a, B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        rows: usize,
        kept: &'a Normed<B>,
        room: &'a mut B::Act,
        stats: &mut B::Full,
    ) -> &'a B::Act {
        match &kept.out {
            Some(out) => out,
            None => {
                self.forward(pass, x, rows, room, stats);
                room
            }
        }
    }

    /// The gradients of scale and shift, if wanted.
    pub fn parameters<'a, B: Backend>(
        &self,
        gradients: &mut EachGradient<'a, B>,
    ) -> Option<(&'a mut B::Full, &'a mut B::Full)> {
        gradients.take(self.gamma).zip(gradients.take(self.beta))
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
        match (self.parameters(&mut each), dx) {
            (parameters, Some(dx)) => {
                let front = front.wanted(&mut each);
                backend.layer_norm_backward_all(dy, x, stats, gamma, rows, channels, dx, parameters, front);
            }
            (Some((dgamma, dbeta)), None) => {
                backend.layer_norm_backward_params(dy, x, stats, rows, channels, dgamma, dbeta);
            }
            (None, None) => {}
        }
    }
}
