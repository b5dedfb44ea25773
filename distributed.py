"""Training in several processes, which torchrun starts: one for each GPU, or on CPUs, talking through gloo.

    torchrun --nproc_per_node=4 train.py --data_root data/CamVid

Without torchrun everything here does nothing. A batch of the run is the batches of all processes together.
"""
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime import UserError, is_distributed, is_main_process, under_torchrun


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def start_processes(device: str) -> str:
    """Join the processes that torchrun started, if it did; the name of this one's device.

    Further processes print nothing but errors. SIGTERM ends each at once, even while it waits for another.
    Raises UserError where there are fewer GPUs than processes, or a single GPU is named for several.
    """
    if not under_torchrun() or os.environ["WORLD_SIZE"] == "1":
        return device
    index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: under torchrun give cuda, cpu or auto; each process takes its own")
    if device == "cuda":
        if index >= gpus:
            raise UserError(f"process {index + 1} of this machine has no GPU, there are {gpus}; lower --nproc_per_node")
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # After --max-restarts, torchrun's store still holds the dead processes' addresses. (On several machines the
        # counts of restarts differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun start a new store.)
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # A dead process ends the others through torchrun; the time is for what the first alone does, such as --cache.
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=number, world_size=count,
                            timeout=timedelta(hours=4), device_id=None if device == "cpu" else torch.device(device))
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")
    return device


def end_processes() -> None:
    if is_distributed():
        dist.barrier()
        dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """End the program; under torchrun at once, because gloo's threads now and then abort a process that tidies up."""
    if under_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The others wait until the first process of all has done the block, then do it too."""
    if rank() > 0:
        dist.barrier()
    yield
    if is_distributed() and rank() == 0:
        dist.barrier()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of every process's tensor; its gradient reaches them all. The tensor itself in a single process."""
    return _Sum.apply(x) if is_distributed() else x


def agree(what: str, value: int) -> None:
    """Raises UserError unless ``value`` is the same in every process."""
    if is_distributed():
        values: list = [None] * world_size()
        dist.all_gather_object(values, value)
        if len(set(values)) > 1:
            raise UserError(f"the processes disagree on {what}: {values}; --data_root and --checkpoint must be the "
                            f"same, shared folders on every machine")


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on any device: torch's own refuses CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and is_distributed()):
            return super().forward(x)
        count = sum_over_processes(x.new_tensor(x.numel() / x.shape[1]))
        mean = sum_over_processes(x.sum((0, 2, 3))) / count  # (C,)
        centred = x - mean[:, None, None]
        var = sum_over_processes(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """In a distributed run, the network with batch norms that see the batches of all processes."""
    if not is_distributed():
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm  # the same parameters and buffers, another forward
    return model


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """In a distributed run, the network whose gradients are averaged over the processes."""
    if not is_distributed():
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
