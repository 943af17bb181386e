//! Clipping and AdamW.

use super::{Cpu, Real, simd::vectorised};
use crate::backend::{AdamW, Optimizer};

impl<T: Real> Optimizer for Cpu<T> {
    fn gradient_norm(&self, gradients: &[&Vec<T>], norm: &mut Vec<T>) {
        let total: f64 = gradients.iter().flat_map(|g| g.iter()).map(|g| g.f64() * g.f64()).sum();
        norm[0] = T::of(total.sqrt());
    }

    fn adamw(
        &self,
        update: &AdamW,
        norm: &Vec<T>,
        gradient: &Vec<T>,
        parameter: &mut Vec<T>,
        m: &mut Vec<T>,
        v: &mut Vec<T>,
    ) {
        let [beta1, beta2] = update.betas;
        let steps = update.step as f64;
        let clip = T::of((update.max_norm / (norm[0].f64() + 1e-6)).min(1.0));
        let step_size = T::of(update.lr / (1.0 - beta1.powf(steps)));
        let root = T::of((1.0 - beta2.powf(steps)).sqrt());
        let keep = T::of(1.0 - update.lr * update.weight_decay);
        let (b1, b2, c1, c2) = (T::of(beta1), T::of(beta2), T::of(1.0 - beta1), T::of(1.0 - beta2));
        let epsilon = T::of(update.epsilon);
        vectorised(
            #[inline(always)]
            || {
                for ((p, g), (m, v)) in parameter.iter_mut().zip(gradient).zip(m.iter_mut().zip(v)) {
                    let g = *g * clip;
                    *m = b1 * *m + c1 * g;
                    *v = b2 * *v + c2 * (g * g);
                    *p = *p * keep - step_size * *m / (v.sqrt() / root + epsilon);
                }
            },
        );
    }
}
