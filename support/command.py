"""What every command shares: its parser, one line for every error, exit statuses, signals, progress bars."""
import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that one sentence explains: what is wrong, where, and what to do. Commands exit with ``status``."""

    status = 2


class RunError(UserError):
    """Not the user's mistake, but the end of the run, such as a full disk or a diverged loss."""

    status = 1


def one_line(error: Exception) -> str:
    """The beginning of an exception's text, without line breaks."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Terminated(BaseException):
    """SIGTERM arrived."""


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to a flag's help, unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Prints defaults in the help, and a wrong flag as one line without the usage block."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=DefaultsFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


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


def progress(iterable=None, **options) -> tqdm:
    """A progress bar that leaves nothing behind; none outside a terminal, nor in torchrun's further processes."""
    return tqdm(iterable, leave=False, disable=None if is_main_process() else True, **options)


def run_command(main: Callable, parser: argparse.ArgumentParser) -> int:
    """Call ``main(args)``. Returns the exit status, and prints what went wrong as one line on stderr.

    2 or 1: a UserError or a RunError. 1: any other failure, with its traceback. 128 + the signal's number: Ctrl-C,
    SIGTERM, or a closed pipe.
    """
    def terminate(number: int, frame) -> None:
        raise Terminated

    def complain(message: str) -> None:
        print(f"{parser.prog}: {message}", file=sys.stderr)

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
        complain("error: the GPU is out of memory; lower --batch_size, --crop_size, --width or --tile")
        return 1
    except BrokenPipeError:
        # Nobody reads on; the interpreter would complain once more when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE, which Windows does not name
    except Terminated:
        complain("terminated")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        complain("interrupted")
        return 128 + signal.SIGINT
    except Exception:
        # Printed here, not by the interpreter, which would hold on to the loader's workers and wait for them.
        traceback.print_exc()
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
