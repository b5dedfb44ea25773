"""A data folder: its classes, its files, their problems, its datasets."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.camvid import CamVidDataset, Sample
from datasets.classes import ClassSet
from datasets.layouts import Pair, Split, find_splits
from datasets.masks import find_stray, read_mask
from support.command import UserError, progress
from support.images import FULL_RANGE, open_image, shrink, to_array

MAX_STRAY = 0.01  # share of a mask's pixels that may have an unknown colour; they are ignored
KEPT_BYTES = 2 << 30  # of decoded images in each process; CamVid at 480×360 has 0.3 GB
TURNED = (
    "with an EXIF orientation, whose size does not tell whether their masks are turned too: "
    "look at the pictures of the run"
)


@dataclass
class SplitReport:
    """What one split holds.

    sizes: (height, width) -> number of images. pixels: (256,) int64 pixel counts of all masks by
    class id, unknown ones at 255. stray: name of a mask -> its pixels of unknown colour or id.
    blended: pixels of blended colours. notes: what holds for some images -> their number.
    samples: the decoded images and masks, or none of them where memory cannot hold all.
    """

    split: str
    pairs: Sequence[Pair] = ()
    problems: list[str] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    stray: Counter = field(default_factory=Counter)
    blended: int = 0
    notes: Counter = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What is to be known about the split's files, one line each."""
        notes = self.notes.items()
        lines = [f"{count} {'image' if count == 1 else 'images'} {note}" for note, count in notes]
        if self.blended:
            lines.append(f"{self.blended:,} pixels of blended colours take the nearest colour")
        if self.stray:
            masks = f"{len(self.stray)} masks, such as {min(self.stray)}"
            lines.append(f"{self.stray.total()} pixels of no class are ignored in {masks}")
        return [f"{self.split}: {line}" for line in lines]


class Reading(NamedTuple):
    """What `DataSpec` finds in one pair."""

    image: np.ndarray
    ids: np.ndarray
    stray: Counter
    blended: int
    notes: list[str]


@dataclass(frozen=True)
class DataSpec:
    """A data folder and how to read it.

    label_format: of `read_mask`.
    max_side: images with a longer side are shrunk to it, in pixels; 0 shrinks none.
    value_range: of 16-bit images, which becomes 0 … 255.
    found: the files of each split, if `find_splits` has found them already.
    reports: of the splits that have been checked.
    """

    root: Path
    classes: ClassSet
    label_format: str = "rgb"
    max_side: int = 0
    value_range: tuple[int, int] = FULL_RANGE
    found: dict[str, Split] | None = field(default=None, compare=False)
    reports: dict[str, SplitReport] = field(default_factory=dict, compare=False)

    @cached_property
    def splits(self) -> dict[str, Split]:
        return self.found or find_splits(self.root)[1]

    def find(self, split: str) -> SplitReport:
        """The pairs of a split, and the problems of its files' names."""
        report = SplitReport(split)
        found = self.splits.get(split)
        if found is None:
            report.problems.append(f"{self.root}: has no {split}, but {', '.join(self.splits)}")
            return report
        report.pairs = found.pairs
        report.problems += found.problems
        if found.held_out:
            report.notes["held out from the end of train, by name"] = len(found.pairs)
        if found.pairs and found.unlabelled:
            report.notes["without a mask, left out"] = len(found.unlabelled)
        if found.unlabelled and not found.pairs:
            image = found.unlabelled[0]
            remedy = "; without this folder, val is held out of train" if split == "val" else ""
            report.problems.append(
                f"{self.root}: none of the {len(found.unlabelled)} images of {split} has a mask "
                f"of the same name, such as {image.parent.name}/{image.name}{remedy}"
            )
        elif not found.pairs and not found.problems:
            report.problems.append(f"{self.root}: no images for {split}, by its lists or its size")
        return report

    def check(self, splits: Iterable[str]) -> dict[str, SplitReport]:
        """Decode every file of these splits once, and keep the result where memory allows.

        The reports list all problems. Raises UserError if the folder has no known layout.
        """
        reports = {split: self.find(split) for split in splits}
        room = KEPT_BYTES
        for report in reports.values():
            room -= self._decode(report, room)
        return reports

    def _decode(self, report: SplitReport, room: int) -> int:
        """Fill the report from its files; keep at most ``room`` bytes. Returns the bytes of all."""
        size = 0
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            readings = pool.map(self._read, report.pairs)
            bar = progress(readings, desc=f"reading {report.split}", total=len(report.pairs))
            for pair, reading in zip(report.pairs, bar):
                if isinstance(reading, UserError):
                    report.problems.append(str(reading))
                    continue
                self._add(report, pair, reading)
                size += reading.image.nbytes + reading.ids.nbytes
                if size <= room:
                    report.samples.append((reading.image, reading.ids))
        if len(report.samples) < len(report.pairs):
            report.samples.clear()
        any_scored = report.pixels[self.classes.scored].any()
        if report.split != "train" and report.pairs and not any_scored and not report.problems:
            report.problems.append(f"{report.split}: its masks hold no class, nothing to score")
        return size

    def _add(self, report: SplitReport, pair: Pair, reading: Reading) -> None:
        """Count what was read from a pair."""
        report.sizes[reading.ids.shape] += 1
        report.pixels += np.bincount(reading.ids.ravel(), minlength=256)
        report.blended += reading.blended
        report.notes.update(reading.notes)
        stray = reading.stray
        share = stray.total() / reading.ids.size
        if share > MAX_STRAY:
            common = ", ".join(f"{key} × {count:,}" for key, count in stray.most_common(4))
            report.problems.append(
                f"{pair.mask}: {share:.1%} of its pixels are in none of the classes: {common}; "
                f"complete the table of the classes, or check --label_format"
            )
        elif self.label_format == "nearest":
            report.blended += stray.total()
        elif stray:
            report.stray[pair.mask.name] = stray.total()

    def _read(self, pair: Pair) -> Reading | UserError:
        """A pair's image and class ids, and what is odd about them."""
        try:
            opened = open_image(pair.image)
            image = to_array(opened, pair.image, self.value_range)
            ids = read_mask(pair.mask, self.classes, self.label_format)
            notes = describe_image(opened, ids.shape)
            stray, blended = find_stray(pair.mask, self.classes, self.label_format, ids)
        except UserError as error:
            return error
        size = image.shape[:2]
        if ids.shape == size:
            return Reading(shrink(image, self.max_side), ids, stray, blended, notes)
        if opened.info["orientation"] > 4 and ids.shape == size[::-1]:
            return UserError(
                f"{pair.mask}: fits {pair.image.name} only without its EXIF orientation, which "
                f"turns it; turn the mask too, or remove the tag from the image"
            )
        return UserError(
            f"{pair.mask}: has (height, width) {ids.shape}, its image {size}; resize the mask by "
            f"nearest neighbour"
        )

    def problems(self, reports: dict[str, SplitReport]) -> list[str]:
        """What is wrong with single files, then with the classes as a whole."""
        problems = [problem for report in reports.values() for problem in report.problems]
        train = reports.get("train", SplitReport("train"))
        learnt = np.count_nonzero(train.pixels[self.classes.scored])
        if train.sizes and learnt < 2:
            problems.append(
                f"{self.root}: the masks of train, read as {self.label_format}, hold {learnt} "
                f"classes that are not ignored, and two are needed; see --label_format"
            )
        return problems

    def dataset(self, split: str, transform=None, native_masks: bool = False) -> CamVidDataset:
        """A split as a dataset. Raises UserError that lists every file without its partner."""
        report = self.reports.get(split) or self.find(split)
        if report.problems:
            raise UserError(*report.problems)
        return CamVidDataset(
            report.pairs,
            self.classes,
            transform,
            self.label_format,
            self.max_side,
            native_masks,
            self.value_range,
            report.samples,
        )


def describe_image(image: Image.Image, mask_shape: tuple[int, int]) -> list[str]:
    """What a user should know of an opened image: unread bands, an ambiguous orientation."""
    notes = []
    bands = image.info["bands"]
    opaque = image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)
    if bands > 3 and image.mode != "CMYK" and not opaque:
        notes.append(f"with {bands} channels, of which the first three are read, as RGB")
    if image.info["pages"] > 1:
        notes.append("with several pages, of which the first is read")
    quarter_turn = image.info["orientation"] > 4
    square = mask_shape[0] == mask_shape[1]
    if image.info["orientation"] > 1 and (square or not quarter_turn):
        notes.append(TURNED)
    return notes
