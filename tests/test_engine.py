"""One epoch, the recipe and validation against formulas, hand loops and networks of one layer; steps on a GPU."""
import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LinearLR, OneCycleLR, StepLR

from inference.predictor import Predictor
from loss import SegmentationLoss
from metric import SegmentationMetric
from model import build_model
from support.device import select_amp_dtype
from training.distributed import replicate
from training.engine import NonFiniteLoss, train_one_epoch, validate
from training.recipe import WeightAverage, build_optimizer, build_scheduler


def train(model, batches, gamma=1.0, scaler=None, device="cpu", loss_fn=None, momentum=0.0, **options) -> dict:
    """One epoch of SGD at a rate of 0.1 that is multiplied by ``gamma`` after every update."""
    optimizer = build_optimizer("sgd", model, 0.1, 0.0, momentum)
    return train_one_epoch(model, batches, loss_fn or SegmentationLoss(0), optimizer, ExponentialLR(optimizer, gamma),
                           scaler or torch.amp.GradScaler("cpu", enabled=False), device=torch.device(device), **options)


def random_batches(count, images=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(images, 3, 8, 8, generator=generator),
             torch.randint(1, 4, (images, 8, 8), generator=generator)) for _ in range(count)]


def one_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3, padding=1)


def assert_same(a, b, tolerance=1e-6):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("clip", [0.0, 0.01, 100.0])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_updates_are_those_of_a_hand_loop(clip, scale):
    model, batches, updates, losses = one_layer().eval(), random_batches(5), [], []
    expected = copy.deepcopy(model)
    for step, (x, y) in enumerate(batches):
        losses.append(F.cross_entropy(expected(x), y))
        grads = torch.autograd.grad(losses[-1], list(expected.parameters()))
        factor = min(1, clip / nn.utils.get_total_norm(grads).item()) if clip else 1
        with torch.no_grad():
            for p, grad in zip(expected.parameters(), grads):
                p -= 0.1 * 0.5 ** step * factor * grad
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    row = train(model, batches, 0.5, scaler, clip_grad=clip, after_update=lambda: updates.append(copy.deepcopy(model)))
    assert row["lr"] == pytest.approx(0.1 * 0.5 ** 4) and row["images_per_second"] > 0 and model.training
    assert row["train_loss"] == pytest.approx(sum(loss.item() for loss in losses) / 5)
    assert len(updates) == 5 and not torch.equal(updates[0].weight, updates[1].weight)
    for ours in (model, updates[-1]):
        assert_same(ours, expected, 1e-6 if clip != 0.01 else 1e-7)


@pytest.mark.parametrize("name, total, drop, warmup", [
    ("onecycle", 40, 20, 0), ("step", 40, 20, 6), ("step", 900, 400, 100), ("step", 7, 2, 1)])
def test_schedule_is_torchs_with_a_warm_up(name, total, drop, warmup):
    def torchs(optimizer):
        if name == "onecycle":
            return OneCycleLR(optimizer, 0.1, total, cycle_momentum=False)
        return ChainedScheduler([LinearLR(optimizer, 0.01, total_iters=warmup), StepLR(optimizer, drop, 0.5)])

    def rates(build):
        optimizer = build_optimizer("sgd", one_layer(), 0.1, 0.01)
        schedule = build(optimizer)
        for _ in range(total):
            yield [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            schedule.step()

    ours = rates(lambda optimizer: build_scheduler(name, optimizer, total, drop, gamma=0.5))
    assert list(ours) == [pytest.approx(rate, rel=1e-6) for rate in rates(torchs)]


@pytest.mark.parametrize("name,kind,expected", [
    ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}), ("adamw", torch.optim.AdamW, {"lr": 0.1}),
    ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.0, "nesterov": False})])
def test_weight_decay_spares_norms_and_biases(name, kind, expected):
    model = build_model("unet", 4, width=4)
    built = build_optimizer(name, model, 0.1, 0.01, expected.get("momentum", 0.9))
    decay = {p: group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert isinstance(built, kind) and decay == {p: 0.01 if p.ndim > 1 else 0 for p in model.parameters()}
    assert all(expected.items() <= group.items() for group in built.param_groups)


@pytest.mark.parametrize("decay", [0.8, 0])
def test_weight_average_follows_its_formula(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    expected, average = copy.deepcopy(model.state_dict()), WeightAverage(model, decay)
    for n in range(60):  # the decay reaches 0.8 after 35
        for name, tensor in model.state_dict().items():
            tensor.copy_(n if tensor.dtype == torch.int64 else torch.randn(tensor.shape))
            keep = min(decay, (1 + n) / (10 + n)) if tensor.is_floating_point() else 1
            expected[name] = keep * expected[name] + (1 - keep) * tensor
        average.update()
    assert not average.module.training and not any(p.requires_grad for p in average.module.parameters())
    torch.testing.assert_close(average.module.state_dict(), expected, check_dtype=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_lost_loss_names_its_step_and_is_not_learnt(value):
    model, batches = one_layer(), random_batches(5)
    batches[3][0][0, 0, 0, 0] = value
    train(expected := one_layer(), batches[:3])
    with pytest.raises(NonFiniteLoss) as error:
        train(model, batches)
    assert error.value.step == 3
    assert_same(model, expected, tolerance=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_overflowing_gradients_lower_the_scale_and_are_not_learnt(momentum, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, torch.nan, **options))

    def steep(*batch):
        return 10 * SegmentationLoss(0)(*batch)
    model, batches, updates = one_layer(), random_batches(8), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    row = train(model, batches, 0.5, scaler, loss_fn=steep, momentum=momentum, after_update=lambda: updates.append(1))
    skipped = 8 - len(updates)
    assert 1 <= skipped < 8 and scaler.get_scale() == 2.0**(127 - skipped)
    assert row["lr"] == pytest.approx(0.1 * 0.5**(7 - skipped)), "the schedule counts updates"
    train(expected := one_layer(), batches[skipped:], 0.5, loss_fn=steep, momentum=momentum)
    assert_same(model, expected)


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
    expected = F.nll_loss(prob.clamp_min(1e-8).log(), mask, ignore_index=ignore_index).item()
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    blank = torch.full_like(mask, ignore_index)
    assert math.isnan(validate(predictor, [(image.clone(), blank)], metric)["loss"]), "no labelled pixel"
    with pytest.raises(NonFiniteLoss):
        validate(predictor, [(image * float("nan"), mask)], metric)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.filterwarnings("default")  # torch's compiler warns of settings that would be faster
@pytest.mark.parametrize("device, kind, amp", [
    ("cpu", "plain", "bf16"), ("cpu", "plain", "fp16"), *(pytest.param("cuda:0", *case, marks=CUDA) for case in (
        ("plain", "bf16"), ("plain", "fp16"), ("compiled", "bf16"), ("ddp", "off")))])
def test_training_steps_in_mixed_precision_compiled_and_replicated(tmp_path, device, kind, amp):
    """On the CPU, test_cli counts what is compiled, and test_distributed has two processes."""
    torch.manual_seed(0)
    device = torch.device(device)
    dtype = select_amp_dtype(amp, device)
    model = build_model("unet", 12, width=8).to(device, memory_format=torch.channels_last)
    before, network = model.classifier.weight.clone(), model
    if kind == "ddp":
        dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        network = replicate(model, device)
        assert any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules())
    elif kind == "compiled":
        network.compile()
    batches = [(torch.randn(2, 3, 64, 96), torch.randint(0, 12, (2, 64, 96))) for _ in range(2)]
    scaler = torch.amp.GradScaler(device.type, 2.0**10, enabled=dtype == torch.float16)
    row = train(network, batches, 1.0, scaler, device, SegmentationLoss(0, dice=True), amp_dtype=dtype, clip_grad=1.0)
    if kind == "ddp":
        dist.destroy_process_group()
    assert 0 < row["train_loss"] < 20
    assert model.classifier.weight.isfinite().all() and not torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize("amp, feature, expected", [
    ("auto", "avx512_bf16", torch.bfloat16), ("auto", "amx_bf16", torch.bfloat16), ("auto", "avx2", None),
    ("bf16", "avx2", torch.bfloat16), ("fp16", "avx2", torch.float16), ("off", "amx_bf16", None)])
def test_a_cpu_computes_in_bf16_where_it_multiplies_it(amp, feature, expected, monkeypatch, capsys):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {feature: True, "cpu_name": "x"})
    assert select_amp_dtype(amp, torch.device("cpu")) == expected
    assert ("emulated" in capsys.readouterr().err) == (amp == "bf16")
