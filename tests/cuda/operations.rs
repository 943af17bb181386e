//! Every operation against the CPU backend in f64, and in every order of threads.
//!
//! Inputs are rounded to bf16 first, so that both sides read the same numbers. An output may then differ by what
//! rounding costs: `U` = 2^-8 of its own size for each rounding to bf16 of the number itself, and `U` of the largest output
//! for each rounding of something it is summed from. Sums in f32 add a few 1e-6 of the largest.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use host_kernels::Order;
use segpeft_native::backend::cpu::Cpu;
use segpeft_native::backend::cuda::{Cuda, Device, Pictures};
use segpeft_native::backend::{
    AdamW, AttentionInputs, AttentionOutputs, AttentionShape, AttentionWeights, Backend, Base, BatchNormView,
    Classifier, ConvolutionNorm, Deltas, Dropout, FfnOutputs, FfnWeights, FirstGradient, FirstStage, Grid, Head as _,
    HeadPass, InFront, Loss as _, Matrix as _, Memory, MixFfnExpansion, MixFfnParts, MixFfnWeights, Moving, NextNorm,
    NormBack, Patches as _, Product, Sample, Scaled, SmallProduct, Transpose, Window,
};
use segpeft_native::dataset::Augment;
use segpeft_native::random::{Philox, Purpose};

use crate::gpu;
use crate::host::Host;

/// The unit roundoff of bf16, which keeps 8 bits: half a unit in the last place of a number just above a power of two.
const U: f64 = 1.0 / 256.0;
/// Sums and elementary functions in f32, as a share of the largest output.
const F32: f64 = 4e-6;

/// What an operation left in one output, and how often its numbers may have been rounded to bf16.
struct Output {
    name: &'static str,
    values: Vec<f64>,
    /// Roundings of the number itself.
    own: f64,
    /// Roundings of what it is summed from.
    summed: f64,
}

/// An operation on some shape, run on any backend.
trait Case {
    fn run<B: Backend>(&self, lab: &Lab<'_, B>) -> Vec<Output>;
}

/// Makes inputs and reads outputs.
struct Lab<'b, B>(&'b B);

/// Numbers in (-1, 1) that bf16 holds, by `site`.
fn numbers(n: usize, site: u32) -> Vec<f32> {
    let stream = Philox::new(11, Purpose::Weights, site, 0);
    (0..n as u64).map(|i| bf16::from_f32(2.0 * stream.uniform(i) - 1.0).to_f32()).collect()
}

impl<B: Backend> Lab<'_, B> {
    fn full_of(&self, data: &[f32]) -> B::Full {
        let mut full = self.0.full(data.len());
        self.0.upload(data, &mut full);
        full
    }

    fn act_of(&self, data: &[f32]) -> B::Act {
        let mut act = self.0.act(data.len());
        self.0.cast(&self.full_of(data), &mut act);
        act
    }

    fn full(&self, n: usize, site: u32) -> B::Full {
        self.full_of(&numbers(n, site))
    }

    fn act(&self, n: usize, site: u32) -> B::Act {
        self.act_of(&numbers(n, site))
    }

    /// Activations, rounded on being stored (`own` ≥ 1).
    fn read(&self, name: &'static str, act: &B::Act, n: usize, own: f64, summed: f64) -> Output {
        let values = self.0.download_act(act, n).into_iter().map(f64::from).collect();
        Output { name, values, own, summed }
    }

    /// Full precision: no rounding but f32's.
    fn read_full(&self, name: &'static str, full: &B::Full, n: usize) -> Output {
        Output { name, values: self.0.scalars(full, n), own: 0.0, summed: 0.0 }
    }
}

fn run<D: Device>(what: &str, case: &impl Case, backend: Cuda<D>) -> Vec<Output> {
    let outputs = case.run(&Lab(&backend));
    backend.check().unwrap_or_else(|e| panic!("{what}: {e}"));
    outputs
}

/// Runs again and again, in every order of threads where that can be chosen, and compares the bits. Under sanitizers
/// (`tools/sanitize.sh`), which are slow and find the same in any order, once.
fn repeated(what: &str, run: impl Fn(Order) -> Vec<Output>) -> Vec<Output> {
    let forward = run(Order::Forward);
    if std::env::var_os("SEGPEFT_SANITIZED_KERNELS").is_some() {
        return forward;
    }
    for order in [Order::Reverse, Order::Random(1), Order::Random(2)] {
        for (a, b) in forward.iter().zip(run(order)) {
            let bits = |o: &Output| o.values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(a), bits(&b), "{what}: {} differs in order {order:?}", a.name);
        }
    }
    forward
}

/// Runs a case in every order, compares the bits, and one result with the CPU backend in f64.
fn check(what: &str, case: &impl Case) {
    let expected = case.run(&Lab(&Cpu::<f64>::new(Some(1)).expect("threads")));
    let found = match gpu() {
        Some(driver) => repeated(what, |_| run(what, case, Cuda::new(driver.clone()))),
        None => repeated(what, |order| run(what, case, Cuda::new(Host::new(order)))),
    };
    for (output, expected) in found.iter().zip(&expected) {
        let largest = expected.values.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        assert!(largest > 0.0, "{what}: {} is all zeros", output.name);
        for (i, (x, e)) in output.values.iter().zip(&expected.values).enumerate() {
            let bound = U * (output.own * e.abs() + output.summed * largest) + F32 * largest;
            let error = (x - e).abs();
            assert!(
                error <= bound,
                "{what}: {}[{i}] is {x}, should be {e}: off by {error:.2e} > {bound:.2e}",
                output.name
            );
        }
    }
}

/// Checks two at a time: tests take turns by name, and at the end the longest would else be left alone.
fn check_all<C: Case + Debug + Sync>(cases: &[C]) {
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            check(&format!("{case:?}"), case);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(work);
        }
    });
}

/// Declares a case with its shape and runs it over several: `case!(name { field: type, ... } |self, lab| { outputs } [shapes])`.
macro_rules! case {
    ($test:ident, $case:ident { $($field:ident: $type:ty),* }, |$this:ident, $lab:ident| $body:block, $shapes:expr) => {
        #[derive(Debug)]
        struct $case { $($field: $type),* }
        impl Case for $case {
            fn run<B: Backend>(&$this, $lab: &Lab<'_, B>) -> Vec<Output> $body
        }
        #[test]
        fn $test() {
            let cases: Vec<$case> = $shapes.into_iter().map(|($($field,)*)| $case { $($field),* }).collect();
            check_all(&cases);
        }
    };
}

/// A LayerNorm behind what an operation makes; it leaves what [`LayerNorm::layer_norm`] leaves, to the bit.
struct Behind<B: Backend> {
    norm: [B::Full; 2],
    out: B::Act,
    stats: B::Full,
    rows: usize,
    channels: usize,
}

impl<B: Backend> Behind<B> {
    fn new(lab: &Lab<'_, B>, rows: usize, channels: usize) -> Self {
        let norm = [40, 41].map(|site| lab.full(channels, site));
        Self { norm, out: lab.act(rows * channels, 42), stats: lab.full(2 * rows, 43), rows, channels }
    }

    fn next(&mut self) -> Option<NextNorm<'_, B>> {
        let Self { norm: [gamma, beta], out, stats, .. } = self;
        Some(NextNorm { norm: (gamma, beta), out, stats })
    }

    /// Compares the bits with those made of `y`.
    fn check(&self, lab: &Lab<'_, B>, y: &B::Act, what: &impl Debug) {
        let mut again = Self::new(lab, self.rows, self.channels);
        lab.0.next_norm(y, self.rows, self.channels, again.next());
        let bits = |of: &Self| {
            let numbers = lab.0.download_act(&of.out, self.rows * self.channels).into_iter();
            numbers.chain(lab.0.download(&of.stats)).map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(bits(self), bits(&again), "{what:?}");
    }

    /// Made of a rounded LayerNorm of what was rounded.
    fn read(&self, lab: &Lab<'_, B>) -> [Output; 2] {
        let stats = lab.read_full("next stats", &self.stats, 2 * self.rows);
        [lab.read("next", &self.out, self.rows * self.channels, 1.0, 2.0), Output { summed: 2.0, ..stats }]
    }
}

fn drop_of(purpose: Purpose, rate: f32) -> Dropout {
    Dropout { rate, stream: Philox::new(5, purpose, 3, 9), first: 6 }
}

case!(
    linear,
    Linear { rows: usize, inputs: usize, outputs: usize, bias: bool, add: bool },
    |self, lab| {
        let b = lab.0;
        let p = Product { rows: self.rows, inputs: self.inputs, outputs: self.outputs };
        let (ins, outs) = (p.rows * p.inputs, p.rows * p.outputs);
        let (x, w, bias, dy) =
            (lab.act(ins, 1), lab.act(p.inputs * p.outputs, 2), lab.act(p.outputs, 3), lab.act(outs, 4));
        let (mut y, mut dx) = (lab.act(outs, 5), lab.act(ins, 6));
        let (mut dw, mut db) = (lab.full(p.inputs * p.outputs, 7), lab.full(p.outputs, 8));
        b.linear(&x, &w, self.bias.then_some(&bias), p, &mut y, self.add);
        let (base, mut joined) = (lab.act(outs, 9), lab.act(outs, 10));
        b.linear_residual(&base, &x, &w, self.bias.then_some(&bias), p, &mut lab.act(outs, 11), &mut joined);
        b.linear_backward_input(&dy, &w, p, &mut dx, self.add);
        b.linear_backward_weight(&dy, &x, p, &mut dw);
        b.linear_backward_bias(&dy, p.rows, p.outputs, &mut db);
        vec![
            lab.read("y", &y, outs, 1.0, 0.0),
            lab.read("joined", &joined, outs, 1.0, 0.0),
            lab.read("dx", &dx, ins, 1.0, 0.0),
            lab.read_full("dw", &dw, p.inputs * p.outputs),
            lab.read_full("db", &db, p.outputs),
        ]
    },
    [(1, 1, 1, true, false), (7, 3, 5, true, true), (300, 24, 40, true, false), (65, 32, 2, false, true)]
);

case!(
    linear_parameters,
    LinearParameters { rows: usize, inputs: usize, outputs: usize },
    |self, lab| {
        let &Self { rows, inputs, outputs } = self;
        let (dy, x) = (lab.act(rows * outputs, 1), lab.act(rows * inputs, 2));
        let (mut dw, mut db) = (lab.full(outputs * inputs, 3), lab.full(outputs, 4));
        lab.0.linear_backward_params(&dy, &x, Product { rows, inputs, outputs }, &mut dw, &mut db);
        vec![lab.read_full("dw", &dw, outputs * inputs), lab.read_full("db", &db, outputs)]
    },
    [
        (300, 24, 40),
        (300, 32, 64),
        // Both at once: of one tile, of a few, and of more than blocks have room for at a time.
        (1, 32, 32),
        (300, 32, 32),
        (110_000, 32, 32),
        (1, 64, 64),
        (200, 64, 64),
        (55_000, 64, 64)
    ]
);

case!(
    pixel_patches,
    PixelPatches { images: usize, size: usize, side: usize, stride: usize, padding: usize },
    |self, lab| {
        let (size, window) = (self.size, Window { side: self.side, stride: self.stride, padding: self.padding });
        let pixels: Vec<Vec<u8>> =
            (0..self.images).map(|k| (0..size * size * 3).map(|i| (i * 37 + k * 101) as u8).collect()).collect();
        let augment = [Augment::IDENTITY, Augment { flip: true, contrast: 1.15, brightness: -0.1 }];
        let samples: Vec<Sample<'_>> = pixels
            .iter()
            .enumerate()
            .map(|(index, pixels)| Sample { index, pixels, labels: &[], augment: augment[index % 2] })
            .collect();
        let n = self.images * window.out(size).pow(2) * self.side * self.side * 3;
        let mut out = lab.act(n, 1);
        lab.0.pixel_patches(&samples, size, window, &mut out);
        vec![lab.read("out", &out, n, 1.0, 0.0)]
    },
    [(1, 8, 7, 4, 3), (3, 9, 3, 2, 1), (2, 32, 7, 4, 3), (2, 68, 7, 4, 3), (2, 100, 48, 9, 2)]
);

case!(
    embed_pixels,
    Embed { images: usize, size: usize, channels: usize, bias: bool },
    |self, lab| {
        let (size, channels, window) = (self.size, self.channels, Window { side: 7, stride: 4, padding: 3 });
        let pixels: Vec<Vec<u8>> =
            (0..self.images).map(|k| (0..size * size * 3).map(|i| (i * i / 7 + k * 101) as u8).collect()).collect();
        let augment = [Augment::IDENTITY, Augment { flip: true, contrast: 1.15, brightness: -0.1 }];
        let samples: Vec<Sample<'_>> = pixels
            .iter()
            .enumerate()
            .map(|(index, pixels)| Sample { index, pixels, labels: &[], augment: augment[index % 2] })
            .collect();
        let rows = self.images * window.out(size).pow(2);
        let (n, product) = (rows * channels, Product { rows, inputs: 147, outputs: channels });
        let (w, bias) = (lab.act(channels * 147, 1), self.bias.then(|| lab.act(channels, 2)));
        let (gamma, beta, draw) = (lab.full(channels, 3), lab.full(channels, 4), lab.act(n, 5));
        let (mut y, mut alone, mut raw, mut stats) =
            (lab.act(n, 6), lab.act(n, 7), lab.act(n, 8), lab.full(2 * rows, 9));
        let mut dw = lab.full(channels * 147, 10);
        let [mut next, mut next_alone] = [(); 2].map(|()| Behind::new(lab, rows, channels));
        // A backend that rounds; the other is what it is compared with.
        let rounds = B::unrounded(&gamma).is_none();
        if rounds && lab.0.embeds_pixels(window, channels) {
            let (convolution, norm) = ((&w, bias.as_ref()), (&gamma, &beta));
            let run = |y: &mut B::Act, kept, next| {
                lab.0.embed_pixels(&samples, size, window, convolution, norm, channels, y, kept, next);
            };
            let mut plain = lab.act(n, 12);
            run(&mut y, Some((&mut raw, &mut stats)), next.next());
            run(&mut alone, None, next_alone.next());
            run(&mut plain, None, None);
            next_alone.check(lab, &alone, self);
            assert_eq!(lab.0.download_act(&plain, n), lab.0.download_act(&y, n), "{self:?}");
            lab.0.embed_pixels_backward(&samples, size, window, &draw, channels, &mut dw);
        } else {
            let mut patches = lab.act(rows * 147, 11);
            lab.0.pixel_patches(&samples, size, window, &mut patches);
            // The kernel multiplies rounded pixels.
            let rounded = lab.0.download_act(&patches, rows * 147).into_iter().map(|x| bf16::from_f32(x).to_f32());
            let patches = lab.act_of(&rounded.collect::<Vec<_>>());
            lab.0.linear(&patches, &w, bias.as_ref(), product, &mut raw, false);
            for y in [&mut y, &mut alone] {
                lab.0.layer_norm(&raw, &gamma, &beta, rows, channels, y, &mut stats);
            }
            lab.0.next_norm(&y, rows, channels, next.next());
            lab.0.linear_backward_weight(&draw, &patches, product, &mut dw);
        }
        next.check(lab, &y, self);
        let mut outputs = Vec::from(next.read(lab));
        outputs.extend([
            lab.read("y", &y, n, 1.0, 1.0),
            lab.read("y alone", &alone, n, 1.0, 1.0),
            lab.read("raw", &raw, n, 1.0, 0.0),
            // Of what has been rounded.
            Output { summed: 1.0, ..lab.read_full("stats", &stats, 2 * rows) },
            lab.read_full("dw", &dw, channels * 147),
        ]);
        outputs
    },
    [(1, 8, 32, true), (2, 36, 64, false), (3, 68, 32, true), (1, 264, 32, true), (2, 40, 64, true)]
);

case!(
    patches,
    Patches { images: usize, height: usize, width: usize, channels: usize, side: usize, stride: usize, padding: usize },
    |self, lab| {
        let grid = Grid { images: self.images, height: self.height, width: self.width };
        let window = Window { side: self.side, stride: self.stride, padding: self.padding };
        let n = grid.rows() * self.channels;
        let gathered = grid.through(window).rows() * self.side * self.side * self.channels;
        let (x, dout) = (lab.act(n, 1), lab.act(gathered, 2));
        let (mut out, mut dx) = (lab.act(gathered, 3), lab.act(n, 4));
        lab.0.patches(&x, grid, self.channels, window, &mut out);
        lab.0.patches_backward(&dout, grid, self.channels, window, &mut dx);
        vec![lab.read("out", &out, gathered, 0.0, 0.0), lab.read("dx", &dx, n, 1.0, 0.0)]
    },
    [(1, 5, 7, 3, 3, 2, 1), (2, 8, 6, 16, 2, 2, 0), (1, 9, 8, 8, 3, 2, 1)]
);

case!(
    layer_norm,
    LayerNorm { images: usize, area: usize, channels: usize },
    |self, lab| {
        let grid = Grid { images: self.images, height: self.area, width: 1 };
        let (rows, channels) = (grid.rows(), self.channels);
        let n = rows * channels;
        let (x, gamma, beta, dy) = (lab.act(n, 1), lab.full(channels, 2), lab.full(channels, 3), lab.act(n, 4));
        let (mut y, mut stats) = (lab.act(n, 5), lab.full(2 * rows, 6));
        let (mut dx, mut added) = (lab.act(n, 7), lab.act(n, 8));
        let (mut dgamma, mut dbeta) = (lab.full(channels, 9), lab.full(channels, 10));
        lab.0.layer_norm(&x, &gamma, &beta, rows, channels, &mut y, &mut stats);
        lab.0.layer_norm_backward(&dy, &x, &stats, &gamma, rows, channels, &mut dx, false);
        lab.0.layer_norm_backward(&dy, &x, &stats, &gamma, rows, channels, &mut added, true);
        lab.0.layer_norm_backward_params(&dy, &x, &stats, rows, channels, &mut dgamma, &mut dbeta);
        let (mut dx_too, mut dgamma_too, mut dbeta_too) =
            (lab.act(n, 11), lab.full(channels, 12), lab.full(channels, 13));
        let drop = drop_of(Purpose::DropPath, 0.4);
        // A branch joined in the same pass, to the bits of one pass after the other.
        let branch = lab.act(n, 23);
        let [mut joined, mut joined_normed, mut stream, mut normed] = [24, 25, 26, 27].map(|site| lab.act(n, site));
        let [mut joined_stats, mut stream_stats] = [28, 29].map(|site| lab.full(2 * rows, site));
        for drop in [Some(drop), None] {
            let (y, to) = (&mut joined, &mut joined_normed);
            lab.0.residual_norm(&x, &branch, drop, grid, channels, (&gamma, &beta), y, to, &mut joined_stats);
            lab.0.residual(&x, &branch, drop, grid, channels, &mut stream);
            lab.0.layer_norm(&stream, &gamma, &beta, rows, channels, &mut normed, &mut stream_stats);
            for (a, b) in [(&joined, &stream), (&joined_normed, &normed)] {
                assert_eq!(lab.0.download_act(a, n), lab.0.download_act(b, n), "{self:?}");
            }
            assert_eq!(lab.0.download(&joined_stats), lab.0.download(&stream_stats), "{self:?}");
        }
        let all = |dx, parameters, scaled, bias| {
            let front = InFront { scaled, bias };
            lab.0.layer_norm_backward_all(&dy, &x, &stats, &gamma, rows, channels, dx, parameters, front);
        };
        let [mut scaled, mut scaled_alone, mut dx_branch, mut dx_bias] = [14, 15, 16, 17].map(|site| lab.act(n, site));
        let [mut bias, mut bias_plain, mut bias_alone] = [18, 19, 20].map(|site| lab.full(channels, site));
        let parameters = Some((&mut dgamma_too, &mut dbeta_too));
        all((&mut dx_too, true), parameters, Some((drop, grid, Some(&mut scaled))), Some(&mut bias));
        let parameters = Some((&mut lab.full(channels, 21), &mut lab.full(channels, 22)));
        all((&mut dx_bias, false), parameters, None, Some(&mut bias_plain));
        all((&mut dx_branch, true), None, Some((drop, grid, Some(&mut scaled_alone))), Some(&mut bias_alone));
        // Apart from the parameters' gradients, the bias's is summed from what has been rounded.
        let short = channels <= 256 && channels.is_multiple_of(8);
        let fused = if short { 0.0 } else { 1.0 };
        let sums = |name, bias, summed| Output { summed, ..lab.read_full(name, bias, channels) };
        let mut outputs = vec![];
        let [mut bias_summed, mut bias_unwritten] = [32, 33].map(|site| lab.full(channels, site));
        if short {
            // Without the branch's gradient in memory.
            let [mut dx_summed, mut dx_unwritten] = [30, 31].map(|site| lab.act(n, site));
            let parameters = Some((&mut lab.full(channels, 21), &mut lab.full(channels, 22)));
            all((&mut dx_summed, true), parameters, Some((drop, grid, None)), Some(&mut bias_summed));
            all((&mut dx_unwritten, true), None, Some((drop, grid, None)), Some(&mut bias_unwritten));
            outputs.extend([
                lab.read("dx without scaled", &dx_summed, n, 1.0, 0.0),
                sums("bias without scaled", &bias_summed, 0.0),
                lab.read("dx with a bias alone", &dx_unwritten, n, 1.0, 0.0),
                sums("bias alone without scaled", &bias_unwritten, 0.0),
            ]);
        }
        outputs.extend([
            lab.read("dx of all", &dx_too, n, 1.0, 0.0),
            lab.read_full("dgamma of all", &dgamma_too, channels),
            lab.read_full("dbeta of all", &dbeta_too, channels),
            lab.read("scaled", &scaled, n, 1.0, 0.0),
            sums("bias", &bias, fused),
            lab.read("dx beside a bias", &dx_bias, n, 1.0, 0.0),
            sums("bias without factors", &bias_plain, fused),
            lab.read("dx beside a branch", &dx_branch, n, 1.0, 0.0),
            lab.read("scaled alone", &scaled_alone, n, 1.0, 0.0),
            sums("bias alone", &bias_alone, 1.0),
            lab.read("y", &y, n, 1.0, 0.0),
            lab.read_full("stats", &stats, 2 * rows),
            lab.read("dx", &dx, n, 1.0, 0.0),
            lab.read("dx added", &added, n, 1.0, 0.0),
            lab.read_full("dgamma", &dgamma, channels),
            lab.read_full("dbeta", &dbeta, channels),
        ]);
        outputs
    },
    [(4, 1, 3), (5, 3, 33), (3, 100, 32), (7, 10, 64), (9, 1, 160), (11, 3, 256), (3, 1, 520), (2, 1300, 8)]
);

case!(
    attention,
    Attention { images: usize, heads: usize, head: usize, queries: usize, keys: usize },
    |self, lab| {
        let &Self { images, heads, head, queries, keys } = self;
        let shape = AttentionShape { images, heads, head, queries, keys };
        let (nq, nk) = (images * queries * heads * head, images * keys * heads * head);
        let n_lse = images * heads * queries;
        let q = lab.act_of(&numbers(nq, 1).iter().map(|x| 4.0 * x).collect::<Vec<_>>());
        let (k, v, d_o) = (lab.act(nk, 2), lab.act(nk, 3), lab.act(nq, 4));
        let (mut o, mut lse) = (lab.act(nq, 5), lab.full(n_lse, 6));
        lab.0.attention(&q, &k, &v, shape, &mut o, &mut lse);
        let (mut dq, mut dk, mut dv) = (lab.act(nq, 7), lab.act(nk, 8), lab.act(nk, 9));
        lab.0.attention_backward(&q, &k, &v, Deltas::Of(&o), &lse, &d_o, shape, &mut dq, &mut dk, &mut dv);
        // o: probabilities are rounded. dq, dk: scores' gradients are, and o, which they read.
        vec![
            lab.read("o", &o, nq, 1.0, 1.0),
            lab.read_full("lse", &lse, n_lse),
            lab.read("dq", &dq, nq, 1.0, 2.0),
            lab.read("dk", &dk, nk, 1.0, 2.0),
            lab.read("dv", &dv, nk, 1.0, 1.0),
        ]
    },
    [
        (1, 1, 3, 5, 2),
        (2, 2, 32, 70, 64),
        (1, 1, 32, 65, 130),
        (2, 3, 8, 1100, 5),
        (1, 2, 64, 66, 65),
        (1, 1, 32, 1, 2),
        (1, 2, 32, 130, 256),
        (1, 1, 32, 300, 257),
        (1, 1, 40, 200, 150),
        (1, 2, 20, 40, 15),
        (1024, 1, 8, 130, 2),
        // All gradients at once: few and odd queries and keys, one slice and several, the last one short.
        (1, 1, 32, 1, 66),
        (2, 3, 32, 33, 255),
        (1, 2, 32, 600, 97),
        (3, 1, 32, 290, 256),
        (2, 2, 32, 64, 224)
    ]
);

/// By the joint operation where there is one, else by those that it joins.
fn attention_output_backward<B: Backend>(
    backend: &B,
    norm: NormBack<'_, B>,
    drop: Option<Dropout>,
    (o, weight): (&B::Act, &B::Act),
    shape: AttentionShape,
    (d, d_o, deltas): (&mut B::Act, &mut B::Act, &mut B::Full),
    dw: &mut B::Full,
    parameters: Option<(&mut B::Full, &mut B::Full)>,
    bias: Option<&mut B::Full>,
) {
    if backend.joins_attention_output(shape) {
        return backend.attention_output_backward(norm, drop, o, weight, shape, d, d_o, deltas, dw, parameters, bias);
    }
    let AttentionShape { images, heads, head, queries, .. } = shape;
    let (rows, channels) = (images * queries, heads * head);
    let (product, grid) =
        (Product { rows, inputs: channels, outputs: channels }, Grid { images, height: queries, width: 1 });
    let NormBack { dy, x, stats, gamma } = norm;
    let mut branch = backend.act(rows * channels);
    let scaled = drop.map(|drop| (drop, grid, Some(&mut branch)));
    let front = InFront { scaled, bias };
    backend.layer_norm_backward_all(dy, x, stats, gamma, rows, channels, (&mut *d, true), parameters, front);
    let branch = if drop.is_some() { &branch } else { &*d };
    backend.linear_backward_weight(branch, o, product, dw);
    backend.linear_backward_input(branch, weight, product, d_o, false);
    let [o, d_o] = [o, &*d_o].map(|x| backend.download_act(x, rows * channels));
    let products: Vec<f64> = o.iter().zip(&d_o).map(|(&o, &d_o)| f64::from(o) * f64::from(d_o)).collect();
    let mut sums = vec![0.0f32; rows * heads];
    for (i, products) in products.chunks(head).enumerate() {
        let (token, head) = (i / heads, i % heads);
        sums[(token / queries * heads + head) * queries + token % queries] = products.iter().sum::<f64>() as f32;
    }
    backend.upload(&sums, deltas);
}

case!(
    attention_output,
    AttentionOutput { images: usize, heads: usize, queries: usize, drop: f32, norm: bool, bias: bool },
    |self, lab| {
        let &Self { images, heads, queries, drop, norm: sums_norm, bias: sums_bias } = self;
        let shape = AttentionShape { images, heads, head: 32, queries, keys: 256 };
        let (rows, channels, n_lse) = (images * queries, heads * 32, images * heads * queries);
        let (n, square) = (rows * channels, channels * channels);
        let (dn, x, o, weight) = (lab.act(n, 1), lab.act(n, 2), lab.act(n, 3), lab.act(square, 4));
        let (gamma, beta) = (lab.full(channels, 5), lab.full(channels, 6));
        let (mut normed, mut stats) = (lab.act(n, 7), lab.full(2 * rows, 8));
        lab.0.layer_norm(&x, &gamma, &beta, rows, channels, &mut normed, &mut stats);
        let (mut d, mut d_o, mut deltas) = (lab.act(n, 9), lab.act(n, 10), lab.full(n_lse, 11));
        let (mut dw, mut bias) = (lab.full(square, 12), lab.full(channels, 13));
        let (mut dgamma, mut dbeta) = (lab.full(channels, 14), lab.full(channels, 15));
        let norm = NormBack { dy: &dn, x: &x, stats: &stats, gamma: &gamma };
        let drop = (drop > 0.0).then(|| drop_of(Purpose::DropPath, drop));
        let (parameters, db) = (sums_norm.then_some((&mut dgamma, &mut dbeta)), sums_bias.then_some(&mut bias));
        let streams = (&mut d, &mut d_o, &mut deltas);
        attention_output_backward(lab.0, norm, drop, (&o, &weight), shape, streams, &mut dw, parameters, db);
        let mut outputs = vec![
            lab.read("d", &d, n, 1.0, 0.0),
            // The branch's gradient is rounded, which both products read.
            lab.read("d_o", &d_o, n, 1.0, 1.0),
            // d_o is rounded, and its products with o may cancel.
            Output { summed: 2.0, ..lab.read_full("deltas", &deltas, n_lse) },
            Output { summed: 1.0, ..lab.read_full("dw", &dw, square) },
        ];
        if sums_norm {
            outputs
                .extend([("dgamma", &dgamma), ("dbeta", &dbeta)].map(|(name, sum)| lab.read_full(name, sum, channels)));
        }
        if sums_bias {
            outputs.push(lab.read_full("bias", &bias, channels));
        }
        outputs
    },
    [
        (1, 1, 1, 0.0, true, true),
        (1, 1, 100, 0.5, false, false),
        (3, 1, 129, 0.5, true, true),
        // More tiles than blocks have room for at a time, the last one short.
        (5, 1, 13601, 0.5, false, true),
        (1, 2, 1, 0.0, false, false),
        (3, 2, 65, 0.5, true, false),
        (7, 2, 33, 0.5, false, false),
        (5, 2, 6801, 0.0, true, true),
        // Not joined.
        (2, 3, 40, 0.5, true, true)
    ]
);

case!(
    attention_with_sums_made,
    SumsMade { images: usize, heads: usize, queries: usize, keys: usize },
    |self, lab| {
        let &Self { images, heads, queries, keys } = self;
        let shape = AttentionShape { images, heads, head: 32, queries, keys };
        let (channels, n_lse) = (heads * 32, images * heads * queries);
        let (nq, nk) = (images * queries * channels, images * keys * channels);
        let q = lab.act_of(&numbers(nq, 1).iter().map(|x| 4.0 * x).collect::<Vec<_>>());
        let (k, v, d_o, deltas) = (lab.act(nk, 2), lab.act(nk, 3), lab.act(nq, 4), lab.full(n_lse, 5));
        let (mut o, mut lse) = (lab.act(nq, 6), lab.full(n_lse, 7));
        lab.0.attention(&q, &k, &v, shape, &mut o, &mut lse);
        let (mut dq, mut dk, mut dv) = (lab.act(nq, 8), lab.act(nk, 9), lab.act(nk, 10));
        let made = Deltas::Made(&deltas);
        lab.0.attention_backward(&q, &k, &v, made, &lse, &d_o, shape, &mut dq, &mut dk, &mut dv);
        // As where o is read.
        vec![lab.read("dq", &dq, nq, 1.0, 2.0), lab.read("dk", &dk, nk, 1.0, 2.0), lab.read("dv", &dv, nk, 1.0, 1.0)]
    },
    [(1, 1, 1, 66), (2, 3, 33, 255), (1, 2, 600, 97), (3, 1, 290, 256)]
);

// A key whose scores are out of all proportion to those of the keys before it.
case!(
    attention_to_a_far_key,
    FarKey { head: usize, queries: usize, keys: usize },
    |self, lab| {
        let &Self { head, queries, keys } = self;
        let shape = AttentionShape { images: 1, heads: 1, head, queries, keys };
        let (nq, nk) = (queries * head, keys * head);
        let far = |i: usize| if i / head == keys / 2 { 64.0 } else { 1.0 };
        let q = lab.act_of(&numbers(nq, 1).iter().map(|x| 4.0 * x).collect::<Vec<_>>());
        let k = lab.act_of(&numbers(nk, 2).iter().enumerate().map(|(i, x)| far(i) * x).collect::<Vec<_>>());
        let (v, mut o, mut lse) = (lab.act(nk, 3), lab.act(nq, 5), lab.full(queries, 6));
        lab.0.attention(&q, &k, &v, shape, &mut o, &mut lse);
        vec![lab.read("o", &o, nq, 1.0, 1.0), lab.read_full("lse", &lse, queries)]
    },
    [(32, 40, 256), (32, 40, 600), (64, 40, 128), (64, 40, 300)]
);

/// By the joint operation where there is one, else by those that it joins; then y again from what was kept.
fn attention_branch<B: Backend>(
    backend: &B,
    (x, normed): (&B::Act, &B::Act),
    (k, v): (&B::Act, &B::Act),
    shape: AttentionShape,
    weights: &AttentionWeights<'_, B>,
    drop: Option<Dropout>,
    outputs: AttentionOutputs<'_, B>,
) -> Option<B::Act> {
    let AttentionShape { images, heads, head, queries, .. } = shape;
    let (rows, channels) = (images * queries, heads * head);
    let again = || backend.act(rows * channels);
    if backend.fuses_attention(shape, outputs.kept.is_some()) {
        let AttentionOutputs { y, kept: Some((q, o, lse)) } = outputs else {
            backend.attention_branch(x, normed, k, v, shape, weights, drop, outputs);
            return None;
        };
        let mut again = again();
        let kept = Some((q, &mut *o, lse));
        backend.attention_branch(x, normed, k, v, shape, weights, drop, AttentionOutputs { y, kept });
        backend.attention_join(x, o, shape, weights.output, drop, &mut again);
        return Some(again);
    }
    let [mut own_q, mut own_o, mut branch] = [(); 3].map(|()| again());
    let mut own_lse = backend.full(rows * heads);
    let kept = outputs.kept.is_some();
    let (q, o, lse) = outputs.kept.unwrap_or((&mut own_q, &mut own_o, &mut own_lse));
    let product = Product { rows, inputs: channels, outputs: channels };
    backend.linear(normed, weights.query.0, weights.query.1, product, q, false);
    backend.attention(q, k, v, shape, o, lse);
    backend.linear(o, weights.output.0, weights.output.1, product, &mut branch, false);
    let grid = Grid { images, height: queries, width: 1 };
    backend.residual(x, &branch, drop, grid, channels, outputs.y);
    kept.then(|| {
        let mut again = again();
        backend.residual(x, &branch, drop, grid, channels, &mut again);
        again
    })
}

case!(
    attention_branches,
    AttentionBranches { images: usize, heads: usize, queries: usize, keys: usize, rate: f32, biases: bool },
    |self, lab| {
        let &Self { images, heads, queries, keys, rate, biases } = self;
        let shape = AttentionShape { images, heads, head: 32, queries, keys };
        let (channels, n_lse) = (heads * 32, images * heads * queries);
        let (nq, nk) = (images * queries * channels, images * keys * channels);
        let (x, normed, k, v) = (lab.act(nq, 1), lab.act(nq, 2), lab.act(nk, 3), lab.act(nk, 4));
        let (query, output) = (lab.act(channels * channels, 5), lab.act(channels * channels, 6));
        let (query_bias, output_bias) = (lab.act(channels, 7), lab.act(channels, 8));
        let weights = AttentionWeights {
            query: (&query, biases.then_some(&query_bias)),
            output: (&output, biases.then_some(&output_bias)),
        };
        let drop = (rate > 0.0).then(|| drop_of(Purpose::DropPath, rate));
        let run = |outputs| attention_branch(lab.0, (&x, &normed), (&k, &v), shape, &weights, drop, outputs);
        let [mut y, mut y_alone, mut q, mut o] = [9, 10, 11, 12].map(|site| lab.act(nq, site));
        let mut lse = lab.full(n_lse, 13);
        let again = run(AttentionOutputs { y: &mut y, kept: Some((&mut q, &mut o, &mut lse)) }).expect("it keeps");
        assert!(run(AttentionOutputs { y: &mut y_alone, kept: None }).is_none());
        for other in [&again, &y_alone] {
            assert_eq!(lab.0.download_act(&y, nq), lab.0.download_act(other, nq), "{self:?}");
        }
        // Queries are rounded, which moves probabilities; these are, and the outputs.
        vec![
            lab.read("y", &y, nq, 1.0, 2.0),
            lab.read("q", &q, nq, 1.0, 0.0),
            lab.read("o", &o, nq, 1.0, 2.0),
            Output { summed: 1.0, ..lab.read_full("lse", &lse, n_lse) },
        ]
    },
    [
        (1, 1, 70, 64, 0.0, true),
        (3, 1, 300, 256, 0.4, true),
        (2, 1, 1, 2, 0.0, false),
        (3, 1, 257, 300, 0.4, false),
        (1, 2, 70, 64, 0.0, true),
        (3, 2, 300, 256, 0.4, true),
        (2, 2, 1, 2, 0.0, false),
        (3, 2, 33, 600, 0.4, false),
        (2, 2, 290, 97, 0.0, true),
        // Several tiles of queries to a block.
        (1024, 1, 257, 3, 0.4, true),
    ]
);

case!(
    depthwise,
    Depthwise { images: usize, height: usize, width: usize, channels: usize },
    |self, lab| {
        let (grid, channels) = (Grid { images: self.images, height: self.height, width: self.width }, self.channels);
        let n = grid.rows() * channels;
        let (h, w, b, dg) = (lab.act(n, 1), lab.full(9 * channels, 2), lab.full(channels, 3), numbers(n, 4));
        let mut g = lab.act(n, 5);
        lab.0.depthwise_gelu(&h, &w, &b, grid, channels, &mut g);
        let [mut again, mut again_alone, mut dh, mut dh_alone, mut dh_last] =
            [5, 6, 7, 8, 9].map(|site| lab.act(n, site));
        let (mut dw, mut dw_alone) = (lab.full(9 * channels, 10), lab.full(9 * channels, 10));
        let (mut dw_last, mut db) = (lab.full(9 * channels, 10), lab.full(channels, 11));
        let (mut shift, mut shift_alone) = (lab.full(channels, 12), lab.full(channels, 13));
        let mut du = lab.act_of(&dg);
        lab.0.depthwise_gelu_backward(&h, &w, &b, grid, channels, &mut du, Some(&mut again), Some(&mut db));
        lab.0.depthwise_gelu_backward(&h, &w, &b, grid, channels, &mut lab.act_of(&dg), Some(&mut again_alone), None);
        let mut du_alone = lab.act_of(&dg);
        lab.0.depthwise_gelu_backward(&h, &w, &b, grid, channels, &mut du_alone, None, None);
        let back = |dh, dw, shift| lab.0.depthwise_backward(&du, &h, &w, grid, channels, dh, dw, shift);
        back(Some(&mut dh), Some(&mut dw), Some(&mut shift));
        back(Some(&mut dh_alone), None, Some(&mut shift_alone));
        back(Some(&mut dh_last), Some(&mut dw_last), None);
        back(None, Some(&mut dw_alone), None);
        // dh, dw: the gradient before the GELU, which they are summed from, is rounded.
        vec![
            lab.read("g", &g, n, 1.0, 0.0),
            lab.read("g again", &again, n, 1.0, 0.0),
            lab.read("g again alone", &again_alone, n, 1.0, 0.0),
            lab.read("du", &du, n, 1.0, 0.0),
            lab.read("du alone", &du_alone, n, 1.0, 0.0),
            lab.read("dh", &dh, n, 1.0, 1.0),
            lab.read("dh alone", &dh_alone, n, 1.0, 1.0),
            lab.read("dh with parameters", &dh_last, n, 1.0, 1.0),
            Output { summed: 1.0, ..lab.read_full("dw", &dw, 9 * channels) },
            Output { summed: 1.0, ..lab.read_full("dw alone", &dw_alone, 9 * channels) },
            lab.read_full("db", &db, channels),
            // Each rounding of du counts here by the sum of its weights.
            Output { summed: 4.0, ..lab.read_full("shift", &shift, channels) },
            Output { summed: 4.0, ..lab.read_full("shift alone", &shift_alone, channels) },
        ]
    },
    [
        (1, 1, 1, 1),
        (3, 2, 5, 3),
        (1, 17, 19, 8),
        (2, 4, 3, 35),
        (1, 5, 4, 128),
        (2, 16, 16, 48),
        (1, 3, 33, 34),
        (1, 66, 17, 6),
        (1, 129, 2, 9),
        (2, 64, 1, 2),
        (3, 9, 8, 130)
    ]
);

/// By the joint operation where there is one, else by those that it joins.
fn mix_ffn_forward<B: Backend>(
    backend: &B,
    x: &B::Act,
    grid: Grid,
    weights: &FfnWeights<'_, B>,
    drop: Option<Dropout>,
    outputs: FfnOutputs<'_, B>,
) {
    let &FfnWeights { norm, expand, mix, contract, next, channels, hidden } = weights;
    if backend.fuses_mix_ffn(channels, hidden) {
        return backend.mix_ffn(x, grid, weights, drop, outputs);
    }
    let rows = grid.rows();
    let [mut own_h, mut g] = [(); 2].map(|()| backend.act(rows * hidden));
    let [mut own_normed, mut branch] = [(); 2].map(|()| backend.act(rows * channels));
    let (normed, h) = (outputs.normed.unwrap_or(&mut own_normed), outputs.h.unwrap_or(&mut own_h));
    backend.layer_norm(x, norm.0, norm.1, rows, channels, normed, outputs.stats);
    backend.linear(normed, expand.0, expand.1, Product { rows, inputs: channels, outputs: hidden }, h, false);
    backend.depthwise_gelu(h, mix.0, mix.1, grid, hidden, &mut g);
    let product = Product { rows, inputs: hidden, outputs: channels };
    backend.linear(&g, contract.0, contract.1, product, &mut branch, false);
    let (to, stats) = outputs.next;
    backend.residual_norm(x, &branch, drop, grid, channels, next, outputs.y, to, stats);
}

/// The way back, likewise.
fn mix_ffn_backward<B: Backend>(
    backend: &B,
    (d, drop, h): (&B::Act, Option<Dropout>, &B::Act),
    weights: MixFfnWeights<'_, B>,
    grid: Grid,
    (channels, hidden): (usize, usize),
    dx: &mut B::Act,
    parts: MixFfnParts<'_, B>,
) {
    if backend.joins_mix_ffn_backward(grid, channels, hidden) {
        backend.mix_ffn_backward(d, drop, h, weights, grid, channels, hidden, dx, parts);
        return;
    }
    let MixFfnParts { sums, contract: dw2, expand: dw1 } = parts;
    let rows = grid.rows();
    let mut scaled = backend.act(rows * channels);
    let d = match drop {
        Some(drop) => {
            backend.drop_path(d, drop, grid, channels, &mut scaled);
            &scaled
        }
        None => d,
    };
    let [mut du, mut room, mut g] = [(); 3].map(|()| backend.act(rows * hidden));
    let (dh, dw1) = match dw1 {
        Some(MixFfnExpansion::Product(dh)) => (dh, None),
        Some(MixFfnExpansion::Summed { normed, dw }) => (&mut room, Some((normed, dw))),
        None => (&mut room, None),
    };
    let contract = Product { rows, inputs: hidden, outputs: channels };
    backend.linear_backward_input(d, weights.contract, contract, &mut du, false);
    let [dw, db, shift] = sums.map_or([None, None, None], |sums| sums.map(Some));
    backend.depthwise_gelu_backward(h, weights.mix, weights.mix_bias, grid, hidden, &mut du, Some(&mut g), db);
    backend.depthwise_backward(&du, h, weights.mix, grid, hidden, Some(&mut *dh), dw, shift);
    let expand = Product { rows, inputs: channels, outputs: hidden };
    backend.linear_backward_input(dh, weights.expand, expand, dx, false);
    if let Some((normed, dw1)) = dw1 {
        backend.linear_backward_weight(dh, normed, expand, dw1);
    }
    if let Some(dw2) = dw2 {
        backend.linear_backward_weight(d, &g, contract, dw2);
    }
}

case!(
    mix_ffn_backwards,
    MixFfnBackward { images: usize, height: usize, width: usize, channels: usize },
    |self, lab| {
        let (grid, channels) = (Grid { images: self.images, height: self.height, width: self.width }, self.channels);
        let hidden = 4 * channels;
        let (n, wide) = (grid.rows() * channels, grid.rows() * hidden);
        let (d, h, w, b) = (lab.act(n, 1), lab.act(wide, 2), lab.full(9 * hidden, 3), lab.full(hidden, 4));
        let (w1, w2) = (lab.act(hidden * channels, 5), lab.act(hidden * channels, 6));
        let [mut dx, mut dx_all, mut dx_expand, mut dx_sums, mut dx_contract] =
            [7, 8, 9, 10, 11].map(|site| lab.act(n, site));
        let [mut dh_all, mut dh_alone] = [12, 14].map(|site| lab.act(wide, site));
        let mut sums = [(9, 15), (1, 16), (1, 17)].map(|(kinds, site)| lab.full(kinds * hidden, site));
        let mut sums_alone = [(9, 15), (1, 16), (1, 17)].map(|(kinds, site)| lab.full(kinds * hidden, site));
        // The expansion's input, and the gradients of the products' weights: both, and each alone.
        let normed = lab.act(n, 18);
        let [mut dw1, mut dw2, mut dw1_alone, mut dw2_alone] =
            [19, 20, 19, 20].map(|site| lab.full(channels * hidden, site));
        let drop = Some(drop_of(Purpose::DropPath, 0.4));
        let run = |dx: &mut B::Act, drop, parts| {
            let weights = MixFfnWeights { expand: &w1, mix: &w, mix_bias: &b, contract: &w2 };
            mix_ffn_backward(lab.0, (&d, drop, &h), weights, grid, (channels, hidden), dx, parts);
        };
        // As the CUDA backend divides the work.
        let sums_expansion = channels == 32;
        let [all, alone] = [(&mut dw1, &mut dh_all), (&mut dw1_alone, &mut dh_alone)].map(|(dw, dh)| {
            if sums_expansion { MixFfnExpansion::Summed { normed: &normed, dw } } else { MixFfnExpansion::Product(dh) }
        });
        run(&mut dx, drop, MixFfnParts { sums: None, contract: None, expand: None });
        let parts = MixFfnParts { sums: Some(sums.each_mut()), contract: Some(&mut dw2), expand: Some(all) };
        run(&mut dx_all, drop, parts);
        // Which of the sums are wanted is no matter of the size.
        let each_alone = grid.rows() <= 256;
        if each_alone {
            run(&mut dx_sums, None, MixFfnParts { sums: Some(sums_alone.each_mut()), contract: None, expand: None });
            run(&mut dx_expand, None, MixFfnParts { sums: None, contract: None, expand: Some(alone) });
            run(&mut dx_contract, None, MixFfnParts { sums: None, contract: Some(&mut dw2_alone), expand: None });
        }
        let of_expansion = |name, dw, dh| match sums_expansion {
            // From dh, which is rounded twice.
            true => Output { summed: 2.0, ..lab.read_full(name, dw, channels * hidden) },
            false => lab.read(name, dh, wide, 1.0, 1.0),
        };
        let [dw, db, shift] = &sums;
        let [dw_alone, db_alone, shift_alone] = &sums_alone;
        // The gradient behind the GELU is rounded; dh and dw are summed from that before it, which is rounded too, and dx from
        // dh, half of its sums waiting rounded where channels are many; dw2 from g, which is rounded.
        let dx_of = |name, dx| lab.read(name, dx, n, if channels > 32 { 2.0 } else { 1.0 }, 1.0);
        let sum = |name, full, n, summed| Output { summed, ..lab.read_full(name, full, n) };
        let mut outputs = vec![
            dx_of("dx", &dx),
            dx_of("dx with all", &dx_all),
            of_expansion("of dw1", &dw1, &dh_all),
            sum("dw2", &dw2, channels * hidden, 1.0),
            sum("dw", dw, 9 * hidden, 1.0),
            sum("db", db, hidden, 1.0),
            sum("shift", shift, hidden, 4.0),
        ];
        if each_alone {
            outputs.extend([
                dx_of("dx with dw1", &dx_expand),
                dx_of("dx with dw2", &dx_contract),
                dx_of("dx with sums", &dx_sums),
                of_expansion("of dw1 alone", &dw1_alone, &dh_alone),
                sum("dw2 alone", &dw2_alone, channels * hidden, 1.0),
                sum("dw alone", dw_alone, 9 * hidden, 1.0),
                sum("db alone", db_alone, hidden, 1.0),
                sum("shift alone", shift_alone, hidden, 4.0),
            ]);
        }
        outputs
    },
    [
        (1, 1, 1, 32),
        (3, 5, 7, 32),
        (1, 16, 16, 64),
        (2, 33, 20, 32),
        (3, 5, 7, 64),
        (1, 3, 61, 64),
        (5, 2, 1, 32),
        (1, 130, 2, 32),
        (2, 40, 15, 64),
        // So tall that a block walks many rows.
        (1, 401, 1, 32),
        (1, 401, 1, 64)
    ]
);

/// [`AttentionInput::attention_input_backward`], or its parts where the backend does not join them.
fn attention_input_backward<B: Backend>(
    backend: &B,
    (dq, dreduced): (&B::Act, &B::Act),
    inputs: &AttentionInputs<'_, B>,
    grid: Grid,
    dx: &mut B::Act,
    parameters: Option<(&mut B::Full, &mut B::Full)>,
    query_sums: Option<(&mut B::Full, &mut B::Full)>,
    front: InFront<'_, B>,
) {
    let &AttentionInputs { query, reduction, window, x, stats, affine: (gamma, beta), channels } = inputs;
    if backend.joins_attention_input(grid, channels, window) {
        return backend.attention_input_backward(dq, dreduced, inputs, grid, dx, parameters, query_sums, front);
    }
    if let Some((dw, db)) = query_sums {
        let (mut normed, mut stats) = (backend.act(grid.rows() * channels), backend.full(2 * grid.rows()));
        backend.layer_norm(x, gamma, beta, grid.rows(), channels, &mut normed, &mut stats);
        let product = Product { rows: grid.rows(), inputs: channels, outputs: channels };
        backend.linear_backward_params(dq, &normed, product, dw, db);
    }
    let (rows, keys, taps) = (grid.rows(), grid.through(window).rows(), window.side * window.side);
    let [mut gathered, mut dn] = [(); 2].map(|()| backend.act(rows * channels));
    let product = Product { rows: keys, inputs: taps * channels, outputs: channels };
    backend.linear_backward_input(dreduced, reduction, product, &mut gathered, false);
    backend.linear_backward_input(dq, query, Product { rows, inputs: channels, outputs: channels }, &mut dn, false);
    backend.patches_backward(&gathered, grid, channels, window, &mut dn);
    backend.layer_norm_backward_all(&dn, x, stats, gamma, rows, channels, (dx, true), parameters, front);
}

/// [`Convolution::convolution_norm`], or its parts where the backend does not fuse them.
fn convolution_norm<B: Backend>(
    backend: &B,
    (tokens, grid): (&B::Act, Grid),
    convolution: &ConvolutionNorm<'_, B>,
    y: &mut B::Act,
    kept: Option<(&mut B::Act, &mut B::Full)>,
    next: Option<NextNorm<'_, B>>,
) {
    let &ConvolutionNorm { window, weight, bias, norm: (gamma, beta), inputs, outputs } = convolution;
    if backend.fuses_convolution(grid, window, inputs, outputs) {
        return backend.convolution_norm(tokens, grid, convolution, y, kept, next);
    }
    let (rows, gathered) = (grid.through(window).rows(), window.side * window.side * inputs);
    let (mut own_raw, mut own_stats) = (backend.act(rows * outputs), backend.full(2 * rows));
    let (raw, stats) = kept.unwrap_or((&mut own_raw, &mut own_stats));
    let mut patches = backend.act(rows * gathered);
    backend.patches(tokens, grid, inputs, window, &mut patches);
    backend.linear(&patches, weight, bias, Product { rows, inputs: gathered, outputs }, raw, false);
    backend.layer_norm(raw, gamma, beta, rows, outputs, y, stats);
    backend.next_norm(y, rows, outputs, next);
}

case!(
    convolution,
    Convolution { images: usize, height: usize, width: usize, window: (usize, usize, usize), channels: (usize, usize) },
    |self, lab| {
        let &Self { images, height, width, window: (side, stride, padding), channels: (inputs, outputs) } = self;
        let (grid, window) = (Grid { images, height, width }, Window { side, stride, padding });
        let rows = grid.through(window).rows();
        let n = rows * outputs;
        let (x, weight) = (lab.act(grid.rows() * inputs, 1), lab.act(side * side * inputs * outputs, 2));
        let (shift, gamma, beta) = (lab.act(outputs, 3), lab.full(outputs, 4), lab.full(outputs, 5));
        let [mut raw, mut y, mut plain, mut alone] = [6, 7, 8, 9].map(|site| lab.act(n, site));
        let mut stats = lab.full(2 * rows, 10);
        let norm = (&gamma, &beta);
        let layer = |bias| ConvolutionNorm { window, weight: &weight, bias, norm, inputs, outputs };
        let [mut next, mut next_alone] = [(); 2].map(|()| Behind::new(lab, rows, outputs));
        let (tokens, kept) = ((&x, grid), Some((&mut raw, &mut stats)));
        convolution_norm(lab.0, tokens, &layer(Some(&shift)), &mut y, kept, next.next());
        convolution_norm(lab.0, tokens, &layer(Some(&shift)), &mut alone, None, None);
        convolution_norm(lab.0, tokens, &layer(None), &mut plain, None, next_alone.next());
        next.check(lab, &y, self);
        next_alone.check(lab, &plain, self);
        // Whether raw is kept, and what is behind is made, changes no bit.
        let bits = |act| lab.0.download_act(act, n).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&y), bits(&alone), "{self:?}");
        // Against what the rounded raw has: one more than means are off by, and the ratio of the inverse deviations.
        let measured = {
            let (raw, stats) = (lab.0.download_act(&raw, n), lab.0.scalars(&stats, 2 * rows));
            let off = |(row, stats): (&[f32], &[f64])| {
                let average = |f: &dyn Fn(f64) -> f64| row.iter().map(|&x| f(x.into())).sum::<f64>() / outputs as f64;
                let mean = average(&|x| x);
                let variance = average(&|x| (x - mean).powi(2));
                [1.0 + stats[0] - mean, stats[1] * (variance + 1e-5).sqrt()]
            };
            raw.chunks_exact(outputs).zip(stats.chunks_exact(2)).flat_map(off).collect()
        };
        let mut made = Vec::from(next.read(lab));
        made.extend([
            lab.read("raw", &raw, n, 1.0, 0.0),
            // Of the rounded raw.
            lab.read("y", &y, n, 1.0, 1.0),
            lab.read("y alone", &alone, n, 1.0, 1.0),
            lab.read("y without a bias", &plain, n, 1.0, 1.0),
            Output { name: "measured", values: measured, own: 0.0, summed: 0.0 },
        ]);
        made
    },
    [
        (1, 8, 8, (8, 8, 0), (32, 32)),
        (3, 10, 14, (2, 2, 0), (32, 32)),
        (2, 32, 40, (8, 8, 0), (32, 32)),
        (1, 3, 2, (1, 1, 0), (32, 32)),
        (1, 6, 9, (3, 3, 0), (32, 32)),
        (2, 12, 16, (4, 4, 0), (64, 64)),
        (5, 8, 10, (2, 2, 0), (64, 64)),
        (1, 2, 4, (2, 2, 0), (160, 160)),
        (3, 12, 10, (2, 2, 0), (160, 160)),
        // A line and a column of tokens that no window has, and another side.
        (1, 3, 5, (2, 2, 0), (160, 160)),
        (1, 3, 6, (3, 3, 0), (160, 160)),
        (2, 4, 6, (2, 2, 0), (24, 24)),
        (1, 5, 8, (2, 2, 0), (32, 32)),
        (1, 2, 2, (3, 2, 1), (32, 64)),
        (3, 12, 9, (3, 2, 1), (32, 64)),
        (3, 16, 16, (3, 2, 1), (32, 64)),
        (1, 1, 7, (3, 2, 1), (64, 160)),
        (3, 14, 10, (3, 2, 1), (64, 160)),
        (1, 3, 5, (3, 2, 1), (160, 256)),
        (2, 16, 13, (3, 2, 1), (160, 256)),
        (2, 7, 6, (3, 2, 1), (40, 48))
    ]
);

/// [`Convolution::convolution_backward_input`], or its parts where the backend does not fuse them.
fn convolution_backward_input<B: Backend>(
    backend: &B,
    (dy, weight): (&B::Act, &B::Act),
    (grid, window): (Grid, Window),
    (inputs, outputs): (usize, usize),
    dx: &mut B::Act,
) {
    if backend.fuses_convolution_backward(grid, window, inputs, outputs) {
        return backend.convolution_backward_input(dy, weight, grid, window, inputs, outputs, dx);
    }
    let (rows, gathered) = (grid.through(window).rows(), window.side * window.side * inputs);
    let mut patches = backend.act(rows * gathered);
    backend.linear_backward_input(dy, weight, Product { rows, inputs: gathered, outputs }, &mut patches, false);
    backend.patches_backward(&patches, grid, inputs, window, dx);
}

/// [`Convolution::convolution_backward_weight`], or its parts where the backend does not fuse them.
fn convolution_backward_weight<B: Backend>(
    backend: &B,
    (tokens, dy): (&B::Act, &B::Act),
    (grid, window): (Grid, Window),
    (inputs, outputs): (usize, usize),
    dw: &mut B::Full,
) {
    if backend.sums_convolution_weight(grid, window, inputs, outputs) {
        return backend.convolution_backward_weight(tokens, dy, grid, window, inputs, outputs, dw);
    }
    let (rows, gathered) = (grid.through(window).rows(), window.side * window.side * inputs);
    let mut patches = backend.act(rows * gathered);
    backend.patches(tokens, grid, inputs, window, &mut patches);
    backend.linear_backward_weight(dy, &patches, Product { rows, inputs: gathered, outputs }, dw);
}

case!(
    convolution_backward,
    ConvolutionBackward {
        images: usize,
        height: usize,
        width: usize,
        window: (usize, usize, usize),
        channels: (usize, usize)
    },
    |self, lab| {
        let &Self { images, height, width, window: (side, stride, padding), channels: (inputs, outputs) } = self;
        let (grid, window) = (Grid { images, height, width }, Window { side, stride, padding });
        let (rows, n, numbers) = (grid.through(window).rows(), grid.rows() * inputs, side * side * inputs * outputs);
        let (dy, weight, mut dx) = (lab.act(rows * outputs, 1), lab.act(numbers, 2), lab.act(n, 3));
        convolution_backward_input(lab.0, (&dy, &weight), (grid, window), (inputs, outputs), &mut dx);
        // Where they are not fused, what is added has been rounded.
        let fused = match window {
            Window { side: 3, stride: 2, .. } => [64, 160, 256].contains(&outputs),
            Window { side: 2, .. } => outputs == 160,
            _ => false,
        };
        let parts = if fused { 0.0 } else { 1.0 };
        let (x, mut dw) = (lab.act(n, 4), lab.full(numbers, 5));
        convolution_backward_weight(lab.0, (&x, &dy), (grid, window), (inputs, outputs), &mut dw);
        vec![lab.read("dx", &dx, n, 1.0, parts), lab.read_full("dw", &dw, numbers)]
    },
    [
        (1, 1, 1, (3, 2, 1), (32, 64)),
        (1, 2, 2, (3, 2, 1), (32, 64)),
        (3, 12, 9, (3, 2, 1), (32, 64)),
        // More than a block each way, to whole blocks and to a single line and column of windows.
        (2, 16, 32, (3, 2, 1), (32, 64)),
        (2, 18, 34, (3, 2, 1), (32, 64)),
        (1, 17, 33, (3, 2, 1), (32, 64)),
        (1, 1, 7, (3, 2, 1), (64, 160)),
        (3, 14, 10, (3, 2, 1), (64, 160)),
        (1, 19, 35, (3, 2, 1), (64, 160)),
        (1, 3, 5, (3, 2, 1), (160, 256)),
        (2, 16, 13, (3, 2, 1), (160, 256)),
        (1, 5, 37, (3, 2, 1), (160, 256)),
        // Several chunks of windows to each block that sums the weight's gradient, and none to the last.
        (2, 27, 33, (3, 2, 1), (160, 256)),
        (2, 7, 6, (3, 2, 1), (40, 48)),
        // The sequence reductions.
        (1, 8, 8, (8, 8, 0), (32, 32)),
        (3, 24, 40, (8, 8, 0), (32, 32)),
        (2, 12, 20, (4, 4, 0), (64, 64)),
        (1, 68, 20, (4, 4, 0), (64, 64)),
        (1, 2, 2, (2, 2, 0), (160, 160)),
        (3, 6, 10, (2, 2, 0), (160, 160)),
        // More than a block each way, and a line and a column of tokens that no window has.
        (1, 18, 35, (2, 2, 0), (160, 160)),
        (2, 5, 7, (2, 2, 0), (160, 160)),
        // Lines of taps that end within a block's part, and windows of one token.
        (2, 9, 15, (3, 3, 0), (32, 32)),
        (5, 3, 7, (1, 1, 0), (32, 32)),
        (5, 70, 1, (1, 1, 0), (160, 160)),
        // A block's windows take every place of the ring, and more.
        (1, 72, 1224, (24, 24, 0), (32, 32)),
        (1, 108, 204, (12, 12, 0), (64, 64)),
        (1, 88, 72, (8, 8, 0), (160, 160)),
        // One more column of tokens than whole windows have.
        (2, 4, 9, (4, 4, 0), (64, 64)),
        (2, 6, 9, (3, 3, 0), (24, 24))
    ]
);

case!(
    attention_input,
    AttentionInput { images: usize, across: (usize, usize), side: usize, channels: usize },
    |self, lab| {
        let &Self { images, across, side, channels } = self;
        let grid = Grid { images, height: across.0 * side, width: across.1 * side };
        let (rows, keys) = (grid.rows(), images * across.0 * across.1);
        let n = rows * channels;
        let (dq, dreduced, x) = (lab.act(n, 1), lab.act(keys * channels, 2), lab.act(n, 3));
        let (query, reduction) = (lab.act(channels * channels, 4), lab.act(side * side * channels * channels, 5));
        let (gamma, beta) = (lab.full(channels, 6), lab.full(channels, 7));
        let (mut normed, mut stats) = (lab.act(n, 8), lab.full(2 * rows, 9));
        lab.0.layer_norm(&x, &gamma, &beta, rows, channels, &mut normed, &mut stats);
        let window = Window { side, stride: side, padding: 0 };
        let (query, reduction, x, stats, affine) = (&query, &reduction, &x, &stats, (&gamma, &beta));
        let inputs = AttentionInputs { query, reduction, window, x, stats, affine, channels };
        let drop = drop_of(Purpose::DropPath, 0.4);
        let [mut dx, mut plain, mut summed, mut scaled, mut dropped] =
            [10, 10, 10, 11, 12].map(|site| lab.act(n, site));
        let [mut dgamma, mut dbeta, mut bias, mut alone] = [13, 14, 15, 16].map(|site| lab.full(channels, site));
        let run = |dx: &mut B::Act, parameters, query, front| {
            attention_input_backward(lab.0, (&dq, &dreduced), &inputs, grid, dx, parameters, query, front);
        };
        run(&mut dx, None, None, InFront { scaled: Some((drop, grid, Some(&mut scaled))), bias: None });
        run(&mut plain, None, None, InFront { scaled: None, bias: Some(&mut alone) });
        let front = InFront { scaled: Some((drop, grid, Some(&mut dropped))), bias: Some(&mut bias) };
        // As the CUDA backend divides the work.
        let (mut dw, mut db) = (lab.full(channels * channels, 19), lab.full(channels, 20));
        let query = (channels == 32).then_some((&mut dw, &mut db));
        run(&mut summed, Some((&mut dgamma, &mut dbeta)), query, front);
        // Without the branch's gradient in memory.
        let [mut unwritten, mut unwritten_too] = [10, 10].map(|site| lab.act(n, site));
        let [mut bias_unwritten, mut bias_unwritten_too] = [15, 15].map(|site| lab.full(channels, site));
        let front = |bias| InFront { scaled: Some((drop, grid, None)), bias: Some(bias) };
        run(&mut unwritten, None, None, front(&mut bias_unwritten));
        let parameters = Some((&mut lab.full(channels, 17), &mut lab.full(channels, 18)));
        run(&mut unwritten_too, parameters, None, front(&mut bias_unwritten_too));
        // Where the parts are not joined, the LayerNorm's gradient is rounded, and was before reduced tokens' came to it.
        let parts = if [32, 64].contains(&channels) { 0.0 } else { 2.0 };
        let full = |name, values| Output { summed: parts, ..lab.read_full(name, values, channels) };
        vec![
            lab.read("dx", &dx, n, 1.0, parts),
            lab.read("scaled", &scaled, n, 1.0, parts),
            lab.read("dx with a bias", &plain, n, 1.0, parts),
            Output { summed: 1.0, ..lab.read_full("bias alone", &alone, channels) },
            lab.read("dx with parameters", &summed, n, 1.0, parts),
            lab.read("scaled with parameters", &dropped, n, 1.0, parts),
            full("dgamma", &dgamma),
            full("dbeta", &dbeta),
            full("bias", &bias),
            // Of the normalised tokens, which are rounded.
            Output { summed: 1.0, ..lab.read_full("Q's weight", &dw, channels * channels) },
            lab.read_full("Q's bias", &db, channels),
            lab.read("dx with a bias without scaled", &unwritten, n, 1.0, parts),
            full("bias alone without scaled", &bias_unwritten),
            lab.read("dx with parameters without scaled", &unwritten_too, n, 1.0, parts),
            full("bias without scaled", &bias_unwritten_too),
        ]
    },
    [
        (1, (1, 1), 8, 32),
        (3, (5, 7), 2, 32),
        (2, (4, 4), 8, 32),
        (1, (3, 2), 1, 32),
        // Taps that warps do not share evenly.
        (1, (2, 3), 3, 32),
        (2, (3, 3), 4, 64),
        (5, (4, 5), 2, 64),
        (2, (2, 3), 2, 24)
    ]
);

case!(
    residual,
    Residual { images: usize, height: usize, width: usize, channels: usize },
    |self, lab| {
        let (grid, channels) = (Grid { images: self.images, height: self.height, width: self.width }, self.channels);
        let n = grid.rows() * channels;
        let drop = drop_of(Purpose::DropPath, 0.4);
        let (x, branch) = (lab.act(n, 1), lab.act(n, 2));
        let [mut y, mut plain, mut path, mut dropped, mut sum] = [3, 4, 5, 6, 7].map(|site| lab.act(n, site));
        lab.0.residual(&x, &branch, Some(drop), grid, channels, &mut y);
        lab.0.residual(&x, &branch, None, grid, channels, &mut plain);
        lab.0.drop_path(&x, drop, grid, channels, &mut path);
        lab.0.dropout(&x, drop_of(Purpose::LoraDropout, 0.3), n, &mut dropped);
        lab.0.accumulate(&x, n, &mut sum);
        vec![
            lab.read("y", &y, n, 1.0, 0.0),
            lab.read("plain", &plain, n, 1.0, 0.0),
            lab.read("path", &path, n, 1.0, 0.0),
            lab.read("dropped", &dropped, n, 1.0, 0.0),
            lab.read("sum", &sum, n, 1.0, 0.0),
        ]
    },
    [(9, 1, 3, 5), (8, 3, 3, 8), (11, 2, 1, 4)]
);

case!(
    upsample,
    Upsample { images: usize, from: (usize, usize), to: (usize, usize), channels: usize },
    |self, lab| {
        let from = Grid { images: self.images, height: self.from.0, width: self.from.1 };
        let to = Grid { images: self.images, height: self.to.0, width: self.to.1 };
        let channels = self.channels;
        let (small, large) = (from.rows() * channels, to.rows() * channels);
        let (x, dy) = (lab.act(small, 1), lab.act(large, 2));
        let (mut y, mut added, mut dx) = (lab.act(large, 3), lab.act(large, 4), lab.act(small, 5));
        lab.0.upsample(&x, from, to, channels, &mut y, false);
        lab.0.upsample(&x, from, to, channels, &mut added, true);
        lab.0.upsample_backward(&dy, from, to, channels, &mut dx);
        vec![
            lab.read("y", &y, large, 1.0, 0.0),
            lab.read("y added", &added, large, 1.0, 0.0),
            lab.read("dx", &dx, small, 1.0, 0.0),
        ]
    },
    [
        (1, (2, 3), (7, 5), 2),
        (3, (1, 1), (4, 4), 1),
        (2, (4, 4), (32, 32), 8),
        (1, (3, 5), (3, 5), 16),
        (1, (5, 6), (13, 17), 3)
    ]
);

case!(
    head,
    Head { rows: (usize, usize), channels: usize, rate: f32 },
    |self, lab| {
        let (b, channels, rows) = (lab.0, self.channels, [self.rows.0, self.rows.1]);
        let drop = (self.rate > 0.0).then(|| drop_of(Purpose::HeadDropout, self.rate));
        let z = [lab.act(rows[0] * channels, 1), lab.act(rows[1] * channels, 2)];
        let mut moments = [lab.full(2 * channels, 3), lab.full(2 * channels, 4)];
        for u in 0..2 {
            b.batch_moments(&z[u], rows[u], channels, &mut moments[u]);
        }
        let (mut stats, mut mean) = (lab.full(2 * channels, 5), lab.full(channels, 6));
        let mut var = lab.full_of(&vec![0.75; channels]);
        b.batch_stats(&[&moments[0], &moments[1]], &rows, channels, 0.1, &mut stats, &mut mean, &mut var);
        let mut running = lab.full(2 * channels, 7);
        b.running_stats(&mean, &var, channels, &mut running);
        let (gamma, beta) = (lab.full(channels, 8), lab.full(channels, 9));
        let view = || BatchNormView { stats: &stats, gamma: &gamma, beta: &beta };
        let n = rows[0] * channels;
        let (mut a, mut da, mut sums) = (lab.act(n, 10), lab.act(n, 11), lab.full(2 * channels, 12));
        b.head_activation(&z[0], view(), drop, rows[0], channels, &mut a);
        b.head_backward(&z[0], view(), drop, rows[0], channels, &mut da, &mut sums);
        let (other, mut total) = (lab.full(2 * channels, 13), lab.full(2 * channels, 14));
        b.zero(&mut total);
        b.add_all(&mut [(vec![&sums, &other], &mut total)]);
        let mut dz = lab.act(n, 15);
        b.batch_norm_backward(&z[0], view(), &other, rows[0] + rows[1], rows[0], channels, &mut dz);
        vec![
            lab.read_full("moments", &moments[0], 2 * channels),
            lab.read_full("stats", &stats, 2 * channels),
            lab.read_full("running mean", &mean, channels),
            lab.read_full("running variance", &var, channels),
            lab.read_full("running stats", &running, 2 * channels),
            lab.read("a", &a, n, 1.0, 0.0),
            lab.read("da", &da, n, 1.0, 0.0),
            lab.read_full("sums", &sums, 2 * channels),
            lab.read_full("total", &total, 2 * channels),
            lab.read("dz", &dz, n, 1.0, 0.0),
        ]
    },
    [((3, 5), 3, 0.0), ((70, 300), 32, 0.1), ((600, 1), 8, 0.1), ((33, 2), 35, 0.3)]
);

case!(
    mix_ffn,
    MixFfn { images: usize, size: (usize, usize), channels: usize, hidden: usize, rate: f32, biases: bool },
    |self, lab| {
        let grid = Grid { images: self.images, height: self.size.0, width: self.size.1 };
        let &Self { channels, hidden, .. } = self;
        let (rows, drop) = (grid.rows(), (self.rate > 0.0).then(|| drop_of(Purpose::DropPath, self.rate)));
        let (narrow, wide, both) = (rows * channels, rows * hidden, channels * hidden);
        let x = lab.act(narrow, 1);
        let [gamma, beta, next_gamma, next_beta] = [2, 3, 4, 5].map(|site| lab.full(channels, site));
        let (expand, contract) = (lab.act(both, 6), lab.act(both, 7));
        let (expand_bias, contract_bias) = (lab.act(hidden, 8), lab.act(channels, 9));
        let (mix, mix_bias) = (lab.full(9 * hidden, 10), lab.full(hidden, 11));
        let weights = FfnWeights {
            norm: (&gamma, &beta),
            expand: (&expand, self.biases.then_some(&expand_bias)),
            mix: (&mix, &mix_bias),
            contract: (&contract, self.biases.then_some(&contract_bias)),
            next: (&next_gamma, &next_beta),
            channels,
            hidden,
        };
        let mut outputs = Vec::new();
        let (mut normed, mut h) = (lab.act(narrow, 12), lab.act(wide, 13));
        for kept in [true, false] {
            let [mut y, mut next] = [14, 15].map(|site| lab.act(narrow, site));
            let [mut stats, mut next_stats] = [16, 17].map(|site| lab.full(2 * rows, site));
            let (normed, h) = (kept.then_some(&mut normed), kept.then_some(&mut h));
            let to = FfnOutputs { y: &mut y, next: (&mut next, &mut next_stats), stats: &mut stats, normed, h };
            mix_ffn_forward(lab.0, &x, grid, &weights, drop, to);
            // On the way to y, the normalised, the hidden and the mixed tokens are rounded. What is behind is of the rounded y,
            // the largest of which is larger than the largest mean.
            outputs.extend([
                lab.read("y", &y, narrow, 1.0, 1.0),
                lab.read("next", &next, narrow, 1.0, 2.0),
                lab.read_full("stats", &stats, 2 * rows),
                Output { summed: 2.0, ..lab.read_full("next stats", &next_stats, 2 * rows) },
            ]);
        }
        outputs.extend([lab.read("normed", &normed, narrow, 1.0, 0.0), lab.read("h", &h, wide, 1.0, 1.0)]);
        outputs
    },
    [
        (1, (5, 7), 32, 128, 0.0, true),
        (3, (16, 16), 32, 128, 0.4, true),
        (2, (33, 20), 32, 96, 0.4, false),
        (1, (1, 1), 32, 32, 0.0, false),
        (3, (5, 7), 64, 256, 0.4, true),
        (1, (9, 33), 64, 64, 0.0, false),
        (2, (16, 16), 64, 256, 0.0, true)
    ]
);

/// A constant added to z has no gradient, which is why one backend does not sum it.
#[test]
fn batch_norm_takes_shifts_away() {
    let backend = Cpu::<f64>::new(Some(1)).expect("threads");
    let (lab, rows, channels) = (Lab(&backend), 600, 24);
    let n = rows * channels;
    let (z, gamma, beta) = (lab.act(n, 1), lab.full(channels, 2), lab.full(channels, 3));
    let [mut moments, mut stats, mut sums, mut total] = [4, 5, 6, 7].map(|site| lab.full(2 * channels, site));
    let (mut mean, mut var) = (lab.full(channels, 8), lab.full(channels, 9));
    backend.batch_moments(&z, rows, channels, &mut moments);
    backend.batch_stats(&[&moments], &[rows], channels, 0.1, &mut stats, &mut mean, &mut var);
    let norm = BatchNormView { stats: &stats, gamma: &gamma, beta: &beta };
    let (mut dz, mut db) = (lab.act(n, 10), lab.full_of(&vec![0.0; channels]));
    backend.head_backward(&z, norm, None, rows, channels, &mut dz, &mut sums);
    backend.zero(&mut total);
    backend.add_all(&mut [(vec![&sums], &mut total)]);
    backend.batch_norm_backward(&z, norm, &total, rows, rows, channels, &mut dz);
    backend.shift_gradient(&dz, rows, channels, &mut db);
    let largest = backend.download_act(&dz, n).iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let db = backend.scalars(&db, channels);
    assert!(largest > 0.01 && db.iter().all(|x| x.abs() < 1e-12 * rows as f64), "{largest}, {db:?}");
}

case!(
    join_stages,
    JoinStages {
        images: usize,
        to: (usize, usize),
        first: Option<usize>,
        parts: Vec<(usize, usize)>,
        channels: usize
    },
    |self, lab| {
        let grid = |(height, width)| Grid { images: self.images, height, width };
        let (to, channels) = (grid(self.to), self.channels);
        let n = to.rows() * channels;
        let parts: Vec<_> = self.parts.iter().map(|&part| grid(part)).collect();
        let acts: Vec<_> = (10..).zip(&parts).map(|(site, part)| lab.act(part.rows() * channels, site)).collect();
        let parts: Vec<_> = acts.iter().zip(parts).collect();
        let (mut z, mut moments, mut silent) = (lab.act(n, 1), lab.full(2 * channels, 2), lab.act(n, 1));
        let inputs = self.first.unwrap_or(0);
        let (tokens, weight, shift) =
            (lab.act(to.rows() * inputs, 5), lab.act(channels * inputs, 6), lab.act(channels, 7));
        // The bias may be absent.
        let bias = (channels > 32).then_some(&shift);
        let first = self.first.map(|inputs| FirstStage { tokens: &tokens, weight: &weight, bias, inputs });
        lab.0.join_stages(first, &parts, to, channels, &mut z, Some(&mut moments));
        lab.0.join_stages(first, &parts, to, channels, &mut silent, None);
        let mut back: Vec<_> = parts.iter().map(|(_, part)| lab.act(part.rows() * channels, 3)).collect();
        let mut back: Vec<_> = back.iter_mut().zip(&parts).map(|(act, (_, part))| (act, *part)).collect();
        lab.0.split_stages(&lab.act(n, 4), to, channels, &mut back);
        // What is measured has been rounded.
        let moments = lab.0.scalars(&moments, 2 * channels);
        let output = |name, values: &[f64]| Output { name, values: values.to_vec(), own: 0.0, summed: 1.0 };
        // A product that is not part of joining rounds its sum.
        let halves: Vec<_> = [2, 4, 8].map(|ratio| (self.to.0 / ratio, self.to.1 / ratio)).into();
        let whole = [self.to.0, self.to.1, channels / 4].iter().all(|size| size % 8 == 0);
        let joint = self.first == Some(32) && whole && self.parts.iter().take(3).eq(&halves);
        let apart = self.first.is_some() && !joint;
        let roundings = (self.parts.len().div_ceil(3).max(1) + usize::from(apart)) as f64;
        vec![
            lab.read("z", &z, n, 1.0, roundings - 1.0),
            lab.read("z without moments", &silent, n, 1.0, roundings - 1.0),
            output("means", &moments[..channels]),
            output("squared deviations", &moments[channels..]),
        ]
        .into_iter()
        .chain(back.iter().map(|(act, part)| lab.read("back", act, part.rows() * channels, 1.0, 0.0)))
        .collect()
    },
    [
        (1, (5, 7), None, vec![(2, 3)], 3),
        (2, (8, 8), None, vec![(4, 4), (2, 2), (1, 1)], 8),
        (3, (12, 16), None, vec![(6, 8), (3, 4)], 64),
        (2, (16, 40), None, vec![(8, 20), (4, 10), (2, 5)], 72),
        (2, (72, 24), None, vec![(36, 12), (18, 6), (9, 3)], 40),
        (1, (136, 8), None, vec![(68, 4), (34, 2), (17, 1)], 264),
        (1, (24, 56), None, vec![(12, 28), (6, 14), (3, 7)], 48),
        (2, (67, 9), None, vec![], 20),
        (2, (16, 8), None, vec![(8, 4), (4, 2), (2, 1), (1, 1)], 24),
        (1, (4, 4), None, vec![(2, 2), (1, 1), (1, 1)], 256),
        (2, (8, 8), Some(32), vec![(4, 4), (2, 2), (1, 1)], 32),
        (2, (72, 24), Some(32), vec![(36, 12), (18, 6), (9, 3)], 96),
        (1, (136, 16), Some(32), vec![(68, 8), (34, 4), (17, 2)], 256),
        (1, (8, 8), Some(32), vec![(4, 4), (2, 2), (1, 1), (1, 1)], 64),
        (1, (8, 8), Some(32), vec![(4, 4), (2, 2), (1, 1)], 40),
        (1, (8, 8), Some(64), vec![(4, 4), (2, 2), (1, 1)], 64),
        (3, (12, 16), Some(20), vec![(6, 8), (3, 4)], 64)
    ]
);

case!(
    classify,
    Classify { rows: usize, channels: usize, labels: usize, rate: f32 },
    |self, lab| {
        let (b, &Self { rows, channels, labels, .. }) = (lab.0, self);
        let drop = (self.rate > 0.0).then(|| drop_of(Purpose::HeadDropout, self.rate));
        let n = rows * channels;
        let (z, gamma, beta) = (lab.act(n, 1), lab.full(channels, 2), lab.full(channels, 3));
        let stats = lab.full_of(&numbers(2 * channels, 4).iter().map(|x| 1.0 + 0.5 * x).collect::<Vec<_>>());
        let (w, bias, dlogits) = (lab.act(labels * channels, 5), lab.act(labels, 6), lab.act(rows * labels, 7));
        let norm = BatchNormView { stats: &stats, gamma: &gamma, beta: &beta };
        let classifier = Classifier { weight: &w, bias: &bias, labels };
        let head = HeadPass { z: &z, norm, drop, rows, channels, classifier };
        let (mut room, mut logits) = (lab.act(n, 8), lab.act(rows * labels, 9));
        let (mut dw, mut sums, mut again) =
            (lab.full(labels * channels, 10), lab.full(2 * channels, 11), lab.full(2 * channels, 12));
        let (total, mut dz) = (lab.full(2 * channels, 13), lab.act(n, 14));
        let (mut passed, mut silent) = (b.passed(rows, channels, labels), lab.act(rows * labels, 15));
        b.classify(head, &mut room, &mut b.act(0), &mut silent);
        b.classify(head, &mut room, &mut passed, &mut logits);
        b.classify_backward(head, &passed, &dlogits, &mut room, Some(&mut dw), &mut sums);
        b.classify_backward_input(head, &passed, &dlogits, (&total, 3 * rows), &mut again, &mut dz, None);
        // Where the classifier is not fused, activations and their gradients are rounded on the way.
        let fused = labels == 2 && channels <= 256 && channels % 8 == 0 && (channels / 8).is_power_of_two();
        let plain = if fused { 0.0 } else { 1.0 };
        let full = |name, full, n| Output { name, values: b.scalars(full, n), own: 0.0, summed: plain };
        let mut outputs = vec![
            lab.read("logits", &logits, rows * labels, 1.0, 2.0 * plain),
            lab.read("logits alone", &silent, rows * labels, 1.0, 2.0 * plain),
            full("dw", &dw, labels * channels),
            full("sums", &sums, 2 * channels),
            lab.read("dz", &dz, n, 1.0, 2.0 * plain),
        ];
        // A first stage as wide as fused kernels take it, and not, of whose tokens and weight one gradient is wanted, or both.
        let (weight, tokens) = (lab.act(channels * 32, 16), lab.act(rows * 32, 17));
        for (inputs, of_tokens, of_weight) in [(20, true, true), (32, true, false), (32, false, true), (32, true, true)]
        {
            let (mut dz, mut to, mut dw) =
                (lab.act(n, 14), lab.act(rows * inputs, 18), lab.full(channels * inputs, 19));
            let (to_tokens, sum) = (of_tokens.then_some(&mut to), of_weight.then_some((&tokens, &mut dw)));
            let first = Some(FirstGradient { weight: &weight, inputs, tokens: to_tokens, sum });
            b.classify_backward_input(head, &passed, &dlogits, (&total, 3 * rows), &mut again, &mut dz, first);
            outputs.extend([
                lab.read("dz with the first stage", &dz, n, 1.0, 2.0 * plain),
                lab.read("tokens", &to, rows * inputs, 1.0, 1.0 + 2.0 * plain),
                // Sums of dz, which is rounded.
                Output { summed: 1.0 + 2.0 * plain, ..lab.read_full("dw of the first stage", &dw, channels * inputs) },
            ]);
        }
        outputs
    },
    [
        (70, 32, 2, 0.1),
        (301, 256, 2, 0.1),
        (530, 128, 2, 0.0),
        // Of a tile of all gradients, of fewer rows; of more tiles than blocks take at once.
        (32, 64, 2, 0.1),
        (27, 256, 2, 0.1),
        (17_000, 32, 2, 0.1),
        (5, 8, 2, 0.0),
        (33, 24, 2, 0.2),
        (20, 64, 3, 0.1),
        (9, 35, 2, 0.3)
    ]
);

case!(
    classify_stages,
    ClassifyStages {
        images: usize,
        to: (usize, usize),
        first: Option<usize>,
        parts: Vec<(usize, usize)>,
        channels: usize,
        labels: usize
    },
    |self, lab| {
        let grid = |(height, width)| Grid { images: self.images, height, width };
        let (to, channels, labels) = (grid(self.to), self.channels, self.labels);
        let parts: Vec<_> = self.parts.iter().map(|&part| grid(part)).collect();
        let acts: Vec<_> = (10..).zip(&parts).map(|(site, part)| lab.act(part.rows() * channels, site)).collect();
        let parts: Vec<_> = acts.iter().zip(parts).collect();
        let (gamma, beta) = (lab.full(channels, 2), lab.full(channels, 3));
        let stats = lab.full_of(&numbers(2 * channels, 4).iter().map(|x| 1.0 + 0.5 * x).collect::<Vec<_>>());
        let norm = BatchNormView { stats: &stats, gamma: &gamma, beta: &beta };
        let (w, bias) = (lab.act(labels * channels, 5), lab.act(labels, 6));
        let classifier = Classifier { weight: &w, bias: &bias, labels };
        let (n, n_logits) = (to.rows() * channels, to.rows() * labels);
        let inputs = self.first.unwrap_or(0);
        let sizes: Vec<Grid> = parts.iter().map(|(_, part)| *part).collect();
        let fused = lab.0.classifies_stages(inputs, &sizes, to, channels, labels);
        let n_room = if fused && self.first.is_some() { 0 } else { n };
        let (mut z, mut room, mut logits) = (lab.act(n_room, 1), lab.act(n_room, 8), lab.act(n_logits, 9));
        let (tokens, weight, shift) = (lab.act(to.rows() * inputs, 7), lab.act(channels * inputs, 14), lab.act(channels, 15));
        // The bias may be absent.
        let bias = (channels > 32).then_some(&shift);
        let first = self.first.map(|inputs| FirstStage { tokens: &tokens, weight: &weight, bias, inputs });
        lab.0.classify_stages(first, &parts, to, channels, &mut z, norm, classifier, &mut room, &mut logits);
        // On the way, activations are rounded, or z alone, or all by which the operation is more than one.
        let joint = labels == 2 && (32..=256).contains(&channels) && channels.is_power_of_two() && parts.len() <= 3;
        vec![lab.read("logits", &logits, n_logits, 1.0, if joint { 1.0 } else { 3.0 })]
    },
    [
        (1, (5, 7), Some(32), vec![(2, 3)], 32, 2),
        (2, (130, 9), None, vec![(65, 5), (33, 3), (17, 2)], 64, 2),
        (2, (72, 40), Some(32), vec![(36, 20), (18, 10), (9, 5)], 64, 2),
        (1, (8, 16), Some(32), vec![(4, 8), (2, 4), (1, 2)], 256, 2),
        (2, (136, 24), Some(32), vec![(68, 12), (34, 6), (17, 3)], 32, 2),
        (1, (24, 8), Some(32), vec![(12, 4), (6, 2), (3, 1)], 128, 2),
        (1, (24, 8), Some(64), vec![(12, 4), (6, 2), (3, 1)], 128, 2),
        (1, (16, 8), None, vec![(8, 4), (4, 2), (2, 1)], 256, 2),
        (3, (12, 16), Some(20), vec![(6, 8), (3, 4)], 128, 2),
        (2, (8, 10), Some(32), vec![(4, 5), (2, 3), (1, 2)], 256, 2),
        (1, (3, 2), None, vec![], 256, 2),
        (1, (8, 8), Some(32), vec![(4, 4), (2, 2), (1, 1), (1, 1)], 64, 2),
        (2, (8, 8), Some(32), vec![(4, 4), (2, 2), (1, 1)], 24, 2),
        (1, (8, 8), Some(32), vec![(4, 4), (2, 2)], 64, 3)
    ]
);

case!(
    loss,
    Loss { images: usize, from: usize, size: usize, labels: usize, flip: bool },
    |self, lab| {
        let &Self { images, size, labels, flip, .. } = self;
        let from = Grid { images, height: self.from, width: self.from };
        let truths: Vec<Vec<u8>> = (0..images)
            .map(|image| {
                (0..size * size).map(|i| if i % 7 == 3 { 255 } else { ((i * 5 + image) % labels) as u8 }).collect()
            })
            .collect();
        let augment = Augment { flip, ..Augment::IDENTITY };
        let samples: Vec<Sample<'_>> =
            truths.iter().map(|labels| Sample { index: 0, pixels: &[], labels, augment }).collect();
        let n = from.rows() * labels;
        let logits = lab.act_of(&numbers(n, 1).iter().map(|x| 4.0 * x).collect::<Vec<_>>());
        let (mut out, mut gradient) = (lab.full(images, 2), lab.act(n, 3));
        lab.0.cross_entropy(&logits, from, labels, &samples, size, 0.25, &mut out, Some(&mut gradient));
        lab.0.cross_entropy(&logits, from, labels, &samples, size, 0.5, &mut out, None);
        let number = images * labels * labels;
        let mut counts = lab.0.counts(number);
        // What stood there does not count.
        for _ in 0..2 {
            lab.0.confusion(&logits, from, labels, &samples, size, &mut counts);
        }
        // A log of which the first image is another's.
        let (mut losses, mut log) = (lab.full(images + 1, 4), lab.0.counts(number + labels * labels));
        lab.0.note(&out, &counts, images, labels, 1, &mut losses, &mut log);
        let whole = |counts, n| lab.0.whole(counts, n).into_iter().map(|c| c as f64).collect::<Vec<_>>();
        let log = Output { name: "log", values: whole(&log, number + labels * labels), own: 0.0, summed: 0.0 };
        let counts = whole(&counts, number);
        vec![
            lab.read_full("losses", &losses, images + 1),
            log,
            lab.read_full("loss", &out, images),
            lab.read("gradient", &gradient, n, 1.0, 0.0),
            Output { name: "counts", values: counts, own: 0.0, summed: 0.0 },
        ]
    },
    [
        (1, 2, 5, 2, false),
        (3, 2, 8, 3, true),
        (1, 3, 3, 2, false),
        (2, 8, 32, 2, true),
        (1, 4, 16, 40, false),
        (2, 19, 76, 2, false)
    ]
);

case!(
    matrix,
    Matrix { m: usize, n: usize, k: usize },
    |self, lab| {
        let &Self { m, n, k } = self;
        let (a, b, alpha) = (lab.full(m * k, 1), lab.full(k * n, 2), lab.full(1, 14));
        let mut outputs = Vec::new();
        for (transpose, name) in [(Transpose::None, "a·b"), (Transpose::Left, "aᵀ·b"), (Transpose::Right, "a·bᵀ")]
        {
            let mut c = lab.full(m * n, 3);
            let new = SmallProduct::new(&a, &b, transpose, (m, n, k), &mut c);
            lab.0.small_products(&mut [SmallProduct { alpha: Some(&alpha), base: Base::Itself, ..new }]);
            outputs.push(lab.read_full(name, &c, m * n));
        }
        let x = lab.full(m * (n + k), 4);
        let (mut part, mut scaled, mut sum) = (lab.full(m * k, 5), lab.full(m * (n + k), 6), lab.full(m * (n + k), 7));
        let mut other = lab.full(m * k, 11);
        lab.0.columns(&x, n + k, n, k, &mut part);
        let mut rounded = lab.act(m * (n + k), 10);
        lab.0.scale_all(
            &alpha,
            &mut [
                Scaled { x: &a, y: &mut other, product: None },
                Scaled { x: &x, y: &mut scaled, product: Some(&mut rounded) },
            ],
        );
        lab.0.add_columns(&part, n + k, 0, k, &mut scaled);
        let mut tail = lab.full(m, 8);
        lab.0.add_part(&x, 1, &mut tail);
        let (mut zeros, mut more) = (lab.full(m, 9), lab.full(m * n, 12));
        lab.0.zero(&mut zeros);
        lab.0.add_all(&mut [(vec![&x, &scaled], &mut sum), (vec![&tail], &mut zeros)]);
        lab.0.zero_all(&mut [&mut tail, &mut more]);
        lab.0.add_part(&x, 0, &mut tail);
        lab.0.add_all(&mut [(vec![&lab.full(m * n, 13)], &mut more)]);
        outputs.extend([
            lab.read_full("columns", &part, m * k),
            lab.read_full("scaled alone", &other, m * k),
            lab.read_full("scaled", &scaled, m * (n + k)),
            lab.read("rounded", &rounded, m * (n + k), 1.0, 0.0),
            lab.read_full("sum", &sum, m * (n + k)),
            lab.read_full("tail", &tail, m),
            lab.read_full("zeroed", &zeros, m),
            lab.read_full("zeroed with others", &more, m * n),
        ]);
        outputs
    },
    [(3, 4, 5), (1, 1, 1), (40, 16, 7), (256, 1, 256), (7, 35, 300), (33, 5, 1025)]
);

case!(
    adapters,
    Adapters { sizes: [(usize, usize); 3], rank: usize },
    |self, lab| {
        let rank = self.rank;
        let mut sets = Vec::new();
        for (i, (outputs, inputs)) in self.sizes.into_iter().enumerate() {
            let site = |number: usize| (8 * i + number) as u32;
            let (a, b) = (lab.full(rank * inputs, site(1)), lab.full(outputs * rank, site(2)));
            let (w, dw) = (lab.full(outputs * inputs, site(3)), lab.full(outputs * inputs, site(4)));
            let merged = (lab.full(outputs * inputs, site(5)), lab.act(outputs * inputs, site(6)));
            let factors = (lab.full(rank * inputs, site(7)), lab.full(outputs * rank, site(8)));
            sets.push(((outputs, inputs), a, b, w, dw, merged, factors));
        }
        let alpha = lab.full(1, 0);
        let (mut merges, mut projections) = (Vec::new(), Vec::new());
        for (i, ((outputs, inputs), a, b, w, dw, (merged, rounded), (da, db))) in sets.iter_mut().enumerate() {
            let (outputs, inputs) = (*outputs, *inputs);
            let (a, b, dw) = (&*a, &*b, &*dw);
            let merge = SmallProduct::new(b, a, Transpose::None, (outputs, inputs, rank), merged);
            let product = (i != 1).then_some(rounded);
            merges.push(SmallProduct { alpha: Some(&alpha), base: Base::Of(w), product, ..merge });
            for new in [
                SmallProduct::new(dw, a, Transpose::Right, (outputs, rank, inputs), db),
                SmallProduct::new(b, dw, Transpose::Left, (rank, inputs, outputs), da),
            ] {
                projections.push(SmallProduct { alpha: (i != 2).then_some(&alpha), ..new });
            }
        }
        lab.0.small_products(&mut merges);
        lab.0.small_products(&mut projections);
        let mut outputs = Vec::new();
        for ((rows, columns), .., (merged, rounded), (da, db)) in &sets {
            outputs.push(lab.read_full("merged", merged, rows * columns));
            outputs.push(lab.read("merged, rounded", rounded, rows * columns, 1.0, 0.0));
            outputs.push(lab.read_full("dA", da, rank * columns));
            outputs.push(lab.read_full("dB", db, rows * rank));
        }
        outputs
    },
    [([(5, 3), (33, 40), (256, 64)], 4), ([(32, 2048), (1, 7), (64, 65)], 16), ([(10, 9), (70, 257), (3, 31)], 300)]
);

case!(
    optimizer,
    Optimizer { lengths: [usize; 3], max_norm: f64 },
    |self, lab| {
        let site = |i: usize, number: usize| (8 * i + number) as u32;
        let mut sets = Vec::new();
        for (i, n) in self.lengths.into_iter().enumerate() {
            let v = lab.full_of(&numbers(n, site(i, 4)).iter().map(|x| x * x).collect::<Vec<_>>());
            let [gradient, parameter, m] = [1, 2, 3].map(|number| lab.full(n, site(i, number)));
            sets.push((gradient, parameter, m, v, lab.act(n, site(i, 5))));
        }
        let mut norm = lab.full(1, 100);
        lab.0.gradient_norm(&sets.iter().map(|set| &set.0).collect::<Vec<_>>(), &mut norm);
        let mut update =
            AdamW { lr: 0.01, betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.1, step: 3, max_norm: self.max_norm };
        for step in 3..5 {
            update.step = step;
            let mut moving: Vec<_> = (sets.iter_mut().enumerate())
                .map(|(i, (gradient, parameter, m, v, product))| Moving {
                    gradient,
                    parameter,
                    m,
                    v,
                    product: (i != 1).then_some(product),
                    decays: i != 0,
                })
                .collect();
            lab.0.adamw(&update, &norm, &mut moving);
        }
        let mut outputs = vec![lab.read_full("norm", &norm, 1)];
        for ((_, parameter, m, v, product), n) in sets.iter().zip(self.lengths) {
            outputs.push(lab.read_full("parameter", parameter, n));
            outputs.push(lab.read_full("m", m, n));
            outputs.push(lab.read_full("v", v, n));
            outputs.push(lab.read("product", product, n, 1.0, 0.0));
        }
        outputs
    },
    [([1, 3, 2048], 1.0), ([5000, 257, 8], 1.0), ([300, 1, 2049], 1e6)]
);

/// Pictures that stay on the device give the same bits as pictures that are brought.
#[test]
fn pictures_stay_on_the_device() {
    let (size, window) = (16, Window { side: 7, stride: 4, padding: 3 });
    let data: Vec<(Vec<u8>, Vec<u8>)> = (0..3)
        .map(|k| ((0..size * size * 3).map(|i| (i * 31 + k * 77) as u8).collect(), vec![(k % 2) as u8; size * size]))
        .collect();
    let sample = |index: usize| Sample {
        index,
        pixels: &data[index].0,
        labels: &data[index].1,
        augment: Augment { flip: index == 2, ..Augment::IDENTITY },
    };
    let all: Vec<Sample<'_>> = (0..3).map(sample).collect();
    fn outputs<D: Device>(
        backend: Cuda<D>,
        samples: &[Sample<'_>],
        size: usize,
        window: Window,
    ) -> (Vec<f32>, Vec<f64>) {
        let lab = Lab(&backend);
        let grid = Grid { images: samples.len(), height: size / 4, width: size / 4 };
        let n = grid.rows() * 147;
        let mut out = lab.act(n, 1);
        backend.pixel_patches(samples, size, window, &mut out);
        let logits = lab.act(2 * grid.rows(), 2);
        let mut loss = lab.full(samples.len(), 3);
        backend.cross_entropy(&logits, grid, 2, samples, size, 0.5, &mut loss, None);
        backend.check().expect("the device works");
        (backend.download_act(&out, n), backend.scalars(&loss, samples.len()))
    }
    let host = Host::new(Order::Forward);
    let pictures = Arc::new(Pictures::new(&host, &all, size).expect("memory"));
    let other = vec![9; size * size * 3];
    // In another order; then with a picture that is not among those kept.
    for samples in [vec![all[2], all[0]], vec![all[1], Sample { pixels: &other, ..all[0] }]] {
        let kept =
            outputs(Cuda::new(Host::new(Order::Forward)).with_pictures(Some(pictures.clone())), &samples, size, window);
        assert_eq!(kept, outputs(Cuda::new(Host::new(Order::Forward)), &samples, size, window));
    }
}

/// A device that refuses what is larger than a limit.
#[test]
fn a_failure_is_kept_and_what_follows_is_skipped() {
    let backend = Cuda::new(Host::new(Order::Forward));
    let full = Lab(&backend).full(3, 1);
    backend.check().expect("nothing has failed");
    let too_large = backend.full(usize::MAX / 8);
    let error = backend.check().expect_err("no device has so much memory");
    assert_eq!(error.kind, segpeft_native::error::Kind::Device);
    assert!(backend.scalars(&full, 3).iter().all(|x| x.is_nan()), "a failed device has no answers");
    drop(too_large);
    assert_eq!(backend.check().expect_err("the failure stays").to_string(), error.to_string());
}

#[test]
fn the_self_test_passes_and_notices_a_failed_device() {
    use segpeft_native::backend::cuda::self_test;
    let backend = Cuda::new(Host::new(Order::Forward));
    self_test(&backend).expect("right numbers");
    let _too_large = backend.full(usize::MAX / 8);
    self_test(&backend).expect_err("a failed device");
}
