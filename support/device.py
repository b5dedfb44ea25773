"""The device, its precision, its memory and its cores."""
import contextlib
import ctypes
import os
import platform
import re
import signal
import sys

import torch

from support.command import UserError


def select_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU. Raises UserError where the named device is missing."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind in count if count[kind])
    known = re.fullmatch("(cuda|mps|cpu)(?::([0-9]{1,4}))?", name)
    if not known or int(known[2] or 0) >= count[known[1]]:
        raise UserError(f"--device {name} is not available here; use --device auto or cpu")
    if known[1] == "cuda" and known[2]:
        torch.cuda.set_device(int(known[2]))
    if known[1] == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let glibc reuse what tensors free: fresh pages, cleared by the kernel, cost a fifth of a CPU training step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX: what one thread freed is for all, a decoded photograph above all
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: memory goes back to the kernel at the end only


def select_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type for autocast, None for float32. ``auto``: bf16 where the hardware multiplies it, else fp16 on CUDA.

    Raises UserError where mixed precision is asked of a device that is neither CUDA nor a CPU.
    """
    if amp == "auto":
        amp = "bf16" if multiplies_bf16(device) else "fp16" if device.type == "cuda" else "off"
    elif amp == "bf16" and not multiplies_bf16(device):
        print("--amp bf16 is emulated here, and slower than off", file=sys.stderr)
    if amp in ("fp16", "bf16") and device.type not in ("cuda", "cpu"):
        raise UserError(f"--amp {amp} needs CUDA or a CPU, this run is on {device.type}; use --amp auto or off")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(amp)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16. ARM's CPUs are left out: nobody has timed a convolution there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def memory_format(device: torch.device, dtype: torch.dtype | None, width: int) -> torch.memory_format:
    """Of a network's weights, which convolutions then give their results, for training.

    channels_last is a fifth faster, but slower by a tenth to a third for wide networks in float32 on CPUs.
    """
    wide_on_cpu = device.type == "cpu" and dtype is None and width > 32
    return torch.contiguous_format if wide_on_cpu else torch.channels_last


def autocast(device: torch.device, dtype: torch.dtype | None):
    """The autocast context; a no-op where ``dtype`` is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def repeatable(deterministic: bool) -> None:
    """Have torch pick repeatable, slower kernels; else those that are the fastest for the sizes at hand."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic


def default_workers(device: torch.device) -> int:
    """How many processes load data: none where they would only take two CPU cores from the network."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = given // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # shared by torchrun's processes
    if device.type == "cpu":
        return 2 if cores > 2 else 0
    return max(1, min(8, cores))


def init_worker(worker_id: int) -> None:
    """For data loader processes: leave signals to the main process, which ends its workers, and use one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # SIGTERM may go to all processes, or end this one alone: leave the main one time
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))
    torch.set_num_threads(1)
