"""What a checkpoint must look like: each field's type, length and range, declared once and checked at every load."""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import MODEL_NAMES, build_model
from training.recipe import build_optimizer

FORMAT = 2
MAX_WIDTH = 4096


@dataclass(frozen=True)
class Field:
    """What a value must be: an int, a float (or whole number), a str, a list (or tuple) or a dict; never True or False.

    low, high: the range of a number, or of the length of the others. nan: whether a number may be NaN.
    choices: the texts that there are. item: what each entry of a list must be.
    """

    kind: type
    low: float = 0
    high: float = 2**63 - 1
    item: Any = None
    choices: tuple[str, ...] = ()
    nan: bool = False

    def __str__(self) -> str:
        limits = f"{self.low:g}" + f" to {self.high:g}" * (self.low < self.high)
        return {int: f"a whole number from {limits}", float: f"a number from {limits}", dict: "a dictionary",
                list: f"a list of {limits} entries",
                str: f"one of {', '.join(self.choices)}" if self.choices else "a text"}[self.kind]

    def allows(self, value: Any) -> bool:
        """Whether the value itself fits; `check` looks at its entries."""
        kinds: Any = {float: (int, float), list: (list, tuple)}.get(self.kind, self.kind)
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        if self.choices:
            return value in self.choices
        size = value if self.kind in (int, float) else len(value)
        return self.low <= size <= self.high or self.nan and size != size


# A schema is a Field, or a dictionary of the schemas by name; a name that ends in ? may be missing or None.
# Dictionaries may hold further fields, which nothing reads.
COUNT, POSITIVE, SIDE, TEXT, DICT = Field(int), Field(int, 1, 2**31), Field(int, 0, 2**31), Field(str, 1), Field(dict)
SHARE, LOSS = Field(float, 0, 1, nan=True), Field(float, -1e30, 1e30, nan=True)
CHECKPOINT: dict[str, Any] = {
    "format": POSITIVE,
    "state_dict": DICT,
    "config": {
        "model": {"name": Field(str, choices=MODEL_NAMES), "options": {"width": Field(int, 1, MAX_WIDTH)}},
        "classes": {"names": Field(list, 1, 255, TEXT)},
        "normalize": {"mean": Field(list, 3, 3, Field(float, -1e6, 1e6)),
                      "std": Field(list, 3, 3, Field(float, 1e-6, 1e6))},
        "max_side?": SIDE,
        # What evaluation reads of the flags; train.py's parser checks those of a run that goes on.
        "train": {"data_name?": TEXT, "label_format?": TEXT, "num_classes?": Field(int, 1, 255),
                  "val_percent?": Field(float, 0.1, 90), "image_size?": Field(list, 1, 2, SIDE)}}}
RESUMABLE: dict[str, Any] = {  # a _last.pth
    "config": {"train": {
        "optimizer": Field(str, choices=("sgd", "adamw")), "crop_size": Field(list, 1, 2, POSITIVE),
        "scale": Field(list, 2, 2, Field(float, 0, 100))}},
    "training": {
        "model_state_dict": DICT,
        "ema_state_dict?": DICT,
        "optimizer_state": DICT,
        "scaler_state_dict?": {
            "scale": Field(float, 1e-30, 1e30), "growth_factor": Field(float, 1, 1e6),
            "backoff_factor": Field(float, 1e-6, 1), "growth_interval": POSITIVE, "_growth_tracker": SIDE},
        "updates": COUNT,
        "history": Field(list, 0, 10**6, {"epoch": COUNT, "train_loss": LOSS, "lr": Field(float, 0, 1e6),
                                          "val_loss?": LOSS, "val_miou?": SHARE, "val_pixel_accuracy?": SHARE}),
        "best_miou": Field(float, -1, 1),
        "steps_per_epoch": POSITIVE,
        "processes": POSITIVE}}
# What an optimiser keeps for each parameter, in its shape; a number for the step.
OPTIMIZER_STATE = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
NOT_NEGATIVE = ("running_var", "num_batches_tracked", "exp_avg_sq", "step")


def of_classes(count: int) -> dict[str, Any]:
    """The schema of what there is for each class."""
    shares = Field(list, count, count, SHARE)
    return {
        "config": {"classes": {"colors": Field(list, count, count, Field(list, 3, 3, Field(int, 0, 255))),
                               "ignore_index?": Field(int, 0, count - 1)}},
        "scores?": {"miou": SHARE, "pixel_accuracy": SHARE, "mean_pixel_accuracy": SHARE, "fwiou": SHARE,
                    "mean_f1": SHARE, "iou": shares, "accuracy": shares, "f1": shares,
                    "pixels": Field(list, count, count, COUNT)}}


def check(value: Any, schema: Any, field: str = "") -> None:
    """Raises ValueError with the field's name where ``value`` is not what the schema says."""
    itself = DICT if isinstance(schema, dict) else schema
    if not itself.allows(value):
        raise ValueError(f"{field or 'it'} is {brief(value)}, not {itself}")
    if isinstance(schema, Field):
        for i, item in enumerate(value if schema.item else ()):
            check(item, schema.item, f"{field}[{i}]")
        return
    for key, inner in schema.items():
        name = key.removesuffix("?")
        path = f"{field}.{name}".lstrip(".")
        if key == name and name not in value:
            raise ValueError(f"{path} is missing")
        empty: tuple = (None, {}) if isinstance(inner, dict) else (None,)
        if key == name or value.get(name) not in empty:
            check(value[name], inner, path)


def brief(value: Any) -> str:
    """A value in an error message."""
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}" + (
        f" of {len(value)}" if isinstance(value, dict | list | tuple) else "")


def check_tensors(stored: dict[str, Tensor], expected: dict[str, Tensor], field: str, limit: int) -> None:
    """Raises ValueError where tensors are not of the expected names, shapes and kinds, dense, finite, or in range.

    expected: tensors without memory. limit: bytes that all may have together, those of their file.
    """
    if wrong := sorted(expected.keys() ^ stored.keys(), key=str):
        raise ValueError(f"{field}.{wrong[0]} {'is missing' if wrong[0] in expected else 'is in no such model'}")
    for name, tensor in stored.items():
        like, what = expected[name], f"{field}.{name}"
        if (not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout != torch.strided
                or tensor.device.type != "cpu" or tensor.untyped_storage().nbytes() < tensor.nbytes):
            raise ValueError(f"{what} is not a plain tensor with a place for each value")
        kinds = {torch.float16, torch.bfloat16, torch.float32} if like.is_floating_point() else {like.dtype}
        if tensor.shape != like.shape or tensor.dtype not in kinds:
            raise ValueError(f"{what} is {tensor.dtype} of shape {[*tensor.shape]}, in the described model "
                             f"{like.dtype} of {[*like.shape]}")
    if sum(tensor.nbytes for tensor in stored.values()) > limit:
        raise ValueError(f"{field} is larger than its file")
    for name, tensor in stored.items():
        if not tensor.isfinite().all() or name.endswith(NOT_NEGATIVE) and (tensor < 0).any():
            raise ValueError(f"{field}.{name} holds NaN, infinite or negative values; use an earlier checkpoint")


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
    check(state, of_classes(len(state["config"]["classes"]["names"])))
    network = describe_network(state["config"])
    weights = network.state_dict()
    check_tensors(state["state_dict"], weights, "state_dict", limit)
    if not training:
        return
    check(state, RESUMABLE)
    run, optimizer = state["training"], state["config"]["train"]["optimizer"]
    parameters = [p for group in build_optimizer(optimizer, network, 1.0, 0.0).param_groups for p in group["params"]]
    kept = {f"{i}.{key}": p.new_empty(()) if key == "step" else p
            for i, p in enumerate(parameters) for key in OPTIMIZER_STATE[optimizer]}
    for key, expected in (("model_state_dict", weights), ("ema_state_dict", weights), ("optimizer_state", kept)):
        # There may be no average, and nothing of the optimiser without momentum or before the first update.
        if run.get(key) or key == "model_state_dict":
            check_tensors(run[key], expected, f"training.{key}", limit)
