"""Checkpoint files that describe themselves.

A file holds plain Python types and tensors and is read with ``weights_only=True``, so that opening
a stranger's file never executes code. ``_best.pth`` holds the weights that predict, their scores
and the config; ``_last.pth`` adds ``training``, the state that a resume needs.
"""

import io
import zipfile
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn

from datasets.classes import ClassSet
from inference.predictor import Predictor, fold_batch_norm
from model import MODEL_NAMES, build_model
from support.command import UserError
from support.device import select_amp_dtype, select_device
from support.files import local_path, write_file
from support.images import FULL_RANGE

FORMAT = 2
SHIPPED = Path(__file__).parents[1] / "checkpoint" / "camvid_unet.pth"
LOCAL_FLAGS = ("data_root", "classes", "checkpoint", "resume", "init_from", "workers", "device")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` and the format number. Raises UserError if the file cannot be written."""
    buffer = io.BytesIO()  # on a full disk, torch's own writer can abort the process
    torch.save({"format": FORMAT, **state}, buffer)
    write_file(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()), durable=True)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of any version onto the CPU, as a dictionary of today's format.

    Raises UserError for a missing, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; train.py writes one; {local_path(SHIPPED)} is included"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load verifies no checksums
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it would unpack to more than its size")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = int(state["format"])
    except Exception as error:  # a damaged or foreign file raises nearly anything in the unpickler
        reason = shorten(str(error), 200)
        raise UserError(f"{path}: not a readable checkpoint of train.py ({reason})") from None
    if version > FORMAT:
        raise UserError(f"{path}: has format {version}, this program reads up to {FORMAT}")
    if version == 1:
        weights = state.get("ema_state_dict") or state.get("model_state_dict")
        return {"state_dict": weights, "config": state.get("config")}
    return state


def read_config(path: Path, checkpoint: dict) -> dict:
    """The config of a loaded checkpoint, with ``classes`` as a ClassSet.

    Raises UserError that names ``path`` if something is missing or is not what train.py writes.
    """
    try:
        config = checkpoint["config"]
        model = config["model"]["name"]
        if model not in MODEL_NAMES:
            raise ValueError(f"no model is called {model}")
        return {
            "model": model,
            "width": int(config["model"]["options"]["width"]),
            "classes": ClassSet.from_dict(config["classes"]),
            "normalize": config["normalize"],
            "max_side": config.get("max_side") or 0,
            "value_range": tuple(map(int, config.get("value_range") or FULL_RANGE)),
            "train": config["train"],
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of train.py ({error!r})") from None


def load_model(path: Path, checkpoint: dict | None = None) -> tuple[nn.Module, dict]:
    """The trained network in evaluation mode, and its config as `read_config` returns it.

    The network is built without memory and loaded strictly, so that a file that does not fit fails
    before anything is allocated. Raises UserError as `load_checkpoint` does.
    checkpoint: of that path, if it has been read already.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    config = read_config(path, checkpoint)
    with torch.device("meta"):
        model = build_model(config["model"], len(config["classes"]), width=config["width"])
    try:
        model.load_state_dict(checkpoint["state_dict"], assign=True)
    except (KeyError, RuntimeError, TypeError) as error:
        reason = shorten(str(error), 200)
        raise UserError(f"{path}: its weights do not fit the described model ({reason})") from None
    return model.float().eval(), config


def load_predictor(path: Path, max_side: int | None = None, **options) -> tuple[Predictor, dict]:
    """A Predictor with a checkpoint's network, and its config. options: those of Predictor.

    max_side: None takes that of the training. Raises UserError as `load_model` does.
    """
    model, config = load_model(path)
    options["max_side"] = config["max_side"] if max_side is None else max_side
    options["value_range"] = config["value_range"]
    model = fold_batch_norm(model)
    return Predictor(model, config["classes"], **config["normalize"], **options), config


def open_predictor(args) -> tuple[Predictor, dict]:
    """`load_predictor` with the flags of `add_inference_flags`; sets args.checkpoint."""
    args.checkpoint = find_checkpoint(args.checkpoint)
    device = select_device(args.device)
    return load_predictor(
        args.checkpoint,
        args.max_side,
        device=device,
        amp_dtype=select_amp_dtype(args.amp, device),
        tile=args.tile,
        tta=args.tta,
    )


def load_weights(model: nn.Module, checkpoint: dict, classes: ClassSet) -> str:
    """Load a checkpoint's weights into a model of its name and width for ``classes``.

    The rows of the classifier are kept for classes of equal names. Returns what was done.
    """
    weights = dict(checkpoint["state_dict"])
    names = [name.casefold() for name in classes.names]
    before = [name.casefold() for name in checkpoint["config"]["classes"]["names"]]
    kept = {i: before.index(name) for i, name in enumerate(names) if name in before}
    for key in ("classifier.weight", "classifier.bias"):
        rows = model.state_dict()[key].clone()
        rows[list(kept)] = weights[key][list(kept.values())].to(rows)
        weights[key] = rows
    model.load_state_dict(weights)
    listed = ", ".join(classes.names[i] for i in kept) or "none"
    return f"loaded the weights, and those of the classifier for {len(kept)} classes: {listed}"


def newest(folder: Path, pattern: str) -> Path | None:
    """The newest file of a folder whose name fits the pattern, if there is one."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def find_checkpoint(path: Path | None) -> Path:
    """The checkpoint that a flag names: a file, or the newest ``*_best.pth`` of a folder.

    None: the newest of checkpoint/, else the included weights. Raises UserError if a folder that
    is named has none.
    """
    if path and not path.is_dir():
        return path
    found = newest(path or Path("checkpoint"), "[!.]*_best.pth")
    if path and not found:
        raise UserError(f"{path}: has no *_best.pth; name a checkpoint or the folder of a run")
    return found or local_path(SHIPPED)


def release(source: Path, target: Path) -> None:
    """Write the weights that predict in half precision, and the config without local paths.

    Vectors stay in float32: the variances of batch norm can exceed 65,504, the largest number of
    half precision. Raises UserError if ``source`` is no trained model.
    """
    checkpoint = load_checkpoint(source)
    weights = load_model(source, checkpoint)[0].state_dict()
    weights = {k: v.half() if v.dim() > 1 else v for k, v in weights.items()}
    config = checkpoint["config"]
    config["train"] = {k: v for k, v in config["train"].items() if k not in LOCAL_FLAGS}
    released = {"state_dict": weights, "scores": checkpoint.get("scores"), "config": config}
    save_checkpoint(target, released)
