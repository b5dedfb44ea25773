"""The device: its precision, its memory, its cores, and the processes that share the work."""

import ctypes
import os
import platform
import signal
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from support.command import Parser, UserError

AMP_HELP = "mixed precision; auto: on CUDA, and bf16 on CPUs that multiply it"


def add_device_flags(parser: Parser) -> None:
    """The flags of the device and its precision."""
    parser.add_flags(
        "device",
        ("--device", str, "auto", "auto, cuda, cuda:1, mps or cpu"),
        ("--amp", ("auto", "fp16", "bf16", "off"), "auto", AMP_HELP),
    )


def select_device(name: str) -> torch.device:
    """``auto`` takes the accelerator that torch finds, such as CUDA or Apple's MPS, else the CPU.

    Raises UserError if the named device is missing.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):
        raise UserError(f"--device {name} is not available here; use auto or cpu") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory.

    Fresh pages, which the kernel clears, cost a fifth of a training step on a CPU.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX: memory that one thread frees is available to all
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return memory to the kernel at exit only


def select_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast, or None for float32.

    ``auto``: bf16 where the hardware multiplies it, else fp16 on CUDA.
    Raises UserError if mixed precision is requested on MPS.
    """
    if amp == "auto":
        fallback = "fp16" if device.type == "cuda" else "off"
        amp = "bf16" if multiplies_bf16(device) else fallback
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(amp)
    if dtype and device.type not in ("cuda", "cpu"):
        raise UserError(f"--amp {amp} is not supported on {device.type}; use --amp auto or off")
    return dtype


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16. ARM CPUs are unmeasured, and count as not."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(features.get(k) for k in ("avx512_bf16", "amx_bf16"))


def memory_format(
    device: torch.device, dtype: torch.dtype | None, width: int
) -> torch.memory_format:
    """The memory format of a network's weights for training.

    channels_last is a fifth faster, except for wide networks in float32 on CPUs, where it is 10 to
    30 % slower. On MPS, gradients of batch norm in it are wrong in some versions of torch.
    """
    wide_on_cpu = device.type == "cpu" and dtype is None and width > 32
    if wide_on_cpu or device.type == "mps":
        return torch.contiguous_format
    return torch.channels_last


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. Only CUDA does not wait: its batches are in pinned memory."""
    return x.to(device, non_blocking=device.type == "cuda")


def set_deterministic(deterministic: bool) -> None:
    """Select repeatable, slower kernels."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def loader_options(device: torch.device, workers: int | None) -> dict:
    """The options of a DataLoader that depend on the machine. workers: None selects a number."""
    return {
        "num_workers": default_workers(device) if workers is None else workers,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": init_worker,
    }


def default_workers(device: torch.device) -> int:
    """The number of data loader processes: none where they would take two CPU cores from training.

    torchrun's processes share the cores.
    """
    affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))
    cores = len(affinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cpu":
        return 2 if cores > 2 else 0
    return max(1, min(8, cores))


def init_worker(worker_id: int) -> None:
    """Leave Ctrl-C to the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of the tensors of all processes, in place; nothing changes in a single process."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x
