//! The grid in numbers: one row per run, the best runs, and the answer in a sentence.

use serde::Serialize;

use crate::train::options::Method;
use crate::train::record::RunRecord;

/// One run. `None` stands for what a run does not have or did not measure as a finite number.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) run: String,
    pub(super) method: &'static str,
    pub(super) rank: Option<usize>,
    pub(super) alpha: Option<f64>,
    pub(super) alpha_over_rank: Option<f64>,
    pub(super) trainable_parameters: u64,
    pub(super) trainable_percent: Option<f64>,
    /// Mean over the classes, of all pixels together.
    pub(super) dice: Option<f64>,
    pub(super) polyp_dice: Option<f64>,
    pub(super) iou: Option<f64>,
    /// Mean over the images of the polyp class.
    pub(super) image_mean_dice: Option<f64>,
    pub(super) eval_loss: Option<f64>,
    pub(super) best_epoch: usize,
    pub(super) training_seconds: Option<f64>,
    pub(super) percent_of_fft_dice: Option<f64>,
    pub(super) percent_of_fft_polyp_dice: Option<f64>,
}

/// The grid: rows in its order and the conclusions from them.
#[derive(Serialize)]
pub(super) struct Summary {
    pub(super) headline: String,
    pub(super) remarks: Vec<String>,
    /// Name of the LoRA run of the highest Dice.
    pub(super) best_lora: Option<String>,
    /// Name of the full fine-tuning run.
    pub(super) fft: Option<String>,
    pub(super) runs: Vec<Row>,
}

fn finite(value: Option<f64>) -> Option<f64> {
    value.filter(|v| v.is_finite())
}

fn percent(part: Option<f64>, whole: Option<f64>) -> Option<f64> {
    finite(Some(100.0 * part? / whole?))
}

impl Summary {
    /// `records` are in the order of the grid.
    pub(super) fn new(records: &[RunRecord]) -> Self {
        let mut runs: Vec<Row> = records.iter().map(row).collect();
        let fft = runs.iter().find(|r| r.method == "fft").cloned();
        if let Some(fft) = &fft {
            for row in &mut runs {
                row.percent_of_fft_dice = percent(row.dice, fft.dice);
                row.percent_of_fft_polyp_dice = percent(row.polyp_dice, fft.polyp_dice);
            }
        }
        let lora: Vec<&Row> = runs.iter().filter(|r| r.method == "lora").collect();
        let best = lora
            .iter()
            .filter(|r| r.dice.is_some())
            .max_by(|a, b| a.dice.unwrap_or(0.0).total_cmp(&b.dice.unwrap_or(0.0)))
            .copied();
        let headline = headline(fft.as_ref(), best);
        let remarks = best.map(|best| remarks(fft.as_ref(), best, &lora)).unwrap_or_default();
        let best_lora = best.map(|b| b.run.clone());
        Self { headline, remarks, best_lora, fft: fft.map(|f| f.run), runs }
    }
}

fn row(record: &RunRecord) -> Row {
    let evaluation = &record.final_evaluation;
    let extra = evaluation.extra.as_ref();
    let (method, lora) = match &record.method {
        Method::Fft => ("fft", None),
        Method::Lora(lora) => ("lora", Some(lora)),
    };
    Row {
        run: record.name.clone(),
        method,
        rank: lora.map(|l| l.rank),
        alpha: lora.map(|l| l.alpha),
        alpha_over_rank: finite(lora.map(|l| l.alpha / l.rank as f64)),
        trainable_parameters: record.trainable_parameters,
        trainable_percent: percent(Some(record.trainable_parameters as f64), Some(record.total_parameters as f64)),
        dice: finite(evaluation.eval_mean_dice),
        polyp_dice: finite(extra.and_then(|e| e.eval_dice_per_class.get(1).copied().flatten())),
        iou: finite(evaluation.eval_mean_iou),
        image_mean_dice: finite(extra.map(|e| e.eval_image_mean_dice)),
        eval_loss: finite(evaluation.eval_loss),
        best_epoch: record.best_epoch,
        training_seconds: finite(Some(record.training_time)),
        percent_of_fft_dice: None,
        percent_of_fft_polyp_dice: None,
    }
}

/// Rank and alpha of a LoRA run, as in "r = 16, α = 32".
pub(super) fn setting(row: &Row) -> String {
    format!("r = {}, α = {}", row.rank.unwrap_or(0), row.alpha.unwrap_or(f64::NAN))
}

fn headline(fft: Option<&Row>, best: Option<&Row>) -> String {
    let dice = |row: &Row| row.dice.map_or("an unknown value".into(), |d| format!("{d:.4}"));
    match (fft, best) {
        (Some(fft), Some(best)) => match (best.percent_of_fft_dice, best.trainable_percent) {
            (Some(kept), Some(share)) => format!(
                "LoRA {} {kept:.1} % of full fine-tuning's Dice ({} of {}) at {}, training {share:.1} % of the parameters.",
                if kept > 100.0 { "reaches" } else { "keeps" },
                dice(best),
                dice(fft),
                setting(best),
            ),
            _ => format!(
                "The best LoRA run reaches a Dice of {} at {}; full fine-tuning's is {}.",
                dice(best),
                setting(best),
                dice(fft)
            ),
        },
        (None, Some(best)) => format!(
            "The best LoRA run reaches a Dice of {} at {}; no full fine-tuning run is here to compare it with.",
            dice(best),
            setting(best)
        ),
        (Some(fft), None) => format!("Full fine-tuning reaches a Dice of {}; no LoRA run has finished.", dice(fft)),
        (None, None) => "No run has finished.".into(),
    }
}

fn remarks(fft: Option<&Row>, best: &Row, lora: &[&Row]) -> Vec<String> {
    let mut remarks = Vec::new();
    let shares: Vec<(f64, &Row)> = lora.iter().filter_map(|r| r.percent_of_fft_dice.map(|s| (s, *r))).collect();
    let worst = shares.iter().min_by(|a, b| a.0.total_cmp(&b.0));
    if let (Some(worst), Some(kept)) = (worst, best.percent_of_fft_dice)
        && shares.len() > 1
    {
        remarks.push(format!(
            "Over {} LoRA runs the share kept lies between {:.1} % ({}) and {kept:.1} % ({}).",
            shares.len(),
            worst.0,
            setting(worst.1),
            setting(best)
        ));
        let enough = shares.iter().filter(|(s, _)| *s >= kept - 1.0).min_by_key(|(_, r)| r.trainable_parameters);
        if let Some((share, row)) = enough
            && row.trainable_parameters < best.trainable_parameters
        {
            remarks.push(format!(
                "The fewest trained parameters within one percentage point of that: {} ({share:.1} %, {} parameters).",
                setting(row),
                thousands(row.trainable_parameters)
            ));
        }
    }
    if let (Some(fft), Some(kept), Some(part)) = (fft, best.percent_of_fft_polyp_dice, best.polyp_dice)
        && let Some(whole) = fft.polyp_dice
    {
        remarks.push(format!(
            "Of the polyp class alone, without the easy background, the best run keeps {kept:.1} % ({part:.4} of {whole:.4})."
        ));
    }
    remarks.push("Each setting was trained once: small differences between neighbours may be chance.".into());
    remarks
}

/// 1234567 as "1,234,567".
pub(super) fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// The columns of the table for people: heading and cell.
pub(super) fn columns(row: &Row) -> [(&'static str, String); 14] {
    let show = |value: Option<f64>, decimals: usize| value.map_or("–".to_string(), |v| format!("{v:.decimals$}"));
    let plain = |value: Option<f64>| value.map_or("–".to_string(), |v| v.to_string());
    [
        ("Run", row.run.clone()),
        ("r", plain(row.rank.map(|r| r as f64))),
        ("α", plain(row.alpha)),
        ("α/r", plain(row.alpha_over_rank)),
        ("Trainable", thousands(row.trainable_parameters)),
        ("% of all", show(row.trainable_percent, 2)),
        ("Dice", show(row.dice, 4)),
        ("% of FFT's", show(row.percent_of_fft_dice, 1)),
        ("Polyp Dice", show(row.polyp_dice, 4)),
        ("IoU", show(row.iou, 4)),
        ("Image-mean Dice", show(row.image_mean_dice, 4)),
        ("Loss", show(row.eval_loss, 4)),
        ("Best epoch", row.best_epoch.to_string()),
        ("Time (s)", show(row.training_seconds, 1)),
    ]
}

/// What the columns mean, for under the table.
pub(super) const LEGEND: &str = "Metrics of the best model (by validation loss) on the validation split. Dice and IoU: \
    mean over the classes, of all pixels together; polyp Dice: the polyp class of the same; image-mean Dice: mean over \
    the images of the polyp class; % of FFT's: share of full fine-tuning's Dice kept; time: training with its \
    evaluations.";
