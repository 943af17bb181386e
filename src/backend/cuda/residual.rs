//! Additions along the residual stream.

use super::memory::width;
use super::{Argument, Cuda, Device};
use crate::backend::{Dropout, Grid, Product, Residual};

impl<D: Device> Residual for Cuda<D> {
    fn residual(
        &self,
        x: &Self::Act,
        branch: &Self::Act,
        drop: Option<Dropout>,
        grid: Grid,
        channels: usize,
        y: &mut Self::Act,
    ) {
        let (n, per_image) = (grid.rows() * channels, grid.area() * channels);
        let mut arguments = vec![x.at(n), branch.at(n)];
        arguments.extend(self.dropout_arguments(drop));
        arguments.extend([grid.images.into(), per_image.into(), y.to(n)]);
        self.launch("residual", n / width(per_image), &arguments);
    }

    fn linear_residual(
        &self,
        x: &Self::Act,
        input: &Self::Act,
        w: &Self::Act,
        bias: Option<&Self::Act>,
        p: Product,
        _: &mut Self::Act,
        y: &mut Self::Act,
    ) {
        self.tokens_by_weights(input, w, bias, p, Some(x.address(p.rows * p.outputs)), y);
    }

    fn drop_path(&self, x: &Self::Act, drop: Dropout, grid: Grid, channels: usize, y: &mut Self::Act) {
        let (n, per_image) = (grid.rows() * channels, grid.area() * channels);
        let mut arguments = vec![x.at(n)];
        arguments.extend(self.dropout_arguments(Some(drop)));
        arguments.extend([grid.images.into(), per_image.into(), y.to(n)]);
        self.launch("drop_path", n / width(per_image), &arguments);
    }

    fn dropout(&self, x: &Self::Act, drop: Dropout, len: usize, y: &mut Self::Act) {
        let mut arguments = vec![x.at(len)];
        arguments.extend(self.dropout_arguments(Some(drop)));
        arguments.extend([Argument::U64(len as u64), y.to(len)]);
        self.launch("dropout", len / width(len), &arguments);
    }

    fn accumulate(&self, x: &Self::Act, len: usize, y: &mut Self::Act) {
        self.launch("accumulate", len / width(len), &[x.at(len), Argument::U64(len as u64), y.both(len)]);
    }
}
