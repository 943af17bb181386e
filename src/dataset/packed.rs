//! The packed dataset: one file, memory-mapped. All numbers are little-endian.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | magic, `SEGPEFTD` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | CRC-32 of everything before the first record, with this field 0 |
//! | 16 | 4 | side of the square images in pixels, `s` |
//! | 20 | 4 | number of images, `n` |
//! | 24 | 8 | bytes of the name table |
//! | 32 | 8 | stamp of the source, 0 if none |
//! | 40 | 4 n | CRC-32 of each record |
//! | 40 + 4 n | | names (stems), ascending, UTF-8, each followed by a line feed |
//! | next multiple of 4096 | 4 s² n | records: pixels (s, s, 3) RGB, then mask (s, s) of 0 and 1 |
//!
//! `s` is a multiple of 32, so every record fills whole pages.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rayon::prelude::*;

use super::source::is_stem;
use super::{FNV_BASIS, fnv1a};
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"SEGPEFTD";
const VERSION: u32 = 1;
const HEADER: usize = 40;
const CHECKSUM_AT: usize = 12;
const PAGE: u64 = 4096;
const SIZE_STEP: usize = 32;
const MAX_SIZE: usize = 4096;
const REMEDY: &str = "make it again with `segpeft-native prepare`";

/// Whether images of this side can be packed: a multiple of 32 (the model's stride) up to 4096.
pub fn is_size(size: usize) -> bool {
    (SIZE_STEP..=MAX_SIZE).contains(&size) && size.is_multiple_of(SIZE_STEP)
}

/// Refuses a side that [`is_size`] does not accept.
pub(super) fn check_size(size: usize) -> Result<()> {
    if is_size(size) {
        return Ok(());
    }
    Err(Error::usage(format!("image size {size}: choose a multiple of {SIZE_STEP} from {SIZE_STEP} to {MAX_SIZE}")))
}

/// Whether the file begins as a packed dataset does.
pub(super) fn is_packed(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?.take(MAGIC.len() as u64).read_to_end(&mut start)?;
    Ok(start == MAGIC)
}

/// Bytes of one record.
pub(super) fn record_len(size: usize) -> usize {
    4 * size * size
}

/// Where the records begin, after `n` checksums and a name table of `names` bytes.
fn records_at(n: u64, names: u64) -> Option<u64> {
    n.checked_mul(4)?.checked_add(HEADER as u64)?.checked_add(names)?.checked_next_multiple_of(PAGE)
}

/// Writes a packed dataset: records in any order, the header at the end.
pub(super) struct Writer<W> {
    out: W,
    size: usize,
    names: String,
    checksums: Vec<u32>,
    records_at: u64,
}

impl<W: Write + Seek> Writer<W> {
    /// Prepares for one record of side `size` per name; `names` ascend and are [`is_stem`].
    pub fn new<'a>(out: W, size: usize, names: impl ExactSizeIterator<Item = &'a str>) -> Self {
        let n = names.len();
        let names: String = names.flat_map(|n| [n, "\n"]).collect();
        let records_at = records_at(n as u64, names.len() as u64).expect("a table in memory has a length");
        Self { out, size, names, checksums: vec![0; n], records_at }
    }

    /// Length of the finished file.
    pub fn len(&self) -> u64 {
        self.records_at + (record_len(self.size) * self.checksums.len()) as u64
    }

    /// Writes record `i`, whose CRC-32 is `checksum`.
    pub fn record(&mut self, i: usize, bytes: &[u8], checksum: u32) -> io::Result<()> {
        assert_eq!(bytes.len(), record_len(self.size), "record");
        self.out.seek(SeekFrom::Start(self.records_at + (i * bytes.len()) as u64))?;
        self.out.write_all(bytes)?;
        self.checksums[i] = checksum;
        Ok(())
    }

    /// Writes the header, which makes the file valid.
    pub fn finish(mut self, stamp: u64) -> io::Result<()> {
        let mut head = Vec::with_capacity(self.records_at as usize);
        head.extend(MAGIC);
        head.extend(VERSION.to_le_bytes());
        head.extend([0; 4]);
        head.extend((self.size as u32).to_le_bytes());
        head.extend((self.checksums.len() as u32).to_le_bytes());
        head.extend((self.names.len() as u64).to_le_bytes());
        head.extend(stamp.to_le_bytes());
        head.extend(self.checksums.iter().flat_map(|c| c.to_le_bytes()));
        head.extend(self.names.as_bytes());
        head.resize(self.records_at as usize, 0);
        let checksum = crc32fast::hash(&head);
        head[CHECKSUM_AT..][..4].copy_from_slice(&checksum.to_le_bytes());
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&head)?;
        self.out.flush()
    }
}

/// A packed dataset, memory-mapped and verified.
pub struct PackedDataset {
    path: PathBuf,
    map: Mmap,
    size: usize,
    names: Vec<String>,
    records_at: usize,
    stamp: u64,
    fingerprint: u64,
}

impl PackedDataset {
    /// Maps the file and verifies all of it: version, lengths, names, every checksum, every mask value.
    ///
    /// # Errors
    /// [`crate::error::Kind::Input`] if the file is missing, of another kind or version, truncated or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let bad = |problem: String| Error::input(path, format!("{problem}; {REMEDY}"));
        let unreadable = |e: io::Error| bad(format!("cannot be opened ({e})"));
        let file = File::open(path).map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        if !meta.is_file() || meta.len() < HEADER as u64 {
            return Err(bad("not a packed dataset".into()));
        }
        // SAFETY: the mapping is only read, as bytes, for which any value is valid. This program replaces packed files
        // by renaming, which leaves a mapped one as it is; another process that cuts the file short stops this one.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, "map the file", e))?;

        if map[..8] != MAGIC {
            return Err(bad("not a packed dataset".into()));
        }
        let u32_at = |at: usize| u32::from_le_bytes(map[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(map[at..at + 8].try_into().expect("8 bytes"));
        let version = u32_at(8);
        if version != VERSION {
            return Err(bad(format!("packed dataset of version {version}; this program reads version {VERSION}")));
        }
        let (size, count, names_len, stamp) = (u32_at(16) as usize, u32_at(20) as usize, u64_at(24), u64_at(32));
        let truncated = |expected: u64| bad(format!("truncated ({} bytes of {expected})", map.len()));
        let damaged = |what: &str| bad(format!("damaged ({what})"));
        let records_at = records_at(count as u64, names_len).ok_or_else(|| damaged("lengths in the header"))?;
        let Some(head) = map.get(..usize::try_from(records_at).unwrap_or(usize::MAX)) else {
            return Err(truncated(records_at));
        };
        let mut checksum = crc32fast::Hasher::new();
        for part in [&head[..CHECKSUM_AT], &[0; 4], &head[CHECKSUM_AT + 4..]] {
            checksum.update(part);
        }
        if checksum.finalize() != u32_at(CHECKSUM_AT) {
            return Err(damaged("the header's checksum is wrong"));
        }
        if !is_size(size) || count == 0 {
            return Err(damaged("an impossible size or number of images"));
        }
        let record = record_len(size);
        let expected = records_at + record as u64 * count as u64;
        if (map.len() as u64) < expected {
            return Err(truncated(expected));
        }
        if map.len() as u64 > expected {
            return Err(damaged("bytes after the end"));
        }

        let (checksums, names) = head[HEADER..HEADER + 4 * count + names_len as usize].split_at(4 * count);
        let contents = [&map[16..24], checksums, names].into_iter().fold(FNV_BASIS, fnv1a);
        let names: Vec<String> =
            std::str::from_utf8(names).map_err(|_| damaged("names"))?.lines().map(String::from).collect();
        if names.len() != count || !names.iter().all(|n| is_stem(n)) || !names.is_sorted_by(|a, b| a < b) {
            return Err(damaged("names"));
        }
        let records = &map[records_at as usize..];
        records.par_chunks_exact(record).zip(checksums.par_chunks_exact(4)).zip(&names).try_for_each(
            |((bytes, checksum), name)| {
                if crc32fast::hash(bytes).to_le_bytes() != checksum {
                    return Err(damaged(&format!("the checksum of image {name} is wrong")));
                }
                // A checksum proves that the file is as it was written, not that a friend wrote it.
                if bytes[record / 4 * 3..].iter().fold(0, |most, &v| most | v) > 1 {
                    return Err(damaged(&format!("the mask of image {name} holds other values than 0 and 1")));
                }
                Ok(())
            },
        )?;
        let records_at = records_at as usize;
        Ok(Self { path: path.into(), map, size, names, records_at, stamp, fingerprint: contents })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is no image. A file without images is refused by [`PackedDataset::open`].
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Side of the square images in pixels.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Stem of image `i`; stems ascend.
    pub fn name(&self, i: usize) -> &str {
        &self.names[i]
    }

    /// Index of the image with this stem.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.names.binary_search_by(|n| n.as_str().cmp(name)).ok()
    }

    /// Pixels of image `i`: (size, size, 3) RGB.
    pub fn pixels(&self, i: usize) -> &[u8] {
        &self.record(i)[..3 * self.size * self.size]
    }

    /// Mask of image `i`: (size, size), 0 for background and 1 for polyp.
    pub fn mask(&self, i: usize) -> &[u8] {
        &self.record(i)[3 * self.size * self.size..]
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hash of the contents: size, names, pixels and masks (through their checksums).
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Stamp of the source it was made from.
    pub(super) fn stamp(&self) -> u64 {
        self.stamp
    }

    fn record(&self, i: usize) -> &[u8] {
        let len = record_len(self.size);
        &self.map[self.records_at + i * len..][..len]
    }
}
