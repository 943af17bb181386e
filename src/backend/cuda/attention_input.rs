//! The way back in front of attention in one kernel.

use super::convolution::{countable, tiles};
use super::layer_norm::NORM_KINDS;
use super::{Argument, Cuda, Device, Joint};
use crate::backend::{AttentionInput, AttentionInputs, Grid, InFront, Linear, Window};

/// Windows of a block, as in the kernels.
const KEYS: usize = 64;

impl<D: Device> AttentionInput for Cuda<D> {
    /// In the first two stages of SegFormer-B0, where most tokens are, and where windows share none.
    fn joins_attention_input(&self, grid: Grid, channels: usize, window: Window) -> bool {
        let fits = tiles(grid, window) && countable(grid);
        self.joins(Joint::AttentionInputBackward) && matches!(channels, 32 | 64) && fits
    }

    /// Of few channels, whose sums have room in registers.
    fn sums_attention_query(&self, channels: usize) -> bool {
        channels == 32
    }

    fn attention_input_backward(
        &self,
        dq: &Self::Act,
        dreduced: &Self::Act,
        inputs: &AttentionInputs<'_, Self>,
        grid: Grid,
        dx: &mut Self::Act,
        parameters: Option<(&mut Self::Full, &mut Self::Full)>,
        query_sums: Option<(&mut Self::Full, &mut Self::Full)>,
        front: InFront<'_, Self>,
    ) {
        let &AttentionInputs { query, reduction, window, x, stats, affine: (gamma, beta), channels } = inputs;
        assert!(
            self.joins_attention_input(grid, channels, window),
            "{channels} channels, {window:?} have no joint kernel"
        );
        let (rows, keys, square) = (grid.rows(), grid.through(window).rows(), channels * channels);
        if rows == 0 {
            return;
        }
        let (n, blocks) = (rows * channels, keys.div_ceil(KEYS));
        let mut arguments = vec![dq.at(n), dreduced.at(keys * channels), query.at(square)];
        arguments.extend([reduction.at(window.side * window.side * square), x.at(n), stats.at(2 * rows)]);
        arguments.push(gamma.at(channels));
        let sums = parameters.is_some() || front.sums_unwritten();
        let InFront { mut scaled, bias } = front;
        let sums_query = sums && self.sums_attention_query(channels);
        if sums_query {
            arguments.push(beta.at(channels));
        }
        arguments.extend([keys, grid.height, grid.width, window.side].map(Argument::from));
        arguments.extend(self.dropout_arguments(scaled.as_ref().map(|(drop, ..)| *drop)));
        arguments.push(dx.both(n));
        let room = scaled.as_mut().and_then(|(.., room)| room.as_mut());
        arguments.push(room.map_or(Argument::pointer(0), |room| room.to(n)));
        let (kernel, threads) = match (channels, sums) {
            (32, false) => ("attention_input_backward_32", 256),
            (32, true) => ("attention_input_backward_all_32", 128),
            (_, false) => ("attention_input_backward_64", 128),
            (_, true) => ("attention_input_backward_all_64", 128),
        };
        if !sums {
            self.launch_blocks(kernel, [blocks, 1, 1], threads, &arguments);
            if let Some(bias) = bias {
                let product = scaled.and_then(|(.., scaled)| scaled).map_or(&*dx, |scaled| &*scaled);
                self.linear_backward_bias(product, rows, channels, bias);
            }
            return;
        }
        let (norm_sums, both) = (blocks * NORM_KINDS * channels, square + channels);
        let partial = self.scratch(norm_sums + if sums_query { blocks * both } else { 0 });
        let query_partial = partial + (norm_sums * size_of::<f32>()) as u64;
        arguments.push(Argument::partial(partial, norm_sums));
        if sums_query {
            arguments.push(Argument::partial(query_partial, blocks * both));
        }
        self.launch_blocks(kernel, [blocks, 1, 1], threads, &arguments);
        self.sum_norm_partials((partial, blocks, channels), parameters, bias);
        if let Some((dw, db)) = query_sums {
            assert!(sums_query, "the gradients of Q's parameters, of {channels} channels");
            self.sum_square_partials((query_partial, blocks, channels), dw, db);
        }
    }
}
