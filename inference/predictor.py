"""From images of any size to class ids or probabilities: precision, test-time augmentation and tiling."""
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from support.command import Parser, number
from support.device import autocast
from support.images import limited_size, shrink

TILE = 960  # pixels a side: whole CamVid frames fit, and a network of width 64 holds one in about 2 GB
MAX_PROBABILITIES = 64_000_000  # at once in evaluation, which holds a few copies: about a gigabyte
TTA = {
    "none": [(1.0, False)],
    "flip": [(1.0, False), (1.0, True)],
    "flip+scale": [(scale, flip) for scale in (0.75, 1.0, 1.25) for flip in (False, True)],
}


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Multiply every batch norm into the convolution registered just before it, in place, for inference alone.

    The modules must run in the order in which they are registered, as those of `model.py` do.
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
    tile: images larger than this many pixels on a side go through in overlapping tiles, blended.
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

        Of large images only a strip is in memory as floats and probabilities.
        """
        size = images[0].shape[:2]
        ids = np.empty((len(images), *size), np.uint8)
        if limited_size(size, self.max_side) == size:
            strips = self._strips(size[0], lambda rows: self.prepare([image[rows] for image in images]))
        else:
            strips = _resized_strips(self.probabilities(self.prepare(images)), size, max(1, self.tile ** 2 // size[1]))
        for rows, prob in strips:
            ids[:, rows] = most_probable(prob).to(torch.uint8).cpu().numpy()
            del prob  # before the next one is made
        return ids

    def __call__(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, 3, H, W) float32 normalised -> (N, H, W) int64 class ids, or (N, *size)."""
        return most_probable(self.probabilities(images, size))

    @torch.inference_mode()
    def probabilities(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, 3, H, W) float32 normalised -> (N, C, H, W) float32 that sum to 1 over C, or (N, C, *size)."""
        prob = [prob for _, prob in self._strips(images.shape[-2], lambda rows: images[:, :, rows])]
        return _resize(prob[0] if len(prob) == 1 else torch.cat(prob, 2), size or images.shape[-2:])

    def _strips(self, height: int, read: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """(rows, probabilities (N, C, rows, W)) from top to bottom; of strips that overlap, as tiles do, and blend.

        read: rows -> (N, 3, rows, W) float32 normalised.
        """
        starts, weight = _starts(height, self.tile), torch.zeros(height)
        if len(starts) == 1:
            yield slice(0, height), self._all_views(read(slice(0, height)))
            return
        for top in starts:
            weight[top:top + self.tile] += _ramp(self.tile, weight)
        below: Tensor | None = None  # what the strip above has added to this one's first rows
        for top, end in zip(starts, [*starts[1:], height]):
            prob = self._all_views(read(slice(top, top + self.tile)))
            prob *= _ramp(self.tile, prob)[:, None] / weight[top:top + self.tile, None].to(prob)
            if below is not None:
                prob[:, :, :below.shape[2]] += below
            below = prob[:, :, end - top:].clone()
            prob = prob[:, :, :end - top]
            yield slice(top, end), prob
            del prob  # before the next one is made

    def _all_views(self, images: Tensor) -> Tensor:
        """The mean of the probabilities over all views."""
        self.model.eval()
        images = images.to(self.device, non_blocking=True)
        first, *others = self.views
        total = self._view(images, *first)
        for view in others:
            total.add_(self._view(images, *view))
        return total.div_(len(self.views))

    def _view(self, images: Tensor, scale: float, flip: bool) -> Tensor:
        """The probabilities of the images seen at another scale, or mirrored."""
        view = images.flip(-1) if flip else images
        view = _resize(view, [max(1, round(side * scale)) for side in images.shape[-2:]], antialias=True)
        prob = _resize(self._tiled(view), images.shape[-2:])
        return prob.flip(-1) if flip else prob

    def _network(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.amp_dtype):
            logits = self.model(images)
        logits = logits.float()
        if self.ignore_index is not None and self.ignore_index < logits.shape[1]:
            logits[:, self.ignore_index] = -torch.inf
        return logits.softmax(1)

    def _tiled(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if max(height, width) <= self.tile:
            return self._network(images)
        total = weight = torch.zeros(())
        for top in _starts(height, self.tile):
            for left in _starts(width, self.tile):
                window = (..., slice(top, top + self.tile), slice(left, left + self.tile))
                prob = self._network(images[window])
                if total.ndim == 0:  # the first tile tells the number of classes
                    total = prob.new_zeros(*prob.shape[:2], height, width)
                    weight = prob.new_zeros(height, width)
                ramp = _ramp(prob.shape[-2], prob)[:, None] * _ramp(prob.shape[-1], prob)
                total[window] += prob * ramp
                weight[window] += ramp
        return total.div_(weight)


def most_probable(prob: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W) int64, as argmax(1), which takes six times as long on the CPU."""
    return prob.max(1).indices


def _starts(side: int, tile: int) -> list[int]:
    """Where tiles begin along a side: evenly spread, the last flush with the end, overlapping by a quarter or more."""
    if side <= tile:
        return [0]
    count = -(-(side - tile) // (tile * 3 // 4)) + 1
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, like: Tensor) -> Tensor:
    """(length,) blending weights that fall from the middle to both ends, where a tile lacks context."""
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    return torch.minimum(position + 1, length - position) / length


def _resize(x: Tensor, size: Sequence[int], antialias: bool = False) -> Tensor:
    """Bilinear (N, C, H, W) -> (N, C, *size); the very tensor where the size is already right."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)


def _resized_strips(prob: Tensor, size: tuple[int, int], rows: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, (N, C, rows, W)) of what `_resize` makes of (N, C, h, w), so many rows at a time."""
    height, width = size
    if height <= rows:
        yield slice(0, height), _resize(prob, size)
        return
    position = ((torch.arange(height) + 0.5) * (prob.shape[2] / height) - 0.5).clamp_(0, prob.shape[2] - 1)
    above, share = position.long(), position.frac().to(prob)[:, None]
    below = (above + 1).clamp_max(prob.shape[2] - 1)
    for top in range(0, height, rows):
        part = slice(top, min(height, top + rows))
        yield part, _resize(prob[:, :, above[part]].lerp(prob[:, :, below[part]], share[part]),
                            (part.stop - part.start, width))


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


def add_inference_flags(parser: Parser) -> None:
    """The flags of every command that runs a trained network."""
    add = parser.add_argument_group("network").add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="by default the newest checkpoint/*_best.pth, else the shipped")
    add("--tta", choices=TTA, default="none", help="test-time augmentation: average over mirrored and resized views")
    add("--max_side", type=number(int, 0), metavar="PX", help="shrink longer images to it before the network, and "
        "enlarge the result; 0: never; by default as in training")
    add("--tile", type=number(int, 64), default=TILE, metavar="PX", help="larger images go in overlapping tiles")
    add("--batch_size", type=number(int, 1), default=4, help="images of one size at a time")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto", help="mixed precision; auto: on CUDA, "
        "and bf16 on CPUs that multiply it")
