"""From a data folder to pairs of image and mask for each split."""

import math
import re
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from support.command import UserError
from support.images import IMAGE_SUFFIXES


class Pair(NamedTuple):
    """The paths of an image and of its mask."""

    image: Path
    mask: Path


# Folders of images and masks without splits: milesial's, labelme's VOC export, CVAT's.
UNSPLIT = (
    ("images", "masks"),
    ("JPEGImages", "SegmentationClassPNG"),
    ("JPEGImages", "SegmentationClass"),
)
VAL_PERCENT = 10.0


def unsplit_folders(root: Path, split: str) -> tuple[Path, Path] | None:
    """The folders of images and masks that train and val share in a data folder without splits.

    None for any other split or data folder.
    """
    if split not in ("train", "val") or (root / "train").is_dir() or (root / "val").is_dir():
        return None
    for images, masks in UNSPLIT:
        if (root / images).is_dir() and (root / masks).is_dir():
            return root / images, root / masks
    return None


def list_splits(root: Path) -> list[str]:
    """Which of train, val and test a data folder has."""
    return [
        split
        for split in ("train", "val", "test")
        if unsplit_folders(root, split) or list(root.glob(f"{split}*"))
    ]


def find_folders(root: Path, split: str) -> tuple[Path, Path]:
    """The folders of a split's images and masks. Raises UserError if one is missing."""
    unsplit = unsplit_folders(root, split)
    if unsplit:
        return unsplit
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    images = root / split
    for masks in (root / f"{split}_labels", root / f"{split}annot"):
        if images.is_dir() and masks.is_dir():
            return images, masks
    raise UserError(f"{root}: needs the folders {split} and {split}_labels (or {split}annot)")


def find_pairs(image_dir: Path, mask_dir: Path) -> tuple[list[Pair], list[str]]:
    """Pair images and masks by stem, where a mask's may end in _L or _mask.

    Returns the pairs, sorted by stem, and one line for each file that has no partner.
    """
    problems: list[str] = []
    images = _files_by_stem(image_dir, problems)
    masks = _files_by_stem(mask_dir, problems, images)
    for stem in sorted(images.keys() ^ masks.keys()):
        path = images.get(stem) or masks[stem]
        partner = "mask" if stem in images else "image"
        problems.append(f"{path.parent.name}/{path.name}: has no {partner} of the same name")
    if not images and not masks:
        suffixes = " ".join(IMAGE_SUFFIXES)
        problems.append(f"{image_dir} and {mask_dir.name}: no images ({suffixes})")
    return [Pair(path, masks[stem]) for stem, path in images.items() if stem in masks], problems


def _files_by_stem(
    folder: Path, problems: list[str], images: Container[str] = ()
) -> dict[str, Path]:
    """The image files of a folder by stem; for masks, by the stem of their image."""
    paths: dict[str, Path] = {}
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        stem = path.stem
        if images and stem not in images:
            stem = stem.removesuffix("_L").removesuffix("_mask")
        other = paths.setdefault(stem, path)
        if other != path:
            problems.append(
                f"{folder.name}: {other.name} and {path.name} share the name {stem}; keep one"
            )
    return paths


def find_split(root: Path, split: str, val_percent: float) -> tuple[list[Pair], list[str], Path]:
    """The pairs of a split, one line for each problem, and the masks' folder.

    val_percent: percentage of the images of a folder without splits that become val.
    Raises UserError as `find_folders` does.
    """
    image_dir, mask_dir = find_folders(root, split)
    pairs, problems = find_pairs(image_dir, mask_dir)
    if pairs and unsplit_folders(root, split):
        held = held_out([pair.image.stem for pair in pairs], val_percent)
        pairs = [pair for pair in pairs if (pair.image.stem in held) == (split == "val")]
    return pairs, problems, mask_dir


def held_out(stems: list[str], percent: float) -> set[str]:
    """The stems of at least ``percent`` of the images, to validate on: the last ones by name.

    A random choice would put neighbouring frames of a video, which are nearly equal, into both
    splits.
    """
    wanted = min(len(stems) - 1, math.ceil(len(stems) * percent / 100))
    ordered = sorted(stems, key=lambda stem: (len(stem), stem))  # frame10 after frame9
    return set(ordered[len(stems) - wanted :])


def standard_split(stem: str) -> str | None:
    """The split of a CamVid frame in the literature, by its drive and number; None for others.

    Source: the lists of Badrinarayanan et al. 2017 (SegNet): 367, 101 and 233 frames.
    """
    if not re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?\d{5,6}", stem):
        return None
    if "0016E5_07959" <= stem <= "0016E5_08159":
        return "val"
    if "0001TP_008520" < stem < "0006R0" or stem.startswith("Seq05VD"):
        return "test"
    return "train"
