//! Overlap patch embedding: a strided convolution, then LayerNorm.

use super::affine::Affine;
use super::model::{Pass, Scratch};
use super::norm::{Front, Norm};
use super::tensors::Gradients;
use crate::backend::{Backend, Grid, Sample, Window};

/// The layer.
pub struct PatchEmbed {
    /// The convolution as a product over gathered patches.
    pub projection: Affine,
    /// The LayerNorm behind it.
    pub norm: Norm,
    /// Geometry of the convolution.
    pub window: Window,
    /// Channels it reads.
    pub channels_in: usize,
    /// Whether they are those of pixels.
    pub reads_pixels: bool,
    /// Whether gradients must reach its input.
    pub input_gradient: bool,
    /// Whether anything in it is trained.
    pub trains: bool,
}

/// What the layer reads.
pub enum EmbedInput<'a, 's, B: Backend> {
    /// Pictures.
    Pixels(&'a [Sample<'s>]),
    /// The previous stage's tokens.
    Tokens(&'a B::Act),
}

/// What the backward pass needs.
pub struct EmbedActs<B: Backend> {
    /// Before the LayerNorm, `(rows, channels)`.
    pub raw: B::Act,
    /// (mean, 1/std) per row.
    pub stats: B::Full,
    /// Gathered patches, if kept.
    pub patches: Option<B::Act>,
}

impl PatchEmbed {
    fn gather<B: Backend>(&self, pass: &Pass<'_, B>, input: &EmbedInput<'_, '_, B>, from: Grid, patches: &mut B::Act) {
        match input {
            EmbedInput::Pixels(samples) => pass.backend.pixel_patches(samples, from.height, self.window, patches),
            EmbedInput::Tokens(x) => pass.backend.patches(x, from, self.channels_in, self.window, patches),
        }
    }

    /// Whether the layer reads pixels, and without gathering patches.
    pub fn is_direct<B: Backend>(&self, backend: &B) -> bool {
        let plain = self.projection.side.is_none() && self.reads_pixels;
        plain && backend.embeds_pixels(self.window, self.projection.outputs)
    }

    /// Whether the gradient of tokens, of a grid, is made without that of patches.
    fn goes_back_direct<B: Backend>(&self, backend: &B, from: Grid) -> bool {
        self.projection.side.is_none()
            && backend.fuses_convolution_backward(from, self.window, self.channels_in, self.projection.outputs)
    }

    /// Whether the weights' gradient is summed without gathering patches of tokens.
    pub fn sums_direct<B: Backend>(&self, backend: &B, from: Grid) -> bool {
        self.projection.side.is_none()
            && backend.sums_convolution_weight(from, self.window, self.channels_in, self.projection.outputs)
    }

    fn direct<'a, 's, B: Backend>(&self, backend: &B, input: &EmbedInput<'a, 's, B>) -> Option<&'a [Sample<'s>]> {
        match input {
            EmbedInput::Pixels(samples) if self.is_direct(backend) => Some(samples),
            _ => None,
        }
    }

    /// Tokens `(from.through(window), channels)` to `y`.
    pub fn forward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        input: &EmbedInput<'_, '_, B>,
        from: Grid,
        acts: &mut EmbedActs<B>,
        y: &mut B::Act,
        scratch: &mut Scratch<B>,
    ) {
        if let Some(samples) = self.direct(pass.backend, input) {
            let Affine { weight, bias, outputs, .. } = self.projection;
            let convolution = (pass.tensors.product(weight), bias.map(|id| pass.tensors.product(id)));
            let norm = (pass.tensors.value(self.norm.gamma), pass.tensors.value(self.norm.beta));
            let kept = (pass.keeps() && self.trains).then_some((&mut acts.raw, &mut acts.stats));
            return pass.backend.embed_pixels(samples, from.height, self.window, convolution, norm, outputs, y, kept);
        }
        let EmbedActs { raw, stats, patches } = acts;
        let Scratch { wide: [room, _], side, .. } = scratch;
        match input {
            EmbedInput::Tokens(x) => {
                let kept = (patches.as_mut(), raw, stats, self.trains || self.input_gradient);
                self.norm.convolve(pass, &self.projection, (x, from), self.window, kept, y, room, side);
            }
            EmbedInput::Pixels(_) => {
                let (patches, rows) = (patches.as_mut().unwrap_or(room), from.through(self.window).rows());
                self.gather(pass, input, from, patches);
                self.projection.forward(pass, patches, rows, raw, side);
                self.norm.forward(pass, raw, rows, y, stats);
            }
        }
    }

    /// From the gradient `d` of the layer's output to its parameters' and, added, its input's.
    pub fn backward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        input: &EmbedInput<'_, '_, B>,
        from: Grid,
        acts: &EmbedActs<B>,
        d: &B::Act,
        gradients: &mut Gradients<B>,
        dx: Option<&mut B::Act>,
        scratch: &mut Scratch<B>,
    ) {
        let rows = from.through(self.window).rows();
        let (inputs, outputs) = (self.channels_in, self.projection.outputs);
        let trains = self.projection.trains(gradients);
        let inner = (trains || dx.is_some()).then_some((&mut scratch.tokens[0], false));
        let front = Front::product(&self.projection);
        self.norm.backward(pass, d, &acts.raw, &acts.stats, rows, gradients, inner, front);
        if let (true, Some(samples)) = (trains, self.direct(pass.backend, input)) {
            if let Some(dw) = gradients.get_mut(self.projection.weight) {
                let (draw, outputs) = (&scratch.tokens[0], self.projection.outputs);
                pass.backend.embed_pixels_backward(samples, from.height, self.window, draw, outputs, dw);
            }
        } else if let (true, EmbedInput::Tokens(x)) = (trains && self.sums_direct(pass.backend, from), input) {
            if let Some(dw) = gradients.get_mut(self.projection.weight) {
                let draw = &scratch.tokens[0];
                pass.backend.convolution_backward_weight(x, draw, from, self.window, inputs, outputs, dw);
            }
        } else if trains {
            let Scratch { tokens: [draw, ..], wide: [room, _], side, .. } = &mut *scratch;
            let patches = match &acts.patches {
                Some(patches) => patches,
                None => {
                    self.gather(pass, input, from, room);
                    &*room
                }
            };
            self.projection.backward_weights(pass, patches, draw, rows, gradients, side);
        }
        if let Some(dx) = dx {
            let (draw, patches) = (&scratch.tokens[0], &mut scratch.wide[0]);
            if self.goes_back_direct(pass.backend, from) {
                let weight = pass.tensors.product(self.projection.weight);
                pass.backend.convolution_backward_input(draw, weight, from, self.window, inputs, outputs, dx);
            } else {
                self.projection.backward_input(pass, draw, rows, patches, false, &mut scratch.side);
                pass.backend.patches_backward(patches, from, inputs, self.window, dx, true);
            }
        }
    }
}
