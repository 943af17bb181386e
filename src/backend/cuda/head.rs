//! The end of the decoder, from the stages to the logits.

use super::memory::{ColumnSums, THREADS, column_span, slabs, width};
use super::{Argument, Cuda, Device, Joint};
use crate::backend::{
    BatchNormView, Classifier, Dropout, FirstGradient, FirstStage, Grid, Head, HeadPass, Memory,
    classify_backward_input_plainly, classify_backward_plainly, classify_plainly, classify_stages_plainly,
    split_stages_plainly,
};

/// Stages that one launch joins.
const PARTS: usize = 3;
/// Lines of a picture that a warp joins.
const PIECE: usize = 64;
/// Columns and channels of a tile of a warp.
const TILE: (usize, usize) = (8, 32);
/// Channels of the first stage of which kernels make z.
const FIRST: usize = 32;
/// Columns that a warp of `split_stages` takes.
const SPLIT_WIDTH: usize = 16;
/// Warps of a block that lie side by side along the channels, at most: where whole tokens are read at once, and where
/// neighbouring strips read the same columns.
const SIDES: (usize, usize) = (8, 4);
/// Threads of a block of `join_moments` and `classify_sums`, and the channels that it takes.
const TOTALS: (usize, usize) = (1024, 8);
/// Rows that a thread of the fused classifier takes, forward and on the way back to z, and tiles of a warp on the way back to the
/// first stage.
const EACH: (usize, usize, usize) = (16, 8, 4);
/// Rows of a tile of all warps of a block of `classify_backward_tokens`.
const BACK_ROWS: usize = 16 * THREADS / 32;
/// Rows of a tile of `classify_backward_tokens_all`, and the blocks that share the tiles, at most: two for each multiprocessor
/// of an H100. A fixed number, so that sums do not depend on the device.
const ALL: (usize, usize) = (32, 264);

/// Whether the fused kernels serve these sizes.
fn fuses(channels: usize, labels: usize) -> bool {
    labels == 2 && channels <= 256 && channels.is_multiple_of(8) && (channels / 8).is_power_of_two()
}

/// Whether those do whose warps take the channels of a tile.
fn tiles(channels: usize, labels: usize) -> bool {
    fuses(channels, labels) && channels >= TILE.1
}

/// How kernels that walk strips of `columns` columns share `(width, channels)` among warps: how many lie side by side
/// along the channels, threads of a block, and the blocks along channels and width.
fn share((width, columns): (usize, usize), channels: usize, widest: usize) -> (usize, usize, [usize; 2]) {
    let groups = channels.div_ceil(TILE.1);
    let side = groups.min(widest);
    let strips = THREADS / 32 / side;
    (side, 32 * side * strips, [groups.div_ceil(side), width.div_ceil(columns).div_ceil(strips)])
}

/// Whether `parts` are at a half, a quarter and an eighth of `to`, in sizes that the kernels of tiles take.
fn halves(parts: &[Grid], to: Grid, channels: usize) -> bool {
    let at = |ratio| Grid { images: to.images, height: to.height / ratio, width: to.width / ratio };
    [to.height, to.width, channels].iter().all(|size| size.is_multiple_of(8)) && parts == [at(2), at(4), at(8)]
}

/// The sizes of `parts`.
fn grids<T>(parts: &[(T, Grid)]) -> Vec<Grid> {
    parts.iter().map(|(_, grid)| *grid).collect()
}

/// Stages at fixed ratios as the arguments of a kernel that interpolates them.
fn exact_stages<D: Device>(parts: &[(&<Cuda<D> as Memory>::Act, Grid)], channels: usize) -> Vec<Argument> {
    parts.iter().map(|(part, from)| part.at(from.rows() * channels)).collect()
}

/// Up to [`PARTS`] stages as the arguments of a kernel that interpolates them.
fn stages<D: Device>(parts: &[(&<Cuda<D> as Memory>::Act, Grid)], channels: usize) -> Vec<Argument> {
    let argument = |i: usize| match parts.get(i) {
        Some((part, from)) => [part.at(from.rows() * channels), from.height.into(), from.width.into()],
        None => [Argument::pointer(0), 0usize.into(), 0usize.into()],
    };
    (0..PARTS).flat_map(argument).collect()
}

/// Numbers of storage that hold a bit for each of `(rows, channels)`.
fn bits(rows: usize, channels: usize) -> usize {
    (rows * channels).div_ceil(16)
}

impl<D: Device> Cuda<D> {
    /// z, how it is normalised and dropped, as the arguments with which every fused kernel begins.
    fn read(&self, head: &HeadPass<'_, Self>) -> Vec<Argument> {
        let mut arguments = vec![head.z.at(head.rows * head.channels)];
        arguments.extend(view(&head.norm, head.channels));
        arguments.extend(self.dropout_arguments(head.drop));
        arguments
    }

    /// The first stage's product as the arguments of a kernel that makes z of it.
    fn first_stage(first: &FirstStage<'_, Self>, rows: usize, channels: usize) -> [Argument; 3] {
        let bias = first.bias.map_or(Argument::pointer(0), |bias| bias.at(channels));
        [first.tokens.at(rows * FIRST), first.weight.at(channels * FIRST), bias]
    }

    /// z of `first`, or as it is, with up to [`PARTS`] stages added, and measured. A `first` is of [`FIRST`] channels.
    fn join(
        &self,
        first: Option<FirstStage<'_, Self>>,
        z: Argument,
        parts: &[(&<Self as Memory>::Act, Grid)],
        to: Grid,
        channels: usize,
        moments: Option<&mut <Self as Memory>::Full>,
    ) {
        let (side, threads, [across, along]) = share((to.width, TILE.0), channels, SIDES.0);
        let pieces = to.images * to.height.div_ceil(PIECE);
        let slabs = pieces * to.width.div_ceil(TILE.0);
        let partial = moments.as_ref().map_or(0, |_| self.scratch(slabs * 2 * channels));
        let exact = halves(&grids(parts), to, channels);
        let kernel = match (&first, exact) {
            (Some(_), _) => "join_tokens",
            (None, true) => "join_stages",
            (None, false) => "join_stages_any",
        };
        let mut arguments = Vec::new();
        arguments.extend(first.iter().flat_map(|first| Self::first_stage(first, to.rows(), channels)));
        arguments.push(z);
        arguments.extend(if exact { exact_stages::<D>(parts, channels) } else { stages::<D>(parts, channels) });
        arguments.extend([to.height, to.width, channels, side].map(Argument::from));
        let sums = if moments.is_some() { slabs * 2 * channels } else { 0 };
        arguments.push(Argument::partial(partial, sums));
        self.launch_blocks(kernel, [across, along, pieces], threads, &arguments);
        if let Some(moments) = moments {
            let mut arguments = vec![Argument::partial_read(partial, sums)];
            arguments.extend([slabs, to.height, to.width, channels].map(Argument::from));
            arguments.push(moments.to(2 * channels));
            self.launch_blocks("join_moments", [channels.div_ceil(TOTALS.1), 1, 1], TOTALS.0, &arguments);
        }
    }
}

impl<D: Device> Head for Cuda<D> {
    fn batch_moments(&self, z: &Self::Act, rows: usize, channels: usize, moments: &mut Self::Full) {
        // As wide as a tile, where that divides. What a run measures goes through join_stages: here a grid has no room for the
        // rows of very many pictures.
        let width = if rows.is_multiple_of(TILE.0) { TILE.0 } else { 1 };
        let grid = Grid { images: 1, height: rows / width, width };
        self.join(None, z.at(rows * channels), &[], grid, channels, Some(moments));
    }

    fn join_stages(
        &self,
        mut first: Option<FirstStage<'_, Self>>,
        parts: &[(&Self::Act, Grid)],
        to: Grid,
        channels: usize,
        z: &mut Self::Act,
        moments: Option<&mut Self::Full>,
    ) {
        let (some, rest) = parts.split_at(parts.len().min(PARTS));
        let fits = channels.is_multiple_of(TILE.1) && halves(&grids(some), to, channels);
        let takes = |inputs| inputs == FIRST && fits && self.joins(Joint::JoinTokens);
        if let Some(first) = first.take_if(|first| !takes(first.inputs)) {
            first.multiply(self, to.rows(), channels, z);
        }
        let n = to.rows() * channels;
        let arguments = if first.is_some() { z.to(n) } else { z.both(n) };
        if rest.is_empty() {
            return self.join(first, arguments, some, to, channels, moments);
        }
        self.join(first, arguments, some, to, channels, None);
        self.join_stages(None, rest, to, channels, z, moments);
    }

    /// Only at fixed ratios is interpolation a product with constant weights.
    fn classifies_stages(&self, inputs: usize, parts: &[Grid], to: Grid, channels: usize, labels: usize) -> bool {
        let fits = inputs == FIRST && tiles(channels, labels) && halves(parts, to, channels);
        fits && self.joins(Joint::ClassifyStages)
    }

    fn classify_stages(
        &self,
        first: Option<FirstStage<'_, Self>>,
        parts: &[(&Self::Act, Grid)],
        to: Grid,
        channels: usize,
        z: &mut Self::Act,
        norm: BatchNormView<'_, Self::Full>,
        classifier: Classifier<'_, Self>,
        room: &mut Self::Act,
        logits: &mut Self::Act,
    ) {
        let (sizes, rows, labels) = (grids(parts), to.rows(), classifier.labels);
        // At fixed ratios join_stages has tensor cores, where classify_stages_any interpolates number by number.
        let any = tiles(channels, labels) && parts.len() <= PARTS && !halves(&sizes, to, channels);
        let (kernel, mut arguments) = match first {
            Some(first) if self.classifies_stages(first.inputs, &sizes, to, channels, labels) => {
                let mut arguments = Vec::from(Self::first_stage(&first, rows, channels));
                arguments.extend(exact_stages::<D>(parts, channels));
                ("classify_stages", arguments)
            }
            first if any => {
                if let Some(first) = first {
                    first.multiply(self, rows, channels, z);
                }
                let mut arguments = vec![z.at(rows * channels)];
                arguments.extend(stages::<D>(parts, channels));
                ("classify_stages_any", arguments)
            }
            first => {
                return classify_stages_plainly(self, first, parts, to, channels, z, norm, classifier, room, logits);
            }
        };
        let (side, threads, [across, along]) = share((to.width, TILE.0), channels, SIDES.0);
        arguments.extend([to.height, to.width, channels, side].map(Argument::from));
        arguments.extend(view::<D>(&norm, channels));
        arguments.extend([classifier.weight.at(2 * channels), classifier.bias.at(2), logits.to(2 * rows)]);
        self.launch_blocks(kernel, [across, along, to.images * to.height.div_ceil(PIECE)], threads, &arguments);
    }

    fn split_stages(&self, dz: &Self::Act, from: Grid, channels: usize, parts: &mut [(&mut Self::Act, Grid)]) {
        let exact = halves(&grids(parts), from, channels);
        match parts {
            [(p, half), (q, quarter), (r, eighth)] if exact => {
                let (side, threads, [across, along]) = share((from.width, SPLIT_WIDTH), channels, SIDES.1);
                let mut arguments = vec![dz.at(from.rows() * channels)];
                arguments.extend([from.height, from.width, channels, side].map(Argument::from));
                arguments.extend([(p, half), (q, quarter), (r, eighth)].map(|(x, grid)| x.to(grid.rows() * channels)));
                self.launch_blocks("split_stages", [across, along, from.images], threads, &arguments);
            }
            _ => split_stages_plainly(self, dz, from, channels, parts),
        }
    }

    /// A bit per activation, where the kernels are fused.
    fn passed(&self, rows: usize, channels: usize, labels: usize) -> Self::Act {
        self.act(if fuses(channels, labels) { bits(rows, channels) } else { 0 })
    }

    fn classify(&self, head: HeadPass<'_, Self>, room: &mut Self::Act, passed: &mut Self::Act, logits: &mut Self::Act) {
        if !fuses(head.channels, head.classifier.labels) {
            return classify_plainly(self, head, room, logits);
        }
        let HeadPass { rows, channels, classifier, .. } = head;
        let mut arguments = self.read(&head);
        arguments.extend([classifier.weight.at(2 * channels), classifier.bias.at(2)]);
        arguments.extend([rows, channels, EACH.0].map(Argument::from));
        let passed = if passed.len() > 0 { passed.to(bits(rows, channels)) } else { Argument::pointer(0) };
        arguments.extend([passed, logits.to(2 * rows)]);
        self.launch("classify", rows.div_ceil(EACH.0) * channels / 8, &arguments);
    }

    fn classify_backward(
        &self,
        head: HeadPass<'_, Self>,
        passed: &Self::Act,
        dlogits: &Self::Act,
        room: &mut Self::Act,
        weight_gradient: Option<&mut Self::Full>,
        sums: &mut Self::Full,
    ) {
        if !fuses(head.channels, head.classifier.labels) {
            return classify_backward_plainly(self, head, dlogits, room, weight_gradient, sums);
        }
        let HeadPass { z, norm, drop, rows, channels, classifier } = head;
        let (slab, slabs) = slabs(rows);
        let sums_len = slabs * 4 * channels;
        let partial = self.scratch(sums_len);
        let mut arguments = vec![z.at(rows * channels), norm.stats.at(2 * channels)];
        arguments.extend([passed.at(bits(rows, channels)), Self::kept_factor(drop), dlogits.at(2 * rows)]);
        arguments.extend([rows, channels, slab].map(Argument::from));
        arguments.push(Argument::partial(partial, sums_len));
        let grid = [channels.div_ceil(column_span(channels)), slabs, 1];
        self.launch_blocks("classify_backward", grid, THREADS, &arguments);
        let (gamma, beta) = (norm.gamma.at(channels), norm.beta.at(channels));
        let weights = weight_gradient.map_or(Argument::pointer(0), |dw| dw.both(2 * channels));
        let (weight, sums) = (classifier.weight.at(2 * channels), sums.to(2 * channels));
        let partial = Argument::partial_read(partial, sums_len);
        let arguments = [partial, slabs.into(), channels.into(), gamma, beta, weight, weights, sums];
        self.launch_blocks("classify_sums", [channels.div_ceil(TOTALS.1), 1, 1], TOTALS.0, &arguments);
    }

    fn classify_backward_input(
        &self,
        head: HeadPass<'_, Self>,
        passed: &Self::Act,
        dlogits: &Self::Act,
        (total, batch_rows): (&Self::Full, usize),
        sums: &mut Self::Full,
        dz: &mut Self::Act,
        mut first: Option<FirstGradient<'_, Self>>,
    ) {
        if !fuses(head.channels, head.classifier.labels) {
            return classify_backward_input_plainly(self, head, dlogits, (total, batch_rows), sums, dz, first);
        }
        let HeadPass { z, norm, drop, rows, channels, classifier } = head;
        let share = Argument::F32((1.0 / batch_rows as f64) as f32);
        let mut arguments = vec![z.at(rows * channels), norm.stats.at(2 * channels), norm.gamma.at(channels)];
        arguments.extend([
            passed.at(bits(rows, channels)),
            Self::kept_factor(drop),
            classifier.weight.at(2 * channels),
        ]);
        arguments.extend([dlogits.at(2 * rows), total.at(2 * channels), share]);
        // What a kernel makes with dz is taken from `first`; what is left are products.
        let takes = channels.is_multiple_of(TILE.1) && self.joins(Joint::ClassifyBackwardTokens);
        let joint = first.as_mut().filter(|first| takes && first.inputs == FIRST).and_then(|first| {
            let dtokens = first.tokens.take()?;
            let sum = first.sum.take_if(|_| self.joins(Joint::ClassifyBackwardTokensAll));
            Some((first.weight.at(channels * FIRST), dtokens.to(rows * FIRST), sum))
        });
        match joint {
            None => {
                arguments.extend([rows, channels, EACH.1].map(Argument::from));
                arguments.push(dz.to(rows * channels));
                self.launch("classify_backward_input", rows.div_ceil(EACH.1) * channels / 8, &arguments);
            }
            Some((weight, dtokens, None)) => {
                arguments.extend([weight, rows.into(), channels.into(), EACH.2.into()]);
                arguments.extend([dz.to(rows * channels), dtokens]);
                let blocks = [rows.div_ceil(BACK_ROWS * EACH.2), 1, 1];
                self.launch_blocks("classify_backward_tokens", blocks, THREADS, &arguments);
            }
            Some((weight, dtokens, Some((tokens, dw)))) => {
                let blocks = rows.div_ceil(ALL.0).min(ALL.1);
                let sums = blocks * channels * FIRST;
                let partial = self.scratch(sums);
                arguments.extend([weight, tokens.at(rows * FIRST), rows.into(), channels.into()]);
                arguments.extend([dz.to(rows * channels), dtokens, Argument::partial(partial, sums)]);
                self.launch_blocks("classify_backward_tokens_all", [blocks, 1, 1], THREADS, &arguments);
                let to = ColumnSums { kinds: FIRST, to: dw.both(channels * FIRST), add: true };
                self.sum_partials((partial, blocks, channels), FIRST, &[to]);
            }
        }
        if let Some(first) = first {
            first.multiply(self, rows, channels, dz);
        }
    }

    /// Nothing is added: reading dz again would bring rounding alone.
    fn shift_gradient(&self, _: &Self::Act, _: usize, _: usize, _: &mut Self::Full) {}

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
        arguments.extend(self.dropout_arguments(drop));
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
            arguments.extend(self.dropout_arguments(drop));
            arguments.extend([rows.into(), channels.into(), slab, da.both(n), partial]);
            arguments
        };
        let outputs = [ColumnSums { kinds: 2, to: sums.to(2 * channels), add: false }];
        self.column_sums("head_backward", (rows, channels), arguments, &outputs);
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
