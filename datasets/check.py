"""Check a data folder before training: names, sizes, colours, and that every file can be read. Lists all problems.

    python -m datasets.check --data_root data/CamVid
    python -m datasets.check --data_root mydata --write_classes     a class_dict.csv of the masks' colours, to be named
"""
from support.command import Parser, UserError, number, printable, progress, run_command  # isort: split

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets import camvid
from datasets.classes import CAMVID, UNKNOWN, ClassSet, Color
from support.files import write_file
from support.images import open_image, read_image, to_rgb

MAX_STRAY = 0.01  # of a mask's pixels may have an unknown colour; they count as void
MOST_COLORS = 160  # in masks; more are blends at the edges of classes


@dataclass
class SplitReport:
    """What one split holds. pixels: (256,) int64, the pixels of all masks by class id, unknown ones at 255."""

    split: str
    pairs: int = 0
    sizes: Counter = field(default_factory=Counter)  # (height, width) -> images
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    stray: dict[str, int] = field(default_factory=dict)  # mask -> pixels of unknown colour or id
    problems: list[str] = field(default_factory=list)


def check_split(root: Path, split: str, classes: ClassSet, label_format: str = "auto",
                val_percent: float | None = None) -> SplitReport:
    """Decode every file of a split. Its problems, missing folders too, are in the report."""
    try:
        pairs, problems, mask_dir = camvid.find_split(root, split, val_percent)
    except UserError as error:
        return SplitReport(split, problems=[str(error)])
    report = SplitReport(split, len(pairs), problems=problems)
    label_format = camvid.resolve_label_format(label_format, mask_dir, classes)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        results = pool.map(lambda pair: _check_pair(split, pair, classes, label_format), pairs)
        for part in progress(results, desc=f"checking {split}", total=len(pairs)):
            report.sizes += part.sizes
            report.pixels += part.pixels
            report.stray |= part.stray
            report.problems += part.problems
    if split != "train" and not (report.problems or report.pixels[classes.scored].any()):
        report.problems.append(f"{split}: its {len(pairs)} masks hold no class: there is nothing to score")
    return report


def _check_pair(split: str, pair: camvid.Pair, classes: ClassSet, label_format: str) -> SplitReport:
    """What one pair adds to the report of its split."""
    report = SplitReport(split)
    try:
        size, ids = read_image(pair.image).shape[:2], camvid.read_mask(pair.mask, classes, label_format)
        if ids.shape != size:
            raise UserError("{}: is {}×{}, its image is {}×{}".format(pair.mask, *ids.shape[::-1], *size[::-1]))
        report.sizes[size], report.pixels = 1, np.bincount(ids.ravel(), minlength=256)
        if (ids == UNKNOWN).any():
            mask = open_image(pair.mask)
            values = np.asarray(to_rgb(mask) if label_format == "rgb" else mask)
            stray = values[(ids == UNKNOWN) & (label_format != "ids" or values != UNKNOWN)]  # 255: id masks' usual void
            if len(stray) > MAX_STRAY * ids.size:
                raise UserError(f"{pair.mask}: {_describe_stray(stray, ids.size, classes)}")
            report.stray = {pair.mask.name: len(stray)} if len(stray) else {}
    except UserError as error:
        report.problems.append(str(error))
    return report


def _describe_stray(values: np.ndarray, pixels: int, classes: ClassSet) -> str:
    """Which unknown colours (N, 3) or ids (N,) a mask of so many pixels has, the most frequent first."""
    found = Counter(map(tuple, values.reshape(len(values), -1).tolist()))
    shown = ", ".join(f"({','.join(map(str, value))}) × {count:,}" for value, count in found.most_common(4))
    hint = "; if these are class ids, use --label_format ids" if max(map(max, found)) < len(classes) else ""
    return f"{len(values) / pixels:.1%} of its pixels are in none of the {len(classes)} classes: {shown}{hint}"


def find_problems(root: Path, reports: dict[str, SplitReport], classes: ClassSet) -> list[str]:
    """What is wrong with single files, then with the classes as a whole.

    Raises UserError with the lines of a class_dict.csv instead, if CamVid's classes are assumed and cannot be right.
    """
    # As keys, because a missing root is the same problem in every split.
    problems = list(dict.fromkeys(problem for report in reports.values() for problem in report.problems))
    pixels = np.sum([report.pixels for report in reports.values()], axis=0)
    train = reports.get("train", SplitReport("train")).pixels
    learnt = [classes.names[i] for i in classes.scored if train[i]]
    assumed, table = classes == CAMVID and classes.source is None, root / "class_dict.csv"
    if train.any() and len(learnt) < 2:
        found = f"the masks of train hold {f'only {learnt[0]}' if learnt else 'no class'}: there is nothing to learn"
    elif assumed and problems and pixels[UNKNOWN] > pixels[classes.scored].sum():
        found = f"{pixels[UNKNOWN] / pixels.sum():.1%} of the masks' pixels have none of their colours"
    else:
        return problems
    if not assumed:
        return [*problems, f"{root}: {found}{'; 255 counts as void' if train[UNKNOWN] else ''}"]
    if table.is_file():
        raise UserError(f"{root}: the classes are CamVid's, but {found}; leave --data_name out, to read {table}")
    raise UserError(f"{root}: no class_dict.csv, so CamVid's classes are assumed, but {found}; put these lines into "
                    f"{table}, with names of your own (python -m datasets.check --data_root {root} --write_classes "
                    f"does it):", *table_of_masks(root, reports))


def table_of_masks(root: Path, splits: Iterable[str]) -> list[str]:
    """The lines of a class_dict.csv for the colours of all masks, the most frequent first, with their share of the
    pixels. The names are for the user to replace.

    Raises UserError if there are no masks, or if they hold blended colours, or class ids.
    """
    masks = [pair.mask for split in splits for pair in camvid.find_split(root, split)[0]]
    if not masks:
        raise UserError(f"{root}: has no masks")
    found: Counter[Color] = Counter()
    for path in progress(masks, desc="colours"):
        image = to_rgb(open_image(path))
        found.update({color: count for count, color in image.getcolors(image.width * image.height)})  # type: ignore
    ids = found.keys() - {(UNKNOWN,) * 3}  # the usual void of id masks
    highest = max(map(max, ids), default=0)
    if len(ids) > 1 and highest < 64 and all(r == g == b for r, g, b in ids):
        raise UserError(f"{root}: the masks hold class ids from 0 to {highest}, not colours; give --label_format ids "
                        f"--num_classes {highest + 1}")
    if len(found) > MOST_COLORS:
        raise UserError(f"{root}: the masks hold {len(found):,} colours; save them with one flat colour a class, "
                        f"without smoothing")
    return ["name,r,g,b,pixels", *(
        f"{f'class {i}' if any(color) else 'Background'},{','.join(map(str, color))},{count / found.total():.2%}"
        for i, (color, count) in enumerate(found.most_common()))]


def class_line(report: SplitReport, classes: ClassSet) -> str:
    """The class set, where it comes from, and the classes without a pixel."""
    what = f"CamVid's {len(classes)} classes" if classes == CAMVID else f"{len(classes)} classes"
    absent = [classes.names[i] for i in classes.scored if not report.pixels[i]]
    where = f"from {classes.source}" if classes.source else "as no class_dict.csv is read"
    return f"{what}, {where}{f'; {report.split} has no pixel of ' + ', '.join(absent) if absent else ''}"


def check_data(root: Path, splits: list[str], classes: ClassSet, label_format: str = "auto",
               val_percent: float | None = None) -> dict[str, SplitReport]:
    """Reports by split. Raises UserError with the problems of all splits, one a line."""
    reports = {split: check_split(root, split, classes, label_format, val_percent) for split in splits}
    problems = find_problems(root, reports, classes)
    if len(problems) > 1:
        problems = [f"{root}: {len(problems)} problems", *problems[:50], *(["…"] if len(problems) > 50 else [])]
    if problems:
        raise UserError(*problems)
    return reports


def describe(report: SplitReport, classes: ClassSet) -> str:
    """Counts, sizes, each class's share of the pixels, and the stray pixels, as text."""
    sizes = ", ".join(f"{width}×{height} ({count})" for (height, width), count in report.sizes.most_common(4))
    shares = report.pixels / max(1, report.pixels.sum())
    lines = [f"{i:>3} {name:<20} {shares[i]:7.2%}{'  (ignored)' if i == classes.ignore_index else ''}"
             for i, name in enumerate(classes.names)]
    return "\n  ".join([f"{report.split}: {report.pairs} pairs, {sizes}{' …' if len(report.sizes) > 4 else ''}", *lines,
                        *([stray_line(report)] if report.stray else [])])


def stray_line(report: SplitReport) -> str:
    """One line on the pixels of unknown colour or id, for the log."""
    shown = printable(", ".join(f"{name} ({count})" for name, count in list(report.stray.items())[:3]))
    return (f"{report.split}: {sum(report.stray.values())} pixels of unknown colour or id in {len(report.stray)} masks "
            f"count as void: {shown}{' …' if len(report.stray) > 3 else ''}")


def add_data_flags(parser: Parser, required: bool = False) -> None:
    """The flags that describe the data, the same for every command. required: whether --data_root is."""
    add = parser.add_argument_group("data").add_argument
    add("--data_root", type=Path, required=required, metavar="DIR", help="holds train/, train_labels/, val/, …")
    add("--data_name", type=str.lower, choices=("auto", "camvid", "camvid32"), default="auto",
        help="class set: auto takes the folder's class_dict.csv, else CamVid's 11 classes")
    add("--label_format", choices=("auto", "rgb", "ids", "segnet"), default="auto",
        help="masks hold RGB colours, class ids, or the SegNet copy's ids")
    add("--num_classes", type=int, metavar="N", help="number of classes in masks of ids; else checked")
    add("--val_percent", type=number(float, 0.1, 90), metavar="P", help="of a folder with images/ and masks/ alone, "
        f"held out for validation, with the frames of a video together; by default {camvid.VAL_PERCENT:.0f}")


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.check", description=__doc__)
    add_data_flags(parser, required=True)
    parser.add_argument("--write_classes", action="store_true",
                        help="write a class_dict.csv of the masks' colours into --data_root, and check nothing")
    return parser


def main(args) -> int:
    root, table = args.data_root, args.data_root / "class_dict.csv"
    if not args.write_classes:
        classes = camvid.find_classes(root, args.data_name, args.label_format, args.num_classes)
    splits = [split for split in ("train", "val", "test")
              if any((root / f"{split}{end}").is_dir() for end in ("", "_labels", "annot"))]
    try:
        if camvid.find_folders(root, "train")[0] != root / "train":  # images/ and masks/, of which a part is val
            splits = ["train", "val", *({"test"} & {*splits})]
    except UserError:
        if not splits:
            raise
    if args.write_classes:
        if table.exists():
            raise UserError(f"{table} is there already; remove it first")
        text = "\n".join(table_of_masks(root, splits)) + "\n"
        write_file(table, lambda path: path.write_text(text))
        print(f"{text}wrote {table}; now give the classes their names, and call what is to be ignored Void")
        return 0
    reports = {split: check_split(root, split, classes, args.label_format, args.val_percent) for split in splits}
    print(class_line(reports[splits[0]], classes))
    print(*(describe(report, classes) for report in reports.values()), sep="\n")
    moved = sum(camvid.standard_split(path.stem) == "train" for split in splits if split != "train"
                for path in (root / split).glob("*"))
    if moved:  # as most are in Kaggle's copy, which is split at random
        print(f"warning: the literature trains on {moved} frames that are not in train here; with their neighbours "
              f"in train, scores are too high; python -m datasets.download --from ARCHIVE restores the standard split")
    if "train" in splits and "val" not in splits:
        print(f"warning: train.py needs {root / 'val'} and its masks too, to choose the best epoch by")
    problems = find_problems(root, reports, classes)
    print(f"{len(problems)} problems", *problems, sep="\n  ")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
