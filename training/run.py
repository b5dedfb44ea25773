"""A run: its folder, history, checkpoints, log, pictures, and how it is resumed."""

import csv
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Any

import numpy as np

from datasets.spec import DataSpec
from inference.checkpoints import LOCAL_FLAGS, load_checkpoint, newest, save_checkpoint
from metric import score_table
from output.visualize import panel_image, save_curves
from support.command import Parser, UserError
from support.files import atomic_path, locked, write_file
from training.distributed import rank, world_size
from training.trainer import Trainer

RUN_FILES = (
    "best.pth",
    "last.pth",
    "log.csv",
    "args.json",
    "curves.png",
    "panel.png",
    "tensorboard",
)
# Flags that a resumed run may change. The class sets are compared instead of data_name and
# num_classes; all others come from the run.
OTHER_FREE_FLAGS = ("epochs", "val_every", "tensorboard", "demo", "data_name", "num_classes")
LOGGED_SCORES = ("loss", "miou", "pixel_accuracy")


def resume_path(resume: str, folder: Path, model: str | None) -> Path | None:
    """The ``_last.pth`` that --resume names: a file, or the newest in a folder, of ``model`` if one
    is given; for a ``_best.pth``, the one beside it.

    auto: the newest in ``folder``; None if there is none.
    """
    pattern = f"{model or '[!.]*'}_last.pth"
    if resume == "auto":
        return newest(folder, pattern)
    path = Path(resume)
    if path.is_dir():
        return newest(path, pattern) or path / f"{model or 'unet'}_last.pth"
    return path.with_name(path.name.replace("_best.pth", "_last.pth"))


def take_flags_of_run(parser: Parser, path: Path, checkpoint: dict):
    """The flags of a run, but for those that are typed. Raises UserError without a run's state."""
    if "training" not in checkpoint:
        raise UserError(f"{path}: cannot be resumed, it holds weights alone; use --init_from")
    parser.set_defaults(**checkpoint["config"]["train"])
    args = parser.parse_args()
    # Under another name, the run would continue in the files of another run.
    if path.name != f"{checkpoint['config']['model']['name']}_last.pth":
        raise UserError(f"{path}: cannot be resumed under this name; call it MODEL_last.pth again")
    args.checkpoint = path.parent  # a run continues in its own folder
    args.resume = path
    return args


def refuse_changes(args, checkpoint: dict) -> None:
    """Raises UserError if typed flags contradict the recipe of the run that is resumed."""
    changed = [
        f"--{name} {stored}, now {getattr(args, name)}"
        for name, stored in checkpoint["config"]["train"].items()
        if name not in LOCAL_FLAGS + OTHER_FREE_FLAGS and getattr(args, name) != stored
    ]
    if changed:
        raise UserError(
            f"{args.resume}: cannot be resumed, it was trained with {'; '.join(changed)}; leave "
            f"these flags out, or start anew with --init_from {args.resume}"
        )


def import_tensorboard() -> type:
    """Raises UserError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


class Run:
    """The files ``folder/{model}_…`` of one training, which the main process alone writes.

    A context manager that holds the folder's lock, and prints how to resume a stopped run.
    checkpoint: that of --resume, which is restored, or of --init_from, which gives the weights.
    history: a row of figures for each finished epoch.
    """

    def __init__(self, args, data: DataSpec, trainer: Trainer, checkpoint: dict):
        self.args = args
        self.data = data
        self.is_main = rank() == 0
        self.lock = locked(args.checkpoint)
        self.history: list[dict] = []
        self.best_miou = -1.0
        self.writer: Any = import_tensorboard() if args.tensorboard else None
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.config = {
            "model": {"name": args.model, "options": {"width": args.width}},
            "classes": data.classes.to_dict(),
            "normalize": trainer.normalize,
            "max_side": data.max_side,
            "value_range": list(data.value_range),
            "train": flags,
        }
        if args.resume:
            self.resume(checkpoint, trainer)
        elif checkpoint:
            done = trainer.init_from(checkpoint)
            print(f"{args.init_from}: {done}; learning rate {args.lr:g}, max_side {data.max_side}")
        self.resumed = self.epoch
        self.recorded = time.perf_counter()

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def minutes(self) -> float:
        """The time of all finished epochs, in minutes."""
        return sum(row.get("seconds", 0.0) for row in self.history) / 60

    def path(self, name: str) -> Path:
        """The path of one of RUN_FILES."""
        return self.args.checkpoint / f"{self.args.model}_{name}"

    def __enter__(self) -> "Run":
        if self.is_main:
            self.lock.__enter__()
            if not self.args.resume:
                self.archive()
            flags = json.dumps(self.config["train"], indent=2) + "\n"
            write_file(self.path("args.json"), lambda path: path.write_text(flags, "utf-8"))
            if self.writer:
                # purge_step drops what a killed run logged of the epoch that is repeated.
                self.writer = self.writer(self.path("tensorboard"), purge_step=self.epoch + 1)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.is_main:
            if self.history and kind in (KeyboardInterrupt, SystemExit):
                path = shlex.quote(str(self.path("last.pth")))
                print(
                    f"\nstopped; to continue after epoch {self.epoch}, add to the same command:\n"
                    f"  --resume {path}",
                    file=sys.stderr,
                )
            self.lock.__exit__(kind, error, traceback)

    def resume(self, checkpoint: dict, trainer: Trainer) -> None:
        """Restore a run. Raises UserError if the data or the number of processes have changed."""
        state = checkpoint["training"]
        for what, before, now in (
            ("classes", checkpoint["config"]["classes"]["names"], list(self.data.classes.names)),
            ("processes", state["processes"], world_size()),
            ("updates an epoch", state["steps_per_epoch"], trainer.steps_per_epoch),
        ):
            if before != now:
                raise UserError(
                    f"{self.args.resume}: cannot be resumed, {what}: {before}, now {now}"
                )
        try:
            trainer.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = shorten(str(error), 200)
            raise UserError(f"{self.args.resume}: does not fit the network ({reason})") from None
        self.history = state["history"]
        if self.path("best.pth").is_file():
            self.best_miou = state["best_miou"]
        print(f"resumed after epoch {self.epoch}, from {self.args.resume}")
        if self.epoch >= self.args.epochs:
            print("nothing is left to train; a larger --epochs continues the run")

    def archive(self) -> None:
        """Move the files of an earlier run, if it left weights, into a subfolder."""
        files = [path for path in map(self.path, RUN_FILES) if path.exists()]
        if not any(path.suffix == ".pth" for path in files):
            return
        number = len(list(self.args.checkpoint.glob(f"{self.args.model}_until_*"))) + 1
        archive = self.path(f"until_{time.strftime('%Y-%m-%d_%H%M%S')}_{number}")
        archive.mkdir()
        for path in files:
            path.rename(archive / path.name)
        print(f"archived the previous run in {archive}")

    def record(self, row: dict[str, float], scores: dict, trainer: Trainer) -> None:
        """Add an epoch to the history; save, print and draw it.

        row: of `train_one_epoch`. scores: of `validate`; empty if this epoch was not validated.
        """
        speed = row.pop("images_per_second")
        now = time.perf_counter()
        row["seconds"] = now - self.recorded
        self.recorded = now
        row |= {f"val_{key}": scores[key] for key in LOGGED_SCORES if key in scores}
        if scores:
            classes = self.data.classes
            row |= {f"iou/{classes.names[i]}": float(scores["iou"][i]) for i in classes.scored}
        rounded = {key: float(f"{value:.6g}") for key, value in row.items()}
        self.history.append({"epoch": self.epoch + 1} | rounded)
        miou = float(np.nan_to_num(scores.get("miou", -1.0)))  # NaN would never be beaten
        is_best = miou > self.best_miou
        self.best_miou = max(miou, self.best_miou)
        if self.is_main:
            self.save(scores, is_best, trainer)
            self.print_epoch(row, speed, is_best)
            self.show(row, trainer)

    def save(self, scores: dict, is_best: bool, trainer: Trainer) -> None:
        """Write the log, then ``_best.pth`` if this epoch is the best, then ``_last.pth``.

        In this order a killed run repeats the epoch and writes the same files again.
        """
        try:
            self.save_log()
        except UserError as error:  # such as a table that is open in Excel
            print(f"warning: {error}", file=sys.stderr)
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in scores.items()}
        weights = trainer.ema.module.state_dict()
        checkpoint = {"state_dict": weights, "scores": plain, "config": self.config}
        if is_best:
            save_checkpoint(self.path("best.pth"), checkpoint)
        progress = {"history": self.history, "best_miou": self.best_miou}
        checkpoint["training"] = trainer.state_dict() | progress
        save_checkpoint(self.path("last.pth"), checkpoint)

    def save_log(self) -> None:
        """Write the history as CSV; the scores of epochs that were not validated are empty."""
        columns = dict.fromkeys(key for row in self.history for key in row)
        log = self.path("log.csv")
        with atomic_path(log) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.history)

    def print_epoch(self, row: dict[str, float], speed: float, is_best: bool) -> None:
        """One line of figures, with the remaining time."""
        recent = [row["seconds"] for row in self.history[self.resumed :]]
        left = fmean(recent) / 60 * (self.args.epochs - self.epoch)
        line = f"epoch {self.epoch:>3}/{self.args.epochs}  loss {row['train_loss']:.3f}  "
        if "val_miou" in row:
            line += f"val ce {row['val_loss']:.3f} mIoU {row['val_miou']:.3f} "
            line += f"acc {row['val_pixel_accuracy']:.3f}  "
        line += f"lr {row['lr']:.2g}  {speed:.1f} img/s  {left:.1f} min left"
        if is_best:
            line += " *best"
        print(line, flush=True)

    def show(self, row: dict[str, float], trainer: Trainer) -> None:
        """Draw the curves and a panel of predictions after a validation; log for TensorBoard."""
        if "val_miou" in row:
            save_curves(self.history, self.path("curves.png"), self.data.classes)
            dataset = self.data.dataset("val", native_masks=True)
            predictor = trainer.predictor()
            frames = map(dataset.read, sorted({0, len(dataset) // 2, len(dataset) - 1}))
            rows = [(image, mask, predictor.predict(image)) for image, mask in frames]
            write_file(self.path("panel.png"), panel_image(rows, self.data.classes).save)
        if self.writer:
            for key, value in row.items():
                self.writer.add_scalar(key, value, self.epoch)
            self.writer.flush()

    def print_summary(self) -> None:
        """The best epoch's table, and what to run next."""
        path = self.path("best.pth")
        if not path.is_file():
            return
        best = shlex.quote(str(path))
        data = shlex.quote(str(self.args.data_root))
        classes = self.data.classes
        scores = load_checkpoint(path)["scores"]
        print(f"\ntraining took {self.minutes:.1f} minutes; best weights: {best}")
        print(score_table(scores, classes.names, classes.ignore_index))
        print(f"\npictures: {self.path('panel.png')}, {self.path('curves.png')}\nnext:")
        print(f"  python predict.py --image_dir IMAGES --checkpoint {best}")
        print(f"  python evaluate.py --data_root {data} --split val --checkpoint {best}")
