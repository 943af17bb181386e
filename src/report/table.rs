//! Results as plain text for a terminal.

use super::summary::thousands;
use crate::progress::duration;
use crate::train::record::RunRecord;

/// The finished runs as an aligned table, one line a run. Dice, IoU and image Dice are those of the restored best model on
/// the validation split; `epoch` is that model's.
pub fn results_table(records: &[RunRecord]) -> String {
    let mut rows = vec![["run", "trainable", "Dice", "IoU", "image Dice", "epoch", "time"].map(String::from).to_vec()];
    for record in records {
        let row = &record.final_evaluation;
        let image_dice = row.extra.as_ref().map(|extra| extra.eval_image_mean_dice);
        rows.push(vec![
            record.name.clone(),
            thousands(record.trainable_parameters),
            metric(row.eval_mean_dice),
            metric(row.eval_mean_iou),
            metric(image_dice),
            record.best_epoch.to_string(),
            duration(record.training_time),
        ]);
    }
    align(&rows)
}

/// Rows of cells as lines, the first column flush left, the others flush right.
fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |c: usize| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (c, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            text += &if c == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
        }
        text.push('\n');
    }
    text
}

fn metric(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |v| format!("{v:.4}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            ["0", "999", "1,000", "3,714,658"],
            [0, 999, 1000, 3_714_658].map(thousands).each_ref().map(|s| &**s)
        );
    }

    #[test]
    fn columns_line_up() {
        let rows = [["run", "Dice"], ["longer name", "0.9"]].map(|row| row.map(String::from).to_vec());
        assert_eq!(align(&rows), "run          Dice\nlonger name   0.9\n");
    }
}
