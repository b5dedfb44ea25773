"""A training run: the state that a resume restores, and the files in its folder."""
import csv
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from datasets.check import SplitReport
from datasets.classes import ClassSet
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from support.command import Parser, RunError, UserError, is_main_process
from support.files import atomic_path, write_file
from training.checkpoints import load_checkpoint, newest, save_checkpoint
from training.distributed import world_size
from training.recipe import WeightAverage

# A resumed run keeps these flags; one that is typed and contradicts them is refused, not ignored.
FIXED_FLAGS = ("model", "width", "optimizer", "lr", "momentum", "weight_decay", "scheduler", "step_size", "gamma",
               "batch_size", "clip_grad", "crop_size", "max_side", "scale", "jitter", "class_weights", "loss",
               "label_smoothing", "ema", "seed", "val_percent")
KEPT_FLAGS = (*FIXED_FLAGS, "epochs", "val_every", "data_name", "label_format", "num_classes", "amp")
RUN_FILES = ("best.pth", "last.pth", "log.csv", "args.json", "curves.png", "panel.png", "tensorboard")


@dataclass
class TrainingState:
    """What training changes, ``_last.pth`` holds and a resume restores. history: one row of figures an epoch."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    ema: WeightAverage
    steps_per_epoch: int
    history: list[dict] = field(default_factory=list)
    best_miou: float = -1.0

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    def record(self, row: dict[str, float]) -> bool:
        """Add an epoch's figures to the history. Returns whether its ``val_miou`` is the best so far."""
        # Without times, so that the files of two equal runs are equal.
        self.history.append({"epoch": self.epoch + 1} | {key: float(f"{value:.6g}") for key, value in row.items()
                                                         if key != "images_per_second"})
        score = float(np.nan_to_num(row.get("val_miou", -1.0)))  # NaN would never be beaten
        best, self.best_miou = score > self.best_miou, max(score, self.best_miou)
        return best

    def state_dict(self) -> dict:
        """Plain types and tensors for a checkpoint."""
        return {"model_state_dict": self.model.state_dict(), "ema_state_dict": self.ema.module.state_dict(),
                "optimizer_state": {f"{i}.{key}": tensor for i, kept in self.optimizer.state_dict()["state"].items()
                                    for key, tensor in kept.items()},
                "scaler_state_dict": self.scaler.state_dict(), "updates": self.scheduler.last_epoch,
                "history": self.history, "best_miou": self.best_miou, "steps_per_epoch": self.steps_per_epoch,
                "processes": world_size()}

    def restore(self, path: Path, checkpoint: dict, config: dict) -> None:
        """Go on from a checked ``_last.pth``. config: of this run.

        Raises UserError if it is one of another model, class set or recipe, or of other data.
        """
        state, before, now = checkpoint["training"], checkpoint["config"], config["train"]
        changed = [f"--{key} {before['train'].get(key)}, now {now[key]}" for key in FIXED_FLAGS
                   if before["train"].get(key) != now[key]]
        if before["classes"] != config["classes"]:
            changed.append(f"other classes, {', '.join(before['classes']['names'])}")
        if state["processes"] != world_size():
            changed.append(f"{state['processes']} processes, now {world_size()}")
        elif state["steps_per_epoch"] != self.steps_per_epoch:
            changed.append(f"{state['steps_per_epoch']} updates an epoch, now {self.steps_per_epoch}: other data")
        if changed:
            raise UserError(f"{path}: cannot be resumed, it was trained with {'; '.join(changed)}; go on as it was, or "
                            f"start anew with --init_from {path}")
        self.model.load_state_dict(state["model_state_dict"])
        self.ema.module.load_state_dict(state.get("ema_state_dict") or state["model_state_dict"])
        if state.get("scaler_state_dict"):
            self.scaler.load_state_dict(state["scaler_state_dict"])
        kept: dict[int, dict] = {}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, tensor in state["optimizer_state"].items():
            index, key = name.split(".")
            p = parameters[int(index)]  # whose memory format fused updates need
            kept.setdefault(int(index), {})[key] = torch.empty_like(p).copy_(tensor) if key != "step" else tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": kept})
        # The schedule depends on the update and on the flags alone, so that it has no further state.
        self.scheduler = LambdaLR(self.optimizer, self.scheduler.lr_lambdas, last_epoch=state["updates"] - 1)
        self.ema.updates, self.history, self.best_miou = state["updates"], list(state["history"]), state["best_miou"]


def take_flags(args, parser: Parser, stored: dict, path: Path) -> None:
    """Set flags to what a checkpoint has, where it has them and they are not typed.

    Raises UserError for one that the parser refuses.
    """
    def refuse(message: str):
        raise UserError(f"{path}: not a valid checkpoint: config.train: {message}")

    words: list[str] = []
    for name, value in stored.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(repr, value)]  # a text could be another flag
        elif value is not None:
            words.append(f"--{name}={value}")
    parser.error = refuse  # type: ignore[method-assign, assignment]
    parser.parse_args([*words, *sys.argv[1:]], args)


def resumed_file(resume: str | None, folder: Path, model: str | None) -> Path | None:
    """The ``_last.pth`` that --resume means; of ``_best.pth``, which holds weights alone, the one beside it.

    auto: the newest in ``folder``, if there is one; of ``model`` where that is typed.
    """
    if resume is None:
        return None
    if resume == "auto":
        return newest(folder, f"{model or '*'}_last.pth")
    path = Path(resume)
    beside = path.with_name(path.name.replace("_best.pth", "_last.pth"))
    return beside if beside.is_file() else path


def describe(args, classes: ClassSet, reports: dict[str, SplitReport]) -> dict:
    """What a checkpoint says of itself."""
    return {"model": {"name": args.model, "options": {"width": args.width}}, "classes": classes.to_dict(),
            "normalize": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
            "max_side": max(map(max, reports["train"].sizes)) if args.max_side is None else args.max_side,
            "train": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}}


class RunFiles:
    """The files of a run, ``folder/{model}_…``, which its first process alone writes."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.model = folder, model

    def path(self, name: str) -> Path:
        """Where the file of that name, one of RUN_FILES, lies."""
        return self.folder / f"{self.model}_{name}"

    def set_aside(self) -> None:
        """Move the files of an earlier run, if it left weights, into a folder of their own."""
        files = [path for path in map(self.path, RUN_FILES) if path.exists()]
        if not any(path.suffix == ".pth" for path in files):
            return
        count = len([*self.folder.glob(f"{self.model}_until_*")])  # clocks are set back, and seconds are long
        aside = self.path(f"until_{time.strftime('%Y-%m-%d_%H%M%S')}_{count + 1}")
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        print(f"moved the earlier run in {self.folder} to {aside}")

    def save(self, state: TrainingState, config: dict, scores: dict, best: bool) -> None:
        """Write the log, then ``_best.pth`` if this epoch is the best, then ``_last.pth``. scores: of `validate`.

        In this order a run that is killed in between repeats the epoch and writes the same files again.
        """
        try:
            self.save_log(state.history)
        except RunError as error:  # such as a table that is open in Excel; the next epoch writes it whole
            print(f"warning: {error}", file=sys.stderr)
        plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in scores.items()}
        checkpoint = {"state_dict": state.ema.module.state_dict(), "scores": plain, "config": config}
        if best:
            save_checkpoint(self.path("best.pth"), checkpoint)
        save_checkpoint(self.path("last.pth"), {**checkpoint, "training": state.state_dict()})

    def save_log(self, history: list[dict]) -> None:
        """Write a CSV row for each epoch. Raises RunError if the disk refuses."""
        columns = dict.fromkeys(key for row in history for key in row)  # not every epoch is validated
        with atomic_path(self.path("log.csv")) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(history)


def best_beside(path: Path, best_miou: float) -> dict | None:
    """The ``_best.pth`` beside a ``_last.pth``, if it is of that score and so of the same run."""
    best = path.with_name(path.name.replace("_last.pth", "_best.pth"))
    if best == path or not best.is_file():
        return None
    checkpoint = load_checkpoint(best)
    return checkpoint if abs((checkpoint.get("scores") or {}).get("miou", -1) - best_miou) < 1e-5 else None


def begin(args, files: RunFiles, state: TrainingState, config: dict, checkpoint: dict | None) -> None:
    """Restore the run of --resume, clear its folder for it, and write its flags there."""
    here, best = False, None
    if args.resume and checkpoint:
        state.restore(args.resume, checkpoint, config)
        here = args.resume.resolve() == files.path("last.pth").resolve()
        best = best_beside(args.resume, state.best_miou)
        scored = f", best val mIoU {state.best_miou:.3f}" if state.best_miou >= 0 else ""
        print(f"resumed after epoch {state.epoch}{scored}, from {args.resume}"
              + ("; nothing is left to train, a larger --epochs goes on" if state.epoch >= args.epochs else ""))
    if is_main_process():
        if not here:
            files.set_aside()
            if best:
                save_checkpoint(files.path("best.pth"), best)
        flags = json.dumps(config["train"], indent=2) + "\n"
        write_file(files.path("args.json"), lambda path: path.write_text(flags))
    if not files.path("best.pth").is_file():
        state.best_miou = -1.0  # the best of a run that goes on without its best file is yet to come
