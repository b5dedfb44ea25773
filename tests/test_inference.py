"""From images to class ids: the ignored class, sizes, tiles, mirrored views, precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from datasets.classes import ClassSet
from inference.checkpoints import SHIPPED, load_predictor
from inference.predictor import Predictor, fold_batch_norm
from model import MODEL_NAMES, build_model, normalization
from support.command import UserError

MEAN, STD = normalization("unet").values()


def random_predictor(ignored=0, **options):
    """Of a U-Net for 5 classes whose channels and batch-norm statistics are not symmetric."""
    torch.manual_seed(0)
    model = build_model("unet", 5, width=4)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 32, 32))
        model.classifier.weight.mul_(3)
    classes = replace(ClassSet.numbered(5), ignore_index=ignored)
    return Predictor(model, classes, MEAN, STD, **options)


@pytest.mark.parametrize("ignored", [0, 3, 255])
def test_probabilities_are_the_softmax_over_all_but_the_ignored_class(ignored):
    predictor = random_predictor(ignored)
    images = torch.randn(2, 3, 20, 30)
    scored = predictor.classes.scored
    with torch.inference_mode():
        logits = predictor.model(images)
    expected = torch.zeros_like(logits)
    expected[:, scored] = logits[:, scored].softmax(1)
    torch.testing.assert_close(predictor.probabilities(images), expected)


@pytest.mark.parametrize("max_side", [0, 40])
def test_the_confidence_is_the_probability_of_the_predicted_class(max_side):
    predictor = random_predictor(max_side=max_side)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    ids, confidence = predictor.predict_with_confidence(image)
    prob = F.interpolate(
        predictor.probabilities(predictor.prepare(image)), (50, 70), mode="bilinear"
    )
    highest, index = prob[0].max(0)
    assert (ids == index.numpy()).mean() > 0.999
    np.testing.assert_allclose(confidence, 255 * highest, atol=0.51)


@pytest.mark.parametrize("size", [(1500, 40), (33, 961), (2901, 17)])
def test_tiles_of_960_pixels_give_the_untiled_answer(size):
    images = torch.randn(1, 3, *size)
    whole = random_predictor(tile=3000).probabilities(images)
    torch.testing.assert_close(random_predictor().probabilities(images), whole)


@pytest.mark.parametrize("size", [(24, 40), (17, 33), (1, 1)])
@pytest.mark.parametrize(
    "tta, scales", [("none", [1]), ("flip", [1]), ("flip+scale", [0.75, 1, 1.25])]
)
def test_tta_averages_mirrored_and_resized_views(tta, scales, size):
    images = torch.randn(2, 3, *size)
    network = random_predictor().probabilities
    views = []
    for scale in scales:
        scaled = [max(1, round(side * scale)) for side in size]
        for axes in [[]] if tta == "none" else [[], [-1]]:
            view = F.interpolate(images.flip(axes), scaled, mode="bilinear", antialias=True)
            views.append(F.interpolate(network(view), size, mode="bilinear").flip(axes))
    ours = random_predictor(tta=tta).probabilities(images)
    torch.testing.assert_close(ours, torch.stack(views).mean(0))


@pytest.mark.parametrize(
    "size, seen", [((120, 180), (60, 90)), ((500, 1), (90, 1)), ((70, 90), (70, 90))]
)
def test_longer_images_are_shrunk_to_max_side_and_the_probabilities_enlarged(size, seen):
    predictor = random_predictor(max_side=90, tile=64, tta="flip")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    small = Image.fromarray(image).resize(seen[::-1], Image.Resampling.BILINEAR)
    pixels = (np.array(small) / 255 - MEAN) / STD
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(predictor.prepare(image), batch)
    prob = F.interpolate(predictor.probabilities(batch), size, mode="bilinear")
    assert (predictor.predict(image) == prob[0].argmax(0).numpy()).mean() > 0.999


def test_read_only_arrays_are_predicted_without_a_warning():
    image = np.zeros((4, 5, 3), np.uint8)
    image.flags.writeable = False
    assert random_predictor().predict(image).shape == (4, 5)


def test_outputs_that_are_not_finite_are_an_error():
    predictor = random_predictor()
    predictor.model.classifier.weight.data.fill_(torch.inf)
    with pytest.raises(UserError):
        predictor.predict(np.zeros((4, 5, 3), np.uint8))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_folded_batch_norms_change_no_logit(name):
    model = build_model(name, 12, width=8).double().eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for tensor in (tensor for norm in norms for tensor in norm.state_dict().values()):
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    images = torch.randn(2, 3, 70, 96, dtype=torch.double)
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(fold_batch_norm(model)(images), expected)
    assert not set(norms) & set(model.modules())


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_masks_in_mixed_precision_are_those_in_float32(frames, dtype, limit):
    full = load_predictor(SHIPPED)[0]
    mixed = load_predictor(SHIPPED, amp_dtype=dtype)[0]
    for _, image, _ in frames["val"]:
        assert 0 < (full.predict(image) != mixed.predict(image)).mean() < limit
