//! Products of tokens with weights, on the `gemm` crate.

use super::simd::{each, vectorised};
use super::{Cpu, Real};
use crate::backend::{Linear, Product};

/// A matrix inside a slice: where it starts and the distance between its rows and columns.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    pub data: &'a [T],
    pub start: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a, T> View<'a, T> {
    /// A row-major matrix of `columns` columns.
    pub fn rows(data: &'a [T], columns: usize) -> Self {
        Self { data, start: 0, row_stride: columns, column_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || self.start + (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// `c = beta·a·b`, plus `c` itself with `add`. `c` is `(m, n)` with rows `c_stride` apart from `c_start` on.
pub(super) fn product<T: Real>(
    (m, n, k): (usize, usize, usize),
    beta: T,
    a: View<'_, T>,
    b: View<'_, T>,
    c: &mut [T],
    c_start: usize,
    c_stride: usize,
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.holds(m, k) && b.holds(k, n) && n <= c_stride && c_start + (m - 1) * c_stride + n <= c.len());
    // SAFETY: the assertion above keeps every element of the three matrices inside its slice, `c` is borrowed mutably and
    // so overlaps neither `a` nor `b`, and T is f32 or f64, which `gemm` knows by their type id.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr().add(c_start),
            1,
            c_stride as isize,
            add,
            a.data.as_ptr().add(a.start),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr().add(b.start),
            b.column_stride as isize,
            b.row_stride as isize,
            T::ONE,
            beta,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

impl<T: Real> Linear for Cpu<T> {
    fn linear(&self, x: &Vec<T>, w: &Vec<T>, bias: Option<&Vec<T>>, p: Product, y: &mut Vec<T>, add: bool) {
        if let Some(bias) = bias {
            let y = &mut y[..p.rows * p.outputs];
            vectorised(
                #[inline(always)]
                |_| {
                    for row in y.chunks_exact_mut(p.outputs) {
                        if add {
                            for (y, b) in row.iter_mut().zip(bias) {
                                *y += *b;
                            }
                        } else {
                            row.copy_from_slice(bias);
                        }
                    }
                },
            );
        }
        let add = add || bias.is_some();
        let size = (p.rows, p.outputs, p.inputs);
        product(size, T::ONE, View::rows(x, p.inputs), View::rows(w, p.inputs).t(), y, 0, p.outputs, add);
    }

    fn linear_backward_input(&self, dy: &Vec<T>, w: &Vec<T>, p: Product, dx: &mut Vec<T>, add: bool) {
        let size = (p.rows, p.inputs, p.outputs);
        product(size, T::ONE, View::rows(dy, p.outputs), View::rows(w, p.inputs), dx, 0, p.inputs, add);
    }

    fn linear_backward_weight(&self, dy: &Vec<T>, x: &Vec<T>, p: Product, dw: &mut Vec<T>) {
        let size = (p.outputs, p.inputs, p.rows);
        product(size, T::ONE, View::rows(dy, p.outputs).t(), View::rows(x, p.inputs), dw, 0, p.inputs, true);
    }

    fn linear_backward_bias(&self, dy: &Vec<T>, rows: usize, outputs: usize, db: &mut Vec<T>) {
        let mut partial = vec![T::ZERO; outputs];
        vectorised(
            #[inline(always)]
            |_| {
                // Sums of 128 rows first: the error grows with the square of neither.
                for block in dy[..rows * outputs].chunks(128 * outputs) {
                    partial.fill(T::ZERO);
                    for row in block.chunks_exact(outputs) {
                        each([row], &mut partial, |[d], sum| sum + d);
                    }
                    each([&partial], &mut db[..outputs], |[part], sum| sum + part);
                }
            },
        );
    }
}
