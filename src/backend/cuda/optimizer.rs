//! Clipping and AdamW.

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::memory::THREADS;
use super::tables::{Span, int};
use super::{Argument, Cuda, Device};
use crate::backend::{AdamW, Moving, Optimizer};

/// A tensor under AdamW. `Moving` in `kernels/optimizer.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    /// f32 `(n)`, and so are the next three.
    gradient: u64,
    parameter: u64,
    m: u64,
    v: u64,
    /// bf16 `(n)`, or 0.
    product: u64,
    n: i32,
    decays: i32,
}

impl<D: Device> Optimizer for Cuda<D> {
    fn gradient_norm(&self, gradients: &[&Self::Full], norm: &mut Self::Full) {
        let spans: Vec<Span> = gradients.iter().map(|g| Span { x: g.address(g.len()), n: g.len() as u64 }).collect();
        let table = self.pieces(&spans, |span| span.n as usize);
        let partial = Argument::pointer(self.scratch(table.blocks.max(1)));
        let bytes = gradients.iter().map(|g| g.len() * size_of::<f32>()).sum();
        self.launch_table("square_sums", table, (bytes, 0), &[partial]);
        self.launch_blocks("gradient_norm", [1, 1, 1], THREADS, &[partial, table.blocks.into(), norm.to(1)]);
    }

    fn adamw(&self, update: &AdamW, norm: &Self::Full, tensors: &mut [Moving<'_, Self::Full, Self::Act>]) {
        let (mut read, mut written) = (0, 0);
        let entry = |tensor: &Moving<'_, Self::Full, Self::Act>| {
            let n = tensor.parameter.len();
            read += 4 * n * size_of::<f32>();
            written += 3 * n * size_of::<f32>() + tensor.product.as_ref().map_or(0, |_| n * size_of::<bf16>());
            Entry {
                gradient: tensor.gradient.address(n),
                parameter: tensor.parameter.address(n),
                m: tensor.m.address(n),
                v: tensor.v.address(n),
                product: tensor.product.as_ref().map_or(0, |product| product.address(n)),
                n: int(n),
                decays: tensor.decays.into(),
            }
        };
        let entries: Vec<Entry> = tensors.iter().map(entry).collect();
        let table = self.pieces(&entries, |entry| entry.n as usize);
        let [beta1, beta2] = update.betas;
        let numbers = [update.max_norm, beta1, beta2, 1.0 - beta1, 1.0 - beta2, update.epsilon];
        let mut rest = vec![norm.at(1), self.rates_at(update)];
        rest.extend(numbers.map(|x| Argument::F32(x as f32)));
        self.launch_table("adamw", table, (read, written), &rest);
    }
}
