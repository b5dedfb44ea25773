"""From a data folder to pairs of image and mask for each split."""

import math
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from support.command import UserError
from support.images import IMAGE_SUFFIXES

VAL_PERCENT = 10.0


class Layout(NamedTuple):
    """Where the images and the masks of a split are.

    SPLIT stands for the name of a split, | separates alternatives, and * is the name that an image
    shares with its mask, subfolders included. Names of folders are compared without case.
    class_set: key of CLASS_SETS, for data without a file that names the classes.
    image_name: pattern of the images' names, without their suffix.
    """

    images: str
    masks: str
    class_set: str = ""
    image_name: str = ""


# The first one by which a folder has training pairs is taken.
LAYOUTS = (
    # Cityscapes; its scripts make labelTrainIds from the files of the download
    Layout("leftImg8bit/SPLIT/*_leftImg8bit", "gtFine/SPLIT/*_gtFine_labelTrainIds", "cityscapes"),
    Layout("leftImg8bit/SPLIT/*_leftImg8bit", "gtFine/SPLIT/*_gtFine_color", "cityscapes"),
    # CamVid and its copies; CVAT's and Datumaro's export "CamVid 1.0"
    Layout("SPLIT/*", "SPLIT_labels|SPLITannot|SPLIT_masks/*"),
    # Roboflow's "Semantic Segmentation Masks"; DeepGlobe
    Layout("SPLIT/*_sat", "SPLIT/*_mask"),
    Layout("SPLIT/*", "SPLIT/*_mask"),
    # MMSegmentation, ADE20K, and folders of one's own
    Layout("images|imgs|img_dir/SPLIT/*", "masks|labels|annotations|ann_dir/SPLIT/*"),
    Layout("SPLIT/images|imgs/*", "SPLIT/masks|labels|annotations/*"),
    Layout("images_prepped_SPLIT/*", "annotations_prepped_SPLIT/*"),
    # Pascal VOC 2012; CVAT's "Segmentation mask 1.1", labelme2voc
    Layout("JPEGImages/*", "SegmentationClass/*", "voc", r"20\d\d_\d{6}"),
    Layout("JPEGImages/*", "SegmentationClass|SegmentationClassPNG/*"),
    # folders without splits; fast.ai's CamVid; CamVid's own two archives
    Layout("images|imgs/*", "masks|labels|annotations/*"),
    Layout("701_StillsRaw_full/*", "LabeledApproved_full/*"),
)
SPLIT_NAMES = {
    "train": ("train", "training", "train2017", "default"),
    "val": ("val", "valid", "validation", "val2017"),
    "test": ("test", "testing", "test2017"),
}
# Where the name of an image ends in a line of a list.
LIST_ENDING = "(?i)(?:" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + r")(?:\s|$)"
# What may follow the image's name in that of its mask, where the layout does not say it.
MASK_ENDINGS = ("", "_mask", "_L", "_P", "_label", "_labels", "_gt", "_seg")


class Pair(NamedTuple):
    """The paths of an image and of its mask."""

    image: Path
    mask: Path


@dataclass
class Split:
    """The files of a split.

    unlabelled: images without a mask. problems: one line each, such as masks without an image.
    held_out: whether the pairs were taken from train.
    """

    pairs: list[Pair] = field(default_factory=list)
    unlabelled: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    held_out: bool = False


def split_name(text: str) -> str | None:
    """train, val or test for any of their names."""
    for split, names in SPLIT_NAMES.items():
        if text.casefold() in names:
            return split
    return None


def find_splits(root: Path, val_percent: float = VAL_PERCENT) -> tuple[Layout, dict[str, Split]]:
    """The layout of a data folder, and its splits by name: train, val and perhaps test.

    val_percent: percentage of the training images that become val in a folder without that split.
    Raises UserError if the folder has none of the layouts.
    """
    if not root.is_dir():
        if root.is_file():
            raise UserError(f"{root}: is not a folder; unpack it first")
        raise UserError(
            f"{root}: no such folder; to download CamVid: python -m datasets.download --out {root}"
        )
    found = match_layout(root)
    if found is None:
        if inner := inner_data(root):
            places = ", ".join(map(str, inner[:3])) + ", …" * (len(inner) > 3)
            raise UserError(f"{root}: the data is in {places}; give such a folder as --data_root")
        raise UserError(
            f"{root}: no known layout: it holds {describe_folder(root)}. Read are train/ with "
            f"train_labels/, images/ with masks/, and what labelling tools export; all layouts "
            f"are in docs/own-data.md"
        )
    layout, splits = found
    if [*splits] == ["train"]:
        splits = divide_by_names(splits["train"], find_lists(root))
    if "train" in splits and "val" not in splits:
        hold_out(splits, val_percent)
    return layout, splits


def inner_data(root: Path) -> list[Path]:
    """The folders up to two levels below ``root`` that have pairs in a known layout."""
    inner = sorted(path for path in (*root.glob("*"), *root.glob("*/*")) if path.is_dir())
    matches = ((path, match_layout(path)) for path in inner)
    return [path for path, match in matches if match and all_pairs(match[1])]


def all_pairs(splits: dict[str, Split]) -> list[Pair]:
    return [pair for split in splits.values() for pair in split.pairs]


def match_layout(root: Path) -> tuple[Layout, dict[str, Split]] | None:
    """The first layout by which a folder has training pairs, else any, and the splits it has."""
    other = None
    for layout in LAYOUTS:
        splits = read_splits(root, layout)
        if "train" in splits and splits["train"].pairs:
            return layout, splits
        if any(split.pairs or split.problems for split in splits.values()):
            other = other or (layout, splits)  # only test, or masks whose names fit no image
    return other


def read_splits(root: Path, layout: Layout) -> dict[str, Split]:
    """The splits whose images a folder has where the layout says it."""
    splits: dict[str, Split] = {}
    names = SPLIT_NAMES if "SPLIT" in layout.images else {"train": ("",)}
    for split in names:
        for name in names[split]:
            image_dir, images = list_files(root, layout.images, name)
            if images and re.match(layout.image_name, images[0].stem):
                mask_dir, masks = list_files(root, layout.masks, name)
                splits[split] = pair_files(layout, image_dir, images, mask_dir, masks)
                break
    return splits


def list_files(root: Path, pattern: str, split: str) -> tuple[Path, list[Path]]:
    """The first folder of a layout's pattern that has image files, and these."""
    folders = [root]
    *parts, ending = pattern.split("/")
    for part in parts:
        names = [name.replace("SPLIT", split).casefold() for name in part.split("|")]
        entries = [path for folder in folders for path in folder.iterdir()]
        inner = [path for path in entries if path.name.casefold() in names and path.is_dir()]
        folders = sorted(inner, key=lambda path: names.index(path.name.casefold()))
    for folder in folders:
        walk = os.walk(folder, followlinks=True)
        paths = sorted(Path(inner, name) for inner, _, names in walk for name in names)
        files = [
            path
            for path in paths
            if path.suffix.lower() in IMAGE_SUFFIXES
            and path.stem.endswith(ending.removeprefix("*"))
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
        if files:
            return folder, files
    return root, []


def pair_files(
    layout: Layout, image_dir: Path, images: list[Path], mask_dir: Path, masks: list[Path]
) -> Split:
    """Pair images and masks whose names are the same but for the layout's endings."""
    split = Split()
    if mask_dir == image_dir:
        images = sorted({*images} - {*masks})
    ending = layout.images.rpartition("*")[2]
    by_name: dict[str, Path] = {}
    for path in images:
        name = shared_name(path, image_dir).removesuffix(ending)
        add_unique(by_name, name, path, split.problems)
    mask_ending = layout.masks.rpartition("*")[2]
    endings = (mask_ending,) if mask_ending else MASK_ENDINGS
    mask_by_name: dict[str, Path] = {}
    for path in masks:
        name = shared_name(path, mask_dir)
        names = [name.removesuffix(ending) for ending in endings if name.endswith(ending)]
        names += [name.rpartition("/")[2] for name in names]  # masks one folder deeper than images
        image_name = next((name for name in names if name in by_name), None)
        if image_name is None:
            split.problems.append(f"{path}: has no image of the same name in {image_dir}")
        else:
            add_unique(mask_by_name, image_name, path, split.problems)
    for name, path in by_name.items():
        if name in mask_by_name:
            split.pairs.append(Pair(path, mask_by_name[name]))
        else:
            split.unlabelled.append(path)
    return split


def add_unique(paths: dict[str, Path], name: str, path: Path, problems: list[str]) -> None:
    other = paths.setdefault(name, path)
    if other != path:
        problems.append(
            f"{path.parent}: {other.name} and {path.name} share the name {name}; keep one"
        )


def shared_name(path: Path, folder: Path) -> str:
    """A file's name below the folder without its suffix, in one Unicode form."""
    return unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())


def describe_folder(root: Path) -> str:
    """What a folder holds, such as "imgs/ (12 .jpg), mask/ (12 .npy) and readme.txt"."""
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    names = []
    for path in entries[:8]:
        name = path.name
        if path.is_dir():
            kinds = Counter(file.suffix for file in path.rglob("*.*")).most_common(1)
            name += "/" + "".join(f" ({count} {kind})" for kind, count in kinds)
        names.append(name)
    if len(entries) > 8:
        names.append(f"{len(entries) - 8} more")
    *rest, last = names or ["nothing"]
    return f"{', '.join(rest)} and {last}" if rest else last


def find_lists(root: Path) -> dict[str, set[str]]:
    """The images in a folder's lists of its splits, such as ImageSets/Segmentation/val.txt or
    valid.txt: names without suffixes, with the folders that the lists give.
    """
    lists: dict[str, set[str]] = {}
    folders = ("ImageSets/Segmentation", "ImageSets", "")
    for path in (path for folder in folders for path in sorted((root / folder).glob("*.txt"))):
        split = split_name(path.stem)
        if split and split not in lists:
            text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\\", "/")
            lines = unicodedata.normalize("NFC", text).splitlines()
            # A line may have the path of the mask too.
            names = (re.split(LIST_ENDING, line.strip(), maxsplit=1)[0] for line in lines)
            lists[split] = {name.strip("/") for name in names} - {""}
    return lists


def divide_by_names(whole: Split, lists: dict[str, set[str]]) -> dict[str, Split]:
    """Divide a folder without splits as its lists say, or as the literature divides CamVid.

    Images that are in no list belong to train, or to no split if there is a list of train.
    """
    splits = {"train": Split(problems=whole.problems)}

    def split_of(image: Path) -> Split:
        parts = unicodedata.normalize("NFC", image.with_suffix("").as_posix()).split("/")
        names = {"/".join(parts[i:]) for i in range(len(parts))}
        listed = next((split for split in lists if names & lists[split]), None)
        if listed is None and "train" in lists:
            return Split()
        return splits.setdefault(listed or standard_split(image.stem) or "train", Split())

    for pair in whole.pairs:
        split_of(pair.image).pairs.append(pair)
    for image in whole.unlabelled:
        split_of(image).unlabelled.append(image)
    return splits


def hold_out(splits: dict[str, Split], percent: float) -> None:
    """Move at least ``percent`` of the training images to val: the last ones by name.

    A random choice would put neighbouring frames of a video, which are nearly equal, into both
    splits.
    """
    train = splits["train"]
    ordered = sorted(train.pairs, key=lambda pair: natural_key(pair.image.as_posix()))
    count = max(0, min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100)))
    held = {*ordered[len(ordered) - count :]}
    splits["val"] = Split([pair for pair in train.pairs if pair in held], held_out=True)
    train.pairs = [pair for pair in train.pairs if pair not in held]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts frame10 after frame9."""
    return [(int(text or 0), word) for word, text in re.findall(r"(\D*)(\d*)", name)]


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
