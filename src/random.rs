//! Random numbers by counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3",
//! SC'11). A number depends on its key (seed), stream and counter alone, so the same masks and augmentations come out
//! on every backend, in any order, and a resumed run needs no generator state.

/// What a random number is for. Two purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial values of a tensor; `site` counts the tensors.
    Weights = 1,
    /// Order of the samples in an epoch.
    Shuffle = 2,
    /// Assignment of samples to training and validation.
    Split = 3,
    /// Flip, brightness and contrast of one sample.
    Augment = 4,
    /// Stochastic depth, per sample and block.
    DropPath = 5,
    /// Dropout before the classifier.
    HeadDropout = 6,
    /// Dropout at the input of a LoRA adapter.
    LoraDropout = 7,
    /// The demo's drawings.
    Demo = 8,
}

/// A stream of random numbers, addressed by counter.
///
/// `seed` is the key; `purpose`, `site` (which tensor, block, ...) and `step` (which update, epoch, ...) select the stream.
#[derive(Clone, Copy, Debug)]
pub struct Philox {
    key: [u32; 2],
    high: [u32; 2],
}

impl Philox {
    /// The stream for one purpose, site and step under `seed`. `site` takes 24 bits.
    pub fn new(seed: u64, purpose: Purpose, site: u32, step: u32) -> Self {
        debug_assert!(site < 1 << 24);
        Self { key: [seed as u32, (seed >> 32) as u32], high: [(purpose as u32) << 24 | site, step] }
    }

    /// What sets this stream apart, for the same numbers on another device: two words of the key, two of the stream.
    pub fn identity(&self) -> [u32; 4] {
        [self.key[0], self.key[1], self.high[0], self.high[1]]
    }

    /// Four independent uniform 32-bit words at `counter`.
    #[inline(always)]
    pub fn block(&self, counter: u64) -> [u32; 4] {
        let mut c = [counter as u32, (counter >> 32) as u32, self.high[0], self.high[1]];
        let mut k = self.key;
        for _ in 0..10 {
            let p0 = u64::from(c[0]) * 0xD251_1F53;
            let p1 = u64::from(c[2]) * 0xCD9E_8D57;
            c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        c
    }

    /// The 32-bit word number `index` of the stream.
    #[inline(always)]
    pub fn word(&self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// Most words that [`Philox::words`] hands out at once.
    pub const PART: usize = 64;

    /// Calls `each(i, words)` with the words from `first + i` on, part by part and in order, until `count` are done. Many
    /// blocks are computed side by side, so that inlined into vector code they fill its lanes.
    #[inline(always)]
    pub fn words(&self, first: u64, count: usize, mut each: impl FnMut(usize, &[u32])) {
        let mut done = 0;
        while done < count {
            let at = first + done as u64;
            let skip = (at % 4) as usize;
            let words = self.part(at / 4);
            let n = (Self::PART - skip).min(count - done);
            each(done, &words[skip..skip + n]);
            done += n;
        }
    }

    /// The words of the blocks from `counter` on.
    #[inline(always)]
    fn part(&self, counter: u64) -> [u32; Self::PART] {
        const BLOCKS: usize = Philox::PART / 4;
        const LOW: u64 = 0xFFFF_FFFF;
        // 32-bit words in 64-bit lanes, as the vector instruction for widening products wants them.
        let [mut c0, mut c1] = [[0u64; BLOCKS]; 2];
        let (mut c2, mut c3) = ([u64::from(self.high[0]); BLOCKS], [u64::from(self.high[1]); BLOCKS]);
        for b in 0..BLOCKS {
            let counter = counter + b as u64;
            (c0[b], c1[b]) = (counter & LOW, counter >> 32);
        }
        let mut k = self.key;
        for _ in 0..10 {
            let [k0, k1] = k.map(u64::from);
            for b in 0..BLOCKS {
                let p0 = (c0[b] & LOW) * 0xD251_1F53;
                let p1 = (c2[b] & LOW) * 0xCD9E_8D57;
                (c0[b], c1[b], c2[b], c3[b]) = ((p1 >> 32) ^ c1[b] ^ k0, p1 & LOW, (p0 >> 32) ^ c3[b] ^ k1, p0 & LOW);
            }
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        let mut words = [0; Self::PART];
        for (b, block) in words.chunks_exact_mut(4).enumerate() {
            block.copy_from_slice(&[c0[b] as u32, c1[b] as u32, c2[b] as u32, c3[b] as u32]);
        }
        words
    }

    /// Uniform in [0, 1), with 24 bits, number `index` of the stream.
    #[inline(always)]
    pub fn uniform(&self, index: u64) -> f32 {
        unit(self.word(index))
    }

    /// Standard normal number `index` of the stream (Box-Muller, in f64).
    pub fn normal(&self, index: u64) -> f32 {
        let b = self.block(index / 2);
        let pair = (index % 2) as usize * 2;
        let u1 = (f64::from(b[pair]) + 1.0) / 4_294_967_296.0;
        let u2 = f64::from(b[pair + 1]) / 4_294_967_296.0;
        ((-2.0 * u1.ln()).sqrt() * (std::f64::consts::TAU * u2).cos()) as f32
    }

    /// A uniform permutation of `0..n` (Fisher-Yates).
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            let b = self.block(i as u64);
            let wide = u64::from(b[0]) << 32 | u64::from(b[1]);
            order.swap(i, ((u128::from(wide) * (i as u128 + 1)) >> 64) as usize);
        }
        order
    }
}

/// A 32-bit word as a number in [0, 1) with 24 bits.
#[inline(always)]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors of the Random123 distribution for philox4x32-10.
    #[test]
    fn known_answers() {
        let zero = Philox { key: [0, 0], high: [0, 0] };
        assert_eq!(zero.block(0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Philox { key: [u32::MAX; 2], high: [u32::MAX; 2] };
        assert_eq!(ones.block(u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn words_come_in_order_from_anywhere() {
        let stream = Philox::new(3, Purpose::HeadDropout, 1, 2);
        for (first, count) in [(0, 200), (3, 131), (8, 64), (5, 2)] {
            let mut seen = 0;
            stream.words(first, count, |i, words| {
                assert_eq!(i, seen);
                for (k, word) in words.iter().enumerate() {
                    assert_eq!(*word, stream.word(first + (i + k) as u64));
                }
                seen += words.len();
            });
            assert_eq!(seen, count);
        }
    }

    #[test]
    fn permutation_holds_every_index_once() {
        let mut p = Philox::new(42, Purpose::Shuffle, 0, 3).permutation(1000);
        assert_ne!(p, (0..1000).collect::<Vec<_>>());
        p.sort_unstable();
        assert_eq!(p, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn normal_has_unit_moments() {
        let g = Philox::new(1, Purpose::Weights, 0, 0);
        let n = 100_000u64;
        let (mut sum, mut square) = (0.0f64, 0.0f64);
        for i in 0..n {
            let x = f64::from(g.normal(i));
            sum += x;
            square += x * x;
        }
        assert!((sum / n as f64).abs() < 0.015);
        assert!((square / n as f64 - 1.0).abs() < 0.02);
    }
}
