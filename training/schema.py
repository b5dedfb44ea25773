"""What a checkpoint must look like: each field's type, length and range, declared once and checked at every load."""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import MODEL_NAMES, build_model
from training.recipe import build_optimizer

FORMAT = 2


@dataclass(frozen=True)
class Number:
    """A whole number or any, from ``low`` to ``high``, finite unless ``nan``. True and False are none."""

    kind: type
    low: float
    high: float
    nan: bool = False

    def __str__(self) -> str:
        return f"a {'whole ' * (self.kind is int)}number from {self.low:g} to {self.high:g}{' or NaN' * self.nan}"


@dataclass(frozen=True)
class Text:
    """A text that is not empty, one of ``choices`` if there are any."""

    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}" if self.choices else "a text"


@dataclass(frozen=True)
class ListOf:
    """A list of ``shortest`` to ``longest`` items."""

    item: Any
    shortest: int
    longest: int

    def __str__(self) -> str:
        lengths = f"{self.shortest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        return f"a list of {lengths} entries"


@dataclass(frozen=True)
class Optional:
    """What ``schema`` says, or None; an empty dictionary too in place of one. absent: the field may be missing."""

    schema: Any
    absent: bool = False


class Tensors:
    """Tensors by name, which `check_tensors` holds against a network."""

    def __str__(self) -> str:
        return "a dictionary of tensors"


COUNT, SHARE, LOSS = Number(int, 0, 2**63 - 1), Number(float, 0, 1, nan=True), Number(float, -1e30, 1e30, nan=True)
SIDE, CLASSES = Number(int, 0, 2**31), (1, 255)
MAX_WIDTH = 4096
CHECKPOINT: dict[str, Any] = {  # dictionaries may hold further fields, which nothing reads
    "format": Number(int, 1, FORMAT),
    "state_dict": Tensors(),
    "scores": Optional({
        **{key: Optional(SHARE, absent=True) for key in ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou",
                                                         "mean_f1")},
        **{key: Optional(ListOf(SHARE, *CLASSES), absent=True) for key in ("iou", "accuracy", "f1")},
        "pixels": Optional(ListOf(COUNT, *CLASSES), absent=True)}),
    "config": {
        "model": {"name": Text(MODEL_NAMES), "options": {"width": Number(int, 1, MAX_WIDTH)}},
        "classes": {"names": ListOf(Text(), *CLASSES),
                    "colors": ListOf(ListOf(Number(int, 0, 255), 3, 3), *CLASSES),
                    "ignore_index": Optional(Number(int, 0, 254))},
        "normalize": {"mean": ListOf(Number(float, -1e6, 1e6), 3, 3), "std": ListOf(Number(float, 1e-6, 1e6), 3, 3)},
        "max_side": Optional(SIDE, absent=True),
        # What evaluation reads of the flags; train.py's parser checks those of a run that goes on.
        "train": {"data_name": Optional(Text(), absent=True), "label_format": Optional(Text(), absent=True),
                  "num_classes": Optional(Number(int, *CLASSES), absent=True),
                  "val_percent": Optional(Number(float, 0.1, 90), absent=True),
                  "image_size": Optional(ListOf(SIDE, 1, 2), absent=True)}}}
TRAINING: dict[str, Any] = {  # of a _last.pth
    "model_state_dict": Tensors(),
    "ema_state_dict": Optional(Tensors()),
    "optimizer_state": Tensors(),
    "scaler_state_dict": Optional({
        "scale": Number(float, 1e-30, 1e30), "growth_factor": Number(float, 1, 1e6),
        "backoff_factor": Number(float, 1e-6, 1), "growth_interval": Number(int, 1, 2**31), "_growth_tracker": SIDE}),
    "updates": COUNT,
    "history": ListOf({"epoch": COUNT, "train_loss": LOSS, "lr": Number(float, 0, 1e6),
                       "val_loss": Optional(LOSS, absent=True), "val_miou": Optional(SHARE, absent=True),
                       "val_pixel_accuracy": Optional(SHARE, absent=True)}, 0, 10**6),
    "best_miou": Number(float, -1, 1),
    "steps_per_epoch": Number(int, 1, 2**31),
    "processes": Number(int, 1, 2**20)}
RUN_FLAGS: dict[str, Any] = {  # with which these must agree
    "optimizer": Text(("sgd", "adamw")), "ema": Number(float, 0, 1),
    "crop_size": ListOf(Number(int, 1, 2**31), 1, 2), "scale": ListOf(Number(float, 0, 100), 2, 2)}
# What an optimiser keeps for each parameter, in its shape; a number for the step.
OPTIMIZER_STATE = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
NOT_NEGATIVE = ("running_var", "num_batches_tracked", "exp_avg_sq", "step")


def check(value: Any, schema: Any, field: str = "") -> None:
    """Raises ValueError with the field's name where ``value`` is not what the schema says."""
    if isinstance(schema, Optional):
        if value is None or value == {} and isinstance(schema.schema, dict):
            return
        schema = schema.schema
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{field or 'it'} is {brief(value)}, not a dictionary")
        for key, inner in schema.items():
            name = f"{field}.{key}".lstrip(".")
            if key in value:
                check(value[key], inner, name)
            elif not (isinstance(inner, Optional) and inner.absent):
                raise ValueError(f"{name} is missing")
        return
    if isinstance(schema, Number):
        good = type(value) in {schema.kind, int} and (schema.low <= value <= schema.high
                                                      or schema.nan and value != value)
    elif isinstance(schema, Text):
        good = type(value) is str and value != "" and (not schema.choices or value in schema.choices)
    elif isinstance(schema, ListOf):
        good = type(value) in {list, tuple} and schema.shortest <= len(value) <= schema.longest
    else:
        good = isinstance(value, dict) and all(type(key) is str and isinstance(value[key], Tensor) for key in value)
    if not good:
        raise ValueError(f"{field} is {brief(value)}, not {schema}")
    if isinstance(schema, ListOf):
        for i, item in enumerate(value):
            check(item, schema.item, f"{field}[{i}]")


def brief(value: Any) -> str:
    """A value in an error message."""
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}" + (
        f" of {len(value)}" if isinstance(value, dict | list | tuple) else "")


def check_tensors(stored: dict[str, Tensor], expected: dict[str, Tensor], field: str, limit: int) -> None:
    """Raises ValueError where tensors are not of the expected names, shapes and kinds, dense, finite, or in range.

    expected: tensors without memory. limit: bytes that all may have together, those of their file.
    """
    for name in sorted(expected.keys() ^ stored.keys()):
        raise ValueError(f"{field}.{name} {'is missing' if name in expected else 'is in no such model'}")
    for name, tensor in stored.items():
        like, what = expected[name], f"{field}.{name}"
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{what} is not a plain tensor")
        if tensor.shape != like.shape:
            raise ValueError(f"{what} has the shape {[*tensor.shape]}, the described model {[*like.shape]}")
        if tensor.dtype not in ({torch.float16, torch.bfloat16, torch.float32} if like.is_floating_point()
                                else {like.dtype}):
            raise ValueError(f"{what} is of {tensor.dtype}, the described model of {like.dtype}")
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError(f"{what} repeats its values, instead of holding {tensor.numel()}")
    if sum(tensor.nbytes for tensor in stored.values()) > limit:
        raise ValueError(f"{field} is larger than its file")
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{field}.{name} holds NaN or infinite values; use an earlier checkpoint")
        if name.endswith(NOT_NEGATIVE) and (tensor < 0).any():
            raise ValueError(f"{field}.{name} holds negative values")


class WithoutRandomWeights(TorchFunctionMode):
    """Leaves out the random numbers of a network that is only described; torch imports sympy for them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function is Tensor.normal_ else function(*args, **(kwargs or {}))


def describe_network(config: dict) -> nn.Module:
    """The network of a checked config on the meta device, which takes no memory."""
    with torch.device("meta"), WithoutRandomWeights():
        # No other option: one could start a download.
        return build_model(config["model"]["name"], len(config["classes"]["names"]),
                           width=config["model"]["options"]["width"])


def check_checkpoint(state: Any, limit: int = 2**63, training: bool = False) -> None:
    """Raises ValueError with the first field that is not as it must be. limit: of `check_tensors`, in bytes.

    training: whether what a resume needs must be there.
    """
    check(state, CHECKPOINT)
    classes, scores = state["config"]["classes"], state["scores"] or {}
    names = classes["names"]
    for field, values in (("config.classes.colors", classes["colors"]),
                          *((f"scores.{key}", scores.get(key)) for key in ("iou", "accuracy", "f1", "pixels"))):
        if values is not None and len(values) != len(names):
            raise ValueError(f"{field} has {len(values)} entries for {len(names)} classes")
    if len(set(names)) < len(names):
        raise ValueError(f"config.classes.names has {max(names, key=names.count)!r:.60} twice")
    if (classes["ignore_index"] or 0) >= len(names):
        raise ValueError(f"config.classes.ignore_index is {classes['ignore_index']}, there are {len(names)} classes")
    network = describe_network(state["config"])
    weights = network.state_dict()
    check_tensors(state["state_dict"], weights, "state_dict", limit)
    if not training:
        return
    check(state["training"], TRAINING, "training")
    run, flags = state["training"], state["config"]["train"]
    check(flags, RUN_FLAGS, "config.train")
    if bool(flags["ema"]) != bool(run["ema_state_dict"]):
        raise ValueError(f"training.ema_state_dict is {brief(run['ema_state_dict'])}, but --ema was {flags['ema']}")
    for i, row in enumerate(run["history"], 1):
        if row["epoch"] != i:
            raise ValueError(f"training.history[{i - 1}].epoch is {row['epoch']}, not {i}")
    for key in ("model_state_dict", *["ema_state_dict"] * bool(flags["ema"])):
        check_tensors(run[key], weights, f"training.{key}", limit)
    groups = build_optimizer(flags["optimizer"], network, 1.0, 0.0).param_groups
    expected = {f"{i}.{key}": torch.empty(() if key == "step" else p.shape, device="meta")
                for i, p in enumerate(p for group in groups for p in group["params"])
                for key in OPTIMIZER_STATE[flags["optimizer"]]}
    # Empty without momentum, and before the first update.
    check_tensors(run["optimizer_state"], expected if run["optimizer_state"] else {}, "training.optimizer_state", limit)
