//! Clipping and AdamW.

use rayon::prelude::*;

use super::{Buffer, Cpu, Real, simd::vectorised};
use crate::backend::{AdamW, Moving, Optimizer};

/// Numbers of a tensor that one thread takes at a time.
const PART: usize = 1 << 14;

impl<T: Real> Optimizer for Cpu<T> {
    fn gradient_norm(&self, gradients: &[&Buffer<T>], norm: &mut Buffer<T>) {
        let total: f64 = gradients.iter().map(|gradient| self.square_norm(gradient)).sum();
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
        let mut parts = Vec::new();
        for t in tensors {
            let keep = if t.decays { decay } else { T::ONE };
            let moments = t.m.chunks_mut(PART).zip(t.v.chunks_mut(PART));
            let mut products = t.product.as_mut().map(|product| product.chunks_mut(PART));
            for ((p, g), moments) in t.parameter.chunks_mut(PART).zip(t.gradient.chunks(PART)).zip(moments) {
                parts.push((p, g, moments, products.as_mut().and_then(Iterator::next), keep));
            }
        }
        self.install(|| {
            parts.into_par_iter().for_each(|(parameter, gradient, (m, v), product, keep)| {
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
        });
    }
}

impl<T: Real> Cpu<T> {
    /// Sum of squares: of parts by themselves, then of the parts in order.
    fn square_norm(&self, x: &[T]) -> f64 {
        let part = |x: &[T]| {
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
        };
        if x.len() <= PART {
            return part(x);
        }
        self.install(|| x.par_chunks(PART).map(part).collect::<Vec<f64>>()).iter().sum()
    }
}
