"""Segmentation scores from one confusion matrix, accumulated over a whole split."""
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from runtime import is_distributed


class SegmentationMetric:
    """Counts (label, prediction) pairs of pixels; every score is derived from the int64 counts.

    ignore_index: pixels with this label count nowhere, and where it is a class, that class has no scores.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        # (C + 3, C + 2) int64 on the device of the updates, by id + 1: the first and last column and the first row
        # and the last but one count illegal ids, the last row pixels of an ignore_index that is no class.
        self.counts: Tensor | None = None

    def update(self, pred: Tensor | np.ndarray, target: Tensor | np.ndarray) -> None:
        """Count a batch of any equal shape of integer ids, on the device of ``pred`` and without a copy to the host.

        Raises ValueError if the shapes differ or the ids are not integers.
        """
        pred, target = torch.as_tensor(pred), torch.as_tensor(target)
        if pred.shape != target.shape:
            raise ValueError(f"prediction {tuple(pred.shape)} and label {tuple(target.shape)} differ in shape")
        if pred.is_floating_point() or target.is_floating_point():
            raise ValueError("predictions and labels must be integer class ids, not scores")
        pred, target = pred.flatten().long(), target.flatten().to(pred.device).long()
        rows = target.clamp(-1, self.num_classes)
        if self.ignore_index is not None and not self._ignores_a_class:
            rows.masked_fill_(target == self.ignore_index, self.num_classes + 1)
        counts = self._no_counts(pred.device)
        code = rows.add_(1).mul_(counts.shape[1]).add_(pred.clamp(-1, self.num_classes)).add_(1)
        # Not bincount, which on a GPU waits for the largest code.
        counts.view(-1).scatter_add_(0, code, torch.ones_like(code))
        self.counts = counts if self.counts is None else self.counts.to(counts.device) + counts

    def _no_counts(self, device: torch.device | str) -> Tensor:
        return torch.zeros(self.num_classes + 3, self.num_classes + 2, dtype=torch.int64, device=device)

    @property
    def _ignores_a_class(self) -> bool:
        return self.ignore_index is not None and 0 <= self.ignore_index < self.num_classes

    def all_reduce(self) -> None:
        """Add the counts of every process of a distributed run; nothing to do in a single process."""
        if not is_distributed():
            return
        if self.counts is None:  # a process without a batch takes part all the same, or the others would wait for it
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            self.counts = self._no_counts(device)
        dist.all_reduce(self.counts)

    def confusion_matrix(self) -> np.ndarray:
        """(C, C) int64: pixels by label (row) and prediction (column).

        Raises ValueError if an update held an id that is neither a class nor ignored.
        """
        if self.counts is None:
            return np.zeros((self.num_classes, self.num_classes), np.int64)
        counts = self.counts[:-1].cpu().numpy().copy()
        if self._ignores_a_class:
            counts[self.ignore_index + 1] = 0
        matrix = counts[1:-1, 1:-1]
        illegal = counts.sum() - matrix.sum()
        if illegal:
            raise ValueError(f"{illegal} pixels have ids outside 0 to {self.num_classes - 1} "
                             f"that are not ignore_index={self.ignore_index}")
        return matrix

    def compute(self) -> dict:
        """The scores, as floats and (C,) float64 arrays; NaN where a score is undefined, and left out of means.

        ``miou``, ``pixel_accuracy``, ``mean_pixel_accuracy``, ``fwiou`` (IoU weighted by label frequency),
        ``mean_f1``; per class ``iou`` = TP / (TP + FP + FN), ``accuracy`` = TP / (TP + FN),
        ``f1`` = 2 TP / (2 TP + FP + FN) and ``pixels`` (label count, int64).
        """
        matrix = self.confusion_matrix()
        true_positive = matrix.diagonal().astype(np.float64)
        labelled, predicted = matrix.sum(1), matrix.sum(0)
        scored = np.ones(self.num_classes, bool)
        if self._ignores_a_class:
            scored[self.ignore_index] = False
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
    numerator, denominator = np.float64(numerator), np.float64(denominator)
    result = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=result, where=(denominator > 0) & where)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def format_score(value: float) -> str:
    """Three decimals, or n/a for an undefined score."""
    return "n/a" if np.isnan(value) else f"{value:.3f}"


def score_table(scores: dict, names: tuple[str, ...], ignore_index: int | None = None) -> str:
    """The per-class table (IoU, accuracy, F1, label pixels) and the overall row of `compute`'s scores."""
    wide = max(len(name) for name in (*names, "mean"))
    lines = [f"{'class':<{wide}}    IoU    acc     F1       pixels"]
    for i, name in enumerate(names):
        if i != ignore_index:
            row = "  ".join(f"{format_score(scores[key][i]):>5}" for key in ("iou", "accuracy", "f1"))
            lines.append(f"{name:<{wide}}  {row}  {scores['pixels'][i]:>11,}")
    row = "  ".join(f"{format_score(scores[key]):>5}" for key in ("miou", "mean_pixel_accuracy", "mean_f1"))
    lines.append(f"{'mean':<{wide}}  {row}  {scores['pixels'].sum():>11,}")
    lines.append(f"mIoU {format_score(scores['miou'])}   pixel accuracy {format_score(scores['pixel_accuracy'])}   "
                 f"frequency-weighted IoU {format_score(scores['fwiou'])}")
    return "\n".join(lines)
