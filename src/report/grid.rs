//! The whole grid: `summary.csv`, `summary.json`, `summary.md`, four figures and `index.html`.

use std::fmt::Write as _;
use std::path::Path;

use plotters::style::RGBColor;
use rayon::prelude::*;

use super::page;
use super::plot::{self, Axis, Figure, Marker, Series};
use super::run::over_epochs;
use super::summary::{self, Row, Summary};
use crate::error::{Error, Result};
use crate::files;
use crate::train::record::{HistoryRow, RunRecord};

/// Pixels of a figure.
const FIGURE: (u32, u32) = (1440, 960);

/// Colours and markers of the ranks in rising order: hues in their natural order, all of middling brightness, so that
/// they stand out from white and, inverted, from black.
const RANKS: [(RGBColor, Marker); 5] = [
    (RGBColor(128, 64, 196), Marker::Circle),
    (RGBColor(24, 108, 204), Marker::Square),
    (RGBColor(0, 140, 124), Marker::Triangle),
    (RGBColor(112, 140, 0), Marker::Diamond),
    (RGBColor(214, 106, 0), Marker::Wedge),
];

/// Writes tables, figures and page of the runs into `out`. Each file is replaced as a whole. `caution` is the first remark on
/// the headline, if there is one.
///
/// # Errors
/// `Input` if there is no run, `Io` if `out` cannot be written.
pub fn write(out: &Path, records: &[RunRecord], caution: Option<String>) -> Result<()> {
    if records.is_empty() {
        return Err(Error::input(out, "holds no finished run; train some with `segpeft-native ablate`"));
    }
    let mut records = records.to_vec();
    super::sort(&mut records);
    let mut summary = Summary::new(&records);
    summary.remarks.splice(0..0, caution);
    files::replace_json(&out.join("summary.json"), &summary)?;
    files::replace(&out.join("summary.csv"), csv(&summary.runs)?.as_bytes())?;
    files::replace(&out.join("summary.md"), markdown(&summary).as_bytes())?;
    // Side by side, since the next run waits for them.
    figures(&records, &summary).into_par_iter().try_for_each(|(name, figure)| figure.write(&out.join(name), FIGURE))?;
    files::replace(&out.join("index.html"), page::html(&summary).as_bytes())
}

/// The rows with all digits, one column per field.
fn csv(rows: &[Row]) -> Result<String> {
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        let value = serde_json::to_value(row)
            .map_err(|e| Error::new(crate::error::Kind::Internal, format!("cannot express a row: {e}")))?;
        let fields = value.as_object().into_iter().flatten();
        let (names, cells): (Vec<_>, Vec<_>) = fields.map(|(name, value)| (name.as_str(), cell(value))).unzip();
        if i == 0 {
            text += &(names.join(",") + "\n");
        }
        text += &(cells.join(",") + "\n");
    }
    Ok(text)
}

fn cell(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(s) if s.contains([',', '"', '\n', '\r']) => {
            format!("\"{}\"", s.replace('"', "\"\""))
        }
        serde_json::Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

fn markdown(summary: &Summary) -> String {
    let mut text = format!("{}\n\n", summary.headline);
    for remark in &summary.remarks {
        text += &format!("- {remark}\n");
    }
    for (i, row) in summary.runs.iter().enumerate() {
        let columns = summary::columns(row);
        if i == 0 {
            let names: Vec<_> = columns.iter().map(|(name, _)| *name).collect();
            // Writing to a string cannot fail.
            let _ = writeln!(text, "\n| {} |", names.join(" | "));
            let _ = writeln!(text, "| --- {}|", "| ---: ".repeat(names.len() - 1));
        }
        let best = summary.best_lora.as_ref() == Some(&row.run);
        let cells = columns.map(|(_, cell)| {
            let cell = cell.replace('|', "\\|");
            if best { format!("**{cell}**") } else { cell }
        });
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text + &format!("\n{} Bold: the best LoRA run.\n", summary::LEGEND)
}

/// The four figures with their file names.
fn figures(records: &[RunRecord], summary: &Summary) -> [(&'static str, Figure); 4] {
    [
        ("dice_vs_training_time.png", dice_vs_time(summary)),
        ("lora_alpha_vs_dice.png", alpha_vs_dice(summary)),
        ("epochs_vs_dice.png", epochs_vs_dice(records, summary)),
        ("epochs_vs_loss.png", epochs_vs_loss(records, summary)),
    ]
}

/// The LoRA rows by rank, with a colour and a marker for each.
fn by_rank(summary: &Summary) -> Vec<(usize, RGBColor, Marker, Vec<&Row>)> {
    let mut ranks: Vec<usize> = summary.runs.iter().filter_map(|r| r.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let rows = |rank| summary.runs.iter().filter(|r| r.rank == Some(rank)).collect();
    ranks
        .iter()
        .enumerate()
        .map(|(i, &rank)| {
            let (colour, marker) = look(i);
            (rank, colour, marker, rows(rank))
        })
        .collect()
}

/// Colour and marker of the rank in place `i`: where the colours begin again, the markers are others.
fn look(i: usize) -> (RGBColor, Marker) {
    let n = RANKS.len();
    (RANKS[i % n].0, RANKS[(i + i / n) % n].1)
}

/// By what factor the alpha of a rank is moved in the figure: the ranks that `share` it stand side by side, a twentieth of a
/// doubling apart.
fn aside(rank: usize, share: &[usize]) -> f64 {
    let place = share.iter().position(|&r| r == rank).unwrap_or(0) as f64;
    2f64.powf(0.05 * (place - (share.len() as f64 - 1.0) / 2.0))
}

fn fft_row(summary: &Summary) -> Option<&Row> {
    summary.runs.iter().find(|r| Some(&r.run) == summary.fft.as_ref())
}

fn dice_vs_time(summary: &Summary) -> Figure {
    let point = |row: &&Row| row.training_seconds.zip(row.dice);
    let mut series: Vec<Series> = by_rank(summary)
        .into_iter()
        .map(|(rank, colour, marker, rows)| {
            let rows: Vec<_> = rows.into_iter().filter(|r| point(r).is_some()).collect();
            let notes = rows.iter().filter_map(|r| r.alpha).map(|a| format!("α {a}")).collect();
            Series::scatter(format!("r = {rank}"), colour, marker, rows.iter().filter_map(point).collect(), notes)
        })
        .collect();
    if let Some(point) = fft_row(summary).as_ref().and_then(point) {
        series.push(Series::scatter("Full fine-tuning", plot::RED, Marker::Cross, vec![point], Vec::new()));
    }
    Figure {
        title: "Dice against training time".into(),
        x: Axis::linear("Training time (seconds)"),
        y: Axis::linear("Dice"),
        level: None,
        series,
    }
}

fn alpha_vs_dice(summary: &Summary) -> Figure {
    let ranks = by_rank(summary);
    let mut alphas: Vec<f64> = summary.runs.iter().filter_map(|r| r.alpha).filter(|a| *a > 0.0).collect();
    alphas.sort_by(f64::total_cmp);
    alphas.dedup();
    let at = |alpha: f64| -> Vec<usize> {
        let there = |rows: &[&Row]| rows.iter().any(|r| r.alpha == Some(alpha) && r.dice.is_some());
        ranks.iter().filter(|(.., rows)| there(rows)).map(|(rank, ..)| *rank).collect()
    };
    let series = ranks
        .iter()
        .map(|(rank, colour, marker, rows)| {
            let point = |r: &&Row| r.alpha.map(|a| a * aside(*rank, &at(a))).zip(r.dice);
            let points = rows.iter().filter_map(point).collect();
            Series::scatter(format!("r = {rank}"), *colour, *marker, points, Vec::new()).joined()
        })
        .collect();
    Figure {
        title: "Dice against LoRA's α".into(),
        x: Axis::log("α (logarithmic)", alphas),
        y: Axis::linear("Dice"),
        level: fft_row(summary).and_then(|f| f.dice).map(|d| (d, format!("Full fine-tuning ({d:.4})"))),
        series,
    }
}

/// Legend and history of the best LoRA run and of full fine-tuning, as far as they exist.
fn contenders<'a>(records: &'a [RunRecord], summary: &Summary) -> Vec<(String, RGBColor, Marker, &'a [HistoryRow])> {
    let history = |name: &String| records.iter().find(|r| r.name == *name).map(|r| r.training_history.as_slice());
    let best = summary.runs.iter().find(|r| Some(&r.run) == summary.best_lora.as_ref());
    let lora = best.and_then(|row| {
        Some((format!("Best LoRA ({})", summary::setting(row)), plot::BLUE, Marker::Circle, history(&row.run)?))
    });
    let fft = summary
        .fft
        .as_ref()
        .and_then(|name| Some(("Full fine-tuning".to_string(), plot::RED, Marker::Square, history(name)?)));
    lora.into_iter().chain(fft).collect()
}

fn epochs_vs_dice(records: &[RunRecord], summary: &Summary) -> Figure {
    let series = contenders(records, summary)
        .into_iter()
        .map(|(label, colour, marker, history)| {
            Series::line(label, colour, over_epochs(history, |r| r.eval_mean_dice)).marker(marker)
        })
        .collect();
    Figure {
        title: "Validation Dice over epochs: best LoRA and full fine-tuning".into(),
        x: Axis::epochs(),
        y: Axis::linear("Dice"),
        level: None,
        series,
    }
}

fn epochs_vs_loss(records: &[RunRecord], summary: &Summary) -> Figure {
    let series = contenders(records, summary)
        .into_iter()
        .flat_map(|(label, colour, marker, history)| {
            let train = Series::line(format!("{label}, training"), colour, over_epochs(history, |r| r.loss));
            let validation =
                Series::line(format!("{label}, validation"), colour, over_epochs(history, |r| r.eval_loss));
            [train.dashed().marker(marker), validation.marker(marker)]
        })
        .collect();
    Figure {
        title: "Loss over epochs: best LoRA and full fine-tuning".into(),
        x: Axis::epochs(),
        y: Axis::linear("Cross-entropy"),
        level: None,
        series,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_differ_in_colour_or_marker() {
        for i in 0..25 {
            assert!((0..i).all(|j| look(i) != look(j)), "{i}");
        }
        assert_eq!(look(4), RANKS[4]);
    }

    #[test]
    fn only_ranks_that_share_an_alpha_move() {
        assert_eq!(aside(64, &[64]), 1.0);
        let [left, middle, right] = [4, 8, 64].map(|rank| aside(rank, &[4, 8, 64]));
        assert!(left < middle && middle == 1.0 && middle < right);
        assert!((left * right - 1.0).abs() < 1e-12, "centred");
    }
}
