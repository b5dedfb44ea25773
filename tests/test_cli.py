"""The commands together: what training leaves, what evaluation and prediction make of it, and how a run goes on."""
import functools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, SMALL, load, opened, rows, save
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader

import train
from datasets import synthetic
from datasets.camvid import CamVidDataset
from datasets.check import check_data
from datasets.classes import CAMVID
from metric import score_table
from training.recipe import build_scheduler, resolve_recipe


def evaluate(call, cwd: Path, *flags) -> dict:
    """The metrics.json that evaluate.py writes."""
    assert call("evaluate.py", *flags, cwd=cwd)[0] == 0
    return json.loads((cwd / "evaluation" / "metrics.json").read_text())


def test_training_leaves_its_files(trained):
    assert {path.name for path in (trained / "checkpoint").glob("[!.]*")} == {
        f"unet_{name}" for name in ("best.pth", "last.pth", "log.csv", "args.json", "curves.png", "panel.png")}
    log, best, last = rows(trained), load(trained, "best"), load(trained)
    assert best.keys() == {"format", "state_dict", "scores", "config"} and last.keys() == {*best, "training"}
    size = sum(tensor.nbytes for tensor in best["state_dict"].values())
    assert size < (trained / "checkpoint" / "unet_best.pth").stat().st_size < 1.2 * size
    raw, average = (last["training"][key]["classifier.bias"] for key in ("model_state_dict", "ema_state_dict"))
    assert torch.equal(last["state_dict"]["classifier.bias"], average) and not torch.equal(raw, average)
    assert [row["epoch"] for row in log] == ["1", "2"] and len(last["training"]["history"]) == 2
    score, best_miou = max(float(row["val_miou"]) for row in log), last["training"]["best_miou"]
    assert best["scores"]["miou"] == pytest.approx(score, abs=1e-6) == pytest.approx(best_miou, abs=1e-6)
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
    assert [sum(row) for row in metrics["confusion_matrix"]] == [entry["pixels"] for entry in metrics["per_class"]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore::UserWarning:google")
def test_a_run_in_two_parts_in_every_other_way_equals_a_plain_one(trained, scenes, tmp_path, call, monkeypatch):
    """Stopped and resumed, with TensorBoard, scaled losses as in fp16, and then a loader process, started anew
    as on Windows and macOS; the data may lie on a disk that cannot be written.
    """
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    before = {path: path.stat().st_mtime_ns for path in scenes.rglob("*")}
    scaler, flags = torch.amp.GradScaler, (*SMALL, "--deterministic", "--tensorboard", "--resume", "auto")
    for epochs, started in ((1, None), (2, "spawn")):
        monkeypatch.setattr("train.DataLoader", functools.partial(DataLoader, multiprocessing_context=started))
        monkeypatch.setattr("torch.amp.GradScaler", lambda kind, enabled: scaler(kind, 4.0 * epochs))  # noqa: B023
        status, out, _ = call("train.py", "--data_root", scenes, *flags, "--epochs", epochs, "--workers", epochs - 1)
        assert status == 0 and ("resumed after epoch 1, " in out) == (epochs == 2)
    assert load(tmp_path)["training"]["scaler_state_dict"]["scale"] == 4
    assert {path: path.stat().st_mtime_ns for path in scenes.rglob("*")} == before
    for key in ("model_state_dict", "ema_state_dict"):
        ours, plain = (load(folder)["training"][key] for folder in (tmp_path, trained))
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert rows(tmp_path) == rows(trained)
    events = accumulator.EventAccumulator(str(tmp_path / "checkpoint" / "unet_tensorboard"))
    events.Reload()
    for key in ("train_loss", "val_loss", "val_miou", "lr"):
        logged = [float(row[key]) for row in rows(tmp_path)]
        assert [event.value for event in events.Scalars(key)] == pytest.approx(logged, abs=1e-5)
        assert [event.step for event in events.Scalars(key)] == [1, 2]
    picture, panel = events.Images("image, mask, prediction")[-1], opened(tmp_path / "checkpoint" / "unet_panel.png")
    assert (picture.width, picture.height) == panel.size and panel.width == 3 * 96
    assert 2 * 72 < panel.height <= 2 * 72 + 16  # two images are all there are
    assert (np.asarray(panel)[-144:-72, :96] == np.asarray(opened(min((scenes / "val").iterdir())))).all()


def test_compiled_training_has_one_graph(scenes, tmp_path, call, monkeypatch):
    """Four images in batches of three: a smaller last batch would be compiled once more."""
    graphs, compile_with = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile_with(model, backend=graphs))
    status, _, _ = call("train.py", "--data_root", scenes, *SMALL, "--batch_size", 3, "--compile")
    assert status == 0 and graphs.frame_count == 1


def test_without_tensorboard_one_line_says_what_to_install(scenes, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = call("train.py", "--data_root", scenes, *SMALL, "--tensorboard")
    assert status == 2 and "pip install tensorboard" in err


def test_a_resume_in_another_folder_takes_the_best_along_and_in_the_same_keeps_it(trained, scenes, tmp_path, call):
    """Where the best file is of another run, or away, the best is yet to come."""
    (folder := tmp_path / "checkpoint").mkdir()
    (moved := tmp_path / "moved").mkdir()
    earlier = b"an earlier run's"
    state, best, resume = load(trained), load(trained, "best"), ("--epochs", 3, "--resume")
    state["training"]["best_miou"] = best["scores"]["miou"] = 0.99  # out of reach for what follows

    def prepare(where: Path, there: bool) -> None:
        torch.save(state, where / "unet_last.pth")
        torch.save(best, where / "unet_best.pth") if there else (where / "unet_best.pth").unlink(missing_ok=True)

    for there in (False, True):
        prepare(moved, there)
        (folder / "unet_best.pth").write_bytes(earlier)
        status, out, _ = call("train.py", "--data_root", scenes, *resume, "moved/unet_last.pth", "--device", "cpu")
        assert status == 0 and "resumed after epoch 2" in out and "moved the earlier run" in out
        aside = max(folder.glob("unet_until_*"), key=lambda path: path.stat().st_mtime_ns)
        assert (aside / "unet_best.pth").read_bytes() == earlier
        assert (load(tmp_path)["training"]["best_miou"] == load(tmp_path, "best")["scores"]["miou"] == 0.99) == there
        shutil.rmtree(aside)
    for name in ("auto", "checkpoint/unet_last.pth", "checkpoint/unet_best.pth"):
        prepare(folder, True)
        before = (folder / "unet_best.pth").read_bytes()
        status, out, _ = call("train.py", "--data_root", scenes, *resume, name, "--device", "cpu")
        assert status == 0 and "from checkpoint/unet_last.pth" in out
        assert load(tmp_path)["training"]["best_miou"] == 0.99 and not [*folder.glob("unet_until_*")]
        assert (folder / "unet_best.pth").read_bytes() == before


@pytest.mark.parametrize("workers, method, limit, kept", [
    (0, "spawn", 2 * 32 * 96 * 72, True), (2, "fork", 2**31, True), (2, "spawn", 2**31, False), (0, "fork", 99, False)])
def test_images_are_decoded_once_where_memory_and_processes_allow(scenes, monkeypatch, workers, method, limit, kept):
    monkeypatch.setattr(train, "KEPT_BYTES", limit)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: method)
    datasets = [CamVidDataset(scenes, split, CAMVID) for split in ("train", "val")]
    train.keep_decoded([SimpleNamespace(num_workers=workers, dataset=dataset) for dataset in datasets],
                       check_data(scenes, ["train", "val"], CAMVID))
    assert [len(dataset.kept) for dataset in datasets] == [kept * len(dataset) for dataset in datasets]


def test_the_average_follows_a_wide_network_in_its_own_memory_format(scenes, tmp_path, call):
    assert call("train.py", "--data_root", scenes, *SMALL, "--width", 33, "--amp", "off", "--ema", 0)[0] == 0
    last = load(tmp_path)
    assert last["training"]["model_state_dict"]["encoder.0.3.weight"].is_contiguous()
    for name, tensor in last["training"]["model_state_dict"].items():
        assert torch.equal(tensor, last["state_dict"][name]) or name.endswith("num_batches_tracked"), name


def test_momentum_goes_with_its_weight_into_another_memory_format(trained, scenes, tmp_path, call, monkeypatch):
    state, names = load(trained), ("channels_last", "contiguous_format")
    for tensor in state["training"]["optimizer_state"].values():
        tensor *= 1000  # so that it decides
    torch.save(state, tmp_path / "fast.pth")
    for name in names:
        monkeypatch.setattr(train, "memory_format", lambda *_, name=name: getattr(torch, name))
        (cwd := tmp_path / name).mkdir()
        resume = "--resume", tmp_path / "fast.pth", "--epochs", 3, "--amp", "off"
        assert call("train.py", "--data_root", scenes, *resume, "--device", "cpu", cwd=cwd)[0] == 0
    weights = [load(tmp_path / name)["training"]["model_state_dict"] for name in names]
    assert weights[1]["encoder.0.3.weight"].is_contiguous()
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


def test_a_resume_reads_the_data_and_computes_as_before(scenes, tmp_path, call):
    data = "--data_name", "camvid", "--label_format", "rgb", "--num_classes", 12, "--amp", "bf16"
    assert call("train.py", "--data_root", scenes, *SMALL, *data, "--epochs", 1)[0] == 0
    assert call("train.py", "--data_root", scenes, "--resume", "auto", "--epochs", 2)[0] == 0
    flags = load(tmp_path)["config"]["train"]
    assert [flags[name[2:]] for name in data[::2]] == [*data[1::2]] and len(rows(tmp_path)) == 2


def test_resume_auto_finds_the_run_whatever_its_model(scenes, tmp_path, call):
    """Its file of --init_from, too, may be gone: a run in the same folder moves it aside."""
    data = "--data_root", scenes
    assert call("train.py", *data, *SMALL, "--epochs", 1, "--model", "unet_resnet18", "--max_side", 0)[0] == 0
    tune = *data, "--crop_size", 64, "--device", "cpu", "--init_from", "checkpoint/unet_resnet18_best.pth"
    assert call("train.py", *tune, "--epochs", 1)[0] == 0
    (tmp_path / "checkpoint" / "unet_resnet18_best.pth").unlink()  # as before the first validation
    status, out, err = call("train.py", *tune, "--epochs", 2, "--resume", "auto", "--lr", 0.02)
    assert (status, err) == (0, "") and "resumed after epoch 1, best" in out
    status, out, _ = call("train.py", *data, "--epochs", 3, "--resume", "auto")
    last = torch.load(tmp_path / "checkpoint" / "unet_resnet18_last.pth", weights_only=True)
    assert status == 0 and "resumed after epoch 2" in out and not (tmp_path / "checkpoint" / "unet_last.pth").exists()
    assert last["config"]["train"]["lr"] == 0.02 and last["config"]["max_side"] == 96
    aside = next(tmp_path.glob("checkpoint/*_until_*/unet_resnet18_last.pth"))
    assert torch.load(aside, weights_only=True)["config"]["max_side"] == 0


@pytest.mark.parametrize("recipe", ["--scheduler step", "--scheduler onecycle --optimizer adamw",
                                    "--momentum 0 --ema 0"])
def test_a_finished_run_is_extended_by_its_stored_flags(scenes, tmp_path, call, recipe):
    """Two epochs become four: the schedule of four goes on at its place; nothing but --epochs is typed."""
    for epochs, typed in ((2, (*SMALL[:-4], *recipe.split())), (4, ("--resume", "auto"))):
        status, out, err = call("train.py", "--data_root", scenes, *typed, "--epochs", epochs, "--device", "cpu")
        assert status == 0, err
    assert "resumed after epoch 2" in out and len(rows(tmp_path)) == 4
    flags = load(tmp_path)["config"]["train"]
    assert (flags["step_size"], flags["width"], flags["crop_size"], flags["epochs"]) == (1, 4, [64, 64], 4)
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], flags["lr"])
    factor = build_scheduler(flags["scheduler"], optimizer, 4 * 2, 1 * 2, flags["gamma"]).lr_lambdas[0]
    rates = [float(row["lr"]) for row in rows(tmp_path)][2:]
    assert rates == pytest.approx([flags["lr"] * factor(update) for update in (5, 7)], abs=1e-6)
    last = load(tmp_path)
    assert last["training"]["updates"] == 8
    raw, average = last["training"]["model_state_dict"]["classifier.bias"], last["state_dict"]["classifier.bias"]
    assert torch.equal(raw, average) == ("--ema 0" in recipe)
    for best in ("there", "gone"):  # of a run that was stopped before its first validation there is none
        status, out, _ = call("train.py", "--data_root", scenes, "--resume", "auto")
        assert status == 0 and "nothing is left to train" in out and len(rows(tmp_path)) == 4
        assert ("best epoch" in out) == (best == "there")
        (tmp_path / "checkpoint" / "unet_best.pth").unlink(missing_ok=True)


def test_another_number_of_processes_is_named(trained, scenes, tmp_path, call):
    state = load(trained)
    state["training"] |= {"processes": 2, "steps_per_epoch": 1}
    torch.save(state, tmp_path / "two.pth")
    status, _, err = call("train.py", "--data_root", scenes, "--resume", "two.pth")
    assert status == 2 and "trained with 2 processes, now 1;" in err and "other data" not in err


@pytest.mark.parametrize("typed, expected", [
    ("", ("onecycle", 34, 0.2)), ("--gamma 0.5", ("step", 34, 0.5)), ("--step_size 3", ("step", 3, 0.2)),
    ("--scheduler step --epochs 10", ("step", 4, 0.2)), ("--scheduler onecycle --gamma 1", ("onecycle", 34, 1.0))])
def test_the_schedule_is_one_cycle_unless_steplr_is_asked_for(typed, expected):
    args = train.get_args_parser().parse_args(typed.split())
    resolve_recipe(args)
    assert (args.scheduler, args.step_size, args.gamma) == expected


def test_the_tutorials_commands(scenes, tmp_path, call):
    tutorial = ("--data_name CamVid --model unet --num_classes 12 --epochs 1 --lr 0.01 --momentum 0.9 "
                "--weight-decay 5e-4 --batch_size 2 --step_size 1 --gamma 0.1 --checkpoint C")
    assert call("train.py", "--data_root", scenes, *tutorial.split(), "--width", 4, "--crop_size", 64)[0] == 0
    flags = json.loads((tmp_path / "C" / "unet_args.json").read_text())
    assert (flags["lr"], flags["momentum"], flags["weight_decay"], flags["gamma"]) == (0.01, 0.9, 5e-4, 0.1)
    image = min((scenes / "test").iterdir())
    predict = ("predict.py", *"--model unet --num_classes 12 --checkpoint C/unet_best.pth --image_dir".split(), image,
               "--save_dir")
    for i, overlay in enumerate(("--overlay False", "--overlay no", "--overlay 0", "--no-overlay", "", "--overlay yes",
                                 "--overlay True", "--overlay")):
        status, out, _ = call(*predict, f"S{i}", *overlay.split())
        assert status == 0 and "unet_best.pth on 1 image\n" in out
        assert f"wrote 1 mask{' and 1 overlay' if i > 3 else ''} to S{i}\n" in out
        names = {f"{image.stem}_mask.png"} | ({f"{image.stem}_overlay.png"} if i > 3 else set())
        assert {path.name for path in (tmp_path / f"S{i}").glob("[!.]*")} == names
    for flag, value, known in (("--model", "unet_resnet18", "unet"), ("--num_classes", 11, "12")):
        status, _, err = call(*predict, "S", flag, value)
        assert status == 2 and f"{flag} {value}: C/unet_best.pth has {known};" in err
    assert "neither true nor false" in call(*predict, "S", "--overlay", "maybe")[2] and not (tmp_path / "S").exists()
    assert "wrote 0 masks and 0 overlays to S4\n" in call(*predict, "S4", "--skip_existing")[1]
    assert call(*predict, "S0", "--skip_existing")[0] == 0 and len(list((tmp_path / "S0").glob("[!.]*"))) == 2


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
    assert {opened(path).size for path in (tmp_path / "predictions").glob("[!.]*")} == {(96, 72)}


def test_evaluation_scores_what_training_scored_and_prediction_writes(scenes, tmp_path, call):
    """With validation images larger than those of training, and a checkpoint of another normalisation."""
    data = shutil.copytree(scenes, tmp_path / "data")
    for path in [*data.glob("val*/*.png")]:
        save(path, np.asarray(opened(path).resize((192, 144), Image.Resampling.NEAREST)))
    assert call("train.py", "--data_root", data, *SMALL)[0] == 0
    best = load(tmp_path, "best")
    scores = evaluate(call, tmp_path, "--data_root", data)
    assert scores["miou"] == pytest.approx(best["scores"]["miou"], abs=1e-6) and best["config"]["max_side"] == 96
    best["config"]["normalize"] = {"mean": [0.2, 0.3, 0.7], "std": [0.3, 0.3, 0.1]}
    torch.save(best, tmp_path / "other.pth")
    other = evaluate(call, tmp_path, "--data_root", data, "--checkpoint", "other.pth")
    predict = "predict.py", "--image_dir", data / "val", "--save_dir", "masks", "--no-overlay"
    assert call(*predict, "--checkpoint", "other.pth")[0] == 0
    ids, colors = (np.concatenate([np.asarray(opened(path)) for path in sorted(folder.glob("[!.]*"))]) for folder in (
        tmp_path / "masks", data / "val_labels"))
    truth = CAMVID.to_ids(colors)
    right = (ids == truth)[truth > 0].mean()
    assert other["pixel_accuracy"] == pytest.approx(right, abs=1e-9) != scores["pixel_accuracy"]


@pytest.mark.slow
def test_shipped_weights_score_what_their_card_says(camvid, tmp_path, call):
    """The card's table has a row of IoUs for the classes, in their order, and mIoU in bold."""
    assert (REPO / "checkpoint" / "camvid_unet.pth").stat().st_size < 25e6
    card = (REPO / "checkpoint" / "README.md").read_text()
    stated = [float(text) for text in re.search(r"^\| IoU \|(.+)\|$", card, re.M)[1].split("|")]
    metrics = evaluate(call, tmp_path, "--data_root", camvid, "--amp", "off")
    assert [entry["iou"] for entry in metrics["per_class"]] == pytest.approx(stated, abs=0.002)
    assert f"{metrics['miou']:.3f}" == re.search(r"\*\*(0\.\d+)\*\*", card)[1] == "0.735"
    in_bf16 = evaluate(call, tmp_path, "--data_root", camvid, "--amp", "bf16")
    assert 0 < abs(metrics["miou"] - in_bf16["miou"]) < 0.002


def test_predict_starts_without_what_only_training_needs():
    check = "import predict, sys; sys.exit(bool({'albumentations', 'cv2', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPO).returncode == 0


def test_demo_trains_and_predicts(tmp_path, monkeypatch):
    """As typed, with fewer scenes."""
    generate, few = synthetic.generate_dataset, {"train": 2, "val": 2, "test": 2}
    monkeypatch.setattr(synthetic, "generate_dataset", lambda root, counts, size: generate(root, few, size))
    monkeypatch.chdir(tmp_path)
    for line in ("train.py --demo --epochs 1 --workers 0", "predict.py --demo"):
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(REPO / line.split()[0]), run_name="__main__")
    demo = tmp_path / "checkpoint" / "demo"
    assert all((demo / f"unet_{name}").is_file() for name in ("best.pth", "log.csv", "curves.png", "panel.png"))
    assert len(list((demo / "predictions").glob("*_overlay.png"))) == len(list(demo.glob("scenes/test/*"))) == 2
