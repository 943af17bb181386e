//! Depth-wise 3x3 convolution, bias and GELU of the Mix-FFN.
//!
//! A block of [`LANES`] channels walks along a row of tokens. Each column of three tokens is loaded once and contributes
//! to three outputs, whose sums stay in registers together with the nine weights.

use std::ops::Range;

use super::simd::{LANES, Level, each, vectorised};
use super::{Buffer, Cpu, Real};
use crate::backend::{Depthwise, Grid, Linear};

type Block<T> = [T; LANES];

/// The channels from `at` on; past `lanes`, zeros.
#[inline(always)]
fn load<T: Real, const WHOLE: bool>(x: &[T], at: usize, lanes: usize) -> Block<T> {
    if WHOLE {
        let Some(block) = x[at..].first_chunk() else { unreachable!("a block of channels ends inside its row") };
        *block
    } else {
        let mut block = [T::ZERO; LANES];
        block[..lanes].copy_from_slice(&x[at..at + lanes]);
        block
    }
}

#[inline(always)]
fn store<T: Real, const WHOLE: bool>(block: &Block<T>, x: &mut [T], at: usize, lanes: usize) {
    if WHOLE {
        x[at..at + LANES].copy_from_slice(block);
    } else {
        x[at..at + lanes].copy_from_slice(&block[..lanes]);
    }
}

/// `sum += a·b`
#[inline(always)]
fn multiply_add<T: Real>(a: &Block<T>, b: &Block<T>, sum: &mut Block<T>, level: Level) {
    for i in 0..LANES {
        sum[i] = a[i].mul_add(b[i], sum[i], level);
    }
}

/// Work on one block of channels of one row of tokens.
trait Walk {
    fn walk<const WHOLE: bool>(&mut self, row: usize, c: usize, lanes: usize);
}

/// Walks over some channels of some rows, row by row, so that the three rows in use stay in the second-level cache from block to
/// block.
#[inline(always)]
fn each_block(rows: Range<usize>, channels: Range<usize>, mut work: impl Walk) {
    let whole = channels.start + channels.len() / LANES * LANES;
    for row in rows {
        for c in (channels.start..whole).step_by(LANES) {
            work.walk::<true>(row, c, LANES);
        }
        if whole < channels.end {
            work.walk::<false>(row, whole, channels.end - whole);
        }
    }
}

/// Where row `row - 1`, `row` and `row + 1` of a picture begin, and whether they exist: those that do not stand for
/// themselves.
#[inline(always)]
fn neighbours(row: usize, grid: Grid, stride: usize) -> [(usize, bool); 3] {
    let y = row % grid.height;
    let (above, below) = (y > 0, y + 1 < grid.height);
    let start = |row: usize| row * stride;
    [
        (if above { start(row - 1) } else { start(row) }, above),
        (start(row), true),
        (if below { start(row + 1) } else { start(row) }, below),
    ]
}

/// The convolution of x by w, handed to `finish(offset of the block among the outputs, channel block, lanes, sums)`.
struct Convolution<'a, T, F> {
    x: &'a [T],
    w: &'a [T],
    grid: Grid,
    channels: usize,
    /// Tap `t` reads weight row `8 - t`: the transpose of the convolution.
    mirrored: bool,
    /// The row whose outputs come first in what `finish` writes to.
    first: usize,
    level: Level,
    finish: F,
}

/// What a convolution does with its sums.
trait Finish<T> {
    fn finish<const WHOLE: bool>(&mut self, at: usize, c: usize, lanes: usize, sums: &Block<T>, level: Level);
}

impl<T: Real, F: Finish<T>> Walk for Convolution<'_, T, F> {
    #[inline(always)]
    fn walk<const WHOLE: bool>(&mut self, row: usize, c: usize, lanes: usize) {
        let (width, channels) = (self.grid.width, self.channels);
        let stride = width * channels;
        let rows = neighbours(row, self.grid, stride);
        let lines = rows.map(|(start, _)| &self.x[start + c..start + stride - channels + c + lanes]);
        let mut weights = [[T::ZERO; LANES]; 9];
        for (tap, weights) in weights.iter_mut().enumerate() {
            if rows[tap / 3].1 {
                let tap = if self.mirrored { 8 - tap } else { tap };
                *weights = load::<T, WHOLE>(self.w, tap * channels + c, lanes);
            }
        }
        let here = (row - self.first) * stride + c;
        // Sums of the token before the column, of the column's own and of the next.
        let (mut before, mut own) = ([T::ZERO; LANES], [T::ZERO; LANES]);
        for x in 0..width {
            let mut next = [T::ZERO; LANES];
            for ky in 0..3 {
                let column = load::<T, WHOLE>(lines[ky], x * channels, lanes);
                multiply_add(&column, &weights[3 * ky + 2], &mut before, self.level);
                multiply_add(&column, &weights[3 * ky + 1], &mut own, self.level);
                multiply_add(&column, &weights[3 * ky], &mut next, self.level);
            }
            if x > 0 {
                self.finish.finish::<WHOLE>(here + (x - 1) * channels, c, lanes, &before, self.level);
            }
            (before, own) = (own, next);
        }
        self.finish.finish::<WHOLE>(here + (width - 1) * channels, c, lanes, &before, self.level);
    }
}

/// GELU(u) = u·Φ(u), and its derivative Φ(u) + u·φ(u).
#[inline(always)]
fn gelu_with_slope<T: Real>(u: T, level: Level) -> (T, T) {
    let half = T::of(0.5);
    let cumulative = half * (T::ONE + (u * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf(level));
    let density = (-(half * u * u)).exp(level) * T::of(0.398_942_280_401_432_7);
    (u * cumulative, u.mul_add(density, cumulative, level))
}

/// GELU(u).
#[inline(always)]
fn gelu<T: Real>(u: T, level: Level) -> T {
    T::of(0.5) * u * (T::ONE + (u * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf(level))
}

struct Gelu<'a, T> {
    b: &'a [T],
    g: &'a mut [T],
}

impl<T: Real> Finish<T> for Gelu<'_, T> {
    #[inline(always)]
    fn finish<const WHOLE: bool>(&mut self, at: usize, c: usize, lanes: usize, sums: &Block<T>, level: Level) {
        let b = load::<T, WHOLE>(self.b, c, lanes);
        let mut g = [T::ZERO; LANES];
        for i in 0..LANES {
            g[i] = gelu(sums[i] + b[i], level);
        }
        store::<T, WHOLE>(&g, self.g, at, lanes);
    }
}

struct GeluBackward<'a, T, const FORWARD: bool> {
    b: &'a [T],
    d: &'a mut [T],
    g: &'a mut [T],
}

impl<T: Real, const FORWARD: bool> Finish<T> for GeluBackward<'_, T, FORWARD> {
    #[inline(always)]
    fn finish<const WHOLE: bool>(&mut self, at: usize, c: usize, lanes: usize, sums: &Block<T>, level: Level) {
        let b = load::<T, WHOLE>(self.b, c, lanes);
        let mut d = load::<T, WHOLE>(self.d, at, lanes);
        let mut g = [T::ZERO; LANES];
        for i in 0..LANES {
            let (value, slope) = gelu_with_slope(sums[i] + b[i], level);
            g[i] = value;
            d[i] *= slope;
        }
        store::<T, WHOLE>(&d, self.d, at, lanes);
        if FORWARD {
            store::<T, WHOLE>(&g, self.g, at, lanes);
        }
    }
}

struct Plain<'a, T>(&'a mut [T]);

impl<T: Real> Finish<T> for Plain<'_, T> {
    #[inline(always)]
    fn finish<const WHOLE: bool>(&mut self, at: usize, _: usize, lanes: usize, sums: &Block<T>, _: Level) {
        store::<T, WHOLE>(sums, self.0, at, lanes);
    }
}

struct Weights<'a, T> {
    du: &'a [T],
    h: &'a [T],
    grid: Grid,
    channels: usize,
    /// `(9, own)`
    dw: &'a mut [T],
    own: Range<usize>,
    level: Level,
}

impl<T: Real> Walk for Weights<'_, T> {
    #[inline(always)]
    fn walk<const WHOLE: bool>(&mut self, row: usize, c: usize, lanes: usize) {
        let (width, channels) = (self.grid.width, self.channels);
        let stride = width * channels;
        let rows = neighbours(row, self.grid, stride);
        let lines = rows.map(|(start, _)| &self.h[start + c..start + stride - channels + c + lanes]);
        let du = &self.du[row * stride + c..][..stride - channels + lanes];
        // Column x of h meets du at x + 1 (tap 0), x (tap 1) and x - 1 (tap 2).
        let mut sums = [[T::ZERO; LANES]; 9];
        let mut before = [T::ZERO; LANES];
        let mut own = load::<T, WHOLE>(du, 0, lanes);
        for x in 0..width {
            let next = if x + 1 < width { load::<T, WHOLE>(du, (x + 1) * channels, lanes) } else { [T::ZERO; LANES] };
            for ky in 0..3 {
                let column = load::<T, WHOLE>(lines[ky], x * channels, lanes);
                multiply_add(&column, &next, &mut sums[3 * ky], self.level);
                multiply_add(&column, &own, &mut sums[3 * ky + 1], self.level);
                multiply_add(&column, &before, &mut sums[3 * ky + 2], self.level);
            }
            (before, own) = (own, next);
        }
        for (tap, sums) in sums.iter().enumerate().filter(|(tap, _)| rows[tap / 3].1) {
            let at = tap * self.own.len() + c - self.own.start;
            each([&sums[..lanes]], &mut self.dw[at..][..lanes], |[part], sum| sum + part);
        }
    }
}

/// Adds to `db` the column sums of d, a row of tokens at a time.
fn add_shift<T: Real>(d: &[T], grid: Grid, channels: usize, db: &mut [T]) {
    let mut line = vec![T::ZERO; channels];
    vectorised(
        #[inline(always)]
        |_| {
            for row in d.chunks_exact(grid.width * channels) {
                line.fill(T::ZERO);
                for token in row.chunks_exact(channels) {
                    each([token], &mut line, |[d], sum| sum + d);
                }
                each([&line], db, |[part], sum| sum + part);
            }
        },
    );
}

/// Convolves lines `rows` of x and hands them to `finish`, whose outputs begin with them.
fn convolve<T: Real, F: Finish<T>>(
    x: &[T],
    w: &[T],
    (grid, channels, mirrored): (Grid, usize, bool),
    rows: Range<usize>,
    finish: F,
) {
    vectorised(
        #[inline(always)]
        |level| {
            let work = Convolution { x, w, grid, channels, mirrored, first: rows.start, level, finish };
            each_block(rows, 0..channels, work);
        },
    );
}

/// `g = gelu(conv(h) + b)` of some lines, with which g begins.
pub(super) fn gelu_of_convolution<T: Real>(
    h: &[T],
    w: &[T],
    b: &[T],
    grid: Grid,
    channels: usize,
    rows: Range<usize>,
    g: &mut [T],
) {
    convolve(h, w, (grid, channels, false), rows, Gelu { b, g });
}

impl<T: Real> Cpu<T> {
    /// [`convolve`] on the threads of the unit; `finish` is made of the outputs from the first of `rows` rows on.
    fn convolve<F: Finish<T>, O: Send>(
        &self,
        x: &[T],
        w: &[T],
        (grid, channels, mirrored): (Grid, usize, bool),
        outputs: impl Iterator<Item = O>,
        rows: usize,
        finish: impl Fn(O) -> F + Sync,
    ) {
        let all = grid.images * grid.height;
        self.each(outputs.enumerate(), |(part, output)| {
            let first = part * rows;
            convolve(x, w, (grid, channels, mirrored), first..all.min(first + rows), finish(output));
        });
    }
}

impl<T: Real> Depthwise for Cpu<T> {
    fn depthwise_gelu(
        &self,
        h: &Buffer<T>,
        w: &Buffer<T>,
        b: &Buffer<T>,
        grid: Grid,
        channels: usize,
        g: &mut Buffer<T>,
    ) {
        let rows = self.share(grid.images * grid.height, 1);
        let outputs = g[..grid.rows() * channels].chunks_mut(rows * grid.width * channels);
        self.convolve(h, w, (grid, channels, false), outputs, rows, |g| Gelu { b, g });
    }

    fn depthwise_gelu_backward(
        &self,
        h: &Buffer<T>,
        w: &Buffer<T>,
        b: &Buffer<T>,
        grid: Grid,
        channels: usize,
        d: &mut Buffer<T>,
        g: Option<&mut Buffer<T>>,
        db: Option<&mut Buffer<T>>,
    ) {
        let n = grid.rows() * channels;
        let rows = self.share(grid.images * grid.height, 1);
        let part = rows * grid.width * channels;
        let kind = (grid, channels, false);
        match g {
            Some(g) => {
                let outputs = d[..n].chunks_mut(part).zip(g[..n].chunks_mut(part));
                self.convolve(h, w, kind, outputs, rows, |(d, g)| GeluBackward::<T, true> { b, d, g });
            }
            None => {
                let outputs = d[..n].chunks_mut(part);
                self.convolve(h, w, kind, outputs, rows, |d| GeluBackward::<T, false> { b, d, g: &mut [] });
            }
        }
        if let Some(db) = db {
            add_shift(&d[..n], grid, channels, &mut db[..channels]);
        }
    }

    fn depthwise_backward(
        &self,
        du: &Buffer<T>,
        h: &Buffer<T>,
        w: &Buffer<T>,
        grid: Grid,
        channels: usize,
        dh: Option<&mut Buffer<T>>,
        dw: Option<&mut Buffer<T>>,
        shift: Option<&mut Buffer<T>>,
    ) {
        let all = grid.images * grid.height;
        if let Some(dw) = dw {
            let walk = |dw: &mut [T], own: Range<usize>| {
                vectorised(
                    #[inline(always)]
                    |level| each_block(0..all, own.clone(), Weights { du, h, grid, channels, dw, own, level }),
                );
            };
            let width = self.share(channels, LANES);
            if width >= channels {
                walk(dw, 0..channels);
            } else {
                // Each thread has some of the channels, in a copy of their columns.
                let columns = |start: usize| start..channels.min(start + width);
                let own = |start: usize| -> Vec<T> {
                    dw.chunks_exact(channels).flat_map(|tap| &tap[columns(start)]).copied().collect()
                };
                let mut parts: Vec<Vec<T>> = (0..channels).step_by(width).map(own).collect();
                self.each(parts.iter_mut().enumerate(), |(part, dw)| walk(dw, columns(part * width)));
                for (part, from) in parts.iter().enumerate() {
                    let columns = columns(part * width);
                    for (tap, from) in dw.chunks_exact_mut(channels).zip(from.chunks_exact(columns.len())) {
                        tap[columns.clone()].copy_from_slice(from);
                    }
                }
            }
        }
        if let Some(dh) = dh {
            let rows = self.share(all, 1);
            let outputs = dh[..grid.rows() * channels].chunks_mut(rows * grid.width * channels);
            self.convolve(du, w, (grid, channels, true), outputs, rows, Plain);
            if let Some(shift) = shift {
                self.linear_backward_bias(dh, grid.rows(), channels, shift);
            }
        }
    }
}
