"""Score a checkpoint on a labelled split: a table per class, and metrics.json with the confusion matrix.

    python evaluate.py --data_root data/CamVid --split test
    python evaluate.py --data_root data/CamVid --split val --checkpoint checkpoint/unet_best.pth --tta flip
    python evaluate.py --data_root data/CamVid --report report      then open report/index.html
"""
from support.command import Parser, UserError, number, run_command  # isort: split

import json
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.camvid import CamVidDataset, find_classes
from datasets.check import add_data_flags, check_data, stray_line
from datasets.classes import ClassSet
from datasets.transforms import eval_transform
from inference.predictor import add_inference_flags, fitting_batch
from metric import SegmentationMetric, score_table
from output.report import Report, plain
from support.device import default_workers, init_worker, select_amp_dtype, select_device
from support.files import make_folder, write_file
from training.checkpoints import default_checkpoint, load_predictor
from training.engine import validate


def get_args_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__)
    add_data_flags(parser, required=True)
    add_inference_flags(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--split", default="val", help="folder of the split in --data_root: train, val or test")
    add("--save_dir", type=Path, default=Path("evaluation"), metavar="DIR", help="folder for metrics.json")
    add("--report", type=Path, metavar="DIR", help="folder for index.html, a page of all images, the worst first")
    add("--workers", type=number(int, 0, 1024), help="data loader processes; by default what suits the machine")
    return parser


def data_classes(args, trained: ClassSet, flags: dict) -> ClassSet:
    """The data's classes, read with the training run's flags where this command gives none.

    Raises UserError if they are not the classes that the checkpoint was trained on.
    """
    for key in ("data_name", "label_format", "num_classes", "val_percent"):
        if getattr(args, key) in (None, "auto") and flags.get(key) is not None:
            setattr(args, key, flags[key])
    classes = find_classes(args.data_root, args.data_name, args.label_format, args.num_classes)
    if (classes.names, classes.ignore_index) != (trained.names, trained.ignore_index):
        raise UserError(f"{args.checkpoint}: was trained on {len(trained)} classes ({', '.join(trained.names)}), "
                        f"{args.data_root} has {len(classes)} ({', '.join(classes.names)})")
    return classes


def metrics_dict(scores: dict, matrix: np.ndarray, classes: ClassSet, images: int) -> dict:
    """The scores and the (C, C) confusion matrix as plain JSON types, without the ignored class; undefined is null."""
    scored = classes.scored
    overall = {key: plain(scores[key]) for key in ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1")}
    per_class = [{"id": i, "name": classes.names[i], "pixels": int(scores["pixels"][i]),
                  **{key: plain(scores[key][i]) for key in ("iou", "accuracy", "f1")}} for i in scored]
    return {**overall, "images": images, "per_class": per_class,
            "confusion_matrix": matrix[scored][:, scored].tolist()}  # true class, predicted class


def main(args) -> int:
    device = select_device(args.device)
    args.checkpoint = args.checkpoint or default_checkpoint()
    predictor, trained, config = load_predictor(args.checkpoint, args.max_side, device=device, tile=args.tile,
                                                tta=args.tta, amp_dtype=select_amp_dtype(args.amp, device))
    classes = data_classes(args, trained, config["train"])
    checked = check_data(args.data_root, [args.split], classes, args.label_format, args.val_percent)[args.split]
    if checked.stray:
        print(stray_line(checked))
    dataset = CamVidDataset(args.data_root, args.split, classes, eval_transform(**config["normalize"]),
                            args.label_format, predictor.max_side, native_masks=True, val_percent=args.val_percent)
    workers = default_workers(device) if args.workers is None else args.workers
    loader = DataLoader(dataset, fitting_batch(args.batch_size, checked.sizes, len(classes)), num_workers=workers,
                        pin_memory=device.type == "cuda", worker_init_fn=init_worker)
    for folder in filter(None, (args.save_dir, args.report)):
        make_folder(folder)
    report, order = Report(classes), iter(range(len(dataset)))

    def add_to_report(ids: Tensor) -> None:
        for prediction, i in zip(ids.cpu().numpy(), order):
            image, mask = dataset.read(i)
            report.add(dataset.pairs[i].image.stem, image, prediction, mask)

    metric = SegmentationMetric(len(classes), classes.void_id)
    scores = validate(predictor, loader, metric, on_batch=add_to_report if args.report else lambda ids: None)
    print(f"{args.checkpoint} on {args.split} of {args.data_root}, {len(dataset)} images"
          f"{'' if args.tta == 'none' else f', averaged over {args.tta}'}")
    print(score_table(scores, classes.names, classes.ignore_index))
    metrics = json.dumps(metrics_dict(scores, metric.confusion_matrix(), classes, len(dataset)), indent=2) + "\n"
    write_file(args.save_dir / "metrics.json", lambda path: path.write_text(metrics))
    print(f"wrote {args.save_dir / 'metrics.json'}")
    if args.report:
        title = f"{args.checkpoint.stem} on {args.split} of {args.data_root.resolve().name}"
        print(f"wrote {report.write(args.report, title, metric)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
