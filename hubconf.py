"""For torch.hub: `torch.hub.load("path/to/this/folder", "unet", source="local", pretrained=True)`."""
from torch import nn

from model import build_model
from training.checkpoints import SHIPPED, load_model

dependencies = ["torch", "numpy", "PIL", "tqdm"]


def unet(pretrained: bool = False, num_classes: int = 12, width: int = 64) -> nn.Module:
    """U-Net: (N, 3, H, W) float32, RGB with ImageNet's mean and std -> (N, num_classes, H, W) logits, any H, W.

    pretrained: the shipped weights for CamVid's classes in evaluation mode, which fix ``num_classes`` and ``width``.
    """
    return load_model(SHIPPED)[0] if pretrained else build_model("unet", num_classes, width=width)
