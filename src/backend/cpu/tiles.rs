//! Products on the matrix units of x86 processors (AMX), for evaluation: 16x16 tiles of f32 sums, to which one instruction adds
//! the product of two tiles of bf16, at sixteen times the rate of f32 vectors.
//!
//! An f32 is taken for the sum of two bf16, `x = high + low`, and `high·high + high·low + low·high` is summed in f32. What is
//! left out is at most 2^-16 of a term each for low·low and for what low does not hold of x, on either side; f32 leaves out
//! 2^-24. That suffices for logits, but not for gradients (`benches/README.md`).
//!
//! Operands are packed panel by panel: [`SIDE`] rows (or columns) by [`TERMS`] terms and again as many. The two terms of a pair,
//! which an instruction adds up, are 16 terms apart, so that packing rows needs no shuffles.

use std::sync::OnceLock;

use super::linear::View;
use super::room::with_room;

/// Rows and columns of the block of sums that stays in tiles.
const SIDE: usize = 32;
/// Rows and columns of a tile.
const HALF: usize = SIDE / 2;
/// Terms of a step.
const TERMS: usize = 32;
/// Steps of rows that are packed before they are multiplied, and after which sums leave the tiles. To pack between the steps would
/// save nothing: tiles wait for what is still on its way to the cache.
const AHEAD: usize = 16;

/// 16 rows of 16 pairs of bf16.
type Tile = [[u32; HALF]; HALF];

/// A step of a panel: the high parts of both halves of its rows or columns, and the low parts.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Step([[Tile; 2]; 2]);

/// Where the sums of a product start.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// At what stands in their place.
    Itself,
    /// At a row, the same for all rows; none is zeros.
    Row(Option<&'a [f32]>),
}

/// Whether products of `k` terms to `n` columns are made here, where there are the units: with few of either, tiles stay empty.
/// The rows do not matter, since threads and strips divide them.
pub(super) fn suit(n: usize, k: usize) -> bool {
    n.min(k) >= HALF && available()
}

/// Whether this processor has matrix units that evaluation uses: the operating system lets the process use them, and the environment
/// does not forbid it (`SEGPEFT_AMX=0`).
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| std::env::var_os("SEGPEFT_AMX").is_none_or(|wish| wish != "0") && amx::permitted())
}

/// Steps of the packed right side of a product of `k` terms to `n` columns.
pub(super) fn steps(n: usize, k: usize) -> usize {
    n.div_ceil(SIDE) * k.div_ceil(TERMS)
}

/// Packs the right side, `(k, n)`, times `scale`. Either its rows or its columns lie side by side.
pub(super) fn pack(right: View<'_, f32>, (n, k): (usize, usize), scale: f32, steps: &mut [Step]) {
    let View { data, start, row_stride, column_stride } = right;
    assert!(available() && (row_stride == 1 || column_stride == 1));
    let panels = steps.chunks_exact_mut(k.div_ceil(TERMS)).zip((0..n).step_by(SIDE));
    for (panel, column) in panels {
        for (step, term) in panel.iter_mut().zip((0..k).step_by(TERMS)) {
            let (columns, terms) = (SIDE.min(n - column), TERMS.min(k - term));
            let data = &data[start + column * column_stride + term * row_stride..];
            // SAFETY: the units are available.
            unsafe {
                if column_stride == 1 {
                    amx::pack_pairs(data, row_stride, (terms, columns), scale, step);
                } else {
                    amx::pack_columns(data, column_stride, (columns, terms), scale, step);
                }
            }
        }
    }
}

/// `c = left·right`, on top of `start`. `left` is `(m, k)`, each row side by side, `right` [packed](pack) of `(k, n)`; c is
/// `(m, n)` with rows `c_stride` apart.
pub(super) fn product(
    size: (usize, usize, usize),
    left: View<'_, f32>,
    right: &[Step],
    start: Start<'_>,
    c: &mut [f32],
    c_stride: usize,
) {
    let (_, n, k) = size;
    assert!(available() && left.column_stride == 1 && n <= c_stride && right.len() == steps(n, k));
    assert!(!matches!(start, Start::Row(Some(row)) if row.len() < n));
    with_room([AHEAD * size_of::<Step>() / size_of::<f32>()], |[room]: [&mut [f32]; 1]| {
        let left = (&left.data[left.start..], left.row_stride);
        // SAFETY: the units are available.
        unsafe { amx::product(size, left, right, start, (c, c_stride), bytemuck::cast_slice_mut(room)) }
    });
}

/// The instructions.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::*;

    use super::{AHEAD, HALF, SIDE, Start, Step, TERMS, Tile};

    /// Whether the processor has the units, and Linux lets this process use them, which has to be asked for since they add 8 KiB to
    /// what is kept of a thread.
    pub fn permitted() -> bool {
        const AMX_BF16: u32 = 22;
        const AMX_TILE: u32 = 24;
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // Unknown to processors that number fewer leaves.
        let features = if __cpuid_count(0, 0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
        // SAFETY: the call touches no memory of the process; a kernel that does not know it says so.
        let permitted = || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 };
        let has = |bit: u32| features >> bit & 1 == 1;
        is_x86_feature_detected!("avx512f") && has(AMX_BF16) && has(AMX_TILE) && permitted()
    }

    /// All eight tiles of this thread set to 16 rows of 64 bytes, until it is dropped.
    struct Configured;

    impl Configured {
        /// Only where the units are [`permitted`].
        fn new() -> Self {
            #[repr(C, align(64))]
            struct Shapes {
                palette: u8,
                start_row: u8,
                reserved: [u8; 14],
                row_bytes: [u16; 16],
                rows: [u8; 16],
            }
            const SHAPES: Shapes = Shapes {
                palette: 1,
                start_row: 0,
                reserved: [0; 14],
                row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
                rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
            };
            // SAFETY: reads 64 bytes, which describe tiles as every processor with the units has them.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, readonly)) };
            Self
        }
    }

    impl Drop for Configured {
        fn drop(&mut self) {
            // SAFETY: only `product` uses tiles, and is done with them.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }

    /// [`super::product`], with room for as many steps as are packed ahead.
    #[target_feature(enable = "avx512f")]
    pub fn product(
        (m, n, k): (usize, usize, usize),
        (x, stride): (&[f32], usize),
        right: &[Step],
        start: Start<'_>,
        (c, c_stride): (&mut [f32], usize),
        room: &mut [Step],
    ) {
        let _configured = Configured::new();
        for first in (0..k.div_ceil(TERMS)).step_by(AHEAD) {
            let depth = AHEAD.min(k.div_ceil(TERMS) - first);
            let ahead = AHEAD / depth * SIDE;
            for top in (0..m).step_by(ahead) {
                let panels = (top..m.min(top + ahead)).step_by(SIDE);
                for (row, panel) in panels.clone().zip(room.chunks_exact_mut(depth)) {
                    for (step, term) in panel.iter_mut().zip((first * TERMS..k).step_by(TERMS)) {
                        let size = (SIDE.min(m - row), TERMS.min(k - term));
                        pack_rows(&x[row * stride + term..], stride, size, 1.0, step);
                    }
                }
                for (column, right) in (0..n).step_by(SIDE).zip(right.chunks_exact(k.div_ceil(TERMS))) {
                    let right = &right[first..first + depth];
                    let start = match start {
                        Start::Row(row) if first == 0 => Start::Row(row.map(|row| &row[column..])),
                        _ => Start::Itself,
                    };
                    for (row, left) in panels.clone().zip(room.chunks_exact(depth)) {
                        let size = (SIDE.min(m - row), SIDE.min(n - column));
                        block(left, right, start, &mut c[row * c_stride + column..], c_stride, size);
                    }
                }
            }
        }
    }

    /// The block of `size` (rows, columns) at the beginning of c: the product of two panels, on top of `start`.
    #[inline]
    fn block(
        left: &[Step],
        right: &[Step],
        start: Start<'_>,
        c: &mut [f32],
        stride: usize,
        (rows, columns): (usize, usize),
    ) {
        // A line is read where it is: tiles would wait for a copy that was written just before.
        const ZEROS: &[f32; SIDE] = &[0.0; SIDE];
        if (rows, columns) == (SIDE, SIDE) {
            let line = match start {
                Start::Itself => None,
                Start::Row(row) => Some(row.and_then(|row| row.first_chunk()).unwrap_or(ZEROS)),
            };
            return add_product(left, right, line, c, stride);
        }
        let mut whole = [[0.0; SIDE]; SIDE];
        for (whole, c) in whole.iter_mut().zip(c.chunks(stride)).take(rows) {
            match start {
                Start::Itself => whole[..columns].copy_from_slice(&c[..columns]),
                Start::Row(Some(row)) => whole[..columns].copy_from_slice(&row[..columns]),
                Start::Row(None) => {}
            }
        }
        add_product(left, right, None, whole.as_flattened_mut(), SIDE);
        for (whole, c) in whole.iter().zip(c.chunks_mut(stride)).take(rows) {
            c[..columns].copy_from_slice(&whole[..columns]);
        }
    }

    /// Sets the first [`SIDE`] numbers of the first [`SIDE`] rows of c, which are `stride` apart, to the product of two panels plus
    /// `line`, or plus themselves.
    #[inline]
    fn add_product(left: &[Step], right: &[Step], line: Option<&[f32; SIDE]>, c: &mut [f32], stride: usize) {
        assert!(left.len() == right.len() && !left.is_empty() && (SIDE - 1) * stride + SIDE <= c.len());
        let to = c.as_mut_ptr();
        let (from, from_stride) = line.map_or((to.cast_const(), stride), |line| (line.as_ptr(), 0));
        // Sums: tiles 0 to 3. Left operands: 4 and 5; right ones: 6 and 7. No instruction waits for the one before it.
        //
        // SAFETY: the rows of c lie in it, the line is as long as one, and every step read lies in its slice, by the assertion.
        // Tiles are named nowhere else, so that the compiler has nothing in them.
        unsafe {
            asm!(
                "tileloadd tmm0, [{from} + {from_row}]",
                "tileloadd tmm1, [{from} + {from_row} + 64]",
                "tileloadd tmm2, [{from_below} + {from_row}]",
                "tileloadd tmm3, [{from_below} + {from_row} + 64]",
                "2:",
                // High by low.
                "tileloadd tmm4, [{left} + {row}]",
                "tileloadd tmm6, [{right} + {row} + 2048]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{left} + {row} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm7, [{right} + {row} + 3072]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // High by high.
                "tileloadd tmm6, [{right} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm7, [{right} + {row} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // Low by high.
                "tileloadd tmm4, [{left} + {row} + 2048]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{left} + {row} + 3072]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 4096",
                "add {right}, 4096",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{to} + {to_row}], tmm0",
                "tilestored [{to} + {to_row} + 64], tmm1",
                "tilestored [{to_below} + {to_row}], tmm2",
                "tilestored [{to_below} + {to_row} + 64], tmm3",
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right.as_ptr() => _,
                steps = inout(reg) left.len() => _,
                row = in(reg) 64usize,
                from = in(reg) from,
                from_below = in(reg) from.wrapping_add(HALF * from_stride),
                from_row = in(reg) from_stride * size_of::<f32>(),
                to = in(reg) to,
                to_below = in(reg) to.wrapping_add(HALF * stride),
                to_row = in(reg) stride * size_of::<f32>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Packs up to [`SIDE`] rows of up to [`TERMS`] terms, times `scale`; zeros beyond. Rows are `stride` apart.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pack_rows(x: &[f32], stride: usize, (rows, terms): (usize, usize), scale: f32, step: &mut Step) {
        assert!(rows <= SIDE && terms <= TERMS && (rows - 1) * stride + terms <= x.len());
        let (scale, lanes) = (_mm512_set1_ps(scale), [first_lanes(terms), first_lanes(terms.saturating_sub(HALF))]);
        let Step([high, low]) = step;
        let tiles = high.as_flattened_mut().iter_mut().zip(low.as_flattened_mut());
        for (r, (high, low)) in tiles.enumerate() {
            let lanes = if r < rows { lanes } else { [0; 2] };
            let from = x.as_ptr().wrapping_add(r * stride);
            // SAFETY: reads only the terms of rows that are there, which lie in x by the assertion.
            let (a, b) = unsafe {
                (_mm512_maskz_loadu_ps(lanes[0], from), _mm512_maskz_loadu_ps(lanes[1], from.wrapping_add(HALF)))
            };
            split(_mm512_mul_ps(a, scale), _mm512_mul_ps(b, scale), high, low);
        }
    }

    /// As [`pack_rows`], for the columns of what stands right, each side by side.
    #[target_feature(enable = "avx512f")]
    pub fn pack_columns(x: &[f32], stride: usize, size: (usize, usize), scale: f32, step: &mut Step) {
        pack_rows(x, stride, size, scale, step);
        for tile in step.0.as_flattened_mut() {
            transpose(tile);
        }
    }

    /// Packs up to [`SIDE`] columns of up to [`TERMS`] terms, times `scale`; zeros beyond. The columns of a term lie side by side,
    /// terms are `stride` apart.
    #[target_feature(enable = "avx512f")]
    pub fn pack_pairs(x: &[f32], stride: usize, (terms, columns): (usize, usize), scale: f32, step: &mut Step) {
        assert!(columns <= SIDE && terms <= TERMS && (terms - 1) * stride + columns <= x.len());
        let scale = _mm512_set1_ps(scale);
        let Step([high, low]) = step;
        for half in 0..2 {
            let lanes = first_lanes(columns.saturating_sub(half * HALF));
            let load = |term: usize| {
                let from = x.as_ptr().wrapping_add(term * stride + half * HALF);
                // SAFETY: reads only columns that are there, which lie in x by the assertion.
                _mm512_mul_ps(unsafe { _mm512_maskz_loadu_ps(if term < terms { lanes } else { 0 }, from) }, scale)
            };
            for (r, (high, low)) in high[half].iter_mut().zip(&mut low[half]).enumerate() {
                split(load(r), load(r + HALF), high, low);
            }
        }
    }

    /// The lanes of the first `count` numbers.
    fn first_lanes(count: usize) -> u16 {
        ((1u32 << count.min(HALF)) - 1) as u16
    }

    /// Writes the parts of a and b as pairs. The low part of a number that is not finite, or rounds to infinity, is a NaN, so that
    /// it shows in the sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn split(a: __m512, b: __m512, high: &mut [u32; HALF], low: &mut [u32; HALF]) {
        let upper = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
        // The high part is rounded, and the rest cut off: that has either sign, so that no error adds up.
        let round = |x| {
            let half = _mm512_set1_epi32(0x8000);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper))
        };
        let pair = |a, b| {
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            _mm512_or_si512(_mm512_srli_epi32::<16>(a), _mm512_and_si512(b, upper))
        };
        let (high_a, high_b) = (round(a), round(b));
        // SAFETY: 64 bytes each.
        unsafe {
            _mm512_storeu_si512(high.as_mut_ptr().cast(), pair(high_a, high_b));
            let rest = pair(_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b));
            _mm512_storeu_si512(low.as_mut_ptr().cast(), rest);
        }
    }

    /// Transposes a tile of pairs.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transpose(tile: &mut Tile) {
        // SAFETY: 64 bytes each.
        let rows = tile.each_ref().map(|row| unsafe { _mm512_loadu_si512(row.as_ptr().cast()) });
        let mut twos = rows;
        for i in (0..HALF).step_by(2) {
            twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // fours[i + c]: of rows i to i + 3, columns c, c + 4, c + 8, c + 12.
        let mut fours = rows;
        for i in (0..HALF).step_by(4) {
            for c in 0..2 {
                fours[i + 2 * c] = _mm512_unpacklo_epi64(twos[i + c], twos[i + 2 + c]);
                fours[i + 2 * c + 1] = _mm512_unpackhi_epi64(twos[i + c], twos[i + 2 + c]);
            }
        }
        for c in 0..4 {
            let [a, b, d, e] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xDD>(a, b));
            let (other_even, other_odd) = (_mm512_shuffle_i32x4::<0x88>(d, e), _mm512_shuffle_i32x4::<0xDD>(d, e));
            let columns = [
                (c, _mm512_shuffle_i32x4::<0x88>(even, other_even)),
                (c + 4, _mm512_shuffle_i32x4::<0x88>(odd, other_odd)),
                (c + 8, _mm512_shuffle_i32x4::<0xDD>(even, other_even)),
                (c + 12, _mm512_shuffle_i32x4::<0xDD>(odd, other_odd)),
            ];
            for (column, values) in columns {
                // SAFETY: 64 bytes.
                unsafe { _mm512_storeu_si512(tile[column].as_mut_ptr().cast(), values) };
            }
        }
    }
}

/// No processor of another kind, nor another system, has the units; nobody comes here.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod amx {
    use super::{Start, Step};

    pub fn permitted() -> bool {
        false
    }

    pub unsafe fn pack_columns(_: &[f32], _: usize, _: (usize, usize), _: f32, _: &mut Step) {}

    pub unsafe fn pack_pairs(_: &[f32], _: usize, _: (usize, usize), _: f32, _: &mut Step) {}

    pub unsafe fn product(
        _: (usize, usize, usize),
        _: (&[f32], usize),
        _: &[Step],
        _: Start<'_>,
        _: (&mut [f32], usize),
        _: &mut [Step],
    ) {
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Buffer;
    use crate::random::{Philox, Purpose};

    /// Sides that fill tiles, that do not, and with more terms than are summed at a time.
    const SIZES: [(usize, usize, usize); 9] = [
        (1, 16, 16),
        (64, 32, 32),
        (33, 48, 27),
        (31, 17, 147),
        (256, 32, 128),
        (100, 40, 300),
        (16, 160, 640),
        (257, 256, 33),
        (5, 33, 2048),
    ];

    fn draw(len: usize, site: u32) -> Buffer<f32> {
        let stream = Philox::new(1, Purpose::Demo, site, 0);
        (0..len as u64).map(|i| 2.0 * stream.uniform(i) - 1.0).collect()
    }

    fn packed(right: View<'_, f32>, size: (usize, usize), scale: f32) -> Vec<Step> {
        let mut packed = vec![Step([[[[0; HALF]; HALF]; 2]; 2]); steps(size.0, size.1)];
        pack(right, size, scale, &mut packed);
        packed
    }

    /// Of every term at most 3·2^-16 is lost, and a sum of k terms of either sign in f32 loses less than k roundings would.
    #[test]
    fn tiles_agree_with_f64() {
        if !available() {
            return eprintln!("skipped: this processor has no matrix units");
        }
        for (m, n, k) in SIZES {
            for transposed in [false, true] {
                let (a, b, bias) = (draw(m * k, 0), draw(n * k, 1), draw(n, 2));
                let right = if transposed { View::rows(&b[..], k).t() } else { View::rows(&b[..], n) };
                let (scale, stride) = (0.75, n + 3);
                let right_packed = packed(right, (n, k), scale);
                for start in [Start::Row(None), Start::Row(Some(&bias)), Start::Itself] {
                    let before = draw(m * stride, 3);
                    let mut c = before.clone();
                    product((m, n, k), View::rows(&a[..], k), &right_packed, start, &mut c, stride);
                    for (i, j) in (0..m).flat_map(|i| (0..stride).map(move |j| (i, j))) {
                        let (was, is) = (before[i * stride + j], c[i * stride + j]);
                        if j >= n {
                            assert_eq!(was, is, "{m}x{n}x{k}: beside the product");
                            continue;
                        }
                        let first = match start {
                            Start::Itself => was,
                            Start::Row(row) => row.map_or(0.0, |row| row[j]),
                        };
                        let at = |t: usize| b[right.start + t * right.row_stride + j * right.column_stride];
                        let terms = (0..k).map(|t| f64::from(scale) * f64::from(a[i * k + t]) * f64::from(at(t)));
                        let (sum, size) = terms
                            .fold((f64::from(first), f64::from(first.abs())), |(sum, size), term| {
                                (sum + term, size + term.abs())
                            });
                        let error = (f64::from(is) - sum).abs();
                        let bound = (3.0 / 65536.0 + k as f64 * f64::from(f32::EPSILON)) * size;
                        assert!(error <= bound, "{m}x{n}x{k} at {i}, {j}: {is} for {sum}");
                    }
                }
            }
        }
    }

    /// A row does not depend on which others are multiplied with it.
    #[test]
    fn rows_are_the_same_bits_in_any_division() {
        if !available() {
            return eprintln!("skipped: this processor has no matrix units");
        }
        for (m, n, k) in SIZES {
            let (a, b) = (draw(m * k, 0), draw(n * k, 1));
            let right = packed(View::rows(&b[..], k).t(), (n, k), 1.0);
            let times = |rows: usize| {
                let mut c = vec![0.0; m * n];
                for (a, c) in a.chunks(rows * k).zip(c.chunks_mut(rows * n)) {
                    product((c.len() / n, n, k), View::rows(a, k), &right, Start::Row(None), c, n);
                }
                c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let whole = times(m);
            for rows in [1, 7, 16, 40, 96] {
                assert!(times(rows) == whole, "{m}x{n}x{k} by {rows} rows");
            }
        }
    }

    /// A number that is not finite is not hidden.
    #[test]
    fn what_is_not_finite_shows() {
        if !available() {
            return eprintln!("skipped: this processor has no matrix units");
        }
        for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(u32::MAX)] {
            let (mut a, b) = (draw(32 * 32, 0), draw(32 * 32, 1));
            a[33] = odd;
            let right = packed(View::rows(&b[..], 32).t(), (32, 32), 1.0);
            let mut c = vec![0.0f32; 32 * 32];
            product((32, 32, 32), View::rows(&a[..], 32), &right, Start::Row(None), &mut c, 32);
            assert!(c[32..64].iter().all(|x| !x.is_finite()), "{odd}");
            assert!(c[..32].iter().chain(&c[64..]).all(|x| x.is_finite()), "{odd}");
        }
    }
}
