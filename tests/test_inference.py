"""From images to probabilities: the ignored class, sizes, tiles, mirrored views."""
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from inference.predictor import (
    Predictor,
    fitting_batch,
    fitting_tile,
    fold_batch_norm,
    most_probable,
    predict_stream,
    tile_spans,
)
from model import MODEL_NAMES, build_model
from support.command import RunError
from training.checkpoints import SHIPPED, load_predictor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def predictor(model, ignore_index=0, **options) -> Predictor:
    return Predictor(model, ignore_index, MEAN, STD, **options)


def random_network() -> nn.Module:
    """A U-Net of 5 classes whose channels and batch-norm statistics are not symmetric in any way."""
    torch.manual_seed(0)
    model = build_model("unet", 5, width=4)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 32, 32))
        model.classifier.weight.mul_(3)
    return model.eval()


def pointwise() -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(3, 5, 1)


@pytest.mark.parametrize("ignore_index", [0, 3, None, 255])
def test_probabilities_are_the_softmax_over_all_but_the_ignored_class(ignore_index):
    model, images = random_network(), torch.randn(2, 3, 20, 30)
    with torch.no_grad():
        if ignore_index in (0, 3):
            model.classifier.bias[ignore_index] = 100.0  # by far the best score everywhere
        logits = model(images)
    rest = [i for i in range(5) if i != ignore_index]
    expected = torch.zeros_like(logits)
    expected[:, rest] = logits[:, rest].softmax(1)
    prob = predictor(model.train(), ignore_index).probabilities(images)  # left in training mode, it is evaluated
    torch.testing.assert_close(prob, expected)
    assert most_probable(prob).dtype == torch.uint8 and torch.equal(most_probable(prob).long(), expected.argmax(1))


@pytest.mark.parametrize("tile", [64, 70, 960])
@pytest.mark.parametrize("side", [1, 63, 64, 65, 96, 97, 500, 961, 3000])
def test_tiles_cover_a_side_once_overlap_by_a_quarter_and_keep_no_edge(side, tile):
    spans = tile_spans(side, tile)
    kept = [i for _, part in spans for i in range(part.start, part.stop)]
    assert kept == [*range(side)] and (len(spans) > 1) == (side > tile)
    assert all(seen.stop - seen.start <= tile and seen.start % 32 == 0 for seen, _ in spans)
    for (above, before), (below, after) in pairwise(spans):
        assert above.stop - below.start >= tile // 4 and before.stop == after.start
        assert min(above.stop - before.stop, after.start - below.start) >= tile // 8


@pytest.mark.parametrize("size", [(1500, 40), (33, 971)])
def test_tiles_give_the_untiled_answer(size):
    model, images = random_network(), torch.randn(1, 3, *size)
    whole = predictor(model, tile=2000).probabilities(images)
    torch.testing.assert_close(predictor(model).probabilities(images), whole)


@pytest.mark.parametrize("tta,scales", [("none", [1]), ("flip", [1]), ("flip+scale", [0.75, 1, 1.25])])
@pytest.mark.parametrize("size", [(24, 40), (17, 33), (1, 1)])
def test_tta_averages_mirrored_and_resized_views(tta, scales, size):
    model, images, expected = random_network(), torch.randn(2, 3, *size), []
    before = images.clone()
    for view in (images,) if tta == "none" else (images, images.flip(-1)):
        for scale in scales:
            scaled = [max(1, round(side * scale)) for side in size]
            seen = F.interpolate(view, scaled, mode="bilinear", antialias=True)
            prob = F.interpolate(predictor(model).probabilities(seen), size, mode="bilinear")
            expected.append(prob if view is images else prob.flip(-1))
    torch.testing.assert_close(predictor(model, tta=tta).probabilities(images), torch.stack(expected).mean(0))
    assert torch.equal(images, before)


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
    ids = predict.predict(images)
    assert ids.dtype == np.uint8 and np.array_equal(ids, prob.argmax(1))
    assert predictor(random_network()).prepare(images).shape[-2:] == size  # 0: never


@pytest.mark.parametrize("tta", ["none", "flip"])
@pytest.mark.parametrize("size, max_side", [((300, 200), 0), ((100, 70), 0), ((300, 200), 90), ((64, 300), 150)])
def test_ids_are_the_most_probable_classes(size, max_side, tta):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    predict = predictor(random_network(), tile=64, tta=tta, max_side=max_side)
    batch = predict.prepare([image])
    prob = F.interpolate(predict.probabilities(batch), size, mode="bilinear")
    for part, some in predict.parts(batch, size):
        torch.testing.assert_close(some, prob[..., *part], rtol=0, atol=1e-5)
        prob[..., *part] += 1  # each pixel once
    assert torch.all(prob.sum(1).sub(6).abs() < 1e-4)
    assert (predict.predict([image])[0] != prob.argmax(1)[0].numpy()).mean() < 1e-4


def test_outputs_that_overflow_are_no_class():
    model = pointwise()
    model.weight.data.fill_(3e38)
    with pytest.raises(RunError, match="NaN or infinite"):
        predictor(model).predict([np.full((4, 5, 3), 255, np.uint8)])


@pytest.mark.parametrize("sizes, classes, expected", [
    ([(360, 480)], 12, 4), ([(720, 960)], 12, 4), ([(720, 960)], 255, 1), ([(360, 480), (480, 360)], 12, 1)])
def test_evaluation_takes_as_many_images_at_once_as_memory_allows(sizes, classes, expected):
    assert fitting_batch(4, sizes, classes) == expected
    assert fitting_tile(classes) == (960 if classes == 12 else 500)


def test_stream_batches_images_of_one_size_and_no_more_pixels_than_a_tile():
    predict, batches = predictor(pointwise(), tile=64), []
    sizes = [(30, 40)] * 5 + [(40, 30)] + [(64, 64)] * 2 + [(80, 90)]
    items = [(str(i), np.full((*size, 3), 9 * i, np.uint8)) for i, size in enumerate(sizes)]
    predict.model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    for (name, image), (same, picture, ids) in zip(items, predict_stream(predict, iter(items), 3), strict=True):
        assert same == name and picture is image and np.array_equal(ids, predictor(pointwise()).predict([image])[0])
    assert batches == [3, 2, 1, 1, 1, *4 * [1]]  # the last image goes in four tiles


@pytest.mark.parametrize("name", [*MODEL_NAMES, "norms behind something else"])
def test_folded_batch_norms_change_no_logit(name):
    torch.manual_seed(0)
    loose = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model = build_model(name, 12, width=8) if name in MODEL_NAMES else loose
    model, images = model.double().eval(), torch.randn(2, 3, 70, 96, dtype=torch.double)

    def norms() -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms():
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(fold_batch_norm(model)(images), expected)
    assert len(norms()) == (2 if model is loose else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_in_mixed_precision_are_those_in_float32(frames, dtype):
    images = [image for _, image, _ in frames["val"]]
    full, mixed = (load_predictor(SHIPPED, amp_dtype=kind)[0].predict(images) for kind in (None, dtype))
    assert 0 < (full != mixed).mean() < 0.005
