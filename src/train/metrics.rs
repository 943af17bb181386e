//! Segmentation metrics from confusion counts.

use super::record::{ExtraMetrics, HistoryRow};

/// Counts of one image or of many: `counts[truth·labels + prediction]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Confusion {
    labels: usize,
    total: Vec<u64>,
    images: u64,
    image_dice: f64,
    image_iou: f64,
}

/// Share `part / whole`, none if there is nothing to share.
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// Mean of the defined values.
fn mean(values: &[Option<f64>]) -> Option<f64> {
    let defined: Vec<f64> = values.iter().flatten().copied().collect();
    (!defined.is_empty()).then(|| defined.iter().sum::<f64>() / defined.len() as f64)
}

struct Scores {
    dice: Vec<Option<f64>>,
    iou: Vec<Option<f64>>,
    accuracy: Vec<Option<f64>>,
}

fn scores(counts: &[u64], labels: usize) -> Scores {
    let by_class = |score: &dyn Fn(u64, u64, u64) -> Option<f64>| {
        (0..labels)
            .map(|c| {
                let hit = counts[c * labels + c];
                let truth = counts[c * labels..][..labels].iter().sum();
                let predicted = counts.iter().skip(c).step_by(labels).sum();
                score(hit, truth, predicted)
            })
            .collect()
    };
    Scores {
        dice: by_class(&|hit, truth, predicted| share(2 * hit, truth + predicted)),
        iou: by_class(&|hit, truth, predicted| share(hit, truth + predicted - hit)),
        accuracy: by_class(&|hit, truth, _| share(hit, truth)),
    }
}

impl Confusion {
    /// No image yet, of `labels` classes.
    pub fn new(labels: usize) -> Self {
        Self { labels, total: vec![0; labels * labels], images: 0, image_dice: 0.0, image_iou: 0.0 }
    }

    /// Adds one image's `labels²` counts.
    pub fn add(&mut self, counts: &[u64]) {
        for (total, count) in self.total.iter_mut().zip(counts) {
            *total += count;
        }
        let image = scores(counts, self.labels);
        self.image_dice += image.dice[1].unwrap_or(1.0);
        self.image_iou += image.iou[1].unwrap_or(1.0);
        self.images += 1;
    }

    /// All metrics, as the evaluation columns of a history row.
    pub fn row(&self) -> HistoryRow {
        let all = scores(&self.total, self.labels);
        // The notebook's `ignore_index=True` equals 1: pixels labelled 1 are dropped before counting.
        let mut kept = self.total.clone();
        kept[self.labels..2 * self.labels].fill(0);
        let notebook = scores(&kept, self.labels);
        let images = self.images.max(1) as f64;
        HistoryRow {
            eval_mean_iou: mean(&all.iou),
            eval_mean_dice: mean(&all.dice),
            eval_accuracy: mean(&all.accuracy),
            extra: Some(ExtraMetrics {
                eval_notebook_mean_iou: mean(&notebook.iou),
                eval_notebook_accuracy: mean(&notebook.accuracy),
                eval_dice_per_class: all.dice,
                eval_iou_per_class: all.iou,
                eval_accuracy_per_class: all.accuracy,
                eval_image_mean_dice: self.image_dice / images,
                eval_image_mean_iou: self.image_iou / images,
            }),
            ..HistoryRow::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_become_metrics() {
        let mut confusion = Confusion::new(2);
        confusion.add(&[90, 2, 3, 5]);
        confusion.add(&[100, 0, 0, 0]);
        let row = confusion.row();
        let extra = row.extra.expect("metrics");
        assert_eq!(extra.eval_dice_per_class[1], Some(10.0 / 15.0));
        assert_eq!(extra.eval_iou_per_class[0], Some(190.0 / 195.0));
        assert_eq!(extra.eval_accuracy_per_class[1], Some(5.0 / 8.0));
        assert_eq!(row.eval_mean_dice, Some((380.0 / 385.0 + 10.0 / 15.0) / 2.0));
        assert_eq!(extra.eval_image_mean_dice, (10.0 / 15.0 + 1.0) / 2.0);
        // The notebook's mean_iou is half its accuracy as soon as one pixel is wrongly called polyp.
        assert_eq!(extra.eval_notebook_accuracy, Some(190.0 / 192.0));
        assert_eq!(extra.eval_notebook_mean_iou, Some(190.0 / 192.0 / 2.0));
    }

    #[test]
    fn absent_classes_have_no_score() {
        let mut confusion = Confusion::new(2);
        confusion.add(&[10, 0, 0, 0]);
        let row = confusion.row();
        assert_eq!(row.eval_mean_dice, Some(1.0));
        assert_eq!(row.extra.expect("metrics").eval_dice_per_class, [Some(1.0), None]);
    }
}
