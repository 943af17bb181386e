//! Clipping and AdamW.

use super::memory::THREADS;
use super::{Argument, Cuda, Device};
use crate::backend::{AdamW, Optimizer};

/// Numbers that one block squares and sums.
const NORM_BLOCK: usize = 16 * THREADS;

impl<D: Device> Optimizer for Cuda<D> {
    fn gradient_norm(&self, gradients: &[&Self::Full], norm: &mut Self::Full) {
        let blocks = |len: usize| len.div_ceil(NORM_BLOCK);
        let total: usize = gradients.iter().map(|g| blocks(g.len())).sum();
        let partial = self.scratch(total.max(1));
        let mut at = partial;
        for gradient in gradients {
            let (n, blocks) = (gradient.len(), blocks(gradient.len()));
            if n > 0 {
                let arguments = [gradient.at(n), n.into(), Argument::pointer(at)];
                self.launch_blocks("square_sums", [blocks, 1, 1], THREADS, &arguments);
            }
            at += (blocks * size_of::<f32>()) as u64;
        }
        let arguments = [Argument::pointer(partial), total.into(), norm.to(1)];
        self.launch_blocks("gradient_norm", [1, 1, 1], THREADS, &arguments);
    }

    fn adamw(
        &self,
        update: &AdamW,
        norm: &Self::Full,
        gradient: &Self::Full,
        parameter: &mut Self::Full,
        m: &mut Self::Full,
        v: &mut Self::Full,
    ) {
        let [beta1, beta2] = update.betas;
        let steps = update.step as f64;
        let numbers = [
            update.max_norm,
            1.0 - update.lr * update.weight_decay,
            update.lr / (1.0 - beta1.powf(steps)),
            (1.0 - beta2.powf(steps)).sqrt(),
            beta1,
            beta2,
            1.0 - beta1,
            1.0 - beta2,
            update.epsilon,
        ];
        let n = parameter.len();
        let mut arguments = vec![norm.at(1), gradient.at(n), n.into()];
        arguments.extend(numbers.map(|x| Argument::F32(x as f32)));
        arguments.extend([parameter.both(n), m.both(n), v.both(n)]);
        self.launch("adamw", n, &arguments);
    }
}
