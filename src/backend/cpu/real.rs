//! The number types of the CPU backend: f32 for work, f64 for proofs. Elementary functions are written without
//! branches, so that loops over them become vector code.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

use super::simd::Level;

/// A floating-point type of the CPU backend.
pub trait Real:
    bytemuck::Pod
    + Send
    + Sync
    + Debug
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Sum
    + 'static
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// Rounds.
    fn of(x: f64) -> Self;
    /// Widens.
    fn f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// `self·b + c`, rounded once where `level` can.
    fn mul_add(self, b: Self, c: Self, level: Level) -> Self;
    /// e^x, for f32 within 2 ulp between -87 and 88; 0 below, about 2e38 above.
    fn exp(self, level: Level) -> Self;
    /// Natural logarithm of a positive normal number, for f32 within 2 ulp.
    fn ln(self, level: Level) -> Self;
    /// Error function, within 4e-7 for f32.
    fn erf(self, level: Level) -> Self;
    /// The larger number.
    fn max(self, other: Self) -> Self;
}

/// The polynomial in x with these coefficients, that of the highest power first.
#[inline(always)]
fn horner<const N: usize>(first: f32, rest: [f32; N], x: f32, level: Level) -> f32 {
    let mut value = first;
    for coefficient in rest {
        value = Real::mul_add(value, x, coefficient, level);
    }
    value
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self, level: Level) -> Self {
        if level.fma { f32::mul_add(self, b, c) } else { self * b + c }
    }

    /// x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r by its Taylor polynomial of degree 7, 2^n by its bits.
    #[inline(always)]
    fn exp(self, level: Level) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it leaves the nearest integer in the low bits.
        const LN2_HIGH: f32 = 0.693_359_4; // 9 bits, so n·LN2_HIGH is exact.
        const LN2_LOW: f32 = -2.121_944_4e-4;
        const TAYLOR: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
        // Ordered so that a NaN passes through.
        let x = if self < -87.0 { -87.0 } else { self };
        let x = if x > 88.3 { 88.3 } else { x };
        let shifted = Real::mul_add(x, std::f32::consts::LOG2_E, ROUND, level);
        let n = shifted - ROUND;
        let r = Real::mul_add(n, -LN2_HIGH, x, level);
        let r = Real::mul_add(n, -LN2_LOW, r, level);
        let p = horner(1.0 / 5040.0, TAYLOR, r, level);
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
        let y = p * power;
        if self < -87.0 { 0.0 } else { y }
    }

    /// x = m·2^n with m in [√½, √2); ln m = 2·artanh(s) by its series, s = (m - 1)/(m + 1).
    #[inline(always)]
    fn ln(self, level: Level) -> Self {
        const SQRT_HALF: u32 = 0x3F35_04F3;
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let offset = self.to_bits().wrapping_sub(SQRT_HALF);
        let n = ((offset as i32) >> 23) as f32;
        let m = f32::from_bits((offset & 0x007F_FFFF) + SQRT_HALF);
        let f = m - 1.0;
        let s = f / (m + 1.0);
        let t = s * s;
        let p = horner(2.0 / 11.0, [2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0], t, level) * t;
        // 2·s = f - s·f, of which f is exact.
        let low = Real::mul_add(s, p - f, n * LN2_LOW, level);
        let y = Real::mul_add(n, LN2_HIGH, f + low, level);
        // Ordered so that a NaN passes through.
        if self.is_nan() { self } else { y }
    }

    /// x·P(x²)/Q(x²), a least-maximum fit over |x| ≤ 4 (relative error 2.5e-8 before rounding); ±1 beyond.
    #[inline(always)]
    fn erf(self, level: Level) -> Self {
        const P: [f32; 5] =
            [2.845_423e-4, 3.883_113_6e-3, 5.310_105_6e-2, 1.935_423_3e-1, std::f32::consts::FRAC_2_SQRT_PI];
        const Q: [f32; 5] = [1.185_478_9e-3, 1.520_683_4e-2, 1.153_485_7e-1, 5.048_55e-1, 1.0];
        let x = if self < -4.0 { -4.0 } else { self };
        let x = if x > 4.0 { 4.0 } else { x };
        let t = x * x;
        let p = horner(1.986_580_4e-6, P, t, level);
        let q = horner(3.741_68e-5, Q, t, level);
        x * p / q
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self, level: Level) -> Self {
        if level.fma { f64::mul_add(self, b, c) } else { self * b + c }
    }

    #[inline(always)]
    fn exp(self, _: Level) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn ln(self, _: Level) -> Self {
        f64::ln(self)
    }

    /// The Maclaurin series below 3, the continued fraction of erfc (Abramowitz and Stegun, 7.1.14) above.
    fn erf(self, _: Level) -> Self {
        let x = self.abs();
        let value = if x < 3.0 {
            let (mut term, mut sum, mut n) = (x, x, 0.0);
            while term.abs() > 1e-18 * sum.abs() {
                n += 1.0;
                term *= -x * x / n;
                sum += term / (2.0 * n + 1.0);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        } else {
            let mut fraction = x;
            for k in (1..=60).rev() {
                fraction = x + f64::from(k) / 2.0 / fraction;
            }
            1.0 - f64::exp(-x * x) / fraction / std::f64::consts::PI.sqrt()
        };
        value.copysign(self)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::{Level, Real};

    const LEVELS: [Level; 2] = [Level { fma: false }, Level { fma: true }];

    #[test]
    fn exp_is_within_two_ulp() {
        for level in LEVELS {
            for i in -870_000..883_000 {
                let x = i as f32 * 1e-4;
                let (ours, true_value) = (Real::exp(x, level), f64::from(x).exp());
                let error = (f64::from(ours) - true_value).abs() / true_value;
                assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) = {ours}, error {error}");
            }
            assert_eq!(Real::exp(f32::NEG_INFINITY, level), 0.0);
            assert_eq!(Real::exp(0.0f32, level), 1.0);
            assert!(Real::exp(f32::NAN, level).is_nan());
        }
    }

    #[test]
    fn ln_is_within_two_ulp() {
        for level in LEVELS {
            for i in (0x0080_0000u32..0x7F00_0000).step_by(997) {
                let x = f32::from_bits(i);
                let (ours, true_value) = (Real::ln(x, level), f64::from(x).ln());
                let error = (f64::from(ours) - true_value).abs() / true_value.abs().max(1e-30);
                assert!(error < 2.0 * f64::from(f32::EPSILON), "ln({x}) = {ours}, error {error}");
            }
            assert_eq!(Real::ln(1.0f32, level), 0.0);
            assert!(Real::ln(f32::NAN, level).is_nan());
        }
    }

    #[test]
    fn erf_agrees_with_known_values_and_across_types() {
        // Abramowitz and Stegun, table 7.1.
        for level in LEVELS {
            for (x, value) in
                [(0.0f64, 0.0f64), (0.5, 0.520_499_877_813), (1.0, 0.842_700_792_950), (2.0, 0.995_322_265_019)]
            {
                assert!((Real::erf(x, level) - value).abs() < 1e-12f64);
                assert!((Real::erf(-x, level) + value).abs() < 1e-12f64);
            }
            assert!((Real::erf(3.5f64, level) - 0.999_999_256_902).abs() < 1e-12);
            for i in -60_000..60_000 {
                let x = i as f32 * 1e-4;
                let difference = f64::from(Real::erf(x, level)) - Real::erf(f64::from(x), level);
                assert!(difference.abs() < 4e-7, "erf({x})");
            }
        }
    }
}
