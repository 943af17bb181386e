//! Vector code chosen at run time: what runs inside [`vectorised`] is compiled for AVX-512, AVX2 and the baseline, and
//! the best the machine has is taken.

/// Runs `work` compiled for the machine's vector extensions. Only what is inlined into `work` profits.
#[inline(always)]
pub fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    struct Work<F>(F);
    impl<R, F: FnOnce() -> R> pulp::WithSimd for Work<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Work(work))
}

/// The name of what [`vectorised`] uses on this machine.
pub fn level() -> &'static str {
    struct Name;
    impl pulp::WithSimd for Name {
        type Output = &'static str;

        fn with_simd<S: pulp::Simd>(self, _: S) -> &'static str {
            match S::F32_LANES {
                16 => "AVX-512 (16 x f32)",
                8 => "AVX2 + FMA (8 x f32)",
                4 => "128-bit vectors (4 x f32)",
                _ => "portable code",
            }
        }
    }
    pulp::Arch::new().dispatch(Name)
}
