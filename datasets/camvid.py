"""CamVid, and any dataset in its layout: reads, resizes and transforms one sample at a time."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from datasets.classes import IGNORED, ClassSet
from datasets.layouts import Pair
from datasets.masks import read_mask
from support.images import FULL_RANGE, read_image, shrink

Sample = tuple[np.ndarray, np.ndarray]  # (H, W, 3) uint8 image, (H, W) uint8 class ids


@dataclass(eq=False, repr=False)
class CamVidDataset(Dataset):
    """Images with masks: one split.

    ``dataset[index]`` is (image, mask): uint8 arrays (H, W, 3) and (H, W) of class ids, or what
    ``transform(image=…, mask=…)`` makes of them, then with an int64 mask. ``dataset[index, seed]``
    seeds the transform, so that a sample does not depend on the process that reads it.

    label_format: of `read_mask`.
    max_side: images with a longer side are shrunk to it, in pixels, and their masks too unless
    ``native_masks``; 0 shrinks none.
    value_range: of 16-bit images, which becomes 0 … 255.
    decoded: the samples at their own size, if they have been read already.
    """

    pairs: Sequence[Pair]
    classes: ClassSet
    transform: Callable | None = None
    label_format: str = "rgb"
    max_side: int = 0
    native_masks: bool = False
    value_range: tuple[int, int] = FULL_RANGE
    decoded: Sequence[Sample] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"decoded": ()}  # a spawned worker reads the files

    def read(self, index: int) -> Sample:
        """The image and class ids of one pair; unknown colours have the ``ignore_index``."""
        if self.decoded:
            image, mask = (array.copy() for array in self.decoded[index])
        else:
            image = read_image(self.pairs[index].image, self.value_range)
            mask = read_mask(self.pairs[index].mask, self.classes, self.label_format)
        mask[mask == IGNORED] = self.classes.ignore_index
        if not self.native_masks:
            mask = shrink(mask, self.max_side)
        return shrink(image, self.max_side), mask

    def __getitem__(self, key: int | tuple[int, int]):
        index, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2**32, ())))
        image, mask = self.read(index)
        if self.transform is None:
            return image, mask
        if hasattr(self.transform, "set_random_state"):
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        sample = self.transform(image=image, mask=mask)
        return sample["image"], sample["mask"].long()


class EpochSampler(DistributedSampler):
    """(index, seed of its transform) of every sample, in an order of ``seed`` and epoch alone.

    A resumed run sees the same samples as an uninterrupted one, with any number of workers.
    """

    def __init__(self, size: int, seed: int = 0, rank: int = 0, processes: int = 1):
        # torch's sampler asks the dataset for its length alone, and adds the epoch to the seed.
        super().__init__(range(size), processes, rank, seed=seed * 1_000_003)  # type: ignore

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in super().__iter__():
            yield index, hash((self.seed // 1_000_003, self.epoch, index)) & 0xFFFFFFFF
