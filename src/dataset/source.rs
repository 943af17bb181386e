//! Where images and masks come from: an archive, read in place, or a folder. Both hold `images/` and `masks/`, paired by
//! stem.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use memmap2::Mmap;
use zip::ZipArchive;

use super::{FNV_BASIS, fnv1a};
use crate::{Error, Result};

/// Bytes of the largest encoded image accepted.
const MAX_FILE: u64 = 256 << 20;
/// Bytes of the longest stem accepted.
const MAX_STEM: usize = 255;
const LAYOUT: &str = "a source holds images/ and masks/ with one mask (.jpg or .png) per image, of the same name";

/// An opened source: the pairs, in the order of their stems, and the means to read them.
pub(super) struct Source {
    path: PathBuf,
    pairs: Vec<Pair>,
    archive: Option<Archive>,
    stamp: u64,
}

/// One image and its mask.
pub(super) struct Pair {
    pub stem: String,
    pub image: Item,
    pub mask: Item,
}

/// One encoded picture of a source.
pub(super) struct Item {
    /// The file, or the archive's path followed by the entry's name.
    pub path: PathBuf,
    /// Index of the archive's entry; unused in a folder.
    index: usize,
}

type Archive = ZipArchive<Cursor<Bytes>>;

/// A mapped file that clones share.
#[derive(Clone)]
struct Bytes(Arc<Mmap>);

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Source {
    /// Lists and pairs an archive or a folder.
    ///
    /// # Errors
    /// [`crate::error::Kind::Input`] if it is neither, has another layout, lacks a partner of an image or mask, or
    /// holds names that lead out of it.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(|e| missing(path, &e))?;
        if meta.is_dir() { Self::folder(path) } else { Self::archive(path, &meta) }
    }

    fn archive(path: &Path, meta: &fs::Metadata) -> Result<Self> {
        let wrong = |e: &dyn std::fmt::Display| {
            Error::input(
                path,
                format!("not a zip archive that can be read ({e}); name the Kvasir-SEG zip or its unpacked folder"),
            )
        };
        let file = File::open(path).map_err(|e| missing(path, &e))?;
        if !meta.is_file() || meta.len() == 0 {
            return Err(wrong(&"no ordinary file with contents"));
        }
        // SAFETY: the mapping is only read. A process that changes the archive meanwhile can make entries fail their
        // checksum or, if it cuts the file short, stop this one; nothing else relies on the bytes staying the same.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, "map the file", e))?;
        let mut archive = ZipArchive::new(Cursor::new(Bytes(Arc::new(map)))).map_err(|e| wrong(&e))?;
        let mut listings: BTreeMap<PathBuf, Listing> = BTreeMap::new();
        for index in 0..archive.len() {
            let entry = archive.by_index_raw(index).map_err(|e| wrong(&e))?;
            let name = entry.name().map_err(|e| wrong(&e))?.into_owned();
            let shown = path.join(&name);
            let inside = Path::new(&name).components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
            if !inside || name.contains('\\') {
                return Err(Error::input(
                    path,
                    format!("entry {name:?} leads out of the archive; do not trust this archive"),
                ));
            }
            if name.contains(char::is_control) {
                return Err(Error::input(
                    path,
                    format!("entry {name:?} has control characters in its name; unpack it and rename the file"),
                ));
            }
            if entry.is_dir() {
                continue;
            }
            let Some(folder) = Path::new(&name).parent() else { continue };
            let (Some(part), Some(prefix)) = (folder.file_name().and_then(Part::of), folder.parent()) else { continue };
            if prefix.starts_with("__MACOSX") {
                continue;
            }
            if entry.is_symlink() {
                return Err(Error::input(shown, "a symbolic link; put the picture itself into the archive"));
            }
            listings.entry(prefix.to_path_buf()).or_default().add(part, Item { path: shown, index })?;
        }
        listings.retain(|_, l| l.parts.iter().all(|p| !p.is_empty()));
        let mut found = listings.into_iter();
        let (Some((first, listing)), second) = (found.next(), found.next()) else {
            return Err(Error::input(path, format!("no pictures in images/ and masks/; {LAYOUT}")));
        };
        if let Some((second, _)) = second {
            return Err(Error::input(
                path,
                format!(
                    "holds two datasets, {:?} and {:?}; unpack it and name the folder of one",
                    first.display(),
                    second.display()
                ),
            ));
        }
        let stamp = stamp(FNV_BASIS, "", meta);
        Ok(Self { path: path.into(), pairs: listing.pair(path)?, archive: Some(archive), stamp })
    }

    fn folder(path: &Path) -> Result<Self> {
        let root = fs::canonicalize(path).map_err(|e| missing(path, &e))?;
        let mut listing = Listing::default();
        let mut files = Vec::new();
        for part in [Part::Images, Part::Masks] {
            let folder = path.join(part.name());
            if !folder.is_dir() {
                return Err(Error::input(path, format!("no folder {}/ in it; {LAYOUT}", part.name())));
            }
            stays_inside(&folder, &root)?;
            let unreadable = |e| Error::io(&folder, "list the folder", e);
            for entry in fs::read_dir(&folder).map_err(unreadable)? {
                let entry = entry.map_err(unreadable)?;
                let file = entry.path();
                if !is_picture(&file) {
                    continue;
                }
                if entry.file_type().map_err(unreadable)?.is_symlink() {
                    stays_inside(&file, &root)?;
                }
                let meta = fs::metadata(&file).map_err(|e| missing(&file, &e))?;
                if meta.is_file() {
                    listing.add(part, Item { path: file.clone(), index: 0 })?;
                    files.push((file, meta));
                }
            }
        }
        files.sort_by(|a, b| a.0.cmp(&b.0));
        let stamp = files.iter().fold(FNV_BASIS, |hash, (file, meta)| {
            let name = file.strip_prefix(path).unwrap_or(file).to_string_lossy();
            stamp(hash, &name, meta)
        });
        Ok(Self { path: path.into(), pairs: listing.pair(path)?, archive: None, stamp })
    }

    /// What was named on the command line.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pairs, in the order of their stems; at least one.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// Changes when the archive's, or any picture's, length or time of modification does.
    pub fn stamp(&self) -> u64 {
        self.stamp
    }

    /// The encoded bytes of one picture.
    ///
    /// # Errors
    /// [`crate::error::Kind::Input`] if it is unreadable, too large or, in an archive, fails its checksum.
    pub fn read(&self, item: &Item) -> Result<Vec<u8>> {
        let Some(archive) = &self.archive else { return read_file(&item.path) };
        let damaged = |e: &dyn std::fmt::Display| {
            Error::input(&item.path, format!("cannot be read from the archive ({e}); download the archive again"))
        };
        // The clone shares the listing and the mapping.
        let mut archive = archive.clone();
        let entry = archive.by_index(item.index).map_err(|e| damaged(&e))?;
        read_limited(entry, &item.path, |e| damaged(&e))
    }
}

/// Reads a picture's file.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| missing(path, &e))?;
    read_limited(file, path, |e| Error::io(path, "read the file", e))
}

fn read_limited(reader: impl Read, path: &Path, failed: impl Fn(std::io::Error) -> Error) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::input(path, format!("larger than {} MB; not a usable picture", MAX_FILE >> 20)));
    }
    Ok(bytes)
}

fn missing(path: &Path, e: &std::io::Error) -> Error {
    Error::input(path, format!("cannot be opened ({e}); check the name and its permissions"))
}

/// Refuses a link that leads out of the source's folder.
fn stays_inside(path: &Path, root: &Path) -> Result<()> {
    let target = fs::canonicalize(path).map_err(|e| missing(path, &e))?;
    if target.starts_with(root) {
        return Ok(());
    }
    Err(Error::input(path, "a link that leads out of the folder; put the pictures themselves there"))
}

fn stamp(hash: u64, name: &str, meta: &fs::Metadata) -> u64 {
    let modified = meta.modified().ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
    let nanoseconds = modified.map_or(0, |t| t.as_nanos());
    let hash = fnv1a(hash, name.as_bytes());
    fnv1a(fnv1a(hash, &meta.len().to_le_bytes()), &nanoseconds.to_le_bytes())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Images,
    Masks,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Images => "images",
            Part::Masks => "masks",
        }
    }

    fn of(name: &OsStr) -> Option<Self> {
        [Part::Images, Part::Masks].into_iter().find(|p| name == p.name())
    }
}

/// Whether the name is that of a JPEG or PNG file, by its extension. Hidden files (`._a.jpg`, left by some systems) are none.
pub fn is_picture(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|n| n.as_encoded_bytes().starts_with(b"."));
    let known = |e: &OsStr| ["jpg", "jpeg", "png"].iter().any(|k| e.eq_ignore_ascii_case(k));
    !hidden && path.extension().is_some_and(known)
}

/// Whether `stem` fits on one line of a list of names.
pub(super) fn is_stem(stem: &str) -> bool {
    !stem.is_empty() && stem.len() <= MAX_STEM && stem == stem.trim() && !stem.chars().any(char::is_control)
}

/// Images and masks by stem.
#[derive(Default)]
struct Listing {
    parts: [BTreeMap<String, Item>; 2],
}

impl Listing {
    fn add(&mut self, part: Part, item: Item) -> Result<()> {
        if !is_picture(&item.path) {
            return Ok(());
        }
        let stem = item.path.file_stem().and_then(OsStr::to_str).filter(|s| is_stem(s));
        let Some(stem) = stem.map(String::from) else {
            let name = item.path.file_name().unwrap_or_default();
            return Err(Error::input(
                item.path.parent().unwrap_or(&item.path),
                format!("the name {name:?} is not plain text of at most {MAX_STEM} bytes; rename the file"),
            ));
        };
        if let Some(other) = self.parts[part as usize].get(&stem) {
            let other = other.path.file_name().unwrap_or_default().to_string_lossy();
            return Err(Error::input(&item.path, format!("{other} has the same stem; remove or rename one of them")));
        }
        self.parts[part as usize].insert(stem, item);
        Ok(())
    }

    fn pair(self, source: &Path) -> Result<Vec<Pair>> {
        let [images, mut masks] = self.parts;
        if images.is_empty() && masks.is_empty() {
            return Err(Error::input(source, format!("no .jpg or .png in images/ and masks/; {LAYOUT}")));
        }
        let mut pairs = Vec::with_capacity(images.len());
        for (stem, image) in images {
            let Some(mask) = masks.remove(&stem) else {
                return Err(Error::input(
                    &image.path,
                    format!("has no mask; add masks/{stem}.jpg or .png, or remove the image"),
                ));
            };
            pairs.push(Pair { stem, image, mask });
        }
        if let Some((stem, mask)) = masks.into_iter().next() {
            return Err(Error::input(
                mask.path,
                format!("has no image; add images/{stem}.jpg or .png, or remove the mask"),
            ));
        }
        Ok(pairs)
    }
}
