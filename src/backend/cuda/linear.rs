//! Products of tokens with weights.

use super::memory::ColumnSums;
use super::{Argument, Cuda, Device, Element, Joint, MatrixProduct};
use crate::backend::{Linear, Memory, Product};

/// Threads of a block that sums the gradient of a square weight, and numbers of a tile of tokens that it takes at a time, as in
/// the kernels.
pub(super) const SQUARE_BLOCK: usize = 256;
const SQUARE_TILE: usize = 4096;
/// Such blocks at most: two for each multiprocessor of an H100. A fixed number, so that sums do not depend on the device.
const SQUARE_BLOCKS: usize = 264;
/// Tiles of such a block, where there are as many: what it leaves is as large as up to one tile of both operands.
const SQUARE_TILES: usize = 4;

/// Blocks for the gradient of a square weight over so many tokens, if there are kernels for it.
pub(super) fn square_blocks(rows: usize, channels: usize) -> Option<usize> {
    // Kernels count tokens in 32 bits, and some past the last.
    let fits = matches!(channels, 32 | 64) && (1..1 << 30).contains(&rows);
    fits.then(|| (rows * channels).div_ceil(SQUARE_TILE * SQUARE_TILES).min(SQUARE_BLOCKS))
}

impl<D: Device> Cuda<D> {
    /// Runs a product whose operands were checked.
    pub(super) fn multiply(&self, product: MatrixProduct) {
        let (m, n, _) = product.size;
        if m > 0 && n > 0 {
            // SAFETY: callers take addresses from Array::address with the lengths of the stated shapes, and borrow c
            // mutably beside a and b.
            self.attempt(|device| unsafe { device.product(&product) });
        }
    }

    /// `y = x·Wᵀ + bias + base`, the base at an address that may be y's own.
    pub(super) fn tokens_by_weights(
        &self,
        x: &<Self as Memory>::Act,
        w: &<Self as Memory>::Act,
        bias: Option<&<Self as Memory>::Act>,
        p: Product,
        base: Option<u64>,
        y: &mut <Self as Memory>::Act,
    ) {
        self.multiply(MatrixProduct {
            size: (p.rows, p.outputs, p.inputs),
            a: x.address(p.rows * p.inputs),
            transpose_a: false,
            b: w.address(p.outputs * p.inputs),
            transpose_b: true,
            c: y.address(p.rows * p.outputs),
            output: Element::Bf16,
            base,
            bias: bias.map(|bias| bias.address(p.outputs)),
        });
    }
}

impl<D: Device> Linear for Cuda<D> {
    fn linear(&self, x: &Self::Act, w: &Self::Act, bias: Option<&Self::Act>, p: Product, y: &mut Self::Act, add: bool) {
        let base = add.then(|| y.address(p.rows * p.outputs));
        self.tokens_by_weights(x, w, bias, p, base, y);
    }

    fn linear_backward_input(&self, dy: &Self::Act, w: &Self::Act, p: Product, dx: &mut Self::Act, add: bool) {
        let c = dx.address(p.rows * p.inputs);
        self.multiply(MatrixProduct {
            size: (p.rows, p.inputs, p.outputs),
            a: dy.address(p.rows * p.outputs),
            transpose_a: false,
            b: w.address(p.outputs * p.inputs),
            transpose_b: false,
            c,
            output: Element::Bf16,
            base: add.then_some(c),
            bias: None,
        });
    }

    fn linear_backward_weight(&self, dy: &Self::Act, x: &Self::Act, p: Product, dw: &mut Self::Full) {
        let c = dw.address(p.outputs * p.inputs);
        self.multiply(MatrixProduct {
            size: (p.outputs, p.inputs, p.rows),
            a: dy.address(p.rows * p.outputs),
            transpose_a: true,
            b: x.address(p.rows * p.inputs),
            transpose_b: false,
            c,
            output: Element::F32,
            base: Some(c),
            bias: None,
        });
    }

    fn linear_backward_bias(&self, dy: &Self::Act, rows: usize, outputs: usize, db: &mut Self::Full) {
        self.column_sums(
            "linear_backward_bias",
            (rows, outputs),
            |slab, partial| vec![dy.at(rows * outputs), rows.into(), outputs.into(), slab, partial],
            &[ColumnSums { kinds: 1, to: db.both(outputs), add: true }],
        );
    }

    /// In one pass over dy, where the weight is square and as wide as tokens are in the first two stages of SegFormer-B0.
    fn linear_backward_params(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        p: Product,
        dw: &mut Self::Full,
        db: &mut Self::Full,
    ) {
        let Product { rows, inputs, outputs } = p;
        let joins = inputs == outputs && self.joins(Joint::LinearBackwardSquare);
        let Some(blocks) = square_blocks(rows, inputs).filter(|_| joins) else {
            self.linear_backward_weight(dy, x, p, dw);
            return self.linear_backward_bias(dy, rows, outputs, db);
        };
        let (n, square) = (rows * inputs, inputs * inputs);
        let sums = blocks * (square + inputs);
        let partial = self.scratch(sums);
        let kernel = if inputs == 32 { "linear_backward_square_32" } else { "linear_backward_square_64" };
        let arguments = [dy.at(n), x.at(n), rows.into(), Argument::partial(partial, sums)];
        self.launch_blocks(kernel, [blocks, 1, 1], SQUARE_BLOCK, &arguments);
        self.sum_square_partials((partial, blocks, inputs), dw, db);
    }
}

impl<D: Device> Cuda<D> {
    /// Adds up what blocks left of the gradients of a square weight and its bias.
    pub(super) fn sum_square_partials(
        &self,
        partial: (u64, usize, usize),
        dw: &mut <Self as Memory>::Full,
        db: &mut <Self as Memory>::Full,
    ) {
        let channels = partial.2;
        let to = |kinds, to| ColumnSums { kinds, to, add: true };
        let outputs = [to(channels, dw.both(channels * channels)), to(1, db.both(channels))];
        self.sum_partials(partial, channels + 1, &outputs);
    }
}
