"""Checkpoint files that describe themselves.

A file holds plain Python types and tensors only and is read with ``weights_only=True``, so that opening a stranger's
file never executes code. ``_best.pth`` holds the weights that predict, their scores and the config; ``_last.pth`` adds
``training``, what a resume needs.
"""
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets.classes import ClassSet
from inference.predictor import Predictor, fitting_tile, fold_batch_norm
from support.command import UserError, one_line
from support.files import write_file
from training.schema import CHECKPOINT, FORMAT, check, check_checkpoint, describe_network

SHIPPED = Path(__file__).parents[1] / "checkpoint" / "camvid_unet.pth"
LOCAL_FLAGS = ("data_root", "checkpoint", "resume", "init_from", "workers", "device")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` and the format number, whole or not at all. Raises RunError if the disk refuses."""
    buffer = io.BytesIO()  # a file that is full, or closed after Ctrl-C, can make torch's writer abort the process
    try:
        torch.save({"format": FORMAT, **state}, buffer)
    except RuntimeError as error:  # of the writer's end, which hides what came first, such as Ctrl-C
        raise error.__context__ or error from None
    write_file(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: Path, training: bool = False) -> dict:
    """Read a checkpoint onto the CPU, in today's format and as `schema` declares it.

    training: with what a resume needs. Raises UserError for a missing, broken or foreign file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file; train one with train.py, or name another")
    size = Path(path).stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no sums, and would unpack any number of bytes
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError("it would unpack to more than its size")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file raises nearly anything in the unpickler
        reason = one_line(error).split(". ")[0]
        raise UserError(f"{path}: not a readable checkpoint: cut off, or not train.py's ({reason})") from None
    try:
        state = upgrade(state)
        if training and "training" not in state:
            raise UserError("cannot be resumed, it holds weights alone or is of version 1; use --init_from")
        check_checkpoint(state, size, training)
        if side := state["config"]["train"].get("image_size"):
            raise UserError(f"was trained with --image_size, now gone; train anew with --max_side {max(side)}")
    except (ValueError, TypeError, AttributeError) as error:  # a forged dictionary may have no methods
        reason = str(error) if isinstance(error, UserError) else f"not a valid checkpoint: {error}"
        raise UserError(f"{path}: {reason}") from None
    return state


def upgrade(state: Any) -> dict:
    """A checkpoint in today's format. Raises ValueError where it is of none that is known."""
    check(state, {"format": CHECKPOINT["format"]})
    if state["format"] > FORMAT:
        raise UserError(f"has format {state['format']}, this program reads up to {FORMAT}; update it")
    if state["format"] < FORMAT:
        averaged, raw = (state.get(f"{kind}_state_dict") for kind in ("ema", "model"))
        return {"format": FORMAT, "state_dict": raw if averaged is None else averaged, "config": state.get("config")}
    return state


def newest(folder: Path, pattern: str) -> Path | None:
    """The newest file of a folder whose name fits the pattern, if there is one."""
    found = [path for path in folder.glob(pattern) if path.is_file()]  # a link may lead nowhere
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def default_checkpoint(folder: Path = Path("checkpoint")) -> Path:
    """The newest ``*_best.pth`` of a folder, else the shipped weights."""
    return newest(folder, "*_best.pth") or SHIPPED


def load_weights(model: nn.Module, checkpoint: dict, classes: ClassSet) -> str:
    """Load a checkpoint's weights; of its classifier the rows of classes that have the same names. Returns what it did.

    model: of the checkpoint's name and width, for ``classes``.
    """
    weights, names = dict(checkpoint["state_dict"]), [name.casefold() for name in classes.names]
    before = [name.casefold() for name in checkpoint["config"]["classes"]["names"]]
    kept = [name for name in names if name in before]
    for key in ("classifier.weight", "classifier.bias"):
        rows = model.state_dict()[key].clone()
        rows[[names.index(name) for name in kept]] = weights[key][[before.index(name) for name in kept]].to(rows)
        weights[key] = rows
    model.load_state_dict(weights)
    if names == before:
        return "its weights are loaded"
    return (f"its weights are loaded; the classifier is new, with {len(names)} classes instead of {len(before)}, "
            f"{', '.join(classes.names[names.index(name)] for name in kept) or 'none'} kept by name")


def load_model(path: Path) -> tuple[nn.Module, ClassSet, dict]:
    """The trained network in evaluation mode, its classes and the checkpoint's config.

    Raises UserError as `load_checkpoint` does.
    """
    state = load_checkpoint(path)
    config = state["config"]
    config["max_side"], classes = config.get("max_side") or 0, {"ignore_index": None} | config["classes"]
    config["normalize"] = {key: config["normalize"][key] for key in ("mean", "std")}  # and nothing that is beside them
    model = describe_network(config)
    model.load_state_dict({name: state["state_dict"][name].to(like.dtype) for name, like in model.state_dict().items()},
                          assign=True)
    return model.eval(), ClassSet.from_dict(classes), config


def load_predictor(path: Path, max_side: int | None = None, tile: int | None = None,
                   **options) -> tuple[Predictor, ClassSet, dict]:
    """A Predictor with a checkpoint's network, its classes and config. options: those of Predictor.

    max_side, tile: None takes that of the training, and `fitting_tile`. Raises UserError as `load_model` does.
    """
    model, classes, config = load_model(path)
    max_side = config["max_side"] if max_side is None else max_side
    return Predictor(fold_batch_norm(model), classes.ignore_index, **config["normalize"], max_side=max_side,
                     tile=tile or fitting_tile(len(classes)), **options), classes, config


def release(source: Path, target: Path) -> None:
    """Write the weights that predict in half precision, and the config without what only this machine knows.

    Raises UserError if ``source`` is no trained model or its weights do not fit half precision.
    """
    state = load_checkpoint(source)
    config = state["config"]
    config["train"] = {key: value for key, value in config["train"].items() if key not in LOCAL_FLAGS}
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in state["state_dict"].items()}
    beyond = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if beyond:
        raise UserError(f"{source}: {beyond[0]} has values beyond half precision")
    save_checkpoint(target, {"state_dict": weights, "scores": state.get("scores"), "config": config})
