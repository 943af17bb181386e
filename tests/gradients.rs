//! Every operation's backward against central finite differences of its forward, in f64, over odd sizes.
#![allow(missing_docs)]

use segpeft_native::backend::cpu::{Buffer, Cpu};
use segpeft_native::backend::{
    Attention, AttentionShape, Base, BatchNormView, Classifier, Deltas, Depthwise, Dropout, Grid, Head, LayerNorm,
    Linear, Loss, Matrix, Memory, Patches, Product, Residual, Resize, Sample, SmallProduct, Transpose, Window,
};
use segpeft_native::dataset::Augment;
use segpeft_native::random::{Philox, Purpose};

type Numbers = Buffer<f64>;

const STEP: f64 = 1e-5;
/// Truncation (h²) and rounding (1e-16 / h) leave about 1e-9 of quantities of size one.
const BOUND: f64 = 1e-7;

fn cpu() -> Cpu<f64> {
    Cpu::new(Some(1)).expect("threads")
}

/// Numbers in (-1, 1) that depend on `site`.
fn numbers(n: usize, site: u32) -> Numbers {
    let stream = Philox::new(7, Purpose::Weights, site, 0);
    (0..n as u64).map(|i| 2.0 * f64::from(stream.uniform(i)) - 1.0).collect()
}

/// `n` times x.
fn filled(x: f64, n: usize) -> Numbers {
    let mut numbers = Buffer::zeros(n);
    numbers.fill(x);
    numbers
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Largest difference between `gradient` and finite differences of `function` around `inputs[which]`.
fn error(function: &dyn Fn(&[Numbers]) -> f64, inputs: &[Numbers], which: usize, gradient: &[f64]) -> f64 {
    let mut at = inputs.to_vec();
    let mut worst: f64 = 0.0;
    for i in 0..inputs[which].len() {
        let x = inputs[which][i];
        at[which][i] = x + STEP;
        let above = function(&at);
        at[which][i] = x - STEP;
        let below = function(&at);
        at[which][i] = x;
        let true_slope = (above - below) / (2.0 * STEP);
        worst = worst.max((gradient[i] - true_slope).abs() / true_slope.abs().max(1.0));
    }
    worst
}

fn check(name: &str, function: &dyn Fn(&[Numbers]) -> f64, inputs: &[Numbers], gradients: &[Numbers]) {
    for (which, gradient) in gradients.iter().enumerate() {
        assert_eq!(gradient.len(), inputs[which].len(), "{name}: length of gradient {which}");
        let found = error(function, inputs, which, gradient);
        assert!(found < BOUND, "{name}: gradient {which} is off by {found}");
        // The check must notice a wrong number.
        let mut planted = gradient.clone();
        let middle = planted.len() / 2;
        planted[middle] += 1e-5 * planted[middle].abs().max(1.0);
        assert!(error(function, inputs, which, &planted) > BOUND, "{name}: a planted error goes unnoticed");
    }
}

#[test]
fn linear() {
    let cpu = cpu();
    for (rows, ins, outs) in [(1, 1, 1), (3, 5, 7), (17, 13, 2)] {
        let p = Product { rows, inputs: ins, outputs: outs };
        let inputs = [numbers(rows * ins, 1), numbers(outs * ins, 2), numbers(outs, 3)];
        let weights = numbers(rows * outs, 4);
        let forward = |x: &[Numbers]| {
            let mut y = filled(0.0, rows * outs);
            cpu.linear(&x[0], &x[1], Some(&x[2]), p, &mut y, false);
            dot(&y, &weights)
        };
        let (mut dx, mut dw, mut db) = (filled(9.0, rows * ins), filled(0.0, outs * ins), filled(0.0, outs));
        cpu.linear_backward_input(&weights, &inputs[1], p, &mut dx, false);
        cpu.linear_backward_weight(&weights, &inputs[0], p, &mut dw);
        cpu.linear_backward_bias(&weights, rows, outs, &mut db);
        check("linear", &forward, &inputs, &[dx, dw, db]);
    }
}

#[test]
fn patches() {
    let cpu = cpu();
    for (images, height, width, channels, side, stride, padding) in
        [(1, 5, 7, 3, 3, 2, 1), (3, 4, 6, 2, 2, 2, 0), (1, 9, 8, 1, 7, 4, 3)]
    {
        let grid = Grid { images, height, width };
        let window = Window { side, stride, padding };
        let n = grid.through(window).rows() * side * side * channels;
        let inputs = [numbers(grid.rows() * channels, 1)];
        let weights = numbers(n, 2);
        let forward = |x: &[Numbers]| {
            let mut y = filled(5.0, n);
            cpu.patches(&x[0], grid, channels, window, &mut y);
            dot(&y, &weights)
        };
        let mut dx = filled(0.0, inputs[0].len());
        cpu.patches_backward(&weights, grid, channels, window, &mut dx);
        check("patches", &forward, &inputs, &[dx]);
    }
}

#[test]
fn layer_norm() {
    let cpu = cpu();
    for (rows, channels) in [(1, 3), (3, 5), (2, 33)] {
        let inputs = [numbers(rows * channels, 1), numbers(channels, 2), numbers(channels, 3)];
        let weights = numbers(rows * channels, 4);
        let run = |x: &[Numbers]| {
            let (mut y, mut stats) = (filled(0.0, rows * channels), filled(0.0, 2 * rows));
            cpu.layer_norm(&x[0], &x[1], &x[2], rows, channels, &mut y, &mut stats);
            (y, stats)
        };
        let stats = run(&inputs).1;
        let (mut dx, mut dgamma, mut dbeta) =
            (filled(9.0, rows * channels), filled(0.0, channels), filled(0.0, channels));
        cpu.layer_norm_backward(&weights, &inputs[0], &stats, &inputs[1], rows, channels, &mut dx, false);
        cpu.layer_norm_backward_params(&weights, &inputs[0], &stats, rows, channels, &mut dgamma, &mut dbeta);
        check("layer_norm", &|x| dot(&run(x).0, &weights), &inputs, &[dx, dgamma, dbeta]);
    }
}

#[test]
fn attention() {
    let cpu = cpu();
    for (images, heads, head, queries, keys) in [(1, 1, 3, 5, 2), (3, 2, 4, 7, 3), (1, 2, 2, 130, 4)] {
        let shape = AttentionShape { images, heads, head, queries, keys };
        let channels = heads * head;
        let (nq, nk) = (images * queries * channels, images * keys * channels);
        let inputs = [numbers(nq, 1), numbers(nk, 2), numbers(nk, 3)];
        let weights = numbers(nq, 4);
        let run = |x: &[Numbers]| {
            let (mut o, mut lse) = (filled(0.0, nq), filled(0.0, images * heads * queries));
            cpu.attention(&x[0], &x[1], &x[2], shape, &mut o, &mut lse);
            (o, lse)
        };
        let (o, lse) = run(&inputs);
        let (mut dq, mut dk, mut dv) = (filled(9.0, nq), filled(9.0, nk), filled(9.0, nk));
        let [q, k, v] = &inputs;
        cpu.attention_backward(q, k, v, Deltas::Of(&o), &lse, &weights, shape, &mut dq, &mut dk, &mut dv);
        check("attention", &|x| dot(&run(x).0, &weights), &inputs, &[dq, dk, dv]);
    }
}

#[test]
fn depthwise_gelu() {
    let cpu = cpu();
    for (images, height, width, channels) in [(1, 1, 1, 1), (3, 2, 5, 3), (1, 4, 3, 35)] {
        let grid = Grid { images, height, width };
        let n = grid.rows() * channels;
        let inputs = [numbers(n, 1), numbers(9 * channels, 2), numbers(channels, 3)];
        let weights = numbers(n, 4);
        let run = |x: &[Numbers]| {
            let mut g = filled(0.0, n);
            cpu.depthwise_gelu(&x[0], &x[1], &x[2], grid, channels, &mut g);
            g
        };
        let (mut dg, mut again) = (weights.clone(), filled(0.0, n));
        let (mut dh, mut dw, mut db) = (filled(9.0, n), filled(0.0, 9 * channels), filled(0.0, channels));
        let [h, w, b] = &inputs;
        cpu.depthwise_gelu_backward(h, w, b, grid, channels, &mut dg, Some(&mut again), Some(&mut db));
        let (du, mut shift) = (dg, filled(0.0, channels));
        cpu.depthwise_backward(&du, h, w, grid, channels, Some(&mut dh), Some(&mut dw), Some(&mut shift));
        for (c, shift) in shift.iter().enumerate() {
            let sum: f64 = dh[c..].iter().step_by(channels).sum();
            assert!((shift - sum).abs() < 1e-12);
        }
        assert_eq!(&again[..], &run(&inputs)[..]);
        check("depthwise_gelu", &|x| dot(&run(x), &weights), &inputs, &[dh, dw, db]);
    }
}

#[test]
fn residual_with_stochastic_depth() {
    let cpu = cpu();
    let (grid, channels) = (Grid { images: 3, height: 1, width: 3 }, 5);
    let n = grid.rows() * channels;
    let drop = Dropout { rate: 0.4, stream: Philox::new(1, Purpose::DropPath, 0, 0), first: 1 };
    let factors: Vec<f32> = (0..3).map(|i| drop.factor(i)).collect();
    assert!(factors.contains(&0.0) && factors.iter().any(|&f| f > 1.0), "{factors:?} should hold both outcomes");
    let inputs = [numbers(n, 1), numbers(n, 2)];
    let weights = numbers(n, 3);
    let forward = |x: &[Numbers]| {
        let mut y = filled(0.0, n);
        cpu.residual(&x[0], &x[1], Some(drop), grid, channels, &mut y);
        dot(&y, &weights)
    };
    let mut branch = filled(9.0, n);
    cpu.drop_path(&weights, drop, grid, channels, &mut branch);
    check("residual", &forward, &inputs, &[weights.clone(), branch]);
}

#[test]
fn dropout_keeps_the_stated_share() {
    let cpu = cpu();
    let drop = Dropout { rate: 0.1, stream: Philox::new(1, Purpose::HeadDropout, 0, 0), first: 0 };
    let n = 100_000;
    let mut y = filled(0.0, n);
    cpu.dropout(&filled(1.0, n), drop, n, &mut y);
    let dropped = y.iter().filter(|y| **y == 0.0).count() as f64 / n as f64;
    assert!((dropped - 0.1).abs() < 0.004, "{dropped}");
    assert!((y.iter().sum::<f64>() / n as f64 - 1.0).abs() < 0.004);
}

#[test]
fn upsample() {
    let cpu = cpu();
    for (images, from, to, channels) in [(1, (2, 3), (7, 5), 2), (3, (1, 1), (4, 4), 1), (1, (4, 4), (4, 4), 3)] {
        let from = Grid { images, height: from.0, width: from.1 };
        let to = Grid { images, height: to.0, width: to.1 };
        let inputs = [numbers(from.rows() * channels, 1)];
        let weights = numbers(to.rows() * channels, 2);
        let forward = |x: &[Numbers]| {
            let mut y = filled(5.0, to.rows() * channels);
            cpu.upsample(&x[0], from, to, channels, &mut y, false);
            dot(&y, &weights)
        };
        let mut dx = filled(9.0, inputs[0].len());
        cpu.upsample_backward(&weights, from, to, channels, &mut dx);
        check("upsample", &forward, &inputs, &[dx]);
    }
}

/// BatchNorm in training mode over two units of different size, ReLU, dropout.
#[test]
fn head() {
    let cpu = cpu();
    let (rows, channels) = ([3usize, 5], 4);
    let drop = Dropout { rate: 0.3, stream: Philox::new(1, Purpose::HeadDropout, 0, 0), first: 0 };
    for drop in [None, Some(drop)] {
        let total_rows: usize = rows.iter().sum();
        let inputs = [numbers(total_rows * channels, 1), numbers(channels, 2), numbers(channels, 3)];
        let weights = numbers(total_rows * channels, 4);
        let parts = |x: &Numbers| {
            let (first, second) = x.split_at(rows[0] * channels);
            [Buffer::from(first), Buffer::from(second)]
        };
        let stats_of = |z: &[Numbers; 2]| {
            let mut moments = [filled(0.0, 2 * channels), filled(0.0, 2 * channels)];
            for u in 0..2 {
                cpu.batch_moments(&z[u], rows[u], channels, &mut moments[u]);
            }
            let (mut stats, mut mean, mut var) =
                (filled(0.0, 2 * channels), filled(0.0, channels), filled(0.0, channels));
            let [a, b] = &moments;
            cpu.batch_stats(&[a, b], &rows, channels, 0.1, &mut stats, &mut mean, &mut var);
            stats
        };
        let forward = |x: &[Numbers]| {
            let z = parts(&x[0]);
            let stats = stats_of(&z);
            let mut sum = 0.0;
            for (z, (&rows, w)) in z.iter().zip(rows.iter().zip(parts(&weights))) {
                let mut a = filled(0.0, rows * channels);
                let norm = BatchNormView { stats: &stats, gamma: &x[1], beta: &x[2] };
                cpu.head_activation(z, norm, drop, rows, channels, &mut a);
                sum += dot(&a, &w);
            }
            sum
        };
        let z = parts(&inputs[0]);
        let stats = stats_of(&z);
        let view = || BatchNormView { stats: &stats, gamma: &inputs[1], beta: &inputs[2] };
        let mut da = parts(&weights);
        let mut sums = [filled(0.0, 2 * channels), filled(0.0, 2 * channels)];
        for u in 0..2 {
            cpu.head_backward(&z[u], view(), drop, rows[u], channels, &mut da[u], &mut sums[u]);
        }
        let mut total = filled(0.0, 2 * channels);
        cpu.zero(&mut total);
        cpu.add_all(&mut [(vec![&sums[0], &sums[1]], &mut total)]);
        for u in 0..2 {
            cpu.batch_norm_backward(&z[u], view(), &total, total_rows, rows[u], channels, &mut da[u]);
        }
        let (dbeta, dgamma) = (Buffer::from(&total[..channels]), Buffer::from(&total[channels..]));
        let dx = Buffer::from(&[&da[0][..], &da[1][..]].concat()[..]);
        check("head", &forward, &inputs, &[dx, dgamma, dbeta]);
    }
}

#[test]
fn batch_norm_moves_its_running_estimates() {
    let cpu = cpu();
    let z = Buffer::from(&[1.0, 2.0, 3.0, 6.0][..]);
    let mut moments = filled(0.0, 2);
    cpu.batch_moments(&z, 4, 1, &mut moments);
    let (mut stats, mut mean, mut var) = (filled(0.0, 2), filled(10.0, 1), filled(20.0, 1));
    cpu.batch_stats(&[&moments], &[4], 1, 0.1, &mut stats, &mut mean, &mut var);
    assert_eq!(stats[0], 3.0);
    assert!((stats[1] - 1.0 / (3.5f64 + 1e-5).sqrt()).abs() < 1e-15);
    assert!((mean[0] - 9.3).abs() < 1e-14);
    assert!((var[0] - (18.0 + 0.1 * 14.0 / 3.0)).abs() < 1e-14);
}

#[test]
fn cross_entropy() {
    let cpu = cpu();
    for (images, from, size, labels, flip) in [(1, 2, 5, 2, false), (3, 2, 8, 3, true), (1, 3, 3, 2, false)] {
        let from = Grid { images, height: from, width: from };
        let pixels = vec![0u8; size * size * 3];
        let truths: Vec<Vec<u8>> = (0..images)
            .map(|image| {
                (0..size * size).map(|i| if i % 7 == 3 { 255 } else { ((i + image) % labels) as u8 }).collect()
            })
            .collect();
        let augment = Augment { flip, ..Augment::IDENTITY };
        let samples: Vec<Sample<'_>> =
            truths.iter().map(|labels| Sample { index: 0, pixels: &pixels, labels, augment }).collect();
        let inputs = [numbers(from.rows() * labels, 1)];
        let forward = |x: &[Numbers]| {
            let mut out = filled(0.0, images);
            cpu.cross_entropy(&x[0], from, labels, &samples, size, 0.25, &mut out, None);
            out.iter().sum()
        };
        let (mut out, mut gradient) = (filled(0.0, images), filled(9.0, inputs[0].len()));
        cpu.cross_entropy(&inputs[0], from, labels, &samples, size, 0.25, &mut out, Some(&mut gradient));
        check("cross_entropy", &forward, &inputs, &[gradient]);
    }
}

#[test]
fn matrix_products() {
    let cpu = cpu();
    let (m, n, k) = (3, 4, 5);
    let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
    let transposed = |x: &Numbers, rows: usize, columns: usize| -> Numbers {
        (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
    };
    let plain: Numbers = (0..m * n).map(|i| (0..k).map(|p| a[i / n * k + p] * b[p * n + i % n]).sum()).collect();
    for (transpose, a, b) in [
        (Transpose::None, a.clone(), b.clone()),
        (Transpose::Left, transposed(&a, m, k), b.clone()),
        (Transpose::Right, a.clone(), transposed(&b, k, n)),
    ] {
        let (mut c, alpha) = (filled(1.0, m * n), filled(2.0, 1));
        let new = SmallProduct::new(&a, &b, transpose, (m, n, k), &mut c);
        cpu.small_products(&mut [SmallProduct { alpha: Some(&alpha), base: Base::Itself, ..new }]);
        for (c, plain) in c.iter().zip(&plain[..]) {
            assert!((c - (1.0 + 2.0 * plain)).abs() < 1e-14);
        }
    }
}

#[test]
fn the_decoder_line_by_line_is_the_decoder_pass_by_pass() {
    let cpu = cpu();
    for (images, height, width, channels, labels) in [(2, 6, 10, 5, 2), (1, 8, 12, 35, 3), (2, 4, 64, 17, 7)] {
        let to = Grid { images, height, width };
        let grids = [2, 4].map(|by: usize| Grid { images, height: height.div_ceil(by), width: width.div_ceil(by) });
        let n = to.rows() * channels;
        let z = numbers(n, 1);
        let parts = [numbers(grids[0].rows() * channels, 2), numbers(grids[1].rows() * channels, 3)];
        let each = || parts.iter().zip(grids);

        let (mut joined, mut moments) = (z.clone(), filled(0.0, 2 * channels));
        let part_list: Vec<_> = each().collect();
        cpu.join_stages(None, &part_list, to, channels, &mut joined, Some(&mut moments));
        let (mut plain, mut plain_moments) = (z.clone(), filled(0.0, 2 * channels));
        for (part, grid) in each() {
            cpu.upsample(part, grid, to, channels, &mut plain, true);
        }
        cpu.batch_moments(&plain, to.rows(), channels, &mut plain_moments);
        assert_eq!((&joined[..], &moments[..]), (&plain[..], &plain_moments[..]));

        let (stats, gamma, beta) = (numbers(2 * channels, 4), numbers(channels, 5), numbers(channels, 6));
        let (weight, bias) = (numbers(labels * channels, 7), numbers(labels, 8));
        let norm = BatchNormView { stats: &stats, gamma: &gamma, beta: &beta };
        let classifier = Classifier { weight: &weight, bias: &bias, labels };
        let (mut used, mut room, mut logits) = (z.clone(), filled(9.0, n), filled(9.0, to.rows() * labels));
        cpu.classify_stages(None, &part_list, to, channels, &mut used, norm, classifier, &mut room, &mut logits);
        let (mut activation, mut plain_logits) = (filled(9.0, n), filled(9.0, to.rows() * labels));
        cpu.head_activation(&plain, norm, None, to.rows(), channels, &mut activation);
        let product = Product { rows: to.rows(), inputs: channels, outputs: labels };
        cpu.linear(&activation, &weight, Some(&bias), product, &mut plain_logits, false);
        for (a, b) in logits.iter().zip(&plain_logits[..]) {
            assert!((a - b).abs() < 1e-12, "{a} and {b}");
        }

        let mut split = parts.clone();
        let [first, second] = &mut split;
        cpu.split_stages(&z, to, channels, &mut [(first, grids[0]), (second, grids[1])]);
        for (part, grid) in split.iter().zip(grids) {
            let mut plain = filled(9.0, part.len());
            cpu.upsample_backward(&z, grid, to, channels, &mut plain);
            assert_eq!(part[..], plain[..]);
        }
    }
}
