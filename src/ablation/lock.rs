//! Two processes never write one folder: advisory locks of the operating system, which end with their holder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::files;
use crate::progress::Progress;

/// A held lock; let go when dropped or when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes `folder` (made if absent) for this process by locking `folder/.lock`.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process holds it, [`Kind::Io`] if the folder or the file cannot be made or locked.
    pub fn folder(folder: &Path) -> Result<Self> {
        let path = folder.join(".lock");
        let mut file = open(folder, &path)?;
        match file.try_lock() {
            Ok(()) => Ok(held(file)),
            Err(TryLockError::WouldBlock) => {
                Err(Error::new(Kind::Busy, format!("{}: in use by {}", folder.display(), holder(&mut file))))
            }
            Err(TryLockError::Error(source)) => Err(Error::io(path, "lock the file", source)),
        }
    }

    /// Takes `folder/name` for a short piece of work, waiting for whoever holds it; a wait for another process is announced as
    /// `purpose`.
    ///
    /// # Errors
    /// [`Kind::Io`] if the folder or the file cannot be made or locked.
    pub fn wait(folder: &Path, name: &str, purpose: &str, progress: &Progress) -> Result<Self> {
        let path = folder.join(name);
        let mut file = open(folder, &path)?;
        match file.try_lock() {
            Ok(()) => return Ok(held(file)),
            Err(TryLockError::WouldBlock) => match holder(&mut file) {
                // The runs of a grid on several devices take turns.
                other if other == this_process() => {}
                other => progress.detail(format!("waiting for {other} to {purpose}")),
            },
            Err(TryLockError::Error(source)) => return Err(Error::io(path, "lock the file", source)),
        }
        file.lock().map_err(|e| Error::io(path, "lock the file", e))?;
        Ok(held(file))
    }
}

fn open(folder: &Path, path: &Path) -> Result<File> {
    files::create_folder(folder)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|e| Error::io(path, "create the lock file", e))
}

/// Leaves this process's number in the file for whoever finds it locked. It only informs, so a failure is let go.
fn held(mut file: File) -> Lock {
    let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
    Lock { _file: file }
}

fn this_process() -> String {
    format!("process {}", std::process::id())
}

fn holder(file: &mut File) -> String {
    let mut pid = String::new();
    match file.take(20).read_to_string(&mut pid) {
        Ok(n) if n > 0 && pid.bytes().all(|b| b.is_ascii_digit()) => format!("process {pid}"),
        _ => "another process".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_holder_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::folder(folder.path()).unwrap();
        let refused = Lock::folder(folder.path()).unwrap_err();
        assert_eq!(refused.kind, Kind::Busy);
        assert!(refused.to_string().contains(&this_process()), "{refused}");
        drop(first);
        Lock::folder(folder.path()).unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_an_io_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("taken");
        std::fs::write(&file, "").unwrap();
        assert_eq!(Lock::folder(&file).unwrap_err().kind, Kind::Io);
    }
}
