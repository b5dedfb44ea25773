"""One epoch of training, one pass of validation."""
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from inference.predictor import NOT_FINITE, Predictor, most_probable
from metric import SegmentationMetric
from support.command import RunError, progress
from support.device import autocast
from training.distributed import sum_over_processes, world_size


class NonFiniteLoss(RunError):
    """The loss became NaN or infinite at ``step`` of the epoch, or in its validation: None."""

    def __init__(self, step: int | None = None):
        super().__init__(NOT_FINITE)
        self.step = step


def train_one_epoch(model: nn.Module, loader: DataLoader, loss_fn: nn.Module, optimizer: Optimizer, scheduler,
                    scaler: torch.amp.GradScaler, *, device: torch.device, amp_dtype: torch.dtype | None = None,
                    clip_grad: float = 0.0, after_update: Callable[[], None] = lambda: None,
                    description: str = "") -> dict[str, float]:
    """Train on every batch of (images (N, 3, H, W) float32, masks (N, H, W) int64); the scheduler steps per update.

    clip_grad: largest norm of the gradients; 0: no limit. after_update: called after each update of the weights.
    Returns ``train_loss`` (mean over batches), ``lr`` (of the last update) and ``images_per_second``.
    Raises NonFiniteLoss.
    """
    model.train()
    check_every = 1 if device.type == "cpu" else 20  # reading the loss waits for the device
    losses: list[Tensor] = []
    images_seen, started = 0, time.perf_counter()
    bar = progress(loader, desc=description, unit="batch")
    for step, (images, masks) in enumerate(bar):
        images = images.to(device, non_blocking=True)
        masks = masks.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            logits = model(images)
        loss = loss_fn(logits, masks)
        scaler.scale(loss).backward()
        losses.append(loss.detach())
        images_seen += len(images)
        lr = optimizer.param_groups[0]["lr"]
        if (step + 1) % check_every == 0 or step + 1 == len(loader):
            bad = torch.stack(losses[-check_every:]).isfinite().logical_not().nonzero()
            if len(bad):
                raise NonFiniteLoss(max(0, step + 1 - check_every) + int(bad[0]))
            bar.set_postfix(loss=f"{losses[-1].item():.3f}", lr=f"{lr:.2g}", refresh=False)
        if update(model, optimizer, scheduler, scaler, clip_grad):
            after_update()
    train_loss = torch.stack(losses).mean().item()  # waits for the device: only then is the time known
    return {"train_loss": train_loss, "lr": lr,
            "images_per_second": world_size() * images_seen / (time.perf_counter() - started)}


def update(model: nn.Module, optimizer: Optimizer, scheduler, scaler: torch.amp.GradScaler, clip_grad: float) -> bool:
    """One optimiser step on the gradients. Returns False where they overflow in fp16 and the step is skipped."""
    if clip_grad:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if scaler.get_scale() < scale:
        return False
    scheduler.step()
    return True


@torch.inference_mode()
def validate(predictor: Predictor, loader: DataLoader, metric: SegmentationMetric,
             on_batch: Callable[[Tensor], None] = lambda ids: None) -> dict:
    """Fill ``metric`` from batches of (images (N, 3, H, W), masks (N, H', W')), scored at the masks' size.

    on_batch: receives the predicted class ids (N, H', W') of every batch.
    Returns the metric's scores and ``loss``, the mean cross-entropy of the labelled pixels, NaN if there are none.
    Raises NonFiniteLoss where the network has diverged.
    """
    metric.reset()
    ignore_index = -1 if metric.ignore_index is None else metric.ignore_index
    loss = torch.zeros((), device=predictor.device)
    for images, masks in progress(loader, desc="val", unit="batch"):
        masks = masks.to(predictor.device, non_blocking=True)
        ids = torch.empty_like(masks, dtype=torch.uint8)
        for part, prob in predictor.parts(images, masks.shape[-2:]):
            ids[:, *part], mask = most_probable(prob), masks[:, *part]
            labelled = mask != ignore_index
            of_mask = prob.gather(1, torch.where(labelled, mask, 0).unsqueeze(1)).squeeze(1)
            loss -= (of_mask.clamp_min(1e-8).log() * labelled).sum()
        metric.update(ids, masks)
        on_batch(ids)
    metric.counts, loss = sum_over_processes(metric.counts), sum_over_processes(loss)
    if not loss.isfinite():
        raise NonFiniteLoss
    scores = metric.compute()
    pixels = int(scores["pixels"].sum())
    return {**scores, "loss": loss.item() / pixels if pixels else float("nan")}
