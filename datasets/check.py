"""Check a data folder before training: names, sizes, colours, and that every file can be read. Lists all problems.

    python -m datasets.check --data_root data/CamVid
"""
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets import camvid
from datasets.classes import UNKNOWN, ClassSet
from support.command import Parser, UserError, progress, run_command
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


def check_split(root: Path, split: str, classes: ClassSet, label_format: str = "auto") -> SplitReport:
    """Decode every file of a split. Its problems, missing folders too, are in the report."""
    try:
        image_dir, mask_dir = camvid.find_folders(root, split)
    except UserError as error:
        return SplitReport(split, problems=[str(error)])
    pairs, problems = camvid.find_pairs(image_dir, mask_dir)
    report = SplitReport(split, len(pairs), problems=problems)
    label_format = camvid.resolve_label_format(label_format, mask_dir, classes)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        results = pool.map(lambda pair: _check_pair(pair, classes, label_format), pairs)
        for pair, result in zip(pairs, progress(results, desc=f"checking {split}", total=len(pairs))):
            if isinstance(result, str):
                report.problems.append(result)
                continue
            size, pixels, stray = result
            report.sizes[size] += 1
            report.pixels += pixels
            if stray:
                report.stray[pair.mask.name] = stray
    return report


def _check_pair(pair: camvid.Pair, classes: ClassSet, label_format: str) -> tuple[tuple, np.ndarray, int] | str:
    """The size (H, W), the (256,) pixels by class id and the number of stray pixels of a pair, or its problem."""
    try:
        size, ids = read_image(pair.image).shape[:2], camvid.read_mask(pair.mask, classes, label_format)
        stray = ids == UNKNOWN
        if label_format == "ids" and stray.any():
            stray &= np.asarray(open_image(pair.mask)) != UNKNOWN  # 255 is the usual void of id masks
        if ids.shape != size:
            raise UserError("{}: is {}×{}, its image is {}×{}".format(pair.mask, *ids.shape[::-1], *size[::-1]))
        if stray.mean() > MAX_STRAY:
            raise UserError(_describe_stray(pair.mask, stray, classes, label_format))
    except UserError as error:
        return str(error)
    return size, np.bincount(ids.ravel(), minlength=256), int(stray.sum())


def _describe_stray(path: Path, stray: np.ndarray, classes: ClassSet, label_format: str) -> str:
    """Which unknown colours or ids a mask has, the most frequent first. stray: (H, W) bool."""
    values = np.asarray(to_rgb(open_image(path)) if label_format == "rgb" else open_image(path))[stray]
    found = Counter(map(tuple, values.reshape(len(values), -1).tolist()))
    shown = ", ".join(f"({','.join(map(str, value))}) × {count:,}" for value, count in found.most_common(4))
    hint = "; if these are class ids, use --label_format ids" if max(map(max, found)) < len(classes) else ""
    return f"{path}: {stray.mean():.1%} of its pixels are in none of the {len(classes)} classes: {shown}{hint}"


def check_data(root: Path, splits: list[str], classes: ClassSet, label_format: str = "auto") -> dict[str, SplitReport]:
    """Reports by split. Raises UserError with the problems of all splits, one a line."""
    reports = {split: check_split(root, split, classes, label_format) for split in splits}
    # As keys, because a missing root is the same problem in every split.
    problems = list(dict.fromkeys(problem for report in reports.values() for problem in report.problems))
    if problems:
        listed = [f"{root}: {len(problems)} problems", *problems[:50], *(["…"] if len(problems) > 50 else [])]
        raise UserError("\n  ".join(listed) if len(problems) > 1 else problems[0])
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
    shown = ", ".join(f"{name} ({count})" for name, count in list(report.stray.items())[:3])
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
    add("--data_name", choices=("auto", "camvid", "camvid32"), default="auto",
        help="class set: auto takes the folder's class_dict.csv, else CamVid's 11 classes")
    add("--label_format", choices=("auto", "rgb", "ids", "segnet"), default="auto",
        help="masks hold RGB colours, class ids, or the SegNet copy's ids")
    add("--num_classes", type=int, metavar="N", help="number of classes in masks of ids; else checked")


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.check", description=__doc__.splitlines()[0])
    add_data_flags(parser, required=True)
    return parser


def main(args) -> int:
    root = args.data_root
    classes = camvid.find_classes(root, args.data_name, args.label_format, args.num_classes)
    splits = [split for split in ("train", "val", "test")
              if any((root / f"{split}{end}").is_dir() for end in ("", "_labels", "annot"))]
    if not splits:
        camvid.find_folders(root, "train")
    reports = [check_split(root, split, classes, args.label_format) for split in splits]
    problems = [problem for report in reports for problem in report.problems]
    warning = mixed_frames(root, splits)
    print("\n".join([*(describe(report, classes) for report in reports), *([warning] if warning else []),
                     f"{len(problems)} problems", *(f"  {problem}" for problem in problems)]))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
