"""Class sets: names, colours and ids of the classes, and the conversion of RGB masks to ids."""

import csv
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from support.command import UserError

Color = tuple[int, int, int]
Row = tuple[int, str, Color | None]  # line number, name and colour of a class in a file
IGNORED = 255  # the ignore_index of class sets without an ignored class; class ids end at 254
IGNORED_NAMES = ("unlabelled", "unlabeled", "void")
# The files that name classes, in the order in which they are looked for.
CLASS_FILES = (
    "class_dict.csv",
    "label_colors.txt",
    "labelmap.txt",
    "_classes.csv",
    "codes.txt",
    "class_names.txt",
)
VOC_BORDER = (((224, 224, 192), IGNORED),)  # Pascal VOC's colour of 255, the border of objects
# The lines of label_colors.txt, of labelmap.txt, whose colour may be missing, and lists of names.
LINE_FORMS = (
    r"(?P<color>\d+\s+\d+\s+\d+)\s+(?P<name>.+)",
    r"(?P<name>[^:]*):(?P<color>[\d, ]*):[^:]*:[^:]*",
    r"(?P<name>.+)",
)


@dataclass(frozen=True)
class ClassSet:
    """The classes of a dataset; the id of a class is its position in ``names``.

    ignore_index: id of the pixels that are neither trained nor scored: that of the ignored class,
    which is never predicted, or 255 if there is none.
    aliases: further pairs of colour and id accepted in masks, such as those of merged classes.
    mask_ids: class id of each value in a mask of ids; empty if they are the same.
    source: the file that they were read from, or the dataset.
    Raises UserError unless there are 2 to 255 classes, and a colour for each.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore_index: int = IGNORED
    aliases: tuple[tuple[Color, int], ...] = ()
    mask_ids: tuple[int, ...] = ()
    source: Path | str | None = field(default=None, compare=False, repr=False)

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

    @property
    def known_colors(self) -> dict[Color, int]:
        """The id of every colour that is accepted in masks."""
        return {color: i for i, color in enumerate(self.colors)} | dict(self.aliases)

    def to_ids(self, rgb: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 colours -> (H, W) uint8 ids, 255 where a colour is in no class."""
        return _id_table(self)[*np.moveaxis(rgb, -1, 0)]

    def nearest_ids(self, rgb: np.ndarray) -> np.ndarray:
        """(N, 3) colours -> (N,) uint8 ids of the nearest known colours, in Euclidean distance."""
        known = self.known_colors
        distances = np.linalg.norm(rgb[:, None] - np.array([*known], float), axis=-1)
        return np.array([*known.values()], np.uint8)[distances.argmin(1)]

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
    def numbered(cls, count: int) -> "ClassSet":
        """``count`` nameless classes in Pascal VOC's colours."""
        names = tuple(f"class {i}" for i in range(count))
        return cls(names, tuple(_voc_color(i) for i in range(count)))

    @classmethod
    def from_file(cls, path: Path) -> "ClassSet":
        """Read a file that names the classes, in one of the forms of CLASS_FILES.

        Ids follow the rows' order. Rows of equal names are one class; those called Unlabelled,
        Unlabeled or Void are ignored. Without colours, classes have those of Pascal VOC, and its
        border is ignored. A file with CamVid's 32 colours gives CAMVID.
        Raises UserError that lists all wrong lines.
        """
        rows = _read_rows(path)
        ignored = [name for _, name, _ in rows if name.lower() in IGNORED_NAMES]
        names: list[str] = []
        colors: dict[Color, int] = {}
        mask_ids = []
        problems = []
        for row, (line, name, color) in enumerate(rows):
            name = ignored[0] if name in ignored else name
            if name not in names:
                names.append(name)
            class_id = names.index(name)
            color = color or _voc_color(row)
            if not name or max(color) > 255:
                problems.append(f"line {line}: needs a name and three numbers from 0 to 255")
            elif colors.setdefault(color, class_id) != class_id:
                problems.append(f"line {line}: {names[colors[color]]} has the same colour")
            mask_ids.append(class_id)
        if problems:
            raise UserError(f"{path}: {'; '.join(problems)}")
        if set(colors) == set(CAMVID32.colors) and len(names) == len(CAMVID32):
            return replace(CAMVID, source=path)
        first = {class_id: color for color, class_id in reversed(colors.items())}
        border = () if all(color for _, _, color in rows) else VOC_BORDER
        return cls(
            tuple(names),
            tuple(first[i] for i in range(len(names))),
            names.index(ignored[0]) if ignored else IGNORED,
            tuple((color, i) for color, i in colors.items() if color != first[i]) + border,
            tuple(mask_ids) if len(names) < len(rows) else (),
            path,
        )


def _read_rows(path: Path) -> list[Row]:
    """The rows of a file that names classes. Raises UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text in UTF-8; in Excel, save it as CSV UTF-8") from None
    if path.suffix.lower() == ".csv":
        return _read_csv(path, lines)
    rows = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith(("#", "__ignore__")):
            forms = (re.fullmatch(form, line) for form in LINE_FORMS)
            fields = next(filter(None, forms)).groupdict()  # the last form fits every line
            numbers = re.findall(r"\d+", fields.get("color", ""))
            rows.append((number, fields["name"].strip(), _color(numbers) if numbers else None))
    return rows


def _read_csv(path: Path, lines: list[str]) -> list[Row]:
    """The rows of a CSV file with the columns name, r, g, b, or Roboflow's Pixel Value, Class."""
    reader = csv.DictReader(lines, restval="", skipinitialspace=True)
    columns = reader.fieldnames = [column.strip().lower() for column in reader.fieldnames or ()]
    rows = [(reader.line_num, {key: row[key].strip() for key in columns}) for row in reader]
    if {"name", "r", "g", "b"} <= set(columns):
        if {row.get("id") for _, row in rows} == {str(i) for i in range(len(rows))}:
            rows.sort(key=lambda row: int(row[1]["id"]))
        return [(line, row["name"], _color([row["r"], row["g"], row["b"]])) for line, row in rows]
    if {"pixel value", "class"} <= set(columns):
        by_value = {row["pixel value"]: (line, row["class"], None) for line, row in rows}
        last = max((int(value) for value in by_value if value.isdecimal()), default=-1)
        return [by_value.get(str(i), (1, f"class {i}", None)) for i in range(last + 1)]
    raise UserError(f"{path}: the first line must be name,r,g,b")


def _color(texts: list[str]) -> Color:
    """A colour from its numbers as text; 256 for what is no number."""
    r, g, b = (int(text) if text.isdecimal() else 256 for text in (*texts, "", "")[:3])
    return r, g, b


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


# The 19 classes of Cityscapes in the order of labelTrainIds, and the colours of all others, which
# are ignored. Source: Cordts et al. 2016 and the labels.py of its scripts.
_CITYSCAPES = """
road          128  64 128
sidewalk      244  35 232
building       70  70  70
wall          102 102 156
fence         190 153 153
pole          153 153 153
traffic_light 250 170  30
traffic_sign  220 220   0
vegetation    107 142  35
terrain       152 251 152
sky            70 130 180
person        220  20  60
rider         255   0   0
car             0   0 142
truck           0   0  70
bus             0  60 100
train           0  80 100
motorcycle      0   0 230
bicycle       119  11  32
unlabeled       0   0   0 -
dynamic       111  74   0 -
ground         81   0  81 -
parking       250 170 160 -
rail_track    230 150 140 -
guard_rail    180 165 180 -
bridge        150 100 100 -
tunnel        150 120  90 -
caravan         0   0  90 -
trailer         0   0 110 -
"""
# Pascal VOC 2012, in its order.
_VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor"""


def _from_table(text: str, ignore_index: int, source: str) -> ClassSet:
    """The classes of a table above: rows with a fifth column are colours of the class named there,
    or with - ignored.
    """
    rows = [line.split() for line in text.strip().splitlines()]
    names = tuple(row[0] for row in rows if len(row) == 4)
    colors = [(int(r), int(g), int(b)) for _, r, g, b, *_ in rows]
    ids = {name: i for i, name in enumerate(names)} | {"-": IGNORED}
    aliases = tuple((color, ids[row[4]]) for row, color in zip(rows, colors) if len(row) > 4)
    return ClassSet(names, tuple(colors[: len(names)]), ignore_index, aliases, source=source)


CAMVID = _from_table(_CAMVID, ignore_index=0, source="CamVid")
# The original 32 classes are the first 32 rows.
CAMVID32 = ClassSet(
    ("Void", *(line.split()[0] for line in _CAMVID.split("\n")[2:33])),
    (*CAMVID.colors, *(color for color, _ in CAMVID.aliases[:20])),
    ignore_index=0,
    source="CamVid's original labels",
)
CITYSCAPES = _from_table(_CITYSCAPES, ignore_index=IGNORED, source="Cityscapes")
VOC = replace(
    ClassSet.numbered(21), names=tuple(_VOC.split()), aliases=VOC_BORDER, source="Pascal VOC"
)
CLASS_SETS = {"camvid": CAMVID, "camvid32": CAMVID32, "cityscapes": CITYSCAPES, "voc": VOC}
