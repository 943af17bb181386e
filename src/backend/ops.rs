//! The operations, grouped as their implementations are.

use crate::Result;

use super::{AdamW, AttentionShape, Dropout, Grid, Product, Sample, Window};

/// Everything the model needs of a device.
pub trait Backend:
    Memory
    + Linear
    + Patches
    + LayerNorm
    + EmbedPixels
    + Attention
    + AttentionBranch
    + AttentionInput
    + AttentionOutput
    + Convolution
    + Depthwise
    + MixFfn
    + MixFfnBackward
    + Residual
    + Resize
    + Head
    + Loss
    + Matrix
    + Optimizer
{
}

impl<B> Backend for B where
    B: Memory
        + Linear
        + Patches
        + LayerNorm
        + EmbedPixels
        + Attention
        + AttentionBranch
        + AttentionInput
        + AttentionOutput
        + Convolution
        + Depthwise
        + MixFfn
        + MixFfnBackward
        + Residual
        + Resize
        + Head
        + Loss
        + Matrix
        + Optimizer
{
}

/// Pictures that are worked on together.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// Pictures; labels may be missing where nobody reads them.
    pub samples: &'a [Sample<'a>],
    /// Step of the random numbers ([`crate::random::Philox`]).
    pub step: u32,
}

/// What changes from one repetition of a piece of work to the next ([`Memory::repeat`]); no operation in it may be given other
/// samples, steps or updates.
#[derive(Clone, Copy, Default)]
pub struct Inputs<'a> {
    /// Batches, each with a step of its own.
    pub batches: &'a [Batch<'a>],
    /// Side of the pictures.
    pub size: usize,
    /// The update.
    pub update: Option<AdamW>,
}

/// Storage, transfers, and how work spreads over the device.
pub trait Memory: Send + Sync + Sized {
    /// Storage of activations and of the weights of products.
    type Act: Send + Sync;
    /// Storage of parameters, gradients, statistics.
    type Full: Send + Sync;
    /// Storage of whole numbers.
    type Counts: Send + Sync;

    /// Zeroed activation storage for `len` numbers.
    fn act(&self, len: usize) -> Self::Act;
    /// Zeroed full-precision storage for `len` numbers.
    fn full(&self, len: usize) -> Self::Full;
    /// Zeroed storage for `len` whole numbers.
    fn counts(&self, len: usize) -> Self::Counts;
    /// Whether everything so far went well. Operations return nothing: a device's first failure is kept, and what follows
    /// it is skipped.
    ///
    /// # Errors
    /// That failure.
    fn check(&self) -> Result<()>;
    /// Bytes handed out so far.
    fn allocated(&self) -> usize;
    /// Copies `from` to the start of `to`.
    fn upload(&self, from: &[f32], to: &mut Self::Full);
    /// Copies `from` to the host.
    fn download(&self, from: &Self::Full) -> Vec<f32>;
    /// Copies the first `len` activations to the host, widened.
    fn download_act(&self, from: &Self::Act, len: usize) -> Vec<f32>;
    /// The first `len` numbers at full precision, for scalars the host decides on (loss, norm).
    fn scalars(&self, from: &Self::Full, len: usize) -> Vec<f64>;
    /// The first `len` whole numbers.
    fn whole(&self, from: &Self::Counts, len: usize) -> Vec<u64>;
    /// Sets everything to zero.
    fn zero(&self, x: &mut Self::Full);
    /// Sets all these to zero.
    fn zero_all(&self, tensors: &mut [&mut Self::Full]);
    /// Parameters as products read them, where that takes no rounding.
    fn unrounded(_: &Self::Full) -> Option<&Self::Act> {
        None
    }
    /// Rounds parameters to the storage of products.
    fn cast(&self, from: &Self::Full, to: &mut Self::Act);

    /// Does `work`, a piece of a step that comes again and again; a device may record it and later repeat the recording, without
    /// calling `work`. Of what its operations are given, it may depend on `key`, on where storage lies ([`Memory::place`], in
    /// the key if it may change), and on `inputs`; nothing in it may read from the device. It may be called twice, of which
    /// one call only records, so that it must leave on the host what it finds there. Within other work that is repeated, it
    /// is a part of that, whose key and inputs must tell all that its own do.
    fn repeat(&self, key: &[u64], inputs: &Inputs<'_>, work: impl FnMut());
    /// Whether the host has nothing to do between the batches of `inputs`, as the device repeats work on all of them by
    /// itself. If not, work on each is better repeated alone.
    fn takes_all(&self, inputs: &Inputs<'_>) -> bool;
    /// Says that another run begins on the same storage, which may do the work of the run before ([`Memory::repeat`]) again: a
    /// device forgets what it recorded of older work, so that it does not pile up.
    fn renew(&self) {}
    /// What a user who looks closer should know of how this device works.
    fn remark(&self) -> Option<String>;
    /// Where storage lies: a number that no other living storage of this backend shares, unless it is empty.
    fn place(&self, x: &Self::Full) -> u64;

    /// Does `work`: forward passes that no backward pass follows, whose products a device may then make less precisely than
    /// gradients would need.
    fn evaluating<R>(&self, work: impl FnOnce() -> R) -> R {
        work()
    }

    /// Pictures that are processed together as one unit when a batch holds `images`.
    fn images_per_unit(&self, images: usize) -> usize;
    /// Whether activations that are cheap to make again are kept for the backward pass all the same: on a device whose time
    /// goes into moving bytes.
    fn remembers(&self) -> bool;
    /// Workers that process units at the same time; each has its own scratch memory.
    fn workers(&self) -> usize;
    /// Calls `work(unit index, unit, slot, worker)` for every unit. Unit u belongs to slot `u % slots.len()`, and the
    /// units of a slot are processed in ascending order, so what a slot sums does not depend on the number of workers.
    fn each_unit<U: Send, S: Send, W: Send>(
        &self,
        units: &mut [U],
        slots: &mut [S],
        workers: &mut [W],
        work: impl Fn(usize, &mut U, &mut S, &mut W) + Sync,
    );
}

/// Products of tokens with weights.
pub trait Linear: Memory {
    /// `y = x·Wᵀ + bias`; with `add`, adds to y.
    fn linear(&self, x: &Self::Act, w: &Self::Act, bias: Option<&Self::Act>, p: Product, y: &mut Self::Act, add: bool);
    /// `dx = dy·W`; with `add`, adds to dx.
    fn linear_backward_input(&self, dy: &Self::Act, w: &Self::Act, p: Product, dx: &mut Self::Act, add: bool);
    /// Adds `dyᵀ·x` to dw.
    fn linear_backward_weight(&self, dy: &Self::Act, x: &Self::Act, p: Product, dw: &mut Self::Full);
    /// Adds the column sums of dy `(rows, outputs)` to db.
    fn linear_backward_bias(&self, dy: &Self::Act, rows: usize, outputs: usize, db: &mut Self::Full);
    /// Both [`Linear::linear_backward_weight`] and [`Linear::linear_backward_bias`].
    fn linear_backward_params(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        p: Product,
        dw: &mut Self::Full,
        db: &mut Self::Full,
    ) {
        self.linear_backward_weight(dy, x, p, dw);
        self.linear_backward_bias(dy, p.rows, p.outputs, db);
    }
}

/// Gathering convolution windows into the rows of a matrix, so that a convolution becomes a product. A row is
/// `(ky, kx, channel)`.
pub trait Patches: Memory {
    /// Augments, normalises (ImageNet) and gathers the pixels of `samples`, each `(size, size, 3)`, into
    /// `(images·windows, side·side·3)`.
    fn pixel_patches(&self, samples: &[Sample<'_>], size: usize, window: Window, out: &mut Self::Act);
    /// Gathers tokens `(grid, channels)` into `(windows, side·side·channels)`.
    fn patches(&self, x: &Self::Act, grid: Grid, channels: usize, window: Window, out: &mut Self::Act);
    /// Adds to dx the gradient of [`Patches::patches`].
    fn patches_backward(&self, dout: &Self::Act, grid: Grid, channels: usize, window: Window, dx: &mut Self::Act);
}

/// What the product in front of a LayerNorm wants of the gradient dx of the LayerNorm's input: the product is the input itself,
/// or a branch added to it.
pub struct InFront<'a, B: Memory> {
    /// Stochastic depth of the branch, over tokens of a grid; receives the product's gradient, `factor(image)·dx`, where that is
    /// wanted. Where there is no stochastic depth, that is dx.
    pub scaled: Option<(Dropout, Grid, Option<&'a mut B::Act>)>,
    /// The column sums of the product's gradient, that of its bias, are added.
    pub bias: Option<&'a mut B::Full>,
}

/// A LayerNorm behind what an operation makes.
pub struct NextNorm<'a, B: Memory> {
    /// Scale and shift.
    pub norm: (&'a B::Full, &'a B::Full),
    /// Receives its output.
    pub out: &'a mut B::Act,
    /// Receives its (mean, 1/std) per row.
    pub stats: &'a mut B::Full,
}

impl<B: Memory> InFront<'_, B> {
    /// Whether the bias's gradient must be summed where dx is made, as what it is summed from is not written.
    pub(super) fn sums_unwritten(&self) -> bool {
        self.bias.is_some() && matches!(self.scaled, Some((.., None)))
    }
}

/// Normalisation over channels (Ba, Kiros, Hinton, "Layer Normalization", 2016), eps 1e-5.
pub trait LayerNorm: Residual {
    /// `y = (x - mean)/sqrt(var + eps)·gamma + beta` per row of `channels`; `stats` receives (mean, 1/std) per row.
    fn layer_norm(
        &self,
        x: &Self::Act,
        gamma: &Self::Full,
        beta: &Self::Full,
        rows: usize,
        channels: usize,
        y: &mut Self::Act,
        stats: &mut Self::Full,
    );
    /// [`Residual::residual`], then LayerNorm of its y to `normed`.
    fn residual_norm(
        &self,
        x: &Self::Act,
        branch: &Self::Act,
        drop: Option<Dropout>,
        grid: Grid,
        channels: usize,
        (gamma, beta): (&Self::Full, &Self::Full),
        y: &mut Self::Act,
        normed: &mut Self::Act,
        stats: &mut Self::Full,
    ) {
        self.residual(x, branch, drop, grid, channels, y);
        self.layer_norm(y, gamma, beta, grid.rows(), channels, normed, stats);
    }
    /// [`LayerNorm::layer_norm`] of y, for what does not make it with y.
    fn next_norm(&self, y: &Self::Act, rows: usize, channels: usize, next: Option<NextNorm<'_, Self>>) {
        if let Some(NextNorm { norm: (gamma, beta), out, stats }) = next {
            self.layer_norm(y, gamma, beta, rows, channels, out, stats);
        }
    }
    /// Gradient towards x; with `add`, adds to dx.
    fn layer_norm_backward(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        stats: &Self::Full,
        gamma: &Self::Full,
        rows: usize,
        channels: usize,
        dx: &mut Self::Act,
        add: bool,
    );
    /// [`LayerNorm::layer_norm_backward`], [`LayerNorm::layer_norm_backward_params`] if asked, and what the product in front
    /// wants, at once.
    fn layer_norm_backward_all(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        stats: &Self::Full,
        gamma: &Self::Full,
        rows: usize,
        channels: usize,
        (dx, add): (&mut Self::Act, bool),
        parameters: Option<(&mut Self::Full, &mut Self::Full)>,
        front: InFront<'_, Self>,
    ) {
        if let Some((dgamma, dbeta)) = parameters {
            self.layer_norm_backward_params(dy, x, stats, rows, channels, dgamma, dbeta);
        }
        self.layer_norm_backward(dy, x, stats, gamma, rows, channels, dx, add);
        let mut room;
        let product = match front.scaled {
            Some((.., None)) if front.bias.is_none() => return,
            Some((drop, grid, scaled)) => {
                let scaled = match scaled {
                    Some(scaled) => scaled,
                    None => {
                        room = self.act(rows * channels);
                        &mut room
                    }
                };
                self.drop_path(dx, drop, grid, channels, scaled);
                &*scaled
            }
            None => &*dx,
        };
        if let Some(bias) = front.bias {
            self.linear_backward_bias(product, rows, channels, bias);
        }
    }
    /// Adds the gradients of gamma and beta.
    fn layer_norm_backward_params(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        stats: &Self::Full,
        rows: usize,
        channels: usize,
        dgamma: &mut Self::Full,
        dbeta: &mut Self::Full,
    );
}

/// The first patch embedding, a convolution over pixels and its LayerNorm, without gathered patches. A backend that cannot do
/// so, or not at every shape, leaves it to [`Patches::pixel_patches`] and a product; nothing else is called then. Sides of
/// pictures are multiples of 4.
pub trait EmbedPixels: Memory {
    /// Whether there is such a way.
    fn embeds_pixels(&self, _window: Window, _channels: usize) -> bool {
        false
    }
    /// `y = layer_norm(raw)` with scale and shift `(gamma, beta)`, where raw is the convolution `(images·windows, channels)` of
    /// the pixels of `samples`, with weights and bias `(w, bias)`; `kept` receives raw and its (mean, 1/std) per row. And the
    /// LayerNorm behind y.
    fn embed_pixels(
        &self,
        _samples: &[Sample<'_>],
        _size: usize,
        _window: Window,
        _convolution: (&Self::Act, Option<&Self::Act>),
        _norm: (&Self::Full, &Self::Full),
        _channels: usize,
        _y: &mut Self::Act,
        _kept: Option<(&mut Self::Act, &mut Self::Full)>,
        _next: Option<NextNorm<'_, Self>>,
    ) {
        unreachable!("this backend gathers patches")
    }
    /// Adds the gradient of w, from that of raw.
    fn embed_pixels_backward(
        &self,
        _samples: &[Sample<'_>],
        _size: usize,
        _window: Window,
        _draw: &Self::Act,
        _channels: usize,
        _dw: &mut Self::Full,
    ) {
        unreachable!("this backend gathers patches")
    }
}

/// What the way back through a softmax takes off every score's gradient before it is multiplied with the probability: the sums
/// of an output's products with its gradient, over the channels of each head.
pub enum Deltas<'a, B: Memory> {
    /// To be made of the output, laid out as queries are.
    Of(&'a B::Act),
    /// Made before, `(images, heads, queries)`.
    Made(&'a B::Full),
}

impl<B: Memory> Clone for Deltas<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Memory> Copy for Deltas<'_, B> {}

/// Scaled dot-product attention (Vaswani et al., 2017).
pub trait Attention: Linear {
    /// `o = softmax(q·kᵀ/sqrt(head))·v` per head; `lse` receives the logarithm of each softmax denominator,
    /// `(images, heads, queries)`, of the scaled scores.
    fn attention(
        &self,
        q: &Self::Act,
        k: &Self::Act,
        v: &Self::Act,
        shape: AttentionShape,
        o: &mut Self::Act,
        lse: &mut Self::Full,
    );
    /// Gradients of q, k and v; probabilities are recomputed from `lse`. Made before are only sums of
    /// [`AttentionOutput::attention_output_backward`].
    fn attention_backward(
        &self,
        q: &Self::Act,
        k: &Self::Act,
        v: &Self::Act,
        deltas: Deltas<'_, Self>,
        lse: &Self::Full,
        d_o: &Self::Act,
        shape: AttentionShape,
        dq: &mut Self::Act,
        dk: &mut Self::Act,
        dv: &mut Self::Act,
    );
    /// Adds the column sums of dk, `(rows, channels)`, which are the gradient of a constant added to all keys. It moves all scores of
    /// a query alike, which softmax ignores, so they are zero but for rounding, and a backend may leave them out.
    fn key_shift_gradient(&self, dk: &Self::Act, rows: usize, channels: usize, db: &mut Self::Full) {
        self.linear_backward_bias(dk, rows, channels, db);
    }
}

/// The products around attention: `(channels, channels)` each, with a bias.
pub struct AttentionWeights<'a, B: Memory> {
    /// Of the queries.
    pub query: (&'a B::Act, Option<&'a B::Act>),
    /// Of the outputs.
    pub output: (&'a B::Act, Option<&'a B::Act>),
}

/// What the queries' side of attention leaves.
pub struct AttentionOutputs<'a, B: Memory> {
    /// The residual stream.
    pub y: &'a mut B::Act,
    /// Queries, outputs in front of the output product, and logarithms of the softmax denominators
    /// `(images, heads, queries)`, if wanted.
    pub kept: Option<(&'a mut B::Act, &'a mut B::Act, &'a mut B::Full)>,
}

/// The queries' side of attention as one operation.
pub trait AttentionBranch: Attention + Residual {
    /// Whether there is such an operation, however many images; `keep`: with what a backward pass needs.
    fn fuses_attention(&self, _shape: AttentionShape, _keep: bool) -> bool {
        false
    }
    /// `y = x + factor(image)·(attention(normed·Wqᵀ + b, k, v)·Woᵀ + b)`. The same as [`Linear::linear`],
    /// [`Attention::attention`], [`Linear::linear`] and [`Residual::residual`].
    fn attention_branch(
        &self,
        _x: &Self::Act,
        _normed: &Self::Act,
        _k: &Self::Act,
        _v: &Self::Act,
        _shape: AttentionShape,
        _weights: &AttentionWeights<'_, Self>,
        _drop: Option<Dropout>,
        _outputs: AttentionOutputs<'_, Self>,
    ) {
        unreachable!("this backend has the parts alone")
    }
    /// That y again, to the bit, from the outputs `o` it kept: where a backward pass needs it, and it was not.
    fn attention_join(
        &self,
        _x: &Self::Act,
        _o: &Self::Act,
        _shape: AttentionShape,
        _output: (&Self::Act, Option<&Self::Act>),
        _drop: Option<Dropout>,
        _y: &mut Self::Act,
    ) {
        unreachable!("this backend has the parts alone, or keeps nothing")
    }
}

/// The middle of a Mix-FFN: depth-wise 3x3 convolution with zero padding, bias, GELU in its erf form (Hendrycks and
/// Gimpel, 2016).
pub trait Depthwise: Linear {
    /// `g = gelu(conv(h) + b)`; w is `(9, channels)`.
    fn depthwise_gelu(
        &self,
        h: &Self::Act,
        w: &Self::Full,
        b: &Self::Full,
        grid: Grid,
        channels: usize,
        g: &mut Self::Act,
    );
    /// Turns `d`, the gradient of g, into that before the GELU; its column sums, the gradient of b, are added to `db`, and `g`
    /// receives the forward output again, each if it is wanted.
    fn depthwise_gelu_backward(
        &self,
        h: &Self::Act,
        w: &Self::Full,
        b: &Self::Full,
        grid: Grid,
        channels: usize,
        d: &mut Self::Act,
        g: Option<&mut Self::Act>,
        db: Option<&mut Self::Full>,
    );
    /// From `du`, the gradient before the GELU: `dh` receives the gradient of h, that of w is added to `dw`, each if it is wanted.
    /// With dh, its column sums, the gradient of a bias in front of h, are added to `shift`.
    fn depthwise_backward(
        &self,
        du: &Self::Act,
        h: &Self::Act,
        w: &Self::Full,
        grid: Grid,
        channels: usize,
        dh: Option<&mut Self::Act>,
        dw: Option<&mut Self::Full>,
        shift: Option<&mut Self::Full>,
    );
}

/// What a Mix-FFN computes with.
pub struct FfnWeights<'a, B: Memory> {
    /// Scale and shift of the LayerNorm in front.
    pub norm: (&'a B::Full, &'a B::Full),
    /// Expansion `(hidden, channels)`, and its bias.
    pub expand: (&'a B::Act, Option<&'a B::Act>),
    /// Depth-wise weights `(9, hidden)`, and their bias.
    pub mix: (&'a B::Full, &'a B::Full),
    /// Contraction `(channels, hidden)`, and its bias.
    pub contract: (&'a B::Act, Option<&'a B::Act>),
    /// Scale and shift of the LayerNorm behind.
    pub next: (&'a B::Full, &'a B::Full),
    /// Channels.
    pub channels: usize,
    /// Hidden channels.
    pub hidden: usize,
}

/// What a Mix-FFN leaves.
pub struct FfnOutputs<'a, B: Memory> {
    /// The residual stream.
    pub y: &'a mut B::Act,
    /// What the LayerNorm behind makes of y, and its (mean, 1/std) per row.
    pub next: (&'a mut B::Act, &'a mut B::Full),
    /// (mean, 1/std) per row of the LayerNorm in front.
    pub stats: &'a mut B::Full,
    /// Output of the LayerNorm in front, if wanted.
    pub normed: Option<&'a mut B::Act>,
    /// Output of the expansion, if wanted.
    pub h: Option<&'a mut B::Act>,
}

/// The Mix-FFN as one operation.
pub trait MixFfn: Depthwise + LayerNorm {
    /// Whether there is such an operation.
    fn fuses_mix_ffn(&self, _channels: usize, _hidden: usize) -> bool {
        false
    }
    /// `y = x + factor(image)·ffn(layer_norm(x))`, and the LayerNorm behind. The same as [`LayerNorm::layer_norm`],
    /// [`Linear::linear`], [`Depthwise::depthwise_gelu`], [`Linear::linear`] and [`LayerNorm::residual_norm`]; called where the
    /// backend fuses them.
    fn mix_ffn(
        &self,
        _x: &Self::Act,
        _grid: Grid,
        _weights: &FfnWeights<'_, Self>,
        _drop: Option<Dropout>,
        _outputs: FfnOutputs<'_, Self>,
    ) {
        unreachable!("this backend has the parts alone")
    }
}

/// Weights of a Mix-FFN between its LayerNorm and its residual.
pub struct MixFfnWeights<'a, B: Memory> {
    /// `(hidden, channels)`
    pub expand: &'a B::Act,
    /// Depth-wise, `(9, hidden)`.
    pub mix: &'a B::Full,
    /// Of the depth-wise convolution, `(hidden)`.
    pub mix_bias: &'a B::Full,
    /// `(channels, hidden)`
    pub contract: &'a B::Act,
}

/// The gradients of a Mix-FFN's weights that are summed on the way back.
pub struct MixFfnParts<'a, B: Memory> {
    /// Those of the depth-wise weights, of their bias, and of the expansion's bias are added.
    pub sums: Option<[&'a mut B::Full; 3]>,
    /// That of the contraction's weights, `(channels, hidden)`, is added.
    pub contract: Option<&'a mut B::Full>,
    /// For that of the expansion's weights.
    pub expand: Option<MixFfnExpansion<'a, B>>,
}

/// How a Mix-FFN's way back leaves the gradient of the expansion's weights.
pub enum MixFfnExpansion<'a, B: Memory> {
    /// Added, where the operation [sums it](MixFfnBackward::sums_mix_ffn_expansion).
    Summed {
        /// The expansion's input, `(tokens, channels)`.
        normed: &'a B::Act,
        /// `(hidden, channels)`
        dw: &'a mut B::Full,
    },
    /// To a product: this receives the gradient of the expansion's output, `(tokens, hidden)`.
    Product(&'a mut B::Act),
}

/// The way back through a Mix-FFN as one operation, on a device where moving the hidden tensors is what takes the time.
pub trait MixFfnBackward: Depthwise {
    /// Whether [`MixFfnBackward::mix_ffn_backward`] does this shape.
    fn joins_mix_ffn_backward(&self, _grid: Grid, _channels: usize, _hidden: usize) -> bool {
        false
    }
    /// Whether it sums the gradient of the expansion's weights, too.
    fn sums_mix_ffn_expansion(&self, _channels: usize) -> bool {
        false
    }
    /// From `d`, the gradient of the stream behind, which counts by the factors of `drop`, and `h`, the expansion's output, to
    /// `dx`, the gradient of the expansion's input; `d` and `dx` are `(tokens, channels)`. The same as [`Residual::drop_path`],
    /// [`Linear::linear_backward_input`], [`Depthwise::depthwise_gelu_backward`], [`Depthwise::depthwise_backward`] and
    /// [`Linear::linear_backward_input`].
    fn mix_ffn_backward(
        &self,
        _d: &Self::Act,
        _drop: Option<Dropout>,
        _h: &Self::Act,
        _weights: MixFfnWeights<'_, Self>,
        _grid: Grid,
        _channels: usize,
        _hidden: usize,
        _dx: &mut Self::Act,
        _parts: MixFfnParts<'_, Self>,
    ) {
        unreachable!("a backend that joins operations has the joint one");
    }
}

/// A convolution over tokens and the LayerNorm behind it.
pub struct ConvolutionNorm<'a, B: Memory> {
    /// Geometry of the convolution.
    pub window: Window,
    /// Its weights `(outputs, side²·inputs)`.
    pub weight: &'a B::Act,
    /// Its bias.
    pub bias: Option<&'a B::Act>,
    /// Scale and shift of the LayerNorm.
    pub norm: (&'a B::Full, &'a B::Full),
    /// Channels of the tokens.
    pub inputs: usize,
    /// Channels that come out.
    pub outputs: usize,
}

/// A convolution over tokens with its LayerNorm as one operation, without gathered patches.
pub trait Convolution: LayerNorm + Patches {
    /// Whether [`Convolution::convolution_norm`] does tokens of a grid and a convolution from `inputs` channels to `outputs`.
    fn fuses_convolution(&self, _grid: Grid, _window: Window, _inputs: usize, _outputs: usize) -> bool {
        false
    }
    /// `y = layer_norm(raw)`, where raw `(windows, outputs)` is the convolution of `tokens` `(grid, inputs)`; `kept` receives raw
    /// and its (mean, 1/std) per row. And the LayerNorm behind y. The same as [`Patches::patches`], [`Linear::linear`],
    /// [`LayerNorm::layer_norm`] and [`LayerNorm::next_norm`].
    fn convolution_norm(
        &self,
        _tokens: &Self::Act,
        _grid: Grid,
        _convolution: &ConvolutionNorm<'_, Self>,
        _y: &mut Self::Act,
        _kept: Option<(&mut Self::Act, &mut Self::Full)>,
        _next: Option<NextNorm<'_, Self>>,
    ) {
        unreachable!("this backend gathers patches")
    }
    /// Whether [`Convolution::convolution_backward_input`] does such a convolution.
    fn fuses_convolution_backward(&self, _grid: Grid, _window: Window, _inputs: usize, _outputs: usize) -> bool {
        false
    }
    /// Adds to dx `(grid, inputs)` the gradient of a convolution's input; dy `(windows, outputs)` is that of what it made, `weight`
    /// `(outputs, side²·inputs)`. The same as [`Linear::linear_backward_input`] and [`Patches::patches_backward`].
    fn convolution_backward_input(
        &self,
        _dy: &Self::Act,
        _weight: &Self::Act,
        _grid: Grid,
        _window: Window,
        _inputs: usize,
        _outputs: usize,
        _dx: &mut Self::Act,
    ) {
        unreachable!("this backend gathers patches")
    }
    /// Whether [`Convolution::convolution_backward_weight`] does.
    fn sums_convolution_weight(&self, _grid: Grid, _window: Window, _inputs: usize, _outputs: usize) -> bool {
        false
    }
    /// Adds to dw `(outputs, side²·inputs)` the gradient of a convolution's weights over `tokens` `(grid, inputs)`; dy
    /// `(windows, outputs)` is that of what it made. The same as [`Patches::patches`] and [`Linear::linear_backward_weight`].
    fn convolution_backward_weight(
        &self,
        _tokens: &Self::Act,
        _dy: &Self::Act,
        _grid: Grid,
        _window: Window,
        _inputs: usize,
        _outputs: usize,
        _dw: &mut Self::Full,
    ) {
        unreachable!("this backend gathers patches")
    }
}

/// A LayerNorm as the way back takes it.
pub struct NormBack<'a, B: Memory> {
    /// The gradient of its output, `(rows, channels)`.
    pub dy: &'a B::Act,
    /// Its input.
    pub x: &'a B::Act,
    /// Its (mean, 1/std) per row.
    pub stats: &'a B::Full,
    /// Its scale.
    pub gamma: &'a B::Full,
}

/// The way back through attention's output product, and the LayerNorm behind the branch, as one operation, on a device where moving
/// tokens is what takes the time.
pub trait AttentionOutput: Attention + LayerNorm + Linear {
    /// Whether [`AttentionOutput::attention_output_backward`] does this shape.
    fn joins_attention_output(&self, _shape: AttentionShape) -> bool {
        false
    }
    /// Adds to `d`, the gradient of the residual stream behind the LayerNorm `norm`, what that makes of it, and goes on
    /// through the branch that was added to the stream in front, with its stochastic depth, the product of `o` with
    /// `weight`, `(channels, channels)`: the gradient of o, `d_o`; the [sums](Deltas::Made) of both's products; the weight's
    /// gradient, which is added to `dw`; and, if wanted, those of the LayerNorm's scale and shift, and of the product's bias.
    /// The same as [`LayerNorm::layer_norm_backward_all`], [`Linear::linear_backward_weight`] and
    /// [`Linear::linear_backward_input`] but for the sums.
    fn attention_output_backward(
        &self,
        _norm: NormBack<'_, Self>,
        _drop: Option<Dropout>,
        _o: &Self::Act,
        _weight: &Self::Act,
        _shape: AttentionShape,
        _d: &mut Self::Act,
        _d_o: &mut Self::Act,
        _deltas: &mut Self::Full,
        _dw: &mut Self::Full,
        _parameters: Option<(&mut Self::Full, &mut Self::Full)>,
        _bias: Option<&mut Self::Full>,
    ) {
        unreachable!("a backend that joins operations has the joint one");
    }
}

/// What [`AttentionInput::attention_input_backward`] goes back through.
pub struct AttentionInputs<'a, B: Memory> {
    /// Q's weight, `(channels, channels)`.
    pub query: &'a B::Act,
    /// The sequence reduction's, `(channels, side²·channels)`.
    pub reduction: &'a B::Act,
    /// Its geometry.
    pub window: Window,
    /// The LayerNorm's input `(grid, channels)`.
    pub x: &'a B::Act,
    /// Its (mean, 1/std) per row.
    pub stats: &'a B::Full,
    /// Its scale and shift.
    pub affine: (&'a B::Full, &'a B::Full),
    /// Channels.
    pub channels: usize,
}

/// The way back from queries and reduced tokens to the residual stream as one operation, on a device where moving tokens is what
/// takes the time.
pub trait AttentionInput: LayerNorm + Patches {
    /// Whether [`AttentionInput::attention_input_backward`] does this shape.
    fn joins_attention_input(&self, _grid: Grid, _channels: usize, _window: Window) -> bool {
        false
    }
    /// Whether it sums the gradients of Q's weight and bias, too, where it sums those of the LayerNorm's parameters.
    fn sums_attention_query(&self, _channels: usize) -> bool {
        false
    }
    /// From `dq`, the gradient of Q `(grid, channels)`, and `dreduced`, that of what the sequence reduction made
    /// `(windows, channels)`, to that of the stream, which is added to `dx`. The same as [`Linear::linear_backward_input`] of
    /// both, [`Patches::patches_backward`] and [`LayerNorm::layer_norm_backward_all`]; and as
    /// [`Linear::linear_backward_params`] of Q, if asked, which is only where it [sums](AttentionInput::sums_attention_query) them.
    fn attention_input_backward(
        &self,
        _dq: &Self::Act,
        _dreduced: &Self::Act,
        _inputs: &AttentionInputs<'_, Self>,
        _grid: Grid,
        _dx: &mut Self::Act,
        _parameters: Option<(&mut Self::Full, &mut Self::Full)>,
        _query: Option<(&mut Self::Full, &mut Self::Full)>,
        _front: InFront<'_, Self>,
    ) {
        unreachable!("a backend that joins operations has the joint one");
    }
}

/// Additions along the residual stream, with stochastic depth (Huang et al., 2016).
pub trait Residual: Linear {
    /// `y = x + factor(image)·branch`, one factor per image; without `drop`, the factor is 1.
    fn residual(
        &self,
        x: &Self::Act,
        branch: &Self::Act,
        drop: Option<Dropout>,
        grid: Grid,
        channels: usize,
        y: &mut Self::Act,
    );
    /// `y = x + input·Wᵀ + bias`, where no depth is dropped; `room` is `(rows, outputs)`.
    fn linear_residual(
        &self,
        x: &Self::Act,
        input: &Self::Act,
        w: &Self::Act,
        bias: Option<&Self::Act>,
        p: Product,
        room: &mut Self::Act,
        y: &mut Self::Act,
    ) {
        self.linear(input, w, bias, p, room, false);
        let grid = Grid { images: 1, height: p.rows, width: 1 };
        self.residual(x, room, None, grid, p.outputs, y);
    }
    /// `y = factor(image)·x`.
    fn drop_path(&self, x: &Self::Act, drop: Dropout, grid: Grid, channels: usize, y: &mut Self::Act);
    /// `y = factor(element)·x`.
    fn dropout(&self, x: &Self::Act, drop: Dropout, len: usize, y: &mut Self::Act);
    /// Adds the first `len` numbers of x to y.
    fn accumulate(&self, x: &Self::Act, len: usize, y: &mut Self::Act);
}

/// Bilinear interpolation with half-pixel centres (`align_corners = false`).
pub trait Resize: Memory {
    /// Adds x `(from, channels)`, resized to `to`, to y; with `add` false, overwrites y.
    fn upsample(&self, x: &Self::Act, from: Grid, to: Grid, channels: usize, y: &mut Self::Act, add: bool);
    /// `dx`: the transpose of [`Resize::upsample`] applied to dy.
    fn upsample_backward(&self, dy: &Self::Act, from: Grid, to: Grid, channels: usize, dx: &mut Self::Act);
}

/// How the head normalises: statistics of the batch, in training, or running estimates.
pub struct BatchNormView<'a, F> {
    /// `(2, channels)`: means, then inverse standard deviations.
    pub stats: &'a F,
    /// Scale.
    pub gamma: &'a F,
    /// Shift.
    pub beta: &'a F,
}

impl<F> Clone for BatchNormView<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for BatchNormView<'_, F> {}

/// The product at the end of the decoder.
pub struct Classifier<'a, B: Memory> {
    /// `(labels, channels)`
    pub weight: &'a B::Act,
    /// `(labels)`
    pub bias: &'a B::Act,
    /// Classes.
    pub labels: usize,
}

impl<B: Memory> Clone for Classifier<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Memory> Copy for Classifier<'_, B> {}

/// The product that makes z of the first stage, which stands at the logits' resolution.
pub struct FirstStage<'a, B: Memory> {
    /// `(rows, inputs)`
    pub tokens: &'a B::Act,
    /// `(channels, inputs)`
    pub weight: &'a B::Act,
    /// `(channels)`
    pub bias: Option<&'a B::Act>,
    /// Channels of the stage.
    pub inputs: usize,
}

impl<B: Memory> Clone for FirstStage<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Memory> Copy for FirstStage<'_, B> {}

impl<B: Linear> FirstStage<'_, B> {
    /// Writes z `(rows, channels)`.
    pub(super) fn multiply(&self, backend: &B, rows: usize, channels: usize, z: &mut B::Act) {
        let product = Product { rows, inputs: self.inputs, outputs: channels };
        backend.linear(self.tokens, self.weight, self.bias, product, z, false);
    }
}

/// The way back through the product of [`FirstStage`].
pub struct FirstGradient<'a, B: Memory> {
    /// `(channels, inputs)`
    pub weight: &'a B::Act,
    /// Channels of the stage.
    pub inputs: usize,
    /// Receives the tokens' gradient, `dz·weight`, `(rows, inputs)`, if that is wanted.
    pub tokens: Option<&'a mut B::Act>,
    /// Tokens `(rows, inputs)`, and what the weight's gradient, `dzᵀ·tokens`, is added to, if that is wanted.
    pub sum: Option<(&'a B::Act, &'a mut B::Full)>,
}

impl<B: Linear> FirstGradient<'_, B> {
    /// Of dz `(rows, channels)`.
    pub(super) fn multiply(self, backend: &B, rows: usize, channels: usize, dz: &B::Act) {
        let product = Product { rows, inputs: self.inputs, outputs: channels };
        if let Some(dtokens) = self.tokens {
            backend.linear_backward_input(dz, self.weight, product, dtokens, false);
        }
        if let Some((tokens, dw)) = self.sum {
            backend.linear_backward_weight(dz, tokens, product, dw);
        }
    }
}

/// What one pass over z, from BatchNorm to the logits or back, reads.
pub struct HeadPass<'a, B: Memory> {
    /// `(rows, channels)`
    pub z: &'a B::Act,
    /// How z is normalised.
    pub norm: BatchNormView<'a, B::Full>,
    /// Dropout before the classifier.
    pub drop: Option<Dropout>,
    /// Tokens.
    pub rows: usize,
    /// Channels of the decoder.
    pub channels: usize,
    /// The classifier.
    pub classifier: Classifier<'a, B>,
}

impl<B: Memory> HeadPass<'_, B> {
    /// The classifier's sizes.
    fn product(&self) -> Product {
        Product { rows: self.rows, inputs: self.channels, outputs: self.classifier.labels }
    }
}

impl<B: Memory> Clone for HeadPass<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Memory> Copy for HeadPass<'_, B> {}

/// The end of the decoder: stages joined → BatchNorm (Ioffe and Szegedy, 2015; eps 1e-5) → ReLU → dropout → classifier.
///
/// The operations named after joining and classifying consist of the others; their plain forms are what a backend that
/// fuses them is tested against.
pub trait Head: Resize + Linear {
    /// z `(to, channels)` of `first`, or without it as it is, and of `parts`, each resized to `to` and added; then measures it
    /// as [`Head::batch_moments`] does, if asked.
    fn join_stages(
        &self,
        first: Option<FirstStage<'_, Self>>,
        parts: &[(&Self::Act, Grid)],
        to: Grid,
        channels: usize,
        z: &mut Self::Act,
        moments: Option<&mut Self::Full>,
    ) {
        if let Some(first) = first {
            first.multiply(self, to.rows(), channels, z);
        }
        for (part, from) in parts {
            self.upsample(part, *from, to, channels, z, true);
        }
        if let Some(moments) = moments {
            self.batch_moments(z, to.rows(), channels, moments);
        }
    }
    /// Whether [`Head::classify_stages`] does these sizes, with a first stage of `inputs` channels, without z and room.
    fn classifies_stages(&self, _inputs: usize, _parts: &[Grid], _to: Grid, _channels: usize, _labels: usize) -> bool {
        false
    }
    /// From the stages to the logits in evaluation: z, [`Head::join_stages`], then [`Head::classify`] without dropout. z
    /// comes from `first`, or without it holds the first stage's part, and may be used up; `room` is `(to, channels)`. Both may
    /// be empty where there is a `first` and [`Head::classifies_stages`] says so.
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
        classify_stages_plainly(self, first, parts, to, channels, z, norm, classifier, room, logits);
    }
    /// The transpose of the resizing in [`Head::join_stages`]: each of `parts` receives the gradient at its grid.
    fn split_stages(&self, dz: &Self::Act, from: Grid, channels: usize, parts: &mut [(&mut Self::Act, Grid)]) {
        split_stages_plainly(self, dz, from, channels, parts);
    }
    /// Room for what [`Head::classify`] notes of which activations pass ReLU and dropout, for the passes behind it to read:
    /// empty where they find out again.
    fn passed(&self, _rows: usize, _channels: usize, _labels: usize) -> Self::Act {
        self.act(0)
    }
    /// `logits = classifier(dropout(relu(batch_norm(z))))`; `room` is `(rows, channels)`, and
    /// [`Head::classify_backward`] wants it as it was left. `passed`, of [`Head::passed`], may be empty where no pass back
    /// follows.
    fn classify(
        &self,
        head: HeadPass<'_, Self>,
        room: &mut Self::Act,
        _passed: &mut Self::Act,
        logits: &mut Self::Act,
    ) {
        classify_plainly(self, head, room, logits);
    }
    /// Adds the gradient of the classifier's weight, and writes what [`Head::head_backward`] writes to `sums`.
    fn classify_backward(
        &self,
        head: HeadPass<'_, Self>,
        _passed: &Self::Act,
        dlogits: &Self::Act,
        room: &mut Self::Act,
        weight_gradient: Option<&mut Self::Full>,
        sums: &mut Self::Full,
    ) {
        classify_backward_plainly(self, head, dlogits, room, weight_gradient, sums);
    }
    /// dz `(rows, channels)` from the logits' gradient, and what `first` wants of it; `total` those sums added up over
    /// so many rows, `sums` is room.
    fn classify_backward_input(
        &self,
        head: HeadPass<'_, Self>,
        _passed: &Self::Act,
        dlogits: &Self::Act,
        total: (&Self::Full, usize),
        sums: &mut Self::Full,
        dz: &mut Self::Act,
        first: Option<FirstGradient<'_, Self>>,
    ) {
        classify_backward_input_plainly(self, head, dlogits, total, sums, dz, first);
    }

    /// Adds the column sums of dz over a whole batch, which are the gradient of a constant added to z. BatchNorm takes that away
    /// again, so they are zero but for rounding, and a backend may leave them out.
    fn shift_gradient(&self, dz: &Self::Act, rows: usize, channels: usize, db: &mut Self::Full) {
        self.linear_backward_bias(dz, rows, channels, db);
    }

    /// Measures z `(rows, channels)`: `moments` receives, per channel, the mean and then (from `channels` on) the sum of
    /// squared deviations from it.
    fn batch_moments(&self, z: &Self::Act, rows: usize, channels: usize, moments: &mut Self::Full);
    /// Joins the moments of units with `rows[u]` rows each (Chan, Golub, LeVeque, 1979) to `stats` (mean, 1/std), and
    /// moves the running mean and (unbiased) variance by `momentum`.
    fn batch_stats(
        &self,
        moments: &[&Self::Full],
        rows: &[usize],
        channels: usize,
        momentum: f64,
        stats: &mut Self::Full,
        running_mean: &mut Self::Full,
        running_var: &mut Self::Full,
    );
    /// `stats` (mean, 1/std) from running estimates.
    fn running_stats(
        &self,
        running_mean: &Self::Full,
        running_var: &Self::Full,
        channels: usize,
        stats: &mut Self::Full,
    );
    /// `a = dropout(relu(batch_norm(z)))`.
    fn head_activation(
        &self,
        z: &Self::Act,
        norm: BatchNormView<'_, Self::Full>,
        drop: Option<Dropout>,
        rows: usize,
        channels: usize,
        a: &mut Self::Act,
    );
    /// Turns `da`, the gradient after dropout, into the gradient after BatchNorm, in place, and writes per channel the sums
    /// of it and of its product with the normalised z to `sums`.
    fn head_backward(
        &self,
        z: &Self::Act,
        norm: BatchNormView<'_, Self::Full>,
        drop: Option<Dropout>,
        rows: usize,
        channels: usize,
        da: &mut Self::Act,
        sums: &mut Self::Full,
    );
    /// Gradient of BatchNorm in training mode towards z, in place in `dy`; `total` is the gradient of (beta, gamma)
    /// over `batch_rows` rows.
    fn batch_norm_backward(
        &self,
        z: &Self::Act,
        norm: BatchNormView<'_, Self::Full>,
        total: &Self::Full,
        batch_rows: usize,
        rows: usize,
        channels: usize,
        dy: &mut Self::Act,
    );
}

/// [`Head::classify_stages`] by its parts.
pub(super) fn classify_stages_plainly<B: Head>(
    backend: &B,
    first: Option<FirstStage<'_, B>>,
    parts: &[(&B::Act, Grid)],
    to: Grid,
    channels: usize,
    z: &mut B::Act,
    norm: BatchNormView<'_, B::Full>,
    classifier: Classifier<'_, B>,
    room: &mut B::Act,
    logits: &mut B::Act,
) {
    backend.join_stages(first, parts, to, channels, z, None);
    backend.classify(
        HeadPass { z, norm, drop: None, rows: to.rows(), channels, classifier },
        room,
        &mut backend.act(0),
        logits,
    );
}

/// [`Head::split_stages`] by its parts.
pub(super) fn split_stages_plainly<B: Head>(
    backend: &B,
    dz: &B::Act,
    from: Grid,
    channels: usize,
    parts: &mut [(&mut B::Act, Grid)],
) {
    for (part, grid) in parts {
        backend.upsample_backward(dz, *grid, from, channels, part);
    }
}

/// [`Head::classify`] by its parts.
pub(super) fn classify_plainly<B: Head>(backend: &B, head: HeadPass<'_, B>, room: &mut B::Act, logits: &mut B::Act) {
    let HeadPass { z, norm, drop, rows, channels, classifier } = head;
    backend.head_activation(z, norm, drop, rows, channels, room);
    backend.linear(room, classifier.weight, Some(classifier.bias), head.product(), logits, false);
}

/// [`Head::classify_backward`] by its parts.
pub(super) fn classify_backward_plainly<B: Head>(
    backend: &B,
    head: HeadPass<'_, B>,
    dlogits: &B::Act,
    room: &mut B::Act,
    weight_gradient: Option<&mut B::Full>,
    sums: &mut B::Full,
) {
    let HeadPass { z, norm, drop, rows, channels, classifier } = head;
    let product = head.product();
    if let Some(dw) = weight_gradient {
        backend.linear_backward_weight(dlogits, room, product, dw);
    }
    backend.linear_backward_input(dlogits, classifier.weight, product, room, false);
    backend.head_backward(z, norm, drop, rows, channels, room, sums);
}

/// [`Head::classify_backward_input`] by its parts.
pub(super) fn classify_backward_input_plainly<B: Head>(
    backend: &B,
    head: HeadPass<'_, B>,
    dlogits: &B::Act,
    (total, batch_rows): (&B::Full, usize),
    sums: &mut B::Full,
    dz: &mut B::Act,
    first: Option<FirstGradient<'_, B>>,
) {
    let HeadPass { z, norm, drop, rows, channels, classifier } = head;
    backend.linear_backward_input(dlogits, classifier.weight, head.product(), dz, false);
    backend.head_backward(z, norm, drop, rows, channels, dz, sums);
    backend.batch_norm_backward(z, norm, total, batch_rows, rows, channels, dz);
    if let Some(first) = first {
        first.multiply(backend, rows, channels, dz);
    }
}

/// What the loss leaves on the device: numbers per image.
pub trait Loss: Memory {
    /// Cross-entropy of logits `(from, labels)`, upsampled to the samples' `size`², against their labels; pixels whose label
    /// is not one of `labels` do not count. Adds to `out`, per image, `scale` times the loss summed over its pixels.
    /// `gradient` receives the gradient of the same quantity at logit resolution.
    fn cross_entropy(
        &self,
        logits: &Self::Act,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        scale: f64,
        out: &mut Self::Full,
        gradient: Option<&mut Self::Act>,
    );
    /// Confusion counts per image, `counts[image][truth·labels + prediction]`, of the upsampled logits' first largest class.
    fn confusion(
        &self,
        logits: &Self::Act,
        from: Grid,
        labels: usize,
        samples: &[Sample<'_>],
        size: usize,
        counts: &mut Self::Counts,
    );
    /// Copies what `images` pictures left, `loss` and `counts`, `labels²` each, to a log of many, from image `at` on.
    fn note(
        &self,
        loss: &Self::Full,
        counts: &Self::Counts,
        images: usize,
        labels: usize,
        at: usize,
        all_losses: &mut Self::Full,
        all_counts: &mut Self::Counts,
    );
}

/// Which operand of a small matrix product is read transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transpose {
    /// `a·b`
    None,
    /// `aᵀ·b`
    Left,
    /// `a·bᵀ`
    Right,
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub enum Base<'a, F> {
    /// Nothing.
    Zeros,
    /// What stands where it goes.
    Itself,
    /// Another matrix, `(m, n)`.
    Of(&'a F),
}

/// A product among parameters: `c = base + alpha·op(a)·op(b)`.
pub struct SmallProduct<'a, F, A> {
    /// `(m, k)`, or `(k, m)` if read transposed.
    pub a: &'a F,
    /// `(k, n)`, or `(n, k)` if read transposed.
    pub b: &'a F,
    /// Which of the two is read transposed.
    pub transpose: Transpose,
    /// m, n, k.
    pub size: (usize, usize, usize),
    /// `(1)`, the factor of the product; none is 1.
    pub alpha: Option<&'a F>,
    /// What it is added to.
    pub base: Base<'a, F>,
    /// `(m, n)`
    pub c: &'a mut F,
    /// Receives c as products of tokens read it.
    pub product: Option<&'a mut A>,
}

impl<'a, F, A> SmallProduct<'a, F, A> {
    /// `c = op(a)·op(b)`, at full precision alone.
    pub fn new(a: &'a F, b: &'a F, transpose: Transpose, size: (usize, usize, usize), c: &'a mut F) -> Self {
        Self { a, b, transpose, size, alpha: None, base: Base::Zeros, c, product: None }
    }
}

/// A tensor to scale: `y = alpha·x`.
pub struct Scaled<'a, F, A> {
    /// `(n)`
    pub x: &'a F,
    /// `(n)`
    pub y: &'a mut F,
    /// Receives y as products of tokens read it.
    pub product: Option<&'a mut A>,
}

/// Products among parameters: merging adapters, folding the decoder, and the way back.
pub trait Matrix: Memory {
    /// Makes all of `products`.
    fn small_products(&self, products: &mut [SmallProduct<'_, Self::Full, Self::Act>]);
    /// Copies columns `start..start + n` of x `(rows, columns)` to y `(rows, n)`.
    fn columns(&self, x: &Self::Full, columns: usize, start: usize, n: usize, y: &mut Self::Full);
    /// Adds y `(rows, n)` to columns `start..start + n` of x `(rows, columns)`.
    fn add_columns(&self, y: &Self::Full, columns: usize, start: usize, n: usize, x: &mut Self::Full);
    /// Scales all of `tensors` by `alpha`, `(1)`.
    fn scale_all(&self, alpha: &Self::Full, tensors: &mut [Scaled<'_, Self::Full, Self::Act>]);
    /// Adds `x[start..]` to y, as far as y goes.
    fn add_part(&self, x: &Self::Full, start: usize, y: &mut Self::Full);
    /// Adds to each y its xs, in order.
    fn add_all(&self, sums: &mut [(Vec<&Self::Full>, &mut Self::Full)]);
}

/// A tensor under [`Optimizer::adamw`].
pub struct Moving<'a, F, A> {
    /// Its gradient.
    pub gradient: &'a F,
    /// Its value.
    pub parameter: &'a mut F,
    /// First moment.
    pub m: &'a mut F,
    /// Second moment.
    pub v: &'a mut F,
    /// Receives the value as products read it.
    pub product: Option<&'a mut A>,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// The update.
pub trait Optimizer: Memory {
    /// Euclidean norm of all gradients together, to `norm[0]`.
    fn gradient_norm(&self, gradients: &[&Self::Full], norm: &mut Self::Full);
    /// One AdamW update of all tensors. The gradients count times `min(1, max_norm / (norm[0] + 1e-6))`, as
    /// `torch.nn.utils.clip_grad_norm_` has it.
    fn adamw(&self, update: &AdamW, norm: &Self::Full, tensors: &mut [Moving<'_, Self::Full, Self::Act>]);
}
