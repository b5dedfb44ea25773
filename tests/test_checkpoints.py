"""A checkpoint comes back as it was saved, or is refused in one sentence."""

import copy
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, load

from datasets.classes import CAMVID, ClassSet
from inference.checkpoints import (
    SHIPPED,
    find_checkpoint,
    load_checkpoint,
    load_model,
    load_predictor,
    load_weights,
    save_checkpoint,
)
from model import build_model
from support.command import UserError


def test_a_checkpoint_describes_its_network(trained, tmp_path):
    state = load(trained, "best")
    save_checkpoint(tmp_path / "copy.pth", state)
    assert load_checkpoint(tmp_path / "copy.pth")["config"] == state["config"]
    model, config = load_model(tmp_path / "copy.pth")
    torch.testing.assert_close(model.state_dict(), state["state_dict"], rtol=0, atol=0)
    assert not model.training
    assert (config["model"], config["width"], config["max_side"]) == ("unet", 4, 96)
    assert config["classes"].names == CAMVID.names
    assert config["normalize"] == state["config"]["normalize"]


@pytest.mark.parametrize("has_average", [True, False])
def test_a_file_of_format_1_predicts_with_the_average_if_there_is_one(
    trained, tmp_path, has_average
):
    """It has everything at the top level, and flags that are gone."""
    state = load(trained)
    config = state["config"] | {"max_side": 480}
    config["train"] |= {"image_size": None, "warmup_steps": 100}
    raw = state["training"]["model"]
    average = state["state_dict"] if has_average else None
    old = {"format": 1, "config": config, "model_state_dict": raw, "ema_state_dict": average}
    path = tmp_path / "1.pth"
    torch.save(old, path)
    model, _ = load_model(path)
    torch.testing.assert_close(model.state_dict(), average or raw, rtol=0, atol=0)
    assert [load_predictor(path, side)[0].max_side for side in (None, 0, 99)] == [480, 0, 99]


class Malicious:
    """Creates a file where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def write_half(state, path):
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(state, path):
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def compress(state, path):
    torch.save(state, path)
    shutil.unpack_archive(path, "parts", "zip")
    shutil.move(shutil.make_archive("packed", "zip", "parts"), path)


def write_with(change):
    """Writes the state after ``change(state)``."""

    def write(state, path):
        change(state)
        torch.save(state, path)

    return write


FORGED = {
    "nothing": lambda state, path: None,
    "a folder": lambda state, path: path.mkdir(),
    "a web page": lambda state, path: path.write_text("<html>404 Not Found</html>"),
    "half a file": write_half,
    "a flipped bit": flip_a_bit,
    "a compressed archive": compress,
    "a pickle that executes": lambda state, path: path.write_bytes(pickle.dumps(Malicious())),
    "a checkpoint that executes": write_with(lambda state: state.update(scores=Malicious())),
    "a list": lambda state, path: torch.save([state], path),
    "a newer format": write_with(lambda state: state.update(format=3)),
    "no config": write_with(lambda state: state.pop("config")),
    "no weights": write_with(lambda state: state.pop("state_dict")),
    "a missing weight": write_with(lambda state: state["state_dict"].popitem()),
    "another width": write_with(lambda state: state["config"]["model"]["options"].update(width=8)),
    "another network": write_with(lambda state: state["config"]["model"].update(name="vit")),
    "fewer classes": write_with(lambda state: state["config"]["classes"]["names"].pop()),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_or_damaged_file_is_one_sentence(
    trained, scenes, tmp_path, monkeypatch, call, kind
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "forged.pth"
    FORGED[kind](load(trained), path)
    with pytest.raises(UserError, match=rf"\A{path}: .*\Z"):
        load_model(path)
    status, _, err = call("train.py", "--data_root", scenes, "--device", "cpu", "--init_from", path)
    assert status == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "executed").exists(), "opening the file ran its code"


@pytest.mark.parametrize(
    "change",
    [
        lambda training: training.pop("updates"),
        lambda training: training["model"].popitem(),
        lambda training: training.update(processes=2),
    ],
    ids=["no updates", "a missing weight", "of two processes"],
)
def test_a_run_that_cannot_be_restored_is_one_sentence(trained, scenes, tmp_path, call, change):
    state = load(trained)
    change(state["training"])
    torch.save(state, tmp_path / "last.pth")
    resume = ("--resume", "last.pth")
    status, _, err = call("train.py", "--data_root", scenes, *SMALL, *resume)
    assert status == 2
    assert err.startswith("train.py: error: last.pth: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["unet", "unet_resnet18"])
def test_fine_tuning_keeps_the_classifiers_rows_of_equal_class_names(name):
    before = build_model(name, 12, width=4)
    model = build_model(name, 4, width=4)
    fresh = copy.deepcopy(model.state_dict())
    stored = before.state_dict()
    checkpoint = {"state_dict": stored, "config": {"classes": CAMVID.to_dict()}}
    classes = ClassSet(("Lawn", "ROAD", "Void", "Car"), ((0, 0, 0),) * 4, 2)
    load_weights(model, checkpoint, classes)
    kept = [CAMVID.names.index("Road"), CAMVID.names.index("Car")]
    for key, tensor in model.state_dict().items():
        if key.startswith("classifier."):
            assert torch.equal(tensor[[1, 3]], stored[key][kept])
            assert torch.equal(tensor[[0, 2]], fresh[key][[0, 2]])
        else:
            assert torch.equal(tensor, stored[key])


def test_the_default_checkpoint_is_the_newest_best_else_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(None) == SHIPPED
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError):
        find_checkpoint(Path("checkpoint"))
    assert SHIPPED.is_file()
    for time, name in enumerate(
        ("a_best.pth", "c_best.pth", "b_best.pth", "d_last.pth", ".unfinished-e_best.pth")
    ):
        path = tmp_path / "checkpoint" / name
        path.touch()
        os.utime(path, (time, time))
    assert find_checkpoint(None) == Path("checkpoint/b_best.pth")
    assert find_checkpoint(tmp_path / "checkpoint") == tmp_path / "checkpoint" / "b_best.pth"
