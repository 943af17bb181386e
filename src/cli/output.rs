//! Results on standard output: text for people, or one JSON document.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

use super::Context;
use crate::error::{Error, Kind, Result};

impl Context {
    /// Prints the result, as JSON if asked. A reader that went away is no error.
    ///
    /// # Errors
    /// [`Kind::Io`] if standard output cannot take it.
    pub fn result(&self, document: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
        let mut text = match self.json {
            true => serde_json::to_string_pretty(document)
                .map_err(|e| Error::new(Kind::Internal, format!("cannot write the result as JSON: {e}")))?,
            false => text(),
        };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("standard output", "write", e)),
            _ => Ok(()),
        }
    }
}

/// A path as JSON can hold it, whatever bytes it is made of.
pub fn path(path: &Path) -> String {
    path.display().to_string()
}

/// `name  value` lines with the values lined up.
pub fn fields(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}
