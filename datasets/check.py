"""Check a data folder before training: names, sizes, colours, and that every file can be read. Lists all problems.

    python -m datasets.check --data_root data/CamVid
    python -m datasets.check --data_root mydata --write_classes     a class_dict.csv of the masks' colours, to be named
"""
from support.command import Parser, UserError, number, printable, progress, run_command  # isort: split

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets import camvid
from datasets.classes import CAMVID, UNKNOWN, ClassSet, table_of_masks
from support.files import write_file
from support.images import open_image, read_image, to_rgb

MAX_STRAY = 0.01  # of a mask's pixels may have an unknown colour; they count as void


@dataclass
class SplitReport:
    """What one split holds. pixels: (256,) int64, the pixels of all masks by class id, unknown ones at 255."""

    split: str
    pairs: int = 0
    sizes: Counter = field(default_factory=Counter)  # (height, width) -> images
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    stray: dict[str, int] = field(default_factory=dict)  # mask -> pixels of unknown colour or id
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # the problems of masks with too many stray pixels


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
        results = pool.map(lambda pair: _check_pair(pair, classes, label_format), pairs)
        for pair, result in zip(pairs, progress(results, desc=f"checking {split}", total=len(pairs))):
            if isinstance(result, str):
                report.problems.append(result)
                continue
            size, pixels, stray, problem = result
            report.sizes[size] += 1
            report.pixels += pixels
            if problem:
                report.unknown.append(problem)
            elif stray:
                report.stray[pair.mask.name] = stray
    if split != "train" and not (report.problems or report.unknown or report.pixels[classes.scored].any()):
        report.problems.append(f"{split}: its {len(pairs)} masks hold no class: there is nothing to score")
    return report


def _check_pair(pair: camvid.Pair, classes: ClassSet, label_format: str) -> tuple[tuple, np.ndarray, int, str] | str:
    """The size (H, W), the (256,) pixels by class id and the number of stray pixels of a pair, and what is said if they
    are too many; or its problem.
    """
    try:
        size, ids = read_image(pair.image).shape[:2], camvid.read_mask(pair.mask, classes, label_format)
        stray = ids == UNKNOWN
        if label_format == "ids" and stray.any():
            stray &= np.asarray(open_image(pair.mask)) != UNKNOWN  # 255 is the usual void of id masks
        if ids.shape != size:
            raise UserError("{}: is {}×{}, its image is {}×{}".format(pair.mask, *ids.shape[::-1], *size[::-1]))
        problem = _describe_stray(pair.mask, stray, classes, label_format) if stray.mean() > MAX_STRAY else ""
    except UserError as error:
        return str(error)
    return size, np.bincount(ids.ravel(), minlength=256), int(stray.sum()), problem


def _describe_stray(path: Path, stray: np.ndarray, classes: ClassSet, label_format: str) -> str:
    """Which unknown colours or ids a mask has, the most frequent first. stray: (H, W) bool."""
    values = np.asarray(to_rgb(open_image(path)) if label_format == "rgb" else open_image(path))[stray]
    found = Counter(map(tuple, values.reshape(len(values), -1).tolist()))
    shown = ", ".join(f"({','.join(map(str, value))}) × {count:,}" for value, count in found.most_common(4))
    hint = "; if these are class ids, use --label_format ids" if max(map(max, found)) < len(classes) else ""
    return f"{path}: {stray.mean():.1%} of its pixels are in none of the {len(classes)} classes: {shown}{hint}"


def all_problems(root: Path, reports: list[SplitReport], classes: ClassSet) -> list[str]:
    """What is wrong with single files, then with the classes as a whole."""
    # As keys, because a missing root is the same problem in every split.
    problems = list(dict.fromkeys(problem for report in reports for problem in report.problems))
    wrong = wrong_classes(root, reports, classes)
    return problems + ([wrong] if wrong else [problem for report in reports for problem in report.unknown])


def wrong_classes(root: Path, reports: list[SplitReport], classes: ClassSet) -> str | None:
    """What to do where the masks hold other classes than ``classes``, or train only one, from which nothing is learnt.

    None if the classes may be right.
    """
    pixels = sum((report.pixels for report in reports), np.zeros(256, np.int64))
    train = sum((report.pixels for report in reports if report.split == "train"), np.zeros(256, np.int64))
    learnt = [classes.names[i] for i in classes.scored if train[i]]
    assumed = classes == CAMVID and classes.source is None
    if assumed and any(report.unknown for report in reports) and pixels[UNKNOWN] > pixels[classes.scored].sum():
        found = f"{pixels[UNKNOWN] / pixels.sum():.1%} of the masks' pixels have none of their colours"
    elif train.any() and len(learnt) < 2:
        found = f"the masks of train hold {f'only {learnt[0]}' if learnt else 'no class'}: there is nothing to learn"
        found += "; 255 counts as void" if train[UNKNOWN] else ""
    else:
        return None
    if not assumed:
        return f"{root}: {found}"
    table = root / "class_dict.csv"
    if table.is_file():
        return f"{root}: the classes are CamVid's, but {found}; leave --data_name out, so that {table} is read"
    try:
        lines = suggest_table(root, [report.split for report in reports])
    except UserError as error:
        return str(error)
    return "\n    ".join([
        f"{root}: no class_dict.csv, so CamVid's classes are assumed, but {found}; put these lines into {table}, with "
        f"names of your own (python -m datasets.check --data_root {root} --write_classes does it):", *lines])


def suggest_table(root: Path, splits: list[str]) -> list[str]:
    """`table_of_masks` of all splits. Raises UserError where there are no masks, or masks of ids."""
    pairs = [pair for split in splits for pair in camvid.find_split(root, split)[0]]
    return table_of_masks(pair.mask for pair in progress(pairs, desc="colours"))


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
    if problems := all_problems(root, [*reports.values()], classes):
        listed = [f"{root}: {len(problems)} problems", *problems[:50], *(["…"] if len(problems) > 50 else [])]
        raise UserError(*"\n    ".join(listed if len(problems) > 1 else problems).split("\n    "))
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


def mixed_frames(root: Path, splits: list[str]) -> str | None:
    """A warning if CamVid's drives are split at random, as in Kaggle's copy: neighbours of test frames are trained on.

    None if at most a fifth of the frames outside train lie between two training frames of their drive.
    """
    frames = sorted((*path.stem.rsplit("_", 1), split) for split in splits if (root / split).is_dir()
                    for path in (root / split).iterdir() if camvid.standard_split(path.stem))  # (drive, number, split)
    between = sum(before[0] == drive == after[0] and before[2] == after[2] == "train" != split
                  for before, (drive, _, split), after in zip(frames, frames[1:], frames[2:]))
    if between <= 0.2 * sum(split != "train" for _, _, split in frames):
        return None
    return (f"warning: {between} frames outside train lie between two training frames of the same drive: scores will "
            f"be too high; python -m datasets.download --from ARCHIVE restores the standard split")


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
    if not splits:
        splits, _ = ["train", "val"], camvid.find_folders(root, "train")
    if args.write_classes:
        if table.exists():
            raise UserError(f"{table} is there already; remove it first")
        text = "\n".join(suggest_table(root, splits)) + "\n"
        write_file(table, lambda path: path.write_text(text))
        print(f"{text}wrote {table}; now give the classes their names, and call what is to be ignored Void")
        return 0
    reports = [check_split(root, split, classes, args.label_format, args.val_percent) for split in splits]
    problems, warning = all_problems(root, reports, classes), mixed_frames(root, splits)
    print("\n".join([class_line(reports[0], classes), *(describe(report, classes) for report in reports),
                     *([warning] if warning else []), f"{len(problems)} problems",
                     *(f"  {problem}" for problem in problems)]))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
