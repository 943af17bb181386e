//! Results to look at: per run a history, two plots and an archive; over the grid tables, four figures and a page.

pub mod grid;
mod page;
mod plot;
pub mod run;
mod summary;
mod table;

pub use table::results_table;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};
use crate::train::options::Method;
use crate::train::record::RunRecord;

/// A finished run's result in its folder, written last.
pub const RESULT: &str = "all_metrics.json";

/// Longest [`RESULT`] that is read, bytes. A history of ten thousand epochs takes a tenth of it.
const LONGEST_RECORD: u64 = 64 << 20;

/// Every finished run under `out`, that is every `out/<run>/all_metrics.json`, in the order of the grid: full
/// fine-tuning, then LoRA by rank and alpha. A record takes its folder's name.
///
/// # Errors
/// `Input` if `out` cannot be listed or a record is not one of this program's.
pub fn read_records(out: &Path) -> Result<Vec<RunRecord>> {
    let cannot_list = |e| Error::input(out, format!("cannot list this results folder: {e}"));
    let mut records = Vec::new();
    for entry in fs::read_dir(out).map_err(cannot_list)? {
        let entry = entry.map_err(cannot_list)?;
        let path = entry.path().join(RESULT);
        if path.is_file() {
            let mut record = read_record(&path)?;
            record.name = entry.file_name().to_string_lossy().into_owned();
            records.push(record);
        }
    }
    sort(&mut records);
    Ok(records)
}

/// The record of one finished run.
///
/// # Errors
/// `Io` if it cannot be read, `Input` if it is not one of this program's.
pub fn read_record(path: &Path) -> Result<RunRecord> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST_RECORD + 1).read_to_end(&mut text))
        .map_err(|e| Error::io(path, "read this record", e))?;
    let remedy = "delete its folder to run it again, or move the folder elsewhere";
    if text.len() as u64 > LONGEST_RECORD {
        return Err(Error::input(path, format!("longer than any record of a run; {remedy}")));
    }
    serde_json::from_slice(&text)
        .map_err(|e| Error::input(path, format!("not the record of a finished run ({e}); {remedy}")))
}

/// The order of the grid: full fine-tuning, then LoRA by rank and alpha.
fn sort(records: &mut [RunRecord]) {
    let key = |record: &RunRecord| match &record.method {
        Method::Fft => (0, 0.0),
        Method::Lora(lora) => (lora.rank, lora.alpha),
    };
    records.sort_by(|a, b| {
        let ((rank_a, alpha_a), (rank_b, alpha_b)) = (key(a), key(b));
        rank_a.cmp(&rank_b).then(alpha_a.total_cmp(&alpha_b)).then_with(|| a.name.cmp(&b.name))
    });
}
