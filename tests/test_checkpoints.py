"""Checkpoints come back whole, or not at all and in one line; a run that is killed again and again ends the same."""
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import REPO, SMALL, load

from datasets.classes import CAMVID, ClassSet
from datasets.synthetic import generate_dataset
from model import build_model
from support.command import UserError
from training.checkpoints import FORMAT, SHIPPED, default_checkpoint, load_model, load_predictor, save_checkpoint
from training.run import TrainingState


def test_best_is_what_beats_all_before():
    state, scores = TrainingState(*5 * [None], 3), (float("nan"), 0.2, 0.2, 0.1, 0.3)
    rows = [{}, *({"val_miou": score} for score in scores)]
    assert list(map(state.record, rows)) == [False, True, True, False, False, True]


@pytest.mark.parametrize("key", ["ema_state_dict", "model_state_dict"])
def test_a_file_of_format_1_predicts_with_the_average_if_there_is_one(trained, scenes, tmp_path, call, key):
    """It has everything at the top level, and flags that are gone."""
    state, path, normalize = load(trained), tmp_path / "1.pth", {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    config, training = state["config"] | {"normalize": normalize, "max_side": 480}, state["training"]
    config["train"] |= {"image_size": None, "warmup_steps": 100, "grad_accum": 1}
    weights = training[key]
    if key == "model_state_dict":
        training["ema_state_dict"] = None
    torch.save({"format": 1, "config": config, "rng_state": {}, **training}, path)
    model, classes, found = load_model(path)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert not model.training and found["normalize"] == normalize and classes.to_dict() == CAMVID.to_dict()
    assert [load_predictor(path, side)[0].max_side for side in (None, 0, 99)] == [480, 0, 99]
    status, _, err = call("train.py", "--data_root", scenes, *SMALL, "--resume", path)
    assert status == 2 and "version 1; use --init_from" in err
    config["train"]["image_size"] = [360, 479]
    torch.save({"format": 1, "config": config, **training}, path)
    with pytest.raises(UserError, match=r"\A.*--max_side 479\Z"):
        load_model(path)


class Malicious:
    """Creates a file where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


WIDE = build_model("unet", 12, width=8)
# Where in a good _last.pth, and what stands there instead; "" is the whole file.
BROKEN = [
    ("", b""), ("", b"<html>404 Not Found</html>"), ("", pickle.dumps(Malicious())), ("", [1, 2]), ("", WIDE),
    ("scores", Malicious()), ("config", None), ("config/train", None), ("format", FORMAT + 1),
    ("format", None), ("state_dict", None), ("state_dict", WIDE.state_dict()), ("config/model/name", "segnet"),
    ("config/classes", ClassSet.numbered(5).to_dict()), ("state_dict/classifier.bias", torch.full((12,), torch.nan))]
NOT_RESUMED = [
    ("training", None), ("training/model_state_dict", WIDE.state_dict()), ("training/optimizer_state_dict", {}),
    ("training/history", None), ("training/steps_per_epoch", 9), ("config/classes/names", [*"abcdefghijkl"])]


@pytest.mark.parametrize("resume, place, value", [(False, *case) for case in BROKEN]
                         + [(True, *case) for case in NOT_RESUMED])
def test_broken_file_is_one_line(trained, scenes, tmp_path, monkeypatch, call, resume, place, value):
    path, state = tmp_path / "broken.pth", load(trained)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        *parents, key = place.split("/")
        inner = state
        for parent in parents:
            inner = inner[parent]
        inner[key] = value
        torch.save(state if place else value, path)
    if resume:
        status, _, err = call("train.py", "--data_root", scenes, *SMALL, "--resume", path)
        assert status == 2 and err.count("\n") == 1 and f"{path}: cannot be resumed" in err
    else:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=rf"\A{path}.*\Z"):
            load_model(path)
    assert not (tmp_path / "executed").exists(), "opening the file ran its code"


def test_resume_with_another_recipe_names_every_flag(trained, scenes, call):
    typed = ("--width 8 --optimizer adamw --lr 0.01 --momentum 0.8 --weight_decay 0.1 --scheduler onecycle --seed 5 "
             "--step_size 7 --batch_size 3 --clip_grad 1 --crop_size 96 --max_side 90 --scale 1 1 --jitter 0 --gamma 1 "
             "--class_weights log --loss ce --label_smoothing 0.1 --ema 0.5 --epochs 9 --model unet_resnet18")
    resume = "--resume", trained / "checkpoint" / "unet_last.pth"
    status, _, err = call("train.py", "--data_root", scenes, *SMALL, *typed.split(), *resume)
    assert status == 2 and err.count("\n") == 1
    assert not [flag for flag in typed.split() if flag.startswith("--") and f"{flag} " not in err]


@pytest.mark.parametrize("failure", [OSError(28, "disk full"), RuntimeError("write failed\nat 0"), KeyboardInterrupt()])
def test_failed_write_leaves_the_earlier_file(monkeypatch, tmp_path, failure):
    def tear(state, target):
        target.write_bytes(b"half a file")
        raise failure
    path = tmp_path / "unet_last.pth"
    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(torch, "save", tear)
    with pytest.raises((KeyboardInterrupt, UserError), match=r"\A.*\Z"):
        save_checkpoint(path, {"epoch": 2})
    assert list(tmp_path.iterdir()) == [path] and torch.load(path)["epoch"] == 1


def test_default_checkpoint_is_the_newest_best_else_the_shipped_one(tmp_path):
    assert default_checkpoint(tmp_path) == SHIPPED and SHIPPED.is_file()
    (tmp_path / "e_best.pth").symlink_to("gone")
    for age, name in [(300, "a_best.pth"), (100, "b_best.pth"), (200, "c_best.pth"), (0, "d_last.pth")]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert default_checkpoint(tmp_path) == tmp_path / "b_best.pth"


# Imports everything once and forks a process for each run: starting Python anew would take most of the time.
DRIVER = """
import matplotlib.figure, os, random, signal, sys, time, torch, train
from pathlib import Path
from support.command import run_command

def start(checkpoint, *flags, at=None, nth=0):
    "Fork a training process that kills itself with the nth file `torn`, or `before` or `after` its renaming."
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = ["train.py", *{flags!r}, "--checkpoint", checkpoint, *flags]
    save, replace, left = torch.save, os.replace, iter(range(nth, 0, -1))
    def reach(what, path):
        if what == at and next(left, 0) == 1:
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
    flags = [*map(str, ("--data_root", data, *SMALL, "--batch_size", 4, "--epochs", 5, "--deterministic"))]
    done = subprocess.run([sys.executable, "-c", DRIVER.format(flags=flags)], cwd=tmp_path, capture_output=True,
                          text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr
    kills = (tmp_path / "kills").read_text().split()
    assert set(kills) == {"torn", "before", "after"} and len(kills) < 20, "and at any time"
    whole = tmp_path / "whole"
    for other in (tmp_path / "killed", *tmp_path.glob("finished*")):
        assert (other / "unet_log.csv").read_bytes() == (whole / "unet_log.csv").read_bytes()
        assert {path.name for path in other.iterdir() if path.is_file()} == {path.name for path in whole.iterdir()}
        for name in ("best", "last"):
            ours, expected = (torch.load(run / f"unet_{name}.pth") | {"config": 0} for run in (other, whole))
            torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
