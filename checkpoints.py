"""Checkpoint files that describe themselves: weights, the model's name and options, classes, normalisation, flags.

A file holds plain Python types and tensors only and is read with ``weights_only=True``, so that opening a
stranger's file never executes code.

    python checkpoints.py checkpoint/unet_best.pth my_model.pth        the weights alone, to give away: 6 times smaller
"""
import csv
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from datasets.classes import ClassSet
from model import build_model
from runtime import (
    OneLineParser,
    RunError,
    UserError,
    atomic_path,
    is_main_process,
    make_folder,
    remove_file,
    rng_state,
    run_command,
    set_rng_state,
    temporary_path,
)

FORMAT = 1
SHIPPED = Path(__file__).parent / "checkpoint" / "camvid_unet.pth"
CONFIG_KEYS = ("model", "classes", "normalize", "train")
# A resumed run restores its schedule and momentum, so flags that contradict them are refused, not ignored.
FIXED_FLAGS = ("model", "width", "optimizer", "lr", "momentum", "weight_decay", "scheduler", "step_size", "gamma",
               "warmup_steps", "batch_size", "grad_accum", "clip_grad", "crop_size", "image_size", "scale", "jitter",
               "class_weights", "loss", "label_smoothing", "ema", "seed")
RUN_FILES = ("best.pth", "last.pth", "log.csv", "args.json", "curves.png", "panel.png", "tensorboard")
LOCAL_FLAGS = ("data_root", "checkpoint", "resume", "init_from", "cache", "workers", "device")
TRAINING_KEYS = ("epoch", "steps_per_epoch", "best_miou", "ema_state_dict", "optimizer_state_dict",
                 "scheduler_state_dict", "scaler_state_dict", "rng_state", "history")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` and the format number, whole or not at all. Raises UserError if the disk refuses."""
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": FORMAT, **state}, temporary)
        except RuntimeError as error:  # torch's file writer reports a full disk so
            raise OSError(str(error).splitlines()[0]) from None


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError for a missing, broken, foreign or unsafe file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; train one with train.py or name another with --checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file raises nearly anything in the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(f"{path}: not a readable checkpoint: truncated, or not written by "
                        f"train.py ({reason})") from None
    config = state.get("config") if isinstance(state, dict) else None
    described = isinstance(config, dict) and all(isinstance(config.get(key), dict) for key in CONFIG_KEYS)
    if not described or not isinstance(state.get("model_state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint of this program (no model_state_dict or config)")
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {state.get('format')}, this program reads {FORMAT}; update it")
    return state


def default_checkpoint(folder: Path = Path("checkpoint"), shipped: Path = SHIPPED) -> Path:
    """The newest ``*_best.pth`` of a folder, else the shipped weights. Raises UserError if there is neither."""
    found = sorted(folder.glob("*_best.pth"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1]
    if not shipped.is_file():
        raise UserError(f"{folder}: no *_best.pth in it; train a model with train.py, or name one with --checkpoint")
    return shipped


def load_training_state(path: Path) -> dict:
    """`load_checkpoint` for a resume. Raises UserError also for a released file, which cannot be resumed."""
    state = load_checkpoint(path)
    missing = [key for key in TRAINING_KEYS if key not in state]
    if missing:
        raise UserError(f"{path}: cannot be resumed, it has no {', '.join(missing)}; use --init_from for its weights")
    return state


def load_model(path: Path) -> tuple[nn.Module, ClassSet, dict]:
    """The trained network (its averaged weights where there are some), its classes and the checkpoint's config.

    Raises UserError where the weights do not fit the described model or are not finite.
    """
    state = load_checkpoint(path)
    config = state["config"]
    weights = state.get("ema_state_dict") or state["model_state_dict"]
    try:
        classes = ClassSet.from_dict(config["classes"])
        config["normalize"] = {key: [float(x) for x in config["normalize"][key]] for key in ("mean", "std")}
        config["max_side"] = int(config.get("max_side", 0))
        classes.to_rgb(np.arange(len(classes)))
        options = {"width": config["model"]["options"]["width"]}  # nothing that could start a download
        model = build_model(config["model"]["name"], len(classes), **options)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights do not fit the model it describes ({reason})") from None
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise UserError(f"{path}: its weights hold NaN or infinite values; use an earlier checkpoint")
    return model.eval(), classes, config


@dataclass
class Run:
    """Everything that a checkpoint holds and a resume restores."""

    args: Namespace
    classes: ClassSet
    model: nn.Module
    optimizer: Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    steps_per_epoch: int
    normalize: dict
    max_side: int
    history: list[dict] = field(default_factory=list)
    best_miou: float = -1.0

    @property
    def epoch(self) -> int:
        return len(self.history)

    def path(self, name: str) -> Path:
        """Where the run's file of that name, one of RUN_FILES, lies."""
        return self.args.checkpoint / f"{self.args.model}_{name}"

    def flags(self) -> dict:
        """Every flag, as plain types."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "best_miou": self.best_miou,
            "model_state_dict": self.model.state_dict(),
            "ema_state_dict": self.ema.module.state_dict() if self.ema else None,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "rng_state": rng_state(),
            "history": self.history,
            "config": {
                "model": {"name": self.args.model, "options": {"width": self.model.classifier.in_channels}},
                "classes": self.classes.to_dict(),
                "normalize": self.normalize,
                "max_side": self.max_side,
                "train": self.flags(),
            },
        }

    def restore(self, path: Path) -> None:
        """Go on from a _last.pth. Raises UserError if it belongs to another model, class set or recipe."""
        state = load_training_state(path)
        check_same_recipe(path, state["config"], self.args, self.classes)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(f"{path}: the training data has changed: an epoch was {state['steps_per_epoch']} updates, "
                            f"is {self.steps_per_epoch}; start anew with --init_from {path}")
        load_weights(self.model, state["model_state_dict"], path)
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        if state["scaler_state_dict"]:  # empty from a run that was not in fp16
            self.scaler.load_state_dict(state["scaler_state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema_state_dict"])
            self.ema.n_averaged.fill_(state["epoch"] * self.steps_per_epoch)
        set_rng_state(state["rng_state"])
        self.history, self.best_miou = state["history"], state["best_miou"]

    def remove_unfinished(self) -> None:
        """Remove the files that a killed run was writing."""
        if is_main_process():
            for name in RUN_FILES:
                remove_file(temporary_path(self.path(name)))

    def set_earlier_aside(self) -> None:
        """Move the files of an earlier run into a folder of their own: training never costs a model."""
        files = [path for path in map(self.path, RUN_FILES) if path.exists()]
        if not any(path.suffix == ".pth" for path in files) or not is_main_process():
            return
        aside = make_folder(self.path(f"until_{time.strftime('%Y-%m-%d_%H%M%S')}"))
        for path in files:
            path.rename(aside / path.name)
        print(f"moved the earlier run in {self.args.checkpoint} to {aside}")

    def save(self, best: bool) -> None:
        """The log first, then _last.pth: a run killed in between repeats the epoch and writes the same row."""
        if not is_main_process():
            return
        try:
            with atomic_path(self.path("log.csv")) as temporary, open(temporary, "w", newline="") as file:
                columns = dict.fromkeys(key for row in self.history for key in row)  # not every epoch is validated
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.history)
        except RunError as error:  # such as a table that is open in Excel; the next epoch writes it whole
            print(f"warning: {error}", file=sys.stderr)
        state = self.state_dict()
        if best:
            save_checkpoint(self.path("best.pth"), state)
        save_checkpoint(self.path("last.pth"), state)


def check_same_recipe(path: Path, config: dict, args: Namespace, classes: ClassSet) -> None:
    """Raises UserError if a flag that a resume cannot change differs from the checkpoint's."""
    if config["classes"] != classes.to_dict():
        raise UserError(f"{path}: was trained on other classes ({', '.join(config['classes']['names'])})")
    fixed = FIXED_FLAGS if args.scheduler in ("step", "none") else (*FIXED_FLAGS, "epochs")
    changed = [f"--{key} {config['train'].get(key)}, now {getattr(args, key)}" for key in fixed
               if config["train"].get(key) != getattr(args, key)]
    if changed:
        raise UserError(f"{path}: cannot be resumed with another recipe: it was trained with {'; '.join(changed)}; "
                        f"give the old flags, or start anew with --init_from {path}")


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """``model.load_state_dict``. Raises UserError where names or shapes differ."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights do not fit this model ({reason})") from None


def release(source: Path, target: Path) -> None:
    """Write the weights that predict, in half precision, and the config without what only this machine knows.

    Raises UserError if ``source`` is no trained model or its weights do not fit half precision.
    """
    model, _, config = load_model(source)
    config["train"] = {key: value for key, value in config["train"].items() if key not in LOCAL_FLAGS}
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in model.state_dict().items()}
    lost = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if lost:
        raise UserError(f"{source}: {lost[0]} has values beyond half precision")
    save_checkpoint(target, {"model_state_dict": weights, "config": config})


def main(args) -> int:
    release(args.source, args.target)
    print(f"wrote {args.target}, {args.target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    parser = OneLineParser(prog="checkpoints.py", description="Write a checkpoint's weights alone, to give away.")
    parser.add_argument("source", type=Path, help="a checkpoint of train.py")
    parser.add_argument("target", type=Path, help="the file to write")
    raise SystemExit(run_command(main, parser))
