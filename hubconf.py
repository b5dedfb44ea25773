"""For torch.hub: `torch.hub.load("this/folder", "unet", source="local", pretrained=True)`."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

dependencies = ["torch"]
ROOT = Path(__file__).parent


def unet(pretrained: bool = False, num_classes: int = 12, width: int = 16) -> nn.Module:
    """U-Net: (N, 3, H, W) float32 RGB, normalised as ImageNet -> (N, num_classes, H, W) logits.

    pretrained: the included weights for CamVid, of 12 classes and width 16, in evaluation mode.
    """
    # By its path: the caller may have another module called model.
    spec = importlib.util.spec_from_file_location("street_scenes_model", ROOT / "model.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    model = module.build_model("unet", num_classes, width=width)
    if pretrained:
        checkpoint = torch.load(ROOT / "checkpoint" / "camvid_unet.pth", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        model.eval()
    return model
