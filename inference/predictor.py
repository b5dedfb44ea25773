"""From images of any size to class ids or probabilities: precision, test-time augmentation and tiling."""
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from support.command import Parser, RunError, number
from support.device import autocast
from support.images import limited_size, shrink

Window = tuple[slice, slice]  # rows and columns
TILE = 960  # pixels a side: whole CamVid frames fit, and a network of width 64 holds one in about 2 GB
MAX_PROBABILITIES = 64_000_000  # at once in evaluation, which holds a few copies: about a gigabyte
NOT_FINITE = "the network's outputs are NaN or infinite; try --amp off, or retrain it"
TTA = {
    "none": [(1.0, False)],
    "flip": [(1.0, False), (1.0, True)],
    "flip+scale": [(scale, flip) for scale in (0.75, 1.0, 1.25) for flip in (False, True)],
}


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Multiply every batch norm into the convolution registered just before it, in place, for inference alone.

    The modules must run in the order in which they are registered, as those of `model.py` do: else the result is wrong.
    """
    module.eval()
    previous, conv = "", None
    for name, child in list(module.named_children()):
        if isinstance(conv, nn.Conv2d) and isinstance(child, nn.BatchNorm2d):
            setattr(module, previous, fuse_conv_bn_eval(conv, child))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norm(child)
        previous, conv = name, child
    return module


class Predictor:
    """Runs a segmentation network over batches; never predicts ``ignore_index``.

    mean, std: of the channels of images in 0 … 1, for `prepare`.
    max_side: `prepare` shrinks images whose longer side exceeds this many pixels to it, keeping their shape; 0: never.
    tile: images larger than this many pixels on a side go through in overlapping tiles; see `fitting_tile`.
    tta: a key of TTA, whose views' probabilities are averaged.
    """

    def __init__(self, model: nn.Module, ignore_index: int | None, mean: Sequence[float], std: Sequence[float],
                 device: torch.device | str = "cpu", amp_dtype: torch.dtype | None = None, max_side: int = 0,
                 tile: int = TILE, tta: str = "none"):
        self.device = torch.device(device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        self.ignore_index = ignore_index
        self.mean, self.std = (torch.tensor(value, device=self.device).view(3, 1, 1) for value in (mean, std))
        self.amp_dtype = amp_dtype
        self.max_side, self.tile, self.views = max_side, tile, TTA[tta]

    def prepare(self, images: list[np.ndarray]) -> Tensor:
        """Images of one size, (H, W, 3) uint8 RGB -> (N, 3, h, w) normalised float32 on the device, h and w of
        `limited_size`.
        """
        batch = torch.from_numpy(np.stack([shrink(image, self.max_side) for image in images])).to(self.device)
        return batch.permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)

    @torch.inference_mode()
    def predict(self, images: list[np.ndarray]) -> np.ndarray:
        """Images of one size, (H, W, 3) uint8 RGB -> (N, H, W) uint8 class ids.

        Raises RunError where the network's outputs are not finite.
        """
        size = images[0].shape[:2]
        if limited_size(size, self.max_side) == size:  # of large images only a tile is in memory as floats
            parts = self._tiles(size, lambda window: self.prepare([image[window] for image in images]))
        else:
            parts = self.parts(self.prepare(images), size)
        ids = np.empty((len(images), *size), np.uint8)
        for part, prob in parts:
            if prob[:, 0].isnan().any():  # softmax spreads it over all classes of its pixel
                raise RunError(NOT_FINITE)
            ids[:, *part] = most_probable(prob).cpu().numpy()
        return ids

    @torch.inference_mode()
    def parts(self, images: Tensor, size: tuple[int, int]) -> Iterator[tuple[Window, Tensor]]:
        """(N, 3, H, W) float32 normalised -> (rows and columns of a part, its probabilities (N, C, h, w)) of every part
        of the images at ``size``: all classes of a large photograph would not fit in memory.
        """
        if size == images.shape[-2:]:
            yield from self._tiles(size, lambda window: images[..., *window])
            return
        prob, (height, width) = self.probabilities(images), size
        last, rows = prob.shape[2] - 1, max(1, self.tile ** 2 // width)
        for top in range(0, height, rows):  # bilinear, as `_resize` is, but rows at a time
            y = torch.arange(top, min(top + rows, height), device=self.device)
            center = ((y + 0.5) * (prob.shape[2] / height) - 0.5).clamp(0, last)
            above = center.long()
            strip = prob[:, :, above].lerp(prob[:, :, (above + 1).clamp_max(last)], (center - above)[:, None])
            yield (slice(top, top + rows), slice(width)), _resize(strip, (len(y), width))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32 normalised -> (N, C, H, W) float32 that sum to 1 over C."""
        whole: Any = None
        for part, prob in self._tiles(images.shape[-2:], lambda window: images[..., *window]):
            whole = prob.new_empty(*prob.shape[:2], *images.shape[-2:]) if whole is None else whole
            whole[..., *part] = prob
        return whole

    def _tiles(self, size: Sequence[int], read: Callable[[Window], Tensor]) -> Iterator[tuple[Window, Tensor]]:
        """(rows and columns of a part, its probabilities (N, C, h, w)) of every part of images of that size.

        read: rows and columns -> (N, 3, h', w') float32 normalised.
        """
        for seen_rows, rows in tile_spans(size[0], self.tile):
            for seen_columns, columns in tile_spans(size[1], self.tile):
                prob = self._all_views(read((seen_rows, seen_columns)))
                top, left = rows.start - seen_rows.start, columns.start - seen_columns.start
                yield (rows, columns), prob[..., top:top + rows.stop - rows.start,
                                            left:left + columns.stop - columns.start]

    def _all_views(self, images: Tensor) -> Tensor:
        """The mean of the probabilities over all views."""
        self.model.eval()
        images = images.to(self.device, non_blocking=True)
        return reduce(Tensor.add_, (self._view(images, *view) for view in self.views)).div_(len(self.views))

    def _view(self, images: Tensor, scale: float, flip: bool) -> Tensor:
        """The probabilities of the images seen at another scale, or mirrored."""
        view = images.flip(-1) if flip else images
        view = _resize(view, [max(1, round(side * scale)) for side in images.shape[-2:]], antialias=True)
        prob = _resize(self._network(view), images.shape[-2:])
        return prob.flip(-1) if flip else prob

    def _network(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.amp_dtype):
            logits = self.model(images)
        logits = logits.float()
        if self.ignore_index is not None and self.ignore_index < logits.shape[1]:
            logits[:, self.ignore_index] = -torch.inf
        return logits.softmax(1)


def most_probable(prob: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W) uint8 class ids."""
    return prob.max(1).indices.to(torch.uint8)  # not argmax, which takes six times as long on the CPU


def tile_spans(side: int, tile: int) -> list[tuple[slice, slice]]:
    """(what a tile sees, the part of it that is kept) along a side of an image.

    Tiles overlap by a quarter or more, and their edges, where context is missing, are not kept. They begin at multiples
    of 32, so that the network's strides fall on the same pixels as in the whole image: tiles of 960 give the U-Net's
    very answer, because it sees less than the 128 pixels that are cut off. ResNet encoders see further.
    tile: at least 64.
    """
    step = max(32, tile * 3 // 4 // 32 * 32)
    starts = range(0, max(1, side - tile + step), step)
    cuts = [0, *(start + (tile - step) // 2 for start in starts[1:]), side]
    return [(slice(start, min(start + tile, side)), slice(*part)) for start, part in zip(starts, pairwise(cuts))]


def _resize(x: Tensor, size: Sequence[int], antialias: bool = False) -> Tensor:
    """Bilinear (N, C, H, W) -> (N, C, *size); the very tensor where the size is already right."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)


def predict_stream(predictor: Predictor, items: Iterable[tuple[str, np.ndarray]],
                   batch_size: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, (H, W, 3) uint8 image) -> (name, image, (H, W) uint8 class ids), in batches of images of one size.

    A batch has at most ``batch_size`` images and, but for a single one, the pixels of a tile.
    """
    batch: list[tuple[str, np.ndarray]] = []

    def run() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for (name, image), ids in zip(batch, predictor.predict([image for _, image in batch])):
            yield name, image, ids

    for name, image in items:
        height, width = image.shape[:2]
        if batch and (batch[0][1].shape != image.shape or len(batch) == batch_size
                      or (len(batch) + 1) * height * width > predictor.tile ** 2):
            yield from run()
            batch = []
        batch.append((name, image))
    if batch:
        yield from run()


def fitting_batch(batch_size: int, sizes: Collection[tuple[int, int]], num_classes: int) -> int:
    """How many images to score at once: one if their sizes (H, W) differ, and as many as MAX_PROBABILITIES allow."""
    if len(sizes) != 1:
        return 1
    (height, width), = sizes
    return max(1, min(batch_size, MAX_PROBABILITIES // (num_classes * height * width)))


def fitting_tile(num_classes: int) -> int:
    """The side of tiles of which MAX_PROBABILITIES allow all classes; TILE at most."""
    return min(TILE, math.isqrt(MAX_PROBABILITIES // num_classes))


def add_inference_flags(parser: Parser) -> None:
    """The flags of every command that runs a trained network."""
    add = parser.add_argument_group("network").add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="by default the newest checkpoint/*_best.pth, else the shipped")
    add("--tta", choices=TTA, default="none", help="test-time augmentation: average over mirrored and resized views")
    add("--max_side", type=number(int, 0), metavar="PX", help="shrink longer images to it before the network, and "
        "enlarge the result; 0: never; by default as in training")
    add("--tile", type=number(int, 64), metavar="PX", help=f"larger images go in overlapping tiles; by default {TILE}, "
        "and smaller ones for more than 69 classes")
    add("--batch_size", type=number(int, 1), default=4, help="images of one size at a time")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto", help="mixed precision; auto: on CUDA, "
        "and bf16 on CPUs that multiply it")
