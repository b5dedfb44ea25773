"""The trainer: a network and everything that an update changes, and one epoch of training."""

import copy
import time

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from datasets.spec import DataSpec
from inference.checkpoints import load_weights
from inference.predictor import Predictor, fold_batch_norm
from loss import SegmentationLoss, class_weights
from model import MissingWeights, build_model
from support.command import UserError, progress
from support.device import memory_format, select_amp_dtype, sum_over_processes, to_device
from training.distributed import replicate, share_buffers, world_size
from training.recipe import build_optimizer, build_scheduler


class WeightAverage:
    """An exponential moving average (EMA) of a network's weights and batch-norm statistics.

    The decay rises to ``decay`` as (1 + n) / (10 + n) with the number n of updates, as in
    TensorFlow's ExponentialMovingAverage, so that the early weights are soon forgotten. With 0 the
    average is the network.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the network's present weights."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._values(self.module), self._values(model), 1 - keep)

    @staticmethod
    def _values(module: nn.Module) -> list[Tensor]:
        return [value for value in module.state_dict().values() if value.is_floating_point()]


class Trainer:
    """Trains the network that the flags describe.

    normalize: mean and std of the images in the batches, for the checkpoint.
    steps_per_epoch: updates in an epoch, for the schedule.
    """

    def __init__(
        self, args, data: DataSpec, device: torch.device, normalize: dict, steps_per_epoch: int
    ):
        self.args = args
        self.data = data
        self.normalize = normalize
        self.device = device
        self.amp_dtype = select_amp_dtype(args.amp, device)
        self.steps_per_epoch = steps_per_epoch
        torch.manual_seed(args.seed)
        options = {"pretrained": True} if args.pretrained and not args.resume else {}
        try:
            self.model = build_model(args.model, len(data.classes), width=args.width, **options)
        except MissingWeights as error:
            raise UserError(f"--pretrained: {error}") from None
        layout = memory_format(device, self.amp_dtype, args.width)
        self.model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.ema = WeightAverage(self.model, args.ema)
        self.optimizer = build_optimizer(args, self.model)
        self.scheduler = build_scheduler(args, self.optimizer, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        pixels = torch.from_numpy(data.reports["train"].pixels[: len(data.classes)])
        ignore_index = data.classes.ignore_index
        weight = class_weights(args.class_weights, pixels, ignore_index)
        self.loss_fn = SegmentationLoss(ignore_index, weight, args.loss == "ce+dice").to(device)
        self.network = replicate(self.model, device)
        if args.compile:
            self.network.compile()

    def train_one_epoch(self, loader: DataLoader) -> dict[str, float]:
        """Train on every batch of (images (N, 3, H, W) float32, masks (N, H, W) int64).

        Returns ``train_loss`` (mean over batches), ``lr`` (of the last update) and
        ``images_per_second``. Raises UserError if the loss becomes NaN or infinite.
        """
        self.network.train()
        # cuDNN looks for the fastest kernels, which pays where all batches have one size.
        torch.backends.cudnn.benchmark = not self.args.deterministic
        losses = []
        images_seen = 0
        started = time.perf_counter()
        bar = progress(loader, desc="train", unit="batch")
        for images, masks in bar:
            lr = self.optimizer.param_groups[-1]["lr"]  # not that of the encoder
            losses.append(self.train_step(images, masks))
            images_seen += len(images)
            if len(losses) % 20 == 0:  # not more often: reading the loss waits for the GPU
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        share_buffers(self.ema.module)
        train_loss = sum_over_processes(torch.stack(losses).mean()) / world_size()
        if not train_loss.isfinite():  # waits for the GPU, so the time is right
            raise UserError("the loss became NaN or infinite; try a lower --lr or --clip_grad 1")
        speed = world_size() * images_seen / (time.perf_counter() - started)
        return {"train_loss": train_loss.item(), "lr": lr, "images_per_second": speed}

    def train_step(self, images: Tensor, masks: Tensor) -> Tensor:
        """One update of the weights, their average and the learning rate. Returns the loss."""
        images = to_device(images, self.device)
        masks = to_device(masks, self.device)
        with torch.autocast(self.device.type, self.amp_dtype, self.amp_dtype is not None):
            logits = self.network(images)
        loss = self.loss_fn(logits, masks)
        self.scaler.scale(loss).backward()
        if self.args.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)  # changes nothing if gradients overflowed in fp16
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.ema.update(self.model)
        return loss.detach()

    def predictor(self) -> Predictor:
        """The averaged weights as predict.py will run them."""
        model = fold_batch_norm(copy.deepcopy(self.ema.module))
        return Predictor(
            model,
            self.data.classes,
            **self.normalize,
            device=self.device,
            amp_dtype=self.amp_dtype,
            max_side=self.data.max_side,
        )

    def init_from(self, checkpoint: dict) -> str:
        """Start from a checkpoint's weights alone. Returns what `load_weights` did."""
        done = load_weights(self.model, checkpoint, self.data.classes)
        self.ema.module.load_state_dict(self.model.state_dict())
        return done

    def state_dict(self) -> dict:
        """Plain types and tensors for a checkpoint; `load_state_dict` restores them exactly."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.scheduler.last_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "processes": world_size(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.ema.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        for p, values in self.optimizer.state.items():
            for key, value in values.items():
                if value.shape == p.shape:  # fused updates need the weights' memory format
                    values[key] = torch.empty_like(p).copy_(value)
        if state["scaler"]:  # empty unless the run was in fp16
            self.scaler.load_state_dict(state["scaler"])
        # The schedule depends on the update and the flags alone, and has no further state.
        self.scheduler = LambdaLR(self.optimizer, self.scheduler.lr_lambdas, state["updates"] - 1)
