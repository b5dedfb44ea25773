"""The training loop's parts: optimiser, schedule, weight average, one epoch of training, one pass of validation."""
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from distributed import sum_over_processes, world_size
from inference import Predictor, most_probable
from metric import SegmentationMetric
from runtime import autocast, progress

LONG_RUN = 2 * 3600  # seconds


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite at ``step`` of the epoch."""

    def __init__(self, step: int):
        super().__init__(f"the loss is not finite at step {step}")
        self.step = step


class Interrupted(Exception):
    """A signal asked the run to end."""


def build_optimizer(args, model: nn.Module) -> Optimizer:
    """SGD with Nesterov momentum or AdamW; weight decay on weights of more than one dimension only."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=args.momentum > 0)


def build_scheduler(args, optimizer: Optimizer, steps_per_epoch: int):
    """The schedule, counted in updates: a linear warm-up times the one chosen (one-cycle warms up by itself)."""
    total = args.epochs * steps_per_epoch
    if args.scheduler == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=total, cycle_momentum=False)
    schedules: list[lr_scheduler.LRScheduler] = []
    warmup = min(args.warmup_steps, total // 10)
    if warmup:
        schedules.append(lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup))
    if args.scheduler == "step":
        schedules.append(lr_scheduler.StepLR(optimizer, args.step_size * steps_per_epoch, args.gamma))
    elif args.scheduler == "poly":
        schedules.append(lr_scheduler.PolynomialLR(optimizer, total, power=0.9))
    elif args.scheduler == "cosine":
        schedules.append(lr_scheduler.CosineAnnealingLR(optimizer, total))
    else:
        schedules.append(lr_scheduler.ConstantLR(optimizer, 1.0))
    return lr_scheduler.ChainedScheduler(schedules, optimizer)


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of weights and batch-norm statistics whose decay rises to ``decay``."""
    def average(averaged: list, current: list, _) -> None:
        count = int(ema.n_averaged)  # on the CPU; the copy handed in lies on the device, and reading it would wait
        keep = min(decay, (1 + count) / (10 + count))  # early weights are far off: forget them soon
        for old, new in zip(averaged, current):
            old.lerp_(new, 1 - keep) if old.is_floating_point() else old.copy_(new)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    return ema


def train_one_epoch(model: nn.Module, loader: DataLoader, loss_fn: nn.Module, optimizer: Optimizer, scheduler,
                    scaler: torch.amp.GradScaler, *, device: torch.device, amp_dtype: torch.dtype | None = None,
                    grad_accum: int = 1, clip_grad: float = 0.0, ema: AveragedModel | None = None,
                    stop: Callable[[], bool] = lambda: False, on_step: Callable[[int], None] = lambda step: None,
                    description: str = "") -> dict:
    """Train on every batch of (images (N, 3, H, W) float32, masks (N, H, W) int64); the scheduler steps per update.

    Returns ``train_loss`` (mean over batches), ``lr`` (of the last update) and ``images_per_second``.
    Raises NonFiniteLoss, and Interrupted after the step in which ``stop()`` became true.
    """
    model.train()
    check_every = 1 if device.type == "cpu" else 20  # reading the loss waits for the device
    losses, images_seen, started = [], 0, time.perf_counter()
    bar = progress(loader, desc=description, unit="batch")
    for step, (images, masks) in enumerate(bar):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        masks = masks.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            logits = model(images)
        loss = loss_fn(logits, masks)
        # The last group of an epoch may be shorter than grad_accum and is averaged over its own length.
        group = min(grad_accum, len(loader) - step // grad_accum * grad_accum)
        scaler.scale(loss / group).backward()
        losses.append(loss.detach())
        images_seen += len(images)
        last, lr = step + 1 == len(loader), optimizer.param_groups[0]["lr"]
        if last or (step + 1) % check_every == 0:
            lost = torch.stack(losses[-check_every:]).isfinite().logical_not().nonzero()
            if len(lost):
                raise NonFiniteLoss(max(0, step + 1 - check_every) + int(lost[0]))
            rate = world_size() * images_seen / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{losses[-1].item():.3f}", lr=f"{lr:.2g}",
                            images_s=f"{rate:.1f}", refresh=False)
        if last or (step + 1) % grad_accum == 0:
            update(model, optimizer, scheduler, scaler, clip_grad, ema)
        on_step(step)
        if stop():
            raise Interrupted
    return {"train_loss": torch.stack(losses).mean().item(), "lr": lr,
            "images_per_second": world_size() * images_seen / (time.perf_counter() - started)}


def update(model: nn.Module, optimizer: Optimizer, scheduler, scaler: torch.amp.GradScaler, clip_grad: float,
           ema: AveragedModel | None) -> None:
    """One optimiser step on the gathered gradients, clipped to the norm ``clip_grad`` where it is not 0.

    Where the scaled gradients overflow in fp16, the scale is lowered and all else waits for the next step.
    """
    if clip_grad:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if scaler.get_scale() < scale:
        return
    scheduler.step()
    if ema is not None:
        ema.update_parameters(model)


@torch.inference_mode()
def validate(predictor: Predictor, loader: DataLoader, metric: SegmentationMetric,
             stop: Callable[[], bool] = lambda: False, on_batch: Callable[[Tensor], None] = lambda ids: None) -> float:
    """Fill ``metric`` from batches of (images (N, 3, H, W), masks (N, H', W')), scored at the masks' size.

    on_batch: receives the predicted ids (N, H', W') of every batch.
    Returns the mean cross-entropy of the labelled pixels, NaN where there are none. Raises Interrupted
    after the batch in which ``stop()`` became true.
    """
    metric.reset()
    ignore_index = -1 if metric.ignore_index is None else metric.ignore_index
    total = torch.zeros((), device=predictor.device)
    labelled = torch.zeros((), dtype=torch.int64, device=predictor.device)
    for images, masks in progress(loader, desc="val", unit="batch"):
        masks = masks.to(predictor.device, non_blocking=True)
        prob = predictor.probabilities(images, masks.shape[-2:])  # (N, C, H', W')
        ids = most_probable(prob)
        metric.update(ids, masks)
        on_batch(ids)
        known = masks != ignore_index
        of_label = prob.gather(1, torch.where(known, masks, 0).unsqueeze(1)).squeeze(1)
        total -= (of_label.clamp_min(1e-8).log() * known).sum()
        labelled += known.sum()
        if stop():
            raise Interrupted
    metric.all_reduce()
    return (sum_over_processes(total) / sum_over_processes(labelled)).item()


class TimeEstimate:
    """After the first steps, says how long the run will take; over two hours, also what shortens it."""

    def __init__(self, args, steps: int, val_pixels: int):
        self.args, self.steps = args, steps
        # A forward pass costs about a third of a training step on the same pixels.
        crop_pixels = args.batch_size * args.crop_size[0] * args.crop_size[1]
        self.val_steps = val_pixels / crop_pixels / 3 / args.val_every
        self.first = min(6, steps - 1)
        self.started = 0.0

    def __call__(self, epoch: int, step: int) -> None:
        if self.first < 1 or step not in (0, self.first):
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if step == 0:
            self.started = time.perf_counter()
            return
        step_seconds = (time.perf_counter() - self.started) / self.first
        epoch_seconds = step_seconds * (self.steps + self.val_steps)
        total = epoch_seconds * (self.args.epochs - epoch)
        self.first = 0
        tqdm.write(f"about {format_time(epoch_seconds)} an epoch, {format_time(total)} to epoch {self.args.epochs}")
        if total > LONG_RUN:
            tqdm.write("to shorten that: --width 16 or 32 (half the width takes about a third of the time), fewer "
                       "--epochs, a smaller --crop_size, a GPU")
        sys.stdout.flush()


def format_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
