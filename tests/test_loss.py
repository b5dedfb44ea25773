"""The losses against torch's own and against sums by hand."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss import SegmentationLoss, class_weights

CLASSES = 5


def random_batch(seed=0, void=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, CLASSES, 6, 7, generator=generator)
    mask = torch.randint(0, CLASSES - 1, (2, 6, 7), generator=generator)  # class 4 has no label
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = void
    return logits.requires_grad_(), mask


def dice_term(logits, mask, void):
    return SegmentationLoss(void, dice=True)(logits, mask) - SegmentationLoss(void)(logits, mask)


@pytest.mark.parametrize("void", [0, 255])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs_mean(void, weighted, smoothing):
    logits, mask = random_batch(void=void)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0]) if weighted else None
    loss = SegmentationLoss(void, weight, smoothing)(logits, mask)
    expected = F.cross_entropy(logits, mask, weight, ignore_index=void, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dice", [False, True])
@pytest.mark.parametrize("void", [0, 255])
def test_batch_without_labels_costs_nothing(void, dice):
    logits, mask = random_batch()
    loss = SegmentationLoss(void, torch.ones(CLASSES), 0.1, dice)(logits, torch.full_like(mask, void))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dice", [False, True])
@pytest.mark.parametrize("void", [0, 255])
def test_ignored_pixels_have_no_gradient_and_the_others_do(void, dice):
    logits, mask = random_batch(void=void)
    SegmentationLoss(void, None, 0.1, dice)(logits, mask).backward()
    moved = logits.grad.abs().sum(1) > 0
    assert torch.equal(moved, mask != void)


@pytest.mark.parametrize("right,expected", [(True, 0.0), (False, 1.0)])
def test_dice_of_perfect_and_worst_predictions(right, expected):
    mask = torch.randint(1, CLASSES, (2, 6, 7), generator=torch.Generator().manual_seed(2))
    mask[0, :2] = 0
    answer = mask if right else mask % (CLASSES - 1) + 1  # another of the classes 1 to 4
    logits = 50.0 * F.one_hot(answer, CLASSES).movedim(-1, 1)
    assert dice_term(logits, mask, 0).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("void", [0, 255])
def test_dice_by_hand(void):
    logits, mask = random_batch(3, void)
    prob, mask_np = logits.detach().double().softmax(1).numpy(), mask.numpy()
    losses = []
    for c in range(CLASSES):
        truth, kept = mask_np == c, mask_np != void
        if truth.sum() and c != void:
            p = prob[:, c][kept]
            losses.append(1 - 2 * (p * truth[kept]).sum() / (p.sum() + truth.sum()))
    assert dice_term(logits, mask, void).item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_half_precision_logits_are_summed_in_float32():
    logits, mask = random_batch(4)
    loss = SegmentationLoss(0, dice=True)(logits.detach().bfloat16(), mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SegmentationLoss(0, dice=True)(logits.detach().bfloat16().float(), mask))


# Of the 100 labelled pixels 60, 25, 14 and 1 are of the classes 1, 2, 3 and 5; class 4 has none, class 0 is ignored.
COUNTS = torch.tensor([900, 60, 25, 14, 0, 1])


@pytest.mark.parametrize("pixels,ignore_index,expected", [
    ([900, 60, 30, 10], 0, [0, 0.5, 1, 3]),  # the median share of 0.6, 0.3 and 0.1 is 0.3
    ([50, 30, 20], None, [0.6, 1, 1.5]),
    ([50, 30, 20], 255, [0.6, 1, 1.5]),
    ([7, 500, 490, 0, 10], 0, [0, 0.98, 1, 1, 10]),  # 49 is capped at 10, the absent class weighs 1
])
def test_median_weights(pixels, ignore_index, expected):
    weight = class_weights("median", torch.tensor(pixels), ignore_index)
    assert weight.dtype == torch.float32
    assert weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("ignore_index", [0, None, 255])
@pytest.mark.parametrize("kind,constant", [("log", 1.02), ("mild", 1.1)])
def test_log_weights(kind, constant, ignore_index):
    weight = class_weights(kind, COUNTS, ignore_index)
    counts = COUNTS.numpy().copy()
    counts[0] = 0 if ignore_index == 0 else 900
    expected = 1 / np.log(constant + counts / counts.sum())
    expected[4] = 1
    expected[0] = 0 if ignore_index == 0 else expected[0]
    assert weight.dtype == torch.float32
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_no_weights_and_the_counts_stay():
    before = COUNTS.clone()
    assert class_weights("none", COUNTS, 0) is None
    for kind in ("median", "log", "mild"):
        assert class_weights(kind, COUNTS, 0).isfinite().all()
        assert class_weights(kind, torch.zeros(4), 0).tolist() == [0, 1, 1, 1]  # no labels at all
    assert torch.equal(COUNTS, before)
