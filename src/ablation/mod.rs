//! The grid, its runner, its records.

mod config;
pub mod demo;
pub mod lock;
mod runner;
pub mod source;
mod table;

pub use config::RunConfig;
pub use runner::{GridOutcome, GridPlan, Setup, SplitPlan, open_data, run_grid, run_one, write_summary};
pub use table::{duration, results_table};

use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::train::options::{LoraOptions, Method};

/// Ranks of the published grid.
pub const RANKS: [usize; 5] = [4, 8, 16, 32, 64];
/// Ratios alpha / r of the published grid.
pub const RATIOS: [f64; 3] = [1.0, 2.0, 4.0];

/// The runs of an ablation with their names: full fine-tuning first if `fft`, then every rank with every ratio alpha / r.
/// Dropout, targets and head are those of `lora`; a configuration named twice is kept once.
pub fn grid(ranks: &[usize], ratios: &[f64], fft: bool, lora: &LoraOptions) -> Vec<(String, Method)> {
    let mut runs: Vec<(String, Method)> = Vec::new();
    if fft {
        runs.push((run_name(&Method::Fft), Method::Fft));
    }
    for &rank in ranks {
        for ratio in ratios {
            let method = Method::Lora(LoraOptions { rank, alpha: rank as f64 * ratio, ..lora.clone() });
            let name = run_name(&method);
            if runs.iter().all(|(known, _)| *known != name) {
                runs.push((name, method));
            }
        }
    }
    runs
}

/// The name of a run in the grid: `segformer_fft_baseline` or `lora_r{r}_alpha{a}`.
pub fn run_name(method: &Method) -> String {
    match method {
        Method::Fft => "segformer_fft_baseline".into(),
        Method::Lora(lora) => format!("lora_r{}_alpha{}", lora.rank, lora.alpha),
    }
}

/// Writes `bytes` to `path` through a temporary file in the same folder, so that no reader ever sees half of it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = std::fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        Error::io(path, "write the file", e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lora() -> LoraOptions {
        LoraOptions { rank: 1, alpha: 1.0, dropout: 0.0, targets: vec!["query".into()], train_head: false }
    }

    #[test]
    fn the_published_grid_has_sixteen_runs() {
        let runs = grid(&RANKS, &RATIOS, true, &lora());
        assert_eq!(runs.len(), 16);
        assert_eq!(runs[0].0, "segformer_fft_baseline");
        assert_eq!(runs[1].0, "lora_r4_alpha4");
        assert_eq!(runs[15].0, "lora_r64_alpha256");
    }

    #[test]
    fn repeated_and_fractional_configurations() {
        let runs = grid(&[4, 4], &[0.5, 0.375], false, &lora());
        let names: Vec<&str> = runs.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["lora_r4_alpha2", "lora_r4_alpha1.5"]);
    }

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a")).unwrap();
        std::fs::write(folder.path().join("a/b"), "").unwrap();
        assert!(write_whole(&folder.path().join("a"), b"x").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
