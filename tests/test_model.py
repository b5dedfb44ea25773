"""One contract for every network, and the plain U-Net against torch's functions."""
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from model import MODEL_NAMES, build_model


@pytest.fixture(scope="module", params=MODEL_NAMES)
def network(request):
    torch.manual_seed(0)
    return request.param, build_model(request.param, 12, width=4)


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (64, 48), (31, 96)])
@torch.inference_mode()
def test_any_size_is_padded_no_more_than_needed_and_cropped_back(network, size):
    """What the first convolution sees is the image with a margin; the logits are the top left of its logits."""
    name, model = network
    seen, first = [], next(m for m in model.eval().modules() if isinstance(m, nn.Conv2d))
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    image, multiple = torch.randn(2, 3, *size), 16 if name == "unet" else 32
    logits = model(image)
    hook.remove()
    assert logits.shape == (2, 12, *size) and logits.isfinite().all() and logits.min() < 0 < logits.max()
    height, width = size
    assert seen[0].shape[-2:] == (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    assert torch.equal(seen[0][..., :height, :width], image)
    assert torch.equal(seen[0][..., -1, -1], image[..., -1, -1]), "the margin repeats the outermost pixels"
    assert torch.equal(model(seen[0])[..., :height, :width], logits)


def test_every_parameter_learns_and_is_in_the_state_dict(network):
    name, model = network
    images = torch.randn(2, 3, 33, 40)
    model.train()(images).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if not p.grad.isfinite().all() or not p.grad.any()]
    copy = build_model(name, 12, width=4)
    copy.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(copy.eval()(images), model.eval()(images))


def reference_unet(x, tensors):
    """Figure 1 of the paper in torch's functions. tensors: an iterator over a state_dict's, in its order."""
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


@pytest.mark.parametrize("width,num_classes,in_channels,count", [(8, 12, 3, 617_212), (4, 5, 1, 154_681),
                                                                 (6, 2, 4, 347_528)])
@torch.inference_mode()
def test_unet_is_the_published_network(width, num_classes, in_channels, count):
    torch.manual_seed(0)
    model = build_model("unet", num_classes, width=width, in_channels=in_channels).double()
    images = torch.randn(2, in_channels, 32, 48, dtype=torch.double)
    model.train()(images)  # for statistics of batch norm other than 0 and 1
    tensors = iter(model.eval().state_dict().values())
    torch.testing.assert_close(model(images), reference_unet(images, tensors))
    assert not list(tensors) and sum(p.numel() for p in model.parameters()) == count


def test_unet_starts_kaiming_normal_by_fan_out():
    torch.manual_seed(0)
    for name, p in build_model("unet", 12, width=8).named_parameters():
        if p.ndim == 4:
            expected = (2 / (p.shape[0] * p[0, 0].numel())) ** 0.5
            assert p.std().item() == pytest.approx(expected, rel=0.25 if p.numel() > 200 else 0.5), name
            assert p.numel() < 10_000 or p.abs().max() > 3 * expected, f"{name} is not normal: it has no tails"
        assert not name.endswith("bias") or not p.any()


@pytest.mark.parametrize("name,options,reason", [
    ("segnet", {}, "segnet"), ("", {}, "unet_resnet50"), ("unet", {"depth": 3}, "depth"),
    ("unet", {"pretrained": True}, "pretrained"), ("unet_resnet18", {"depth": 3}, "depth")])
def test_unknown_name_or_option_is_one_line(name, options, reason):
    with pytest.raises(ValueError, match=rf"\A.*{reason}.*\Z"):
        build_model(name, 12, **options)


@pytest.mark.parametrize("failure", [OSError("no route"), RuntimeError("invalid hash value")])
def test_pretrained_without_a_network_is_one_line(monkeypatch, tmp_path, failure):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", mock.Mock(side_effect=failure))
    build_model("unet_resnet18", 12, width=4)  # off by default: asks for nothing
    with pytest.raises(ValueError, match=r"\Apretrained.*\Z"):
        build_model("unet_resnet18", 12, width=4, pretrained=True)


def test_pretrained_weights_survive_the_decoders_initialisation(monkeypatch):
    torch.manual_seed(3)
    imagenet = torchvision.models.resnet18()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: imagenet.state_dict())
    ours = list(build_model("unet_resnet18", 12, width=4, pretrained=True).parameters())
    for theirs in list(imagenet.parameters())[:-2]:  # all but the ImageNet classifier
        assert any(p.shape == theirs.shape and torch.equal(p, theirs) for p in ours)
