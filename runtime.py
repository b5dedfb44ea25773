"""What every command needs around the network: errors in one line, the device, the precision, seeds, signals, files."""
import argparse
import contextlib
import ctypes
import io
import os
import platform
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


class UserError(Exception):
    """A mistake that one sentence explains: what is wrong, where, and what to do. Commands exit with ``status``."""

    status = 2


class RunError(UserError):
    """No mistake of the user's, but the end of the run: a full disk, a diverged loss, too small a GPU."""

    status = 1


class Terminated(BaseException):
    """SIGTERM arrived."""


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """Prints defaults in the help, and a bad flag as one line without the usage block."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=DefaultsFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_main_process() -> bool:
    """Whether this is the only process of a run, or the one of a distributed run that writes and prints."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def is_distributed() -> bool:
    """Whether this process has joined others, and not yet left them."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def run_command(main: Callable, parser: argparse.ArgumentParser) -> int:
    """Call ``main(args)`` and return its exit status: that of a UserError, printed as one line on stderr, 1 after any
    other failure, 128 + the signal's number after Ctrl-C, SIGTERM or a closed pipe.
    """
    def terminate(number: int, frame) -> None:
        raise Terminated

    def complain(message: str) -> None:
        where = "" if is_main_process() else f" in process {os.environ['RANK']}"
        print(f"{parser.prog}{where}: {message}", file=sys.stderr)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what no encoding knows
    args = parser.parse_args()
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        status = main(args) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        complain(f"error: {error}")
        return error.status
    except torch.OutOfMemoryError:
        complain("error: the GPU is out of memory; lower --batch_size or --tile")
        return 1
    except BrokenPipeError:
        # Nobody reads on; the interpreter would complain once more when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Terminated:
        complain("terminated")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        complain("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        if is_distributed() and ("closed by peer" in str(error) or "reset by peer" in str(error)):
            complain("error: another process of the run has ended")
            return 1
        # Printed here, not by the interpreter, which would hold on to the loader's workers and wait for them.
        traceback.print_exc()
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(iterable=None, **options) -> tqdm:
    """A progress bar that leaves nothing behind; none outside a terminal or in a further process of a run."""
    return tqdm(iterable, leave=False, disable=None if is_main_process() else True, **options)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def whole_number(text: str) -> int:
    """An argparse type: a whole number of at least 0 that fits a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and {2**32 - 1}")
    return value


def number_in(low: float, high: float, open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to ``high``, ``low`` itself excluded where ``open_low``."""
    def parse(text: str) -> float:
        value = float(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = "number"
    return parse


def select_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU. Raises UserError where the named one is missing."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if count[kind])
    kind, _, index = name.partition(":")
    if kind not in count or not (index or "0").isdecimal() or int(index or 0) >= count[kind]:
        raise UserError(f"--device {name} is not available here; use --device auto or cpu")
    if kind == "cuda" and index:
        torch.cuda.set_device(int(index))
    return torch.device(name)


def default_workers(device: torch.device) -> int:
    """How many loader processes: none where they would only take two CPU cores from the network."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # shared by torchrun's processes
    if device.type == "cpu":
        return 2 if cores > 2 else 0
    return max(1, min(8, cores))


def select_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bf16 where a CUDA device has it, else fp16; None (plain float32) on other devices.

    Raises UserError where ``fp16`` or ``bf16`` is asked of a device that is not CUDA.
    """
    if amp == "off" or (amp == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise UserError(f"--amp {amp} needs a CUDA device, this run is on {device.type}; use --amp auto or off")
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[amp]


def autocast(device: torch.device, dtype: torch.dtype | None):
    """The autocast context; a no-op where ``dtype`` is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; ``deterministic`` also picks the repeatable, slower kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic


def keep_freed_memory() -> None:
    """Have glibc reuse what tensors free: fresh pages, cleared by the kernel, cost a fifth of a CPU training step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back before the end


def rng_state() -> dict:
    """The torch random states, as tensors that a checkpoint can hold."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict) -> None:
    """Restore what `rng_state` returned; CUDA states only where the number of devices is the same."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class StopSignal:
    """The number of the SIGINT or SIGTERM received, 0 before. A second one ends the process at once."""

    def __init__(self):
        self.number = 0

    def __bool__(self) -> bool:
        return self.number != 0

    def __call__(self, number: int, frame) -> None:
        self.number = number
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_DFL)


@contextlib.contextmanager
def catch_signals() -> Iterator[StopSignal]:
    """Within the block, SIGINT and SIGTERM set a flag, so that a loop can end after the current step.

    Not in a distributed run, whose processes would wait for the one that ends first.
    """
    stop = StopSignal()
    if is_distributed():
        yield stop
        return
    previous = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def init_worker(worker_id: int) -> None:
    """For DataLoader workers: leave signals to the main process, which ends its workers, and use one thread each."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    torch.set_num_threads(1)


def temporary_path(path: Path) -> Path:
    """Where a file is written before it is renamed: one fixed name, so that the next run overwrites what a killed one
    left.
    """
    return path.with_name(f".{path.stem}.tmp{path.suffix}")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to, renamed over ``path`` when the block ends well: readers never see half a file.

    Raises RunError if the file cannot be written; what stood at ``path`` then stays.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, renamed to ``path`` when the block ends well; else nothing of it stays.

    Raises UserError if ``path`` holds anything already or cannot be created, RunError if it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; name another, or remove it first")
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be created ({error.strerror or error})") from None
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Remove a file, or nothing where there is none. Raises RunError if it cannot be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be removed ({error.strerror or error})") from None


def make_folder(path: Path) -> Path:
    """Create a folder and its parents. Raises UserError if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be created ({error.strerror or error})") from None
    return path
