"""Checkpoints come back whole, or not at all and in one line."""
import copy
import csv
import os
import pickle
from pathlib import Path

import pytest
import torch

from datasets.classes import CAMVID, ClassSet
from loss import SegmentationLoss
from model import build_model
from support.command import UserError
from train import get_args_parser
from training.checkpoints import SHIPPED, default_checkpoint, load_model, load_predictor, release, save_checkpoint
from training.engine import train_one_epoch
from training.recipe import WeightAverage, build_optimizer, build_scheduler
from training.run import RunFiles, TrainingState

FLAGS = "--width 4 --lr 0.05 --epochs 4 --batch_size 2".split()
NORMALIZE = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
SCORES = {"miou": 0.5, "iou": [float("inf"), 0.5]}  # NaN would not equal itself


def new_run(*flags, seed=0, init_scale=4.0) -> tuple[TrainingState, dict]:
    """A run before its first epoch, and its config."""
    args = get_args_parser().parse_args([*FLAGS, *flags])
    torch.manual_seed(seed)
    model = build_model("unet", len(CAMVID), width=args.width)
    optimizer = build_optimizer(args.optimizer, model, args.lr, args.weight_decay)
    scheduler = build_scheduler(args.scheduler, optimizer, args.lr, 12, 3, 0.5)
    ema = WeightAverage(model, args.ema) if args.ema else None
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    config = {"model": {"name": "unet", "options": {"width": args.width}}, "classes": CAMVID.to_dict(),
              "normalize": NORMALIZE, "max_side": 480, "train": vars(args) | {"checkpoint": "a/folder/of/mine"}}
    return TrainingState(model, optimizer, scheduler, scaler, ema, 3), config


def train_epoch(state: TrainingState) -> None:
    """Three updates on a batch that depends on the epoch."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(state.epoch))
    batch = images, torch.full((2, 32, 32), 1 + state.epoch)
    row = train_one_epoch(state.model, [batch] * 3, SegmentationLoss(0), state.optimizer, state.scheduler, state.scaler,
                          device=torch.device("cpu"), after_update=state.after_update)
    state.record(row | {"val_miou": 0.25 * (state.epoch + 1)})


def read(path: Path):
    return torch.load(path, weights_only=True)


def as_format_1(path: Path, **flags) -> Path:
    """The file as version 1 wrote it: everything at the top level, and flags that are gone."""
    state, old = read(path), path.with_name("format_1.pth")
    train = state["config"]["train"] | {"image_size": None, "warmup_steps": 100, "grad_accum": 1} | flags
    torch.save({"format": 1, "config": state["config"] | {"train": train}, "rng_state": {}, **state["training"]}, old)
    return old


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The state and files of two epochs, saved as best after the first and as last after the second."""
    (state, config), files = new_run(), RunFiles(tmp_path_factory.mktemp("run"), "unet")
    for best in (True, False):
        train_epoch(state)
        files.save(state, config, SCORES, best)
    return state, files


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_resumed_run_goes_on_as_if_never_stopped(tmp_path):
    (first, config), files = new_run(), RunFiles(tmp_path, "unet")
    train_epoch(first)
    files.save(first, config, SCORES, best=True)
    train_epoch(first)
    resumed, config = new_run("--workers", "0", "--epochs", "6", seed=9, init_scale=2.0 ** 16)
    with pytest.raises(UserError, match="version 1; use --init_from"):
        resumed.restore(as_format_1(files.path("last.pth")), config)
    resumed.restore(files.path("last.pth"), config)
    assert resumed.epoch == 1 and resumed.best_miou == 0.25 and resumed.scaler.get_scale() == 4
    train_epoch(resumed)
    torch.testing.assert_close(resumed.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert resumed.ema.updates == first.ema.updates == 6


def test_files_describe_themselves(saved):
    state, files = saved
    best, last = (read(files.path(name)) for name in ("best.pth", "last.pth"))
    assert best.keys() == {"format", "state_dict", "scores", "config"} and last.keys() == {*best, "training"}
    weights = sum(tensor.nbytes for tensor in best["state_dict"].values())
    assert weights < files.path("best.pth").stat().st_size < 1.2 * weights
    assert same(last["training"], state.state_dict()) and len(last["training"]["history"]) == 2
    assert same(last["state_dict"], state.ema.module.state_dict()) and not same(last["state_dict"], best["state_dict"])
    assert best["scores"] == SCORES and best["config"] == new_run()[1]
    rows = csv.DictReader(files.path("log.csv").read_text().splitlines())
    assert [(row["epoch"], row["val_miou"]) for row in rows] == [("1", "0.25"), ("2", "0.5")]
    assert {path.name for path in files.folder.iterdir()} == {"unet_best.pth", "unet_last.pth", "unet_log.csv"}


def test_best_is_what_beats_all_before():
    state, _ = new_run()
    rows = [{}, *({"val_miou": score} for score in (float("nan"), 0.2, 0.2, 0.1, 0.3))]
    assert list(map(state.record, rows)) == [False, True, True, False, False, True]


@pytest.mark.parametrize("ema", ["0.9", "0"])
@pytest.mark.parametrize("old", [False, True])
def test_averaged_weights_predict_where_there_are_some(tmp_path, ema, old):
    (state, config), files = new_run("--ema", ema), RunFiles(tmp_path, "unet")
    train_epoch(state)
    files.save(state, config, SCORES, best=True)
    path = as_format_1(files.path("last.pth")) if old else files.path("best.pth")
    model, classes, config = load_model(path)
    assert same(model.state_dict(), (state.ema.module if state.ema else state.model).state_dict())
    assert not state.ema or not same(model.state_dict(), state.model.state_dict())
    assert not model.training and config["normalize"] == NORMALIZE
    assert (classes.names, classes.colors, classes.ignore_index) == (CAMVID.names, CAMVID.colors, 0)
    assert [load_predictor(path, side)[0].max_side for side in (None, 0, 99)] == [480, 0, 99]


def test_squashed_images_of_format_1_are_refused(saved, tmp_path):
    path = as_format_1(saved[1].path("last.pth"), image_size=[360, 479]).rename(tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"\A.*--max_side 479\Z"):
        load_model(path)


def test_released_file_predicts_but_is_not_resumed(saved, tmp_path):
    path, source = tmp_path / "released.pth", saved[1].path("best.pth")
    release(source, path)
    state, (trained, *_), (model, _, config) = read(path), load_model(source), load_model(path)
    assert state.keys() == {"format", "state_dict", "scores", "config"} and state["scores"] == SCORES
    assert "folder/of/mine" not in str(state["config"]) and state["config"]["train"]["lr"] == 0.05
    for key, value in trained.state_dict().items():
        assert model.state_dict()[key].dtype == value.dtype
        assert state["state_dict"][key].dtype in (torch.float16, torch.int64)
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-3)
    assert config["normalize"] == NORMALIZE and config["max_side"] == 480
    with pytest.raises(UserError, match="--init_from"):
        new_run()[0].restore(path, config)
    state["state_dict"]["classifier.weight"] = torch.full((12, 4, 1, 1), 1e6)
    save_checkpoint(tmp_path / "large.pth", state)
    with pytest.raises(UserError, match="classifier.weight.*half precision"):
        release(tmp_path / "large.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


class Malicious:
    """Creates a file where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def changed(state: dict, part: str, **values) -> dict:
    return {**state, part: state[part] | values}


BROKEN_BYTES = {"empty": lambda good: b"", "truncated": lambda good: good[:-2000],
                "text": lambda good: b"<html>404 Not Found</html>", "pickle": lambda good: pickle.dumps(Malicious())}
WIDE = build_model("unet", 12, width=8).state_dict()
# What is saved in place of a good file's state.
BROKEN = {
    "malicious": lambda state: {**state, "scores": Malicious()},
    "list": lambda state: [1, 2],
    "whole_network": lambda state: build_model("unet", 12, width=4),
    "bare_weights": lambda state: state["state_dict"],
    "foreign": lambda state: {"state_dict": state["state_dict"], "epoch": 3},
    "newer": lambda state: {**state, "format": 99},
    "no_format": lambda state: {key: value for key, value in state.items() if key != "format"},
    "other_classes": lambda state: changed(state, "config", classes=ClassSet.numbered(5).to_dict()),
    "other_width": lambda state: changed({**state, "state_dict": WIDE}, "training", model_state_dict=WIDE),
}
BROKEN_FOR = {"restore": BROKEN | {
    "no_optimizer": lambda state: changed(state, "training", optimizer_state_dict={}),
    "no_history": lambda state: changed(state, "training", history=None),
}, "load_model": BROKEN | {
    "unknown_model": lambda state: changed(state, "config", model={"name": "segnet", "options": {}}),
    "nan": lambda state: changed(state, "state_dict", **{"classifier.bias": torch.full((12,), torch.nan)}),
}}


@pytest.mark.parametrize("use,name", [(use, name) for use, broken in BROKEN_FOR.items()
                                      for name in (*broken, *BROKEN_BYTES, "missing", "folder")])
def test_broken_file_is_one_line_and_stays_as_it_is(saved, tmp_path, monkeypatch, use, name):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path / f"{name}.pth", saved[1].path("last.pth")
    if name in BROKEN_BYTES:
        path.write_bytes(BROKEN_BYTES[name](good.read_bytes()))
    elif name in BROKEN_FOR[use]:
        torch.save(BROKEN_FOR[use][name](read(good)), path)
    elif name == "folder":
        path.mkdir()
    before, (run, config) = path.read_bytes() if path.is_file() else None, new_run()
    with pytest.raises(UserError, match=rf"\A{path}.*\Z"):
        load_model(path) if use == "load_model" else run.restore(path, config)
    assert not Path("executed").exists(), "opening the file ran its code"
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("flag,value", [("--lr", "0.01"), ("--width", "8"), ("--batch_size", "3"), ("--ema", "0"),
                                        ("--optimizer", "adamw"), ("--weight_decay", "0.1"), ("--max_side", "96"),
                                        ("--scheduler", "onecycle"), ("--seed", "5"), ("updates", "an epoch, now 4")])
def test_resume_with_another_recipe_names_the_flag(saved, flag, value):
    run, config = new_run(flag, value) if flag != "updates" else new_run()
    run.steps_per_epoch += flag == "updates"
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(UserError, match=rf"\A.*{flag} .*{value}.*\Z"):
        run.restore(saved[1].path("last.pth"), config)
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
    with pytest.raises((KeyboardInterrupt, UserError), match=r"\A.*\Z"):
        save_checkpoint(path, {"epoch": 2})
    assert list(tmp_path.iterdir()) == [path]
    assert read(path)["epoch"] == 1


def test_default_checkpoint_is_the_newest_best_else_the_shipped_one(tmp_path):
    assert default_checkpoint(tmp_path) == SHIPPED and SHIPPED.is_file()
    for age, name in [(300, "a_best.pth"), (100, "b_best.pth"), (200, "c_best.pth"), (0, "d_last.pth")]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert default_checkpoint(tmp_path) == tmp_path / "b_best.pth"
