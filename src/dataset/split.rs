//! Which images train and which validate.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::PackedDataset;
use crate::random::{Philox, Purpose};
use crate::{Error, Result, files};

/// Bytes of the longest list of names accepted.
const MAX_LIST: u64 = 64 << 20;

/// Indices into a [`PackedDataset`], without overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Training images, in the order that unshuffled training follows.
    pub train: Vec<usize>,
    /// Validation images.
    pub val: Vec<usize>,
}

impl Split {
    /// A random split of `n` images that depends on `seed` alone; `train_fraction` of them, rounded, train. From two
    /// images on, both sides get at least one.
    pub fn seeded(n: usize, train_fraction: f64, seed: u64) -> Self {
        let train = (n as f64 * train_fraction).round() as usize;
        let train = if n < 2 { n } else { train.clamp(1, n - 1) };
        let mut order = Philox::new(seed, Purpose::Split, 0, 0).permutation(n);
        let val = order.split_off(train);
        Self { train: order, val }
    }

    /// Reads `train.txt` and `val.txt` in `dir`: one stem a line, as Kvasir-SEG's official split has it. Images in
    /// neither list are left out.
    ///
    /// # Errors
    /// [`crate::error::Kind::Input`] if a list is missing or empty, names an image that `data` lacks, or names one twice.
    pub fn read(dir: &Path, data: &PackedDataset) -> Result<Self> {
        let mut taken = vec![false; data.len()];
        let mut list = |file: &str| {
            let path = dir.join(file);
            let text = read_list(&path)?;
            let mut indices = Vec::new();
            for (number, line) in text.lines().enumerate() {
                let stem = line.trim();
                if stem.is_empty() {
                    continue;
                }
                let line = number + 1;
                let Some(i) = data.index(stem) else {
                    return Err(Error::input(
                        path,
                        format!(
                            "line {line}: no image {stem:?} in {}; remove the line, or, if there are many, this split is of \
                             another dataset",
                            data.path().display()
                        ),
                    ));
                };
                if std::mem::replace(&mut taken[i], true) {
                    return Err(Error::input(
                        path,
                        format!("line {line}: {stem:?} is listed twice in this split; remove one"),
                    ));
                }
                indices.push(i);
            }
            if indices.is_empty() {
                return Err(Error::input(path, "names no image; write one stem a line"));
            }
            Ok(indices)
        };
        Ok(Self { train: list(TRAIN)?, val: list(VAL)? })
    }

    /// Writes `train.txt` and `val.txt` into `dir`, one stem a line.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`] if `dir` cannot be written.
    pub fn write(&self, dir: &Path, data: &PackedDataset) -> Result<()> {
        for (file, indices) in [(TRAIN, &self.train), (VAL, &self.val)] {
            let path = dir.join(file);
            let text: String = indices.iter().flat_map(|&i| [data.name(i), "\n"]).collect();
            files::replace(&path, text.as_bytes())?;
        }
        Ok(())
    }
}

const TRAIN: &str = "train.txt";
const VAL: &str = "val.txt";

fn read_list(path: &Path) -> Result<String> {
    let unreadable =
        |e| Error::input(path, format!("cannot be read ({e}); a split is a folder with {TRAIN} and {VAL}"));
    if fs::metadata(path).map_err(unreadable)?.len() > MAX_LIST {
        return Err(Error::input(path, "too long for a list of images; write one stem a line"));
    }
    let mut text = String::new();
    File::open(path).and_then(|f| f.take(MAX_LIST).read_to_string(&mut text)).map_err(unreadable)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeded_partitions_and_repeats() {
        let split = Split::seeded(1000, 0.8, 42);
        assert_eq!((split.train.len(), split.val.len()), (800, 200));
        let mut all = [split.train.clone(), split.val.clone()].concat();
        assert!(!all.is_sorted());
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        assert_eq!(split, Split::seeded(1000, 0.8, 42));
        assert_ne!(split, Split::seeded(1000, 0.8, 43));
    }

    #[test]
    fn seeded_leaves_no_side_empty() {
        for (n, fraction, expected) in [(2, 0.8, 1), (3, 1.0, 2), (5, 0.0, 1), (10, 0.75, 8), (1, 0.8, 1)] {
            let split = Split::seeded(n, fraction, 1);
            assert_eq!((split.train.len(), split.val.len()), (expected, n - expected));
        }
    }
}
