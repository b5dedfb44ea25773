"""Files that are written whole or not at all, and folders that one run at a time may use."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from support.command import UserError

UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def atomic_path(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path to write to, renamed to ``path`` when the block ends well.

    Readers never see half a file. Raises UserError if the file cannot be written, such as on a
    full disk; an earlier file then stays as it was.
    durable: flush to the disk, so that after a power cut too the file is the old or the new one.
    """
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_file(path: Path, write: Callable[[Path], object], durable: bool = False) -> None:
    """Call ``write`` with an `atomic_path`. Raises UserError as it does."""
    with atomic_path(path, durable) as temporary:
        write(temporary)


def make_folder(path: Path) -> Path:
    """Create a folder and its parents. Raises UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be created ({error.strerror})") from None
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and keep other runs out of it; remove what a killed run left unfinished.

    The operating system releases the lock of a process that dies. Raises UserError if another run
    uses the folder or if it is not writable.
    """
    lock = FileLock(make_folder(folder) / ".lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(
            f"{folder} is in use by another run; wait for it to finish, or name another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        for path in folder.glob(f"{UNFINISHED}*"):
            path.unlink()
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, renamed to ``path`` when the block ends well; else nothing of it remains.

    Raises UserError if ``path`` is neither missing nor an empty folder, or cannot be written.
    """
    path = path.resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; name another, or remove it first")
    temporary = make_folder(path.parent) / f"{UNFINISHED}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def local_path(path: Path) -> Path:
    """The path relative to the working directory if it lies below it, else unchanged."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def every_nth(paths: Sequence[Path], count: int = 16) -> Sequence[Path]:
    """About ``count`` of the paths, evenly spaced, where a sample of the files tells enough."""
    return paths[:: max(1, len(paths) // count)]
