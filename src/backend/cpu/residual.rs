//! Additions along the residual stream.

use super::simd::{LANES, each, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::{Dropout, Grid, Residual};

/// `y = x + factor·branch`
pub(super) fn add_branch<T: Real>(x: &[T], branch: &[T], factor: T, y: &mut [T]) {
    vectorised(
        #[inline(always)]
        |_| each([x, branch], y, |[x, branch], _| x + factor * branch),
    );
}

impl<T: Real> Residual for Cpu<T> {
    fn residual(
        &self,
        x: &Buffer<T>,
        branch: &Buffer<T>,
        drop: Option<Dropout>,
        grid: Grid,
        channels: usize,
        y: &mut Buffer<T>,
    ) {
        let n = grid.area() * channels;
        for image in 0..grid.images {
            let factor = drop.map_or(T::ONE, |drop| T::of(f64::from(drop.factor(image as u64))));
            let part = self.share(n, LANES);
            let inputs = x[image * n..][..n].chunks(part).zip(branch[image * n..][..n].chunks(part));
            self.each(inputs.zip(y[image * n..][..n].chunks_mut(part)), |((x, branch), y)| {
                add_branch(x, branch, factor, y);
            });
        }
    }

    fn drop_path(&self, x: &Buffer<T>, drop: Dropout, grid: Grid, channels: usize, y: &mut Buffer<T>) {
        let n = grid.area() * channels;
        for image in 0..grid.images {
            let factor = T::of(f64::from(drop.factor(image as u64)));
            let (x, y) = (&x[image * n..][..n], &mut y[image * n..][..n]);
            vectorised(
                #[inline(always)]
                |_| {
                    for i in 0..n {
                        y[i] = factor * x[i];
                    }
                },
            );
        }
    }

    fn dropout(&self, x: &Buffer<T>, drop: Dropout, len: usize, y: &mut Buffer<T>) {
        let (x, y) = (&x[..len], &mut y[..len]);
        vectorised(
            #[inline(always)]
            |_| {
                drop.factors(
                    0,
                    len,
                    #[inline(always)]
                    |start, factors| {
                        for ((x, y), f) in x[start..].iter().zip(&mut y[start..]).zip(factors) {
                            *y = T::of(f64::from(*f)) * *x;
                        }
                    },
                );
            },
        );
    }

    fn accumulate(&self, x: &Buffer<T>, len: usize, y: &mut Buffer<T>) {
        vectorised(
            #[inline(always)]
            |_| {
                for (x, y) in x[..len].iter().zip(&mut y[..len]) {
                    *y += *x;
                }
            },
        );
    }
}
