//! Results as plain text for a terminal.

use crate::train::record::RunRecord;

/// The finished runs as an aligned table, one line a run. Dice, IoU and image Dice are those of the restored best model on
/// the validation split.
pub fn results_table(records: &[RunRecord]) -> String {
    let mut rows =
        vec![["run", "trainable", "Dice", "IoU", "image Dice", "best epoch", "time"].map(String::from).to_vec()];
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

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time span for people: `0.42 s`, `12.3 s`, `4 min 05 s`, `1 h 02 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..60 if seconds < 9.995 => format!("{seconds:.2} s"),
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let spans =
            [(0.421, "0.42 s"), (9.999, "10.0 s"), (59.4, "59.4 s"), (59.7, "1 min 00 s"), (245.2, "4 min 05 s")];
        for (seconds, text) in spans {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!(duration(3725.0), "1 h 02 min");
    }

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
