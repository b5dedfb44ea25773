"""Score a checkpoint on a labelled split: a table per class, metrics.json and a picture of the confusion matrix.

    python evaluate.py --data_root data/CamVid --split test
    python evaluate.py --data_root data/CamVid --split val --checkpoint checkpoint/unet_best.pth --tta flip
    python evaluate.py --data_root data/CamVid --report report      then open report/index.html
"""
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from checkpoints import default_checkpoint, load_model
from datasets.camvid import CamVidDataset, find_classes
from datasets.check import add_data_flags, check_data, stray_line
from datasets.classes import ClassSet
from datasets.transforms import eval_transform
from engine import validate
from inference import add_inference_flags, predictor_from_flags
from metric import SegmentationMetric, score_table
from report import Report
from runtime import (
    OneLineParser,
    UserError,
    atomic_path,
    default_workers,
    init_worker,
    keep_freed_memory,
    make_folder,
    run_command,
    select_device,
    whole_number,
)
from visualize import save_confusion_matrix


def get_args_parser() -> OneLineParser:
    parser = OneLineParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add_data_flags(parser)
    add_inference_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--split", default="val", help="folder of the split in --data_root: train, val or test")
    group.add_argument("--save_dir", type=Path, default=Path("evaluation"), metavar="DIR",
                       help="folder for metrics.json and confusion_matrix.png")
    group.add_argument("--report", type=Path, metavar="DIR",
                       help="folder for index.html, a page of all pictures from the worst to the best")
    group.add_argument("--workers", type=whole_number,
                       help="loader processes; 0 loads in the main one; when not given: what suits the machine")
    return parser


def data_classes(args, trained: ClassSet, flags: dict) -> ClassSet:
    """The data's classes, read with the training run's flags where this command gives none.

    Raises UserError if they are not the classes that the checkpoint was trained on.
    """
    for key in ("data_name", "label_format", "num_classes", "ignore_class"):
        if getattr(args, key) in (None, "auto") and flags.get(key) is not None:
            setattr(args, key, flags[key])
    classes = find_classes(args.data_root, args.data_name, args.label_format, args.num_classes, args.ignore_class)
    if classes.to_dict() != trained.to_dict():
        raise UserError(f"{args.checkpoint}: was trained on {len(trained)} classes ({', '.join(trained.names)}), "
                        f"{args.data_root} has {len(classes)} ({', '.join(classes.names)})")
    return classes


def metrics_dict(scores: dict, names: tuple[str, ...], ignore_index: int | None, images: int) -> dict:
    """The scores as plain JSON types; undefined ones are null. The ignored class is left out."""
    def plain(value: float) -> float | None:
        return None if math.isnan(value) else float(value)
    overall = {key: plain(scores[key]) for key in ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1")}
    per_class = [{"id": i, "name": name, **{key: plain(scores[key][i]) for key in ("iou", "accuracy", "f1")},
                  "pixels": int(scores["pixels"][i])} for i, name in enumerate(names) if i != ignore_index]
    return {**overall, "images": images, "per_class": per_class}


def main(args) -> int:
    if args.data_root is None:
        raise UserError("--data_root DIR is needed, the folder with val/ and val_labels/")
    device = select_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    args.checkpoint = args.checkpoint or default_checkpoint()
    model, trained, config = load_model(args.checkpoint)
    classes = data_classes(args, trained, config["train"])
    report = check_data(args.data_root, [args.split], classes, args.label_format)[args.split]
    if report.stray:
        print(stray_line(report))
    dataset = CamVidDataset(args.data_root, args.split, classes, eval_transform(), args.label_format,
                            config["train"].get("image_size"), native_labels=True)
    workers = default_workers(device) if args.workers is None else args.workers
    loader = DataLoader(dataset, args.batch_size if len(report.sizes) == 1 else 1, num_workers=workers,
                        pin_memory=device.type == "cuda", worker_init_fn=init_worker)
    predictor = predictor_from_flags(args, model, classes.ignore_index, config, device)
    metric, folder = SegmentationMetric(len(classes), classes.void_id), make_folder(args.save_dir)
    if args.report:
        make_folder(args.report)
    report, order = Report(classes), iter(range(len(dataset)))

    def add_to_report(ids: Tensor) -> None:
        for prediction in ids.to(torch.uint8).cpu().numpy():
            i = next(order)
            photo, label = dataset.read(i)
            report.add(dataset.pairs[i].photo.stem, photo, prediction, label)

    validate(predictor, loader, metric, on_batch=add_to_report if args.report else lambda ids: None)
    scores = metric.compute()
    print(f"{args.checkpoint} on {args.split} of {args.data_root}, {len(dataset)} images"
          f"{'' if args.tta == 'none' else f', averaged over {args.tta}'}")
    print(score_table(scores, classes.names, classes.ignore_index))
    with atomic_path(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics_dict(scores, classes.names, classes.ignore_index, len(dataset)),
                                        indent=2) + "\n")
    scored = classes.scored
    save_confusion_matrix(metric.confusion_matrix()[scored][:, scored], tuple(classes.names[i] for i in scored),
                          folder / "confusion_matrix.png")
    print(f"wrote {folder / 'metrics.json'} and {folder / 'confusion_matrix.png'}")
    if args.report:
        title = f"{args.checkpoint.stem} on {args.split} of {args.data_root.resolve().name}"
        print(f"wrote {report.write(args.report, title, metric)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
