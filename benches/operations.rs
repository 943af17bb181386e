//! Operations of the CPU backend on one thread, at the sizes SegFormer-B0 has at 512x512; the two halves of a transformer
//! block; the data path from a packed file; the optimizer.
//!
//! `cargo bench --bench operations -- depthwise` runs those whose name contains a word.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use segpeft_native::backend::cpu::{Buffer, Cpu};
use segpeft_native::backend::{
    AdamW, Attention, AttentionShape, BatchNormView, Deltas, Depthwise, Dropout, Grid, Head, LayerNorm, Linear, Loss,
    Moving, Optimizer, Patches, Product, Residual, Resize, Sample, Window,
};
use segpeft_native::dataset::demo::{Domain, draw};
use segpeft_native::dataset::{Augment, resize_bilinear};
use segpeft_native::random::{Philox, Purpose};

/// Tokens on a side, channels, hidden channels, heads and keys of each stage.
const STAGES: [(usize, usize, usize, usize); 4] =
    [(128, 32, 128, 1), (64, 64, 256, 2), (32, 160, 640, 5), (16, 256, 1024, 8)];
const KEYS: usize = 256;
const WIDTH: usize = 256;

fn cpu() -> Cpu<f32> {
    Cpu::new(Some(1)).expect("a thread")
}

fn numbers(n: usize) -> Buffer<f32> {
    let stream = Philox::new(1, Purpose::Demo, 0, 0);
    (0..n as u64).map(|i| 2.0 * stream.uniform(i) - 1.0).collect()
}

fn products(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("linear");
    for (rows, inputs, outputs) in
        [(16384, 32, 32), (16384, 32, 128), (16384, 128, 32), (16384, 147, 32), (16384, 32, 256), (1024, 160, 640)]
    {
        let p = Product { rows, inputs, outputs };
        let (x, w, b, dy) =
            (numbers(rows * inputs), numbers(inputs * outputs), numbers(outputs), numbers(rows * outputs));
        let (mut y, mut dx, mut dw) = (numbers(rows * outputs), numbers(rows * inputs), numbers(inputs * outputs));
        group.throughput(Throughput::Elements((2 * rows * inputs * outputs) as u64));
        let name = |what: &str| format!("{what} {rows}x{inputs}->{outputs}");
        group.bench_function(name("forward"), |b_| b_.iter(|| cpu.linear(&x, &w, Some(&b), p, &mut y, false)));
        group.bench_function(name("input"), |b| b.iter(|| cpu.linear_backward_input(&dy, &w, p, &mut dx, false)));
        group.bench_function(name("weight"), |b| b.iter(|| cpu.linear_backward_weight(&dy, &x, p, &mut dw)));
    }
}

fn elementwise(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("elementwise");
    for (side, channels, hidden, _) in [STAGES[0], STAGES[2]] {
        let grid = Grid { images: 1, height: side, width: side };
        let (rows, n) = (side * side, side * side * hidden);
        let (h, w, b) = (numbers(n), numbers(9 * hidden), numbers(hidden));
        let (mut g, mut d, mut dh) = (numbers(n), numbers(n), numbers(n));
        let (mut dw, mut db) = (numbers(9 * hidden), numbers(hidden));
        group.throughput(Throughput::Elements(n as u64));
        let name = |what: &str| format!("{what} {side}x{side}x{hidden}");
        group.bench_function(name("depthwise_gelu"), |t| {
            t.iter(|| cpu.depthwise_gelu(&h, &w, &b, grid, hidden, &mut g))
        });
        group.bench_function(name("depthwise_gelu_backward"), |t| {
            // The gradient is worked on in place: again and again it would shrink to denormal numbers, which are slow.
            t.iter(|| {
                d.copy_from_slice(&dh);
                cpu.depthwise_gelu_backward(&h, &w, &b, grid, hidden, &mut d, Some(&mut g), Some(&mut db));
            });
        });
        group.bench_function(name("depthwise_backward"), |t| {
            t.iter(|| cpu.depthwise_backward(&d, &h, &w, grid, hidden, Some(&mut dh), None, None));
        });
        group.bench_function(name("depthwise_backward with weights"), |t| {
            t.iter(|| cpu.depthwise_backward(&d, &h, &w, grid, hidden, Some(&mut dh), Some(&mut dw), None));
        });

        let n = rows * channels;
        let (x, dy, gamma, beta) = (numbers(n), numbers(n), numbers(channels), numbers(channels));
        let (mut y, mut stats) = (numbers(n), numbers(2 * rows));
        group.throughput(Throughput::Elements(n as u64));
        let name = |what: &str| format!("{what} {rows}x{channels}");
        group.bench_function(name("layer_norm"), |t| {
            t.iter(|| cpu.layer_norm(&x, &gamma, &beta, rows, channels, &mut y, &mut stats));
        });
        group.bench_function(name("layer_norm_backward"), |t| {
            t.iter(|| cpu.layer_norm_backward(&dy, &x, &stats, &gamma, rows, channels, &mut y, true));
        });
    }
}

fn attention(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("attention");
    for (side, channels, _, heads) in STAGES {
        let shape = AttentionShape { images: 1, heads, head: channels / heads, queries: side * side, keys: KEYS };
        let (n, nk) = (side * side * channels, KEYS * channels);
        let (q, k, v, d) = (numbers(n), numbers(nk), numbers(nk), numbers(n));
        let (mut o, mut lse) = (numbers(n), numbers(side * side * heads));
        let (mut dq, mut dk, mut dv) = (numbers(n), numbers(nk), numbers(nk));
        group.throughput(Throughput::Elements((side * side * KEYS * heads) as u64));
        group.bench_function(format!("forward {side}x{side}x{channels}"), |t| {
            t.iter(|| cpu.attention(&q, &k, &v, shape, &mut o, &mut lse));
        });
        group.bench_function(format!("backward {side}x{side}x{channels}"), |t| {
            t.iter(|| cpu.attention_backward(&q, &k, &v, Deltas::Of(&o), &lse, &d, shape, &mut dq, &mut dk, &mut dv));
        });
    }
}

fn head(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("head");
    let (side, size) = (128, 512);
    let rows = side * side;
    let n = rows * WIDTH;
    let (z, gamma, beta, stats) = (numbers(n), numbers(WIDTH), numbers(WIDTH), numbers(2 * WIDTH));
    let (mut a, mut moments) = (numbers(n), numbers(2 * WIDTH));
    let stream = Philox::new(1, Purpose::HeadDropout, 0, 0);
    let drop = Some(Dropout { rate: 0.1, stream, first: 0 });
    let view = || BatchNormView { stats: &stats, gamma: &gamma, beta: &beta };
    group.throughput(Throughput::Elements(n as u64));
    group.bench_function("batch_moments", |t| t.iter(|| cpu.batch_moments(&z, rows, WIDTH, &mut moments)));
    group.bench_function("activation", |t| t.iter(|| cpu.head_activation(&z, view(), drop, rows, WIDTH, &mut a)));
    group.bench_function("backward", |t| {
        t.iter(|| cpu.head_backward(&z, view(), drop, rows, WIDTH, &mut a, &mut moments));
    });
    group.bench_function("batch_norm_backward", |t| {
        t.iter(|| cpu.batch_norm_backward(&z, view(), &stats, rows, rows, WIDTH, &mut a));
    });
    let to = Grid { images: 1, height: side, width: side };
    let from = Grid { images: 1, height: 64, width: 64 };
    group.bench_function("upsample", |t| t.iter(|| cpu.upsample(&z, from, to, WIDTH, &mut a, true)));
    let mut x = numbers(from.rows() * WIDTH);
    group.bench_function("upsample_backward", |t| t.iter(|| cpu.upsample_backward(&z, from, to, WIDTH, &mut x)));

    let pixels = vec![7u8; size * size * 3];
    let labels: Vec<u8> = (0..size * size).map(|i| u8::from(i / 64 % 3 == 0)).collect();
    let samples = [Sample { index: 0, pixels: &pixels, labels: &labels, augment: Augment::IDENTITY }];
    let logits = numbers(rows * 2);
    let (mut loss, mut gradient, mut counts) = (numbers(1), numbers(rows * 2), vec![0u64; 4]);
    group.throughput(Throughput::Elements((size * size) as u64));
    group.bench_function("cross_entropy", |t| {
        t.iter(|| cpu.cross_entropy(&logits, to, 2, &samples, size, 1.0, &mut loss, Some(&mut gradient)));
    });
    group.bench_function("confusion", |t| t.iter(|| cpu.confusion(&logits, to, 2, &samples, size, &mut counts)));
}

/// Forward through the two halves of a block, out of the operations they are made of (drop path and sequence reduction
/// aside).
fn blocks(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("block");
    for (side, channels, hidden, heads) in STAGES {
        let grid = Grid { images: 1, height: side, width: side };
        let rows = grid.rows();
        let (x, gamma, beta) = (numbers(rows * channels), numbers(channels), numbers(channels));
        let (mut t0, mut y, mut stats) = (numbers(rows * channels), numbers(rows * channels), numbers(2 * rows));
        let (up, down) =
            (Product { rows, inputs: channels, outputs: hidden }, Product { rows, inputs: hidden, outputs: channels });
        let (w1, b1, w2, mix) =
            (numbers(channels * hidden), numbers(hidden), numbers(channels * hidden), numbers(9 * hidden));
        let (mut h, mut g) = (numbers(rows * hidden), numbers(rows * hidden));
        group.bench_function(format!("mix_ffn {side}x{side}x{channels}"), |t| {
            t.iter(|| {
                cpu.layer_norm(&x, &gamma, &beta, rows, channels, &mut t0, &mut stats);
                cpu.linear(&t0, &w1, Some(&b1), up, &mut h, false);
                cpu.depthwise_gelu(&h, &mix, &b1, grid, hidden, &mut g);
                cpu.linear(&g, &w2, Some(&beta), down, &mut t0, false);
                cpu.residual(&x, &t0, None, grid, channels, &mut y);
            });
        });
        let own = Product { rows, inputs: channels, outputs: channels };
        let small = Product { rows: KEYS, ..own };
        let shape = AttentionShape { images: 1, heads, head: channels / heads, queries: rows, keys: KEYS };
        let w = numbers(channels * channels);
        let (mut q, mut k, mut v) = (numbers(rows * channels), numbers(KEYS * channels), numbers(KEYS * channels));
        let (mut o, mut lse) = (numbers(rows * channels), numbers(rows * heads));
        group.bench_function(format!("attention {side}x{side}x{channels}"), |t| {
            t.iter(|| {
                cpu.layer_norm(&x, &gamma, &beta, rows, channels, &mut t0, &mut stats);
                cpu.linear(&t0, &w, Some(&beta), own, &mut q, false);
                cpu.linear(&t0, &w, Some(&beta), small, &mut k, false);
                cpu.linear(&t0, &w, Some(&beta), small, &mut v, false);
                cpu.attention(&q, &k, &v, shape, &mut o, &mut lse);
                cpu.linear(&o, &w, Some(&beta), own, &mut t0, false);
                cpu.residual(&x, &t0, None, grid, channels, &mut y);
            });
        });
    }
}

fn data(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("data");
    let size = 512;
    let (pixels, labels) = draw(Domain::Target, 0, size);
    let window = Window { side: 7, stride: 4, padding: 3 };
    let mut out = Buffer::zeros(128 * 128 * 147);
    for (name, augment) in [
        ("pixel_patches", Augment::IDENTITY),
        ("pixel_patches flipped, brightened", Augment { flip: true, contrast: 1.1, brightness: 0.1 }),
    ] {
        let samples = [Sample { index: 0, pixels: &pixels, labels: &labels, augment }];
        group.bench_function(name, |t| t.iter(|| cpu.pixel_patches(&samples, size, window, &mut out)));
    }
    let tokens = numbers(128 * 128 * 32);
    let grid = Grid { images: 1, height: 128, width: 128 };
    let overlap = Window { side: 3, stride: 2, padding: 1 };
    group.bench_function("patches 3x3", |t| t.iter(|| cpu.patches(&tokens, grid, 32, overlap, &mut out)));
    group.bench_function("resize 622x529", |t| {
        let picture = vec![3u8; 622 * 529 * 3];
        t.iter(|| black_box(resize_bilinear(&picture, (622, 529), (size, size), 3)));
    });
}

fn optimizer(c: &mut Criterion) {
    let cpu: Cpu<f32> = Cpu::new(None).expect("threads");
    let mut group = c.benchmark_group("optimizer");
    let n = 3_714_658;
    let (mut p, g, mut m, mut v) = (numbers(n), numbers(n), Buffer::zeros(n), Buffer::zeros(n));
    let mut norm = Buffer::zeros(1);
    let update = AdamW { lr: 1e-6, betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.0, step: 1, max_norm: 1.0 };
    group.throughput(Throughput::Elements(n as u64));
    group.bench_function("gradient_norm", |t| t.iter(|| cpu.gradient_norm(&[&g], &mut norm)));
    let mut product = numbers(n);
    group.bench_function("adamw", |t| {
        t.iter(|| {
            let product = Some(&mut product);
            let moving = Moving { gradient: &g, parameter: &mut p, m: &mut m, v: &mut v, product, decays: true };
            cpu.adamw(&update, &norm, &mut [moving]);
        });
    });
}

fn quick() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
}

criterion_group! {
    name = benches;
    config = quick();
    targets = products, elementwise, attention, head, blocks, data, optimizer
}
criterion_main!(benches);
