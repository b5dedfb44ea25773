"""Class sets: names, colours and ids of the classes, and the conversion of RGB masks to ids."""

import csv
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from support.command import UserError

Color = tuple[int, int, int]
IGNORED = 255  # the ignore_index of class sets without an ignored class; class ids end at 254
IGNORED_NAMES = ("unlabelled", "unlabeled", "void")


@dataclass(frozen=True)
class ClassSet:
    """The classes of a dataset; the id of a class is its position in ``names``.

    ignore_index: id of the pixels that are neither trained nor scored: that of the ignored class,
    which is never predicted, or 255 if there is none.
    aliases: further pairs of colour and id accepted in masks, such as those of merged classes.
    source: the class_dict.csv that they were read from, if they were.
    Raises UserError unless there are 2 to 255 classes, and a colour for each.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore_index: int = IGNORED
    aliases: tuple[tuple[Color, int], ...] = ()
    source: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        source = self.source or "num_classes"
        if not 2 <= len(self) <= IGNORED:
            raise UserError(f"{source}: {len(self)} classes; there must be 2 to {IGNORED}")
        values = np.reshape(self.colors, (len(self), 3))
        if values.min() < 0 or values.max() > 255:
            raise UserError(f"{source}: colours are numbers from 0 to 255")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def scored(self) -> list[int]:
        """The ids that are trained, scored and predicted."""
        return [i for i in range(len(self)) if i != self.ignore_index]

    def to_ids(self, rgb: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 colours -> (H, W) uint8 ids, 255 where a colour is in no class."""
        return _id_table(self)[*np.moveaxis(rgb, -1, 0)]

    def to_rgb(self, ids: np.ndarray) -> np.ndarray:
        """(...) ids -> (..., 3) uint8 colours; ids outside the set are black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colors
        return palette[ids]

    def to_dict(self) -> dict:
        """Plain lists for a checkpoint; `from_dict` reads them back. Aliases are left out."""
        return {
            "names": list(self.names),
            "colors": [list(color) for color in self.colors],
            "ignore_index": self.ignore_index,
        }

    @classmethod
    def from_dict(cls, data: dict) -> "ClassSet":
        """Raises UserError, or KeyError, TypeError or ValueError for what `to_dict` never wrote."""
        ignore_index = data.get("ignore_index")
        names = tuple(map(str, data["names"]))
        colors = tuple((int(r), int(g), int(b)) for r, g, b in data["colors"])
        return cls(names, colors, IGNORED if ignore_index is None else int(ignore_index))

    @classmethod
    def numbered(cls, count: int | None) -> "ClassSet":
        """``count`` nameless classes in Pascal VOC's colours. Raises UserError without a count."""
        if count is None:
            raise UserError(
                "masks of ids need --num_classes, or a class_dict.csv (name,r,g,b) in --data_root"
            )
        names = tuple(f"class {i}" for i in range(count))
        return cls(names, tuple(_voc_color(i) for i in range(count)))

    @classmethod
    def from_csv(cls, path: Path) -> "ClassSet":
        """Read a ``class_dict.csv`` with the columns name, r, g, b; ids follow the rows' order.

        A class called Unlabelled, Unlabeled or Void is ignored. A file with CamVid's 32 colours
        gives CAMVID. Raises UserError that lists every problem of the file.
        """
        problems = []
        names: list[str] = []
        colors: list[Any] = []
        for line, name, *channels in _read_rows(path):
            color = tuple(int(text) if text.isdecimal() else 256 for text in channels)
            if not name or max(color) > 255:
                problems.append(f"line {line}: needs a name and three numbers from 0 to 255")
            elif name in names or color in colors:
                problems.append(f"line {line}: the name or the colour of {name} appears twice")
            names.append(name)
            colors.append(color)
        if set(colors) == set(CAMVID32.colors):
            return replace(CAMVID, source=path)
        ignored = [i for i, name in enumerate(names) if name.lower() in IGNORED_NAMES]
        if len(ignored) > 1:
            problems.append(f"{len(ignored)} classes are ignored by their names; keep one")
        if problems:
            raise UserError(f"{path}: {'; '.join(problems)}")
        ignore_index = ignored[0] if ignored else IGNORED
        return cls(tuple(names), tuple(colors), ignore_index, source=path)


def _read_rows(path: Path) -> list[list]:
    """[line number, name, r, g, b] of every row that is not empty; all but the number as text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a CSV file in UTF-8 ({error})") from None
    reader = csv.DictReader(lines, restval="", skipinitialspace=True)
    reader.fieldnames = [column.strip().lower() for column in reader.fieldnames or ()]
    columns = ("name", "r", "g", "b")
    if not set(columns) <= set(reader.fieldnames):
        raise UserError(f"{path}: the first line must be name,r,g,b")
    return [[reader.line_num, *(row[column].strip() for column in columns)] for row in reader]


def _voc_color(i: int) -> Color:
    """Three bits of the id at a time, lowest first, give the next bit of red, green and blue."""
    bits = f"{i:09b}"[::-1]
    red, green, blue = (int(bits[channel::3] + "00000", 2) for channel in range(3))
    return red, green, blue


@lru_cache(maxsize=4)
def _id_table(classes: ClassSet) -> np.ndarray:
    """(256, 256, 256) uint8: the id of every colour (red, green, blue)."""
    table = np.full((256, 256, 256), IGNORED, np.uint8)
    for class_id, color in enumerate(classes.colors):
        table[color] = class_id
    for color, class_id in classes.aliases:
        table[color] = class_id
    return table


# CamVid's 32 classes: name, colour, and for all but the first 12 the class that the literature
# merges them into. Those 12 are the ignored one and the 11 of the literature, in the order of the
# SegNet copy. The two lines at the end are colours of the 11 classes in other copies.
_CAMVID = """
Unlabelled          0   0   0
Sky               128 128 128
Building          128   0   0
Pole              192 192 128
Road              128  64 128
Sidewalk            0   0 192
Tree              128 128   0
SignSymbol        192 128 128
Fence              64  64 128
Car                64   0 128
Pedestrian         64  64   0
Bicyclist           0 128 192
Bridge              0 128  64 Building
Wall               64 192   0 Building
Tunnel             64   0  64 Building
Archway           192   0 128 Building
TrafficCone         0   0  64 Pole
LaneMkgsDriv      128   0 192 Road
LaneMkgsNonDriv   192   0  64 Road
ParkingBlock       64 192 128 Sidewalk
RoadShoulder      128 128 192 Sidewalk
VegetationMisc    192 192   0 Tree
Misc_Text         128 128  64 SignSymbol
TrafficLight        0  64  64 SignSymbol
SUVPickupTruck     64 128 192 Car
Truck_Bus         192 128 192 Car
Train             192  64 128 Car
OtherMoving       128  64  64 Car
Child             192 128  64 Pedestrian
CartLuggagePram    64   0 192 Pedestrian
Animal             64 128  64 Pedestrian
MotorcycleScooter 192   0 192 Bicyclist
Sidewalk           60  40 222 Sidewalk
Road              255  69   0 Road
"""


def _camvid() -> tuple[ClassSet, ClassSet]:
    """The 11 classes of the literature, which accept all colours above, and the original 32."""
    rows = [line.split() for line in _CAMVID.strip().splitlines()]
    names = tuple(row[0] for row in rows)
    colors = tuple((int(r), int(g), int(b)) for _, r, g, b, *_ in rows)
    aliases = tuple((color, names.index(row[4])) for row, color in zip(rows[12:], colors[12:]))
    original = ClassSet(("Void", *names[1:32]), colors[:32], ignore_index=0)
    return ClassSet(names[:12], colors[:12], ignore_index=0, aliases=aliases), original


CAMVID, CAMVID32 = _camvid()
