"""Training in several processes, which torchrun starts: one for each GPU, or on CPUs with gloo.

    torchrun --nproc_per_node=4 train.py --data_root data/CamVid

Without torchrun everything here does nothing.
"""

import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from support.command import UserError


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_initialized()


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """The number of this process; 0 is the main process, which writes the files."""
    return dist.get_rank() if is_distributed() else 0


def start_processes(device: str) -> str:
    """Join the processes that torchrun started, if it did. Returns the name of this one's device.

    Only the main process prints to stdout. Raises UserError if there are fewer GPUs than processes,
    or if one device is named for several processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    if sys.platform == "linux":  # else the processes of a killed torchrun would keep on training
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    index = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: under torchrun, give cuda, cpu or auto")
    if device == "cuda" and index >= gpus:
        raise UserError(f"there are {gpus} GPUs; give --nproc_per_node {gpus}, or --device cpu")
    # The others wait while the main process reads the data, which may take hours.
    backend = "gloo" if device == "cpu" else "nccl"
    own = None if device == "cpu" else torch.device("cuda", index)
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1), device_id=own)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return str(own or device)


def end_processes() -> None:
    """Wait for the other processes, and leave the group."""
    if is_distributed():
        dist.barrier()
        dist.destroy_process_group()


def from_main_process(function: Callable[[], Any]) -> Any:
    """Call ``function`` in the main process and return its result in every process."""
    if not is_distributed():
        return function()
    shared = [function() if rank() == 0 else None]
    dist.broadcast_object_list(shared)
    return shared[0]


def share_buffers(model: nn.Module) -> None:
    """Copy the batch-norm statistics of the main process to all, so that the weights that are
    scored are those that are saved.
    """
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """In a distributed run, the network whose gradients are averaged over the processes.

    On CUDA its batch norms use the batches of all processes. SyncBatchNorm does not support CPUs:
    there, each process normalises its own batch.
    """
    if not is_distributed():
        return model
    if device.type == "cpu":
        return nn.parallel.DistributedDataParallel(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, device_ids=[device])
