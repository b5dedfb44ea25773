"""One epoch, the recipe and validation against formulas, hand loops and networks of one layer."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.swa_utils import AveragedModel

from inference.predictor import Predictor
from loss import SegmentationLoss
from metric import SegmentationMetric
from model import build_model
from training.engine import NonFiniteLoss, train_one_epoch, validate
from training.recipe import WeightAverage, build_optimizer, build_scheduler


def train(model, batches, factor=1, lr=0.1, gamma=1.0, scaler=None, **options) -> dict:
    """One epoch of SGD at a rate that is multiplied by ``gamma`` after every update. factor: of the loss."""
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr), SegmentationLoss(0)
    scheduler, scaler = ExponentialLR(optimizer, gamma), scaler or torch.amp.GradScaler("cpu", enabled=False)
    return train_one_epoch(model, batches, lambda *batch: factor * loss_fn(*batch), optimizer, scheduler, scaler,
                           device=torch.device("cpu"), **options)


def random_batches(count, images=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(images, 3, 8, 8, generator=generator),
             torch.randint(1, 4, (images, 8, 8), generator=generator)) for _ in range(count)]


def one_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3, padding=1)


def parameters(model) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def assert_same_parameters(a, b, tolerance=1e-6):
    torch.testing.assert_close(parameters(a), parameters(b), rtol=0, atol=tolerance)


def test_updates_are_those_of_a_hand_loop():
    model, batches, updates, losses = one_layer().eval(), random_batches(5), [], []
    expected = copy.deepcopy(model)
    for step, (x, y) in enumerate(batches):
        losses.append(F.cross_entropy(expected(x), y))
        grads = torch.autograd.grad(losses[-1], list(expected.parameters()))
        with torch.no_grad():
            for p, grad in zip(expected.parameters(), grads):
                p -= 0.1 * 0.5 ** step * grad
    row = train(model, batches, gamma=0.5, after_update=lambda: updates.append(parameters(model)))
    assert row["lr"] == pytest.approx(0.1 * 0.5 ** 4) and row["images_per_second"] > 0 and model.training
    assert row["train_loss"] == pytest.approx(sum(loss.item() for loss in losses) / 5)
    assert_same_parameters(model, expected)
    assert len(updates) == 5 and torch.equal(updates[-1], parameters(model)) and not updates[0].equal(updates[1])


def onecycle(t):
    """Smith & Topin 2018 with torch's defaults: 30 % of 40 updates up, the rest down, both as cosines."""
    low, high, share = (1 / 25, 1, t / 11) if t <= 11 else (1, 1 / 25e4, (t - 11) / 28)
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def step_lr(warmup, drop):
    """Linear from 1 % within ``warmup`` updates, and half the rate after every ``drop``."""
    return lambda t: (0.01 + 0.99 * min(1, t / warmup)) * 0.5 ** (t // drop)


@pytest.mark.parametrize("name,total,shape", [("onecycle", 40, onecycle), ("step", 40, step_lr(4, 20)),
                                              ("step", 2000, step_lr(100, 20)), ("step", 7, step_lr(1, 20))])
def test_schedule_follows_its_formula(name, total, shape):
    optimizer = build_optimizer("sgd", one_layer(), 0.1, 0.01)
    schedule, rates = build_scheduler(name, optimizer, 0.1, total, step_size=20, gamma=0.5), []
    for _ in range(total):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([0.1 * shape(t)] * 2, rel=1e-6) for t in range(total)]


@pytest.mark.parametrize("name,kind,momentum", [("sgd", torch.optim.SGD, 0.8), ("sgd", torch.optim.SGD, 0.0),
                                                ("adamw", torch.optim.AdamW, 0.9)])
def test_weight_decay_spares_norms_and_biases(name, kind, momentum):
    model = build_model("unet", 4, width=4)
    built = build_optimizer(name, model, 0.1, 0.01, momentum)
    assert isinstance(built, kind)
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in built.param_groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.01 if p.ndim > 1 else 0), name
    for group in built.param_groups:
        assert group["lr"] == 0.1 and group.get("momentum", momentum) == momentum
        assert group.get("nesterov", momentum > 0) == (momentum > 0)


def test_weight_average_is_torchs_averaged_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

    def average(old, new, count):  # torch counts its first copy too
        return old.lerp(new, 1 - min(0.8, count / (9 + count))) if old.is_floating_point() else new
    theirs, ours = AveragedModel(model, avg_fn=average, use_buffers=True), WeightAverage(model, 0.8)
    theirs.update_parameters(model)
    for _ in range(60):  # the decay reaches 0.8 after 35
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1 if tensor.dtype == torch.int64 else torch.randn(tensor.shape))
        theirs.update_parameters(model)
        ours.update(model)
    assert not ours.module.training and not any(p.requires_grad for p in ours.module.parameters())
    torch.testing.assert_close(ours.module.state_dict(), theirs.module.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_lost_loss_names_its_step_and_is_not_learnt(value):
    model, batches = one_layer(), random_batches(5)
    batches[3][0][0, 0, 0, 0] = value
    train(expected := one_layer(), batches[:3])
    with pytest.raises(NonFiniteLoss) as error:
        train(model, batches)
    assert error.value.step == 3
    assert_same_parameters(model, expected, tolerance=0)


def test_overflowing_gradients_lower_the_scale_and_are_not_learnt():
    model, batches, updates = one_layer(), random_batches(8), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    row = train(model, batches, 10, gamma=0.5, scaler=scaler, after_update=lambda: updates.append(1))
    skipped = 8 - len(updates)
    assert 1 <= skipped < 8 and scaler.get_scale() == 2.0**(127 - skipped)
    assert row["lr"] == pytest.approx(0.1 * 0.5**(7 - skipped)), "the schedule counts updates"
    train(expected := one_layer(), batches[skipped:], 10, gamma=0.5)
    assert_same_parameters(model, expected)


@pytest.mark.parametrize("clip", [0.0, 0.01, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_clip_grad_limits_the_norm(clip, scale):
    model, (x, y) = one_layer(), random_batches(1)[0]
    before = parameters(model)
    F.cross_entropy(model(x), y).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    model.zero_grad()
    train(model, [(x, y)], lr=1.0, clip_grad=clip, scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    moved = (parameters(model) - before).norm().item()
    assert 0.1 < norm < 100 and moved == pytest.approx(clip if clip == 0.01 else norm, rel=1e-3)


@pytest.mark.parametrize("ignore_index", [0, 255])
def test_validate_scores_at_the_masks_size(ignore_index):
    """The images' channels are the logits, at half the masks' size: one half is class 1, the other class 2."""
    image = torch.zeros(2, 3, 4, 4)
    image[0, 1, :, :2] = image[0, 2, :, 2:] = image[1, 1, :2] = image[1, 2, 2:] = 5.0
    mask = torch.ones(2, 8, 8, dtype=torch.int64)
    mask[0, :, 4:] = mask[1, 4:] = mask[0, 0, :3] = 2  # the last are three wrong answers
    mask[1, 7, 2:] = ignore_index
    metric, batches = SegmentationMetric(3, ignore_index), []
    metric.update(torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.int64))  # of an earlier epoch
    predictor = Predictor(nn.Identity(), 0 if ignore_index == 0 else None, (0, 0, 0), (1, 1, 1))
    scores = validate(predictor, [(image[i:i + 1].clone(), mask[i:i + 1]) for i in range(2)], metric, batches.append)
    assert metric.confusion_matrix().tolist() == [[0, 0, 0], [0, 61, 0], [0, 3, 58]]
    assert scores["pixel_accuracy"] == 119 / 122 and [ids.shape for ids in batches] == [(1, 8, 8)] * 2
    scored = image.index_fill(1, torch.tensor([0]), -torch.inf) if ignore_index == 0 else image
    prob = F.interpolate(scored.softmax(1), (8, 8), mode="bilinear")
    labelled = mask != ignore_index
    expected = -prob.gather(1, torch.where(labelled, mask, 1)[:, None])[:, 0][labelled].log().mean().item()
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    blank = torch.full_like(mask, ignore_index)
    assert math.isnan(validate(predictor, [(image.clone(), blank)], metric)["loss"]), "no labelled pixel"
    with pytest.raises(NonFiniteLoss):
        validate(predictor, [(image * float("nan"), mask)], metric)
