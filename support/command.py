"""What every command shares: the parser, mistakes that end in one sentence, exit statuses."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


class UserError(ValueError):
    """A mistake that one sentence explains: what is wrong, where, and what to do. Exit status 2.

    details: further lines, such as the problems of single files.
    """

    def __init__(self, sentence: str, *details: str):
        super().__init__("\n  ".join([sentence, *details]))


class Parser(argparse.ArgumentParser):
    """Prints a mistake as one line, accepts --batch-size for --batch_size, and names the flag that
    is nearest to an unknown one.
    """

    def __init__(self, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def add_flags(self, title: str, *flags: tuple) -> None:
        """Add a group of flags, each as (name, type or choices, default, help); bool: a switch.

        Choices are lower case, and accepted in any case.
        """
        group = self.add_argument_group(title)
        for name, kind, default, text in flags:
            options: dict[str, Any] = {"default": default, "help": text}
            if default not in (None, False):
                options["help"] = f"{text} (default: {default})"
            if kind is bool:
                options["action"] = "store_true"
            else:
                options["choices"] = kind if isinstance(kind, tuple) else None
                options["type"] = str.lower if isinstance(kind, tuple) else kind
            group.add_argument(name, **options)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = [self.spell(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            near = get_close_matches(unknown[0], self._option_string_actions, n=1)
            self.error(f"unknown: {' '.join(unknown)}" + "".join(f"; is {n} meant?" for n in near))
        return parsed

    def spell(self, word: str) -> str:
        """A flag with underscores, if there is one."""
        name, equals, value = word.partition("=")
        underscored = name.replace("-", "_").replace("__", "--", 1)
        flags = self._option_string_actions
        if name in flags or underscored not in flags:
            return word
        return underscored + equals + value

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind: type, low: float, high: float = 2**31) -> Callable:
    """An argparse type: an int or float between ``low`` and ``high``, both included."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def run_command(main: Callable, parser: argparse.ArgumentParser) -> int:
    """Call ``main(args)`` and return the exit status.

    2: a UserError, printed as one line. 130: Ctrl-C. 143: SIGTERM. 141: the reader of a pipe has
    gone. Any other exception is a bug or a failing machine and keeps its traceback.
    """
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, terminate)
    try:
        status = main(args) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # What is left in the buffer would raise once more when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE, which Windows does not have


def progress(iterable: Iterable, **options) -> Any:
    """tqdm's bar, removed at its end; only in a terminal, and only in torchrun's first process."""
    from tqdm import tqdm

    disable = os.environ.get("RANK", "0") != "0" or None  # None: unless in a terminal
    return tqdm(iterable, leave=False, disable=disable, **options)
