"""Segmentation metrics from a confusion matrix, and the notebook's own. Undefined classes are left out of means."""

import numpy as np


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int, ignore: int = 255) -> np.ndarray:
    """Pixel counts (classes, classes): rows are the truth, columns the prediction."""
    keep = truth != ignore
    pairs = truth[keep].astype(np.int64) * classes + predicted[keep]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, IoU and recall by class."""
    hit, truth, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"dice": 2 * hit / (truth + predicted), "iou": hit / (truth + predicted - hit), "accuracy": hit / truth}


def summary(truth: np.ndarray, predicted: np.ndarray, classes: int = 2) -> dict:
    """All metrics of a split; `truth` and `predicted` are (N, H, W).

    `notebook_*` repeat the `evaluate` library's mean_iou with ignore_index=True, which equals 1: every pixel labelled 1
    is dropped from truth and prediction before counting.
    """
    matrix = confusion(truth, predicted, classes)
    by_class = scores(matrix)
    dropped = scores(confusion(truth, predicted, classes, ignore=1))
    per_image = [scores(confusion(t, p, classes)) for t, p in zip(truth, predicted, strict=True)]
    return {
        "mean_iou": float(np.nanmean(by_class["iou"])),
        "mean_dice": float(np.nanmean(by_class["dice"])),
        "accuracy": float(np.nanmean(by_class["accuracy"])),
        "dice_per_class": by_class["dice"].tolist(),
        "iou_per_class": by_class["iou"].tolist(),
        "accuracy_per_class": by_class["accuracy"].tolist(),
        "image_mean_dice": float(np.mean([np.nan_to_num(s["dice"][1], nan=1.0) for s in per_image])),
        "image_mean_iou": float(np.mean([np.nan_to_num(s["iou"][1], nan=1.0) for s in per_image])),
        "notebook_mean_iou": float(np.nanmean(dropped["iou"])),
        "notebook_accuracy": float(np.nanmean(dropped["accuracy"])),
        "confusion": matrix.tolist(),
    }
