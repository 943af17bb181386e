//! Bilinear interpolation, half-pixel centres.

use super::memory::width;
use super::{Argument, Cuda, Device};
use crate::backend::{Grid, Resize};

/// `(images, from_height, from_width, to_height, to_width, channels)` as arguments.
fn geometry(from: Grid, to: Grid, channels: usize) -> [Argument; 6] {
    [to.images, from.height, from.width, to.height, to.width, channels].map(Argument::from)
}

impl<D: Device> Resize for Cuda<D> {
    fn upsample(&self, x: &Self::Act, from: Grid, to: Grid, channels: usize, y: &mut Self::Act, add: bool) {
        let n = to.rows() * channels;
        let mut arguments = vec![x.at(from.rows() * channels)];
        arguments.extend(geometry(from, to, channels));
        arguments.extend([y.sum_to(n, add), add.into()]);
        self.launch("upsample", n / width(channels), &arguments);
    }

    fn upsample_backward(&self, dy: &Self::Act, from: Grid, to: Grid, channels: usize, dx: &mut Self::Act) {
        let n = from.rows() * channels;
        let mut arguments = vec![dy.at(to.rows() * channels)];
        arguments.extend(geometry(from, to, channels));
        arguments.push(dx.to(n));
        self.launch("upsample_backward", n / width(channels), &arguments);
    }
}
