//! Overlap patch embedding: a strided convolution, then LayerNorm.

use super::affine::Affine;
use super::model::{Pass, Scratch};
use super::norm::{Front, Joint, Norm};
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
    /// Whether it reads pixels.
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
    /// Whether the layer reads pixels, and without gathering patches.
    pub fn is_direct<B: Backend>(&self, backend: &B) -> bool {
        let plain = self.projection.side.is_none() && self.reads_pixels;
        plain && backend.embeds_pixels(self.window, self.projection.outputs)
    }

    /// Tokens `(from.through(window), channels)`, with which the stream of `joint` begins, and the LayerNorm behind.
    pub fn forward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        input: &EmbedInput<'_, '_, B>,
        from: Grid,
        acts: &mut EmbedActs<B>,
        joint: Joint<'_, B>,
        scratch: &mut Scratch<B>,
    ) {
        let EmbedActs { raw, stats, patches } = acts;
        let Scratch { tokens: [t0, ..], wide: [room, _], side, .. } = scratch;
        let (y, next) = joint.parts(pass, t0);
        let next = Some(next);
        match input {
            EmbedInput::Tokens(x) => {
                let kept = (patches.as_mut(), raw, stats, self.trains || self.input_gradient);
                self.norm.convolve(pass, &self.projection, (x, from), self.window, kept, y, next, room, side);
            }
            EmbedInput::Pixels(samples) if self.is_direct(pass.backend) => {
                let (convolution, outputs) = (self.projection.operands(pass), self.projection.outputs);
                let norm = (pass.tensors.value(self.norm.gamma), pass.tensors.value(self.norm.beta));
                let kept = (pass.keeps() && self.trains).then_some((raw, stats));
                pass.backend.embed_pixels(samples, from.height, self.window, convolution, norm, outputs, y, kept, next);
            }
            EmbedInput::Pixels(samples) => {
                let (patches, rows) = (patches.as_mut().unwrap_or(room), from.through(self.window).rows());
                pass.backend.pixel_patches(samples, from.height, self.window, patches);
                self.projection.forward(pass, patches, rows, raw, side);
                self.norm.forward(pass, raw, rows, y, stats);
                pass.backend.next_norm(y, rows, self.norm.channels, next);
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
        let trains = self.projection.trains(gradients);
        let inner = (trains || dx.is_some()).then_some((&mut scratch.tokens[0], false));
        let front = Front::product(&self.projection);
        self.norm.backward(pass, d, &acts.raw, &acts.stats, rows, gradients, inner, front);
        let Scratch { tokens: [draw, ..], wide: [room, _], side, .. } = &mut *scratch;
        match input {
            _ if !trains => {}
            EmbedInput::Tokens(x) => {
                let (tokens, kept) = ((*x, from), acts.patches.as_ref());
                self.projection.backward_convolution(pass, tokens, self.window, kept, draw, gradients, room, side);
            }
            EmbedInput::Pixels(samples) if self.is_direct(pass.backend) => {
                if let Some(dw) = gradients.get_mut(self.projection.weight) {
                    let outputs = self.projection.outputs;
                    pass.backend.embed_pixels_backward(samples, from.height, self.window, draw, outputs, dw);
                }
            }
            EmbedInput::Pixels(samples) => {
                let patches = match &acts.patches {
                    Some(patches) => patches,
                    None => {
                        pass.backend.pixel_patches(samples, from.height, self.window, room);
                        &*room
                    }
                };
                self.projection.backward_weights(pass, patches, draw, rows, gradients, side);
            }
        }
        if let Some(dx) = dx {
            self.projection.backward_tokens(pass, draw, (dx, from), self.window, room, side);
        }
    }
}
