"""Segmentation scores from one confusion matrix, accumulated over a whole split.

    metric = SegmentationMetric(num_classes=12, ignore_index=0)
    metric.update(logits.argmax(1), masks)                    # for every batch
    print(score_table(metric.compute(), names))
"""
import numpy as np
import torch
from torch import Tensor


class SegmentationMetric:
    """Counts (mask, prediction) pairs of pixels; every score is derived from the int64 counts.

    ignore_index: pixels with this id in the mask count nowhere, and if it is a class, that class has no scores.
    counts: (C + 3, C + 2) int64 on the device of the predictions, which several processes may sum. Row and column are
    id + 1: the first and last column, the first row and the last but one count illegal ids, the last row pixels of an
    ``ignore_index`` that is no class.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.ignores_a_class = ignore_index is not None and 0 <= ignore_index < num_classes
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(self.num_classes + 3, self.num_classes + 2, dtype=torch.int64)

    def update(self, pred: Tensor | np.ndarray, mask: Tensor | np.ndarray) -> None:
        """Count a batch of class ids, integers of any equal shape, on the device of ``pred`` without waiting for it.

        Raises ValueError if the shapes differ or the ids are not integers.
        """
        pred, mask = torch.as_tensor(pred), torch.as_tensor(mask)
        if pred.shape != mask.shape:
            raise ValueError(f"prediction {tuple(pred.shape)} and mask {tuple(mask.shape)} differ in shape")
        if pred.is_floating_point() or mask.is_floating_point():
            raise ValueError("predictions and masks must be integer class ids, not scores")
        exact = self.num_classes < 256 and self.ignore_index in (None, *range(256))  # else uint8 would wrap around
        pred, mask = (ids if exact and ids.dtype == torch.uint8 else ids.long() for ids in (pred, mask.to(pred.device)))
        rows, columns = self._shifted(mask), self._shifted(pred)
        if self.ignore_index is not None and not self.ignores_a_class:
            rows.masked_fill_(mask == self.ignore_index, self.num_classes + 2)
        code = rows.mul_(self.counts.shape[1]).add_(columns).flatten()
        counts = self.counts = self.counts.to(pred.device)
        if pred.device.type == "cpu":
            counts += torch.bincount(code, minlength=counts.numel()).view_as(counts)
        else:  # bincount would wait for the largest code
            counts.view(-1).scatter_add_(0, code.long(), torch.ones_like(code, dtype=torch.int64))

    def _shifted(self, ids: Tensor) -> Tensor:
        """A copy with ids + 1, illegal ones 0 or num_classes + 1, in the smallest type that holds every code."""
        dtype = torch.uint8 if self.counts.numel() <= 256 else torch.int32
        return ids.clamp(-1 if ids.dtype.is_signed else 0, self.num_classes).to(dtype, copy=True).add_(1)

    def confusion_matrix(self) -> np.ndarray:
        """(C, C) int64: pixels by the mask's id (row) and the predicted one (column).

        Raises ValueError if an update held an id that is neither a class nor ignored.
        """
        counts = self.counts[:-1].cpu().numpy().copy()
        if self.ignore_index is not None and self.ignores_a_class:
            counts[self.ignore_index + 1] = 0
        matrix = counts[1:-1, 1:-1]
        illegal = counts.sum() - matrix.sum()
        if illegal:
            raise ValueError(f"{illegal} pixels have ids outside 0 to {self.num_classes - 1} "
                             f"that are not ignore_index={self.ignore_index}")
        return matrix

    def compute(self) -> dict:
        """The scores, as floats and (C,) float64 arrays; NaN where a score is undefined, and left out of means.

        ``miou``, ``pixel_accuracy``, ``mean_pixel_accuracy``, ``fwiou`` (IoU weighted by the masks' pixels),
        ``mean_f1``; per class ``iou`` = TP / (TP + FP + FN), ``accuracy`` = TP / (TP + FN),
        ``f1`` = 2 TP / (2 TP + FP + FN) and ``pixels`` (the masks' pixels, int64).
        """
        matrix = self.confusion_matrix()
        true_positive, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        scored = np.arange(self.num_classes) != (self.ignore_index if self.ignores_a_class else -1)
        iou = _ratio(true_positive, labelled + predicted - true_positive, scored)
        accuracy = _ratio(true_positive, labelled, scored)
        f1 = _ratio(2 * true_positive, labelled + predicted, scored)
        return {
            "miou": _mean(iou),
            "pixel_accuracy": float(_ratio(true_positive.sum(), labelled.sum())),
            "mean_pixel_accuracy": _mean(accuracy),
            "fwiou": float(_ratio(np.nansum(iou * labelled), labelled.sum())),
            "mean_f1": _mean(f1),
            "iou": iou, "accuracy": accuracy, "f1": f1, "pixels": labelled,
        }


def _ratio(numerator, denominator, where=True) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0 or ``where`` is false."""
    result = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=(denominator > 0) & where)


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if none is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def format_score(value: float) -> str:
    """Three decimals, or n/a for an undefined score."""
    return "n/a" if np.isnan(value) else f"{value:.3f}"


def score_table(scores: dict, names: tuple[str, ...], ignore_index: int | None = None) -> str:
    """The per-class table (IoU, accuracy, F1, the masks' pixels) and the overall rows of `compute`'s scores."""
    wide = max(len(name) for name in (*names, "mean"))
    lines = [f"{'class':<{wide}}    IoU    acc     F1       pixels"]

    def add(name: str, values: tuple[float, ...], pixels: int) -> None:
        lines.append(f"{name:<{wide}}  {'  '.join(f'{format_score(value):>5}' for value in values)}  {pixels:>11,}")

    for i, name in enumerate(names):
        if i != ignore_index:
            add(name, (scores["iou"][i], scores["accuracy"][i], scores["f1"][i]), scores["pixels"][i])
    add("mean", (scores["miou"], scores["mean_pixel_accuracy"], scores["mean_f1"]), sum(scores["pixels"]))
    lines.append(f"mIoU {format_score(scores['miou'])}   pixel accuracy {format_score(scores['pixel_accuracy'])}   "
                 f"frequency-weighted IoU {format_score(scores['fwiou'])}")
    return "\n".join(lines)
