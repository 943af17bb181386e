//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::path::Path;

use crate::{Error, Result};

/// Fills a temporary file beside `out` and renames it to `out` once `fill` has succeeded. Whatever fails, the temporary
/// file is removed and an older `out` stays as it was. Makes the folder if it is missing.
///
/// # Errors
/// [`crate::error::Kind::Io`] if the folder cannot be written; what `fill` returns.
pub(super) fn write<T>(out: &Path, fill: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let folder = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, "make the output folder", e))?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".segpeft-").suffix(".tmp");
    #[cfg(unix)]
    {
        // An ordinary file's permissions (less the umask) in place of a private temporary file's.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = builder
        .tempfile_in(folder)
        .map_err(|e| Error::io(out, "create a file in its folder (name a folder you may write to)", e))?;
    let result = fill(file.as_file_mut())?;
    file.persist(out).map_err(|e| Error::io(out, "put the finished file in place", e.error))?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn failure_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        write(&out, |f| f.write_all(b"old").map_err(|e| Error::io(&out, "write", e))).unwrap();
        write(&out, |f| {
            f.write_all(b"new").unwrap();
            Err::<(), _>(Error::usage("stop"))
        })
        .unwrap_err();
        assert_eq!(fs::read(&out).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
