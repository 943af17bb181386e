//! What one run leaves behind: `training_history.csv`, two plots, `all_metrics.json` and an archive of its folder.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::RESULT;
use super::plot::{self, Axis, Figure, Marker, Series};
use crate::error::{Error, Result};
use crate::files;
use crate::train::record::{ExtraMetrics, HistoryRow, RunRecord};

/// Pixels of a run's plots.
const PLOT: (u32, u32) = (960, 640);

/// Writes `training_history.csv` of a run into its folder `out`, replaced as a whole.
///
/// # Errors
/// `Io` if the folder cannot be written.
pub fn write_history(out: &Path, history: &[HistoryRow]) -> Result<()> {
    files::replace(&out.join("training_history.csv"), csv(history).as_bytes())
}

/// Draws `Losses_over_Epochs.png` and `Dice_over_Epochs.png` of run `name` into its folder `out`. Each is replaced as a whole.
///
/// # Errors
/// `Io` if the folder cannot be written.
pub fn draw(out: &Path, name: &str, history: &[HistoryRow]) -> Result<()> {
    let (losses, dice) = rayon::join(
        || losses(name, history).write(&out.join("Losses_over_Epochs.png"), PLOT),
        || dice(name, history).write(&out.join("Dice_over_Epochs.png"), PLOT),
    );
    losses.and(dice)
}

/// Writes the final history and plots, `<run>_results.zip` of the run's folder `out`, and `all_metrics.json`; this
/// last, because its presence says that the run is finished.
///
/// The archive leaves out archives, hidden, temporary and lock files, and the state of the optimizer.
///
/// # Errors
/// `Io` if the folder cannot be written.
pub fn finish(out: &Path, record: &RunRecord) -> Result<()> {
    write_history(out, &record.training_history)?;
    draw(out, &record.name, &record.training_history)?;
    let metrics = out.join(RESULT);
    let json = files::json(&metrics, record)?;
    archive(out, &record.name, &json)?;
    files::replace(&metrics, &json)
}

/// The history as comma-separated values: the notebook's 17 columns, then this program's. Numbers are written so that
/// reading them gives the same f64.
pub(super) fn csv(history: &[HistoryRow]) -> String {
    let classes = history.iter().flat_map(|r| &r.extra).flat_map(|e| lists(e).map(|(_, l)| l.len())).max().unwrap_or(0);
    let nothing = ExtraMetrics::default();
    let mut header: Vec<String> = notebook_columns(&HistoryRow::default()).map(|(name, _)| name.to_string()).into();
    for (list, _) in lists(&nothing) {
        header.extend((0..classes).map(|class| format!("{list}_class{class}")));
    }
    header.extend(scalars(&nothing).map(|(name, _)| name.to_string()));
    let mut text = header.join(",") + "\n";
    for row in history {
        let mut cells: Vec<String> = notebook_columns(row).map(|(_, value)| value).into();
        match &row.extra {
            Some(extra) => {
                for (_, list) in lists(extra) {
                    cells.extend((0..classes).map(|class| cell(list.get(class).copied().flatten())));
                }
                cells.extend(scalars(extra).map(|(_, value)| cell(value)));
            }
            None => cells.resize(header.len(), String::new()),
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", cells.join(","));
    }
    text
}

/// The shortest decimal that reads back as the same f64.
fn number(value: &f64) -> String {
    format!("{value:?}")
}

/// A number's cell, empty without one.
fn cell(value: Option<f64>) -> String {
    value.as_ref().map(number).unwrap_or_default()
}

/// Name and cell of each column of the notebook's history, in its order.
fn notebook_columns(row: &HistoryRow) -> [(&'static str, String); 17] {
    [
        ("loss", cell(row.loss)),
        ("grad_norm", cell(row.grad_norm)),
        ("learning_rate", cell(row.learning_rate)),
        ("epoch", number(&row.epoch)),
        ("step", row.step.to_string()),
        ("eval_loss", cell(row.eval_loss)),
        ("eval_mean_iou", cell(row.eval_mean_iou)),
        ("eval_mean_dice", cell(row.eval_mean_dice)),
        ("eval_accuracy", cell(row.eval_accuracy)),
        ("eval_runtime", cell(row.eval_runtime)),
        ("eval_samples_per_second", cell(row.eval_samples_per_second)),
        ("eval_steps_per_second", cell(row.eval_steps_per_second)),
        ("train_runtime", cell(row.train_runtime)),
        ("train_samples_per_second", cell(row.train_samples_per_second)),
        ("train_steps_per_second", cell(row.train_steps_per_second)),
        ("total_flos", cell(row.total_flos)),
        ("train_loss", cell(row.train_loss)),
    ]
}

fn lists(extra: &ExtraMetrics) -> [(&'static str, &[Option<f64>]); 3] {
    [
        ("eval_dice", &extra.eval_dice_per_class),
        ("eval_iou", &extra.eval_iou_per_class),
        ("eval_accuracy", &extra.eval_accuracy_per_class),
    ]
}

fn scalars(extra: &ExtraMetrics) -> [(&'static str, Option<f64>); 4] {
    [
        ("eval_image_mean_dice", Some(extra.eval_image_mean_dice)),
        ("eval_image_mean_iou", Some(extra.eval_image_mean_iou)),
        ("eval_notebook_mean_iou", extra.eval_notebook_mean_iou),
        ("eval_notebook_accuracy", extra.eval_notebook_accuracy),
    ]
}

/// A quantity over the epochs of training. The final evaluation, which follows the summary row, is no epoch of it.
pub(super) fn over_epochs(history: &[HistoryRow], value: impl Fn(&HistoryRow) -> Option<f64>) -> Vec<(f64, f64)> {
    let training = history.iter().take_while(|row| row.train_runtime.is_none());
    training.filter_map(|row| value(row).map(|v| (row.epoch, v))).collect()
}

fn losses(name: &str, history: &[HistoryRow]) -> Figure {
    Figure {
        title: format!("Losses over epochs: {name}"),
        x: Axis::epochs(),
        y: Axis::linear("Cross-entropy"),
        level: None,
        series: vec![
            Series::line("Training", plot::ORANGE, over_epochs(history, |r| r.loss)).dashed(),
            Series::line("Validation", plot::BLUE, over_epochs(history, |r| r.eval_loss)),
        ],
    }
}

fn dice(name: &str, history: &[HistoryRow]) -> Figure {
    let mean = over_epochs(history, |r| r.eval_mean_dice);
    let polyp = over_epochs(history, |r| r.extra.as_ref()?.eval_dice_per_class.get(1).copied().flatten());
    let mut series = vec![Series::line("Validation, mean of the classes", plot::BLUE, mean)];
    if !polyp.is_empty() {
        series.push(Series::line("Validation, polyp", plot::GREEN, polyp).marker(Marker::Triangle));
    }
    Figure {
        title: format!("Dice over epochs: {name}"),
        x: Axis::epochs(),
        y: Axis::linear("Dice"),
        level: None,
        series,
    }
}

/// Packs the folder of a run into `<name>_results.zip` in it, with `metrics` as its `all_metrics.json`.
fn archive(out: &Path, name: &str, metrics: &[u8]) -> Result<()> {
    let mut found = Vec::new();
    collect(out, &mut PathBuf::new(), &mut found)?;
    found.sort();
    let path = out.join(format!("{name}_results.zip"));
    files::replace_with(&path, |file| {
        pack(out, name, metrics, &found, BufWriter::new(file)).map_err(|e| Error::io(&path, "write this archive", e))
    })
}

fn pack(out: &Path, name: &str, metrics: &[u8], files: &[PathBuf], file: impl Write + Seek) -> io::Result<()> {
    let mut zip = ZipWriter::new(file);
    let text = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    zip.start_file(format!("{name}/{RESULT}"), text)?;
    zip.write_all(metrics)?;
    for path in files {
        let inside: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
        // Pictures are compressed already, and weights hardly compress.
        let packed = path.extension().is_some_and(|e| e == "png" || e == "safetensors");
        let method = if packed { CompressionMethod::Stored } else { CompressionMethod::Deflated };
        let mut source = File::open(out.join(path))?;
        let large = source.metadata()?.len() >= u64::from(u32::MAX);
        zip.start_file(
            format!("{name}/{}", inside.join("/")),
            SimpleFileOptions::default().compression_method(method).large_file(large),
        )?;
        io::copy(&mut source, &mut zip)?;
    }
    zip.finish()?.flush()
}

/// The files under `root/inside` that belong into the archive, as paths below `root`.
fn collect(root: &Path, inside: &mut PathBuf, files: &mut Vec<PathBuf>) -> Result<()> {
    let folder = root.join(&inside);
    let cannot_list = |e| Error::io(&folder, "list this folder", e);
    for entry in fs::read_dir(&folder).map_err(cannot_list)? {
        let entry = entry.map_err(cannot_list)?;
        let kind = entry.file_type().map_err(cannot_list)?;
        let name = entry.file_name();
        inside.push(&name);
        let name = name.to_string_lossy();
        let passing = name.starts_with('.')
            || name.starts_with("optimizer")
            || [".zip", ".tmp", ".lock"].iter().any(|end| name.ends_with(end))
            || inside.as_os_str() == RESULT;
        if !passing && kind.is_dir() {
            collect(root, inside, files)?;
        } else if !passing && kind.is_file() {
            files.push(inside.clone());
        }
        inside.pop();
    }
    Ok(())
}
