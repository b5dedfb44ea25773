"""U-Net (Ronneberger et al. 2015) with batch norm, and its decoder on torchvision's ResNets.

    model = build_model("unet", num_classes=12, width=16)
    logits = model(images)                      # (N, 3, H, W) -> (N, 12, H, W), any H and W

Shapes in the comments are for an input of (N, 3, H, W) and ``width`` w.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_NAMES = ("unet", "unet_resnet18", "unet_resnet34", "unet_resnet50")


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two of (3×3 convolution without bias, batch norm, ReLU): (N, in, h, w) -> (N, out, h, w)."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class DecoderStage(nn.Module):
    """Upsample, concatenate the skip connection if there is one, convolve.

    Shape: (N, in, h, w), (N, skip, 2h, 2w) -> (N, out, 2h, 2w).

    The transposed convolution is 4×4, not the paper's 2×2: its windows overlap, and evenly because
    the stride divides 4, so there are no checkerboard artifacts (Odena et al. 2016).
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)
        self.conv = double_conv(out_channels + skip_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = self.up(x)
        return self.conv(x if skip is None else torch.cat([skip, x], 1))


def init_weights(module: nn.Module) -> None:
    """Kaiming-normal, fan-out (He et al. 2015) for every convolution; biases start at zero.

    Weights on the meta device are left alone: there torch would import sympy for them.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not layer.weight.is_meta:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) -> (N, C, H', W'): repeat the last row and column up to a multiple."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


class UNet(nn.Module):
    """Five encoder and four decoder stages of two convolutions, and a 1×1 classifier (figure 1).

    Shape: (N, in_channels, H, W) float -> (N, num_classes, H, W) logits, for every H, W >= 1.
    """

    def __init__(self, num_classes: int = 12, in_channels: int = 3, width: int = 64):
        super().__init__()
        channels = [width * factor for factor in (1, 2, 4, 8, 16)]
        self.pool = nn.MaxPool2d(2)
        self.encoder = nn.ModuleList(
            double_conv(i, o) for i, o in zip([in_channels, *channels], channels)
        )
        self.decoder = nn.ModuleList(DecoderStage(2 * c, c, c) for c in reversed(channels[:-1]))
        self.classifier = nn.Conv2d(width, num_classes, 1)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, 16)
        skips = []
        for stage in self.encoder[:-1]:
            skips.append(stage(x))  # (N, w, H, W) … (N, 8w, H/8, W/8)
            x = self.pool(skips[-1])
        x = self.encoder[-1](x)  # (N, 16w, H/16, W/16)
        for stage in self.decoder:
            x = stage(x, skips.pop())  # (N, 8w, H/8, W/8) … (N, w, H, W)
        return self.classifier(x)[..., :height, :width]


class ResNetUNet(nn.Module):
    """The U-Net decoder on a torchvision ResNet (He et al. 2016), with skips at 1/2 to 1/16.

    width: channels at full size; the decoder has ``width × (16, 8, 4, 2, 1)``, deepest first.
    Shape: (N, 3, H, W) float -> (N, num_classes, H, W) logits, for every H, W >= 1.
    pretrained: download torchvision's ImageNet weights for the encoder.
    """

    def __init__(
        self, backbone: str, num_classes: int = 12, width: int = 16, pretrained: bool = False
    ):
        super().__init__()
        # Imported here: it takes as long as torch itself, and the U-Net does not need it.
        from torchvision.models import get_model

        resnet: Any = get_model(backbone, weights="DEFAULT" if pretrained else None)
        conv1, bn1, relu, maxpool, *layers, _, fc = resnet.children()
        self.stem = nn.Sequential(conv1, bn1, relu)
        self.pool = maxpool
        self.encoder = nn.ModuleList(layers)
        deepest = fc.in_features  # 512, and 2048 for ResNet-50
        outs = [width * factor for factor in (16, 8, 4, 2, 1)]
        ins = [deepest, *outs[:-1]]
        skips = [deepest // 2, deepest // 4, deepest // 8, 64, 0]
        self.decoder = nn.ModuleList(DecoderStage(*channels) for channels in zip(ins, skips, outs))
        self.classifier = nn.Conv2d(width, num_classes, 1)
        init_weights(self.decoder)
        init_weights(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, 32)
        skips = [self.stem(x)]  # (N, 64, H/2, W/2)
        x = self.pool(skips[0])
        for layer in self.encoder:
            x = layer(x)  # 1/4, 1/8, 1/16, 1/32 of H and W
            skips.append(x)
        skips.pop()
        for stage in self.decoder:
            x = stage(x, skips.pop() if skips else None)
        return self.classifier(x)[..., :height, :width]


def build_model(name: str, num_classes: int, **options) -> nn.Module:
    """One of MODEL_NAMES. Options: ``width``; ``in_channels`` (unet), ``pretrained`` (ResNets).

    Raises ValueError for an unknown name, TypeError for an option that the model does not have.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"no model is called {name}; choose one of {', '.join(MODEL_NAMES)}")
    if name == "unet":
        return UNet(num_classes, **options)
    return ResNetUNet(name.removeprefix("unet_"), num_classes, **options)
