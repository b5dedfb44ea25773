"""One contract for every network, and the layers that the plain U-Net is made of."""
import urllib.error

import pytest
import torch
import torchvision
from torch import nn

from model import MODEL_NAMES, build_model
from runtime import UserError

SIZES = [(1, 1), (17, 33), (64, 48), (31, 96)]


@pytest.fixture(scope="module", params=MODEL_NAMES)
def network(request):
    torch.manual_seed(0)
    return request.param, build_model(request.param, 12, width=4)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return build_model("unet", 12, width=8).eval()


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_logits_have_the_size_of_the_input(network, size):
    logits = network[1].eval()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 12, *size)
    assert logits.isfinite().all()


def test_every_parameter_learns(network):
    model = network[1].train()
    model(torch.randn(2, 3, 33, 40)).square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
            or not p.grad.any()]
    model.zero_grad(set_to_none=True)
    assert not idle


@torch.inference_mode()
def test_state_dict_carries_the_whole_network(network):
    name, model = network
    model.eval()
    torch.manual_seed(1)
    image, copy = torch.randn(1, 3, 32, 48), build_model(name, 12, width=4).eval()
    assert not torch.allclose(copy(image), model(image))
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(image), model(image))


@torch.inference_mode()
def test_logits_are_free_to_be_negative(network):
    torch.manual_seed(0)
    logits = network[1].eval()(torch.randn(2, 3, 32, 32))
    assert logits.min() < 0 < logits.max()


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_padding_is_the_least_and_cropped_back(network, size):
    """What the first convolution sees is the image with a margin; the logits are the top left of its logits."""
    name, model = network
    model.eval()
    seen, first = [], next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    image = torch.randn(1, 3, *size)
    logits = model(image)
    hook.remove()
    multiple = 16 if name == "unet" else 32
    height, width = size
    assert seen[0].shape[-2:] == (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    assert torch.equal(seen[0][..., :height, :width], image)
    assert torch.equal(model(seen[0])[..., :height, :width], logits)


@pytest.mark.parametrize("width,num_classes,in_channels", [(8, 12, 3), (4, 5, 1), (6, 2, 4)])
def test_unet_parameter_count(width, num_classes, in_channels):
    def two_convs(i, o):  # two 3×3 convolutions without bias, two norms of scale and shift
        return 9 * i * o + 9 * o * o + 4 * o
    c = [width, 2 * width, 4 * width, 8 * width, 16 * width]
    encoder = two_convs(in_channels, c[0]) + sum(two_convs(c[i], c[i + 1]) for i in range(4))
    decoder = sum(16 * 2 * o * o + o + two_convs(2 * o, o) for o in c[:4])
    model = build_model("unet", num_classes, width=width, in_channels=in_channels)
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder + width * num_classes + num_classes


@torch.inference_mode()
def test_unet_layers_run_in_the_published_order(unet):
    """(layer, channels, height) in the order of execution, for a 32×32 image."""
    ran = []
    for layer in unet.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda m, i, out: ran.append((type(m).__name__, out.shape[1], out.shape[2])))
    unet(torch.randn(1, 3, 32, 32))

    def two_convs(channels, height):
        return [(layer, channels, height) for layer in ("Conv2d", "BatchNorm2d", "ReLU") * 2]
    expected = []
    for i in range(5):
        expected += [("MaxPool2d", 4 * 2 ** i, 32 >> i)] * (i > 0) + two_convs(8 << i, 32 >> i)
    for i in reversed(range(4)):
        expected += [("ConvTranspose2d", 8 << i, 32 >> i), *two_convs(8 << i, 32 >> i)]
    assert ran == [*expected, ("Conv2d", 12, 32)]


def test_unet_layer_settings(unet):
    convs = [m for m in unet.modules() if isinstance(m, nn.Conv2d)]
    ups = [m for m in unet.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert {(m.kernel_size, m.padding, m.stride, m.bias) for m in convs[:-1]} == {((3, 3), (1, 1), (1, 1), None)}
    assert convs[-1].kernel_size == (1, 1) and convs[-1].bias is not None
    assert {(m.kernel_size, m.padding, m.stride) for m in ups} == {((4, 4), (1, 1), (2, 2))}
    joined = [m.in_channels for m in convs[10:-1:2]]  # the first convolution of each decoder stage sees skip and input
    assert joined == [128, 64, 32, 16]


@torch.inference_mode()
def test_unet_joins_each_decoder_stage_with_its_encoder_stage(unet):
    seen = {}
    for name, layer in unet.named_modules():
        layer.register_forward_hook(lambda m, i, out, name=name: seen.update({name: (type(m).__name__, i[0], out)}))
    unet(torch.randn(1, 3, 32, 32))
    leaves = [seen[name] for name, layer in unet.named_modules() if name and not list(layer.children())]
    encoded = [out for kind, _, out in leaves if kind == "ReLU"][1::2]  # of every stage, at 32, 16, 8, 4, 2 pixels
    joined = [into for kind, into, _ in leaves if kind == "Conv2d"][10:-1:2]
    risen = [out for kind, _, out in leaves if kind == "ConvTranspose2d"]
    for skip, up, both in zip(encoded[3::-1], risen, joined, strict=True):
        assert any(torch.equal(both, torch.cat(order, 1)) for order in ((skip, up), (up, skip)))


def test_unet_starts_kaiming_normal_by_fan_out(unet):
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            weight = layer.weight
            fan_out = weight.shape[0] * weight[0, 0].numel()
            expected = (2 / fan_out) ** 0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.25 if weight.numel() > 200 else 0.5), name
            if weight.numel() > 10_000:
                assert weight.abs().max() > 3 * expected, f"{name} is not normal: it has no tails"


@pytest.mark.parametrize("name,options", [
    ("segnet", {}), ("", {}), ("unet", {"depth": 3}), ("unet", {"pretrained": True}), ("unet_resnet18", {"depth": 3}),
])
def test_unknown_name_or_option_is_a_user_error(name, options):
    with pytest.raises(UserError, match="--model") as error:
        build_model(name, 12, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("failure", [urllib.error.URLError("no route"), TimeoutError("timed out"),
                                     RuntimeError("invalid hash value")])
def test_pretrained_without_a_network_is_one_line(monkeypatch, tmp_path, failure):
    def fail(*args, **kwargs):
        raise failure
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    build_model("unet_resnet18", 12, width=4)  # off by default: asks for nothing
    with pytest.raises(UserError, match="--pretrained") as error:
        build_model("unet_resnet18", 12, width=4, pretrained=True)
    assert "\n" not in str(error.value)


def test_pretrained_weights_survive_the_decoders_initialisation(monkeypatch):
    torch.manual_seed(3)
    imagenet = torchvision.models.resnet18()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: imagenet.state_dict())
    torch.manual_seed(4)
    ours = list(build_model("unet_resnet18", 12, width=4, pretrained=True).parameters())
    for theirs in list(imagenet.parameters())[:-2]:  # all but the ImageNet classifier
        assert any(p.shape == theirs.shape and torch.equal(p, theirs) for p in ours)
