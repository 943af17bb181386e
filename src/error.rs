//! The one error type: a class that fixes the exit code, and one line that names the file and the remedy.

use std::fmt;
use std::path::Path;

/// Result of everything fallible in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, by who can mend it. The discriminant is the program's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A defect of this program.
    Internal = 1,
    /// The command line asks for something impossible.
    Usage = 2,
    /// A file from outside (image, archive, packed dataset, checkpoint, adapter) is missing or malformed.
    Input = 3,
    /// The operating system refused: unwritable output, full disk, failed read.
    Io = 4,
    /// Training produced a number that is not finite.
    Diverged = 5,
    /// The compute device is missing, too small or failed.
    Device = 6,
    /// Another process holds the output folder.
    Busy = 7,
    /// Interrupted by the user (Ctrl-C or SIGTERM); the same command continues.
    Interrupted = 130,
}

/// An error with its class and a complete, one-line message.
#[derive(Clone, Debug)]
pub struct Error {
    /// The class, which fixes the exit code.
    pub kind: Kind,
    message: String,
}

impl Error {
    /// An error of class `kind`; `message` is one line that names the thing and the remedy.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A malformed or missing file from outside: `path: problem`.
    pub fn input(path: impl AsRef<Path>, problem: impl fmt::Display) -> Self {
        Self::new(Kind::Input, format!("{}: {problem}", path.as_ref().display()))
    }

    /// A failed system call on `path`; `action` completes "cannot ...".
    pub fn io(path: impl AsRef<Path>, action: &str, source: std::io::Error) -> Self {
        Self::new(Kind::Io, format!("{}: cannot {action}: {source}", path.as_ref().display()))
    }

    /// An impossible request on the command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// The process exit code.
    pub fn exit_code(&self) -> u8 {
        self.kind as u8
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
