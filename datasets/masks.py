"""What mask files hold: colours, blended colours or class ids, and how they are read."""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from datasets.classes import CAMVID, IGNORED, ClassSet
from support.command import UserError, progress
from support.images import open_image, to_rgb

SEGNET_IDS = (*range(1, 12), 0)  # of CAMVID, for the ids of the SegNet copy: 0 Sky … 11 void
MAX_COLORS = 160  # a class set has fewer; masks with more are photographs, or show objects
SOLID = 0.05  # share of a colour's pixels that have neighbours of that colour alone; blends have 0
SHIFT = 16  # distance of a class's colour from itself, because of JPEG


def read_mask(path: Path, classes: ClassSet, label_format: str) -> np.ndarray:
    """A mask as (H, W) uint8 class ids, 255 where a colour or id is in no class.

    label_format: ``rgb`` colours; ``nearest``, which takes the nearest known colour for every other
    one; ``ids``; or ``segnet``: ids 0 Sky … 10 Bicyclist, 11 void.
    Raises UserError if the file cannot be read, or is a JPEG or has colours where ids are expected.
    """
    image = open_image(path)
    if label_format in ("rgb", "nearest"):
        rgb = np.asarray(to_rgb(image))
        ids = classes.to_ids(rgb)
        unknown = ids == IGNORED
        if label_format == "nearest" and unknown.any():
            colors, index = np.unique(rgb[unknown], axis=0, return_inverse=True)
            ids[unknown] = classes.nearest_ids(colors)[index.ravel()]
        return ids
    if image.format == "JPEG":
        raise UserError(f"{path}: JPEG changes the ids of a mask; save masks as PNG")
    values = single_channel(image)
    if values is None:
        raise UserError(f"{path}: a mask of ids has one channel, this has colours")
    table = np.array([*_mask_ids(classes, label_format), IGNORED], np.uint8)
    known = (values >= 0) & (values < len(table) - 1)
    return table[np.where(known, values, -1)]


def _mask_ids(classes: ClassSet, label_format: str) -> tuple[int, ...]:
    """The class id of each value from 0 in a mask of ids."""
    return SEGNET_IDS if label_format == "segnet" else classes.mask_ids or (*range(len(classes)),)


def single_channel(image) -> np.ndarray | None:
    """The (H, W) int64 values of a mask with one channel, or with equal channels; else None."""
    values = np.asarray(image)
    if values.ndim == 3:
        if values.shape[2] < 3 or (values[..., :1] != values[..., 1:3]).any():
            return None
        values = values[..., 0]
    return values.astype(np.int64)


@dataclass
class Survey:
    """What a set of masks holds.

    colors: pixels of each colour, as 0xRRGGBB. solid: those whose eight neighbours have the same
    colour. values: pixels of each value, if all masks have a single channel. palette: whether any
    mask has a palette. annot: whether any is in a folder called …annot, as those of SegNet are.
    """

    colors: Counter[int] = field(default_factory=Counter)
    solid: Counter[int] = field(default_factory=Counter)
    values: Counter[int] = field(default_factory=Counter)
    palette: bool = False
    annot: bool = False

    @property
    def pixels(self) -> int:
        return self.colors.total()

    def unknown(self, classes: ClassSet) -> Counter[int]:
        """The pixels of each colour that no class has."""
        known = {packed(color) for color in classes.known_colors}
        return Counter({color: count for color, count in self.colors.items() if color not in known})

    def unknown_ids(self, classes: ClassSet, label_format: str) -> Counter[int]:
        """The pixels of each value that is no class's id, nor 255 for ignored pixels."""
        known = {*range(len(_mask_ids(classes, label_format))), IGNORED}
        return Counter({value: count for value, count in self.values.items() if value not in known})

    def fills_areas(self, color: int) -> bool:
        """Whether a colour has neighbours of itself, unlike a blend at an edge."""
        return self.solid[color] >= SOLID * self.colors[color]

    def are_blended(self) -> bool:
        """Whether few colours, but most pixels, are in areas, as with soft edges and JPEG."""
        areas = [*filter(self.fills_areas, self.colors)]
        covered = sum(self.colors[color] for color in areas)
        return len(areas) < len(self.colors) / 4 and covered > self.pixels / 2

    def flat_colors(self) -> list[int]:
        """The colours without blends and JPEG's noise, the most frequent first."""
        ordered = [color for color, _ in self.colors.most_common()]
        if not self.are_blended():
            return ordered
        flat: list[int] = []
        for color in filter(self.fills_areas, ordered):
            if is_far(color, flat):
                flat.append(color)
        return flat

    def strange_colors(self, classes: ClassSet) -> Counter[int]:
        """The pixels of each colour that fills areas and is not near any class's."""
        known = [*map(packed, classes.known_colors)]
        return Counter(
            {
                color: count
                for color, count in self.unknown(classes).items()
                if self.fills_areas(color) and is_far(color, known)
            }
        )

    def class_ids(self) -> int:
        """The number of classes if the masks surely hold ids, else 0.

        Few values far apart are colours, and so is 255 where it is too frequent to be ignored.
        """
        ids = {value: count for value, count in self.values.items() if value != IGNORED}
        if self.palette or len(ids) < 2 or self.are_blended():
            return 0
        rest = sum(ids.values()) - max(ids.values())
        if max(ids) >= min(IGNORED, 4 * len(ids)) or self.values[IGNORED] > rest:
            return 0
        return max(ids) + 1


def packed(color: Any) -> Any:
    """(r, g, b) -> 0xRRGGBB, for numbers or arrays."""
    r, g, b = color
    return r << 16 | g << 8 | b


def unpacked(colors: list[int]) -> np.ndarray:
    """(N,) 0xRRGGBB -> (N, 3) float64 (r, g, b)."""
    values = np.array(colors, np.int64)
    return np.stack([values >> 16, values >> 8 & 255, values & 255], axis=-1).astype(float)


def is_far(color: int, others: list[int]) -> bool:
    """Whether a colour differs from all others by more than JPEG's noise."""
    distances = np.linalg.norm(unpacked(others) - unpacked([color]), axis=1)
    return distances.min(initial=np.inf) > SHIFT


def survey_masks(paths: Iterable[Path]) -> Survey:
    """Count the colours and values of masks. Files that cannot be read are left out."""
    survey = Survey()
    single = True
    with ThreadPoolExecutor() as pool:
        for part in progress(pool.map(_survey_mask, paths), desc="colours", unit="mask"):
            survey.colors += part.colors
            survey.solid += part.solid
            survey.values += part.values
            survey.palette |= part.palette
            survey.annot |= part.annot
            single &= bool(part.values) or not part.colors
    return survey if single else replace(survey, values=Counter())


def _survey_mask(path: Path) -> Survey:
    try:
        image = open_image(path)
    except UserError:
        return Survey()
    values = single_channel(image)
    if image.mode.startswith("I") and values is not None:
        code = values.clip(0, 255) * 0x010101  # only 8 bits are colours
    else:
        code = packed(np.moveaxis(np.asarray(to_rgb(image), np.int32), -1, 0))
    inner = code[1:-1, 1:-1]
    height, width = inner.shape
    solid = np.ones(inner.shape, bool)
    for top, left in np.ndindex(3, 3):
        solid &= code[top : top + height, left : left + width] == inner
    return Survey(
        count_values(code),
        count_values(inner[solid]),
        Counter() if values is None else count_values(values),
        image.mode == "P",
        path.parent.name.endswith("annot"),
    )


def count_values(array: np.ndarray) -> Counter[int]:
    values, counts = np.unique(array, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist())))


def detect_format(survey: Survey, classes: ClassSet) -> str:
    """The label_format, of `read_mask`, that fits the masks."""
    unknown = survey.unknown(classes)
    black = survey.colors[0] * (0 not in unknown)  # which is also the id 0
    colored = survey.pixels - unknown.total() - black
    if survey.values and colored < unknown.total():
        return "segnet" if classes.names == CAMVID.names and survey.annot else "ids"
    blended = survey.are_blended() and not survey.strange_colors(classes)
    return "nearest" if unknown and blended else "rgb"


def find_stray(
    path: Path, classes: ClassSet, label_format: str, ids: np.ndarray
) -> tuple[Counter, int]:
    """How many pixels of a mask have each colour (r, g, b) or id that is in no class, and how many
    have a blended colour. ids: of `read_mask`.
    """
    if label_format != "nearest" and not (ids == IGNORED).any():
        return Counter(), 0
    survey = _survey_mask(path)
    if label_format in ("ids", "segnet"):
        return survey.unknown_ids(classes, label_format), 0
    unknown = survey.unknown(classes)
    stray = survey.strange_colors(classes) if label_format == "nearest" else unknown
    colors = unpacked([*stray]).astype(int).tolist()
    by_color = Counter(dict(zip(map(tuple, colors), stray.values())))
    return by_color, unknown.total() - stray.total()


def class_table(root: Path, survey: Survey) -> list[str]:
    """The lines of a class_dict.csv for the masks: their flat colours, the most frequent first, or
    the classes of their ids in Pascal VOC's colours.

    Raises UserError if there are no masks in ``root``, or no flat colours in them.
    """
    if count := survey.class_ids():
        colors = [packed(color) for color in ClassSet.numbered(count).colors]
        counts = [survey.values[i] for i in range(count)]
    else:
        colors = survey.flat_colors()
        counts = [survey.colors[color] for color in colors]
    if not 2 <= len(colors) <= MAX_COLORS:
        raise UserError(
            f"{root}: the masks hold {len(colors):,} colours; save them with a flat colour a class"
        )
    lines = ["name,r,g,b,pixels"]
    for i, (color, pixels) in enumerate(zip(colors, counts)):
        name = "Background" if color == 0 else f"class {i}"
        r, g, b = unpacked([color])[0].astype(int)
        lines.append(f"{name},{r},{g},{b},{pixels / survey.pixels:.2%}")
    return lines
