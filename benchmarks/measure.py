"""A line of the table, and how its seconds are taken."""
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Row:
    """One line of the table. ratio: how many times as fast as the reference. limits: what was asked of the stage."""

    stage: str
    ours: float
    unit: str
    reference: float | None = None
    against: str = ""
    min_ratio: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.reference is None else self.reference / self.ours

    @property
    def met(self) -> bool | None:
        checks = [limit for limit in (self.min_ratio and self.ratio >= self.min_ratio,
                                      self.at_most and self.ours <= self.at_most,
                                      self.at_least and self.ours >= self.at_least) if limit is not None]
        return all(checks) if checks else None

    def __str__(self) -> str:
        reference = "" if self.reference is None else f"{self.reference:.4g}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}×" if self.ratio < 10 else f"{self.ratio:.0f}×"
        limits = ", ".join(text for text in (self.min_ratio and f"≥ {self.min_ratio:.2g}×",
                                             self.at_most and f"≤ {self.at_most:g} {self.unit}",
                                             self.at_least and f"≥ {self.at_least:g} {self.unit}") if text)
        mark = {True: "yes", False: "NO", None: ""}[self.met]
        return (f"| {self.stage} | {self.ours:.4g} {self.unit} | {reference} | {self.against} | {ratio} | {limits} "
                f"| {mark} |")


def in_turns(runs: int, *functions: Callable) -> list[float]:
    """The median seconds of each function, called in turns after one call each to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for run in range(runs + 1):
        for function, seconds in zip(functions, times):
            started = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if run:
                seconds.append(time.perf_counter() - started)
    return [median(seconds) for seconds in times]


def command(*arguments) -> None:
    """Run a Python command in a process of its own."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def peak_memory(*arguments) -> float:
    """The most memory, in GB, that a Python command takes."""
    # From a small process: a new one's peak begins with the memory of the process that starts it.
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, sys.executable, *map(str, arguments)], check=True, text=True,
                          stdout=subprocess.PIPE, cwd=ROOT)
    return int(done.stdout) / (1e9 if sys.platform == "darwin" else 1e6)
