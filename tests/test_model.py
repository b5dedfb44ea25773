"""One contract for every network, and the U-Net against torch's functions."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from model import MODEL_NAMES, UNet, build_model


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


def test_pretrained_weights_are_in_the_encoder(monkeypatch):
    imagenet = torchvision.models.resnet18().state_dict()
    download = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(download, lambda *args, **kwargs: imagenet)
    model = build_model("unet_resnet18", 12, width=4, pretrained=True)
    for i, stage in enumerate(model.encoder, 1):
        for name, value in stage.state_dict().items():
            assert torch.equal(value, imagenet[f"layer{i}.{name}"])
