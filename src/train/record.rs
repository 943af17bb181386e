//! What a run leaves behind in numbers: the history, row by row, and the result.

use serde::{Deserialize, Serialize};

use super::options::Method;

/// One row of the history. Training, evaluation and summary rows fill different columns, as Hugging Face's Trainer logs.
/// The first 17 fields are the columns of the notebook's `training_history.csv`, in its order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct HistoryRow {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    pub epoch: f64,
    pub step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_mean_iou: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_mean_dice: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_runtime: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_samples_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_steps_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_runtime: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_samples_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_steps_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_flos: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_loss: Option<f64>,
    /// Further metrics of an evaluation row.
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    pub extra: Option<ExtraMetrics>,
}

/// Metrics beyond the notebook's columns. Lists are by class; a class that neither truth nor prediction holds has none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExtraMetrics {
    /// Dice (F1) of each class over all pixels of the split together.
    pub eval_dice_per_class: Vec<Option<f64>>,
    /// Intersection over union of each class over all pixels of the split together.
    pub eval_iou_per_class: Vec<Option<f64>>,
    /// Recall of each class over all pixels of the split together.
    pub eval_accuracy_per_class: Vec<Option<f64>>,
    /// Mean over the images of each image's Dice of class 1 (polyp); 1 where prediction and truth are both empty.
    pub eval_image_mean_dice: f64,
    /// Mean over the images of each image's IoU of class 1 (polyp); 1 where prediction and truth are both empty.
    pub eval_image_mean_iou: f64,
    /// The notebook's `mean_iou`, which drops every pixel labelled 1; none if no pixel is left.
    pub eval_notebook_mean_iou: Option<f64>,
    /// The notebook's `accuracy`, likewise.
    pub eval_notebook_accuracy: Option<f64>,
}

/// Result of one finished run: `all_metrics.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Name of the run, e.g. `lora_r16_alpha32`.
    pub name: String,
    /// What was trained.
    pub method: Method,
    /// Parameters that were trained.
    pub trainable_parameters: u64,
    /// Parameters of the model, adapters included.
    pub total_parameters: u64,
    /// Epoch of the restored best model, counted from 1.
    pub best_epoch: usize,
    /// Seconds of training, evaluations between epochs included.
    pub training_time: f64,
    /// Metrics of the best model on the validation split.
    pub final_evaluation: HistoryRow,
    /// Metrics of the best model on the training split; as those on the validation split, augmented under the notebook's protocol
    /// alone.
    pub final_evaluation_train: HistoryRow,
    /// The history.
    pub training_history: Vec<HistoryRow>,
}
