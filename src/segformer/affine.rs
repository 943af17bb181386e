//! A product with weight, bias and, where LoRA has dropout, the adapter's separate path.

use super::model::{Pass, SideScratch};
use super::norm::Joint;
use super::plan::product;
use super::tensors::{Gradients, Id};
use crate::backend::{Backend, Dropout, Grid, Product, Window};
use crate::random::Purpose;

/// `y = x·Wᵀ + b`. Without dropout an adapter is merged into W; with it, it runs beside as a [`SidePath`].
#[derive(Clone, Debug)]
pub struct Affine {
    /// W `(outputs, inputs)`.
    pub weight: Id,
    /// b `(outputs)`.
    pub bias: Option<Id>,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of y.
    pub outputs: usize,
    /// The adapter's separate path.
    pub side: Option<SidePath>,
}

/// `y += dropout(x)·Aᵀ·(scale·B)ᵀ`
#[derive(Clone, Debug)]
pub struct SidePath {
    /// A `(rank, inputs)`.
    pub a: Id,
    /// scale·B `(outputs, rank)`.
    pub b: Id,
    /// Rank.
    pub rank: usize,
    /// Dropout rate.
    pub rate: f32,
    /// Number of the adapter, which selects its random numbers.
    pub site: u32,
}

impl SidePath {
    /// The dropout at the adapter's input of `per_image` numbers; none outside training.
    fn dropout<B: Backend>(&self, pass: &Pass<'_, B>, per_image: usize) -> Option<Dropout> {
        pass.dropout(Purpose::LoraDropout, self.site, self.rate, per_image)
    }

    fn down(&self, rows: usize, inputs: usize) -> Product {
        Product { rows, inputs, outputs: self.rank }
    }

    fn up(&self, rows: usize, outputs: usize) -> Product {
        Product { rows, inputs: self.rank, outputs }
    }
}

impl Affine {
    /// Weight and bias as products read them.
    pub fn operands<'a, B: Backend>(&self, pass: &Pass<'a, B>) -> (&'a B::Act, Option<&'a B::Act>) {
        (pass.tensors.product(self.weight), self.bias.map(|id| pass.tensors.product(id)))
    }

    /// `y = x·Wᵀ + b`, with the separate path added.
    pub fn forward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        rows: usize,
        y: &mut B::Act,
        scratch: &mut SideScratch<B>,
    ) {
        let (backend, tensors) = (pass.backend, pass.tensors);
        let (w, bias) = self.operands(pass);
        backend.linear(x, w, bias, product(self, rows), y, false);
        if let Some(side) = &self.side {
            self.low(side, pass, x, rows, scratch);
            backend.linear(&scratch.low, tensors.product(side.b), None, side.up(rows, self.outputs), y, true);
        }
    }

    /// The end of a branch of the residual stream x: `y = x + drop·(input·Wᵀ + b)`. `room` is `(grid, outputs)`.
    pub fn join<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        input: &B::Act,
        grid: Grid,
        drop: Option<Dropout>,
        room: &mut B::Act,
        y: &mut B::Act,
        scratch: &mut SideScratch<B>,
    ) {
        let rows = grid.rows();
        if drop.is_none() && self.side.is_none() {
            let (w, bias) = self.operands(pass);
            pass.backend.linear_residual(x, input, w, bias, product(self, rows), room, y);
        } else {
            self.forward(pass, input, rows, room, scratch);
            pass.backend.residual(x, room, drop, grid, self.outputs, y);
        }
    }

    /// [`Affine::join`], and the LayerNorm behind; its output goes to `normed` unless it is kept.
    pub fn join_and_norm<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        input: &B::Act,
        grid: Grid,
        drop: Option<Dropout>,
        room: &mut B::Act,
        Joint { y, norm, out, stats }: Joint<'_, B>,
        normed: &mut B::Act,
        scratch: &mut SideScratch<B>,
    ) {
        let (rows, normed) = (grid.rows(), out.unwrap_or(normed));
        if drop.is_none() && self.side.is_none() {
            self.join(pass, x, input, grid, drop, room, y, scratch);
            norm.forward(pass, y, rows, normed, stats);
        } else {
            self.forward(pass, input, rows, room, scratch);
            let parameters = (pass.tensors.value(norm.gamma), pass.tensors.value(norm.beta));
            pass.backend.residual_norm(x, room, drop, grid, self.outputs, parameters, y, normed, stats);
        }
    }

    /// Writes (or with `add` adds) the gradient towards x.
    pub fn backward_input<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        dy: &B::Act,
        rows: usize,
        dx: &mut B::Act,
        add: bool,
        scratch: &mut SideScratch<B>,
    ) {
        let (backend, tensors) = (pass.backend, pass.tensors);
        backend.linear_backward_input(dy, tensors.product(self.weight), product(self, rows), dx, add);
        if let Some(side) = &self.side {
            let (up, down) = (side.up(rows, self.outputs), side.down(rows, self.inputs));
            backend.linear_backward_input(dy, tensors.product(side.b), up, &mut scratch.low_gradient, false);
            let a = tensors.product(side.a);
            match side.dropout(pass, rows / pass.images * self.inputs) {
                None => backend.linear_backward_input(&scratch.low_gradient, a, down, dx, true),
                Some(drop) => {
                    let SideScratch { input, dropped, low_gradient, .. } = scratch;
                    backend.linear_backward_input(low_gradient, a, down, input, false);
                    backend.dropout(input, drop, rows * self.inputs, dropped);
                    backend.accumulate(dropped, rows * self.inputs, dx);
                }
            }
        }
    }

    /// Whether [`Affine::backward_params`] has anything to do, so that its input must be at hand.
    pub fn trains<B: Backend>(&self, gradients: &Gradients<B>) -> bool {
        self.side.is_some()
            || gradients.get(self.weight).is_some()
            || self.bias.is_some_and(|b| gradients.get(b).is_some())
    }

    /// Sums the gradients that are wanted.
    pub fn backward_params<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        dy: &B::Act,
        rows: usize,
        gradients: &mut Gradients<B>,
        scratch: &mut SideScratch<B>,
    ) {
        if self.side.is_none()
            && let Some((dw, db)) = self.bias.and_then(|bias| gradients.pair_mut(self.weight, bias))
        {
            return pass.backend.linear_backward_params(dy, x, product(self, rows), dw, db);
        }
        self.backward_weights(pass, x, dy, rows, gradients, scratch);
        if let Some(db) = self.bias.and_then(|id| gradients.get_mut(id)) {
            pass.backend.linear_backward_bias(dy, rows, self.outputs, db);
        }
    }

    /// [`Affine::backward_params`] but for the bias, whose gradient is summed elsewhere.
    pub fn backward_weights<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        dy: &B::Act,
        rows: usize,
        gradients: &mut Gradients<B>,
        scratch: &mut SideScratch<B>,
    ) {
        let (backend, tensors) = (pass.backend, pass.tensors);
        if let Some(dw) = gradients.get_mut(self.weight) {
            backend.linear_backward_weight(dy, x, product(self, rows), dw);
        }
        if let Some(side) = &self.side {
            let dropped = self.low(side, pass, x, rows, scratch);
            let (up, down) = (side.up(rows, self.outputs), side.down(rows, self.inputs));
            if let Some(db) = gradients.get_mut(side.b) {
                backend.linear_backward_weight(dy, &scratch.low, up, db);
            }
            backend.linear_backward_input(dy, tensors.product(side.b), up, &mut scratch.low_gradient, false);
            if let Some(da) = gradients.get_mut(side.a) {
                let input = if dropped { &scratch.dropped } else { x };
                backend.linear_backward_weight(&scratch.low_gradient, input, down, da);
            }
        }
    }

    /// Channels that it reads, as a convolution.
    pub fn channels(&self, window: Window) -> usize {
        self.inputs / (window.side * window.side)
    }

    /// Whether, as a convolution of tokens of a grid, the gradient of its weight is summed without gathered patches.
    pub fn sums_direct<B: Backend>(&self, backend: &B, grid: Grid, window: Window) -> bool {
        self.side.is_none() && backend.sums_convolution_weight(grid, window, self.channels(window), self.outputs)
    }

    /// [`Affine::backward_weights`] of a convolution of tokens on their grid: from these, or from patches, which were kept or are
    /// gathered in `room`.
    pub fn backward_convolution<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        (tokens, grid): (&B::Act, Grid),
        window: Window,
        kept: Option<&B::Act>,
        dy: &B::Act,
        gradients: &mut Gradients<B>,
        room: &mut B::Act,
        scratch: &mut SideScratch<B>,
    ) {
        let (backend, channels) = (pass.backend, self.channels(window));
        if self.sums_direct(backend, grid, window) {
            if let Some(dw) = gradients.get_mut(self.weight) {
                backend.convolution_backward_weight(tokens, dy, grid, window, channels, self.outputs, dw);
            }
            return;
        }
        let patches = match kept {
            Some(patches) => patches,
            None => {
                backend.patches(tokens, grid, channels, window, room);
                &*room
            }
        };
        self.backward_weights(pass, patches, dy, grid.through(window).rows(), gradients, scratch);
    }

    /// Adds the gradient of the tokens, on their grid, that a convolution reads; `room` is for that of patches, where the backend
    /// makes it.
    pub fn backward_tokens<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        dy: &B::Act,
        (dx, grid): (&mut B::Act, Grid),
        window: Window,
        room: &mut B::Act,
        scratch: &mut SideScratch<B>,
    ) {
        let (backend, channels) = (pass.backend, self.channels(window));
        if self.side.is_none() && backend.fuses_convolution_backward(grid, window, channels, self.outputs) {
            let weight = pass.tensors.product(self.weight);
            backend.convolution_backward_input(dy, weight, grid, window, channels, self.outputs, dx);
        } else {
            self.backward_input(pass, dy, grid.through(window).rows(), room, false, scratch);
            backend.patches_backward(room, grid, channels, window, dx);
        }
    }

    /// `scratch.low = dropout(x)·Aᵀ`; true if the dropped x stands in `scratch.dropped`.
    fn low<B: Backend>(
        &self,
        side: &SidePath,
        pass: &Pass<'_, B>,
        x: &B::Act,
        rows: usize,
        scratch: &mut SideScratch<B>,
    ) -> bool {
        let (a, down) = (pass.tensors.product(side.a), side.down(rows, self.inputs));
        let drop = side.dropout(pass, rows / pass.images * self.inputs);
        let input = match drop {
            Some(drop) => {
                pass.backend.dropout(x, drop, rows * self.inputs, &mut scratch.dropped);
                &scratch.dropped
            }
            None => x,
        };
        pass.backend.linear(input, a, None, down, &mut scratch.low, false);
        drop.is_some()
    }
}
