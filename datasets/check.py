"""Check a data folder before training: names, sizes, colours and every file's readability, all problems at once.

    python -m datasets.check --data_root data/CamVid
"""
import io
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.camvid import (
    LABEL_FORMATS,
    Pair,
    find_classes,
    find_folders,
    find_pairs,
    open_image,
    read_label,
    read_photo,
    resolve_label_format,
    standard_split,
    to_rgb,
)
from datasets.classes import UNKNOWN, ClassSet
from runtime import OneLineParser, UserError, progress, run_command

MAX_STRAY = 0.01  # of a mask's pixels may have an unknown colour; they count as void


@dataclass
class SplitReport:
    """What one split holds. pixels: (256,) int64 label pixels by id, unknown ones at 255."""

    split: str
    pairs: int = 0
    sizes: Counter = field(default_factory=Counter)  # (height, width) -> frames
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    stray: dict[str, int] = field(default_factory=dict)  # mask -> pixels of unknown colour or id
    problems: list[str] = field(default_factory=list)


def check_split(root: Path, split: str, classes: ClassSet, label_format: str = "auto",
                quick: bool = False) -> SplitReport:
    """Decode every file of a split; what is wrong with it, missing folders too, is in the report's problems.

    quick: of photographs in PNG, check the size and the checksums alone.
    """
    report = SplitReport(split)
    try:
        photo_dir, label_dir = find_folders(root, split)
    except UserError as error:
        report.problems.append(str(error))
        return report
    pairs, report.problems = find_pairs(photo_dir, label_dir)
    report.pairs = len(pairs)
    label_format = resolve_label_format(label_format, label_dir, classes)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases Python's lock
        results = pool.map(lambda pair: _check_pair(pair, classes, label_format, quick), pairs)
        for pair, result in zip(pairs, progress(results, desc=f"checking {split}", total=len(pairs))):
            if isinstance(result, str):
                report.problems.append(result)
                continue
            size, pixels, stray = result
            report.sizes[size] += 1
            report.pixels += pixels
            if stray:
                report.stray[pair.label.name] = stray
    return report


def _photo_size(path: Path) -> tuple[int, int]:
    """(H, W) of a whole photograph: of a PNG by its checksums, in a tenth of the time that decoding takes."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()
        # Metadata may turn the picture; it stands before the pixels or, as some tools write it, at the end.
        turned = {"exif", "xmp", "Raw profile type exif"} & image.info.keys()
        if not turned and not any(tag in data[-65536:] for tag in (b"eXIf", b"exif", b"Orientation")):
            return image.height, image.width
    except Exception:  # another format, or broken: the decoder says in what way
        pass
    return read_photo(path).shape[:2]


def _count_colors(mask: Image.Image, classes: ClassSet) -> np.ndarray | None:
    """(256,) pixel counts by id of a mask in RGB, in half the time of turning every pixel into an id.

    None where it has more than 256 colours, or one that is in no class.
    """
    counted = mask.getcolors(256)
    if counted is None:
        return None
    counts, colors = zip(*counted)
    ids = classes.to_ids(np.array([colors], np.uint8))[0]
    return None if UNKNOWN in ids else np.bincount(ids, counts, 256).astype(np.int64)


def _check_pair(pair: Pair, classes: ClassSet, label_format: str,
                quick: bool) -> tuple[tuple[int, int], np.ndarray, int] | str:
    """The size (H, W), (256,) pixel counts and number of unknown pixels of a pair, or its problem."""
    pixels = None
    try:
        size = _photo_size(pair.photo) if quick else read_photo(pair.photo).shape[:2]
        if label_format == "rgb":
            mask = to_rgb(open_image(pair.label))
            label_size, pixels = (mask.height, mask.width), _count_colors(mask, classes)
        if pixels is None:
            ids = read_label(pair.label, classes, label_format)
            label_size = ids.shape
    except UserError as error:
        return str(error)
    if label_size != size:
        return (f"{pair.label}: is {label_size[1]}×{label_size[0]}, "
                f"its photograph {pair.photo.name} is {size[1]}×{size[0]}")
    if pixels is not None:
        return size, pixels, 0
    pixels = np.bincount(ids.ravel(), minlength=256)
    # 255 is the customary void of id masks; other unknown ids are as wrong as unknown colours.
    unknown = ids == UNKNOWN
    if label_format == "ids" and unknown.any():
        unknown &= np.asarray(open_image(pair.label)) != UNKNOWN
    if unknown.mean() > MAX_STRAY:
        return _describe_unknown(pair.label, unknown, classes, label_format)
    return size, pixels, int(unknown.sum())


def _describe_unknown(path: Path, unknown: np.ndarray, classes: ClassSet, label_format: str) -> str:
    image = open_image(path)
    values = np.asarray(image.convert("RGB") if label_format == "rgb" else image)[unknown]
    found, counts = np.unique(values.reshape(len(values), -1), axis=0, return_counts=True)
    top = np.argsort(-counts, kind="stable")[:4]
    shown = ", ".join(f"{'(' + ','.join(map(str, found[i])) + ')' if label_format == 'rgb' else found[i][0]} × "
                      f"{counts[i]:,}" for i in top)
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    hint = ""
    if label_format == "rgb" and (found.max(1) == found.min(1)).all() and found.max() <= len(classes):
        hint = "; these look like class ids: use --label_format ids"
    kind = "colours" if label_format == "rgb" else "ids"
    return (f"{path}: {unknown.mean():.1%} of its pixels have {kind} outside the {len(classes)} classes: "
            f"{shown}{more}{hint}")


def check_data(root: Path, splits: list[str], classes: ClassSet, label_format: str = "auto") -> dict[str, SplitReport]:
    """Reports by split, checked quickly. Raises UserError with every problem of all splits, one a line."""
    reports = {split: check_split(root, split, classes, label_format, quick=True) for split in splits}
    # Each once: every split says it where the root itself is missing.
    problems = list(dict.fromkeys(problem for report in reports.values() for problem in report.problems))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        listed = problems[:50] + ([f"… and {len(problems) - 50} more"] if len(problems) > 50 else [])
        raise UserError(f"{root}: {len(problems)} problems\n  " + "\n  ".join(listed))
    return reports


def describe(report: SplitReport, classes: ClassSet) -> str:
    """Counts, sizes, stray pixels and the pixel share of each class, as text."""
    sizes = ", ".join(f"{width}×{height} ({count})" for (height, width), count in report.sizes.most_common(4))
    lines = [f"{report.split}: {report.pairs} pairs, {sizes}{' …' if len(report.sizes) > 4 else ''}"]
    total = max(1, report.pixels.sum())
    for i, name in enumerate(classes.names):
        ignored = "  (ignored)" if i == classes.ignore_index else ""
        lines.append(f"  {i:>3} {name:<20} {report.pixels[i] / total:7.2%}{ignored}")
    if report.stray:
        lines.append(f"  {stray_line(report)}")
    return "\n".join(lines)


def mixed_frames(root: Path, splits: list[str]) -> str | None:
    """A warning where CamVid's drives are split at random, as in Kaggle's copy, so that neighbours are trained on."""
    frames = sorted((*path.stem.rsplit("_", 1), split) for split in splits if (root / split).is_dir()
                    for path in (root / split).iterdir() if standard_split(path.stem))
    held_out = [frame for frame in frames if frame[2] != "train"]
    between = [drive for (before, _, a), (drive, _, b), (after, _, c) in zip(frames, frames[1:], frames[2:])
               if b != "train" and a == c == "train" and before == drive == after]
    if len(between) < 0.2 * len(held_out) or not between:
        return None
    return (f"warning: {len(between)} of the {len(held_out)} frames outside train lie between two training frames of "
            f"the same drive: scores will be too high; python -m datasets.download --from ARCHIVE sorts them anew")


def stray_line(report: SplitReport) -> str:
    """One line on the pixels of unknown colour or id, for the log."""
    shown = ", ".join(f"{name} ({count})" for name, count in list(report.stray.items())[:3])
    return (f"{report.split}: {sum(report.stray.values())} pixels of unknown colour or id in {len(report.stray)} masks "
            f"count as void: {shown}{' …' if len(report.stray) > 3 else ''}")


def add_data_flags(parser: OneLineParser) -> None:
    """The flags that say what the data is, the same for every command."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_root", type=Path, metavar="DIR", help="folder with train/ train_labels/ val/ …")
    group.add_argument("--data_name", choices=("auto", "camvid", "camvid32"), default="auto",
                       help="class set: the folder's class_dict.csv or CamVid's 11 classes, or the 32 unmerged")
    group.add_argument("--label_format", choices=LABEL_FORMATS, default="auto",
                       help="masks as RGB colours, as class ids, or as the SegNet copy's ids")
    group.add_argument("--num_classes", type=int, metavar="N", help="checked against the data's class set")
    group.add_argument("--ignore_class", metavar="NAME", help="class that is neither trained nor scored")


def get_args_parser() -> OneLineParser:
    parser = OneLineParser(prog="datasets.check", description=__doc__.splitlines()[0])
    add_data_flags(parser)
    return parser


def main(args) -> int:
    if args.data_root is None:
        raise UserError("--data_root DIR is needed")
    classes = find_classes(args.data_root, args.data_name, args.label_format, args.num_classes, args.ignore_class)
    splits = [split for split in ("train", "val", "test")
              if any((args.data_root / f"{split}{end}").is_dir() for end in ("", "_labels", "annot"))]
    if not splits:
        find_folders(args.data_root, "train")
    reports = [check_split(args.data_root, split, classes, args.label_format) for split in splits]
    print("\n".join(describe(report, classes) for report in reports))
    warning = mixed_frames(args.data_root, splits)
    if warning:
        print(warning)
    problems = [problem for report in reports for problem in report.problems]
    print("\n".join([f"{len(problems)} problems", *(f"  {problem}" for problem in problems)]))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
