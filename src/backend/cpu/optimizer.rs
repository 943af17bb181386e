//! Clipping and AdamW.

use super::memory::PART;
use super::{Buffer, Cpu, Real, simd::vectorised};
use crate::backend::{AdamW, Moving, Optimizer};

impl<T: Real> Optimizer for Cpu<T> {
    /// Of parts by themselves, then of the parts of a tensor in order, then of the tensors.
    fn gradient_norm(&self, gradients: &[&Buffer<T>], norm: &mut Buffer<T>) {
        let parts: Vec<&[T]> = gradients.iter().flat_map(|gradient| gradient.chunks(PART)).collect();
        let mut squares = vec![0.0; parts.len()];
        self.each_on_all(parts.into_iter().zip(&mut squares), |(part, square)| *square = square_norm(part));
        let mut squares = squares.iter();
        let total: f64 = gradients.iter().map(|x| squares.by_ref().take(x.len().div_ceil(PART)).sum::<f64>()).sum();
        norm[0] = T::of(total.sqrt());
    }

    fn adamw(&self, update: &AdamW, norm: &Buffer<T>, tensors: &mut [Moving<'_, Buffer<T>, Buffer<T>>]) {
        let [beta1, beta2] = update.betas;
        let steps = update.step as f64;
        let clip = T::of((update.max_norm / (norm[0].f64() + 1e-6)).min(1.0));
        let step_size = T::of(update.lr / (1.0 - beta1.powf(steps)));
        let root = T::of((1.0 - beta2.powf(steps)).sqrt());
        let decay = T::of(1.0 - update.lr * update.weight_decay);
        let (b1, b2, c1, c2) = (T::of(beta1), T::of(beta2), T::of(1.0 - beta1), T::of(1.0 - beta2));
        let epsilon = T::of(update.epsilon);
        let parts = tensors.iter_mut().flat_map(|t| {
            let keep = if t.decays { decay } else { T::ONE };
            let moments = t.m.chunks_mut(PART).zip(t.v.chunks_mut(PART));
            let mut products = t.product.as_mut().map(|product| product.chunks_mut(PART));
            let parts = t.parameter.chunks_mut(PART).zip(t.gradient.chunks(PART)).zip(moments);
            parts.map(move |((p, g), moments)| (p, g, moments, products.as_mut().and_then(Iterator::next), keep))
        });
        self.each_on_all(parts, |(parameter, gradient, (m, v), product, keep)| {
            vectorised(
                #[inline(always)]
                |_| {
                    for ((p, g), (m, v)) in parameter.iter_mut().zip(gradient).zip(m.iter_mut().zip(v)) {
                        let g = *g * clip;
                        *m = b1 * *m + c1 * g;
                        *v = b2 * *v + c2 * (g * g);
                        *p = *p * keep - step_size * *m / (v.sqrt() / root + epsilon);
                    }
                },
            );
            if let Some(product) = product {
                product.copy_from_slice(parameter);
            }
        });
    }
}

/// Sum of squares.
fn square_norm<T: Real>(x: &[T]) -> f64 {
    vectorised(
        #[inline(always)]
        |_| {
            let mut lanes = [0.0; 16];
            let (blocks, rest) = x.as_chunks::<16>();
            for block in blocks {
                for i in 0..16 {
                    lanes[i] += block[i].f64() * block[i].f64();
                }
            }
            lanes.iter().sum::<f64>() + rest.iter().map(|x| x.f64() * x.f64()).sum::<f64>()
        },
    )
}
