//! Products of tokens with weights, on the `gemm` crate; in evaluation on matrix units, where there are any.

use std::any::TypeId;

use super::layer_norm::accumulate;
use super::room::with_room;
use super::simd::{each, vectorised};
use super::tiles::{self, Start, Step};
use super::{Buffer, Cpu, Real};
use crate::backend::{Linear, Product};

/// Rows of which the part of a thread is made, when several work on one product.
const ROWS: usize = 96;
/// Rows that a part has at least: of fewer, the crate may sum in another order than of the whole.
const FEWEST: usize = 65;
/// Outputs whose weights' gradient is one product.
const OUTPUTS: usize = 128;
/// Outputs below which a product is made of dot products.
const NARROW: usize = 4;

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

    /// The same numbers under their own name.
    pub fn cast<U: Real>(self) -> View<'a, U>
    where
        T: Real,
    {
        let Self { data, start, row_stride, column_stride } = self;
        View { data: bytemuck::cast_slice(data), start, row_stride, column_stride }
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

/// Weights `(outputs, inputs)` as a product reads them.
#[derive(Clone, Copy)]
pub(super) enum Weights<'a, T> {
    /// As they are.
    Plain(&'a [T]),
    /// Packed for [`tiles`], of numbers that are f32.
    Tiles(&'a [Step]),
}

impl<'a, T: Real> Weights<'a, T> {
    /// Those of products like `p`, in as much room as [`Cpu::packed`] says: of none, as they are.
    pub fn new(w: &'a [T], p: Product, room: &'a mut [T]) -> Self {
        if room.is_empty() {
            return Self::Plain(w);
        }
        let steps = bytemuck::cast_slice_mut(room);
        tiles::pack(View::rows(bytemuck::cast_slice(w), p.inputs).t(), (p.outputs, p.inputs), 1.0, steps);
        Self::Tiles(steps)
    }
}

/// `y = x·Wᵀ + bias`, plus y itself with `add`.
pub(super) fn linear<T: Real>(x: &[T], w: Weights<'_, T>, bias: Option<&[T]>, p: Product, y: &mut [T], add: bool) {
    let w = match w {
        Weights::Plain(w) => w,
        Weights::Tiles(w) => {
            if let Some(bias) = bias.filter(|_| add) {
                add_bias(bias, p, y, true);
            }
            let start = if add { Start::Itself } else { Start::Row(bias.map(bytemuck::cast_slice)) };
            let (x, y) = (View::rows(bytemuck::cast_slice(x), p.inputs), bytemuck::cast_slice_mut(y));
            return tiles::product((p.rows, p.outputs, p.inputs), x, w, start, y, p.outputs);
        }
    };
    if p.outputs < NARROW {
        return dots(x, w, bias, p, y, add);
    }
    if let Some(bias) = bias {
        add_bias(bias, p, y, add);
    }
    let add = add || bias.is_some();
    let size = (p.rows, p.outputs, p.inputs);
    product(size, T::ONE, View::rows(x, p.inputs), View::rows(w, p.inputs).t(), y, 0, p.outputs, add);
}

/// Sets every row of y to the bias, plus itself with `add`.
fn add_bias<T: Real>(bias: &[T], p: Product, y: &mut [T], add: bool) {
    let y = &mut y[..p.rows * p.outputs];
    vectorised(
        #[inline(always)]
        |_| {
            for row in y.chunks_exact_mut(p.outputs) {
                if add {
                    each([bias], row, |[b], y| y + b);
                } else {
                    each([bias], row, |[b], _| b);
                }
            }
        },
    );
}

/// [`linear`] output by output: a matrix this narrow leaves the lanes of the matrix kernels empty.
fn dots<T: Real>(x: &[T], w: &[T], bias: Option<&[T]>, p: Product, y: &mut [T], add: bool) {
    let (x, y) = (x[..p.rows * p.inputs].chunks_exact(p.inputs), y[..p.rows * p.outputs].chunks_exact_mut(p.outputs));
    vectorised(
        #[inline(always)]
        |level| {
            for (x, y) in x.zip(y) {
                for (o, (w, y)) in w.chunks_exact(p.inputs).zip(y).enumerate() {
                    let value = accumulate([x, w], |[x, w], sum| x.mul_add(w, sum, level));
                    let value = value + bias.map_or(T::ZERO, |bias| bias[o]);
                    *y = if add { *y + value } else { value };
                }
            }
        },
    );
}

impl<T: Real> Cpu<T> {
    /// Numbers of room for the packed right side of a product of `inputs` terms to `outputs` columns; 0 where it is read as it is.
    pub(super) fn packed(&self, outputs: usize, inputs: usize) -> usize {
        if TypeId::of::<T>() == TypeId::of::<f32>() && self.evaluates() && tiles::suit(outputs, inputs) {
            tiles::steps(outputs, inputs) * size_of::<Step>() / size_of::<T>()
        } else {
            0
        }
    }

    /// Rows of a product that a thread of the unit takes. The last may be left with less, but not with fewer than [`FEWEST`].
    fn share_of_product(&self, rows: usize) -> usize {
        let part = |threads: usize| rows.div_ceil(threads).next_multiple_of(ROWS);
        let is_whole = |part: usize| rows <= part || (rows - 1) % part + 1 >= FEWEST;
        (1..=self.team()).rev().map(part).find(|&part| is_whole(part)).unwrap_or(rows.max(1))
    }
}

impl<T: Real> Linear for Cpu<T> {
    fn linear(&self, x: &Buffer<T>, w: &Buffer<T>, bias: Option<&Buffer<T>>, p: Product, y: &mut Buffer<T>, add: bool) {
        let rows = self.share_of_product(p.rows);
        let x = x[..p.rows * p.inputs].chunks(rows * p.inputs);
        with_room([self.packed(p.outputs, p.inputs)], |[room]| {
            let w = Weights::new(w, p, room);
            self.each(x.zip(y[..p.rows * p.outputs].chunks_mut(rows * p.outputs)), |(x, y)| {
                let p = Product { rows: y.len() / p.outputs, ..p };
                linear(x, w, bias.map(|bias| &bias[..]), p, y, add);
            });
        });
    }

    fn linear_backward_input(&self, dy: &Buffer<T>, w: &Buffer<T>, p: Product, dx: &mut Buffer<T>, add: bool) {
        let rows = self.share_of_product(p.rows);
        let dy = dy[..p.rows * p.outputs].chunks(rows * p.outputs);
        self.each(dy.zip(dx[..p.rows * p.inputs].chunks_mut(rows * p.inputs)), |(dy, dx)| {
            let size = (dx.len() / p.inputs, p.inputs, p.outputs);
            product(size, T::ONE, View::rows(dy, p.outputs), View::rows(w, p.inputs), dx, 0, p.inputs, add);
        });
    }

    fn linear_backward_weight(&self, dy: &Buffer<T>, x: &Buffer<T>, p: Product, dw: &mut Buffer<T>) {
        // The same parts for any number of threads: the shape of a product decides in which order it is summed.
        let parts = dw[..p.outputs * p.inputs].chunks_mut(OUTPUTS * p.inputs);
        self.each(parts.enumerate(), |(part, dw)| {
            let size = (dw.len() / p.inputs, p.inputs, p.rows);
            let dy = View { start: part * OUTPUTS, ..View::rows(dy, p.outputs) };
            product(size, T::ONE, dy.t(), View::rows(x, p.inputs), dw, 0, p.inputs, true);
        });
    }

    fn linear_backward_bias(&self, dy: &Buffer<T>, rows: usize, outputs: usize, db: &mut Buffer<T>) {
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
