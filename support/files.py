"""Files and folders that are whole or not there, and folders that one process at a time may hold."""
import contextlib
import errno
import os
import secrets
import shlex
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from support.command import RunError, UserError, printable

UNFINISHED, LOCK = ".unfinished-", ".lock"


def unfinished_path(folder: Path, suffix: str = "") -> Path:
    """Where something is written before it is renamed: nobody can guess the name and put a link there."""
    return folder / f"{UNFINISHED}{secrets.token_hex(8)}{suffix}"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to, renamed over ``path`` when the block ends well: readers never see half a file.

    A link is replaced by the file; what it leads to stays. Raises UserError if ``path`` is or leads to anything but a
    file, such as a folder or a device, and RunError if it cannot be written; what stood there then stays.
    """
    temporary = unfinished_path(path.parent, path.suffix)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{path} is not a file that could be replaced; name another")
        open(temporary, "xb").close()
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
    """Call ``write`` with an `atomic_path`. Raises UserError and RunError as it does."""
    with atomic_path(path) as temporary:
        write(temporary)


@contextlib.contextmanager
def locked(folder: Path, patience: float = 1) -> Iterator[None]:
    """Create a folder, keep other processes out of it, and clear it of what a killed one left unfinished.

    A folder that was created and stays empty is removed at the end.
    patience: seconds to wait for another process; the system lets go of the lock of one that dies. Raises UserError
    that names the process that holds the folder, or if the folder cannot be created, RunError if it cannot be locked.
    """
    new, path = not folder.is_dir(), make_folder(folder) / LOCK
    lock: contextlib.AbstractContextManager = contextlib.nullcontext()
    try:
        lock = FileLock(path, mode=0o666, fallback_to_soft=False).acquire(timeout=patience)
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError):  # Windows lets nobody read it
            holder = path.read_text("utf-8", "replace") or holder
        raise UserError(f"{folder} is in use by {holder}; wait for its end, or name another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise RunError(f"{folder}: cannot be locked ({error.strerror or error})") from None
        print(f"warning: {folder} cannot be locked ({error.strerror}); keep other runs out of it", file=sys.stderr)
    with lock:
        with contextlib.suppress(OSError):  # a full disk
            command = printable(shlex.join(sys.argv))[:300]
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} ({command})", "utf-8")
        for left in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else remove_file(left)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if new and os.listdir(folder) == [LOCK]:
                    shutil.rmtree(folder)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, whose content moves to ``path`` when the block ends well; else nothing of it stays.

    ``path`` may be an empty folder, a link to one, or a mounted disk. Raises UserError if it is not empty or cannot be
    created, RunError if it cannot be written.
    """
    with locked(path):
        temporary = unfinished_path(path)
        try:
            if any(child.name != LOCK for child in path.iterdir()):
                raise UserError(f"{path} is not an empty folder; name another, or remove it first")
            temporary.mkdir()
            yield temporary
            for child in temporary.iterdir():
                child.rename(path / child.name)
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
