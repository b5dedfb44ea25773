"""The real commands, in processes of their own, from a folder that is not the repository's."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.classes import CAMVID
from datasets.synthetic import generate_dataset

REPO = Path(__file__).parents[1]
SMALL = ("--width", "4", "--crop_size", "64", "--batch_size", "4", "--epochs", "2", "--step_size", "1",
         "--device", "cpu", "--workers", "0")


def command(script: str, *args) -> list[str]:
    # Newer Pythons warn of every fork of a process with threads, as torch's loader workers are made.
    warnings = "-W", "error", "-W", "ignore:This process:DeprecationWarning"
    return [sys.executable, *warnings, str(REPO / script), *map(str, args)]


def run(script: str, *args, cwd: Path, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(script, *args), cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "street scenes ü"
    generate_dataset(root, {"train": 10, "val": 3, "test": 2}, (96, 72))
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A folder in which a small model was trained for two epochs, into its checkpoint/."""
    folder = tmp_path_factory.mktemp("run")
    done = run("train.py", "--data_root", data, *SMALL, cwd=folder)
    assert "val mIoU" in done.stdout and "Bicyclist" in done.stdout and "python predict.py" in done.stdout
    return folder


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def rows(folder: Path) -> list[dict]:
    with open(folder / "checkpoint" / "unet_log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_training_leaves_its_files(trained):
    names = {path.name for path in (trained / "checkpoint").iterdir()}
    assert names == {f"unet_{name}" for name in
                     ("best.pth", "last.pth", "log.csv", "args.json", "curves.png", "panel.png")}
    log = rows(trained)
    assert [row["epoch"] for row in log] == ["1", "2"]
    state = torch.load(trained / "checkpoint" / "unet_last.pth", weights_only=True)
    assert state["epoch"] == 2
    assert state["best_miou"] == pytest.approx(max(float(row["val_miou"]) for row in log), abs=1e-6)


def test_val_every_leaves_epochs_out_but_not_the_last(data, tmp_path):
    run("train.py", "--data_root", data, *SMALL, "--epochs", "3", "--val_every", "2", cwd=tmp_path)
    scores = [row["val_miou"] for row in rows(tmp_path)]
    assert scores[0] == "" and all(row["train_loss"] for row in rows(tmp_path))
    best = torch.load(tmp_path / "checkpoint" / "unet_best.pth", weights_only=True)
    assert best["epoch"] in (2, 3) and best["best_miou"] == pytest.approx(float(scores[best["epoch"] - 1]), abs=1e-6)


def test_evaluate_repeats_the_score_of_training(trained, data):
    run("evaluate.py", "--data_root", data, "--split", "val", cwd=trained)
    metrics = json.loads((trained / "evaluation" / "metrics.json").read_text())
    assert metrics["miou"] == pytest.approx(max(float(row["val_miou"]) for row in rows(trained)), abs=2e-4)
    assert metrics["images"] == 3
    assert [entry["name"] for entry in metrics["per_class"]] == list(CAMVID.names[1:])
    assert metrics.keys() >= {"pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1"}
    known = [entry["iou"] for entry in metrics["per_class"] if entry["iou"] is not None]
    assert metrics["miou"] == pytest.approx(np.mean(known))
    assert picture(trained / "evaluation" / "confusion_matrix.png").size > (300, 300)


def test_resumed_run_equals_an_uninterrupted_one(trained, data, tmp_path):
    first = [*SMALL, "--deterministic"]
    first[first.index("--epochs") + 1] = "1"
    run("train.py", "--data_root", data, *first, cwd=tmp_path)
    resumed = [*SMALL, "--deterministic", "--resume", "auto"]
    resumed[resumed.index("--workers") + 1] = "2"
    run("train.py", "--data_root", data, *resumed, cwd=tmp_path)
    ours, theirs = (torch.load(folder / "checkpoint" / "unet_last.pth", weights_only=True)
                    for folder in (tmp_path, trained))
    for key in ("model_state_dict", "ema_state_dict"):
        for name, tensor in theirs[key].items():
            assert torch.equal(ours[key][name], tensor), name
    timeless = [{k: v for k, v in row.items() if "second" not in k} for row in rows(tmp_path)]
    assert timeless == [{k: v for k, v in row.items() if "second" not in k} for row in rows(trained)]


def test_cached_frames_train_the_same_network(trained, data, tmp_path):
    run("train.py", "--data_root", data, *SMALL, "--cache", cwd=tmp_path)
    assert len(list((tmp_path / "checkpoint" / "cache").iterdir())) == 4
    ours, theirs = (torch.load(folder / "checkpoint" / "unet_last.pth", weights_only=True)["model_state_dict"]
                    for folder in (tmp_path, trained))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_new_run_sets_the_earlier_one_aside(trained, data, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "unet_last.pth").write_bytes(b"precious")
    done = run("train.py", "--data_root", data, *SMALL, "--epochs", "1", cwd=tmp_path)
    assert "moved the earlier run" in done.stdout
    assert [path.read_bytes() for path in folder.glob("unet_until_*/unet_last.pth")] == [b"precious"]


def test_resuming_into_an_empty_folder_starts_its_own_best(trained, data, tmp_path):
    state = torch.load(trained / "checkpoint" / "unet_last.pth", weights_only=True)
    torch.save({**state, "best_miou": 0.99}, tmp_path / "elsewhere.pth")  # out of reach for what follows
    run("train.py", "--data_root", data, *SMALL, "--epochs", 3, "--resume", tmp_path / "elsewhere.pth", cwd=tmp_path)
    assert torch.load(tmp_path / "checkpoint" / "unet_last.pth", weights_only=True)["best_miou"] < 0.5


def test_resuming_elsewhere_sets_aside_what_lies_there(trained, data, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "unet_best.pth").write_bytes(b"precious")
    last = trained / "checkpoint" / "unet_last.pth"
    done = run("train.py", "--data_root", data, *SMALL, "--epochs", 3, "--resume", last, cwd=tmp_path)
    assert "resumed after epoch 2" in done.stdout
    assert [path.read_bytes() for path in folder.glob("unet_until_*/unet_best.pth")] == [b"precious"]
    assert torch.load(folder / "unet_best.pth", weights_only=True)["epoch"] == 3


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX systems")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_after_the_step_with_a_resume_command(data, tmp_path, number):
    process = subprocess.Popen(
        command("train.py", "--data_root", data, *SMALL, "--epochs", "10000", "--workers", "1"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    last = tmp_path / "checkpoint" / "unet_last.pth"
    deadline = time.monotonic() + 120
    while not last.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches the workers too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out + err
    assert "--resume auto" in err and "Traceback" not in err
    assert torch.load(last, weights_only=True)["epoch"] >= 1
    assert not list(last.parent.glob(".*"))


def test_predict_writes_masks_and_overlays_of_every_kind_of_photograph(trained, data, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    scene = picture(next((data / "val").iterdir()))
    sizes = {"a_jpg": (96, 72), "a_png": (17, 33), "one": (1, 1), "grey": (50, 20), "turned": (72, 96),
             "large": (251, 130)}
    scene.save(photos / "a.jpg")
    scene.resize((17, 33)).save(photos / "a.png")
    scene.resize((1, 1)).save(photos / "one.png")
    scene.resize((251, 130)).save(photos / "large.png")
    scene.resize((50, 20)).convert("L").save(photos / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    scene.save(photos / "turned.jpg", exif=exif)
    (photos / "notes.txt").write_text("not a photograph")
    done = run("predict.py", "--image_dir", photos, "--save_dir", out, "--tile", 64, "--tta", "flip+scale", cwd=trained)
    assert "pixels of each class" in done.stdout
    assert {path.name for path in out.iterdir()} == {f"{n}_{kind}.png" for n in sizes for kind in ("mask", "overlay")}
    for name, size in sizes.items():
        mask, overlay = picture(out / f"{name}_mask.png"), picture(out / f"{name}_overlay.png")
        assert mask.size == overlay.size == size and mask.mode == "P" and overlay.mode == "RGB"
        ids = np.asarray(mask)
        assert ids.min() > 0 and ids.max() < 12, "the ignored class is never predicted"
        assert (np.asarray(mask.convert("RGB")) == CAMVID.to_rgb(ids)).all()


def test_shipped_weights_predict_where_nothing_was_trained(data, tmp_path):
    photo = sorted((data / "test").iterdir())[0]
    done = run("predict.py", "--image_dir", photo, cwd=tmp_path)
    assert "camvid_unet.pth" in done.stdout
    assert len(np.unique(picture(tmp_path / "predictions" / f"{photo.stem}_mask.png"))) > 3


def test_shipped_weights_score_what_their_card_says(camvid, tmp_path):
    """The card's table has a row of IoUs for the classes, in their order, and mIoU in bold."""
    assert (REPO / "checkpoint" / "camvid_unet.pth").stat().st_size < 25e6
    card = (REPO / "checkpoint" / "README.md").read_text()
    stated = [float(text) for text in re.search(r"^\| IoU \|(.+)\|$", card, re.M)[1].split("|")]
    run("evaluate.py", "--data_root", camvid, cwd=tmp_path)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert [entry["iou"] for entry in metrics["per_class"]] == pytest.approx(stated, abs=0.002)
    assert metrics["miou"] == pytest.approx(float(re.search(r"\*\*(0\.\d+)\*\*", card)[1]), abs=0.001)


@pytest.mark.parametrize("flags, kinds", [
    ((), ["mask", "overlay"]), (("--overlay", "False"), ["mask"]), (("--no-overlay",), ["mask"]),
    (("--overlay", "True"), ["mask", "overlay"]), (("--overlay",), ["mask", "overlay"]),
])
def test_overlay_flag_means_what_it_says(trained, data, tmp_path, flags, kinds):
    photo = sorted((data / "test").iterdir())[0]
    run("predict.py", "--image_dir", photo, "--save_dir", tmp_path, *flags, cwd=trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{photo.stem}_{kind}.png" for kind in kinds]


def test_predict_skips_a_broken_file_and_says_so(trained, data, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("first", "last"):
        picture(next((data / "val").iterdir())).save(photos / f"{name}.png")
    (photos / "broken.png").write_bytes((photos / "first.png").read_bytes()[:500])
    done = run("predict.py", "--image_dir", photos / "*.png", "--save_dir", tmp_path / "out", cwd=trained, status=1)
    assert "broken.png" in done.stderr and "1 of 3" in done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_predict_starts_without_what_only_training_needs():
    check = "import predict, sys; sys.exit(bool({'albumentations', 'cv2', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPO).returncode == 0


@pytest.mark.parametrize("script, flags, message", [
    ("train.py", [], "--data_root"),
    ("train.py", ["--data_root", "nowhere"], "nowhere"),
    ("train.py", ["--data_root", "{data}", "--num_classes", "5"], "--num_classes 5"),
    ("train.py", ["--data_root", "{data}", "--resume", "nowhere.pth"], "nowhere.pth"),
    ("train.py", ["--data_root", "{data}", "--init_from", "{text}"], "{text}"),
    ("train.py", ["--data_root", "{data}", "--lr", "fast"], "--lr"),
    ("train.py", ["--data_root", "{data}", "--crop_size", "8"], "--crop_size"),
    ("train.py", ["--data_root", "{data}", "--device", "tpu"], "--device tpu"),
    ("train.py", ["--data_root", "{data}", "--device", "cpu:one"], "--device cpu:one"),
    ("train.py", ["--data_root", "{data}", "--resume", "auto", "--lr", "0.7"], "--lr"),
    ("train.py", ["--data_root", "{data}", "--seed", "-1"], "--seed"),
    ("train.py", ["--data_root", "{data}", "--ignore_class", "Pole"], "Unlabelled is ignored already"),
    ("evaluate.py", ["--data_root", "{data}", "--split", "holdout"], "holdout"),
    ("evaluate.py", ["--data_root", "{data}", "--data_name", "camvid32"], "12 classes"),
    ("predict.py", ["--image_dir", "nowhere"], "nowhere"),
    ("predict.py", ["--image_dir", "{data}"], "no photographs"),
    ("predict.py", ["--image_dir", "{data}/val", "--checkpoint", "{text}"], "{text}"),
    ("predict.py", ["--image_dir", "{data}/val", "--save_dir", "{data}/val"], "--save_dir"),
    ("predict.py", ["--image_dir", "{data}/val", "--tile", "3"], "--tile"),
])
def test_mistakes_end_in_one_line_and_change_nothing(trained, data, tmp_path, script, flags, message):
    text = tmp_path / "text.pth"
    text.write_text("no checkpoint")
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    flags = [flag.format(data=data, text=text) for flag in flags]
    done = run(script, *(SMALL if script == "train.py" else ()), *flags, cwd=trained, status=2)
    assert message.format(text=text) in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_one_frame_to_train_and_one_to_score(data, tmp_path):
    root = tmp_path / "little"
    for folder in ("train", "train_labels", "val", "val_labels"):
        (root / folder).mkdir(parents=True)
        path = min((data / folder).iterdir())
        (root / folder / path.name).symlink_to(path)
    run("train.py", "--data_root", root, *SMALL, "--batch_size", "1", cwd=tmp_path)
    assert all(0 <= float(row["val_miou"]) <= 1 for row in rows(tmp_path))


def test_demo_trains_and_predicts(tmp_path):
    run("train.py", "--demo", "--epochs", "1", "--workers", "1", cwd=tmp_path)
    demo = tmp_path / "checkpoint" / "demo"
    assert {"unet_best.pth", "unet_log.csv", "unet_curves.png", "unet_panel.png"} <= {p.name for p in demo.iterdir()}
    run("predict.py", "--demo", cwd=tmp_path)
    assert len(list((demo / "predictions").glob("*_overlay.png"))) == len(list((demo / "scenes" / "test").iterdir()))


def test_training_on_real_frames(camvid, tmp_path):
    root = tmp_path / "camvid"
    for folder, count in (("train", 8), ("train_labels", 8), ("val", 2), ("val_labels", 2)):
        (root / folder).mkdir(parents=True)
        for path in sorted((camvid / folder).iterdir())[:count]:
            (root / folder / path.name).symlink_to(path)
    run("train.py", "--data_root", root, *SMALL, "--epochs", "1", cwd=tmp_path)
    run("evaluate.py", "--data_root", root, cwd=tmp_path)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert sum(entry["pixels"] for entry in metrics["per_class"]) == sum(
        np.asarray(picture(path).convert("RGB")).any(-1).sum() for path in (root / "val_labels").iterdir())


def test_spawned_workers_and_data_that_is_not_written_to(trained, data, tmp_path):
    """Windows and macOS start loader processes anew; data may lie on a disk that cannot be written."""
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    flags = ["train.py", "--data_root", str(data), *SMALL, "--workers", "2", "--cache"]
    code = (f"import sys, torch\ntorch.multiprocessing.set_start_method('spawn')\nsys.path.insert(0, {str(REPO)!r})\n"
            f"sys.argv = {flags!r}\nimport runtime, train\n"
            "sys.exit(runtime.run_command(train.main, train.get_args_parser()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    ours, theirs = (torch.load(folder / "checkpoint" / "unet_last.pth", weights_only=True)["model_state_dict"]
                    for folder in (tmp_path, trained))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
