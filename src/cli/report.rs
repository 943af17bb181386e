//! `report`: summary, figures and page from what is there.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Context;
use super::output::path;
use crate::ablation::{warn_if_unfair, write_summary};
use crate::error::{Error, Result};
use crate::report::{self, RESULT, results_table};

/// Rebuild tables, figures and page from the finished runs in a folder
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native report outputs
  segpeft-native report outputs --json")]
pub struct Report {
    /// The folder that holds the runs' folders (the --out of `ablate`)
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Report {
    pub fn run(&self, context: &Context) -> Result<()> {
        if !self.dir.is_dir() {
            return Err(Error::input(&self.dir, "not a folder; give the --out of `ablate`"));
        }
        if self.dir.join(RESULT).exists() {
            return Err(Error::input(&self.dir, "this is the folder of one run; give the folder that holds it"));
        }
        let records = write_summary(&self.dir, &context.progress)?;
        if records.is_empty() {
            return Err(Error::input(&self.dir, format!("no finished run ({RESULT}) in the folders inside")));
        }
        for record in &records {
            let folder = self.dir.join(&record.name);
            // A folder that was renamed keeps the plots it has.
            if folder.is_dir() {
                report::run::write_history(&folder, &record.training_history)?;
                report::run::draw(&folder, &record.name, &record.training_history)?;
            }
        }
        warn_if_unfair(&self.dir, &context.progress);
        let page = self.dir.join("index.html");
        context.result(&json!({ "out": path(&self.dir), "page": path(&page), "runs": records }), || {
            format!("{}page: {}\n", results_table(&records), page.display())
        })
    }
}
