"""Class sets: the names, colours and ids of what is segmented, and the way from RGB masks to ids and back."""
import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from runtime import UserError

Color = tuple[int, int, int]
UNKNOWN = 255  # marks a pixel whose colour or id is in no class; class ids end at 254
IGNORED_NAMES = ("unlabelled", "unlabeled", "void")


@dataclass(frozen=True)
class ClassSet:
    """The classes of one data set; a class's id is its position in ``names``.

    ignore_index: id of the class that is neither trained, scored nor predicted, or None.
    aliases: further (colour, id) pairs accepted in masks, such as those of merged classes.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore_index: int | None = None
    aliases: tuple[tuple[Color, int], ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def void_id(self) -> int:
        """The id of pixels without a label: the ignored class, or 255 where there is none."""
        return UNKNOWN if self.ignore_index is None else self.ignore_index

    @property
    def scored(self) -> list[int]:
        """The ids that are trained, scored and predicted."""
        return [i for i in range(len(self)) if i != self.ignore_index]

    def to_ids(self, rgb: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 colours -> (H, W) uint8 ids, UNKNOWN (255) where a colour is in no class."""
        table = _color_table((*zip(self.colors, range(len(self))), *self.aliases))
        # Colour codes stay below 2**24, which float32 holds exactly; its product is the fastest way to them.
        codes = rgb.astype(np.float32) @ np.array([65536, 256, 1], np.float32)
        return table.take(codes.astype(np.intp))

    def to_rgb(self, ids: np.ndarray) -> np.ndarray:
        """(...) ids -> (..., 3) uint8 colours; ids outside the set are black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colors
        return palette[ids]

    def to_dict(self) -> dict:
        """Plain lists for a checkpoint; `from_dict` reads them back."""
        return {"names": list(self.names), "colors": [list(color) for color in self.colors],
                "ignore_index": self.ignore_index}

    @classmethod
    def from_dict(cls, data: dict) -> "ClassSet":
        return cls(tuple(data["names"]), tuple(tuple(color) for color in data["colors"]), data["ignore_index"])

    def ignoring(self, name: str | None) -> "ClassSet":
        """The same classes with the one called ``name`` ignored (case does not matter); None: as it is.

        Raises UserError if there is no such class, or another one is ignored already.
        """
        if name is None:
            return self
        lowered = [n.lower() for n in self.names]
        if name.lower() not in lowered:
            raise UserError(f"--ignore_class {name}: no such class; there are {', '.join(self.names)}")
        if self.ignore_index not in (None, lowered.index(name.lower())):
            raise UserError(f"--ignore_class {name}: {self.names[self.ignore_index]} is ignored already")
        return ClassSet(self.names, self.colors, lowered.index(name.lower()), self.aliases)

    @classmethod
    def numbered(cls, count: int) -> "ClassSet":
        """``count`` nameless classes in the colours of Pascal VOC's colour map."""
        def color(i: int) -> Color:
            # Each three bits of the id, lowest first, give the next high bit of red, green and blue.
            return tuple(sum((i >> (3 * k + c) & 1) << (7 - k) for k in range(3)) for c in range(3))
        return cls(tuple(f"class {i}" for i in range(count)), tuple(color(i) for i in range(count)))

    @classmethod
    def from_csv(cls, path: Path) -> "ClassSet":
        """Read a ``class_dict.csv`` with the columns name, r, g, b; a row's position is its class id.

        A class called Unlabelled, Unlabeled or Void is ignored. A file with CamVid's 32 colours gives CAMVID.
        Raises UserError that lists every problem of the file.
        """
        names, colors = _read_csv(path)
        if set(colors) == set(CAMVID32.colors):
            return CAMVID
        ignored = [i for i, name in enumerate(names) if name.lower() in IGNORED_NAMES]
        if len(ignored) > 1:
            raise UserError(f"{path}: {names[ignored[0]]} and {names[ignored[1]]} are both ignored; keep one of them")
        return cls(names, colors, ignored[0] if ignored else None)


def _read_csv(path: Path) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    try:
        reader = csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True)
        header = [field.strip().lower() for field in next(reader, [])]
        rows = [(reader.line_num, dict(zip(header, row))) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV file in UTF-8 ({error})") from None
    missing = [column for column in ("name", "r", "g", "b") if column not in header]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; the first line must be name,r,g,b")
    names, colors, problems = [], [], []
    for line, row in rows:
        where, name = f"line {line}", row.get("name", "").strip()
        try:
            color = tuple(int(row[channel]) for channel in "rgb")
        except (KeyError, ValueError):
            color = (-1, -1, -1)
        if not name or not all(0 <= value <= 255 for value in color):
            problems.append(f"{where}: needs a name and three whole numbers from 0 to 255")
        if name in names:
            problems.append(f"{where}: the name {name} appears twice")
        if color in colors and min(color) >= 0:
            problems.append(f"{where}: {name} has the colour of {names[colors.index(color)]}")
        names.append(name)
        colors.append(color)
    if not 2 <= len(names) <= UNKNOWN:
        problems.append(f"{len(names)} classes; from 2 to {UNKNOWN} are possible")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return tuple(names), tuple(colors)


@lru_cache(maxsize=4)
def _color_table(pairs: tuple[tuple[Color, int], ...]) -> np.ndarray:
    """(2**24,) uint8: the id of every colour code r·65536 + g·256 + b."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    for (r, g, b), class_id in pairs:
        table[r << 16 | g << 8 | b] = class_id
    return table


# The 11 classes of the literature, in the order of the SegNet copy, behind the ignored class 0.
_CAMVID: dict[str, Color] = {
    "Unlabelled": (0, 0, 0), "Sky": (128, 128, 128), "Building": (128, 0, 0), "Pole": (192, 192, 128),
    "Road": (128, 64, 128), "Sidewalk": (0, 0, 192), "Tree": (128, 128, 0), "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128), "Car": (64, 0, 128), "Pedestrian": (64, 64, 0), "Bicyclist": (0, 128, 192),
}
# The further colours of the original 32 classes, and the class of the 11 that each joins.
_MERGED: dict[str, tuple[Color, str]] = {
    "Bridge": ((0, 128, 64), "Building"), "Wall": ((64, 192, 0), "Building"),
    "Tunnel": ((64, 0, 64), "Building"), "Archway": ((192, 0, 128), "Building"),
    "TrafficCone": ((0, 0, 64), "Pole"),
    "LaneMkgsDriv": ((128, 0, 192), "Road"), "LaneMkgsNonDriv": ((192, 0, 64), "Road"),
    "ParkingBlock": ((64, 192, 128), "Sidewalk"), "RoadShoulder": ((128, 128, 192), "Sidewalk"),
    "VegetationMisc": ((192, 192, 0), "Tree"),
    "Misc_Text": ((128, 128, 64), "SignSymbol"), "TrafficLight": ((0, 64, 64), "SignSymbol"),
    "SUVPickupTruck": ((64, 128, 192), "Car"), "Truck_Bus": ((192, 128, 192), "Car"),
    "Train": ((192, 64, 128), "Car"), "OtherMoving": ((128, 64, 64), "Car"),
    "Child": ((192, 128, 64), "Pedestrian"), "CartLuggagePram": ((64, 0, 192), "Pedestrian"),
    "Animal": ((64, 128, 64), "Pedestrian"),
    "MotorcycleScooter": ((192, 0, 192), "Bicyclist"),
}
# Colours that other copies of the 11-class set use.
_OTHER_COPIES: dict[Color, str] = {(60, 40, 222): "Sidewalk", (255, 69, 0): "Road"}

_NAMES = tuple(_CAMVID)
CAMVID = ClassSet(
    names=_NAMES,
    colors=tuple(_CAMVID.values()),
    ignore_index=0,
    aliases=tuple((color, _NAMES.index(into)) for color, into in (*_MERGED.values(), *_OTHER_COPIES.items())),
)
CAMVID32 = ClassSet(
    names=("Void", *_NAMES[1:], *_MERGED),
    colors=(*_CAMVID.values(), *(color for color, _ in _MERGED.values())),
    ignore_index=0,
)
