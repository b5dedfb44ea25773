"""From images of any size to class ids: precision, tiles, test-time augmentation, validation."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader

from datasets.classes import ClassSet
from metric import SegmentationMetric
from support.command import Parser, UserError, number, progress
from support.device import add_device_flags, memory_format, sum_over_processes, to_device
from support.images import FULL_RANGE, shrink

# The rows and columns of a part of an image, and its probabilities (N, C, h, w).
Part = tuple[tuple[slice, slice], Tensor]
TILE = 960  # pixels a side: whole CamVid frames fit, and a network of width 64 needs about 2 GB
MAX_PROBABILITIES = 64_000_000  # of a tile; a few copies of it take about 1 GB
CHECKPOINT_HELP = """trained model, or a folder, of which the newest *_best.pth is taken; if not
given, that of checkpoint/, else the included model"""
MAX_SIDE_HELP = """shrink longer images to it before the network, and enlarge the result; 0: never;
if not given, that of the training"""
NOT_FINITE = "the network's outputs are NaN or infinite; try --amp off, or a lower --lr in training"
TTA = {
    "none": [(1.0, False)],
    "flip": [(1.0, False), (1.0, True)],
    "flip+scale": [(scale, flip) for scale in (0.75, 1.0, 1.25) for flip in (False, True)],
}


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution registered just before it, in place.

    The modules must run in the order in which they are registered, as those of `model.py` do.
    """
    module.eval()
    for (conv_name, conv), (norm_name, norm) in pairwise(module.named_children()):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)
    return module


@dataclass
class Predictor:
    """Runs a segmentation network over batches; never predicts the class ``ignore_index``.

    mean, std: of the channels of images in 0 … 1.
    max_side: images with a longer side are shrunk to it, in pixels; 0 shrinks none.
    value_range: of 16-bit images in the training, for `read_image`.
    tile: images larger than this many pixels a side are processed in overlapping tiles; 0 takes
    960, or less for more than 69 classes.
    tta: test-time augmentation, a key of TTA, whose views' probabilities are averaged.
    """

    model: nn.Module
    classes: ClassSet
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device = torch.device("cpu")
    amp_dtype: torch.dtype | None = None
    max_side: int = 0
    value_range: tuple[int, int] = FULL_RANGE
    tile: int = 0
    tta: str = "none"

    def __post_init__(self):
        layout = memory_format(self.device, self.amp_dtype, 0)
        self.model = self.model.to(self.device).to(memory_format=layout).eval()
        self.tile = self.tile or min(TILE, math.isqrt(MAX_PROBABILITIES // len(self.classes)))

    def prepare(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (1, 3, *limited_size) normalised float32 on the device."""
        # A copy where it is read-only, as np.asarray(Image) is: torch would warn.
        small = np.require(shrink(image, self.max_side), requirements="W")
        x = torch.from_numpy(small).to(self.device)
        mean, std = torch.tensor([self.mean, self.std], device=self.device)
        return x.float().div_(255).sub_(mean).div_(std).permute(2, 0, 1)[None]

    def predict(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (H, W) uint8 class ids.

        Raises UserError if the network's outputs are not finite.
        """
        return self.predict_with_confidence(image)[0]

    def predict_with_confidence(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 RGB -> (H, W) uint8 class ids, and (H, W) uint8 probabilities of these
        classes, where 255 is 1. Raises UserError as `predict` does.
        """
        size = image.shape[:2]
        ids = np.empty(size, np.uint8)
        confidence = np.empty(size, np.uint8)
        for window, prob in self.parts(self.prepare(image), size):
            if prob[:, 0].isnan().any():  # softmax spreads it over all classes of a pixel
                raise UserError(NOT_FINITE)
            highest, index = prob[0].max(0)  # argmax takes six times as long on a CPU
            ids[window] = index.to(torch.uint8).cpu().numpy()
            confidence[window] = highest.mul(255).round().to(torch.uint8).cpu().numpy()
        return ids, confidence

    @torch.inference_mode()
    def parts(self, images: Tensor, size: tuple[int, int]) -> Iterator[Part]:
        """(N, 3, h, w) float32 normalised -> the parts of the images at ``size``, one by one: all
        classes of a large photograph would not fit in memory.
        """
        if size == images.shape[-2:]:
            yield from self._tiles(images)
        else:
            rows = max(1, self.tile**2 // size[1])
            yield from enlarge_by_rows(self.probabilities(images), size, rows)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32 normalised -> (N, C, H, W) float32 that sum to 1 over C."""
        size = images.shape[-2:]
        result = torch.empty(len(images), len(self.classes), *size, device=self.device)
        for window, prob in self._tiles(images):
            result[..., *window] = prob
        return result

    def _tiles(self, images: Tensor) -> Iterator[Part]:
        """(N, 3, H, W) float32 normalised -> the parts of the images, computed in tiles."""
        height, width = images.shape[-2:]
        for seen_rows, rows in tile_spans(height, self.tile):
            for seen_columns, columns in tile_spans(width, self.tile):
                prob = self._all_views(images[..., seen_rows, seen_columns])
                prob = prob.narrow(2, rows.start - seen_rows.start, rows.stop - rows.start)
                left = columns.start - seen_columns.start
                yield (rows, columns), prob.narrow(3, left, columns.stop - columns.start)

    def _all_views(self, images: Tensor) -> Tensor:
        """The mean of the probabilities over the resized and mirrored views of the images."""
        images = to_device(images, self.device)
        size = images.shape[-2:]
        total: Any = 0
        for scale, flip in TTA[self.tta]:
            scaled = tuple(max(1, round(side * scale)) for side in size)
            view = _resize(images.flip(-1) if flip else images, scaled, antialias=True)
            with torch.autocast(self.device.type, self.amp_dtype, self.amp_dtype is not None):
                logits = self.model(view)
            logits = logits.float()
            if self.classes.ignore_index < len(self.classes):
                logits[:, self.classes.ignore_index] = -torch.inf
            prob = _resize(logits.softmax(1), size)
            total += prob.flip(-1) if flip else prob
        return total.div_(len(TTA[self.tta]))


def tile_spans(side: int, tile: int) -> list[tuple[slice, slice]]:
    """(what a tile sees, what of it is kept) along a side of an image, in pixels.

    Tiles overlap by at least a quarter, and their edges, where context is missing, are dropped.
    They begin at multiples of 32, so that the network's strides fall on the same pixels as in the
    whole image: with tiles of 960 the U-Net's output is exact, because its receptive field is
    smaller than the 128 pixels that are dropped. That of the other encoders is larger.
    tile: at least 64.
    """
    step = max(32, tile * 3 // 4 // 32 * 32)
    starts = range(0, max(1, side - tile + step), step)
    cuts = [0, *(start + (tile - step) // 2 for start in starts[1:]), side]
    seen = [slice(start, min(start + tile, side)) for start in starts]
    return [(span, slice(*kept)) for span, kept in zip(seen, pairwise(cuts))]


def _resize(x: Tensor, size: tuple[int, ...], antialias: bool = False) -> Tensor:
    """Bilinear (N, C, H, W) -> (N, C, *size); the same tensor if it has that size."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=antialias)


def enlarge_by_rows(prob: Tensor, size: tuple[int, int], rows: int) -> Iterator[Part]:
    """(N, C, h, w) -> the bilinearly enlarged probabilities of ``rows`` rows at a time."""
    height, width = size
    last = prob.shape[2] - 1
    for top in range(0, height, rows):
        y = torch.arange(top, min(top + rows, height), device=prob.device)
        center = ((y + 0.5) * (prob.shape[2] / height) - 0.5).clamp(0, last)
        above = center.long()
        below = (above + 1).clamp_max(last)
        strip = prob[:, :, above].lerp(prob[:, :, below], (center - above)[:, None])
        yield (slice(top, top + len(y)), slice(width)), _resize(strip, (len(y), width))


def validate(
    predictor: Predictor, loader: DataLoader, on_batch: Callable[[Tensor], None] | None = None
) -> dict:
    """Score batches of (images (N, 3, H, W), masks (N, H', W')) at the size of the masks.

    on_batch: receives the predicted class ids (N, H', W') of every batch.
    Returns the metric's scores and ``loss``, the mean cross-entropy of the labelled pixels, NaN if
    there are none; under torchrun, those of the batches of all processes.
    Raises UserError if the network's outputs are not finite.
    """
    torch.backends.cudnn.benchmark = False  # it would look for kernels for every size of image
    classes = predictor.classes
    metric = SegmentationMetric(len(classes), classes.ignore_index)
    loss = torch.zeros((), device=predictor.device)
    for images, masks in progress(loader, desc="val", unit="batch"):
        masks = to_device(masks, predictor.device)
        ids = torch.empty_like(masks, dtype=torch.uint8)
        height, width = masks.shape[-2:]
        for window, prob in predictor.parts(images, (height, width)):
            ids[:, *window] = prob.max(1).indices
            mask = masks[:, *window]
            labelled = mask != classes.ignore_index
            target = torch.where(labelled, mask, 0).unsqueeze(1)
            of_target = prob.gather(1, target).squeeze(1)
            loss -= (of_target.clamp_min(1e-8).log() * labelled).sum()
        metric.update(ids, masks)
        if on_batch:
            on_batch(ids)
    metric.matrix = sum_over_processes(metric.matrix.to(predictor.device))
    loss = sum_over_processes(loss)
    if not loss.isfinite():
        raise UserError(NOT_FINITE)
    pixels = int(metric.matrix.sum())
    return metric.compute() | {"loss": loss.item() / pixels if pixels else math.nan}


def add_inference_flags(parser: Parser) -> None:
    """The flags of every command that runs a trained network."""
    parser.add_flags(
        "network",
        ("--checkpoint", Path, None, CHECKPOINT_HELP),
        ("--tta", tuple(TTA), "none", "average over mirrored and resized views"),
        ("--max_side", number(int, 0), None, MAX_SIDE_HELP),
        ("--tile", number(int, 64), 0, "side of a tile in px; 0: up to 960"),
    )
    add_device_flags(parser)
