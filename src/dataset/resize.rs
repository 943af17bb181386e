//! Resizing 8-bit images as OpenCV does, bit for bit: `INTER_LINEAR` (half-pixel centres, 11-bit fixed-point weights, no
//! antialiasing) and `INTER_NEAREST` (floor(x * scale), no half-pixel shift).

/// Fractional bits of an interpolation weight (OpenCV's `INTER_RESIZE_COEF_BITS`).
const WEIGHT_BITS: u32 = 11;

/// Input pixels per output pixel, rounded as OpenCV rounds it.
fn scale(from: usize, to: usize) -> f64 {
    1.0 / (to as f64 / from as f64)
}

/// The two fixed-point weights of a fraction in [0, 1].
fn weights(fraction: f32) -> [i16; 2] {
    let one = (1u32 << WEIGHT_BITS) as f32;
    [1.0 - fraction, fraction].map(|w| (w * one).round_ties_even() as i16)
}

/// Position of output coordinate `at` in the input: whole part and fraction.
fn position(at: usize, scale: f64) -> (isize, f32) {
    let x = ((at as f64 + 0.5) * scale - 0.5) as f32;
    let whole = x.floor();
    (whole as isize, x - whole)
}

/// The two input columns of one output column, as offsets into a row, and their weights.
struct Column {
    offsets: [usize; 2],
    weights: [i16; 2],
}

fn columns(from: usize, to: usize, channels: usize) -> Vec<Column> {
    let scale = scale(from, to);
    let column = |at| {
        let (whole, fraction) = position(at, scale);
        let last = from - 1;
        // Beyond the border the border pixel counts alone. Rows, below, keep their weights there, as in OpenCV.
        let (left, fraction) = match usize::try_from(whole) {
            Err(_) => (0, 0.0),
            Ok(left) if left >= last => (last, 0.0),
            Ok(left) => (left, fraction),
        };
        Column { offsets: [left * channels, (left + 1).min(last) * channels], weights: weights(fraction) }
    };
    (0..to).map(column).collect()
}

/// Interpolates one input row, (w, C) u8, at `columns` into (w2, C) with 7 fractional bits.
fn interpolate_row<const C: usize>(row: &[u8], columns: &[Column], out: &mut [i16]) {
    for (out, column) in out.chunks_exact_mut(C).zip(columns) {
        let [left, right] = column.offsets.map(|o| &row[o..o + C]);
        let [a, b] = column.weights.map(i32::from);
        for c in 0..C {
            out[c] = ((i32::from(left[c]) * a + i32::from(right[c]) * b) >> 4) as i16;
        }
    }
}

/// Blends two interpolated rows into pixels. Written as 16-bit high products, which vectorise.
fn blend_rows(rows: [&[i16]; 2], [a, b]: [i16; 2], out: &mut [u8]) {
    let high = |x: i16, w: i16| ((i32::from(x) * i32::from(w)) >> 16) as i16;
    for ((out, &x), &y) in out.iter_mut().zip(rows[0]).zip(rows[1]) {
        *out = ((high(x, a) + high(y, b) + 2) >> 2).clamp(0, 255) as u8;
    }
}

fn bilinear<const C: usize>(src: &[u8], (w, h): (usize, usize), out: &mut [u8], (w2, h2): (usize, usize)) {
    let columns = columns(w, w2, C);
    let scale = scale(h, h2);
    // The two rows in use, interpolated horizontally, and which input rows they are.
    let mut rows = [vec![0i16; w2 * C], vec![0i16; w2 * C]];
    let mut held = [usize::MAX; 2];
    for (at, out) in out.chunks_exact_mut(w2 * C).enumerate() {
        let (whole, fraction) = position(at, scale);
        let wanted = [whole, whole + 1].map(|y| y.clamp(0, h as isize - 1) as usize);
        if held[1] == wanted[0] {
            rows.swap(0, 1);
            held.swap(0, 1);
        }
        for k in 0..2 {
            if held[k] != wanted[k] {
                interpolate_row::<C>(&src[wanted[k] * w * C..][..w * C], &columns, &mut rows[k]);
                held[k] = wanted[k];
            }
        }
        blend_rows([&rows[0], &rows[1]], weights(fraction), out);
    }
}

/// As [`resize_bilinear`], into `out`, (h2, w2, channels).
pub(super) fn resize_bilinear_into(
    src: &[u8],
    from: (usize, usize),
    out: &mut [u8],
    to: (usize, usize),
    channels: usize,
) {
    check(src, from, to, channels);
    assert_eq!(out.len(), to.0 * to.1 * channels, "output buffer");
    match channels {
        1 => bilinear::<1>(src, from, out, to),
        3 => bilinear::<3>(src, from, out, to),
        _ => panic!("{channels} channels; 1 and 3 are supported"),
    }
}

/// Resizes an image, (h, w, channels) u8, to (h2, w2, channels) as OpenCV's `INTER_LINEAR` does.
/// `from` and `to` are (width, height); `channels` is 1 or 3.
///
/// # Panics
/// If a side is 0 or `src` has another length than `from` and `channels` say.
pub fn resize_bilinear(src: &[u8], from: (usize, usize), to: (usize, usize), channels: usize) -> Vec<u8> {
    let mut out = vec![0; to.0 * to.1 * channels];
    resize_bilinear_into(src, from, &mut out, to, channels);
    out
}

/// As [`resize_nearest`] with one channel, into `out`, (h2, w2).
pub(super) fn resize_nearest_into(src: &[u8], (w, h): (usize, usize), out: &mut [u8], (w2, h2): (usize, usize)) {
    check(src, (w, h), (w2, h2), 1);
    assert_eq!(out.len(), w2 * h2, "output buffer");
    let nearest = |at: usize, scale: f64, size: usize| ((at as f64 * scale).floor() as usize).min(size - 1);
    let columns: Vec<usize> = (0..w2).map(|x| nearest(x, scale(w, w2), w)).collect();
    for (y, out) in out.chunks_exact_mut(w2).enumerate() {
        let row = &src[nearest(y, scale(h, h2), h) * w..][..w];
        for (out, &x) in out.iter_mut().zip(&columns) {
            *out = row[x];
        }
    }
}

/// Resizes a one-channel image, (h, w) u8, to (h2, w2) as OpenCV's `INTER_NEAREST` does.
/// `from` and `to` are (width, height).
///
/// # Panics
/// If a side is 0 or `src` has another length than `from` says.
pub fn resize_nearest(src: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
    let mut out = vec![0; to.0 * to.1];
    resize_nearest_into(src, from, &mut out, to);
    out
}

fn check(src: &[u8], (w, h): (usize, usize), (w2, h2): (usize, usize), channels: usize) {
    assert!(w > 0 && h > 0 && w2 > 0 && h2 > 0, "an image has a side of 0");
    assert_eq!(src.len(), w * h * channels, "input buffer");
}
