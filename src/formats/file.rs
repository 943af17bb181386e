//! Opening, mapping and reading files.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use memmap2::Mmap;
use serde_json::Value;

use crate::error::{Error, Result};

/// The largest JSON file that is read, in bytes. Real ones stay under 100 KB.
const LARGEST_JSON: u64 = 16 << 20;

/// Opens a regular file. Anything else (a folder, a pipe that would block) is refused.
fn open(path: &Path) -> Result<(File, u64)> {
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => Error::input(path, "no such file; check the path"),
        _ => Error::io(path, "open", e),
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::input(path, "is not a regular file; give the file itself"));
    }
    Ok((File::open(path).map_err(failed)?, metadata.len()))
}

/// Maps a file into memory for reading.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let (file, _) = open(path)?;
    // SAFETY: the mapping is private to this process and only read. If another process truncates the file meanwhile, an
    // access faults and ends this process: no other memory is reached. Writers here replace files instead of changing them.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, "map into memory", e))?;
    if map.starts_with(b"version https://git-lfs") {
        return Err(Error::input(path, "is a Git LFS pointer, not the file itself; run `git lfs pull`"));
    }
    Ok(map)
}

/// Reads a JSON object.
pub(super) fn read_json(path: &Path) -> Result<serde_json::Map<String, Value>> {
    let (file, length) = open(path)?;
    if length > LARGEST_JSON {
        return Err(Error::input(path, format!("is {length} bytes long; a configuration stays below {LARGEST_JSON}")));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST_JSON).read_to_end(&mut bytes).map_err(|e| Error::io(path, "read", e))?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::input(path, "is not a JSON object; fetch the file again")),
        Err(e) => Err(Error::input(path, format!("is not valid JSON ({e}); fetch the file again"))),
    }
}
