"""Score a checkpoint on a labelled split: a table per class, and metrics.json.

python evaluate.py --data_root data/CamVid --split test
python evaluate.py --data_root data/CamVid --checkpoint checkpoint/unet_best.pth --tta flip
python evaluate.py --data_root data/CamVid --report report      then open report/index.html
"""

import json
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader

from datasets.classes import ClassSet
from datasets.flags import add_data_flags, open_data
from datasets.layouts import split_name
from datasets.transforms import eval_transform
from inference.checkpoints import open_predictor
from inference.predictor import add_inference_flags, validate
from metric import score_table
from output.report import Report, plain
from support.command import Parser, UserError, number, run_command
from support.device import loader_options
from support.files import make_folder, write_file
from support.images import limited_size


def main(args) -> None:
    predictor, config = open_predictor(args)
    args.max_side = predictor.max_side
    args.split = split_name(args.split) or args.split
    take_flags_of_training(args, config["train"])
    data = open_data(args, [args.split], config)
    classes = data.classes
    trained = config["classes"]
    if (classes.names, classes.ignore_index) != (trained.names, trained.ignore_index):
        raise UserError(
            f"{args.checkpoint}: was trained on {', '.join(trained.names)}; {args.data_root} has "
            f"{', '.join(classes.names)}"
        )
    dataset = data.dataset(args.split, eval_transform(**config["normalize"]), native_masks=True)
    loader = DataLoader(dataset, **loader_options(predictor.device, args.workers))
    make_folder(args.save_dir)
    report = Report(classes)

    def add_to_report(ids: Tensor) -> None:
        i = len(report.cards)
        image, mask = dataset.read(i)
        report.add(dataset.pairs[i].image.stem, image, ids[0].cpu().numpy(), mask)

    scores = validate(predictor, loader, add_to_report if args.report else None)
    source = f"{args.split} of {args.data_root}"
    print(f"{args.checkpoint} on {source}, {len(dataset)} images, --tta {args.tta}")
    print(score_table(scores, classes.names, classes.ignore_index))
    sizes = data.reports[args.split].sizes.items()
    shrunk = sum(count for size, count in sizes if limited_size(size, args.max_side) != size)
    if shrunk:
        print(
            f"{shrunk} of them were shrunk to {args.max_side} pixels on the longer side; "
            f"--max_side 0 takes images at their own size"
        )
    write_metrics(args.save_dir / "metrics.json", scores, classes, len(dataset))
    if args.report:
        title = f"{args.checkpoint.stem} on {source}"
        print(f"wrote {report.write(args.report, title, scores)}")


def take_flags_of_training(args, trained: dict) -> None:
    """Set the flags of the data that are not given, as in the training."""
    for flag in ("data_name", "label_format", "num_classes", "val_percent"):
        if getattr(args, flag) in (None, "auto") and flag in trained:
            setattr(args, flag, trained[flag])
    table = Path(trained.get("classes") or "")
    if not args.classes and table.is_file():
        args.classes = table


def write_metrics(path: Path, scores: dict, classes: ClassSet, images: int) -> None:
    """Write the scores and the confusion matrix (true class, predicted class) as JSON, without the
    ignored class; undefined scores are null.
    """
    scored = classes.scored
    overall = ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1")
    metrics: dict = {key: plain(scores[key]) for key in overall}
    metrics["images"] = images
    metrics["per_class"] = [
        {"id": i, "name": classes.names[i], "pixels": int(scores["pixels"][i])}
        | {key: plain(scores[key][i]) for key in ("iou", "accuracy", "f1")}
        for i in scored
    ]
    metrics["confusion_matrix"] = scores["confusion_matrix"][scored][:, scored].tolist()
    text = json.dumps(metrics, indent=2) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text))
    print(f"wrote {path}")


def get_args_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__)
    add_data_flags(parser)
    add_inference_flags(parser)
    parser.add_flags(
        "evaluation",
        ("--split", str, "val", "folder of the split in --data_root: train, val or test"),
        ("--save_dir", Path, Path("evaluation"), "folder for metrics.json"),
        ("--report", Path, None, "folder for index.html, a page of all images"),
        ("--workers", number(int, 0), None, "data loader processes; if not given, as suits"),
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
