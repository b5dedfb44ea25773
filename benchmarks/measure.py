"""A line of the table, and how its times are taken."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Row:
    """One line of the table: ``ours`` in ``unit``, and the same of a reference."""

    stage: str
    ours: float
    unit: str
    reference: float | None = None
    against: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the reference."""
        return None if self.reference is None else self.reference / self.ours

    def __str__(self) -> str:
        other = ""
        if self.reference is not None:
            other = f"{self.against}: {self.reference:.4g} {self.unit}, {self.ratio:.2f}×"
        return f"| {self.stage} | {self.ours:.4g} {self.unit} | {other} |"


def compare(
    stage: str, runs: int, ours: Callable, references: dict[str, Callable], share: int = 1
) -> Iterator[Row]:
    """A row for each reference, in milliseconds divided by ``share``."""
    times = in_turns(runs, ours, *references.values())
    for name, reference in zip(references, times[1:]):
        yield Row(stage, times[0] / share, "ms", reference / share, name)


def in_turns(runs: int, *functions: Callable) -> list[float]:
    """The median milliseconds of each function, called in turns after one call to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for run in range(runs + 1):
        for function, milliseconds in zip(functions, times):
            started = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if run:
                milliseconds.append(1e3 * (time.perf_counter() - started))
    return [median(milliseconds) for milliseconds in times]


def command(*arguments) -> None:
    """Run a Python command in a process of its own."""
    words = [sys.executable, *map(str, arguments)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
