//! BatchNorm, ReLU and dropout at the end of the decoder.

use super::memory::{ColumnSums, dropout_arguments, width};
use super::{Argument, Cuda, Device};
use crate::backend::{BatchNormView, Dropout, Head, Memory};

impl<D: Device> Head for Cuda<D> {
    fn batch_moments(&self, z: &Self::Act, rows: usize, channels: usize, moments: &mut Self::Full) {
        let n = rows * channels;
        let mean = moments.to(channels);
        let deviation = Argument::pointer(moments.address(2 * channels) + (channels * size_of::<f32>()) as u64);
        self.column_sums(
            "batch_sum",
            (rows, channels),
            |slab, partial| vec![z.at(n), rows.into(), channels.into(), slab, partial],
            &[ColumnSums { kinds: 1, factor: (1.0 / rows as f64) as f32, to: mean, add: false }],
        );
        self.column_sums(
            "batch_deviation",
            (rows, channels),
            |slab, partial| vec![z.at(n), mean, rows.into(), channels.into(), slab, partial],
            &[ColumnSums { kinds: 1, factor: 1.0, to: deviation, add: false }],
        );
    }

    fn batch_stats(
        &self,
        moments: &[&Self::Full],
        rows: &[usize],
        channels: usize,
        momentum: f64,
        stats: &mut Self::Full,
        running_mean: &mut Self::Full,
        running_var: &mut Self::Full,
    ) {
        let joined = Argument::pointer(self.scratch(2 * channels));
        let mut count = 0;
        for (moments, &added) in moments.iter().zip(rows) {
            let counts = [Argument::F32(added as f32), Argument::F32(count as f32)];
            let arguments = [moments.at(2 * channels), counts[0], counts[1], channels.into(), joined];
            self.launch("batch_join", channels, &arguments);
            count += added;
        }
        let (mean, var) = (running_mean.both(channels), running_var.both(channels));
        let (count, momentum) = (Argument::F32(count as f32), Argument::F32(momentum as f32));
        let arguments = [joined, count, momentum, channels.into(), stats.to(2 * channels), mean, var];
        self.launch("batch_stats", channels, &arguments);
    }

    fn running_stats(
        &self,
        running_mean: &Self::Full,
        running_var: &Self::Full,
        channels: usize,
        stats: &mut Self::Full,
    ) {
        let (mean, var) = (running_mean.at(channels), running_var.at(channels));
        self.launch("running_stats", channels, &[mean, var, channels.into(), stats.to(2 * channels)]);
    }

    fn head_activation(
        &self,
        z: &Self::Act,
        norm: BatchNormView<'_, Self::Full>,
        drop: Option<Dropout>,
        rows: usize,
        channels: usize,
        a: &mut Self::Act,
    ) {
        let n = rows * channels;
        let mut arguments = vec![z.at(n)];
        arguments.extend(view(&norm, channels));
        arguments.extend(dropout_arguments(drop));
        arguments.extend([rows.into(), channels.into(), a.to(n)]);
        self.launch("head_activation", n / width(channels), &arguments);
    }

    fn head_backward(
        &self,
        z: &Self::Act,
        norm: BatchNormView<'_, Self::Full>,
        drop: Option<Dropout>,
        rows: usize,
        channels: usize,
        da: &mut Self::Act,
        sums: &mut Self::Full,
    ) {
        let n = rows * channels;
        let arguments = |slab, partial| {
            let mut arguments = vec![z.at(n)];
            arguments.extend(view(&norm, channels));
            arguments.extend(dropout_arguments(drop));
            arguments.extend([rows.into(), channels.into(), slab, da.both(n), partial]);
            arguments
        };
        let outputs = [ColumnSums { kinds: 2, factor: 1.0, to: sums.to(2 * channels), add: false }];
        self.column_sums("head_backward", (rows, channels), arguments, &outputs);
    }

    fn batch_sums(&self, sums: &[&Self::Full], total: &mut Self::Full) {
        self.zero(total);
        for sums in sums {
            let n = total.len();
            self.launch("add_part", n, &[sums.at(n), 0usize.into(), n.into(), total.both(n)]);
        }
    }

    fn batch_norm_backward(
        &self,
        z: &Self::Act,
        norm: BatchNormView<'_, Self::Full>,
        total: &Self::Full,
        batch_rows: usize,
        rows: usize,
        channels: usize,
        dy: &mut Self::Act,
    ) {
        let n = rows * channels;
        let share = Argument::F32((1.0 / batch_rows as f64) as f32);
        let (stats, gamma, total) = (norm.stats.at(2 * channels), norm.gamma.at(channels), total.at(2 * channels));
        let arguments = [z.at(n), stats, gamma, total, share, rows.into(), channels.into(), dy.both(n)];
        self.launch("batch_norm_backward", n / width(channels), &arguments);
    }
}

/// Statistics, scale and shift as arguments.
fn view<D: Device>(norm: &BatchNormView<'_, <Cuda<D> as Memory>::Full>, channels: usize) -> [Argument; 3] {
    [norm.stats.at(2 * channels), norm.gamma.at(channels), norm.beta.at(channels)]
}
