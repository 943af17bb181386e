//! Operations of the CUDA backend on GPU 0, one by one, at the sizes SegFormer-B0 has at 512x512, with nothing in the
//! L2 cache: microseconds by the device's own clock, bytes and operations per second, and how near that comes to what a
//! large sum (`y += x`) or a large product reaches on the same GPU. Ends in a markdown table; without a GPU it says so
//! in one line.
//!
//! `cargo bench --bench kernels -- attention` measures those whose name contains a word. SEGPEFT_BENCH_BATCH is the
//! number of pictures, 64 if unset.
#![allow(missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, Throughput};
use segpeft_native::backend::cuda::{Cuda, Driver, Spent};
use segpeft_native::backend::{
    Attention, AttentionBranch, AttentionInput, AttentionInputs, AttentionOutput, AttentionOutputs, AttentionShape,
    AttentionWeights, BatchNormView, Classifier, Convolution, ConvolutionNorm, Deltas, Depthwise, Dropout, EmbedPixels,
    FfnOutputs, FfnWeights, FirstGradient, FirstStage, Grid, Head, HeadPass, InFront, LayerNorm, Linear, Loss, Memory,
    MixFfn, MixFfnBackward, MixFfnExpansion, MixFfnParts, MixFfnWeights, NextNorm, NormBack, Patches, Product,
    Residual, Resize, Sample, Window,
};
use segpeft_native::dataset::Augment;
use segpeft_native::random::{Philox, Purpose};

/// Tokens on a side, channels, hidden channels, heads, and the side of the sequence reduction of each stage.
const STAGES: [(usize, usize, usize, usize, usize); 4] =
    [(128, 32, 128, 1, 8), (64, 64, 256, 2, 4), (32, 160, 640, 5, 2), (16, 256, 1024, 8, 1)];
const SIZE: usize = 512;
const PIXELS: Window = Window { side: 7, stride: 4, padding: 3 };
const OVERLAPPING: Window = Window { side: 3, stride: 2, padding: 1 };
const KEYS: usize = 256;
const WIDTH: usize = 256;
const LABELS: usize = 2;
/// The embedding of stage 4.
const LARGEST_WEIGHT: usize = 9 * STAGES[2].1 * STAGES[3].1;
/// Numbers whose writing leaves nothing else in the cache: 256 MB, four times the L2 of an H200.
const FLUSH: usize = 64 << 20;
/// Rows and columns of the product that shows what the tensor cores reach.
const LARGE: usize = 8192;

type Act = <Cuda<Arc<Driver>> as Memory>::Act;
type Full = <Cuda<Arc<Driver>> as Memory>::Full;
type Counts = <Cuda<Arc<Driver>> as Memory>::Counts;

/// The backend and operands for everything: an operation takes as much of each as it needs.
struct Lab<'a> {
    cuda: Cuda<Arc<Driver>>,
    /// Activations to read.
    x: [Act; 3],
    /// Activations to write.
    y: [Act; 2],
    /// Weights of products, keys and values.
    w: [Act; 2],
    /// Gradients of keys and values.
    dw: [Act; 2],
    /// Parameters and statistics.
    p: Full,
    /// Sums and statistics to write.
    s: [Full; 2],
    /// Gradients of weights.
    t: [Full; 2],
    samples: Vec<Sample<'a>>,
    counts: Counts,
    flush: Full,
}

impl<'a> Lab<'a> {
    fn new(driver: Arc<Driver>, batch: usize, pixels: &'a [u8], labels: &'a [u8]) -> Self {
        let cuda = Cuda::new(driver);
        let full = |n: usize| {
            let stream = Philox::new(1, Purpose::Demo, 0, 0);
            let mut full = cuda.full(n);
            cuda.upload(&(0..n as u64).map(|i| 0.5 + stream.uniform(i)).collect::<Vec<f32>>(), &mut full);
            full
        };
        // The keys of stage 4 have the most channels.
        let small = || {
            let n = (batch * KEYS * WIDTH).max(LARGEST_WEIGHT);
            let mut act = cuda.act(n);
            cuda.cast(&full(n), &mut act);
            act
        };
        let (from, to) = (grid(batch, 16), grid(batch, STAGES[0].0));
        let numbers = (to.rows() * WIDTH).max(LARGE * LARGE);
        // Resized on the device, where making so many numbers takes no time.
        let large = || {
            let mut act = cuda.act(numbers);
            cuda.upsample(&small(), from, to, WIDTH, &mut act, false);
            act
        };
        let samples = (0..batch).map(|index| Sample { index, pixels, labels, augment: Augment::IDENTITY }).collect();
        // Two per row of stage 1, or the gradient of a weight.
        let statistics = (2 * to.rows()).max(LARGEST_WEIGHT);
        Self {
            x: [large(), large(), large()],
            y: [large(), large()],
            w: [small(), small()],
            dw: [small(), small()],
            p: full(statistics),
            s: [full(statistics), full(statistics)],
            t: [full(LARGEST_WEIGHT), full(LARGEST_WEIGHT)],
            samples,
            counts: cuda.counts(batch * LABELS * LABELS),
            flush: cuda.full(FLUSH),
            cuda,
        }
    }

    /// What one call spends on the device.
    fn measure(&mut self, run: &dyn Fn(&mut Lab<'_>)) -> Vec<Spent> {
        // The launches are queued while this writes, so that no event waits for the host; but where an operation first
        // brings pictures to the device, a few microseconds of launching count.
        self.cuda.zero(&mut self.flush);
        self.cuda.device().start_profile();
        run(self);
        let spent = self.cuda.device().end_profile().unwrap_or_else(|e| panic!("{e}"));
        self.cuda.check().unwrap_or_else(|e| panic!("{e}"));
        spent
    }

    /// Bytes per second of the best of a few large sums, and operations per second of large products.
    fn rates(&mut self) -> (f64, f64) {
        let n = LARGE * LARGE;
        let p = Product { rows: LARGE, inputs: LARGE, outputs: LARGE };
        let sum = |lab: &mut Lab<'_>| lab.cuda.accumulate(&lab.x[0], n, &mut lab.y[0]);
        let product = |lab: &mut Lab<'_>| lab.cuda.linear(&lab.x[0], &lab.x[1], None, p, &mut lab.y[0], false);
        let (mut stream, mut multiply) = (0.0f64, 0.0f64);
        for _ in 0..20 {
            let spent = self.measure(&sum);
            stream = stream.max(bytes(&spent) as f64 / seconds(&spent));
            multiply = multiply.max(2.0 * (n * LARGE) as f64 / seconds(&self.measure(&product)));
        }
        (stream, multiply)
    }
}

fn seconds(spent: &[Spent]) -> f64 {
    spent.iter().map(|s| s.seconds).sum()
}

/// Bytes that launches and products declare.
fn bytes(spent: &[Spent]) -> usize {
    spent.iter().map(|s| s.work.bytes()).sum()
}

fn grid(images: usize, side: usize) -> Grid {
    Grid { images, height: side, width: side }
}

/// An operation at one size.
struct Case {
    name: String,
    /// Multiplications and additions of its products.
    operations: usize,
    run: Box<dyn Fn(&mut Lab<'_>)>,
}

fn case(name: String, operations: usize, run: impl Fn(&mut Lab<'_>) + 'static) -> Case {
    Case { name, operations, run: Box::new(run) }
}

/// Bytes alone count.
fn plain(name: String, run: impl Fn(&mut Lab<'_>) + 'static) -> Case {
    case(name, 0, run)
}

fn products(batch: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |what: &str, rows, inputs, outputs| {
        let p = Product { rows, inputs, outputs };
        let operations = 2 * rows * inputs * outputs;
        let name = |way: &str| format!("linear{way} {what} {rows}x{inputs}->{outputs}");
        cases.push(case(name(""), operations, move |Lab { cuda, x: [x, ..], w: [w, b], y: [y, _], .. }| {
            cuda.linear(x, w, Some(b), p, y, false);
        }));
        cases.push(case(
            name("_backward_input"),
            operations,
            move |Lab { cuda, x: [d, ..], w: [w, _], y: [y, _], .. }| {
                cuda.linear_backward_input(d, w, p, y, false);
            },
        ));
        cases.push(case(name("_backward_weight"), operations, move |Lab { cuda, x: [d, x, _], s: [s, _], .. }| {
            cuda.linear_backward_weight(d, x, p, s);
        }));
        cases.push(plain(name("_backward_bias"), move |Lab { cuda, x: [d, ..], s: [s, _], .. }| {
            cuda.linear_backward_bias(d, rows, outputs, s);
        }));
        if matches!((inputs, outputs), (32, 32) | (64, 64)) {
            cases.push(case(
                format!("linear_backward_square {what} {rows}x{inputs}->{outputs}"),
                operations,
                move |Lab { cuda, x: [d, x, _], s: [s, t], .. }| cuda.linear_backward_params(d, x, p, s, t),
            ));
        }
    };
    for (i, (side, channels, hidden, _, reduction)) in STAGES.into_iter().enumerate() {
        let (rows, stage) = (batch * side * side, i + 1);
        let window = if i == 0 { 7 * 7 * 3 } else { 3 * 3 * STAGES[i - 1].1 };
        add(&format!("{stage} embedding"), rows, window, channels);
        add(&format!("{stage} query"), rows, channels, channels);
        if reduction > 1 {
            add(&format!("{stage} reduction"), batch * KEYS, reduction * reduction * channels, channels);
            add(&format!("{stage} key"), batch * KEYS, channels, channels);
        }
        add(&format!("{stage} expand"), rows, channels, hidden);
        add(&format!("{stage} contract"), rows, hidden, channels);
        add(&format!("{stage} decoder"), rows, channels, WIDTH);
    }
    add("classifier", batch * STAGES[0].0 * STAGES[0].0, WIDTH, LABELS);
    cases
}

fn mix_ffn_weights<'a>(w: &'a Act, p: &'a Full) -> MixFfnWeights<'a, Cuda<Arc<Driver>>> {
    MixFfnWeights { expand: w, mix: p, mix_bias: p, contract: w }
}

fn blocks(batch: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, (side, c, hidden, heads, reduction)) in STAGES.into_iter().enumerate() {
        let g = grid(batch, side);
        let rows = g.rows();
        let name = |what: &str, c: usize| format!("{what} {} {rows}x{c}", i + 1);
        let drop = Dropout { rate: 0.1, stream: Philox::new(1, Purpose::DropPath, 0, 0), first: 0 };

        cases.push(plain(name("layer_norm", c), move |Lab { cuda, x: [x, ..], p, y: [y, _], s: [s, _], .. }| {
            cuda.layer_norm(x, p, p, rows, c, y, s);
        }));
        cases.push(plain(
            name("residual_norm", c),
            move |Lab { cuda, x: [x, branch, _], p, y: [y, normed], s: [s, _], .. }| {
                cuda.residual_norm(x, branch, Some(drop), g, c, (p, p), y, normed, s);
            },
        ));
        cases.push(plain(name("layer_norm_backward", c), move |Lab { cuda, x: [d, x, _], p, y: [y, _], .. }| {
            cuda.layer_norm_backward(d, x, p, p, rows, c, y, true);
        }));
        cases.push(plain(
            name("layer_norm_backward_params", c),
            move |Lab { cuda, x: [d, x, _], p, s: [s, t], .. }| {
                cuda.layer_norm_backward_params(d, x, p, rows, c, s, t);
            },
        ));

        cases.push(plain(
            name("layer_norm_backward_both", c),
            move |Lab { cuda, x: [d, x, _], p, y: [y, _], s: [s, t], .. }| {
                let front = InFront { scaled: None, bias: None };
                cuda.layer_norm_backward_all(d, x, p, p, rows, c, (y, true), Some((s, t)), front);
            },
        ));
        cases.push(plain(
            name("layer_norm_backward_both, scaled", c),
            move |Lab { cuda, x: [d, x, _], p, y: [y, z], s: [s, t], .. }| {
                let front = InFront { scaled: Some((drop, g, Some(z))), bias: None };
                cuda.layer_norm_backward_all(d, x, p, p, rows, c, (y, true), Some((s, t)), front);
            },
        ));
        cases.push(plain(
            name("layer_norm_backward_branch", c),
            move |Lab { cuda, x: [d, x, _], p, y: [y, z], .. }| {
                let front = InFront { scaled: Some((drop, g, Some(z))), bias: None };
                cuda.layer_norm_backward_all(d, x, p, p, rows, c, (y, true), None, front);
            },
        ));

        let shape = AttentionShape { images: batch, heads, head: c / heads, queries: side * side, keys: KEYS };
        let product = 2 * batch * c * shape.queries * KEYS;
        cases.push(case(
            name("attention", c),
            2 * product,
            move |Lab { cuda, x: [q, ..], w: [k, v], y: [o, _], s: [lse, _], .. }| {
                cuda.attention(q, k, v, shape, o, lse);
            },
        ));
        cases.push(case(
            name("attention_backward", c),
            5 * product,
            move |Lab { cuda, x: [q, o, d], w: [k, v], p: lse, y: [dq, _], dw: [dk, dv], .. }| {
                cuda.attention_backward(q, k, v, Deltas::Of(o), lse, d, shape, dq, dk, dv);
            },
        ));

        // Where the sums were made with the output product's way back, and that, with its weight's gradient.
        if matches!(c, 32 | 64) {
            cases.push(case(
                name("attention_backward, sums made", c),
                5 * product,
                move |Lab { cuda, x: [q, _, d], w: [k, v], p, y: [dq, _], dw: [dk, dv], .. }| {
                    cuda.attention_backward(q, k, v, Deltas::Made(p), p, d, shape, dq, dk, dv);
                },
            ));
            for (what, sums) in [("attention_output_backward", false), ("attention_output_backward_all", true)] {
                cases.push(case(
                    name(what, c),
                    4 * rows * c * c,
                    move |Lab {
                              cuda,
                              x: [dy, x, o],
                              w: [weight, _],
                              p,
                              y: [d, d_o],
                              s: [deltas, dw],
                              t: [dgamma, dbeta],
                              ..
                          }| {
                        let norm = NormBack { dy, x, stats: p, gamma: p };
                        let parameters = sums.then_some((dgamma, dbeta));
                        let drop = Some(drop);
                        cuda.attention_output_backward(
                            norm, drop, o, weight, shape, d, d_o, deltas, dw, parameters, None,
                        );
                    },
                ));
            }
        }

        // With its products and the residual: for a pass back, and for none.
        for (what, keeps) in [("attention_branch", true), ("attention_branch, none kept", false)] {
            if !matches!(c, 32 | 64) {
                break;
            }
            cases.push(case(
                name(what, c),
                2 * product + 4 * rows * c * c,
                move |Lab { cuda, x: [x, normed, o], w: [k, v], y: [y, q], s: [lse, _], .. }| {
                    let weights = AttentionWeights { query: (k, Some(v)), output: (k, Some(v)) };
                    let outputs = AttentionOutputs { y, kept: keeps.then_some((q, o, lse)) };
                    cuda.attention_branch(x, normed, k, v, shape, &weights, Some(drop), outputs);
                },
            ));
        }

        // The sequence reduction and the embedding of the next stage, each with its LayerNorm, the latter with the one behind, in
        // evaluation.
        let reduces = Window { side: reduction, stride: reduction, padding: 0 };
        let mut convolutions = Vec::new();
        convolutions.extend((reduction > 1).then_some(("reduce_tokens", reduces, c)));
        convolutions.extend(STAGES.get(i + 1).map(|next| ("embed_tokens", OVERLAPPING, next.1)));
        for (what, window, outputs) in convolutions {
            let made = g.through(window).rows();
            cases.push(case(
                format!("{what} {} {made}x{outputs}", i + 1),
                2 * made * window.side * window.side * c * outputs,
                move |Lab { cuda, x: [x, ..], w: [weight, bias], p, y: [y, out], s: [stats, _], .. }| {
                    let (bias, norm) = (Some(&*bias), (&*p, &*p));
                    let next = (window == OVERLAPPING).then_some(NextNorm { norm, out, stats });
                    let convolution = ConvolutionNorm { window, weight, bias, norm, inputs: c, outputs };
                    cuda.convolution_norm(x, g, &convolution, y, None, next);
                },
            ));
        }
        // Back from the embedding of the next stage to this one's tokens, and from the sequence reduction of the third.
        let mut convolutions = Vec::new();
        convolutions.extend((reduction == 2).then_some(("reduce_tokens_backward", reduces, c)));
        convolutions.extend(STAGES.get(i + 1).map(|next| ("embed_tokens_backward", OVERLAPPING, next.1)));
        for (what, window, outputs) in convolutions {
            let made = g.through(window).rows();
            cases.push(case(
                format!("{what} {} {made}x{outputs}", i + 1),
                2 * made * window.side * window.side * c * outputs,
                move |Lab { cuda, x: [d, ..], w: [weight, _], y: [dx, _], .. }| {
                    cuda.convolution_backward_input(d, weight, g, window, c, outputs, dx);
                },
            ));
        }
        // The gradients of the weights of both.
        let mut convolutions = Vec::new();
        convolutions.extend((reduction > 1).then_some(("reduce_tokens_backward_weights", reduces, c)));
        convolutions.extend(STAGES.get(i + 1).map(|next| ("embed_tokens_backward_weights", OVERLAPPING, next.1)));
        for (what, window, outputs) in convolutions {
            let made = g.through(window).rows();
            cases.push(case(
                format!("{what} {} {made}x{outputs}", i + 1),
                2 * made * window.side * window.side * c * outputs,
                move |Lab { cuda, x: [x, d, _], s: [dw, _], .. }| {
                    cuda.convolution_backward_weight(x, d, g, window, c, outputs, dw);
                },
            ));
        }
        // From queries and reduced tokens back to the stream: frozen, and with the LayerNorm's parameters.
        for (what, trains) in [("attention_input_backward", false), ("attention_input_backward with parameters", true)]
        {
            if !matches!(c, 32 | 64) {
                break;
            }
            let window = reduces;
            cases.push(case(
                name(what, c),
                4 * rows * c * c,
                move |Lab {
                          cuda,
                          x: [x, dq, dreduced],
                          w: [query, reduction],
                          p,
                          y: [dx, z],
                          s: [s, t],
                          t: [dw, db],
                          ..
                      }| {
                    let inputs = AttentionInputs { query, reduction, window, x, stats: p, affine: (p, p), channels: c };
                    let front = InFront { scaled: Some((drop, g, Some(z))), bias: None };
                    let query = (trains && cuda.sums_attention_query(c)).then_some((dw, db));
                    cuda.attention_input_backward(dq, dreduced, &inputs, g, dx, trains.then_some((s, t)), query, front);
                },
            ));
        }

        cases.push(plain(name("depthwise_gelu", hidden), move |Lab { cuda, x: [h, ..], p, y: [y, _], .. }| {
            cuda.depthwise_gelu(h, p, p, g, hidden, y);
        }));
        cases.push(plain(
            name("depthwise_gelu_backward", hidden),
            move |Lab { cuda, x: [h, ..], p, y: [d, _], .. }| {
                cuda.depthwise_gelu_backward(h, p, p, g, hidden, d, None, None);
            },
        ));
        cases.push(plain(
            name("depthwise_backward", hidden),
            move |Lab { cuda, x: [h, du, _], p, y: [dh, _], .. }| {
                cuda.depthwise_backward(du, h, p, g, hidden, Some(dh), None, None);
            },
        ));
        cases.push(plain(
            name("depthwise_backward with weights", hidden),
            move |Lab { cuda, x: [h, du, _], p, y: [dh, _], s: [dw, _], .. }| {
                cuda.depthwise_backward(du, h, p, g, hidden, Some(dh), Some(dw), None);
            },
        ));

        // The layer at once: for a pass back that keeps everything, for one that keeps less, and for none.
        for (what, keeps) in
            [("mix_ffn", [true; 2]), ("mix_ffn, h kept", [false, true]), ("mix_ffn, none kept", [false; 2])]
        {
            if !matches!(c, 32 | 64) {
                break;
            }
            cases.push(case(
                name(what, c),
                4 * rows * c * hidden,
                move |Lab { cuda, x: [x, h, normed], w: [w, v], p, y: [y, next], s: [s, t], .. }| {
                    let weights = FfnWeights {
                        norm: (p, p),
                        expand: (w, Some(v)),
                        mix: (p, p),
                        contract: (w, Some(v)),
                        next: (p, p),
                        channels: c,
                        hidden,
                    };
                    let (normed, h) = (keeps[0].then_some(normed), keeps[1].then_some(h));
                    let outputs = FfnOutputs { y, next: (next, t), stats: s, normed, h };
                    cuda.mix_ffn(x, g, &weights, Some(drop), outputs);
                },
            ));
        }
        if i < 2 {
            cases.push(case(
                name("mix_ffn_backward", hidden),
                4 * rows * c * hidden,
                move |Lab { cuda, x: [d, h, _], w: [w, _], p, y: [dx, _], .. }| {
                    let parts = MixFfnParts { sums: None, contract: None, expand: None };
                    cuda.mix_ffn_backward(d, Some(drop), h, mix_ffn_weights(w, p), g, c, hidden, dx, parts);
                },
            ));
            cases.push(case(
                name("mix_ffn_backward with parameters", hidden),
                4 * rows * c * hidden,
                move |Lab {
                          cuda,
                          x: [d, h, dh],
                          w: [w, _],
                          p,
                          y: [dx, _],
                          s: [dw, db],
                          t: [expand, contract],
                          flush,
                          ..
                      }| {
                    let expand = if cuda.sums_mix_ffn_expansion(c) {
                        MixFfnExpansion::Summed { normed: dh, dw: expand }
                    } else {
                        MixFfnExpansion::Product(dh)
                    };
                    let sums = Some([dw, db, flush]);
                    let parts = MixFfnParts { sums, contract: Some(contract), expand: Some(expand) };
                    cuda.mix_ffn_backward(d, Some(drop), h, mix_ffn_weights(w, p), g, c, hidden, dx, parts);
                },
            ));
        }

        cases.push(plain(name("residual", c), move |Lab { cuda, x: [x, branch, _], y: [y, _], .. }| {
            cuda.residual(x, branch, Some(drop), g, c, y);
        }));
        cases.push(plain(name("drop_path", c), move |Lab { cuda, x: [x, ..], y: [y, _], .. }| {
            cuda.drop_path(x, drop, g, c, y);
        }));

        // The last stage has no next one and no reduction.
        for window in [OVERLAPPING, reduces].into_iter().take(if i < 3 { 2 } else { 0 }) {
            let what = |way: &str| name(&format!("patches{way} {0}x{0}/{1} of", window.side, window.stride), c);
            cases.push(plain(what(""), move |Lab { cuda, x: [x, ..], y: [y, _], .. }| {
                cuda.patches(x, g, c, window, y);
            }));
            cases.push(plain(what("_backward"), move |Lab { cuda, x: [d, ..], y: [y, _], .. }| {
                cuda.patches_backward(d, g, c, window, y);
            }));
        }
    }
    cases
}

fn head(batch: usize) -> Vec<Case> {
    let to = grid(batch, STAGES[0].0);
    let rows = to.rows();
    let drop = Some(Dropout { rate: 0.1, stream: Philox::new(1, Purpose::HeadDropout, 0, 0), first: 0 });
    let name = |what: &str| format!("{what} {rows}x{WIDTH}");
    fn view(p: &Full) -> BatchNormView<'_, Full> {
        BatchNormView { stats: p, gamma: p, beta: p }
    }
    type Pass<'a> = HeadPass<'a, Cuda<Arc<Driver>>>;
    fn pass<'a>(
        z: &'a Act,
        p: &'a Full,
        weight: &'a Act,
        bias: &'a Act,
        drop: Option<Dropout>,
        rows: usize,
    ) -> Pass<'a> {
        let classifier = Classifier { weight, bias, labels: LABELS };
        HeadPass { z, norm: view(p), drop, rows, channels: WIDTH, classifier }
    }
    let mut cases = Vec::new();
    for (side, ..) in STAGES.into_iter().skip(1) {
        let from = grid(batch, side);
        let name = |way: &str| format!("upsample{way} {}x{WIDTH}", from.rows());
        cases.push(plain(name(""), move |Lab { cuda, x: [x, ..], y: [y, _], .. }| {
            cuda.upsample(x, from, to, WIDTH, y, true);
        }));
        cases.push(plain(name("_backward"), move |Lab { cuda, x: [d, ..], y: [y, _], .. }| {
            cuda.upsample_backward(d, from, to, WIDTH, y);
        }));
    }
    cases.extend([
        plain(
            name("join_stages"),
            move |Lab { cuda, x: [a, b, c], w: [w, bias], y: [z, tokens], s: [moments, _], .. }| {
                let parts =
                    [(&*a, grid(batch, STAGES[1].0)), (b, grid(batch, STAGES[2].0)), (c, grid(batch, STAGES[3].0))];
                let first = FirstStage { tokens, weight: w, bias: Some(bias), inputs: STAGES[0].1 };
                cuda.join_stages(Some(first), &parts, to, WIDTH, z, Some(moments));
            },
        ),
        plain(name("split_stages"), move |Lab { cuda, x: [d, ..], y: [p, q], dw: [r, _], .. }| {
            let at = |stage: usize| grid(batch, STAGES[stage].0);
            cuda.split_stages(d, to, WIDTH, &mut [(p, at(1)), (q, at(2)), (r, at(3))]);
        }),
        plain(
            name("classify"),
            move |Lab { cuda, x: [z, ..], w: [w, b], p, y: [room, passed], dw: [logits, _], .. }| {
                cuda.classify(pass(z, p, w, b, drop, rows), room, passed, logits);
            },
        ),
        plain(
            name("classify_stages"),
            move |Lab { cuda, x: [a, b, c], w: [w, bias], p, y: [tokens, room], dw: [logits, z], .. }| {
                let parts =
                    [(&*a, grid(batch, STAGES[1].0)), (b, grid(batch, STAGES[2].0)), (c, grid(batch, STAGES[3].0))];
                let first = FirstStage { tokens, weight: w, bias: Some(bias), inputs: STAGES[0].1 };
                let classifier = Classifier { weight: w, bias, labels: LABELS };
                cuda.classify_stages(Some(first), &parts, to, WIDTH, z, view(p), classifier, room, logits);
            },
        ),
        plain(
            name("classify_backward"),
            move |Lab { cuda, x: [z, d, passed], w: [w, b], p, y: [room, _], s: [dw, s], .. }| {
                cuda.classify_backward(pass(z, p, w, b, drop, rows), passed, d, room, Some(dw), s);
            },
        ),
        plain(
            name("classify_backward_input"),
            move |Lab { cuda, x: [z, d, passed], w: [w, b], p, y: [dz, tokens], s: [s, _], .. }| {
                let first = Some(FirstGradient { weight: w, inputs: STAGES[0].1, tokens: Some(tokens), sum: None });
                cuda.classify_backward_input(pass(z, p, w, b, drop, rows), passed, d, (p, rows), s, dz, first);
            },
        ),
        plain(
            name("classify_backward_tokens_all"),
            move |Lab { cuda, x: [z, tokens, passed], w: [w, b], p, y: [dz, to], dw: [d, _], s: [s, dw], .. }| {
                let sum = Some((&*tokens, dw));
                let first = Some(FirstGradient { weight: w, inputs: STAGES[0].1, tokens: Some(to), sum });
                cuda.classify_backward_input(pass(z, p, w, b, drop, rows), passed, d, (p, rows), s, dz, first);
            },
        ),
        plain(name("batch_moments"), move |Lab { cuda, x: [z, ..], s: [s, _], .. }| {
            cuda.batch_moments(z, rows, WIDTH, s);
        }),
        plain(name("head_activation"), move |Lab { cuda, x: [z, ..], p, y: [a, _], .. }| {
            cuda.head_activation(z, view(p), drop, rows, WIDTH, a);
        }),
        plain(name("head_backward"), move |Lab { cuda, x: [z, ..], p, y: [d, _], s: [s, _], .. }| {
            cuda.head_backward(z, view(p), drop, rows, WIDTH, d, s);
        }),
        plain(name("batch_norm_backward"), move |Lab { cuda, x: [z, ..], p, y: [d, _], .. }| {
            cuda.batch_norm_backward(z, view(p), p, rows, rows, WIDTH, d);
        }),
        plain(
            format!("cross_entropy {batch}x{SIZE}x{SIZE}"),
            move |Lab { cuda, x: [x, ..], y: [y, _], s, samples, .. }| {
                cuda.cross_entropy(x, to, LABELS, samples, SIZE, 1e-6, &mut s[0], Some(y));
            },
        ),
        plain(format!("confusion {batch}x{SIZE}x{SIZE}"), move |Lab { cuda, x: [x, ..], samples, counts, .. }| {
            cuda.confusion(x, to, LABELS, samples, SIZE, counts);
        }),
        plain(format!("pixel_patches {batch}x{SIZE}x{SIZE}"), move |Lab { cuda, y: [y, _], samples, .. }| {
            cuda.pixel_patches(samples, SIZE, PIXELS, y);
        }),
        plain(
            format!("embed_pixels {batch}x{SIZE}x{SIZE}"),
            move |Lab { cuda, w: [w, bias], p, y: [y, out], s: [stats, _], samples, .. }| {
                let next = Some(NextNorm { norm: (p, p), out, stats });
                cuda.embed_pixels(samples, SIZE, PIXELS, (w, Some(bias)), (p, p), STAGES[0].1, y, None, next);
            },
        ),
        plain(
            format!("embed_pixels_backward {batch}x{SIZE}x{SIZE}"),
            move |Lab { cuda, x: [d, ..], s: [dw, _], samples, .. }| {
                cuda.embed_pixels_backward(samples, SIZE, PIXELS, d, STAGES[0].1, dw);
            },
        ),
    ]);
    cases
}

/// Kernel and microseconds of each part, where there are several.
fn parts(spent: &[Spent]) -> String {
    let part = |s: &Spent| format!("{} {:.1}", s.name.split(' ').next().unwrap_or_default(), 1e6 * s.seconds);
    if spent.len() < 2 { String::new() } else { spent.iter().map(part).collect::<Vec<_>>().join(", ") }
}

fn main() {
    let driver = match Driver::open(0) {
        Ok(driver) => Arc::new(driver),
        Err(error) => return println!("nothing is measured: {error}"),
    };
    let batch = std::env::var("SEGPEFT_BENCH_BATCH")
        .map_or(64, |text| text.parse().expect("SEGPEFT_BENCH_BATCH is a number of pictures"));
    let gpu = driver.describe().unwrap_or_else(|e| panic!("{e}"));
    let pixels: Vec<u8> = (0..SIZE * SIZE * 3).map(|i| (i * i) as u8).collect();
    let labels: Vec<u8> = (0..SIZE * SIZE).map(|i| u8::from(i / 64 % 3 == 0)).collect();
    let mut lab = Lab::new(driver, batch, &pixels, &labels);
    let (stream, multiply) = lab.rates();

    let mut criterion = Criterion::default()
        .sample_size(10)
        .nresamples(1001)
        .warm_up_time(Duration::from_nanos(1))
        .configure_from_args();
    let mut group = criterion.benchmark_group("cuda");
    group.sampling_mode(SamplingMode::Flat);
    let mut rows = Vec::new();
    for Case { name, operations, run } in products(batch).into_iter().chain(blocks(batch)).chain(head(batch)) {
        // Once for what happens at first use, once to see how long three calls for each of ten samples take.
        lab.measure(&run);
        let started = Instant::now();
        let spent = lab.measure(&run);
        group.measurement_time(30 * started.elapsed());
        let bytes = bytes(&spent);
        let (bytes_bound, operations_bound) = (bytes as f64 / stream, operations as f64 / multiply);
        group.throughput(match bytes_bound > operations_bound {
            true => Throughput::Bytes(bytes as u64),
            false => Throughput::Elements(operations as u64),
        });
        let mut times = Vec::new();
        group.bench_function(&name, |bencher| {
            bencher.iter_custom(|n| {
                let start = times.len();
                times.extend((0..n).map(|_| seconds(&lab.measure(&run))));
                Duration::from_secs_f64(times[start..].iter().sum())
            });
        });
        times.sort_by(f64::total_cmp);
        let Some(&time) = times.get(times.len() / 2) else { continue };
        rows.push(format!(
            "| {name} | {:.1} | {:.0} | {} | {:.0} % | {} |",
            1e6 * time,
            bytes as f64 / time / 1e9,
            if operations > 0 { format!("{:.1}", operations as f64 / time / 1e12) } else { String::new() },
            100.0 * bytes_bound.max(operations_bound) / time,
            parts(&spent),
        ));
    }
    group.finish();
    criterion.final_summary();

    print!("\n{}, batch {batch}: a large sum moves {:.0} GB/s, ", gpu.name, stream / 1e9);
    println!("a product of {LARGE}x{LARGE}x{LARGE} in bf16 does {:.0} TFLOP/s\n", multiply / 1e12);
    println!("| operation | µs | GB/s | TFLOP/s | of the nearer limit | parts, µs |");
    println!("| --- | --- | --- | --- | --- | --- |");
    println!("{}", rows.join("\n"));
}
