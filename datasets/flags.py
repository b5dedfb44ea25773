"""The flags that describe the data, and the DataSpec that they describe."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.classes import CAMVID, CLASS_FILES, CLASS_SETS, IGNORED, ClassSet
from datasets.layouts import VAL_PERCENT, Split, all_pairs, find_splits, standard_split
from datasets.masks import Survey, class_table, detect_format, packed, survey_masks
from datasets.spec import DataSpec, SplitReport
from support.command import Parser, UserError, number
from support.files import every_nth
from support.images import FULL_RANGE, deep_values, open_image

MAX_LINES = 50  # problems that are listed before training
LABEL_FORMATS = {
    "auto": "",
    "rgb": "colours",
    "nearest": "blended colours",
    "ids": "class ids",
    "segnet": "SegNet's ids",
}
DATA_NAME_HELP = """class set; auto reads a class_dict.csv or the like in the folder, else looks
into the masks"""
VAL_PERCENT_HELP = f"""percentage of the training images that is held out for validation if there
are no others, the last by name; if not given, {VAL_PERCENT:.0f}"""


def add_data_flags(parser: Parser) -> None:
    """The flags that describe the data, the same for every command."""
    parser.add_flags(
        "data",
        ("--data_root", Path, None, "folder with train/, train_labels/, val/, …"),
        ("--data_name", ("auto", *CLASS_SETS), "auto", DATA_NAME_HELP),
        ("--classes", Path, None, "file that names the classes, if it is not in --data_root"),
        ("--label_format", tuple(LABEL_FORMATS), "auto", "of the masks"),
        ("--num_classes", int, None, "number of classes in masks of ids"),
        ("--val_percent", number(float, 1, 90), None, VAL_PERCENT_HELP),
    )


def open_data(
    args, splits: Sequence[str] = ("train", "val"), trained: dict | None = None
) -> DataSpec:
    """The data that the flags describe, with every file of the splits read.

    Prints what was found. args.max_side: None takes the longest side of the training images.
    trained: of `describe_data`. Raises UserError with all problems, one a line.
    """
    data = describe_data(args, trained)
    print(f"reading {data.root}", flush=True)
    reports = data.check(splits)
    problems = data.problems(reports)
    if len(problems) > 1:
        problems = [f"{data.root}: {len(problems)} problems", *problems[:MAX_LINES]]
    if problems:
        raise UserError(*problems)
    for report in reports.values():
        print(f"{report.split}: {len(report.pairs)} images", *report.lines(), sep="\n")
    print(class_line(data, reports[splits[0]]))
    warn_of_split(data.splits)
    if data.value_range != FULL_RANGE:
        low, high = data.value_range
        print(f"16-bit images: values from {low} to {high} become 0 to 255")
    max_side = args.max_side
    if max_side is None:
        max_side = max(max(size) for size in reports["train"].sizes)
    return replace(data, max_side=max_side, reports=reports)


def describe_data(args, trained: dict | None = None) -> DataSpec:
    """The data that the flags describe; a sample of its files is read.

    trained: the config of a checkpoint, for the classes of data without names and for the range of
    16-bit images. Raises UserError if the layout or the classes cannot be known.
    """
    root = args.data_root
    if root is None:
        raise UserError("--data_root DIR is needed, a folder with train/ (or try train.py --demo)")
    layout, splits = find_splits(root, args.val_percent or VAL_PERCENT)
    pairs = all_pairs(splits)
    masks = [pair.mask for pair in pairs]
    sample = survey_masks(every_nth(masks))
    table = args.classes or class_file(root, splits)
    if args.data_name != "auto":
        classes = CLASS_SETS[args.data_name.lower()]  # checkpoints before 3.2 hold CamVid
    elif table:
        classes = ClassSet.from_file(table)
    elif trained:
        classes = trained_classes(trained["classes"], args, sample)
    elif layout.class_set:
        classes = CLASS_SETS[layout.class_set]
    else:
        classes = guess_classes(args, masks, sample)
    if args.num_classes not in (None, len(classes)):
        others = "" if table else class_sets_of(args.num_classes, classes)
        raise UserError(
            f"--num_classes {args.num_classes}: {classes.source or root} has {len(classes)} "
            f"classes; leave it out for these{others}"
        )
    label_format = args.label_format
    if label_format == "auto":
        label_format = detect_format(sample, classes)
    if trained:
        value_range = trained["value_range"]
    else:
        value_range = find_value_range([pair.image for pair in pairs])
    return DataSpec(root, classes, label_format, args.max_side or 0, value_range, splits)


def class_sets_of(count: int, given: ClassSet) -> str:
    """What to add to a sentence for other class sets of ``count`` classes; empty without any."""
    names = [
        name
        for name, known in CLASS_SETS.items()
        if known != given and count in (len(known), len(known.scored))
    ]
    return "".join(f", or add --data_name {name}" for name in names)


def warn_of_split(splits: dict[str, Split]) -> None:
    """Warn of CamVid frames that are not in the literature's split."""
    images = [pair.image for name in splits.keys() - {"train"} for pair in splits[name].pairs]
    moved = sum(standard_split(image.stem) == "train" for image in images)
    if moved:  # as most are in Kaggle's copy, which is split at random
        print(
            f"warning: the literature trains on {moved} frames that are not in train here; if "
            f"neighbouring frames are in train, scores are too high; python -m datasets.download "
            f"--from ARCHIVE --out DIR sorts them into the standard split"
        )


def trained_classes(trained: ClassSet, args, sample: Survey) -> ClassSet:
    """The class set of a checkpoint, which has no aliases, with those of a known dataset.

    sample: of the masks. Raises UserError if they have other colours.
    """
    known = (classes for classes in CLASS_SETS.values() if replace(classes, aliases=()) == trained)
    classes = next(known, trained)
    is_rgb = args.label_format == "auto" and detect_format(sample, classes) == "rgb"
    if is_rgb and not fits(sample, classes):
        raise UserError(
            f"{args.data_root}: the colours of its masks are not those of the checkpoint's classes "
            f"({', '.join(trained.names)}); add a class_dict.csv, or name another --checkpoint"
        )
    return classes


def class_file(root: Path, splits: dict[str, Split]) -> Path | None:
    """The file that names the classes: in the data folder, or beside the images of a split."""
    folders = [root, *(split.pairs[0].image.parent for split in splits.values() if split.pairs)]
    paths = [folder / name for name in CLASS_FILES for folder in folders]
    return next(filter(Path.is_file, paths), None)


def guess_classes(args, masks: list[Path], sample: Survey) -> ClassSet:
    """The classes of data without names: CamVid's, or nameless ones for masks of ids.

    sample: of the masks. Raises UserError with the lines of a class_dict.csv if the masks hold
    neither.
    """
    if args.label_format == "ids" and args.num_classes:
        return ClassSet.numbered(args.num_classes)
    if args.label_format == "segnet" or not sample.pixels:
        return CAMVID  # without masks that can be read, the check has more to say
    if args.label_format != "ids" and holds_camvid(sample):
        return CAMVID
    of_camvid = sum(standard_split(path.stem) is not None for path in masks) > len(masks) / 2
    if of_camvid and args.label_format == "auto" and detect_format(sample, CAMVID) == "segnet":
        return CAMVID
    survey = survey_masks(masks)
    count = survey.class_ids()
    if args.label_format == "ids":
        count = max((value for value in survey.values if value < IGNORED), default=0) + 1
    if count:
        return ClassSet.numbered(max(count, args.num_classes or 0))
    table = args.data_root / "class_dict.csv"
    ids = "; or add --label_format ids, if their values are class ids" if survey.values else ""
    raise UserError(
        f"{args.data_root}: the colours of the masks are not CamVid's, and no file names the "
        f"classes; put these lines into {table}, with names of your own (python -m datasets.check "
        f"--data_root {args.data_root} --write_classes does it){ids}:",
        *class_table(args.data_root, survey),
    )


def holds_camvid(survey: Survey) -> bool:
    """Whether masks have at least half of CamVid's classes, and few pixels of other colours."""
    present = {i for color, i in CAMVID.known_colors.items() if survey.colors[packed(color)]}
    return len(present & {*CAMVID.scored}) > 5 and fits(survey, CAMVID)


def fits(survey: Survey, classes: ClassSet) -> bool:
    """Whether less than a quarter of the masks' pixels has colours of no class."""
    unknown = survey.unknown(classes)
    if survey.are_blended():
        unknown = survey.strange_colors(classes)
    return not survey.pixels or unknown.total() < survey.pixels / 4


def find_value_range(images: Sequence[Path]) -> tuple[int, int]:
    """The 0.1 and 99.9 percentiles of 16-bit images, from a sample of them; else all values."""
    values = []
    for path in every_nth(images):
        if path.suffix.lower() in (".png", ".tif", ".tiff"):
            with contextlib.suppress(UserError):  # the check names the file
                image = open_image(path)
                if image.info["deep"]:
                    values.append(deep_values(image, path)[::4, ::4].ravel())
    if not values:
        return FULL_RANGE
    low, high = np.percentile(np.concatenate(values), (0.1, 99.9)).astype(int).tolist()
    return (low, high) if low < high else FULL_RANGE


def class_line(data: DataSpec, report: SplitReport) -> str:
    """The classes, where they come from, what masks hold, and the classes without a pixel."""
    classes = data.classes
    ignored = ""
    if classes.ignore_index < len(classes):
        ignored = f" (+ {classes.names[classes.ignore_index]}, ignored)"
    source = f" of {classes.source}" if classes.source else ""
    if classes == ClassSet.numbered(len(classes)):
        source = " without names (datasets.check --write_classes writes a table for them)"
    absent = [classes.names[i] for i in classes.scored if not report.pixels[i]]
    missing = f"; {report.split} has no pixel of {', '.join(absent)}" if absent else ""
    masks = LABEL_FORMATS[data.label_format]
    return f"classes: {len(classes.scored)}{ignored}{source}; masks of {masks}{missing}"
