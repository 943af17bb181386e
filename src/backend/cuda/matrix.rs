//! Small products among parameters.

use super::{Argument, Cuda, Device, Element, MatrixProduct};
use crate::backend::{Matrix, Transpose};

impl<D: Device> Matrix for Cuda<D> {
    fn matrix_product(
        &self,
        a: &Self::Full,
        b: &Self::Full,
        transpose: Transpose,
        (m, n, k): (usize, usize, usize),
        alpha: f64,
        c: &mut Self::Full,
        add: bool,
    ) {
        self.multiply(MatrixProduct {
            size: (m, n, k),
            a: a.address(m * k),
            transpose_a: transpose == Transpose::Left,
            b: b.address(k * n),
            transpose_b: transpose == Transpose::Right,
            inputs: Element::F32,
            c: c.address(m * n),
            output: Element::F32,
            alpha: alpha as f32,
            add,
            bias: None,
        });
    }

    fn columns(&self, x: &Self::Full, columns: usize, start: usize, n: usize, y: &mut Self::Full) {
        let rows = x.len() / columns;
        let sizes = [rows, columns, start, n].map(Argument::from);
        let arguments = [x.at(rows * columns), sizes[0], sizes[1], sizes[2], sizes[3], y.to(rows * n)];
        self.launch("columns", rows * n, &arguments);
    }

    fn add_columns(&self, y: &Self::Full, columns: usize, start: usize, n: usize, x: &mut Self::Full) {
        let rows = x.len() / columns;
        let sizes = [rows, columns, start, n].map(Argument::from);
        let arguments = [y.at(rows * n), sizes[0], sizes[1], sizes[2], sizes[3], x.both(rows * columns)];
        self.launch("add_columns", rows * n, &arguments);
    }

    fn scale(&self, alpha: f64, x: &Self::Full, y: &mut Self::Full) {
        let n = x.len();
        self.launch("scale", n, &[Argument::F32(alpha as f32), x.at(n), n.into(), y.to(n)]);
    }

    fn add_part(&self, x: &Self::Full, start: usize, y: &mut Self::Full) {
        let n = y.len();
        self.launch("add_part", n, &[x.at(start + n), start.into(), n.into(), y.both(n)]);
    }

    fn add(&self, x: &Self::Full, y: &mut Self::Full) {
        self.add_part(x, 0, y);
    }
}
