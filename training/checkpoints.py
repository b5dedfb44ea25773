"""Checkpoint files that describe themselves.

A file holds plain Python types and tensors only and is read with ``weights_only=True``, so that opening a stranger's
file never executes code. ``_best.pth`` holds the weights that predict, their scores and the config; ``_last.pth`` adds
``training``, what a resume needs.
"""
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.classes import ClassSet
from inference.predictor import Predictor, fold_batch_norm
from model import build_model
from support.command import UserError, one_line
from support.files import atomic_path

FORMAT = 2
SHIPPED = Path(__file__).parents[1] / "checkpoint" / "camvid_unet.pth"
CONFIG_KEYS = ("model", "classes", "normalize", "train")
LOCAL_FLAGS = ("data_root", "checkpoint", "resume", "init_from", "workers", "device")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` and the format number, whole or not at all. Raises RunError if the disk refuses."""
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": FORMAT, **state}, temporary)
        except RuntimeError as error:  # torch's file writer reports a full disk so
            raise OSError(str(error).splitlines()[0]) from None


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU, in today's format. Raises UserError for a missing, broken or foreign file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file; train one with train.py or name another with --checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file raises nearly anything in the unpickler
        reason = one_line(error).split(". ")[0]
        raise UserError(f"{path}: not a readable checkpoint: cut off, or not train.py's ({reason})") from None
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in CONFIG_KEYS):
        raise UserError(f"{path}: not a checkpoint of this program (no config)")
    if state.get("format") == 1:
        state = upgrade(path, state)
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: has format {state.get('format')}, this program reads up to {FORMAT}; update it")
    if not isinstance(state.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint of this program (no state_dict)")
    return state


def upgrade(path: Path, state: dict) -> dict:
    """The weights and config of a checkpoint of format 1. Raises UserError where images were squashed to a size."""
    size = state["config"]["train"].get("image_size")
    if size:
        raise UserError(f"{path}: was trained with --image_size, now gone; train anew with --max_side {np.max(size)}")
    weights = state.get("ema_state_dict") or state.get("model_state_dict")
    return {"format": FORMAT, "state_dict": weights, "scores": {}, "config": state["config"]}


def default_checkpoint(folder: Path = Path("checkpoint")) -> Path:
    """The newest ``*_best.pth`` of a folder, else the shipped weights."""
    found = [path for path in folder.glob("*_best.pth") if path.is_file()]  # a link may lead nowhere
    return max(found, key=lambda path: path.stat().st_mtime, default=SHIPPED)


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """``model.load_state_dict``. Raises UserError where names or shapes differ, or values are not finite."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: its weights do not fit this model ({one_line(error)})") from None
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{path}: its weights hold NaN or infinite values; use an earlier checkpoint")


def load_model(path: Path) -> tuple[nn.Module, ClassSet, dict]:
    """The trained network in evaluation mode, its classes and the checkpoint's config.

    Raises UserError where the weights do not fit the described model or are not finite.
    """
    state = load_checkpoint(path)
    config = state["config"]
    try:
        classes = ClassSet.from_dict(config["classes"])
        config["normalize"] = {key: [float(x) for x in config["normalize"][key]] for key in ("mean", "std")}
        config["max_side"] = int(config.get("max_side", 0))
        classes.to_rgb(np.arange(len(classes)))
        options = {"width": config["model"]["options"]["width"]}  # nothing that could start a download
        model = build_model(config["model"]["name"], len(classes), **options)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}: describes no model of this program ({one_line(error)})") from None
    load_weights(model, state["state_dict"], path)
    return model.eval(), classes, config


def load_predictor(path: Path, max_side: int | None = None, **options) -> tuple[Predictor, ClassSet, dict]:
    """A Predictor with a checkpoint's network, its classes and config. options: those of Predictor.

    max_side: where it is None, that of the training. Raises UserError as `load_model` does.
    """
    model, classes, config = load_model(path)
    max_side = config["max_side"] if max_side is None else max_side
    return Predictor(fold_batch_norm(model), classes.ignore_index, **config["normalize"], max_side=max_side,
                     **options), classes, config


def release(source: Path, target: Path) -> None:
    """Write the weights that predict in half precision, and the config without what only this machine knows.

    Raises UserError if ``source`` is no trained model or its weights do not fit half precision.
    """
    model, _, config = load_model(source)
    config["train"] = {key: value for key, value in config["train"].items() if key not in LOCAL_FLAGS}
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in model.state_dict().items()}
    beyond = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if beyond:
        raise UserError(f"{source}: {beyond[0]} has values beyond half precision")
    scores = load_checkpoint(source).get("scores", {})
    save_checkpoint(target, {"state_dict": weights, "scores": scores, "config": config})
