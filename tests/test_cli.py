"""The commands together: what training leaves, what evaluation and prediction make of it, and how a run goes on."""
import csv
import functools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PALETTE, REPO, SMALL, compare_per_class, opened
from torch.utils.data import DataLoader

from datasets import synthetic
from datasets.classes import CAMVID
from metric import score_table


def rows(folder: Path) -> list[dict]:
    with open(folder / "checkpoint" / "unet_log.csv", newline="") as file:
        return list(csv.DictReader(file))


def load(folder: Path, kind: str = "last") -> dict:
    return torch.load(folder / "checkpoint" / f"unet_{kind}.pth", weights_only=True)


def evaluate(call, cwd: Path, *flags) -> dict:
    """The metrics.json that evaluate.py writes."""
    assert call("evaluate.py", *flags, cwd=cwd)[0] == 0
    return json.loads((cwd / "evaluation" / "metrics.json").read_text())


def assert_same_weights(ours: Path, theirs: Path) -> None:
    for key in ("model_state_dict", "ema_state_dict"):
        for name, tensor in load(theirs)["training"][key].items():
            assert torch.equal(load(ours)["training"][key][name], tensor), name


def test_training_leaves_its_files(trained):
    assert {path.name for path in (trained / "checkpoint").iterdir()} == {
        f"unet_{name}" for name in ("best.pth", "last.pth", "log.csv", "args.json", "curves.png", "panel.png")}
    assert opened(trained / "checkpoint" / "unet_panel.png").size == (3 * 96, 2 * 72)
    log, best, state = rows(trained), load(trained, "best"), load(trained)["training"]
    assert [row["epoch"] for row in log] == ["1", "2"] and len(state["history"]) == 2
    score = max(float(row["val_miou"]) for row in log)
    assert best["scores"]["miou"] == pytest.approx(score, abs=1e-6) == pytest.approx(state["best_miou"], abs=1e-6)
    printed = (trained / "printed").read_text()
    assert score_table(best["scores"], CAMVID.names, 0) in printed and printed.count("*best") >= 1
    assert f"mIoU {score:.3f}" in printed and "train: 4 images\nval: 2 images\n" in printed


def test_the_printed_command_evaluates_to_the_score_of_training(trained, call):
    printed, scores = (trained / "printed").read_text(), load(trained, "best")["scores"]
    assert "\n  python predict.py --image_dir IMAGES --checkpoint checkpoint/unet_best.pth\n" in printed
    metrics = evaluate(call, trained, *shlex.split(re.search(r"^  python evaluate.py (.*)$", printed, re.M)[1]))
    for key in ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1"):
        assert metrics[key] == pytest.approx(scores[key], abs=1e-9)
    assert metrics["images"] == 2 and [entry["name"] for entry in metrics["per_class"]] == list(CAMVID.names[1:])
    known = [entry["iou"] for entry in metrics["per_class"] if entry["iou"] is not None]
    assert metrics["miou"] == pytest.approx(np.mean(known))
    matrix = np.array(metrics["confusion_matrix"])  # true class, predicted class
    assert matrix.sum(1).tolist() == [entry["pixels"] for entry in metrics["per_class"]]
    assert matrix.trace() / matrix.sum() == pytest.approx(metrics["pixel_accuracy"])


def test_a_resumed_run_with_a_cache_equals_an_uninterrupted_one(trained, scenes, tmp_path, call):
    train = "train.py", "--data_root", scenes, *SMALL, "--deterministic", "--cache"
    assert call(*train, "--epochs", 1, "--resume", "auto")[0] == 0  # nothing there: starts anew
    status, out, _ = call(*train, "--resume", "auto")
    assert status == 0 and "resumed after epoch 1, " in out
    assert len(list((tmp_path / "checkpoint" / "cache").iterdir())) == 4
    assert_same_weights(tmp_path, trained)
    assert rows(tmp_path) == rows(trained)


def test_spawned_workers_train_the_same_network_and_leave_the_data_alone(trained, scenes, tmp_path, call, monkeypatch):
    """Windows and macOS start loader processes anew; data may lie on a disk that cannot be written."""
    before = {path: path.stat().st_mtime_ns for path in scenes.rglob("*")}
    monkeypatch.setattr("train.DataLoader", functools.partial(DataLoader, multiprocessing_context="spawn"))
    assert call("train.py", "--data_root", scenes, *SMALL, "--workers", 1)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in scenes.rglob("*")} == before
    assert_same_weights(tmp_path, trained)


def test_resuming_in_another_folder_sets_aside_what_is_there_and_starts_its_own_best(trained, scenes, tmp_path, call):
    state = load(trained)
    state["training"]["best_miou"] = 0.99  # out of reach for what follows
    torch.save(state, tmp_path / "elsewhere.pth")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "unet_best.pth").write_bytes(b"precious")
    status, out, _ = call("train.py", "--data_root", scenes, *SMALL, "--epochs", 3, "--resume", "elsewhere.pth")
    assert status == 0 and "resumed after epoch 2" in out and "moved the earlier run" in out
    assert [path.read_bytes() for path in folder.glob("unet_until_*/unet_best.pth")] == [b"precious"]
    assert 0.5 > load(tmp_path)["training"]["best_miou"] == pytest.approx(load(tmp_path, "best")["scores"]["miou"])


def test_the_tutorials_commands(scenes, tmp_path, call):
    tutorial = ("--data_name camvid --model unet --num_classes 12 --epochs 1 --lr 0.01 --momentum 0.9 "
                "--weight-decay 5e-4 --batch_size 2 --step_size 1 --gamma 0.1 --checkpoint C")
    assert call("train.py", "--data_root", scenes, *tutorial.split(), "--width", 4, "--crop_size", 64)[0] == 0
    flags = json.loads((tmp_path / "C" / "unet_args.json").read_text())
    assert (flags["lr"], flags["momentum"], flags["weight_decay"], flags["gamma"]) == (0.01, 0.9, 5e-4, 0.1)
    predict = "predict.py", "--image_dir", scenes / "test", "--checkpoint", "C/unet_best.pth", "--save_dir", "S"
    assert call(*predict, "--overlay", "False")[0] == 0
    assert {path.name for path in (tmp_path / "S").iterdir()} == {
        f"{path.stem}_mask.png" for path in (scenes / "test").iterdir()}


def test_max_side_scores_and_predicts_at_the_masks_own_size(scenes, tmp_path, call):
    assert call("train.py", "--data_root", scenes, *SMALL, "--max_side", 64, "--epochs", 3, "--val_every", 2)[0] == 0
    (first, *scored), best = rows(tmp_path), load(tmp_path, "best")
    assert first["val_miou"] == "" and first["train_loss"] and best["config"]["max_side"] == 64
    assert best["scores"]["miou"] == pytest.approx(max(float(row["val_miou"]) for row in scored), abs=1e-6)
    pixels = sum(np.asarray(opened(path)).any(-1).sum() for path in (scenes / "val_labels").iterdir())
    for flags, same in (((), True), (("--max_side", 0), False)):
        metrics = evaluate(call, tmp_path, "--data_root", scenes, *flags)
        assert sum(entry["pixels"] for entry in metrics["per_class"]) == pixels
        assert (abs(metrics["miou"] - best["scores"]["miou"]) < 1e-6) == same
    status, out, _ = call("predict.py", "--image_dir", scenes / "val")
    assert status == 0 and "2 of them at 64 pixels" in out
    assert {opened(path).size for path in (tmp_path / "predictions").iterdir()} == {(96, 72)}


def test_shipped_weights_predict_where_nothing_was_trained(scenes, tmp_path, call):
    status, out, _ = call("predict.py", "--image_dir", scenes / "test")
    assert status == 0 and "camvid_unet.pth on 2 images" in out
    assert all(len(np.unique(opened(path))) > 3 for path in (tmp_path / "predictions").glob("*_mask.png"))


@pytest.mark.slow
def test_shipped_weights_score_what_their_card_says(camvid, tmp_path, call):
    """The card's table has a row of IoUs for the classes, in their order, and mIoU in bold."""
    assert (REPO / "checkpoint" / "camvid_unet.pth").stat().st_size < 25e6
    card = (REPO / "checkpoint" / "README.md").read_text()
    stated = [float(text) for text in re.search(r"^\| IoU \|(.+)\|$", card, re.M)[1].split("|")]
    metrics = evaluate(call, tmp_path, "--data_root", camvid)
    assert [entry["iou"] for entry in metrics["per_class"]] == pytest.approx(stated, abs=0.002)
    assert f"{metrics['miou']:.3f}" == re.search(r"\*\*(0\.\d+)\*\*", card)[1] == "0.690"


@pytest.mark.parametrize("flags, kinds", [
    ("", ["mask", "overlay"]), ("--overlay False", ["mask"]), ("--no-overlay", ["mask"]),
    ("--overlay True", ["mask", "overlay"]), ("--overlay", ["mask", "overlay"])])
def test_overlay_flag_means_what_it_says(trained, scenes, tmp_path, call, flags, kinds):
    image = min((scenes / "test").iterdir())
    status, out, _ = call("predict.py", "--image_dir", image, "--save_dir", tmp_path, *flags.split(), cwd=trained)
    assert status == 0 and "unet_best.pth on 1 image\n" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{image.stem}_{kind}.png" for kind in kinds]


def test_predict_starts_without_what_only_training_needs():
    check = "import predict, sys; sys.exit(bool({'albumentations', 'cv2', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPO).returncode == 0


@pytest.mark.parametrize("source, train, val", [("scenes", 1, 1), ("camvid", 6, 2)])
def test_training_on_few_images(request, source, train, val, tmp_path, call):
    data, root = request.getfixturevalue(source), tmp_path / "few"
    for folder, count in (("train", train), ("train_labels", train), ("val", val), ("val_labels", val)):
        (root / folder).mkdir(parents=True)
        for path in sorted((data / folder).iterdir())[:count]:
            (root / folder / path.name).symlink_to(path)
    assert call("train.py", "--data_root", root, *SMALL, "--batch_size", 1, "--epochs", 1)[0] == 0
    metrics = evaluate(call, tmp_path, "--data_root", root)
    assert metrics["miou"] == pytest.approx(float(rows(tmp_path)[0]["val_miou"]), abs=1e-6)
    ids = [compare_per_class(np.array(opened(path)), PALETTE) for path in (root / "val_labels").iterdir()]
    assert all(entry["pixels"] == (np.stack(ids) == entry["id"]).sum() for entry in metrics["per_class"])


def test_demo_trains_and_predicts(tmp_path, monkeypatch):
    """As typed, with fewer scenes."""
    generate = synthetic.generate_dataset
    monkeypatch.setattr(synthetic, "generate_dataset", lambda root, counts, size:
                        generate(root, dict.fromkeys(counts, 2), size))
    monkeypatch.chdir(tmp_path)
    for line in ("train.py --demo --epochs 1 --workers 0", "predict.py --demo"):
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(REPO / line.split()[0]), run_name="__main__")
    demo = tmp_path / "checkpoint" / "demo"
    assert {"unet_best.pth", "unet_log.csv", "unet_curves.png", "unet_panel.png"} <= set(os.listdir(demo))
    assert len(list((demo / "predictions").glob("*_overlay.png"))) == len(os.listdir(demo / "scenes" / "test")) == 2
