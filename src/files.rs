//! Files that appear whole or not at all, so that neither a reader nor a run killed half-way ever meets half a file.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Kind, Result};

/// How a temporary file's name begins and ends.
const PREFIX: &str = ".segpeft-";
const SUFFIX: &str = ".tmp";

/// Fills a temporary file beside `path` and renames it to `path` once `fill` has succeeded. Whatever fails, the temporary
/// file is removed and an older `path` stays as it was. Makes the folder if it is missing.
///
/// # Errors
/// [`Kind::Io`] if the folder cannot be written; what `fill` returns.
pub fn replace_with<T>(path: &Path, fill: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    create_folder(folder)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    #[cfg(unix)]
    {
        // An ordinary file's permissions (less the umask) in place of a private temporary file's.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = builder
        .tempfile_in(folder)
        .map_err(|e| Error::io(path, "create a file in its folder (name a folder you may write to)", e))?;
    let result = fill(file.as_file_mut())?;
    file.persist(path).map_err(|e| Error::io(path, "put the finished file in place", e.error))?;
    Ok(result)
}

/// Replaces `path` by `bytes`, which have reached the disk when this returns.
///
/// # Errors
/// [`Kind::Io`] if any of it fails; `path` is then as it was.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    replace_with(path, |file| {
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(|e| Error::io(path, "write this file (is the disk full?)", e))
    })
}

/// Replaces `path` by `value` as indented JSON.
///
/// # Errors
/// Those of [`replace`].
pub fn replace_json(path: &Path, value: &impl Serialize) -> Result<()> {
    replace(path, &json(path, value)?)
}

/// `value` as indented JSON, the text of the file `path`.
///
/// # Errors
/// [`Kind::Internal`] if `value` cannot be expressed.
pub fn json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::new(Kind::Internal, format!("{}: cannot be expressed as JSON: {e}", path.display())))?;
    text.push(b'\n');
    Ok(text)
}

/// Removes what programs that were killed while they filled a file left in `folder`. Whoever calls it must be the only one to
/// write there. What cannot be removed is harmless and stays.
pub fn remove_unfinished(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Creates `folder` and its parents; one that exists will do.
///
/// # Errors
/// [`Kind::Io`] if it cannot be made.
pub fn create_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create this folder", e))
}

/// Removes a file, if it is there.
///
/// # Errors
/// [`Kind::Io`] if it stays.
pub fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(file, "remove", e)),
        _ => Ok(()),
    }
}

/// Removes `folder` and all in it; none there will do.
///
/// # Errors
/// [`Kind::Io`] if it cannot be removed.
pub fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder, "remove this folder", e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        replace(&path, b"old").unwrap();
        replace_with(&path, |file| {
            file.write_all(b"new").unwrap();
            Err::<(), _>(Error::usage("stop"))
        })
        .unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_program_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let others = ["a", ".segpeft-a", "segpeft-a.tmp"];
        replace_with(&dir.path().join("a"), |_| {
            let half = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
            fs::copy(&half, half.with_file_name(".segpeft-killed.tmp")).unwrap();
            Ok(())
        })
        .unwrap();
        others.iter().for_each(|name| fs::write(dir.path().join(name), "").unwrap());
        remove_unfinished(dir.path());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), others.len());
        remove_unfinished(&dir.path().join("none"));
    }

    #[test]
    fn a_folder_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("b"), "").unwrap();
        assert_eq!(replace(&path, b"x").unwrap_err().kind, Kind::Io);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_what_the_umask_lets_them() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        replace(&ours, b"").unwrap();
        fs::write(&plain, b"").unwrap();
        assert_eq!(fs::metadata(ours).unwrap().mode(), fs::metadata(plain).unwrap().mode());
    }
}
