//! Convolutions over tokens without gathered patches: with their LayerNorm, and the way back.

use super::layer_norm::behind;
use super::memory::{ColumnSums, THREADS};
use super::{Argument, Cuda, Device, Joint};
use crate::backend::{Convolution, ConvolutionNorm, Grid, LayerNorm, NextNorm, Window};

/// Windows of a block of `reduce_tokens` of few channels.
const REDUCED: usize = 32;
/// Lines of windows of a block of the way back to tokens, windows in each, and channels of dx.
const DOWN: usize = 8;
const ACROSS: usize = 16;
const BAND: usize = 32;
/// Multiprocessors that the blocks of a weight's gradient fill at most: an H100's, but as many on every device, so that results
/// are the same.
const MULTIPROCESSORS: usize = 132;
/// For the gradient of an embedding's weights: lines of windows that a block is at, outputs that it has, its threads, and how
/// many blocks a multiprocessor is given.
const TALL: usize = 2;
const OUTPUTS: usize = 32;
const WALKERS: usize = 128;
const RESIDENT: usize = 3;
/// Windows that a block of the gradient of a reduction's weights is at.
const WINDOWS: usize = 32;
/// SegFormer's windows from the second embedding on, and those of the third stage's sequence reduction.
const OVERLAPPING: Window = Window { side: 3, stride: 2, padding: 1 };
const APART: Window = Window { side: 2, stride: 2, padding: 0 };

/// Whether windows share no token, and leave none out.
pub(super) fn tiles(grid: Grid, window: Window) -> bool {
    let whole = [grid.height, grid.width].iter().all(|extent| extent.is_multiple_of(window.side));
    window.stride == window.side && window.padding == 0 && whole
}

/// Whether kernels can count a grid's tokens, which they do in 32 bits.
pub(super) fn countable(grid: Grid) -> bool {
    grid.rows() <= i32::MAX as usize
}

/// Name of the kernel of an embedding, or of a reduction that is done as one, windows of its blocks, and their threads, as the
/// kernels have them.
fn embedding(window: Window, inputs: usize, outputs: usize) -> Option<(&'static str, usize, usize)> {
    match (window, inputs, outputs) {
        (OVERLAPPING, 32, 64) => Some(("embed_tokens_64", 128, 256)),
        (OVERLAPPING, 64, 160) => Some(("embed_tokens_160", 64, 128)),
        (OVERLAPPING, 160, 256) => Some(("embed_tokens_256", 64, 256)),
        (APART, 160, 160) => Some(("reduce_tokens_160", 64, 128)),
        _ => None,
    }
}

/// Name of the kernel of the way back to tokens from `grid`.
fn back_to_tokens(grid: Grid, window: Window, inputs: usize, outputs: usize) -> Option<&'static str> {
    match (window, inputs, outputs) {
        _ if !countable(grid) => None,
        (OVERLAPPING, 32, 64) => Some("embed_tokens_backward_64"),
        (OVERLAPPING, 64, 160) => Some("embed_tokens_backward_160"),
        (OVERLAPPING, 160, 256) => Some("embed_tokens_backward_256"),
        (APART, 160, 160) => Some("reduce_tokens_backward_160"),
        _ => None,
    }
}

/// Name of the kernel that sums the gradient of the weights of an embedding of tokens from `grid`.
fn embedding_weights(grid: Grid, window: Window, inputs: usize, outputs: usize) -> Option<&'static str> {
    match (window, inputs, outputs) {
        _ if !countable(grid) => None,
        (OVERLAPPING, 32, 64) => Some("embed_tokens_backward_weights_64"),
        (OVERLAPPING, 64, 160) => Some("embed_tokens_backward_weights_160"),
        (OVERLAPPING, 160, 256) => Some("embed_tokens_backward_weights_256"),
        _ => None,
    }
}

/// Of the kernel that sums the gradient of the weights of a sequence reduction of tokens from `grid`: its name, how many of an
/// output's weights a block has, its threads, and how many blocks a multiprocessor is given. Each leaves what it has summed in
/// memory, so that more of those with many outputs would cost more than they gain.
fn reduction(grid: Grid, window: Window, inputs: usize, outputs: usize) -> Option<(&'static str, [usize; 3])> {
    match (inputs, outputs) {
        _ if !tiles(grid, window) || !countable(grid) => None,
        (32, 32) => Some(("reduce_tokens_backward_weights_32", [128, 128, 2])),
        (64, 64) => Some(("reduce_tokens_backward_weights_64", [64, 128, 2])),
        (160, 160) => Some(("reduce_tokens_backward_weights_160", [64, 320, 1])),
        _ => None,
    }
}

impl<D: Device> Convolution for Cuda<D> {
    /// The sequence reductions of SegFormer-B0, and its embeddings of tokens.
    fn fuses_convolution(&self, grid: Grid, window: Window, inputs: usize, outputs: usize) -> bool {
        let reduces = matches!(inputs, 32 | 64) && inputs == outputs && tiles(grid, window);
        let has_kernel = reduces || embedding(window, inputs, outputs).is_some();
        let joint = if window == OVERLAPPING { Joint::EmbedTokens } else { Joint::ReduceTokens };
        has_kernel && self.joins(joint) && countable(grid)
    }

    fn convolution_norm(
        &self,
        tokens: &Self::Act,
        grid: Grid,
        convolution: &ConvolutionNorm<'_, Self>,
        y: &mut Self::Act,
        kept: Option<(&mut Self::Act, &mut Self::Full)>,
        next: Option<NextNorm<'_, Self>>,
    ) {
        let &ConvolutionNorm { window, weight, bias, norm: (gamma, beta), inputs, outputs } = convolution;
        assert!(
            self.fuses_convolution(grid, window, inputs, outputs),
            "{window:?} from {inputs} to {outputs} has no kernel"
        );
        let to = grid.through(window);
        let rows = to.rows();
        if rows == 0 {
            return;
        }
        let n = rows * outputs;
        let mut arguments =
            vec![tokens.at(grid.rows() * inputs), weight.at(window.side * window.side * inputs * outputs)];
        arguments.push(bias.map_or(Argument::pointer(0), |bias| bias.at(outputs)));
        arguments.extend([gamma.at(outputs), beta.at(outputs)]);
        let embedding = embedding(window, inputs, outputs);
        let (kernel, windows, threads) = match embedding {
            Some(kernel) => {
                arguments.extend([grid.height, grid.width, to.height, to.width, rows].map(Argument::from));
                kernel
            }
            None => {
                arguments.extend([rows, grid.width, window.side].map(Argument::from));
                (if inputs == 32 { "reduce_tokens_32" } else { "reduce_tokens_64" }, REDUCED, THREADS)
            }
        };
        let [raw, stats] = match kept {
            Some((raw, stats)) => [raw.to(n), stats.to(2 * rows)],
            None => [Argument::pointer(0); 2],
        };
        arguments.extend([raw, y.to(n), stats]);
        // A reduction's kernel of few channels makes no LayerNorm behind y.
        let apart = match embedding {
            Some(_) => {
                arguments.extend(behind(next, rows, outputs));
                None
            }
            None => next,
        };
        self.launch_blocks(kernel, [rows.div_ceil(windows), 1, 1], threads, &arguments);
        self.next_norm(y, rows, outputs, apart);
    }

    /// The embeddings of tokens of SegFormer-B0, and the sequence reduction of its third stage.
    fn fuses_convolution_backward(&self, grid: Grid, window: Window, inputs: usize, outputs: usize) -> bool {
        self.joins(Joint::EmbedTokensBackward) && back_to_tokens(grid, window, inputs, outputs).is_some()
    }

    fn convolution_backward_input(
        &self,
        dy: &Self::Act,
        weight: &Self::Act,
        grid: Grid,
        window: Window,
        inputs: usize,
        outputs: usize,
        dx: &mut Self::Act,
    ) {
        let Some(kernel) = back_to_tokens(grid, window, inputs, outputs) else {
            panic!("{window:?} from {inputs} to {outputs} has no kernel for the way back")
        };
        let to = grid.through(window);
        if to.rows() == 0 {
            return;
        }
        let mut arguments = vec![dy.at(to.rows() * outputs), weight.at(window.side * window.side * inputs * outputs)];
        arguments.extend([grid.height, grid.width, to.height, to.width].map(Argument::from));
        arguments.push(dx.both(grid.rows() * inputs));
        // A tile's blocks, one per band, go side by side: they read the same of dy.
        let blocks = [to.width.div_ceil(ACROSS) * (inputs / BAND), to.height.div_ceil(DOWN), grid.images];
        self.launch_blocks(kernel, blocks, THREADS, &arguments);
    }

    /// The sequence reductions and the embeddings of tokens of SegFormer-B0.
    fn sums_convolution_weight(&self, grid: Grid, window: Window, inputs: usize, outputs: usize) -> bool {
        let reduces = reduction(grid, window, inputs, outputs).is_some();
        let embeds = embedding_weights(grid, window, inputs, outputs).is_some();
        reduces && self.joins(Joint::ReduceTokensBackwardWeights)
            || embeds && self.joins(Joint::EmbedTokensBackwardWeights)
    }

    fn convolution_backward_weight(
        &self,
        tokens: &Self::Act,
        dy: &Self::Act,
        grid: Grid,
        window: Window,
        inputs: usize,
        outputs: usize,
        dw: &mut Self::Full,
    ) {
        let to = grid.through(window);
        if to.rows() == 0 {
            return;
        }
        let own = window.side * window.side * inputs;
        let numbers = own * outputs;
        let mut arguments = vec![tokens.at(grid.rows() * inputs), dy.at(to.rows() * outputs)];
        // Blocks of a share are `tiles`; all shares together are `chunks`.
        let (kernel, tiles, chunks, threads, resident) = match reduction(grid, window, inputs, outputs) {
            Some((kernel, [columns, threads, resident])) => {
                arguments.extend([to.rows(), grid.width, window.side].map(Argument::from));
                (kernel, own.div_ceil(columns), to.rows().div_ceil(WINDOWS), threads, resident)
            }
            None => {
                let Some(kernel) = embedding_weights(grid, window, inputs, outputs) else {
                    panic!("{window:?} from {inputs} to {outputs} has no kernel for the way back")
                };
                arguments.extend([grid.images, grid.height, grid.width, to.height, to.width].map(Argument::from));
                let chunks = to.images * to.height.div_ceil(TALL) * to.width.div_ceil(ACROSS);
                (kernel, outputs / OUTPUTS * (inputs / BAND), chunks, WALKERS, RESIDENT)
            }
        };
        let shares = (resident * MULTIPROCESSORS / tiles).clamp(1, chunks);
        let partial = self.scratch(shares * numbers);
        arguments.push(Argument::partial(partial, shares * numbers));
        self.launch_blocks(kernel, [tiles, shares, 1], threads, &arguments);
        self.sum_partials((partial, shares, numbers), 1, &[ColumnSums { kinds: 1, to: dw.both(numbers), add: true }]);
    }
}
