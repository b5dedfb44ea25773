"""Segmentation scores from one confusion matrix, accumulated over a whole split.

metric = SegmentationMetric(num_classes=12, ignore_index=0)
metric.update(logits.argmax(1), masks)                    # for every batch
print(score_table(metric.compute(), names))
"""

import numpy as np
import torch
from torch import Tensor


class SegmentationMetric:
    """Counts the pixels of every pair of true and predicted class; all scores derive from these.

    ignore_index: pixels with this id in the mask are not counted; if it is the id of a class, that
    class has no scores.
    matrix: (C, C) int64, the pixels by true class (row) and predicted class (column), on the device
    of the predictions.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, pred: Tensor | np.ndarray, mask: Tensor | np.ndarray) -> None:
        """Count a batch of class ids, integers of any equal shape.

        Raises ValueError if the shapes differ, or for anything but the ids of classes.
        """
        pred = torch.as_tensor(pred)
        mask = torch.as_tensor(mask).to(pred.device)
        if pred.shape != mask.shape or pred.is_floating_point() or mask.is_floating_point():
            raise ValueError("predictions and masks must be integer class ids of one shape")
        classes = self.num_classes
        ignored = mask == self.ignore_index
        pred = pred.long()
        mask = mask.long()
        legal = (pred >= 0) & (pred < classes) & (mask >= 0) & (mask < classes)
        if not (legal | ignored).all():
            raise ValueError("some pixels have ids that are of no class")
        pairs = torch.where(ignored, classes**2, mask * classes + pred).flatten()
        counts = torch.bincount(pairs, minlength=classes**2 + 1)[:-1]
        self.matrix = self.matrix.to(pred.device) + counts.view_as(self.matrix)

    @np.errstate(invalid="ignore")  # an undefined score is 0 / 0, which gives NaN
    def compute(self) -> dict:
        """The scores, as floats and (C,) float64 arrays; NaN where undefined, left out of means.

        ``miou``, ``pixel_accuracy``, ``mean_pixel_accuracy``, ``fwiou`` (IoU weighted by the
        classes' pixels), ``mean_f1``; per class ``iou`` = TP / (TP + FP + FN),
        ``accuracy`` = TP / (TP + FN), ``f1`` = 2 TP / (2 TP + FP + FN) and ``pixels`` (TP + FN,
        int64); ``confusion_matrix`` (C, C) int64.
        """
        matrix = self.matrix.cpu().numpy()
        scored = np.arange(self.num_classes) != self.ignore_index
        correct = np.where(scored, matrix.diagonal(), np.nan)
        labelled = matrix.sum(1)
        predicted = matrix.sum(0)
        iou = correct / (labelled + predicted - correct)
        accuracy = correct / labelled
        f1 = 2 * correct / (labelled + predicted)
        return {
            "miou": _mean(iou),
            "pixel_accuracy": float(np.nansum(correct) / labelled.sum()),
            "mean_pixel_accuracy": _mean(accuracy),
            "fwiou": float(np.nansum(iou * labelled) / labelled.sum()),
            "mean_f1": _mean(f1),
            "iou": iou,
            "accuracy": accuracy,
            "f1": f1,
            "pixels": labelled,
            "confusion_matrix": matrix,
        }


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.sum() / known.size)


def format_score(value: float) -> str:
    """Three decimals, or n/a for an undefined score."""
    return "n/a" if np.isnan(value) else f"{value:.3f}"


def score_table(scores: dict, names: tuple[str, ...], ignore_index: int = 255) -> str:
    """The scores of `compute` as text: IoU, accuracy, F1 and pixels per class, and the means."""
    width = max(len(name) for name in (*names, "mean"))
    lines = [f"{'class':<{width}}    IoU    acc     F1       pixels"]
    columns = [scores[key] for key in ("iou", "accuracy", "f1", "pixels")]
    rows = [row for i, row in enumerate(zip(names, *columns)) if i != ignore_index]
    means = [scores[key] for key in ("miou", "mean_pixel_accuracy", "mean_f1")]
    for name, *values, pixels in [*rows, ("mean", *means, sum(scores["pixels"]))]:
        cells = "  ".join(f"{format_score(value):>5}" for value in values)
        lines.append(f"{name:<{width}}  {cells}  {pixels:>11,}")
    lines.append(
        f"mIoU {format_score(scores['miou'])}   "
        f"pixel accuracy {format_score(scores['pixel_accuracy'])}   "
        f"frequency-weighted IoU {format_score(scores['fwiou'])}"
    )
    return "\n".join(lines)
