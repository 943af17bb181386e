//! The grid, its runner, its records.

mod config;
pub mod demo;
mod lock;
mod runner;
pub mod source;

pub use runner::{
    GridOutcome, GridPlan, Setup, SplitPlan, open_data, run_grid, run_one, warn_if_unfair, write_summary,
};

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
            let method = Method::Lora(LoraOptions { rank, alpha: six_digits(rank as f64 * ratio), ..lora.clone() });
            let name = run_name(&method);
            if runs.iter().all(|(known, _)| *known != name) {
                runs.push((name, method));
            }
        }
    }
    runs
}

/// Rounded, so that no name ends in the tail of a ratio such as 0.3333333 times a rank.
fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// The name of a run in the grid: `segformer_fft_baseline` or `lora_r{r}_alpha{a}`.
pub fn run_name(method: &Method) -> String {
    match method {
        Method::Fft => "segformer_fft_baseline".into(),
        Method::Lora(lora) => format!("lora_r{}_alpha{}", lora.rank, lora.alpha),
    }
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
        let thirds = grid(&[3, 64], &[0.3333333, 2.0 / 3.0], false, &lora());
        let names: Vec<&str> = thirds.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["lora_r3_alpha1", "lora_r3_alpha2", "lora_r64_alpha21.3333", "lora_r64_alpha42.6667"]);
    }
}
