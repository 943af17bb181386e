//! Small products among parameters.

use super::linear::{View, product};
use super::memory::PART;
use super::simd::vectorised;
use super::{Buffer, Cpu, Real};
use crate::backend::{Base, Matrix, Scaled, SmallProduct, Transpose};

impl<T: Real> Matrix for Cpu<T> {
    fn small_products(&self, products: &mut [SmallProduct<'_, Buffer<T>, Buffer<T>>]) {
        self.each_on_all(products.iter_mut(), |p| {
            let (m, n, k) = p.size;
            let a = if p.transpose == Transpose::Left { View::rows(p.a, m).t() } else { View::rows(p.a, k) };
            let b = if p.transpose == Transpose::Right { View::rows(p.b, k).t() } else { View::rows(p.b, n) };
            if let Base::Of(base) = p.base {
                p.c.copy_from_slice(base);
            }
            product(
                p.size,
                p.alpha.map_or(T::of(1.0), |alpha| alpha[0]),
                a,
                b,
                p.c,
                0,
                n,
                !matches!(p.base, Base::Zeros),
            );
            if let Some(product) = &mut p.product {
                product.copy_from_slice(p.c);
            }
        });
    }

    fn columns(&self, x: &Buffer<T>, columns: usize, start: usize, n: usize, y: &mut Buffer<T>) {
        for (x, y) in x.chunks_exact(columns).zip(y.chunks_exact_mut(n)) {
            y.copy_from_slice(&x[start..start + n]);
        }
    }

    fn add_columns(&self, y: &Buffer<T>, columns: usize, start: usize, n: usize, x: &mut Buffer<T>) {
        for (x, y) in x.chunks_exact_mut(columns).zip(y.chunks_exact(n)) {
            for (x, y) in x[start..start + n].iter_mut().zip(y) {
                *x += *y;
            }
        }
    }

    fn scale_all(&self, alpha: &Buffer<T>, tensors: &mut [Scaled<'_, Buffer<T>, Buffer<T>>]) {
        let alpha = alpha[0];
        for Scaled { x, y, product } in tensors {
            for (x, y) in x.iter().zip(y.iter_mut()) {
                *y = alpha * *x;
            }
            if let Some(product) = product {
                product.copy_from_slice(y);
            }
        }
    }

    fn add_part(&self, x: &Buffer<T>, start: usize, y: &mut Buffer<T>) {
        for (x, y) in x[start..].iter().zip(y.iter_mut()) {
            *y += *x;
        }
    }

    fn add_all(&self, sums: &mut [(Vec<&Buffer<T>>, &mut Buffer<T>)]) {
        let parts = sums.iter_mut().flat_map(|(xs, y)| {
            let xs = &*xs;
            y.chunks_mut(PART).enumerate().map(move |(part, y)| (xs, part * PART, y))
        });
        self.each_on_all(parts, |(xs, start, y)| {
            vectorised(
                #[inline(always)]
                |_| {
                    for x in xs {
                        for (x, y) in x[start..].iter().zip(y.iter_mut()) {
                            *y += *x;
                        }
                    }
                },
            );
        });
    }
}
