"""A data folder as the flags describe it: its classes, its files, their problems, its datasets."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from datasets.camvid import CamVidDataset, Sample, read_mask
from datasets.classes import CAMVID, CAMVID32, IGNORED, ClassSet
from datasets.layouts import VAL_PERCENT, Pair, find_split
from support.command import Parser, UserError, number, progress
from support.images import open_image, read_image, shrink, to_rgb

MAX_STRAY = 0.01  # share of a mask's pixels that may have an unknown colour; they are ignored
MAX_COLORS = 160  # in masks; more are blends at the edges of classes
MAX_LINES = 50  # problems that are listed before training
KEPT_BYTES = 2 << 30  # of decoded images in each process; CamVid at 480×360 has 0.3 GB
DATA_NAME_HELP = "class set; auto reads the folder's class_dict.csv, else takes CamVid's classes"
VAL_PERCENT_HELP = f"""percentage of a folder with images/ and masks/ alone that is held out for
validation, the last by name; if not given, {VAL_PERCENT:.0f}"""


@dataclass
class SplitReport:
    """What one split holds.

    sizes: (height, width) -> number of images. pixels: (256,) int64 pixel counts of all masks by
    class id, unknown ones at 255. stray: name of a mask -> its pixels of unknown colour or id.
    samples: the decoded images and masks, or none of them where memory cannot hold all.
    """

    split: str
    pairs: Sequence[Pair] = ()
    label_format: str = "rgb"
    problems: list[str] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    stray: Counter = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    def stray_line(self) -> str:
        """One line on the pixels of unknown colour or id."""
        masks = f"{len(self.stray)} masks, such as {min(self.stray)}"
        return f"{self.split}: {self.stray.total()} pixels of no class are ignored in {masks}"


@dataclass(frozen=True)
class DataSpec:
    """A data folder and how to read it.

    label_format: of `read_mask`, or ``auto``, which reads a folder called …annot as ids.
    max_side: images with a longer side are shrunk to it, in pixels; 0 shrinks none.
    val_percent: percentage of the images of a folder without splits that become val.
    reports: of the splits that have been checked.
    """

    root: Path
    classes: ClassSet
    label_format: str = "auto"
    max_side: int = 0
    val_percent: float = VAL_PERCENT
    reports: dict[str, SplitReport] = field(default_factory=dict, compare=False)

    def find(self, split: str) -> SplitReport:
        """The pairs of a split, and the problems of its folders and file names."""
        try:
            pairs, problems, mask_dir = find_split(self.root, split, self.val_percent)
        except UserError as error:
            return SplitReport(split, problems=[str(error)])
        label_format = self.label_format
        if label_format == "auto":
            ids_format = "segnet" if self.classes == CAMVID else "ids"
            label_format = ids_format if mask_dir.name.endswith("annot") else "rgb"
        return SplitReport(split, pairs, label_format, problems)

    def check(self, splits: Iterable[str]) -> dict[str, SplitReport]:
        """Decode every file of these splits once, and keep the result where memory allows.

        The reports list all problems, missing folders too.
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
            readings = pool.map(lambda pair: self._read(pair, report.label_format), report.pairs)
            bar = progress(readings, desc=f"reading {report.split}", total=len(report.pairs))
            for pair, reading in zip(report.pairs, bar):
                if isinstance(reading, UserError):
                    report.problems.append(str(reading))
                    continue
                image, ids, pixels, stray = reading
                report.sizes[ids.shape] += 1
                report.pixels += pixels
                share = stray.total() / ids.size
                if share > MAX_STRAY:
                    common = ", ".join(f"{key} × {count:,}" for key, count in stray.most_common(4))
                    report.problems.append(
                        f"{pair.mask}: {share:.1%} of its pixels are in none of the classes: "
                        f"{common}; complete class_dict.csv, or check --label_format"
                    )
                elif stray:
                    report.stray[pair.mask.name] = stray.total()
                size += image.nbytes + ids.nbytes
                if size <= room:
                    report.samples.append((image, ids))
        if len(report.samples) < len(report.pairs):
            report.samples.clear()
        any_scored = report.pixels[self.classes.scored].any()
        if report.split != "train" and not any_scored and not report.problems:
            report.problems.append(f"{report.split}: its masks hold no class, nothing to score")
        return size

    def _read(self, pair: Pair, label_format: str) -> tuple | UserError:
        """The image, its class ids, their (256,) counts, and the colours or ids of no class."""
        try:
            image = read_image(pair.image)
            ids = read_mask(pair.mask, self.classes, label_format)
        except UserError as error:
            return error
        size = image.shape[:2]
        if ids.shape != size:
            return UserError(f"{pair.mask}: has (height, width) {ids.shape}, its image {size}")
        pixels = np.bincount(ids.ravel(), minlength=256)
        stray = _count_stray(pair.mask, ids, label_format)
        return shrink(image, self.max_side), ids, pixels, stray

    def problems(self, reports: dict[str, SplitReport]) -> list[str]:
        """What is wrong with single files, then with the classes as a whole.

        Raises UserError with the lines of a class_dict.csv instead, if CamVid's classes are assumed
        and cannot be right.
        """
        # As keys, because a missing root is the same problem in every split.
        problems = list(dict.fromkeys(p for report in reports.values() for p in report.problems))
        scored = self.classes.scored
        train = reports.get("train", SplitReport("train"))
        learnt = np.count_nonzero(train.pixels[scored])
        pixels = np.sum([report.pixels for report in reports.values()], axis=0)
        table = self.root / "class_dict.csv"
        assumed = self.classes == CAMVID and not table.exists()
        if train.sizes and learnt < 2:
            found = f"the masks of train hold {learnt} classes, without the ignored; two are needed"
        elif assumed and problems and pixels[IGNORED] > pixels[scored].sum():
            found = f"{pixels[IGNORED] / pixels.sum():.1%} of the pixels have none of their colours"
        else:
            return problems
        if assumed:
            raise UserError(
                f"{self.root}: no class_dict.csv, so CamVid's classes are assumed, but {found}; "
                f"put these lines into {table}, with names of your own (python -m datasets.check "
                f"--data_root {self.root} --write_classes does it):",
                *self.color_table(reports),
            )
        return [*problems, f"{self.root}: {found}"]

    def color_table(self, splits: Iterable[str]) -> list[str]:
        """The lines of a class_dict.csv with the colours of the masks, the most frequent first.

        Raises UserError if there are no masks, or if they hold blended colours or class ids.
        """
        masks = [pair.mask for split in splits for pair in self.find(split).pairs]
        found: Counter = Counter()
        for path in progress(masks, desc="colours"):
            image = to_rgb(open_image(path))
            colors = image.getcolors(image.width * image.height)
            found.update({color: count for count, color in colors})  # type: ignore[union-attr]
        if not found:
            raise UserError(f"{self.root}: has no masks")
        ids = found.keys() - {(IGNORED,) * 3}
        if len(ids) > 1 and ids <= {(i, i, i) for i in range(64)}:
            highest = max(ids)[0]
            raise UserError(
                f"{self.root}: the masks hold class ids from 0 to {highest}, not colours; give "
                f"--label_format ids --num_classes {highest + 1}"
            )
        if len(found) > MAX_COLORS:
            raise UserError(
                f"{self.root}: the masks hold {len(found):,} colours; save them with one flat "
                f"colour a class, without smoothing"
            )
        lines = ["name,r,g,b,pixels"]
        for i, ((r, g, b), count) in enumerate(found.most_common()):
            name = f"class {i}" if r or g or b else "Background"
            lines.append(f"{name},{r},{g},{b},{count / found.total():.2%}")
        return lines

    def dataset(self, split: str, transform=None, native_masks: bool = False) -> CamVidDataset:
        """A split as a dataset. Raises UserError that lists every file without its partner."""
        report = self.reports.get(split) or self.find(split)
        if report.problems:
            raise UserError(*report.problems)
        return CamVidDataset(
            report.pairs,
            self.classes,
            transform,
            report.label_format,
            self.max_side,
            native_masks,
            report.samples,
        )


def _count_stray(path: Path, ids: np.ndarray, label_format: str) -> Counter:
    """How many pixels of a mask have each colour (r, g, b) or id (i,) that is in no class."""
    unknown = ids == IGNORED
    if not unknown.any():
        return Counter()
    mask = open_image(path)
    values = np.asarray(to_rgb(mask) if label_format == "rgb" else mask)
    if label_format == "ids":
        unknown &= values != IGNORED  # the usual id of unlabelled pixels
    return Counter(map(tuple, values.reshape(*ids.shape, -1)[unknown].tolist()))


def find_classes(
    root: Path, data_name: str = "auto", label_format: str = "auto", num_classes: int | None = None
) -> ClassSet:
    """The classes of a data folder: those of its class_dict.csv, else ``num_classes`` nameless ids
    for masks of ids, else CamVid's.

    Raises UserError if they cannot be known or are not ``num_classes`` many.
    """
    table = root / "class_dict.csv"
    if data_name != "auto":
        classes = CAMVID32 if data_name == "camvid32" else CAMVID
    elif table.exists():
        classes = ClassSet.from_csv(table)
    elif label_format == "ids":
        classes = ClassSet.numbered(num_classes)
    else:
        classes = CAMVID
    if num_classes not in (None, len(classes)):
        raise UserError(
            f"--num_classes {num_classes}: {classes.source or 'CamVid'} has {len(classes)}; leave "
            f"it out for these, or write a table of the masks' colours with "
            f"python -m datasets.check --data_root {root} --write_classes"
        )
    return classes


def describe_data(args, max_side: int = 0) -> DataSpec:
    """The data that the flags of `add_data_flags` describe; no image is read yet."""
    if args.data_root is None:
        raise UserError("--data_root DIR is needed, a folder with train/ (or try train.py --demo)")
    classes = find_classes(args.data_root, args.data_name, args.label_format, args.num_classes)
    percent = args.val_percent or VAL_PERCENT
    return DataSpec(args.data_root, classes, args.label_format, max_side, percent)


def open_data(args, splits: Sequence[str] = ("train", "val")) -> DataSpec:
    """The data that the flags describe, with every file of the splits read.

    Prints what was found. args.max_side: None takes the longest side of the training images.
    Raises UserError with all problems, one a line.
    """
    data = describe_data(args, args.max_side or 0)
    reports = data.check(splits)
    problems = data.problems(reports)
    if len(problems) > 1:
        problems = [f"{data.root}: {len(problems)} problems", *problems[:MAX_LINES]]
    if problems:
        raise UserError(*problems)
    for report in reports.values():
        print(f"{report.split}: {len(report.pairs)} images")
        if report.stray:
            print(report.stray_line())
    print(class_line(reports[splits[0]], data.classes))
    max_side = args.max_side
    if max_side is None:
        max_side = max(max(size) for size in reports["train"].sizes)
    return replace(data, max_side=max_side, reports=reports)


def class_line(report: SplitReport, classes: ClassSet) -> str:
    """The class set, where it comes from, and the classes without a pixel."""
    source = f"from {classes.source}" if classes.source else "without a class_dict.csv"
    whose = "CamVid's " if classes == CAMVID else ""
    absent = [classes.names[i] for i in classes.scored if not report.pixels[i]]
    missing = f"; {report.split} has no pixel of {', '.join(absent)}" if absent else ""
    return f"{whose}{len(classes)} classes, {source}{missing}"


def add_data_flags(parser: Parser) -> None:
    """The flags that describe the data, the same for every command."""
    parser.add_flags(
        "data",
        ("--data_root", Path, None, "folder with train/, train_labels/, val/, …"),
        ("--data_name", ("auto", "camvid", "CamVid", "camvid32"), "auto", DATA_NAME_HELP),
        ("--label_format", ("auto", "rgb", "ids", "segnet"), "auto", "of the masks"),
        ("--num_classes", int, None, "number of classes in masks of ids"),
        ("--val_percent", number(float, 0, 90), None, VAL_PERCENT_HELP),
    )
