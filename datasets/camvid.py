"""CamVid and data in its layout: finds the folders of a split, pairs photographs with masks, reads them.

    root/train root/train_labels root/val root/val_labels …   masks in RGB colours (or ids with label_format="ids")
    root/train root/trainannot   root/val root/valannot …     the SegNet copy: ids 0 Sky … 10 Bicyclist, 11 void
"""
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

from datasets.classes import CAMVID, CAMVID32, UNKNOWN, ClassSet
from runtime import UserError

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
JPEG_SUFFIXES = (".jpg", ".jpeg")
LABEL_FORMATS = ("auto", "rgb", "ids", "segnet")


class Pair(NamedTuple):
    photo: Path
    label: Path


def find_classes(root: Path, data_name: str = "auto", label_format: str = "auto", num_classes: int | None = None,
                 ignore_class: str | None = None) -> ClassSet:
    """The classes of a data folder: its own class_dict.csv, or ``num_classes`` nameless ids, or CamVid's.

    Raises UserError where they cannot be known or are not ``num_classes`` many.
    """
    table = Path(root) / "class_dict.csv"
    if data_name == "camvid32":
        classes = CAMVID32
    elif data_name == "auto" and table.is_file():
        classes = ClassSet.from_csv(table)
    elif data_name == "auto" and label_format == "ids":
        if num_classes is None:
            raise UserError(f"--label_format ids: say how many classes there are with --num_classes N, or put a "
                            f"class_dict.csv (name,r,g,b) into {root}")
        if not 2 <= num_classes <= UNKNOWN:
            raise UserError(f"--num_classes {num_classes}: from 2 to {UNKNOWN} are possible")
        classes = ClassSet.numbered(num_classes)
    else:
        classes = CAMVID
    if num_classes not in (None, len(classes)):
        raise UserError(f"--num_classes {num_classes}: the data in {root} has {len(classes)} classes "
                        f"({', '.join(classes.names)}); leave the flag out")
    return classes.ignoring(ignore_class)


def find_folders(root: Path, split: str) -> tuple[Path, Path]:
    """The photographs' and the masks' folder of a split. Raises UserError if one is missing."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--data_root {root}: no such folder")
    photos = root / split
    labels = [folder for folder in (root / f"{split}_labels", root / f"{split}annot") if folder.is_dir()]
    if not photos.is_dir() or len(labels) != 1:
        found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folder"
        raise UserError(f"{root}: needs the folders {split} and one of {split}_labels or {split}annot, has {found}")
    return photos, labels[0]


def find_pairs(photo_dir: Path, label_dir: Path) -> tuple[list[Pair], list[str]]:
    """Photographs and masks with the same stem (a mask's may end in _L), sorted; and every problem found."""
    problems = []

    def by_stem(folder: Path, stem_of: Callable[[Path], str]) -> dict[str, Path]:
        groups = defaultdict(list)
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith("."):
                groups[stem_of(path)].append(path)
        for stem, paths in groups.items():
            if len(paths) > 1:
                problems.append(f"{folder.name}: {' and '.join(p.name for p in paths)} share the name {stem}; "
                                f"keep one of them")
        return {stem: paths[0] for stem, paths in groups.items()}

    photos = by_stem(photo_dir, lambda path: path.stem)
    labels = by_stem(label_dir, lambda path: path.stem if path.stem in photos else path.stem.removesuffix("_L"))
    problems += [f"{photo_dir.name}/{photos[stem].name}: no mask {stem}.png in {label_dir.name}"
                 for stem in photos if stem not in labels]
    problems += [f"{label_dir.name}/{labels[stem].name}: no photograph {stem}.* in {photo_dir.name}"
                 for stem in labels if stem not in photos]
    problems += [f"{label_dir.name}/{path.name}: JPEG changes the colours of a mask; save masks as PNG"
                 for path in sorted(label_dir.iterdir()) if path.suffix.lower() in JPEG_SUFFIXES]
    if not photos and not labels:
        problems.append(f"{photo_dir} and {label_dir.name}: no images ({' '.join(PHOTO_SUFFIXES)})")
    return [Pair(photos[stem], labels[stem]) for stem in photos if stem in labels], problems


def standard_split(stem: str) -> str | None:
    """The split of a CamVid frame in the literature, by its drive and number; None for any other file.

    Source: the lists of Badrinarayanan et al. 2017 (SegNet), 367, 101 and 233 frames.
    """
    match = re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)", stem)
    if match is None:
        return None
    drive, number = match[1], int(match[2])
    if drive == "0001TP":
        return "train" if number <= 8520 else "test"
    if drive == "0016E5":
        return "val" if 7959 <= number <= 8159 else "train"
    return {"0006R0": "train", "Seq05VD": "test"}[drive]


def open_image(path: Path) -> Image.Image:
    """The decoded first frame of an image file, upright by its EXIF tag. Raises UserError if it cannot be read."""
    try:
        # Through a file object: Pillow maps some TIFFs into memory, and then turns them wrongly.
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # broken files raise nearly anything in Pillow's decoders
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any 8-bit image as RGB, without its transparency."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of what the direct way loses
    return image.convert("RGB")


def read_photo(path: Path) -> np.ndarray:
    """A photograph as (H, W, 3) uint8 RGB, upright by its EXIF tag.

    Grey, palette, RGBA, CMYK and 16-bit files are converted. Raises UserError if it cannot be read.
    """
    image = open_image(path)
    if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(f"{path}: has 32 bits a pixel, whose range is anyone's guess; save it with 8 or 16")
    return np.array(to_rgb(image))


def resize_photo(photo: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8 -> (*size, 3), smoothed; None or its own size: as it is."""
    if size is None or photo.shape[:2] == tuple(size):
        return photo
    return np.array(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR))


def read_label(path: Path, classes: ClassSet, label_format: str) -> np.ndarray:
    """A mask as (H, W) uint8 ids, UNKNOWN (255) where a colour or id is in no class.

    label_format: ``rgb`` colours, ``ids`` pixel values, or ``segnet`` 0 Sky … 10 Bicyclist, 11 void.
    Raises UserError if it cannot be read, or has channels where ids are expected.
    """
    image = open_image(path)
    if label_format == "rgb":
        return classes.to_ids(np.asarray(to_rgb(image)))
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise UserError(f"{path}: a mask of ids has one channel, this is {image.mode}; use --label_format rgb")
    values = np.asarray(image).astype(np.int64)
    if label_format == "segnet":
        values = np.where(values == 11, 0, values + 1)
    return np.where((values >= 0) & (values < len(classes)), values, UNKNOWN).astype(np.uint8)


class CamVidDataset(Dataset):
    """One split of photographs with masks.

    ``dataset[index]`` is (image, mask): what ``transform(image=…, mask=…)`` makes of the uint8 arrays (H, W, 3) and
    (H, W) of class ids, the mask as int64; without a transform, those arrays. ``dataset[index, seed]`` seeds the
    transform, so that a sample does not depend on the worker that makes it.

    image_size: (H, W) to resize photographs to, masks too unless ``native_labels``.
    Raises UserError that lists every photograph and mask without its partner.
    """

    def __init__(self, root: Path, split: str, classes: ClassSet, transform: Callable | None = None,
                 label_format: str = "auto", image_size: tuple[int, int] | None = None, native_labels: bool = False):
        photo_dir, label_dir = find_folders(root, split)
        self.pairs, problems = find_pairs(photo_dir, label_dir)
        if problems:
            raise UserError(f"{root}: {len(problems)} problems\n  " + "\n  ".join(problems))
        self.classes = classes
        self.transform = transform
        self.label_format = resolve_label_format(label_format, label_dir, classes)
        self.image_size = image_size
        self.native_labels = native_labels
        self.cache = None  # a FrameCache to read from, instead of from the files

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 photograph and (H, W) uint8 ids, unknown colours as void."""
        if self.cache is not None:
            return self.cache.read(index)
        pair = self.pairs[index]
        image = resize_photo(read_photo(pair.photo), self.image_size)
        ids = read_label(pair.label, self.classes, self.label_format)
        ids[ids == UNKNOWN] = self.classes.void_id
        if not self.native_labels and ids.shape != image.shape[:2]:
            ids = np.array(Image.fromarray(ids).resize(image.shape[1::-1], Image.Resampling.NEAREST))
        return image, ids

    def __getitem__(self, key: int | tuple[int, int]):
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, mask = self.read(index)
        if self.transform is None:
            return image, mask
        if seed is not None:
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        sample = self.transform(image=image, mask=mask)
        return sample["image"], sample["mask"].long()


def resolve_label_format(label_format: str, label_dir: Path, classes: ClassSet) -> str:
    """``auto`` reads a folder called …annot as ids, SegNet's where the classes are CamVid's, any other as colours."""
    if label_format != "auto":
        return label_format
    if not label_dir.name.endswith("annot"):
        return "rgb"
    return "segnet" if classes == CAMVID else "ids"


class EpochSampler(Sampler):
    """Every index once, in an order that depends on the seed and the epoch alone, with a seed for its transform.

    A resumed run therefore sees the samples that an uninterrupted one would, with any number of workers. Of
    ``processes``, each takes every so-manieth, from its ``rank`` on; the first ones fill up the last round.
    """

    def __init__(self, size: int, seed: int = 0, rank: int = 0, processes: int = 1):
        self.size, self.seed, self.epoch = size, seed, 0
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return -(-self.size // self.processes)

    def order(self) -> list[int]:
        """The indices in the order of the current epoch, those of all processes."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        return (order * self.processes)[:len(self) * self.processes]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.order()[self.rank::self.processes]:
            yield index, hash((self.seed, self.epoch, index)) & 0xFFFFFFFF
