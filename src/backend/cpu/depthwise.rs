//! Depth-wise 3x3 convolution, bias and GELU of the Mix-FFN.

use super::{Cpu, Real, simd::vectorised};
use crate::backend::{Depthwise, Grid};

/// Channels handled together, so that their sums stay in registers.
const LANES: usize = 32;

/// GELU(u) = u·Φ(u), and its derivative Φ(u) + u·φ(u).
#[inline(always)]
fn gelu_with_slope<T: Real>(u: T) -> (T, T) {
    let half = T::of(0.5);
    let cumulative = half * (T::ONE + (u * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf());
    let density = (-(half * u * u)).exp() * T::of(0.398_942_280_401_432_7);
    (u * cumulative, cumulative + u * density)
}

/// GELU(u).
#[inline(always)]
fn gelu<T: Real>(u: T) -> T {
    T::of(0.5) * u * (T::ONE + (u * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

/// Calls `finish(offset of the token's channel block, convolution sums, lanes)` for every token and block of channels.
/// Tap `t` reads weight row `t`, or `8 - t` with `mirrored` (the transpose of the convolution).
#[inline(always)]
fn convolve<T: Real>(
    x: &[T],
    w: &[T],
    grid: Grid,
    channels: usize,
    mirrored: bool,
    mut finish: impl FnMut(usize, usize, &[T]),
) {
    let Grid { images, height, width } = grid;
    for image in 0..images {
        for y in 0..height {
            for xx in 0..width {
                for c in (0..channels).step_by(LANES) {
                    let lanes = LANES.min(channels - c);
                    let mut sums = [T::ZERO; LANES];
                    for ky in (0..3).filter(|ky| (1..=height).contains(&(y + ky))) {
                        for kx in (0..3).filter(|kx| (1..=width).contains(&(xx + kx))) {
                            let tap = if mirrored { 8 - (ky * 3 + kx) } else { ky * 3 + kx };
                            let at = ((image * height + y + ky - 1) * width + xx + kx - 1) * channels + c;
                            if lanes == LANES {
                                let (x, w) = (&x[at..][..LANES], &w[tap * channels + c..][..LANES]);
                                for i in 0..LANES {
                                    sums[i] += x[i] * w[i];
                                }
                            } else {
                                let (x, w) = (&x[at..][..lanes], &w[tap * channels + c..][..lanes]);
                                for i in 0..lanes {
                                    sums[i] += x[i] * w[i];
                                }
                            }
                        }
                    }
                    finish(((image * height + y) * width + xx) * channels + c, c, &sums[..lanes]);
                }
            }
        }
    }
}

impl<T: Real> Depthwise for Cpu<T> {
    fn depthwise_gelu(&self, h: &Vec<T>, w: &Vec<T>, b: &Vec<T>, grid: Grid, channels: usize, g: &mut Vec<T>) {
        vectorised(
            #[inline(always)]
            || {
                convolve(
                    h,
                    w,
                    grid,
                    channels,
                    false,
                    #[inline(always)]
                    |at, c, sums| {
                        let (g, b) = (&mut g[at..][..sums.len()], &b[c..][..sums.len()]);
                        for i in 0..sums.len() {
                            g[i] = gelu(sums[i] + b[i]);
                        }
                    },
                );
            },
        );
    }

    fn depthwise_gelu_backward(
        &self,
        h: &Vec<T>,
        w: &Vec<T>,
        b: &Vec<T>,
        grid: Grid,
        channels: usize,
        dg: &mut Vec<T>,
        g: Option<&mut Vec<T>>,
    ) {
        match g {
            Some(g) => vectorised(
                #[inline(always)]
                || {
                    convolve(
                        h,
                        w,
                        grid,
                        channels,
                        false,
                        #[inline(always)]
                        |at, c, sums| {
                            let n = sums.len();
                            let (dg, g, b) = (&mut dg[at..][..n], &mut g[at..][..n], &b[c..][..n]);
                            for i in 0..n {
                                let (value, slope) = gelu_with_slope(sums[i] + b[i]);
                                g[i] = value;
                                dg[i] *= slope;
                            }
                        },
                    );
                },
            ),
            None => vectorised(
                #[inline(always)]
                || {
                    convolve(
                        h,
                        w,
                        grid,
                        channels,
                        false,
                        #[inline(always)]
                        |at, c, sums| {
                            let (dg, b) = (&mut dg[at..][..sums.len()], &b[c..][..sums.len()]);
                            for i in 0..sums.len() {
                                dg[i] *= gelu_with_slope(sums[i] + b[i]).1;
                            }
                        },
                    );
                },
            ),
        }
    }

    fn depthwise_backward_input(&self, du: &Vec<T>, w: &Vec<T>, grid: Grid, channels: usize, dh: &mut Vec<T>) {
        vectorised(
            #[inline(always)]
            || {
                convolve(
                    du,
                    w,
                    grid,
                    channels,
                    true,
                    #[inline(always)]
                    |at, _, sums| {
                        dh[at..][..sums.len()].copy_from_slice(sums);
                    },
                );
            },
        );
    }

    fn depthwise_backward_params(
        &self,
        du: &Vec<T>,
        h: &Vec<T>,
        grid: Grid,
        channels: usize,
        dw: &mut Vec<T>,
        db: &mut Vec<T>,
    ) {
        let Grid { images, height, width } = grid;
        vectorised(
            #[inline(always)]
            || {
                for c in (0..channels).step_by(LANES) {
                    let lanes = LANES.min(channels - c);
                    for row in 0..images * height {
                        // One row of tokens at a time: short sums first, then the sum of the sums.
                        let (image, y) = (row / height, row % height);
                        let mut shift = [T::ZERO; LANES];
                        for x in 0..width {
                            let d = &du[(row * width + x) * channels + c..][..lanes];
                            for i in 0..lanes {
                                shift[i] += d[i];
                            }
                        }
                        for i in 0..lanes {
                            db[c + i] += shift[i];
                        }
                        for ky in (0..3).filter(|ky| (1..=height).contains(&(y + ky))) {
                            for kx in 0..3 {
                                let mut total = [T::ZERO; LANES];
                                for x in (0..width).filter(|x| (1..=width).contains(&(x + kx))) {
                                    let d = &du[(row * width + x) * channels + c..][..lanes];
                                    let at = ((image * height + y + ky - 1) * width + x + kx - 1) * channels + c;
                                    let h = &h[at..][..lanes];
                                    for i in 0..lanes {
                                        total[i] += d[i] * h[i];
                                    }
                                }
                                let dw = &mut dw[(ky * 3 + kx) * channels + c..][..lanes];
                                for i in 0..lanes {
                                    dw[i] += total[i];
                                }
                            }
                        }
                    }
                }
            },
        );
    }
}
