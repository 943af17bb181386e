//! The number types of the CPU backend: f32 for work, f64 for proofs. Elementary functions are written without
//! branches, so that loops over them become vector code.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// A floating-point type of the CPU backend.
pub trait Real:
    Copy
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
    /// e^x, for f32 within 2 ulp between -87 and 88; 0 below, about 2e38 above.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Error function, within 4e-7 for f32.
    fn erf(self) -> Self;
    /// The larger number.
    fn max(self, other: Self) -> Self;
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

    /// x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r by its Taylor polynomial of degree 7, 2^n by its bits.
    #[inline(always)]
    fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it leaves the nearest integer in the low bits.
        const LN2_HIGH: f32 = 0.693_359_4; // 9 bits, so n·LN2_HIGH is exact.
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Ordered so that a NaN passes through.
        let x = if self < -87.0 { -87.0 } else { self };
        let x = if x > 88.3 { 88.3 } else { x };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = (x - n * LN2_HIGH) - n * LN2_LOW;
        let p = 1.0 / 5040.0;
        let p = p * r + 1.0 / 720.0;
        let p = p * r + 1.0 / 120.0;
        let p = p * r + 1.0 / 24.0;
        let p = p * r + 1.0 / 6.0;
        let p = p * r + 0.5;
        let p = (p * r) * r + r + 1.0;
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
        let y = p * power;
        if self < -87.0 { 0.0 } else { y }
    }

    #[inline(always)]
    fn ln(self) -> Self {
        f32::ln(self)
    }

    /// x·P(x²)/Q(x²), a least-maximum fit over |x| ≤ 4 (relative error 2.5e-8 before rounding); ±1 beyond.
    #[inline(always)]
    fn erf(self) -> Self {
        let x = if self < -4.0 { -4.0 } else { self };
        let x = if x > 4.0 { 4.0 } else { x };
        let t = x * x;
        let p = 1.986_580_4e-6;
        let p = p * t + 2.845_423e-4;
        let p = p * t + 3.883_113_6e-3;
        let p = p * t + 5.310_105_6e-2;
        let p = p * t + 1.935_423_3e-1;
        let p = p * t + std::f32::consts::FRAC_2_SQRT_PI;
        let q = 3.741_68e-5;
        let q = q * t + 1.185_478_9e-3;
        let q = q * t + 1.520_683_4e-2;
        let q = q * t + 1.153_485_7e-1;
        let q = q * t + 5.048_55e-1;
        let q = q * t + 1.0;
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
    fn exp(self) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }

    /// The Maclaurin series below 3, the continued fraction of erfc (Abramowitz and Stegun, 7.1.14) above.
    fn erf(self) -> Self {
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
            1.0 - (-x * x).exp() / fraction / std::f64::consts::PI.sqrt()
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
    use super::Real;

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -870_000..883_000 {
            let x = i as f32 * 1e-4;
            let (ours, true_value) = (Real::exp(x), f64::from(x).exp());
            let error = (f64::from(ours) - true_value).abs() / true_value;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) = {ours}, error {error}");
        }
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert!(Real::exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_agrees_with_known_values_and_across_types() {
        // Abramowitz and Stegun, table 7.1.
        for (x, value) in
            [(0.0f64, 0.0f64), (0.5, 0.520_499_877_813), (1.0, 0.842_700_792_950), (2.0, 0.995_322_265_019)]
        {
            assert!((Real::erf(x) - value).abs() < 1e-12f64);
            assert!((Real::erf(-x) + value).abs() < 1e-12f64);
        }
        assert!((Real::erf(3.5f64) - 0.999_999_256_902).abs() < 1e-12);
        for i in -60_000..60_000 {
            let x = i as f32 * 1e-4;
            assert!((f64::from(Real::erf(x)) - Real::erf(f64::from(x))).abs() < 4e-7, "erf({x})");
        }
    }
}
