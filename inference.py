"""From images of any size to class ids or probabilities: precision, test-time augmentation and tiling."""
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runtime import OneLineParser, autocast, positive_int, select_amp_dtype, whole_number

TILE = 960  # pixels a side: whole CamVid frames fit, and a network of width 64 holds one in about 2 GB
TTA = {
    "none": [(1.0, False)],
    "flip": [(1.0, False), (1.0, True)],
    "flip+scale": [(scale, flip) for scale in (0.75, 1.0, 1.25) for flip in (False, True)],
}


def add_inference_flags(parser: OneLineParser) -> None:
    """The flags of every command that runs a trained network."""
    group = parser.add_argument_group("network")
    group.add_argument("--checkpoint", type=Path, metavar="FILE",
                       help="trained model; when not given: the newest checkpoint/*_best.pth, else the shipped one")
    group.add_argument("--tta", choices=TTA, default="none", help="average over mirrored and resized views")
    group.add_argument("--max_side", type=whole_number, metavar="PX",
                       help="larger images are shrunk to this longer side for the network: things then have the size "
                            "that it learnt; when not given: the longer side of the training frames; 0: never")
    group.add_argument("--tile", type=tile_size, default=TILE, metavar="PX",
                       help="larger images go through in overlapping tiles of this size; 0: never")
    group.add_argument("--batch_size", type=positive_int, default=4, help="images of one size at a time")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    group.add_argument("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto", help="mixed precision on CUDA")


def predictor_from_flags(args: Namespace, model: nn.Module, ignore_index: int | None, config: dict,
                         device: torch.device) -> "Predictor":
    """The Predictor that `add_inference_flags` ask for, of what `checkpoints.load_model` returned."""
    return Predictor(fold_batch_norm(model), ignore_index, **config["normalize"], device=device,
                     amp_dtype=select_amp_dtype(args.amp, device), tta=args.tta, tile=args.tile,
                     max_side=config["max_side"] if args.max_side is None else args.max_side)


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


def tile_size(text: str) -> int:
    """An argparse type: 0, or at least 64 pixels."""
    value = int(text)
    if value != 0 and value < 64:
        raise ArgumentTypeError(f"{value} is neither 0 nor at least 64")
    return value


class Predictor:
    """Runs a segmentation network over batches; never predicts ``ignore_index``.

    mean, std: of the channels, for `prepare`. tta: a key of TTA, whose views' probabilities are averaged.
    max_side: images longer than this many pixels are shrunk to it, the result enlarged again; 0 never.
    tile: images larger than this many pixels on a side go through in overlapping tiles, blended; 0 never.
    """

    def __init__(self, model: nn.Module, ignore_index: int | None, mean: tuple[float, ...], std: tuple[float, ...],
                 device: torch.device, amp_dtype: torch.dtype | None = None, tta: str = "none", tile: int = 0,
                 max_side: int = 0):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.ignore_index = ignore_index
        self.mean, self.std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (mean, std))
        self.device = device
        self.amp_dtype = amp_dtype
        self.views = TTA[tta]
        self.tile = tile
        self.max_side = max_side

    def shrinks(self, size: tuple[int, int]) -> bool:
        """Whether an image of that (height, width) is longer than ``max_side``."""
        return 0 < self.max_side < max(size)

    def prepare(self, photos: list[np.ndarray]) -> Tensor:
        """Photographs of one size, (H, W, 3) uint8 RGB -> (N, 3, H, W) normalised float32 on the device."""
        batch = torch.from_numpy(np.stack(photos)).to(self.device)
        return batch.permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)

    @torch.inference_mode()
    def __call__(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, 3, H, W) float32 normalised -> (N, H, W) int64 ids, or (N, *size)."""
        return most_probable(self.probabilities(images, size))

    @torch.inference_mode()
    def probabilities(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, 3, H, W) float32 normalised -> (N, C, H, W) float32 that sum to 1 over C, or (N, C, *size)."""
        self.model.eval()
        images, size = images.to(self.device, non_blocking=True), size or images.shape[-2:]
        if self.shrinks(images.shape[-2:]):
            factor = self.max_side / max(images.shape[-2:])
            images = _resize(images, [max(1, round(side * factor)) for side in images.shape[-2:]], antialias=True)
        total = None
        for scale, flip in self.views:
            view = images.flip(-1) if flip else images
            view = _resize(view, [max(1, round(side * scale)) for side in images.shape[-2:]], antialias=True)
            prob = _resize(self._tiled(view), images.shape[-2:])
            prob = prob.flip(-1) if flip else prob
            total = prob if total is None else total.add_(prob)
        return _resize(total.div_(len(self.views)), size)

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
        if not self.tile or max(height, width) <= self.tile:
            return self._network(images)
        total = weight = None
        for top in _starts(height, self.tile):
            for left in _starts(width, self.tile):
                window = (..., slice(top, top + self.tile), slice(left, left + self.tile))
                prob = self._network(images[window])
                if total is None:
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


def _resize(x: Tensor, size, antialias: bool = False) -> Tensor:
    """Bilinear (N, C, H, W) -> (N, C, *size); the very tensor where the size is already right."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)
