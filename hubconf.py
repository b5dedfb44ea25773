"""For torch.hub: `torch.hub.load("path/to/this/folder", "unet", source="local", pretrained=True)`."""
import importlib
import sys
from pathlib import Path

from torch import nn

dependencies = ["torch", "numpy", "PIL", "tqdm"]
# What this repository calls its modules, and others may call theirs: `datasets` is Hugging Face's as well.
OWN = ("datasets", "inference", "loss", "metric", "model", "output", "support", "training")


def _import_own(*names: str) -> list:
    """Modules of this repository, imported under names of their own: those of others stay what they were."""
    def take() -> dict:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in OWN}

    others, root = take(), str(Path(__file__).parent)
    sys.path.insert(0, root)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(root)
        sys.modules.update({f"street_scenes.{name}": module for name, module in take().items()} | others)


_model, _checkpoints = _import_own("model", "training.checkpoints")


def unet(pretrained: bool = False, num_classes: int = 12, width: int = 64) -> nn.Module:
    """U-Net: (N, 3, H, W) float32, RGB with ImageNet's mean and std -> (N, num_classes, H, W) logits, any H, W.

    pretrained: the shipped weights for CamVid's classes in evaluation mode, which fix ``num_classes`` and ``width``.
    """
    if pretrained:
        return _checkpoints.load_model(_checkpoints.SHIPPED)[0]
    return _model.build_model("unet", num_classes, width=width)
