//! Convolutions over tokens with their LayerNorm in one kernel.

use super::memory::THREADS;
use super::{Argument, Cuda, Device};
use crate::backend::{Convolution, ConvolutionNorm, Grid, Window};

/// Windows of a block of `reduce_tokens`.
const REDUCED: usize = 32;
/// SegFormer's windows from the second embedding on.
const OVERLAPPING: Window = Window { side: 3, stride: 2, padding: 1 };

/// Whether windows share no token, and leave none out.
pub(super) fn tiles(grid: Grid, window: Window) -> bool {
    let whole = [grid.height, grid.width].iter().all(|extent| extent.is_multiple_of(window.side));
    window.stride == window.side && window.padding == 0 && whole
}

/// Name of an embedding's kernel, windows of its blocks, and their threads, as the kernels have them.
fn embedding(window: Window, inputs: usize, outputs: usize) -> Option<(&'static str, usize, usize)> {
    match (window, inputs, outputs) {
        (OVERLAPPING, 32, 64) => Some(("embed_tokens_64", 128, 256)),
        (OVERLAPPING, 64, 160) => Some(("embed_tokens_160", 64, 128)),
        (OVERLAPPING, 160, 256) => Some(("embed_tokens_256", 64, 256)),
        _ => None,
    }
}

impl<D: Device> Convolution for Cuda<D> {
    /// The sequence reductions of SegFormer-B0's first two stages, and its embeddings of tokens.
    fn fuses_convolution(&self, grid: Grid, window: Window, inputs: usize, outputs: usize) -> bool {
        let reduces = matches!(inputs, 32 | 64) && inputs == outputs && tiles(grid, window);
        // Kernels count tokens in 32 bits.
        (reduces || embedding(window, inputs, outputs).is_some()) && grid.rows() <= i32::MAX as usize
    }

    fn convolution_norm(
        &self,
        tokens: &Self::Act,
        grid: Grid,
        convolution: &ConvolutionNorm<'_, Self>,
        y: &mut Self::Act,
        kept: Option<(&mut Self::Act, &mut Self::Full)>,
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
        let (kernel, windows, threads) = match embedding(window, inputs, outputs) {
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
        self.launch_blocks(kernel, [rows.div_ceil(windows), 1, 1], threads, &arguments);
    }
}
