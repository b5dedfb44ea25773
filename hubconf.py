"""For torch.hub: `torch.hub.load("this/folder", "unet", source="local", pretrained=True)`."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

dependencies = ["torch"]
ROOT = Path(__file__).parent


def unet(
    pretrained: bool = False, num_classes: int = 12, width: int = 16, model: str = "unet"
) -> nn.Module:
    """A network: (N, 3, H, W) float32 RGB, normalised -> (N, num_classes, H, W) logits.

    pretrained: the included network for CamVid with its weights, in evaluation mode; the other
    arguments are not used. model: one of MODEL_NAMES in model.py, whose `normalization` gives the
    mean and standard deviation of the images.
    """
    # By its path: the caller may have another module called model.
    spec = importlib.util.spec_from_file_location("street_scenes_model", ROOT / "model.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    if not pretrained:
        return module.build_model(model, num_classes, width=width)
    checkpoint = torch.load(ROOT / "checkpoint" / "camvid_unet.pth", weights_only=True)
    config = checkpoint["config"]
    classes = len(config["classes"]["names"])
    network = module.build_model(config["model"]["name"], classes, **config["model"]["options"])
    network.load_state_dict(checkpoint["state_dict"])
    return network.eval()
