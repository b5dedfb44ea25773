"""A training run: the state that a resume restores, and the files in its folder."""
import contextlib
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

from support.command import RunError, UserError, is_main_process, one_line
from support.files import atomic_path, locked, write_file
from training.checkpoints import load_checkpoint, save_checkpoint
from training.recipe import WeightAverage

# A resumed run restores its schedule and momentum, so flags that contradict them are refused, not ignored.
FIXED_FLAGS = ("model", "width", "optimizer", "lr", "momentum", "weight_decay", "scheduler", "step_size", "gamma",
               "batch_size", "clip_grad", "crop_size", "max_side", "scale", "jitter", "class_weights", "loss",
               "label_smoothing", "ema", "seed")
RUN_FILES = ("best.pth", "last.pth", "log.csv", "args.json", "curves.png", "panel.png", "tensorboard")


@dataclass
class TrainingState:
    """What training changes, ``_last.pth`` holds and a resume restores. history: one row of figures an epoch."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: WeightAverage | None
    steps_per_epoch: int
    history: list[dict] = field(default_factory=list)
    best_miou: float = -1.0

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def scored_model(self) -> nn.Module:
        """The network that is scored and predicts: the average of the weights, if there is one."""
        return self.ema.module if self.ema else self.model

    def record(self, row: dict[str, float]) -> bool:
        """Add an epoch's figures to the history. Returns whether its ``val_miou`` is the best so far."""
        # Without times, so that the files of two equal runs are equal.
        self.history.append({"epoch": self.epoch + 1} | {key: round(value, 6) for key, value in row.items()
                                                         if key != "images_per_second"})
        score = row.get("val_miou", -1.0)
        score = 0.0 if np.isnan(score) else score  # no pixel of val is labelled
        best = score > self.best_miou
        self.best_miou = max(score, self.best_miou)
        return best

    def after_update(self) -> None:
        """Move the average towards the present weights."""
        if self.ema:
            self.ema.update()

    def state_dict(self) -> dict:
        """Plain types and tensors for a checkpoint."""
        return {"model_state_dict": self.model.state_dict(),
                "ema_state_dict": self.ema.module.state_dict() if self.ema else None,
                "ema_updates": self.ema.updates if self.ema else 0,
                "optimizer_state_dict": self.optimizer.state_dict(),
                "scheduler_state_dict": self.scheduler.state_dict(),
                "scaler_state_dict": self.scaler.state_dict(),
                "history": self.history, "best_miou": self.best_miou, "steps_per_epoch": self.steps_per_epoch}

    def restore(self, path: Path, config: dict) -> None:
        """Go on from a ``_last.pth``. config: of this run.

        Raises UserError if the file holds no training state, or one of another model, class set or recipe.
        """
        checkpoint = load_checkpoint(path)
        state = checkpoint.get("training")
        if not isinstance(state, dict):
            raise UserError(f"{path}: cannot be resumed, it holds weights alone or is of version 1; use --init_from")
        changed = recipe_changes(checkpoint["config"], config)
        if state.get("steps_per_epoch") != self.steps_per_epoch:
            changed.append(f"{state.get('steps_per_epoch')} updates an epoch, now {self.steps_per_epoch}: other data")
        if changed:
            raise UserError(f"{path}: cannot be resumed, it was trained with {'; '.join(changed)}; give the old flags, "
                            f"or start anew with --init_from {path}")
        try:
            self.model.load_state_dict(state["model_state_dict"])
            self.optimizer.load_state_dict(state["optimizer_state_dict"])
            self.scheduler.load_state_dict(state["scheduler_state_dict"])
            if state["scaler_state_dict"]:  # empty from a run that was not in fp16
                self.scaler.load_state_dict(state["scaler_state_dict"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema_state_dict"])
                self.ema.updates = state["ema_updates"]
            self.history, self.best_miou = list(state["history"]), float(state["best_miou"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: cannot be resumed, its state does not fit ({one_line(error)})") from None


def recipe_changes(before: dict, now: dict) -> list[str]:
    """What differs between the configs of a checkpoint and of a run that resumes it, and must not."""
    fixed = (*FIXED_FLAGS, "epochs") if now["train"]["scheduler"] == "onecycle" else FIXED_FLAGS
    changed = [f"--{key} {before['train'].get(key)}, now {now['train'][key]}" for key in fixed
               if before["train"].get(key) != now["train"][key]]
    if before["classes"] != now["classes"]:
        changed.append(f"other classes, {', '.join(map(str, before['classes']['names']))}")
    return changed


class RunFiles:
    """The files of a run, ``folder/{model}_…``. In torchrun's further processes nothing is written."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.model = folder, model

    def path(self, name: str) -> Path:
        """Where the file of that name, one of RUN_FILES, lies."""
        return self.folder / f"{self.model}_{name}"

    def held(self) -> contextlib.AbstractContextManager:
        """Keep other runs out of the folder. Raises UserError that names the one that is in it."""
        return locked(self.folder) if is_main_process() else contextlib.nullcontext()

    def prepare(self, flags: dict, keep_earlier: bool) -> None:
        """Write the flags, plain types.

        keep_earlier: move the files of an earlier run into a folder of their own: training never costs a model.
        """
        if not is_main_process():
            return
        files = [path for path in map(self.path, RUN_FILES) if path.exists()]
        if keep_earlier and any(path.suffix == ".pth" for path in files):
            aside = self.path(f"until_{time.strftime('%Y-%m-%d_%H%M%S')}")
            taken = len([*self.folder.glob(f"{aside.name}*")])  # clocks are set back, and seconds are long
            aside = aside.with_name(f"{aside.name}_{taken + 1}") if taken else aside
            aside.mkdir()
            for path in files:
                path.rename(aside / path.name)
            print(f"moved the earlier run in {self.folder} to {aside}")
        write_file(self.path("args.json"), lambda path: path.write_text(json.dumps(flags, indent=2) + "\n"))

    def save(self, state: TrainingState, config: dict, scores: dict, best: bool) -> None:
        """Write the log, then ``_best.pth`` if this epoch is the best, then ``_last.pth``. scores: of `validate`.

        In this order a run that is killed in between repeats the epoch and writes the same files again.
        """
        if not is_main_process():
            return
        try:
            self.save_log(state.history)
        except RunError as error:  # such as a table that is open in Excel; the next epoch writes it whole
            print(f"warning: {error}", file=sys.stderr)
        plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in scores.items()}
        checkpoint = {"state_dict": state.scored_model.state_dict(), "scores": plain, "config": config}
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
