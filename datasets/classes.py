"""Class sets: the names, colours and ids of the classes, and the conversion of RGB masks to class ids and back."""
import csv
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from support.command import UserError, printable

Color = tuple[int, int, int]
UNKNOWN = 255  # marks a pixel whose colour or id is in no class; class ids end at 254
IGNORED_NAMES = ("unlabelled", "unlabeled", "void")


@dataclass(frozen=True)
class ClassSet:
    """The classes of a dataset; the id of a class is its position in ``names``.

    ignore_index: id of the class that is neither trained, scored nor predicted, or None.
    aliases: further pairs of colour and id accepted in masks, such as those of merged classes.
    source: the class_dict.csv that they were read from, if they were.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore_index: int | None = None
    aliases: tuple[tuple[Color, int], ...] = ()
    source: Path | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def void_id(self) -> int:
        """The id of pixels without a class: the ignored class, or 255 if no class is ignored."""
        return UNKNOWN if self.ignore_index is None else self.ignore_index

    @property
    def scored(self) -> list[int]:
        """The ids that are trained, scored and predicted."""
        return [i for i in range(len(self)) if i != self.ignore_index]

    def to_ids(self, rgb: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 colours -> (H, W) uint8 ids, UNKNOWN (255) where a colour is in no class."""
        import cv2  # here, because predict.py starts sooner without it
        table = _color_table((*zip(self.colors, range(len(self))), *self.aliases))
        # A pixel with an alpha of 255, read as one int32, is its code - 2**24: an index from the end of the table.
        return table.take(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGRA).view(np.int32)[..., 0])

    def to_rgb(self, ids: np.ndarray) -> np.ndarray:
        """(...) ids -> (..., 3) uint8 colours; ids outside the set are black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colors
        return palette[ids]

    def to_dict(self) -> dict:
        """Plain lists for a checkpoint; `from_dict` reads them back. Aliases are left out."""
        return {"names": list(self.names), "colors": list(map(list, self.colors)), "ignore_index": self.ignore_index}

    @classmethod
    def from_dict(cls, data: dict) -> "ClassSet":
        return cls(tuple(map(printable, data["names"])), tuple(map(tuple, data["colors"])), data["ignore_index"])

    @classmethod
    def numbered(cls, count: int | None) -> "ClassSet":
        """``count`` nameless classes in the colours of Pascal VOC's colour map. Raises UserError without a count."""
        if count is None or not 2 <= count <= UNKNOWN:
            raise UserError(f"num_classes is {count}: masks of ids need a number of classes from 2 to {UNKNOWN}, or a "
                            f"class_dict.csv (name,r,g,b) in the data folder")
        def color(i: int) -> Color:
            # Each three bits of the id, lowest first, give the next high bit of red, green and blue.
            red, green, blue = (sum((i >> (3 * k + c) & 1) << (7 - k) for k in range(3)) for c in range(3))
            return red, green, blue
        return cls(tuple(f"class {i}" for i in range(count)), tuple(map(color, range(count))))

    @classmethod
    def from_csv(cls, path: Path) -> "ClassSet":
        """Read a ``class_dict.csv`` with the columns name, r, g, b; the class ids follow the order of the rows.

        A class called Unlabelled, Unlabeled or Void is ignored. A file with CamVid's 32 colours gives CAMVID.
        Raises UserError that lists every problem of the file.
        """
        rows, problems = _read_rows(path), []
        colors: dict[Any, str] = {}
        for line, name, *channels in rows:
            color = tuple(int(text) if text.isdecimal() and len(text) <= 3 else 256 for text in channels)
            if not name or max(color) > 255:
                problems.append(f"line {line}: needs a name and three whole numbers from 0 to 255")
            elif name in colors.values():
                problems.append(f"line {line}: the name {name} appears twice")
            elif colors.setdefault(color, name) != name:
                problems.append(f"line {line}: {name} has the colour of {colors[color]}")
        if not 2 <= len(rows) <= UNKNOWN:
            problems.append(f"{len(rows)} classes; there must be 2 to {UNKNOWN}")
        if not problems and colors.keys() == set(CAMVID32.colors):
            return replace(CAMVID, source=path)
        ignored = [name for name in colors.values() if name.lower() in IGNORED_NAMES]
        if len(ignored) > 1:
            problems.append(f"{' and '.join(ignored)} are both ignored; keep one of them")
        if problems:
            raise UserError(f"{path}: {'; '.join(problems)}")
        names = tuple(colors.values())
        return cls(names, tuple(colors), names.index(ignored[0]) if ignored else None, source=path)


def _read_rows(path: Path) -> list[list]:
    """[line number, name, r, g, b] of every row that is not empty, as text."""
    columns = ("name", "r", "g", "b")
    try:
        if not path.is_file():  # a FIFO would never end
            raise OSError("not a regular file")
        reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True)
        reader.fieldnames = [column.strip().lower() for column in reader.fieldnames or ()]
        rows = [(reader.line_num, row) for row in reader if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV file in UTF-8 ({error})") from None
    missing = [column for column in columns if column not in reader.fieldnames]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; the first line must be name,r,g,b")
    return [[line, *((row[column] or "").strip() for column in columns)] for line, row in rows]


@lru_cache(maxsize=4)
def _color_table(pairs: tuple[tuple[Color, int], ...]) -> np.ndarray:
    """(2**24,) uint8: the id of every colour code r·65536 + g·256 + b."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    for (r, g, b), class_id in pairs:
        table[r << 16 | g << 8 | b] = class_id
    return table


# The ignored class 0, then the 11 classes of the literature in the order of the SegNet copy.
_COLORS: dict[str, Color] = {
    "Unlabelled": (0, 0, 0), "Sky": (128, 128, 128), "Building": (128, 0, 0), "Pole": (192, 192, 128),
    "Road": (128, 64, 128), "Sidewalk": (0, 0, 192), "Tree": (128, 128, 0), "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128), "Car": (64, 0, 128), "Pedestrian": (64, 64, 0), "Bicyclist": (0, 128, 192),
}
# The further classes of the original 32: which of the 11 the literature merges them into, and their colours.
_MERGED: dict[str, tuple[str, Color]] = {
    "Bridge": ("Building", (0, 128, 64)), "Wall": ("Building", (64, 192, 0)), "Tunnel": ("Building", (64, 0, 64)),
    "Archway": ("Building", (192, 0, 128)), "TrafficCone": ("Pole", (0, 0, 64)),
    "LaneMkgsDriv": ("Road", (128, 0, 192)), "LaneMkgsNonDriv": ("Road", (192, 0, 64)),
    "ParkingBlock": ("Sidewalk", (64, 192, 128)), "RoadShoulder": ("Sidewalk", (128, 128, 192)),
    "VegetationMisc": ("Tree", (192, 192, 0)), "Misc_Text": ("SignSymbol", (128, 128, 64)),
    "TrafficLight": ("SignSymbol", (0, 64, 64)), "SUVPickupTruck": ("Car", (64, 128, 192)),
    "Truck_Bus": ("Car", (192, 128, 192)), "Train": ("Car", (192, 64, 128)), "OtherMoving": ("Car", (128, 64, 64)),
    "Child": ("Pedestrian", (192, 128, 64)), "CartLuggagePram": ("Pedestrian", (64, 0, 192)),
    "Animal": ("Pedestrian", (64, 128, 64)), "MotorcycleScooter": ("Bicyclist", (192, 0, 192)),
}
# Other copies of the 11 classes use other colours for these.
_OTHER_COLORS: tuple[tuple[str, Color], ...] = (("Sidewalk", (60, 40, 222)), ("Road", (255, 69, 0)))

_NAMES = tuple(_COLORS)
CAMVID = ClassSet(_NAMES, tuple(_COLORS.values()), ignore_index=0, aliases=tuple(
    (color, _NAMES.index(name)) for name, color in (*_MERGED.values(), *_OTHER_COLORS)))
CAMVID32 = ClassSet(("Void", *_NAMES[1:], *_MERGED), (*CAMVID.colors, *(color for _, color in _MERGED.values())),
                    ignore_index=0)
