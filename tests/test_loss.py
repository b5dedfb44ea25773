"""The losses against torch's own and against sums by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss import SegmentationLoss, class_weights

both_kinds = pytest.mark.parametrize("ignored", [0, 255])


def random_batch(ignored):
    """Logits (2, 5, 6, 7), and a mask in which class 4 is absent and a third is ignored."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 6, 7, generator=generator)
    mask = torch.randint(0, 4, (2, 6, 7), generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = ignored
    return logits.requires_grad_(), mask


@both_kinds
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0])])
def test_cross_entropy_and_its_gradient_are_torchs(ignored, weight):
    logits, mask = random_batch(ignored)
    ours = SegmentationLoss(ignored, weight)(logits, mask)
    theirs = F.cross_entropy(logits, mask, weight, ignore_index=ignored)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, logits) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@both_kinds
@pytest.mark.parametrize("sharpness", [1, 100])
def test_dice_is_the_formula_averaged_over_the_classes_in_the_mask(ignored, sharpness):
    logits, mask = random_batch(ignored)
    logits = sharpness * logits.detach()
    labelled = mask != ignored
    losses = []
    for i in mask[labelled].unique():
        p = logits.double().softmax(1)[:, i][labelled]
        truth = (mask == i)[labelled]
        losses.append(1 - 2 * (p * truth).sum() / (p.sum() + truth.sum()))
    with_dice = SegmentationLoss(ignored, dice=True)(logits, mask)
    without = SegmentationLoss(ignored)(logits, mask)
    assert (with_dice - without).item() == pytest.approx(np.mean(losses), abs=1e-5)


@both_kinds
@pytest.mark.parametrize("labels", [True, False])
def test_only_labelled_pixels_have_a_gradient(ignored, labels):
    logits, mask = random_batch(ignored)
    if not labels:
        mask.fill_(ignored)
    loss = SegmentationLoss(ignored, dice=True)(logits, mask)
    loss.backward()
    assert (loss.item() > 0) == labels
    assert torch.equal(logits.grad.abs().sum(1) > 0, mask != ignored)


def test_half_precision_logits_are_summed_in_float32():
    logits, mask = random_batch(0)
    half = logits.bfloat16()
    loss_fn = SegmentationLoss(0, dice=True)
    torch.testing.assert_close(loss_fn(half, mask), loss_fn(half.float(), mask))


@both_kinds
@pytest.mark.parametrize("kind, constant", [("log", 1.02), ("mild", 1.1)])
def test_class_weights_follow_their_formula(kind, constant, ignored):
    pixels = np.array([900, 60, 25, 14, 0, 1])
    scored = np.arange(6) != ignored
    share = pixels * scored / pixels[scored].sum()
    expected = scored / np.log(constant + share)
    expected[4] = 1  # no pixels
    weight = class_weights(kind, torch.from_numpy(pixels), ignored)
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
