//! Writing so that a reader, or a run killed half-way, never meets half a file.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Replaces `path` by what `write` writes: into a temporary file beside it, then renamed.
///
/// # Errors
/// `Io` if any of it fails; `path` is then as it was.
pub(super) fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = File::create(&temporary)
        .and_then(|file| {
            let mut out = BufWriter::with_capacity(1 << 16, file);
            write(&mut out)?;
            out.flush()
        })
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|e| {
        // The first error is the one to tell; a temporary file that cannot be removed either is harmless.
        let _ = fs::remove_file(&temporary);
        Error::io(path, "write this file (is the disk full or the folder read-only?)", e)
    })
}

/// Replaces `path` by `bytes`.
pub(super) fn replace_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |out| out.write_all(bytes))
}
