"""Checkpoints come back whole, or not at all and in one line."""
import copy
import csv
import os
import pickle

import pytest
import torch

from checkpoints import (
    Run,
    default_checkpoint,
    load_checkpoint,
    load_model,
    load_training_state,
    release,
    save_checkpoint,
)
from datasets.classes import CAMVID, ClassSet
from engine import build_ema, build_optimizer, build_scheduler, train_one_epoch
from loss import SegmentationLoss
from model import build_model
from runtime import UserError
from train import get_args_parser

FLAGS = "--width 4 --lr 0.05 --step_size 1 --epochs 4 --batch_size 2 --warmup_steps 2".split()
NORMALIZE = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def make_run(folder, *flags, seed=0, init_scale=4.0) -> Run:
    args = get_args_parser().parse_args([*FLAGS, "--checkpoint", str(folder), "--data_root", str(folder), *flags])
    torch.manual_seed(seed)
    model = build_model(args.model, len(CAMVID), width=args.width)
    optimizer = build_optimizer(args, model)
    return Run(args, CAMVID, model, optimizer, build_scheduler(args, optimizer, steps_per_epoch=3),
               torch.amp.GradScaler("cpu", init_scale=init_scale), build_ema(model, args.ema) if args.ema else None,
               3, NORMALIZE, 480)


def train_epoch(run: Run) -> None:
    """Three updates on a batch that depends on the epoch and on torch's random state."""
    batch = torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), 1 + run.epoch)
    row = train_one_epoch(run.model, [batch] * 3, SegmentationLoss(0), run.optimizer, run.scheduler, run.scaler,
                          device=torch.device("cpu"), ema=run.ema)
    run.history.append({"epoch": run.epoch + 1, "train_loss": row["train_loss"], "val_miou": 0.25 * (run.epoch + 1)})
    run.best_miou = run.history[-1]["val_miou"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two epochs, saved as best after the first and as last after the second."""
    run = make_run(tmp_path_factory.mktemp("run"))
    for best in (True, False):
        train_epoch(run)
        run.save(best)
    return run


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_resumed_run_goes_on_as_if_never_stopped(tmp_path):
    resumed = make_run(tmp_path, "--workers", "0", "--epochs", "6", seed=9, init_scale=2.0 ** 16)
    first = make_run(tmp_path)
    train_epoch(first)
    first.save(best=True)
    train_epoch(first)
    resumed.restore(tmp_path / "unet_last.pth")
    assert resumed.epoch == 1 and resumed.best_miou == 0.25 and resumed.scaler.get_scale() == 4
    train_epoch(resumed)
    for key, value in first.state_dict().items():
        assert key == "config" or same(value, resumed.state_dict()[key]), f"{key} differs after a resume"
    assert same(dict(first.ema.named_buffers()), dict(resumed.ema.named_buffers()))


def test_file_describes_itself(saved):
    state = torch.load(saved.path("last.pth"), weights_only=True)
    parts = ("model", "ema", "optimizer", "scheduler", "scaler")
    assert state.keys() == {"format", "epoch", "steps_per_epoch", "best_miou", "rng_state", "history", "config",
                            *(f"{part}_state_dict" for part in parts)}
    config = state["config"]
    assert (state["epoch"], state["best_miou"], state["history"]) == (2, 0.5, saved.history)
    assert config["model"] == {"name": "unet", "options": {"width": 4}} and config["normalize"] == NORMALIZE
    assert config["classes"]["names"] == list(CAMVID.names) and config["classes"]["ignore_index"] == 0
    assert config["train"].keys() == vars(saved.args).keys() and config["train"]["lr"] == 0.05
    assert load_checkpoint(saved.path("best.pth"))["epoch"] == 1
    with open(saved.path("log.csv"), newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert sorted(p.name for p in saved.args.checkpoint.iterdir()) == ["unet_best.pth", "unet_last.pth", "unet_log.csv"]


@pytest.mark.parametrize("ema", ["0.9", "0"])
def test_load_model_takes_averaged_weights_where_there_are_some(tmp_path, ema):
    run = make_run(tmp_path, "--ema", ema)
    train_epoch(run)
    run.save(best=True)
    model, classes, config = load_model(run.path("best.pth"))
    assert same(model.state_dict(), (run.ema.module if run.ema else run.model).state_dict())
    assert not run.ema or not same(model.state_dict(), run.model.state_dict())
    assert not model.training and config["normalize"] == NORMALIZE
    assert (classes.names, classes.colors, classes.ignore_index) == (CAMVID.names, CAMVID.colors, 0)


def test_released_file_predicts_but_is_not_resumed(saved, tmp_path):
    path, source = tmp_path / "released.pth", saved.path("best.pth")
    release(source, path)
    state, (trained, *_) = load_checkpoint(path), load_model(source)
    assert state.keys() == {"format", "model_state_dict", "config"}
    assert str(saved.args.data_root) not in str(state["config"]) and state["config"]["train"]["lr"] == 0.05
    model, _, config = load_model(path)
    for key, value in trained.state_dict().items():
        assert model.state_dict()[key].dtype == value.dtype
        assert state["model_state_dict"][key].dtype in (torch.float16, torch.int64)
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-3)
    assert config["normalize"] == NORMALIZE and config["max_side"] == 480
    with pytest.raises(UserError, match="--init_from"):
        load_training_state(path)


def test_weights_beyond_half_precision_are_not_released(saved, tmp_path):
    state = torch.load(saved.path("best.pth"), weights_only=True)
    state["ema_state_dict"]["classifier.weight"][0] = 1e6
    save_checkpoint(tmp_path / "large.pth", state)
    with pytest.raises(UserError, match="classifier.weight"):
        release(tmp_path / "large.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


class Malicious:
    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


# How each broken file is made from a good one's bytes: bytes, or what to torch.save in its place.
BROKEN_BYTES = {
    "empty": lambda good, marker: b"",
    "truncated": lambda good, marker: good[:-2000],
    "text": lambda good, marker: b"<html>404 Not Found</html>",
    "pickle": lambda good, marker: pickle.dumps(Malicious(marker)),
}
BROKEN_STATE = {
    "malicious": lambda state, marker: {**state, "history": Malicious(marker)},
    "list": lambda state, marker: [1, 2],
    "whole_network": lambda state, marker: build_model("unet", 12, width=4),
    "bare_weights": lambda state, marker: state["model_state_dict"],
    "foreign": lambda state, marker: {"state_dict": state["model_state_dict"], "epoch": 3},
    "newer": lambda state, marker: {**state, "format": 99},
    "other_width": lambda state, marker: {**state, "model_state_dict": build_model("unet", 12, width=8).state_dict(),
                                          "ema_state_dict": None},
    "other_classes": lambda state, marker: {
        **state, "config": {**state["config"], "classes": ClassSet.numbered(5).to_dict()}},
}
PREDICTING_ONLY = {  # a resume builds the model from the flags, and a lost loss ends a run before it is saved
    "unknown_model": lambda state, marker: {
        **state, "config": {**state["config"], "model": {"name": "segnet", "options": {}}}},
    "nan": lambda state, marker: {
        **state, "ema_state_dict": {key: value * float("nan") for key, value in state["ema_state_dict"].items()}},
}


@pytest.mark.parametrize("name,use", [
    *((name, use) for use in ("load_model", "restore") for name in (*BROKEN_BYTES, *BROKEN_STATE, "missing", "folder")),
    *((name, "load_model") for name in PREDICTING_ONLY),
])
def test_broken_file_is_one_line_and_stays_as_it_is(saved, tmp_path, name, use):
    path, marker, good = tmp_path / f"{name}.pth", tmp_path / "executed", saved.path("last.pth")
    if name == "folder":
        path.mkdir()
    elif name in BROKEN_BYTES:
        path.write_bytes(BROKEN_BYTES[name](good.read_bytes(), marker))
    elif name != "missing":
        torch.save({**BROKEN_STATE, **PREDICTING_ONLY}[name](torch.load(good, weights_only=True), marker), path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError) as error:
        load_model(path) if use == "load_model" else make_run(tmp_path).restore(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not marker.exists(), "opening the file ran its code"
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("flag,value", [("--lr", "0.01"), ("--width", "8"), ("--batch_size", "3"), ("--ema", "0"),
                                        ("--optimizer", "adamw"), ("--weight_decay", "0.1"), ("--scheduler", "poly")])
def test_resume_with_another_recipe_names_the_flag(saved, tmp_path, flag, value):
    run = make_run(tmp_path, flag, value)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(UserError, match=rf"{flag} .*now {value}") as error:
        run.restore(saved.path("last.pth"))
    assert "\n" not in str(error.value)
    assert same(run.model.state_dict(), before) and run.epoch == 0


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("write failed\nat 0"),
                                     KeyboardInterrupt()])
def test_failed_write_leaves_the_earlier_file(monkeypatch, tmp_path, failure):
    def tear(state, target):
        target.write_bytes(b"half a file")
        raise failure
    path = tmp_path / "unet_last.pth"
    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(torch, "save", tear)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError) as error:
        save_checkpoint(path, {"epoch": 2})
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == [path]
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_default_checkpoint_is_the_newest_best_else_the_shipped_one(tmp_path):
    shipped = tmp_path / "shipped.pth"
    with pytest.raises(UserError, match="train.py"):
        default_checkpoint(tmp_path, shipped)
    shipped.touch()
    assert default_checkpoint(tmp_path, shipped) == shipped
    for age, name in [(300, "a_best.pth"), (100, "b_best.pth"), (200, "c_best.pth"), (0, "d_last.pth")]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert default_checkpoint(tmp_path, shipped) == tmp_path / "b_best.pth"
