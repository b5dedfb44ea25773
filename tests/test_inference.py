"""From images to probabilities: the ignored class, sizes, tiles, mirrored views."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from datasets.synthetic import generate_scene
from inference.predictor import TTA, Predictor, fold_batch_norm, most_probable, predict_stream
from model import MODEL_NAMES, build_model
from training.checkpoints import SHIPPED, load_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def predictor(model, ignore_index=0, **options) -> Predictor:
    return Predictor(model, ignore_index, MEAN, STD, **options)


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
    assert torch.equal(predict(images), prob.argmax(1)) and torch.equal(images, before)


@pytest.mark.parametrize("ignore_index", [0, None])
def test_plain_probabilities_are_the_softmax_of_the_logits(ignore_index):
    model, images = random_network(), torch.randn(2, 3, 20, 30)
    with torch.no_grad():
        logits = model(images)
    expected = logits.softmax(1) if ignore_index is None else F.pad(logits[:, 1:].softmax(1), (0, 0, 0, 0, 1, 0))
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    predict = predictor(model.train(), ignore_index)  # a network left in training mode is evaluated
    torch.testing.assert_close(predict.probabilities(images), expected)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("size", [(100, 70), (64, 65), (30, 200), (129, 128), (64, 64)])
def test_tiles_of_a_local_network_give_the_untiled_answer(size):
    model, images = pointwise(), torch.randn(2, 3, *size)
    torch.testing.assert_close(predictor(model, tile=64).probabilities(images), predictor(model).probabilities(images))


@pytest.mark.parametrize("size,tile", [
    ((100, 70), 64), ((64, 65), 64), ((30, 200), 64), ((257, 129), 64), ((113, 1), 64), ((177, 90), 70), ((64, 64), 64),
])
def test_tiles_cover_everything_and_overlap_by_a_quarter(size, tile):
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
    model, covered, windows = nn.Identity(), torch.zeros(size), []

    def network(module, inputs, x):  # the tiles disagree: logit 0 or 1
        windows.append((int(x[0, 0, 0, 0]), int(x[0, 0, -1, -1]) + 1, int(x[0, 1, 0, 0]), int(x[0, 1, -1, -1]) + 1))
        return torch.stack([x[:, 0] * 0, x[:, 0] * 0 + len(windows) % 2], 1)
    model.register_forward_hook(network)
    prob = predictor(model, None, tile=tile).probabilities(torch.stack([rows, columns, 0 * rows])[None])
    for top, bottom, left, right in windows:
        assert bottom - top <= tile and right - left <= tile
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1 and (len(windows) > 1) == (max(size) > tile)
    for first, last in ((0, 1), (2, 3)):
        spans = sorted({(w[first], w[last]) for w in windows})
        assert all(a[1] - b[0] >= tile // 4 for a, b in zip(spans, spans[1:]))
    steps = [prob.diff(dim=dim).abs().max() for dim in (2, 3) if prob.shape[dim] > 1]
    assert max(steps) < 0.1 and (max(steps) > 0) == (len(windows) > 1), "blended without a seam"


@pytest.mark.parametrize("tta,scales", [("none", [1]), ("flip", [1]), ("flip+scale", [0.75, 1, 1.25])])
def test_tta_averages_mirrored_and_resized_views(tta, scales):
    model, images, expected = random_network(), torch.randn(2, 3, 24, 40), []
    for view in (images,) if tta == "none" else (images, images.flip(-1)):
        for scale in scales:
            seen = F.interpolate(view, (int(24 * scale), int(40 * scale)), mode="bilinear", antialias=True)
            prob = F.interpolate(predictor(model).probabilities(seen), (24, 40), mode="bilinear")
            expected.append(prob if view is images else prob.flip(-1))
    torch.testing.assert_close(predictor(model, tta=tta).probabilities(images), torch.stack(expected).mean(0))


@pytest.mark.parametrize("size,seen", [((60, 80), (30, 40)), ((80, 20), (40, 10)), ((40, 7), (40, 7)), ((9, 9), (9, 9)),
                                       ((500, 1), (40, 1))])
def test_images_longer_than_max_side_are_shrunk_and_the_result_enlarged(size, seen):
    images = [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i in range(2)]
    predict = predictor(random_network(), max_side=40)
    batch = predict.prepare(images)
    small = np.stack([Image.fromarray(image).resize(seen[::-1], Image.Resampling.BILINEAR) for image in images])
    expected = torch.from_numpy((small / 255 - MEAN) / STD).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(batch, expected)
    prob = F.interpolate(predict.probabilities(batch), size, mode="bilinear")
    torch.testing.assert_close(predict.probabilities(batch, size), prob)
    assert torch.equal(predict(batch, size), prob.argmax(1))
    ids = predict.predict(images)
    assert ids.dtype == np.uint8 and np.array_equal(ids, prob.argmax(1))
    assert predictor(random_network()).prepare(images).shape[-2:] == size  # 0: never


def test_stream_batches_images_of_one_size_and_no_more_pixels_than_a_tile():
    predict, batches = predictor(pointwise(), tile=64), []
    sizes = [(30, 40)] * 5 + [(40, 30)] + [(64, 64)] * 2 + [(80, 90)]
    items = [(str(i), np.full((*size, 3), 9 * i, np.uint8)) for i, size in enumerate(sizes)]
    predict.model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    for (name, image), (same, picture, ids) in zip(items, predict_stream(predict, iter(items), 3), strict=True):
        assert same == name and picture is image and np.array_equal(ids, predictor(pointwise()).predict([image])[0])
    assert batches == [3, 2, 1, 1, 1, *4 * [1]]  # the last image goes in four tiles


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
    images = Predictor(model, 0, **config["normalize"]).prepare([np.array(generate_scene(0, 160, 120)[0])])
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
