"""Checkpoints come back whole, or not at all and in one line; a run that is killed again and again ends the same."""
import copy
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import COLORS, REPO, SMALL, load, write_csv

from datasets.classes import CAMVID, ClassSet
from datasets.synthetic import generate_dataset
from model import build_model
from support.command import UserError
from training.checkpoints import SHIPPED, default_checkpoint, load_checkpoint, load_model, load_predictor, load_weights
from training.run import TrainingState
from training.schema import CHECKPOINT, DICT, RESUMABLE, check_checkpoint, of_classes


def test_best_is_what_beats_all_before():
    state, scores = TrainingState(*5 * [None], 3), (float("nan"), 0.2, 0.2, 0.1, 0.3)
    rows = [{}, *({"val_miou": score} for score in scores)]
    assert list(map(state.record, rows)) == [False, True, True, False, False, True]


@pytest.mark.parametrize("key", ["ema_state_dict", "model_state_dict"])
def test_a_file_of_format_1_predicts_with_the_average_if_there_is_one(trained, tmp_path, key):
    """It has everything at the top level, and flags that are gone."""
    state, path = load(trained), tmp_path / "1.pth"
    config, training = state["config"] | {"max_side": 480}, state["training"]
    if key == "model_state_dict":
        training["ema_state_dict"] = None
    config["train"] |= {"image_size": None, "warmup_steps": 100}
    torch.save({"format": 1, "config": config, "rng_state": {}, **training}, path)
    model, classes, found = load_model(path)
    torch.testing.assert_close(model.state_dict(), training[key], rtol=0, atol=0)
    assert not model.training and found["normalize"] == config["normalize"] and classes.to_dict() == CAMVID.to_dict()
    assert [load_predictor(path, side)[0].max_side for side in (None, 0, 99)] == [480, 0, 99]
    with pytest.raises(UserError, match="version 1; use --init_from"):
        load_checkpoint(path, training=True)


class Malicious:
    """Creates a file where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


MISSING = object()
ANY = ("1", True, [1], 3, {0: 1}, torch.ones(2))


def cases(schema, path=(), optional=False):
    """(path, what is wrong, value or MISSING) of whatever the schema forbids, in it and all within it."""
    field, inner = (DICT, schema) if isinstance(schema, dict) else (schema, {0: schema.item} if schema.item else {})
    kind, number, entries = field.kind, field.kind in (int, float), field.kind is list
    for wrong, what, value in (
            (not optional, "None", None), (not optional and path[-1:] != (0,), "missing", MISSING),
            *((type(value) not in (kind, {float: int}.get(kind)), f"a {type(value).__name__}", value) for value in ANY),
            (number, "huge", 10**40), (number, "infinite", math.inf), (number and not field.nan, "NaN", math.nan),
            (number, "too low", field.low - max(1, abs(field.low))), (kind is int, "a fraction", 1.5),
            (kind is str, "empty", ""), (field.choices, "no choice", "segnet"),
            (entries, "too long", entries and [0] * (field.high + 1)),
            (entries and field.low, "too short", entries and [0] * (field.low - 1))):
        if wrong and path:
            yield path, what, value
    for key, part in inner.items():
        yield from cases(part, (*path, key and key.removesuffix("?")), key != 0 and key.endswith("?"))


def replaced(value, path, new):
    """A copy of nested dictionaries and lists in which ``new`` stands at the path; with MISSING nothing does."""
    if not path:
        return new
    copy, (key, *rest) = value.copy(), path
    if not rest and new is MISSING:
        del copy[key]
    else:
        copy[key] = replaced(value[key], rest, new)
    return copy


CASES = [*{case[:2]: case for schema in (CHECKPOINT, of_classes(12), RESUMABLE) for case in cases(schema)
           if case[0][-2:] != ("image_size", 0)}.values()]
# A tensor of weights, of the average or of the optimiser, and what stands for it.
WRONG_TENSORS = {
    "missing": lambda x: MISSING, "other shape": lambda x: x[None], "other type": lambda x: x.to(torch.complex64),
    "whole numbers": lambda x: x.to(torch.int32), "NaN": lambda x: x * math.nan, "infinite": lambda x: x / 0,
    "repeated": lambda x: torch.zeros(1).expand(x.shape), "sparse": lambda x: x.to_sparse(),
    "without memory": lambda x: x.to("meta")}
CASES += [(("training", *names) if names[0] != "state_dict" else names, what, change)
          for names in (("state_dict", "decoder.0.conv.0.weight"), ("model_state_dict", "encoder.1.1.running_mean"),
                        ("ema_state_dict", "classifier.bias"), ("optimizer_state", "1.momentum_buffer"))
          for what, change in WRONG_TENSORS.items()]
CASES += [((*where, f"encoder.0.1.{name}"), "negative", lambda x: x - 99)
          for name in ("running_var", "num_batches_tracked")
          for where in (["state_dict"], ["training", "model_state_dict"], ["training", "ema_state_dict"])]
CASES += [(path, "against others", value) for path, value in (
    (("config", "classes", "ignore_index"), 12), (("config", "classes", "names"), [*"abcdefghijk"]),
    (("config", "classes", "colors"), [[0, 0, 0]] * 11), (("scores", "iou"), [0.5]), (("scores", "pixels"), [5] * 13),
    (("config", "model", "options", "width"), 200), (("config", "model", "name"), "unet_resnet18"),
    (("config", "train", "optimizer"), "adamw"), (("config", "train", "image_size"), [360, 479]))]


@pytest.fixture(scope="module")
def whole(trained) -> dict:
    """A good ``_last.pth`` in which every optional field is there."""
    state = load(trained)
    state["config"]["train"] |= {"num_classes": 12, "image_size": None}
    state["training"]["scaler_state_dict"] = torch.amp.GradScaler("cpu").state_dict()
    return state


def test_a_whole_file_is_valid_and_every_field_in_it_is_declared(whole):
    check_checkpoint(whole, training=True)
    check_checkpoint({key: value for key, value in whole.items() if key != "training"})
    for state, schema in ((whole, CHECKPOINT | of_classes(12) | RESUMABLE), (whole["training"], RESUMABLE["training"])):
        assert state.keys() == {key.removesuffix("?") for key in schema}


@pytest.mark.parametrize("path, what, value", CASES, ids=lambda value: ".".join(map(str, value)) if isinstance(
    value, tuple) else value if isinstance(value, str) else "")
def test_every_field_that_is_not_as_declared_is_one_line(trained, whole, monkeypatch, path, what, value):
    """For prediction as for a resume; the file itself is good, so that only what it holds is at fault."""
    file, inner = trained / "checkpoint" / "unet_last.pth", whole
    for key in path:
        inner = inner[key]
    state = replaced(whole, path, value(inner) if callable(value) else value)
    monkeypatch.setattr(torch, "load", lambda *args, **options: state)
    with pytest.raises(UserError) as error:
        load_checkpoint(file, training=True)
    message, field = str(error.value), next(part for part in path[::-1] if isinstance(part, str))
    assert message.startswith(f"{file}: ") and "\n" not in message and len(message) < 400
    assert field in message or what == "against others" or path == ("training",) and "use --init_from" in message
    if path[0] != "training" and path[2:3] not in {(key,) for key in RESUMABLE["config"]["train"]}:
        with pytest.raises(UserError, match=re.escape(message)):
            load_model(file)


def deflated(state: dict, path: Path) -> None:
    torch.save(state, path)
    shutil.unpack_archive(path, "parts", "zip")
    shutil.move(shutil.make_archive("packed", "zip", "parts"), path)


def flipped(state: dict, path: Path) -> None:
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shared(state: dict, path: Path) -> None:
    values = torch.zeros(max(tensor.numel() for tensor in state["state_dict"].values()))
    torch.save(state | {"training": 0, "state_dict": {
        key: values[:tensor.numel()].view(tensor.shape) if tensor.is_floating_point() else tensor
        for key, tensor in state["state_dict"].items()}}, path)


FILES = {
    "no such checkpoint": lambda state, path: path.mkdir(), "train one": lambda state, path: None,
    "not a readable": lambda state, path: path.write_bytes(b""),
    "not train.py's": lambda state, path: path.write_bytes(b"<html>404 Not Found</html>"),
    "cut off": lambda state, path: path.write_bytes(pickle.dumps(Malicious())),
    "(Weights only load failed": lambda state, path: torch.save(state | {"scores": Malicious()}, path),
    "it is a list of 2, not": lambda state, path: torch.save([1, 2], path), "more than its size": deflated,
    "is damaged": flipped,
    "state_dict is larger than its file": shared,
    "format 3, this program reads up to 2": lambda state, path: torch.save(state | {"format": 3}, path),
    "no such checkpoint file": lambda state, path: os.mkfifo(path)}


@pytest.mark.parametrize("said", FILES)
def test_broken_file_is_one_line(trained, tmp_path, monkeypatch, said):
    path = tmp_path / "broken.pth"
    monkeypatch.chdir(tmp_path)
    FILES[said](load(trained), path)
    with pytest.raises(UserError, match=rf"\A{path}: .*{re.escape(said)}.*\Z"):
        load_model(path)
    assert not (tmp_path / "executed").exists(), "opening the file ran its code"


STD, FLAGS = ("config", "normalize", "std"), ("config", "train")


@pytest.mark.parametrize("command, path, value", [
    *((command, STD, [0.2, 0.0, 0.2]) for command in ("train.py --resume", "train.py --init_from",
      "evaluate.py --checkpoint", "predict.py --checkpoint", "export.py --checkpoint")),
    *(("train.py --resume", (*FLAGS, flag), value) for flag, value in (
      ("lr", -1), ("crop_size", ["--help"]), ("scale", [1.0]), ("optimizer", "x y"), ("batch_size", "many"),
      ("epochs", math.nan), ("seed", {}), ("seed", ["--compile"]), ("ema", 1)))])
def test_every_command_refuses_a_forged_file_in_one_line(trained, scenes, tmp_path, call, command, path, value):
    (script, flag), forged = command.split(), tmp_path / "forged.pth"
    torch.save(replaced(load(trained), path, value), forged)
    data = {"predict.py": ("--image_dir", scenes / "val"), "export.py": ("--out", "new.pth")}
    status, _, err = call(script, *data.get(script, ("--data_root", scenes)), flag, forged)
    assert status == 2 and f"{forged}: not a valid checkpoint: config." in err and path[-1] in err
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == [forged]


def test_resume_with_another_recipe_names_every_flag(trained, scenes, call):
    typed = ("--width 8 --optimizer adamw --lr 0.01 --momentum 0.8 --weight_decay 0.1 --scheduler onecycle --seed 5 "
             "--step_size 7 --batch_size 3 --clip_grad 1 --crop_size 96 --max_side 90 --scale 1 1 --jitter 0 --gamma 1 "
             "--class_weights log --loss ce --label_smoothing 0.1 --ema 0.5 --epochs 9 --model unet_resnet18")
    resume = "--resume", trained / "checkpoint" / "unet_last.pth"
    status, _, err = call("train.py", "--data_root", scenes, *SMALL, *typed.split(), *resume)
    assert status == 2 and err.count("\n") == 1
    assert [flag for flag in typed.split() if flag.startswith("--") and f"{flag} " not in err] == ["--epochs"]


@pytest.mark.parametrize("model", ["unet", "unet_resnet18"])
def test_fine_tuning_takes_the_network_and_the_classes_rows_by_name(model):
    before, now = build_model(model, 12, width=4), build_model(model, 4, width=4)
    stored, fresh = before.state_dict(), copy.deepcopy(now.state_dict())
    checkpoint = {"state_dict": stored, "config": {"classes": CAMVID.to_dict()}}
    said = load_weights(now, checkpoint, ClassSet(("Lawn", "ROAD", "Void", "Car"), ((0, 0, 0),) * 4, 2))
    assert said.endswith("the classifier is new, with 4 classes instead of 12, ROAD, Car kept by name")
    kept = [CAMVID.names.index(name) for name in ("Road", "Car")]
    for name, tensor in now.state_dict().items():
        if name.startswith("classifier."):
            assert torch.equal(tensor[[1, 3]], stored[name][kept]) and torch.equal(tensor[[0, 2]], fresh[name][[0, 2]])
        else:
            assert torch.equal(tensor, stored[name]), name
    assert load_weights(before, checkpoint, CAMVID) == "its weights are loaded"


def test_fine_tuning_the_shipped_weights_is_one_command(scenes, tmp_path, call):
    """Width, model and a lower rate are those of the file; a class table of its own replaces the classifier."""
    data = shutil.copytree(scenes, tmp_path / "data")
    write_csv(data, COLORS | {"Horse": (1, 2, 3)})
    flags = "--data_root", data, "--crop_size", 64, "--epochs", 1, "--device", "cpu", "--init_from", SHIPPED
    status, out, _ = call("train.py", *flags)
    assert status == 0 and "with 13 classes instead of 12, Unlabelled, Sky, " in out and "learning rate 0.02\n" in out
    config = load(tmp_path)["config"]
    assert config["model"]["options"]["width"] == 16 and config["train"]["lr"] == pytest.approx(0.02)
    assert "holds a unet of width 16; leave --model and" in call("train.py", *flags, "--model", "unet_resnet18")[2]


def test_default_checkpoint_is_the_newest_best_else_the_shipped_one(tmp_path):
    assert default_checkpoint(tmp_path) == SHIPPED and SHIPPED.is_file()
    (tmp_path / "e_best.pth").symlink_to("gone")
    for age, name in [(300, "a_best.pth"), (100, "b_best.pth"), (200, "c_best.pth"), (0, "d_last.pth")]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert default_checkpoint(tmp_path) == tmp_path / "b_best.pth"


# Imports everything once and forks a process for each run: starting Python anew would take most of the time.
DRIVER = """
import matplotlib.figure, os, random, signal, sys, time, train
from pathlib import Path
from support.command import run_command

def start(checkpoint, *flags, at=None, nth=0):
    "Fork a training process that kills itself with the nth file `torn`, or `before` or `after` its renaming."
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = ["train.py", *{flags!r}, "--checkpoint", checkpoint, *flags]
    write, replace, left = Path.write_bytes, os.replace, iter(range(nth, 0, -1))
    def reach(what, path):
        if what == at and next(left, 0) == 1:
            print(what, file=open("kills", "a"), flush=True)
            os.truncate(path, os.path.getsize(path) // (2 if what == "torn" else 1))
            os.kill(os.getpid(), signal.SIGKILL)
    Path.write_bytes = lambda path, data: (write(path, data), reach("torn", path))
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
        Path("killed").rename("finished%d" % len([*Path().glob("finished*")]))
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
