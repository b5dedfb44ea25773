"""The training loop's parts against formulas, hand loops and networks of one layer."""
import copy
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from engine import Interrupted, NonFiniteLoss, build_ema, build_optimizer, build_scheduler, train_one_epoch, validate
from inference import Predictor
from loss import SegmentationLoss
from metric import SegmentationMetric
from model import build_model

CPU = torch.device("cpu")


def flags(**changes) -> Namespace:
    return Namespace(**{"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "scheduler": "none",
                        "epochs": 4, "step_size": 1, "gamma": 0.5, "warmup_steps": 3, **changes})


def train(model, batches, loss_fn=None, lr=0.1, momentum=0.0, gamma=1.0, **options) -> dict:
    """One epoch of SGD at a rate that is multiplied by ``gamma`` after every update."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum)
    return train_one_epoch(model, batches, loss_fn or SegmentationLoss(0), optimizer, ExponentialLR(optimizer, gamma),
                           torch.amp.GradScaler("cpu", enabled=False), device=CPU, **options)


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


def test_overfits_two_images():
    torch.manual_seed(0)
    mask = torch.ones(2, 32, 32, dtype=torch.int64)
    mask[0, 16:], mask[1, :, :16], mask[:, 10:20, 10:20], mask[:, 0] = 2, 3, 4, 0
    images = torch.randn(5, 3)[mask].movedim(-1, 1) + 0.3 * torch.randn(2, 3, 32, 32)
    model, losses, loss_fn = build_model("unet", 5, width=4), [], SegmentationLoss(0)

    def noted(logits, masks):
        losses.append(loss_fn(logits, masks))
        return losses[-1]
    row = train(model, [(images, mask)] * 40, noted, lr=0.05, momentum=0.9)
    assert losses[-1] < 0.5 * losses[0]
    assert row["train_loss"] == pytest.approx(torch.stack(losses).mean().item())
    assert row["lr"] == 0.05 and row["images_per_second"] > 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_two_half_batches_equal_a_full_one():
    whole, halves = one_layer(), one_layer()
    batches = random_batches(3, images=4)
    train(whole, batches, momentum=0.9)
    parts = [(x[half], y[half]) for x, y in batches for half in (slice(2), slice(2, 4))]
    train(halves, parts, momentum=0.9, grad_accum=2)
    assert_same_parameters(whole, halves)


@pytest.mark.parametrize("grad_accum,groups", [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (8, [5])])
def test_every_group_is_averaged_over_its_own_length(grad_accum, groups):
    model, batches = one_layer(), random_batches(5)
    expected, rest = copy.deepcopy(model), iter(batches)
    for update, length in enumerate(groups):
        loss = sum(F.cross_entropy(expected(x), y) for x, y in (next(rest) for _ in range(length))) / length
        grads = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for p, grad in zip(expected.parameters(), grads):
                p -= 0.1 * 0.5 ** update * grad
    row = train(model, batches, gamma=0.5, grad_accum=grad_accum)
    assert row["lr"] == pytest.approx(0.1 * 0.5 ** update)
    assert_same_parameters(model, expected)


def onecycle(t, total=40, low=1 / 25, end=1 / 25e4):
    """Smith & Topin 2018 with torch's defaults: 30 % of the steps up, the rest down, both as cosines."""
    peak = 0.3 * total - 1
    if t <= peak:
        return 1 + (low - 1) * (1 + math.cos(math.pi * t / peak)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * (t - peak) / (total - 1 - peak))) / 2


@pytest.mark.parametrize("scheduler,shape", [
    ("none", lambda t: 1), ("step", lambda t: 0.5 ** (t // 20)), ("poly", lambda t: (1 - t / 40) ** 0.9),
    ("cosine", lambda t: (1 + math.cos(math.pi * t / 40)) / 2), ("onecycle", onecycle),
])
def test_schedule_follows_its_formula(scheduler, shape):
    args = flags(scheduler=scheduler, step_size=2)  # 4 epochs of 10 steps
    optimizer = build_optimizer(args, one_layer())
    schedule, rates = build_scheduler(args, optimizer, steps_per_epoch=10), []
    for _ in range(40):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    warm = [1] * 40 if scheduler == "onecycle" else [0.01, 0.34, 0.67] + [1] * 37  # one-cycle warms up by itself
    assert rates == [pytest.approx([0.1 * shape(t) * warm[t]] * 2, rel=1e-6) for t in range(40)]


@pytest.mark.parametrize("optimizer,kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_weight_decay_spares_norms_and_biases(optimizer, kind):
    model = build_model("unet", 4, width=4)
    built = build_optimizer(flags(optimizer=optimizer), model)
    assert isinstance(built, kind)
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in built.param_groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.01 if p.ndim > 1 else 0), name
    assert all(group["lr"] == 0.1 and group.get("momentum", 0.9) == 0.9 for group in built.param_groups)


def test_ema_follows_a_hand_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema, expected = build_ema(model, 0.8), {}
    for count in range(60):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1) if tensor.dtype == torch.int64 else tensor.add_(torch.randn(tensor.shape))
        ema.update_parameters(model)
        keep = min(0.8, (1 + count) / (10 + count))
        for key, value in model.state_dict().items():
            new = count == 0 or not value.is_floating_point()
            expected[key] = value.clone() if new else keep * expected[key] + (1 - keep) * value
    for key, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    train(model, [(torch.randn(1, 1, 4, 4), torch.ones(1, 4, 4, dtype=torch.int64))], ema=ema)  # once per update
    torch.testing.assert_close(ema.module[0].weight, 0.8 * expected["0.weight"] + 0.2 * model[0].weight)


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
    model, batches = one_layer(), random_batches(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler, ema = ExponentialLR(optimizer, 0.5), build_ema(model, 0.5)

    def loss_fn(logits, mask):
        return 10 * SegmentationLoss(0)(logits, mask)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    seen = []
    train_one_epoch(model, batches, loss_fn, optimizer, scheduler, scaler, device=CPU, ema=ema,
                    on_step=lambda step: seen.append((scaler.get_scale(), optimizer.param_groups[0]["lr"])))
    skipped = sum(lr == 0.1 for _, lr in seen)
    assert 1 <= skipped < 8, seen
    assert [scale for scale, _ in seen] == [2.0**(127 - min(i + 1, skipped)) for i in range(8)]
    assert [lr for _, lr in seen[skipped:]] == [0.1 * 0.5**(i + 1) for i in range(8 - skipped)]
    assert ema.n_averaged == 8 - skipped
    expected = one_layer()
    train(expected, batches[skipped:], loss_fn, gamma=0.5)
    assert_same_parameters(model, expected)


def test_stop_ends_after_the_step():
    model, steps = one_layer(), []
    train(expected := one_layer(), random_batches(3))
    with pytest.raises(Interrupted):
        train(model, random_batches(5), on_step=steps.append, stop=lambda: len(steps) == 3)
    assert steps == [0, 1, 2]
    assert_same_parameters(model, expected, tolerance=0)


@pytest.mark.parametrize("clip", [0.0, 0.01, 100.0])
def test_clip_grad_limits_the_norm(clip):
    model, (x, y) = one_layer(), random_batches(1)[0]
    before = parameters(model)
    F.cross_entropy(model(x), y).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    model.zero_grad()
    train(model, [(x, y)], lr=1.0, clip_grad=clip)
    moved = (parameters(model) - before).norm().item()
    assert 0.1 < norm < 100 and moved == pytest.approx(clip if clip == 0.01 else norm, rel=1e-3)


@pytest.mark.parametrize("ignore_index", [0, 255])
def test_validate_scores_at_the_labels_size(ignore_index):
    """The images' channels are the logits, at half the labels' size: one half is class 1, the other class 2."""
    image = torch.zeros(2, 3, 4, 4)
    image[0, 1, :, :2] = image[0, 2, :, 2:] = image[1, 1, :2] = image[1, 2, 2:] = 5.0
    mask = torch.ones(2, 8, 8, dtype=torch.int64)
    mask[0, :, 4:] = mask[1, 4:] = mask[0, 0, :3] = 2  # the last are three wrong answers
    mask[1, 7, 2:] = ignore_index
    metric = SegmentationMetric(3, ignore_index)
    metric.update(torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.int64))  # of an earlier epoch
    predictor = Predictor(nn.Identity(), 0 if ignore_index == 0 else None, (0, 0, 0), (1, 1, 1), CPU)
    loss = validate(predictor, [(image[i:i + 1].clone(), mask[i:i + 1]) for i in range(2)], metric)
    assert metric.confusion_matrix().tolist() == [[0, 0, 0], [0, 61, 0], [0, 3, 58]]
    scored = image.index_fill(1, torch.tensor([0]), -torch.inf) if ignore_index == 0 else image
    prob = F.interpolate(scored.softmax(1), (8, 8), mode="bilinear")
    labelled = mask != ignore_index
    expected = -prob.gather(1, torch.where(labelled, mask, 1)[:, None])[:, 0][labelled].log().mean().item()
    assert loss == pytest.approx(expected, rel=1e-5)
    with pytest.raises(Interrupted):
        validate(predictor, [(image.clone(), mask)] * 2, metric, stop=lambda: True)
    assert metric.confusion_matrix().sum() == 122  # of the first batch alone
