"""The losses against torch's own and against sums by hand."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss import SegmentationLoss, class_weights


def random_batch(seed=0, void=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 6, 7, generator=generator)
    mask = torch.randint(0, 4, (2, 6, 7), generator=generator)  # class 4 has no label
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = void
    return logits.requires_grad_(), mask


@pytest.mark.parametrize("void", [0, 255])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs_mean(void, weight, smoothing):
    logits, mask = random_batch(void=void)
    loss = SegmentationLoss(void, weight, smoothing)(logits, mask)
    expected = F.cross_entropy(logits, mask, weight, ignore_index=void, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dice", [False, True])
@pytest.mark.parametrize("void", [0, 255])
@pytest.mark.parametrize("labels", [True, False])
def test_labelled_pixels_alone_cost_and_have_a_gradient(void, dice, labels):
    logits, mask = random_batch(void=void)
    mask = mask if labels else torch.full_like(mask, void)
    loss = SegmentationLoss(void, torch.ones(5), 0.1, dice)(logits, mask)
    loss.backward()
    assert (loss.item() > 0) == labels and loss.item() >= 0
    assert logits.grad.isfinite().all() and torch.equal(logits.grad.abs().sum(1) > 0, mask != void)


@pytest.mark.parametrize("void", [0, 255])
@pytest.mark.parametrize("sharpness", [1, 100])
def test_dice_by_hand(void, sharpness):
    logits, mask = random_batch(3, void)
    logits = sharpness * logits.detach()
    prob, labelled = logits.double().softmax(1), mask != void
    losses = []
    for c in mask[labelled].unique():
        p, truth = prob[:, c][labelled], (mask == c)[labelled]
        losses.append(1 - 2 * (p * truth).sum() / (p.sum() + truth.sum()))
    dice = SegmentationLoss(void, dice=True)(logits, mask) - SegmentationLoss(void)(logits, mask)
    assert dice.item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_dice_counts_more_pixels_than_float32_can():
    """18 million of one class, all predicted right: one by one, float32 counts to 16.8 million."""
    logits = torch.tensor([0.0, 100.0]).view(1, 2, 1, 1).expand(2, 2, 3000, 3000)
    mask = torch.ones(2, 3000, 3000, dtype=torch.int64)
    assert SegmentationLoss(255, dice=True)(logits, mask).item() == pytest.approx(0, abs=1e-4)


def test_half_precision_logits_are_summed_in_float32():
    (logits, mask), loss_fn = random_batch(4), SegmentationLoss(0, dice=True)
    torch.testing.assert_close(loss_fn(logits.bfloat16(), mask), loss_fn(logits.bfloat16().float(), mask))


@pytest.mark.parametrize("ignore_index", [0, None, 255])
@pytest.mark.parametrize("kind,constant", [("log", 1.02), ("mild", 1.1)])
def test_class_weights_follow_their_formula(kind, constant, ignore_index):
    pixels = torch.tensor([900, 60, 25, 14, 0, 1])  # class 4 has none
    counts = np.array([0 if ignore_index == 0 else 900, *pixels[1:]])
    expected = 1 / np.log(constant + counts / counts.sum())
    expected[4] = 1
    expected[0] *= ignore_index != 0
    weight = class_weights(kind, pixels, ignore_index)
    assert weight.dtype == torch.float32 and pixels[0] == 900, "the caller's counts are left alone"
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    assert class_weights(kind, torch.zeros(4), 0).tolist() == [0, 1, 1, 1]  # no labels at all
    assert class_weights("none", pixels, ignore_index) is None
    with pytest.raises(ValueError, match="median"):
        class_weights("median", pixels, ignore_index)
