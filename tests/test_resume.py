"""A run that is killed, again and again, ends with the files of a run that never was."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datasets.synthetic import generate_dataset

REPO = Path(__file__).parents[1]
# Imports everything once and forks a process for each run: starting Python anew would take most of the time.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repo!r})
import matplotlib.figure, torch
torch.set_num_threads(1)
import checkpoints, runtime, train

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def tear(state, path, save=torch.save):
    save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

def start(checkpoint, *flags, at=None, count=0):
    "Fork a training process that kills itself in the count-th call of what is named by `at`."
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = ["train.py", *{flags!r}, "--checkpoint", checkpoint, *flags]
    calls = 0
    def counted(original, then):
        def call(*args):
            nonlocal calls
            calls += 1
            return (then if calls == count else original)(*args)
        return call
    if at == "inside save":
        checkpoints.torch.save = counted(torch.save, tear)
    elif at == "before rename":
        os.replace = counted(os.replace, lambda *paths: die())
    elif at == "after rename":
        os.replace = counted(os.replace, lambda *paths, rename=os.replace: (rename(*paths), die()))
    os._exit(runtime.run_command(train.main, train.get_args_parser()))

begun = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
length = time.monotonic() - begun
rng, kills = random.Random(0), []
while len(kills) < 20:
    at = rng.choice(["any time", "any time", "inside save", "before rename", "after rename"])
    workers = rng.choice(["0", "0", "2"])
    pid = start("killed", "--resume", "auto", "--workers", workers, at=at, count=rng.randint(1, 9))
    if at == "any time":
        time.sleep(rng.uniform(0, 0.7 * length))
        os.kill(pid, signal.SIGKILL)
    if os.waitpid(pid, 0)[1]:
        kills.append(at)
    else:  # it came to its end: begin once more
        Path("killed").rename("finished%d" % len(kills))
assert os.waitpid(start("killed", "--resume", "auto"), 0)[1] == 0
print(*kills, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_twenty_moments_and_resumed_a_run_ends_the_same(tmp_path):
    data = tmp_path / "scenes"
    generate_dataset(data, {"train": 10, "val": 3}, (96, 72))
    flags = ["--data_root", str(data), "--width", "4", "--crop_size", "64", "--batch_size", "4", "--epochs", "6",
             "--device", "cpu", "--deterministic", "--workers", "0", "--lr", "0.02"]
    done = subprocess.run([sys.executable, "-c", DRIVER.format(repo=str(REPO), flags=flags)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.splitlines())) == 4, "killed in all four ways"
    whole, *others = tmp_path / "whole", tmp_path / "killed", *tmp_path.glob("finished*")
    for other in others:
        assert (other / "unet_log.csv").read_bytes() == (whole / "unet_log.csv").read_bytes()
        assert {path.name for path in other.iterdir() if path.is_file()} == {path.name for path in whole.iterdir()}
        for name in ("best", "last"):
            expected, state = (torch.load(run / f"unet_{name}.pth", weights_only=True) for run in (whole, other))
            assert state["epoch"] == expected["epoch"] and state["best_miou"] == expected["best_miou"]
            assert state["history"] == expected["history"]
            for weights in ("model_state_dict", "ema_state_dict"):
                for key, tensor in expected[weights].items():
                    assert torch.equal(state[weights][key], tensor), f"{other}, {name}: {key}"
