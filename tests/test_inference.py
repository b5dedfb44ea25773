"""From images to probabilities: the ignored class, sizes, tiles, mirrored views."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checkpoints import SHIPPED, load_model
from datasets.synthetic import generate_scene
from inference import TTA, Predictor, fold_batch_norm, most_probable
from model import MODEL_NAMES, build_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def predictor(model, ignore_index=0, **options) -> Predictor:
    return Predictor(model, ignore_index, MEAN, STD, torch.device("cpu"), **options)


def random_network(classes=5, seed=0) -> nn.Module:
    """A U-Net whose channels and batch-norm statistics are not symmetric in any way."""
    torch.manual_seed(seed)
    model = build_model("unet", classes, width=4)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 32, 32))
        model.classifier.weight.mul_(3)
    return model.eval()


def pointwise(classes=5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(3, classes, 1)


@pytest.mark.parametrize("ignore_index", [0, 3])
def test_ignored_class_is_never_predicted(ignore_index):
    model, images = pointwise(), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        model.bias[ignore_index] = 100.0  # by far the best score everywhere
        expected = torch.cat([model(images)[:, :ignore_index], model(images)[:, ignore_index + 1:]], 1).argmax(1)
    predict = predictor(model, ignore_index)
    ids = predict(images)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected + (expected >= ignore_index))
    assert not predict.probabilities(images)[:, ignore_index].any()
    for free in (None, 255):
        assert (predictor(model, free)(images) == ignore_index).all()


@pytest.mark.parametrize("tta", TTA)
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (50, 90)])
def test_probabilities_at_any_size(size, tta):
    predict = predictor(random_network(), tta=tta, tile=40)
    images = torch.randn(2, 3, *size)
    before = images.clone()
    prob = predict.probabilities(images)
    assert prob.shape == (2, 5, *size) and prob.dtype == torch.float32
    torch.testing.assert_close(prob.sum(1), torch.ones(2, *size))
    assert predict(images).shape == (2, *size)
    assert torch.equal(images, before)


@pytest.mark.parametrize("ignore_index", [0, None])
def test_plain_probabilities_are_the_softmax_of_the_logits(ignore_index):
    model, images = random_network(), torch.randn(2, 3, 20, 30)
    with torch.no_grad():
        logits = model(images)
    expected = logits.softmax(1) if ignore_index is None else F.pad(logits[:, 1:].softmax(1), (0, 0, 0, 0, 1, 0))
    torch.testing.assert_close(predictor(model, ignore_index).probabilities(images), expected)


def test_a_network_left_in_training_mode_is_evaluated():
    model, images = random_network(), torch.randn(2, 3, 16, 16)
    expected = predictor(model).probabilities(images)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.testing.assert_close(predictor(model.train()).probabilities(images), expected)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("size", [(100, 70), (64, 65), (30, 200), (129, 128), (64, 64)])
def test_tiles_of_a_local_network_give_the_untiled_answer(size):
    model, images = pointwise(), torch.randn(2, 3, *size)
    torch.testing.assert_close(predictor(model, tile=64).probabilities(images), predictor(model).probabilities(images))


class Recorder(nn.Module):
    """Notes the window that each call sees of an image whose channels 0 and 1 hold the row and the column."""

    def __init__(self):
        super().__init__()
        self.windows = []

    def forward(self, x):
        top, left = (int(v) for v in x[0, :2, 0, 0])
        bottom, right = (int(v) + 1 for v in x[0, :2, -1, -1])
        self.windows.append((top, bottom, left, right))
        return torch.stack([x[:, 0] * 0, x[:, 0] * 0 + len(self.windows) % 2], 1)


@pytest.mark.parametrize("size,tile", [
    ((100, 70), 64), ((64, 65), 64), ((30, 200), 64), ((257, 129), 64), ((113, 1), 64), ((177, 90), 70),
])
def test_tiles_cover_everything_and_overlap_by_a_quarter(size, tile):
    height, width = size
    image = torch.stack([torch.arange(float(height))[:, None].expand(size), torch.arange(float(width)).expand(size),
                         torch.zeros(size)])[None]
    model = Recorder()
    prob = predictor(model, None, tile=tile).probabilities(image)
    covered = torch.zeros(size)
    for top, bottom, left, right in model.windows:
        assert bottom - top <= tile and right - left <= tile
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1 and len(model.windows) > 1
    for first, last in ((0, 1), (2, 3)):
        spans = sorted({(w[first], w[last]) for w in model.windows})
        assert all(a[1] - b[0] >= tile // 4 for a, b in zip(spans, spans[1:]))
    # The tiles disagree (logit 0 or 1), but blended there is no seam.
    steps = [prob.diff(dim=dim).abs().max() for dim in (2, 3) if prob.shape[dim] > 1]
    assert 0.0 < max(steps) < 0.1


def test_small_images_and_tile_zero_go_through_whole():
    for size, tile in (((64, 64), 64), ((100, 100), 0)):
        model = Recorder()
        image = torch.zeros(1, 3, *size)
        predictor(model, None, tile=tile)(image)
        assert len(model.windows) == 1


def test_flip_averages_the_mirrored_view():
    model, images = random_network(), torch.randn(2, 3, 24, 40)
    plain = predictor(model)
    expected = (plain.probabilities(images) + plain.probabilities(images.flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(predictor(model, tta="flip").probabilities(images), expected)


@pytest.mark.parametrize("tta,symmetric", [("none", False), ("flip", True), ("flip+scale", True)])
def test_views_of_a_symmetric_image_are_symmetric(tta, symmetric):
    half = torch.randn(1, 3, 32, 32)
    images = torch.cat([half, half.flip(-1)], -1)
    prob = predictor(random_network(), tta=tta).probabilities(images)
    assert torch.allclose(prob, prob.flip(-1), atol=1e-4) == symmetric


def test_scale_sees_the_image_at_three_sizes():
    seen, model = [], pointwise()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    predictor(model, tta="flip+scale")(torch.randn(1, 3, 40, 80))
    assert sorted(seen) == sorted([(30, 60), (40, 80), (50, 100)] * 2)


@pytest.mark.parametrize("size", [(10, 14), (33, 50), (20, 7)])
def test_size_brings_probabilities_to_the_labels_size(size):
    model, images = random_network(), torch.randn(2, 3, 20, 28)
    predict = predictor(model)
    expected = F.interpolate(predict.probabilities(images), size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(predict.probabilities(images, size), expected)
    assert torch.equal(predict(images, size), expected.argmax(1))


@pytest.mark.parametrize("size,seen", [((60, 80), (30, 40)), ((80, 20), (40, 10)), ((40, 7), (40, 7)), ((9, 9), (9, 9)),
                                       ((500, 1), (40, 1))])
def test_images_longer_than_max_side_are_shrunk_and_the_result_enlarged(size, seen):
    sizes, model, images = [], pointwise(), torch.rand(2, 3, *size)
    predict = predictor(model, max_side=40)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    prob = predict.probabilities(images)
    assert sizes == [seen] and prob.shape == (2, 5, *size)
    small = images if size == seen else F.interpolate(images, seen, mode="bilinear", antialias=True)
    expected = predictor(model).probabilities(small)
    torch.testing.assert_close(prob, F.interpolate(expected, size, mode="bilinear"))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_folded_batch_norms_change_no_logit(name):
    torch.manual_seed(0)
    model, images = build_model(name, 12, width=8).double(), torch.randn(2, 3, 70, 96, dtype=torch.double)
    for norm in filter(lambda module: isinstance(module, nn.BatchNorm2d), model.modules()):
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.normal_()
    with torch.inference_mode():
        expected = model.eval()(images)
        folded = fold_batch_norm(model)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        torch.testing.assert_close(folded(images), expected)


def test_folding_the_shipped_network_moves_logits_by_less_than_1e_4():
    model, _, config = load_model(SHIPPED)
    scene = np.array(generate_scene(0, 160, 120)[0])
    images = Predictor(model, 0, **config["normalize"], device=torch.device("cpu")).prepare([scene])
    with torch.inference_mode():
        expected = model(images)
        assert 0 < (fold_batch_norm(model)(images) - expected).abs().max() < 1e-4


def test_batch_norms_behind_something_else_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    images = torch.randn(2, 3, 5, 5)
    expected = model(images)
    torch.testing.assert_close(fold_batch_norm(model)(images), expected)


def test_most_probable_takes_the_first_of_equals():
    prob = torch.randint(0, 3, (3, 7, 20, 30)).float()
    for layout in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(most_probable(prob.contiguous(memory_format=layout)), prob.argmax(1))


def test_prepare_normalises_rgb():
    photos = [torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8).numpy() for _ in range(3)]
    batch = predictor(pointwise()).prepare(photos)
    assert batch.shape == (3, 3, 4, 6) and batch.dtype == torch.float32
    for n, y, x, c in [(0, 0, 0, 0), (1, 3, 5, 2), (2, 1, 4, 1)]:
        assert batch[n, c, y, x].item() == pytest.approx((int(photos[n][y, x, c]) / 255 - MEAN[c]) / STD[c], abs=1e-5)
