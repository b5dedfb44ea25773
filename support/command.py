"""What every command shares: its parser, one line for every error, exit statuses, signals, progress bars.

Commands import it before all else: it needs Python alone, and speaks for them while torch and the others load.
"""
import _thread
import argparse
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

# What libraries say where the machine is at fault, not the program; and what to do.
OUTSIDE = {
    r"DataLoader worker|shared memory|</torch_|ConnectionResetError":
        "a process that loads data was lost, perhaps for too little memory or /dev/shm; lower --workers",
    r"MemoryError|out of memory|(can't|annot|nable to|ailed to) allocate|bad_alloc|ALLOC_FAILED|calculation overflowed|"
    r"failed to map segment|start new thread|could not (create|execute) a primitive":
        "out of memory; lower --batch_size, --crop_size, --width, --tile or --workers",
    r"No working C\+\+ compiler|Failed to find C compiler":
        "--compile needs a C++ compiler; install one, or leave it out",
    r"Connection (closed|reset) by peer": "another process of this run has ended"}


def printable(text: str, keep: str = "") -> str:
    """The text with escapes for what a terminal would obey or cannot show, line ends too, but for those in ``keep``."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def one_line(error: object) -> str:
    """The beginning of an exception's text, without line breaks."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def original(text: str) -> str:
    """The words of an exception; torch sends those of a loader's process at the end of a page with the traceback."""
    return text.strip().rsplit("\n", 1)[-1].partition(": ")[2] if "\nOriginal Traceback" in text else text


class UserError(ValueError):
    """A mistake that one sentence explains: what is wrong, where, and what to do. Commands exit with ``status``.

    lines: the sentence, and where it is a list what it lists; file names in them may hold anything.
    """

    status = 2

    def __init__(self, *lines: str):
        super().__init__("\n  ".join(printable(original(line)) for line in lines))


class RunError(UserError):
    """Not the user's mistake, but the end of the run, such as a full disk or a diverged loss."""

    status = 1


class Terminated(BaseException):
    """SIGTERM arrived."""


def explain(error: BaseException) -> tuple[str, int] | None:
    """The line to print and the exit status of a command that an exception ends; None for a fault of the program."""
    if isinstance(error, UserError):
        return f"error: {error}", error.status
    if isinstance(error, Terminated):
        return "terminated", 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        return "", 128 + 13  # SIGPIPE, which Windows does not name
    if isinstance(error, OSError) and error.filename:
        return "error: " + printable(f"{error.filename}: {error.strerror}"), 1
    text = original(str(error))
    for pattern, advice in OUTSIDE.items():
        if re.search(pattern, f"{type(error).__name__}: {text}"):
            return f"error: {advice}", 1
    if isinstance(error, OSError):
        return f"error: {printable(one_line(text))}", 1
    if isinstance(error, ImportError):
        return f"error: {one_line(text)}; pip install -r requirements.txt", 1
    return None


class Stream:
    """stdout or stderr, in which what a terminal would obey is escaped, and that stays silent where it cannot write.

    failure: the reason of the first. raises: the errors that end the command.
    """

    def __init__(self, stream: Any, raises: tuple[type[OSError], ...] = ()):
        self.stream, self.raises = stream, raises
        self.failure = ""  # not the error, whose frames would keep the loader's processes alive
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what no encoding knows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, printable(text, keep="\n\r\t"))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable, *args: str) -> None:
        try:
            action(*args)
        except OSError as error:
            self.failure = self.failure or str(error.strerror)
            with open(os.devnull, "w") as nowhere:  # for what is left, which would be tried again and again
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if isinstance(error, self.raises):
                raise


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to a flag's help, unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Prints defaults in the help, and a wrong flag as one line without the usage block."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=DefaultsFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        for before, word in pairwise(["the command", *(sys.argv[1:] if args is None else args)]):
            if not word or re.fullmatch(r"--\w+=", word):  # a path would be the folder we are in
                self.error(f"{word.rstrip('=') or f'the value after {before}'} is empty, perhaps an unset variable")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} (see --help)\n")


def number(kind: type, low: float, high: float = 2**31) -> Callable:
    """An argparse type: an int or float between ``low`` and ``high``, both included."""
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"  # for argparse's "invalid … value"
    return parse


def is_main_process() -> bool:
    """Whether this process writes files and prints: the only one, or torchrun's first."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def progress(iterable=None, **options) -> Any:
    """tqdm's bar, which leaves nothing behind; none outside a terminal, nor in torchrun's further processes."""
    from tqdm import tqdm
    return tqdm(iterable, leave=False, disable=None if is_main_process() else True, **options)


def end_imports(name: str, error: BaseException) -> None:
    """End the process, in one line if that is enough: libraries catch what is raised while they are imported."""
    line, status = explain(error) or ("", 1)
    print(f"{name}: {line}" if line else "".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
    os._exit(status)


def guard_imports(name: str) -> None:
    """From now on `end_imports`, and streams that are closed are open to nowhere: a file would get their number."""
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, mode))
    sys.excepthook = lambda kind, error, where: end_imports(name, error)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # ignored in the background of a shell
        signal.signal(signal.SIGINT, lambda *_: end_imports(name, KeyboardInterrupt()))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise what a signal means. While something is imported, which could swallow it or break, try again soon."""
    if not any(caller.f_code.co_filename.startswith("<frozen importlib") for caller, _ in traceback.walk_stack(frame)):
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated
    threading.Timer(0.05, _thread.interrupt_main, (number,)).start()


def run_command(main: Callable, parser: argparse.ArgumentParser) -> int:
    """Call ``main(args)``. Returns the exit status, and prints what went wrong as one line on stderr.

    2 or 1: a UserError or a RunError. 1: what the system or a library refuses, or a failure of the program, with its
    traceback. 128 + the signal's number: Ctrl-C, SIGTERM, or a closed pipe.
    """
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    streams, hook, printed = (sys.stdout, sys.stderr), sys.unraisablehook, Stream(sys.stdout, raises=(BrokenPipeError,))
    sys.stdout, sys.stderr = printed, Stream(sys.stderr)
    try:
        args = parser.parse_args()
        signal.signal(signal.SIGTERM, interrupt)
        if before[signal.SIGINT] != signal.SIG_IGN:
            signal.signal(signal.SIGINT, interrupt)
        status = main(args) or 0
        printed.flush()
        if printed.failure:
            raise RunError(f"not everything could be printed ({printed.failure})")
        return status
    except SystemExit:
        raise
    except BaseException as error:
        line, status = explain(error) or (None, 1)
        if line:
            print(f"{parser.prog}: {line}", file=sys.stderr)
        elif line is None:
            traceback.print_exc()
        raised: BaseException | None = error
        sys.unraisablehook = lambda _: None  # a loader that ends says again that a process of it was lost
        while raised:  # its frames hold on to the loader, whose processes would outlive the command
            traceback.clear_frames(raised.__traceback__)
            raised = raised.__context__
        return status
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        (sys.stdout, sys.stderr), sys.unraisablehook = streams, hook


_main = getattr(sys.modules["__main__"], "__file__", None)
if _main and Path(__file__).parents[1] in Path(_main).resolve().parents and not multiprocessing.parent_process():
    guard_imports(Path(_main).name)
