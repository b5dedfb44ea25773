"""Training in several processes, which torchrun starts: one for each GPU, or on CPUs, connected by gloo.

    torchrun --nproc_per_node=4 train.py --data_root data/CamVid

Without torchrun everything here does nothing.
"""
import contextlib
import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.command import UserError


def is_distributed() -> bool:
    """Whether this process has joined others, and not yet left them."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """The number of this process; 0 writes the files."""
    return dist.get_rank() if is_distributed() else 0


def start_processes(device: str) -> str:
    """Join the processes that torchrun started, if it did. Returns the name of this one's device.

    All but the first print errors alone. Raises UserError where there are fewer GPUs than processes, or where one
    device is named for several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not dist.is_torchelastic_launched():
        return device
    if sys.platform == "linux":  # else a torchrun that is killed would leave its processes training
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: under torchrun give cuda, cpu or auto; each process takes its own")
    if device == "cuda" and index >= gpus:
        raise UserError(f"process {index + 1} of this machine has no GPU, there are {gpus}; lower --nproc_per_node")
    # All others wait while the first checks the data, for hours where there are many images.
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=datetime.timedelta(days=1))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device if device == "cpu" else f"cuda:{index}"


def end_processes() -> None:
    """Wait for the others, and leave them."""
    if is_distributed():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The others wait until the first process has run the block, and run it then."""
    if rank() > 0:
        dist.barrier()
    yield
    if is_distributed() and rank() == 0:
        dist.barrier()


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of every process's tensor; the tensor itself in a single process."""
    if is_distributed():
        x = x.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(x)
    return x


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's batch-norm statistics: those that are saved are then those that are scored."""
    for buffer in model.buffers() if is_distributed() else ():
        dist.broadcast(buffer, 0)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """In a distributed run, the network whose gradients are averaged over the processes.

    On CUDA its batch norms see the batches of all processes. torch's SyncBatchNorm refuses CPUs: there each process
    normalises its own batch.
    """
    if not is_distributed():
        return model
    if device.type == "cpu":
        return nn.parallel.DistributedDataParallel(model)
    return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model), device_ids=[device])
