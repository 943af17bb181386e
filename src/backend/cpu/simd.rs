//! Vector code chosen at run time: what runs inside [`vectorised`] is compiled for AVX-512, AVX2 and the baseline, and
//! the best the machine has is taken.

/// The vector extensions a piece of code is compiled for; known to the compiler wherever it is inlined.
#[derive(Clone, Copy)]
pub struct Level {
    /// Whether one instruction multiplies and adds. Without it, `mul_add` would call a slow library function.
    pub fma: bool,
}

impl Level {
    #[inline(always)]
    fn of<S: pulp::Simd>(_: S) -> Self {
        Self { fma: cfg!(target_arch = "aarch64") || (cfg!(target_arch = "x86_64") && S::F32_LANES >= 8) }
    }
}

/// Runs `work` compiled for the machine's vector extensions. Only what is inlined into `work` profits, so closures on the
/// way, `work` itself included, are marked `#[inline(always)]`.
#[inline(always)]
pub fn vectorised<R>(work: impl FnOnce(Level) -> R) -> R {
    struct Work<F>(F);
    impl<R, F: FnOnce(Level) -> R> pulp::WithSimd for Work<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> R {
            (self.0)(Level::of(simd))
        }
    }
    pulp::Arch::new().dispatch(Work(work))
}

/// Lanes of a block: one AVX-512 register of f32.
pub const LANES: usize = 16;

/// Sets every element of `out` to `work(elements of inputs, element of out)`. In blocks of [`LANES`], since the compiler's
/// own vector loops begin only at several times that length, and rows of tokens are short.
#[inline(always)]
pub fn each<T: Copy, const N: usize>(inputs: [&[T]; N], out: &mut [T], work: impl Fn([T; N], T) -> T) {
    let inputs = inputs.map(|input| input[..out.len()].as_chunks::<LANES>());
    let (blocks, rest) = out.as_chunks_mut::<LANES>();
    for (b, out) in blocks.iter_mut().enumerate() {
        block_by_block();
        let from: [[T; LANES]; N] = std::array::from_fn(|k| inputs[k].0[b]);
        let mut to = *out;
        for i in 0..LANES {
            to[i] = work(std::array::from_fn(|k| from[k][i]), to[i]);
        }
        *out = to;
    }
    for (i, out) in rest.iter_mut().enumerate() {
        *out = work(std::array::from_fn(|k| inputs[k].1[i]), *out);
    }
}

/// Keeps the compiler from vectorising the loop it stands in. A loop over blocks of [`LANES`] is vector code already once its
/// body is; across blocks the compiler would have to gather every sixteenth number and shuffle.
#[inline(always)]
pub fn block_by_block() {
    // SAFETY: no instruction, which touches nothing.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    unsafe {
        std::arch::asm!("", options(nomem, nostack, preserves_flags));
    }
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
