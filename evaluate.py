"""Score checkpoints on a labelled split: a table per class, and a JSON file.

python evaluate.py --data_root data/CamVid --split test
python evaluate.py --data_root data/CamVid --checkpoint checkpoint/unet_best.pth --tta flip
python evaluate.py --data_root data/CamVid --report report      then open report/index.html
python evaluate.py --data_root data/CamVid runs/a runs/b        compares two runs
"""

import json
import os
import tomllib
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.flags import add_data_flags, open_data
from datasets.layouts import split_name
from datasets.spec import DataSpec, SplitReport
from datasets.transforms import eval_transform
from inference.checkpoints import find_checkpoint, load_checkpoint, open_predictor, read_config
from inference.predictor import Predictor, add_inference_flags, validate
from metric import format_score, score_table
from output.report import Report, plain
from support.command import Parser, UserError, number, run_command
from support.device import loader_options
from support.files import local_path, make_folder, write_file
from support.images import limited_size

ROOT = Path(__file__).parent


def main(args) -> None:
    named = [find_checkpoint(path) for path in (args.checkpoint, *args.runs) if path]
    if len(named) > 1:
        refuse_other_classes(named)
    checkpoints: list = named or [None]
    results = [evaluate(Namespace(**vars(args) | {"checkpoint": path})) for path in checkpoints]
    if len(results) > 1:
        print(f"\n{comparison(named, results)}")


def refuse_other_classes(checkpoints: list[Path]) -> None:
    """Raises UserError if checkpoints that are to be compared have different classes."""
    names = [read_config(path, load_checkpoint(path))["classes"].names for path in checkpoints]
    for path, others in zip(checkpoints, names):
        if others != names[0]:
            raise UserError(f"{path}: its classes differ from those of {checkpoints[0]}")


def open_run(args) -> tuple[Predictor, dict, DataSpec]:
    """The network of args.checkpoint, its config, and the data of args.split.

    Sets the flags that are not given. Raises UserError if the data have other classes.
    """
    chosen = "" if args.checkpoint else " (the newest in checkpoint/; --checkpoint names another)"
    predictor, config = open_predictor(args)
    args.max_side = predictor.max_side
    args.split = split_name(args.split) or args.split
    take_flags_of_training(args, config["train"])
    data = open_data(args, [args.split], config)
    classes = data.classes
    trained = config["classes"]
    if (classes.names, classes.ignore_index) != (trained.names, trained.ignore_index):
        raise UserError(
            f"{args.checkpoint}{chosen}: was trained on {', '.join(trained.names)}; "
            f"{args.data_root} has {', '.join(classes.names)}"
        )
    return predictor, config, data


def evaluate(args) -> dict:
    """Score args.checkpoint, print its table and write its files.

    Returns the scores of `validate`, and the ``names`` of the classes.
    """
    predictor, config, data = open_run(args)
    classes = data.classes
    dataset = data.dataset(args.split, eval_transform(**config["normalize"]), native_masks=True)
    loader = DataLoader(dataset, **loader_options(predictor.device, args.workers))
    make_folder(args.save_dir)
    report = Report(classes)

    def add_to_report(ids: Tensor) -> None:
        i = len(report.cards)
        image, mask = dataset.read(i)
        report.add(dataset.pairs[i].image.stem, image, ids[0].cpu().numpy(), mask)

    scores = validate(predictor, loader, add_to_report if args.report else None)
    title = f"{args.checkpoint} on {args.split} of {args.data_root}, --tta {args.tta}"
    print(f"{title}, {len(dataset)} images")
    print(score_table(scores, classes.names, classes.ignore_index))
    print_shrunk(data.reports[args.split], args.max_side)
    name = file_name(args, config["max_side"])
    write_metrics(args.save_dir / f"{name}.json", args, scores, data)
    if args.report:
        folder = args.report / name if args.runs else args.report
        print(f"wrote {report.write(folder, title, scores)}")
    return scores | {"names": classes.names}


def print_shrunk(report: SplitReport, max_side: int) -> None:
    """Say how many images the network saw at a smaller size."""
    sizes = report.sizes.items()
    shrunk = sum(count for size, count in sizes if limited_size(size, max_side) != size)
    if shrunk:
        print(
            f"{shrunk} images were shrunk to {max_side} pixels on the longer side; if objects are "
            f"as large as in training, add --max_side 0"
        )


def file_name(args, trained_side: int) -> str:
    """Base name of the output files, such as checkpoint_unet_best_CamVid_val.

    trained_side: max_side of the training; another one is part of the name.
    """
    path = local_path(Path(os.path.abspath(args.checkpoint))).with_suffix("")  # without ".."
    parts = list(path.relative_to(path.anchor).parts)
    parts += [args.data_root.resolve().name, args.split]
    if args.tta != "none":
        parts.append(args.tta)
    if args.max_side != trained_side:
        parts.append(f"max_side_{args.max_side}")
    return "_".join(parts)


def comparison(checkpoints: list[Path], results: list[dict]) -> str:
    """The IoU of each class for several checkpoints, mean and standard deviation, as text.

    results: of their `evaluate`. Raises UserError if the images differ.
    """
    first = results[0]
    for path, scores in zip(checkpoints, results):
        if (scores["pixels"] != first["pixels"]).any():
            raise UserError(f"{path}: was scored on other images than {checkpoints[0]}")
    rows = {name: [scores["iou"][i] for scores in results] for i, name in enumerate(first["names"])}
    rows["mIoU"] = [scores["miou"] for scores in results]
    width = max(map(len, rows))
    lines = [f"{i}: {path}" for i, path in enumerate(checkpoints, 1)]
    numbers = "".join(f"{i:>7}" for i in range(1, len(results) + 1))
    lines.append(f"{'class':<{width}}{numbers}   mean ± standard deviation")
    for name, values in rows.items():
        if not np.isnan(values).all():
            cells = "".join(f"{format_score(value):>7}" for value in values)
            spread = f"{format_score(np.mean(values))} ± {format_score(np.std(values, ddof=1))}"
            lines.append(f"{name:<{width}}{cells}   {spread}")
    return "\n".join(lines)


def take_flags_of_training(args, trained: dict) -> None:
    """Set the flags of the data that are not given, as in the training."""
    for flag in ("data_name", "label_format", "num_classes", "val_percent"):
        if getattr(args, flag) in (None, "auto") and flag in trained:
            setattr(args, flag, trained[flag])
    table = Path(trained.get("classes") or "")
    if not args.classes and table.is_file():
        args.classes = table


def write_metrics(path: Path, args, scores: dict, data: DataSpec) -> None:
    """Write what was evaluated, the scores, and the confusion matrix (true class, predicted class)
    as JSON, without the ignored class; undefined scores are null.
    """
    classes = data.classes
    scored = classes.scored
    sizes = data.reports[args.split].sizes
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    metrics: dict = {
        "checkpoint": args.checkpoint.as_posix(),
        "data_root": args.data_root.as_posix(),
        "split": args.split,
        "images": sizes.total(),
        "sizes": {f"{width}x{height}": count for (height, width), count in sizes.items()},
        "max_side": args.max_side,
        "tta": args.tta,
        "version": project["version"],
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    for key in ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1"):
        metrics[key] = plain(scores[key])
    metrics["per_class"] = [
        {"id": i, "name": classes.names[i], "pixels": int(scores["pixels"][i])}
        | {key: plain(scores[key][i]) for key in ("iou", "accuracy", "f1")}
        for i in scored
    ]
    metrics["confusion_matrix"] = scores["confusion_matrix"][scored][:, scored].tolist()
    text = json.dumps(metrics, indent=2) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8"))
    print(f"wrote {path}")


def get_args_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__)
    runs_help = "checkpoints, or folders of runs, to compare"
    parser.add_argument("runs", type=Path, nargs="*", help=runs_help)
    add_data_flags(parser)
    add_inference_flags(parser)
    parser.add_flags(
        "evaluation",
        ("--split", str, "val", "folder of the split in --data_root: train, val or test"),
        ("--save_dir", Path, Path("evaluation"), "folder for the JSON file of the scores"),
        ("--report", Path, None, "folder for index.html, a page of all images"),
        ("--workers", number(int, 0), None, "data loader processes; if not given, as suits"),
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
