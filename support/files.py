"""Files and folders that are whole or not there: written beside their place, then renamed."""
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from support.command import RunError, UserError


def temporary_path(path: Path) -> Path:
    """Where a file is written before it is renamed: a fixed name, so that a run overwrites what a killed one left."""
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


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with an `atomic_path`. Raises RunError if the file cannot be written."""
    with atomic_path(path) as temporary:
        write(temporary)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, renamed to ``path`` when the block ends well; else nothing of it stays.

    Raises UserError if ``path`` is not empty or cannot be created, RunError if it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; name another, or remove it first")
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(path.parent)
    try:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> Path:
    """Create a folder and its parents. Raises UserError if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be created ({error.strerror or error})") from None
    return path


def remove_file(path: Path) -> None:
    """Remove a file if it is there. Raises RunError if it cannot be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be removed ({error.strerror or error})") from None
