//! Weights and pictures by formula: see `tools/reference/formula.py`, the other side of the comparison.
#![allow(dead_code, missing_docs)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use segpeft_native::backend::Sample;
use segpeft_native::dataset::Augment;

/// A file of the reference; SEGPEFT_FIXTURES names the folder in place of `tests/fixtures` where a test binary was moved away
/// from the repository.
pub fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("SEGPEFT_FIXTURES")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join("reference").join(name)
}

pub fn json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).expect("fixture")).expect("JSON")
}

pub fn tensors(name: &str) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(fixture(name)).expect("fixture");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    file.iter()
        .filter(|(_, view)| view.dtype() == safetensors::Dtype::F32)
        .map(|(name, view)| {
            let numbers = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            (name.to_string(), numbers.collect())
        })
        .collect()
}

fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3))
}

fn word(key: u64, i: u64) -> u64 {
    let z = key.wrapping_add(i).wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The tensor called `name` with PyTorch's `shape`.
pub fn tensor(name: &str, shape: &[usize]) -> Vec<f32> {
    let key = fnv1a(name);
    let fan_in: usize = shape.iter().skip(1).product();
    let scale = (3.0 / fan_in as f64).sqrt();
    (0..shape.iter().product::<usize>() as u64)
        .map(|i| {
            let u = (word(key, i) >> 40) as f64 / f64::from(1 << 24);
            let v = 2.0 * u - 1.0;
            let x = if name.ends_with("running_var") {
                0.5 + u
            } else if name.ends_with("running_mean") {
                0.2 * v
            } else if name.ends_with("lora_B.weight") {
                0.05 * v
            } else if shape.len() >= 2 {
                v * scale
            } else if name.ends_with(".weight") {
                1.0 + 0.2 * v
            } else {
                0.1 * v
            };
            x as f32
        })
        .collect()
}

/// Picture `k`: pixels `(size, size, 3)` and mask `(size, size)`.
pub fn picture(k: u64, size: usize) -> (Vec<u8>, Vec<u8>) {
    let key = fnv1a(&format!("shape{k}"));
    let h: Vec<usize> = (0..3).map(|j| word(key, j) as usize).collect();
    let (cx, cy) = (size / 4 + h[0] % (size / 2), size / 4 + h[1] % (size / 2));
    let r = size / 8 + h[2] % (size / 8);
    let mask: Vec<u8> = (0..size * size)
        .map(|i| {
            let (dy, dx) = ((i / size).abs_diff(cy), (i % size).abs_diff(cx));
            u8::from(dy * dy + dx * dx < r * r)
        })
        .collect();
    let key = fnv1a(&format!("image{k}"));
    let pixels = (0..size * size * 3)
        .map(|i| {
            let noise = (word(key, i as u64) >> 56) % 60;
            (60 + 20 * (i % 3) as u64 + 70 * u64::from(mask[i / 3]) + noise) as u8
        })
        .collect();
    (pixels, mask)
}

/// A third class and ignored pixels.
pub fn three_labels(mask: &[u8], size: usize) -> Vec<u8> {
    let mut labels = mask.to_vec();
    labels[3 * size / 4 * size..].fill(2);
    labels[..2 * size].fill(255);
    for row in labels.chunks_exact_mut(size) {
        row[size / 2] = 255;
    }
    labels
}

/// Pictures with labels, kept alive for samples.
pub struct Pictures {
    pub size: usize,
    pub data: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Pictures {
    pub fn new(numbers: impl IntoIterator<Item = u64>, size: usize, third_class: bool) -> Self {
        let data = numbers
            .into_iter()
            .map(|k| {
                let (pixels, mask) = picture(k, size);
                let labels = if third_class { three_labels(&mask, size) } else { mask };
                (pixels, labels)
            })
            .collect();
        Self { size, data }
    }

    pub fn samples(&self) -> Vec<Sample<'_>> {
        self.data
            .iter()
            .enumerate()
            .map(|(index, (pixels, labels))| Sample { index, pixels, labels, augment: Augment::IDENTITY })
            .collect()
    }

    /// Pixels that count in the loss.
    pub fn valid(&self, labels: usize) -> usize {
        self.data.iter().flat_map(|(_, l)| l).filter(|&&l| usize::from(l) < labels).count()
    }
}

pub fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

pub fn largest(x: &[f32]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(f64::from(x.abs())))
}

/// Up to 256 evenly strided elements, as the fixtures keep them.
pub fn strided(x: &[f32]) -> Vec<f32> {
    let n = x.len().min(256);
    (0..n).map(|i| x[i * x.len() / n]).collect()
}
