"""A run that is killed, again and again, ends with the files of a run that never was."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO

from datasets.synthetic import generate_dataset

# Imports everything once and forks a process for each run: starting Python anew would take most of the time.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repo!r})
import matplotlib.figure, torch
torch.set_num_threads(1)
import train
from support.command import run_command

def start(checkpoint, *flags, at=None, nth=0):
    "Fork a training process that kills itself with the nth file `torn`, or `before` or `after` its renaming."
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = ["train.py", *{flags!r}, "--checkpoint", checkpoint, *flags]
    save, replace, count = torch.save, os.replace, 0
    def reach(what, path):
        nonlocal count
        count += what == at
        if what == at and count == nth:
            print(what, file=open("kills", "a"), flush=True)
            os.truncate(path, os.path.getsize(path) // (2 if what == "torn" else 1))
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = lambda state, path: (save(state, path), reach("torn", path))
    os.replace = lambda path, to: (reach("before", path), replace(path, to), reach("after", to))
    os._exit(run_command(train.main, train.get_args_parser()))

begun = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
length = time.monotonic() - begun
rng, kills = random.Random(0), 0
while kills < 20:
    at, workers = rng.choice(["any time", "any time", "torn", "before", "after"]), rng.choice(["0", "0", "2"])
    nth = rng.randint(1, 4 if at == "torn" else 12)
    pid = start("killed", "--resume", "auto", "--workers", workers, at=at, nth=nth)
    if at == "any time":
        time.sleep(rng.uniform(0, 0.7 * length))
        os.kill(pid, signal.SIGKILL)
    if os.waitpid(pid, 0)[1]:
        kills += 1
    else:  # it came to its end: begin once more
        Path("killed").rename("finished%d" % kills)
assert os.waitpid(start("killed", "--resume", "auto"), 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_twenty_moments_and_resumed_a_run_ends_the_same(tmp_path):
    data = tmp_path / "scenes"
    generate_dataset(data, {"train": 10, "val": 3}, (96, 72))
    flags = ["--data_root", str(data), "--width", "4", "--crop_size", "64", "--batch_size", "4", "--epochs", "5",
             "--device", "cpu", "--deterministic", "--workers", "0", "--lr", "0.02"]
    done = subprocess.run([sys.executable, "-c", DRIVER.format(repo=str(REPO), flags=flags)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kills = (tmp_path / "kills").read_text().split()
    assert set(kills) == {"torn", "before", "after"} and len(kills) < 20, "and at any time"
    whole, *others = tmp_path / "whole", tmp_path / "killed", *tmp_path.glob("finished*")
    for other in others:
        assert (other / "unet_log.csv").read_bytes() == (whole / "unet_log.csv").read_bytes()
        assert {path.name for path in other.iterdir() if path.is_file()} == {path.name for path in whole.iterdir()}
        for name, keys in (("best", ("state_dict", "scores")), ("last", ("state_dict", "scores", "training"))):
            ours, expected = (torch.load(run / f"unet_{name}.pth", weights_only=True) for run in (other, whole))
            for key in keys:
                torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=0, equal_nan=True)
