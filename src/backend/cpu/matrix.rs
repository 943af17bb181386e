//! Small products among parameters.

use rayon::prelude::*;

use super::linear::{View, product};
use super::{Cpu, Real};
use crate::backend::{Matrix, Transpose};

/// Numbers of a tensor that one thread takes at a time.
const PART: usize = 1 << 16;

impl<T: Real> Matrix for Cpu<T> {
    fn matrix_product(
        &self,
        a: &Vec<T>,
        b: &Vec<T>,
        transpose: Transpose,
        (m, n, k): (usize, usize, usize),
        alpha: f64,
        c: &mut Vec<T>,
        add: bool,
    ) {
        let a = if transpose == Transpose::Left { View::rows(a, m).t() } else { View::rows(a, k) };
        let b = if transpose == Transpose::Right { View::rows(b, k).t() } else { View::rows(b, n) };
        product((m, n, k), T::of(alpha), a, b, c, 0, n, add);
    }

    fn columns(&self, x: &Vec<T>, columns: usize, start: usize, n: usize, y: &mut Vec<T>) {
        for (x, y) in x.chunks_exact(columns).zip(y.chunks_exact_mut(n)) {
            y.copy_from_slice(&x[start..start + n]);
        }
    }

    fn add_columns(&self, y: &Vec<T>, columns: usize, start: usize, n: usize, x: &mut Vec<T>) {
        for (x, y) in x.chunks_exact_mut(columns).zip(y.chunks_exact(n)) {
            for (x, y) in x[start..start + n].iter_mut().zip(y) {
                *x += *y;
            }
        }
    }

    fn scale(&self, alpha: f64, x: &Vec<T>, y: &mut Vec<T>) {
        let alpha = T::of(alpha);
        for (x, y) in x.iter().zip(y) {
            *y = alpha * *x;
        }
    }

    fn add_part(&self, x: &Vec<T>, start: usize, y: &mut Vec<T>) {
        for (x, y) in x[start..].iter().zip(y) {
            *y += *x;
        }
    }

    fn add(&self, x: &Vec<T>, y: &mut Vec<T>) {
        self.install(|| {
            y.par_chunks_mut(PART).zip(x.par_chunks(PART)).for_each(|(y, x)| {
                for (x, y) in x.iter().zip(y) {
                    *y += *x;
                }
            });
        });
    }
}
