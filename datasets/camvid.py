"""CamVid, and any dataset in its layout: finds the folders of a split, pairs images with masks, reads them.

    root/train root/train_labels root/val root/val_labels …   masks in RGB colours (or ids with label_format="ids")
    root/train root/trainannot   root/val root/valannot …     the SegNet copy: ids 0 Sky … 10 Bicyclist, 11 void
    root/images root/masks                                    one folder, of which a part is held out for validation
"""
import math
import os
import random
import re
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from datasets.classes import CAMVID, CAMVID32, UNKNOWN, ClassSet
from support.command import UserError, printable, progress
from support.images import IMAGE_SUFFIXES, open_image, read_image, shrink, to_rgb

Pair = namedtuple("Pair", ("image", "mask"))  # two paths
# Folders without splits: milesial's, labelme's VOC export, CVAT's.
UNSPLIT = (("images", "masks"), ("JPEGImages", "SegmentationClassPNG"), ("JPEGImages", "SegmentationClass"))
VAL_PERCENT = 10.0


def find_classes(root: Path, data_name: str = "auto", label_format: str = "auto",
                 num_classes: int | None = None) -> ClassSet:
    """The classes of a data folder: those of its class_dict.csv, else ``num_classes`` nameless ids, else CamVid's.

    Raises UserError if they cannot be known or are not ``num_classes`` many.
    """
    table = Path(root) / "class_dict.csv"
    classes = CAMVID32 if data_name == "camvid32" else CAMVID
    if data_name == "auto" and os.path.lexists(table):
        classes = ClassSet.from_csv(table)
    elif data_name == "auto" and label_format == "ids":
        classes = ClassSet.numbered(num_classes)
    if num_classes not in (None, len(classes)):
        advice = "leave it out" if classes.source or data_name != "auto" else (
            f"python -m datasets.check --data_root {root} --write_classes writes a class_dict.csv of the colours of "
            f"other masks, and --label_format ids reads masks of class ids")
        known = f"{classes.source or 'CamVid'} has {len(classes)} classes"
        raise UserError(f"num_classes {num_classes}: {known}; {advice}")
    return classes


def find_folders(root: Path, split: str) -> tuple[Path, Path]:
    """The folders of a split's images and masks. Raises UserError if one is missing."""
    images, labels, annot = (Path(root, f"{split}{end}") for end in ("", "_labels", "annot"))
    unsplit = [pair for pair in UNSPLIT if all(Path(root, name).is_dir() for name in pair)]
    if unsplit and split in ("train", "val") and not any(Path(root, name).is_dir() for name in ("train", "val")):
        return Path(root, unsplit[0][0]), Path(root, unsplit[0][1])
    if not images.is_dir() or labels.is_dir() == annot.is_dir():
        needed = f"needs the folders {split} and either {split}_labels or {split}annot, not both"
        raise UserError(f"{root}: {needed if Path(root).is_dir() else 'no such folder'}")
    return images, labels if labels.is_dir() else annot


def find_pairs(image_dir: Path, mask_dir: Path) -> tuple[list[Pair], list[str]]:
    """Images and masks with the same stem (a mask's may end in _L), sorted by it; and every problem found."""
    images: dict[str, Path] = {}  # by stem
    masks: dict[str, Path] = {}
    problems = []
    for folder, paths in ((image_dir, images), (mask_dir, masks)):
        for path in sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES):
            stem = path.stem
            if folder == mask_dir and stem not in images:
                stem = stem.removesuffix("_L").removesuffix("_mask")
            if paths.setdefault(stem, path) != path:
                problems.append(f"{folder.name}: {paths[stem].name} and {path.name} share the name {stem}; keep one")
    problems += [f"{path.parent.name}/{path.name}: has no {'mask' if stem in images else 'image'} of the same name"
                 for stem, path in (images | masks).items() if not (stem in images and stem in masks)]
    if not images and not masks:
        problems.append(f"{image_dir} and {mask_dir.name}: no images ({' '.join(IMAGE_SUFFIXES)})")
    return [Pair(path, masks[stem]) for stem, path in images.items() if stem in masks], [*map(printable, problems)]


def find_split(root: Path, split: str, val_percent: float | None = None) -> tuple[list[Pair], list[str], Path]:
    """The pairs of a split, every problem found, and the masks' folder. Raises UserError as `find_folders` does.

    val_percent: of the images of a folder without splits for val, by default VAL_PERCENT.
    """
    image_dir, mask_dir = find_folders(root, split)
    pairs, problems = find_pairs(image_dir, mask_dir)
    if image_dir != Path(root, split):
        held = held_out([pair.image.stem for pair in pairs], val_percent or VAL_PERCENT)
        pairs = [pair for pair in pairs if (pair.image.stem in held) == (split == "val")]
        if not pairs and not problems:
            problems = [f"{root}: has too few images for training and validation"]
    return pairs, problems, mask_dir


def held_out(stems: list[str], percent: float) -> set[str]:
    """The names of at least ``percent`` of the images: the smallest groups whose names differ only in the number at
    their end, whole, because neighbouring frames of a video are nearly equal; of the largest at most its last images.
    """
    wanted = min(len(stems) - 1, math.ceil(len(stems) * percent / 100))
    held, groups = set[str](), dict[str, list[str]]()
    for stem in sorted(stems, key=lambda stem: (len(stem), stem)):  # frame10 after frame9
        groups.setdefault(stem.rstrip("0123456789"), []).append(stem)
    *smaller, largest = sorted(groups.values(), key=len)
    for group in smaller:
        if len(held) < wanted:
            held.update(group)
    return held | set(largest[len(largest) - max(0, wanted - len(held)):])


def standard_split(stem: str) -> str | None:
    """The split of a CamVid frame in the literature, by its drive and number; None for any other file.

    Source: the lists of Badrinarayanan et al. 2017 (SegNet): 367, 101 and 233 frames.
    """
    if not re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?\d{5,6}", stem):
        return None
    if "0016E5_07959" <= stem <= "0016E5_08159":
        return "val"
    return "test" if "0001TP_008520" < stem < "0006R0" or stem.startswith("Seq05VD") else "train"


def resolve_label_format(label_format: str, mask_dir: Path, classes: ClassSet) -> str:
    """``auto`` reads a folder called …annot as ids, SegNet's if the classes are CamVid's, any other as colours."""
    by_folder = "rgb" if not mask_dir.name.endswith("annot") else "segnet" if classes == CAMVID else "ids"
    return by_folder if label_format == "auto" else label_format


def read_mask(path: Path, classes: ClassSet, label_format: str) -> np.ndarray:
    """A mask as (H, W) uint8 class ids, UNKNOWN (255) where a colour or id is in no class.

    label_format: ``rgb`` colours, ``ids`` pixel values, or ``segnet`` 0 Sky … 10 Bicyclist, 11 void.
    Raises UserError if the file cannot be read, is a JPEG, or has colours where ids are expected.
    """
    image = open_image(path)
    if image.format == "JPEG":
        raise UserError(f"{path}: JPEG changes the colours of a mask; save masks as PNG")
    if label_format == "rgb":
        return classes.to_ids(np.asarray(to_rgb(image)))
    values = np.asarray(image).astype(np.int64)
    if values.ndim != 2:
        raise UserError(f"{path}: a mask of ids has one channel, this is {image.mode}; use label_format rgb")
    known = (values >= 0) & (values < len(classes))
    # SegNet's ids are one lower, and void, class 0 here, is the last of them.
    return np.where(known, (values + (label_format == "segnet")) % len(classes), UNKNOWN).astype(np.uint8)


class CamVidDataset(Dataset):
    """One split: images with masks.

    ``dataset[index]`` is (image, mask): uint8 arrays (H, W, 3) and (H, W) of class ids, or what
    ``transform(image=…, mask=…)`` makes of them, then with an int64 mask. ``dataset[index, seed]`` seeds the
    transform, so that a sample does not depend on the process that reads it.

    max_side: longer images are shrunk to it, in pixels, and so are masks unless ``native_masks``; 0 shrinks none.
    val_percent: of the images of a folder without splits for val.
    Raises UserError that lists every image and mask without its partner.
    """

    def __init__(self, root: Path, split: str, classes: ClassSet, transform: Any = None,
                 label_format: str = "auto", max_side: int = 0, native_masks: bool = False,
                 val_percent: float | None = None):
        self.pairs, problems, mask_dir = find_split(root, split, val_percent)
        if problems:
            raise UserError(f"{root}: {len(problems)} problems", *problems)
        self.classes, self.transform = classes, transform
        self.label_format = resolve_label_format(label_format, mask_dir, classes)
        self.max_side, self.native_masks = max_side, native_masks
        self.kept: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 image and (H, W) uint8 class ids from their files, unknown colours as void."""
        pair = self.pairs[index]
        mask = read_mask(pair.mask, self.classes, self.label_format)
        mask[mask == UNKNOWN] = self.classes.void_id
        return shrink(read_image(pair.image), self.max_side), shrink(mask, 0 if self.native_masks else self.max_side)

    def keep_decoded(self) -> None:
        """Read all samples once and keep them in memory, which data loader workers share if they are forked."""
        with ThreadPoolExecutor() as pool:
            self.kept = [*progress(pool.map(self.read, range(len(self))), desc="decoding", total=len(self))]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": []}  # a spawned worker reads the files

    def __getitem__(self, key: int | tuple[int, int]):
        index, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2**32, ())))
        image, mask = map(np.copy, self.kept[index]) if self.kept else self.read(index)
        if self.transform is None:
            return image, mask
        if hasattr(self.transform, "set_random_state"):
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        sample = self.transform(image=image, mask=mask)
        return sample["image"], sample["mask"].long()


class EpochSampler(DistributedSampler):
    """(index, seed of its transform) of every sample once, in an order that depends on ``seed`` and ``epoch`` alone.

    A resumed run therefore sees the same samples as an uninterrupted one, with any number of data loader workers.
    Of ``processes`` the one of ``rank`` takes every processes-th sample, as torch's own sampler has it.
    """

    def __init__(self, size: int, seed: int = 0, rank: int = 0, processes: int = 1):
        # It asks the dataset for its length alone, and adds the epoch to the seed.
        super().__init__(range(size), processes, rank, seed=seed * 1_000_003)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in super().__iter__():
            yield index, hash((self.seed // 1_000_003, self.epoch, index)) & 0xFFFFFFFF
