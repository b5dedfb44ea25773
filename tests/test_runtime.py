"""What no command's output shows: the memory allocator, and the choice of loader processes."""
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import default_workers

MEASURE = """
import torch
from runtime import keep_freed_memory
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
{call}
before = resident()
tensors = [torch.ones(20_000_000) for _ in range(3)]
assert resident() > before + 200e6
del tensors
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("call,kept", [("", False), ("keep_freed_memory()", True)])
def test_freed_memory_is_kept(call, kept):
    done = subprocess.run([sys.executable, "-c", MEASURE.format(call=call)], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 200e6) == kept


@pytest.mark.parametrize("device,cores,expected", [("cpu", 1, 0), ("cpu", 2, 0), ("cpu", 16, 2), ("cuda", 2, 2),
                                                   ("cuda", 16, 8), ("cpu", None, 0)])
def test_loader_processes_suit_the_machine(monkeypatch, device, cores, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert default_workers(torch.device(device)) == expected
