"""The commands together: what a run leaves, what is made of it, and how it continues."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import COLORS, PALETTE, REPO, SMALL, load, make_pair, opened, rows, save, write_csv
from torch import nn
from torch._dynamo.testing import CompileCounter

from datasets import synthetic
from datasets.classes import CAMVID
from inference.checkpoints import SHIPPED
from train import build_loaders, get_args_parser, prepare_data
from training.recipe import build_scheduler, resolve_recipe

FILES = ("best.pth", "last.pth", "log.csv", "args.json", "curves.png", "panel.png")


def visible(folder) -> set[str]:
    return {path.name for path in folder.glob("[!.]*")}


@pytest.fixture
def train(call, scenes):
    """Train a small network on the scenes. Returns what is printed."""

    def train(flags: str = "", data=scenes) -> str:
        status, out, err = call("train.py", "--data_root", data, *SMALL, *flags.split())
        assert status == 0, err
        return out

    return train


@pytest.fixture
def evaluate(call, tmp_path):
    """The scores that evaluate.py writes."""

    def evaluate(*flags, cwd=tmp_path) -> dict:
        status, _, err = call("evaluate.py", *flags, cwd=cwd)
        assert status == 0, err
        files = (cwd / "evaluation").iterdir()
        path = max(files, key=lambda path: path.stat().st_mtime_ns)
        return json.loads(path.read_text())

    return evaluate


def test_a_run_leaves_its_files(trained):
    assert visible(trained / "checkpoint") == {f"unet_{name}" for name in FILES}
    best = load(trained, "best")
    last = load(trained)
    assert best.keys() == {"format", "state_dict", "scores", "config"}
    assert last.keys() == {*best, "training"}
    raw = last["training"]["model"]["classifier.bias"]
    average = last["training"]["ema"]["classifier.bias"]
    assert torch.equal(last["state_dict"]["classifier.bias"], average)
    assert not torch.equal(raw, average)
    log = rows(trained)
    assert [row["epoch"] for row in log] == ["1", "2"]
    best_miou = max(float(row["val_miou"]) for row in log)
    assert best["scores"]["miou"] == pytest.approx(best_miou, abs=1e-6)
    assert f"mIoU {best_miou:.3f}" in (trained / "printed").read_text()
    logged = [float(log[-1][f"iou/{name}"]) for name in CAMVID.names[1:]]
    expected = last["scores"]["iou"][1:]
    assert logged == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_fine_tuning_keeps_the_normalization(train, evaluate, scenes, tmp_path):
    """From scratch, the normalization is 0.5 for EfficientNet-Lite."""
    train("--model unet_lite0")
    best = tmp_path / "checkpoint" / "unet_lite0_best.pth"
    checkpoint = torch.load(best)
    assert checkpoint["config"]["normalize"] == {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    metrics = evaluate("--data_root", scenes, "--checkpoint", best)
    assert metrics["miou"] == pytest.approx(checkpoint["scores"]["miou"], abs=1e-9)
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    checkpoint["config"]["normalize"] = own
    torch.save(checkpoint, tmp_path / "own.pth")
    train("--init_from own.pth --checkpoint tuned")
    config = torch.load(tmp_path / "tuned" / "unet_lite0_best.pth")["config"]
    assert config["normalize"] == own


def test_training_and_validation_images_are_normalized_alike(scenes):
    args = get_args_parser().parse_args(["--data_root", str(scenes), *SMALL, "--jitter", "0"])
    resolve_recipe(args)
    data = prepare_data(args)
    normalize = {"mean": (0.0, 0.5, 1.0), "std": (1.0, 0.5, 0.25)}
    for loader in build_loaders(args, data, torch.device("cpu"), normalize):
        for images, _ in loader:
            assert (images.amin((0, 2, 3)) >= torch.tensor([0, -1, -4])).all()
            assert (images.amax((0, 2, 3)) <= torch.tensor([1, 1, 0])).all()
            assert images[:, 2].min() < -1  # not in 0 … 255


def test_the_printed_command_evaluates_to_the_score_of_training(trained, evaluate):
    command = re.search(r"^  python evaluate.py (.*)$", (trained / "printed").read_text(), re.M)[1]
    metrics = evaluate(*shlex.split(command), cwd=trained)
    scores = load(trained, "best")["scores"]
    for key in ("miou", "pixel_accuracy", "mean_pixel_accuracy", "fwiou", "mean_f1"):
        assert metrics[key] == pytest.approx(scores[key], abs=1e-9)
    assert tuple(entry["name"] for entry in metrics["per_class"]) == CAMVID.names[1:]
    pixels = [entry["pixels"] for entry in metrics["per_class"]]
    assert [sum(row) for row in metrics["confusion_matrix"]] == pixels


def test_runs_are_compared_in_one_table(trained, scenes, tmp_path, call):
    for name, bias in (("a", 0), ("b", 1)):
        best = load(trained, "best")
        best["state_dict"]["classifier.bias"][4] += bias
        (tmp_path / name).mkdir()
        torch.save(best, tmp_path / name / "unet_best.pth")
    flags = ("--data_root", scenes, "--split", "test", "--tta", "flip")
    folder = scenes.name
    status, out, _ = call("evaluate.py", *flags, "a", "b/unet_best.pth")
    assert status == 0
    metrics = [
        json.loads(
            (tmp_path / "evaluation" / f"{name}_unet_best_{folder}_test_flip.json").read_text()
        )
        for name in "ab"
    ]
    first, second = (entry["miou"] for entry in metrics)
    assert first != second
    row = out.splitlines()[-1].split()
    expected = [first, second, (first + second) / 2, abs(first - second) / 2**0.5]
    assert [row[0], row[4]] == ["mIoU", "±"]
    assert [float(row[k]) for k in (1, 2, 3, 5)] == pytest.approx(expected, abs=6e-4)
    assert metrics[1]["checkpoint"] == "b/unet_best.pth"
    assert (metrics[1]["split"], metrics[1]["tta"], metrics[1]["images"]) == ("test", "flip", 2)
    assert metrics[1]["sizes"] == {"96x72": 2}


def test_runs_with_other_classes_are_refused_before_any_is_scored(trained, scenes, tmp_path, call):
    best = load(trained, "best")
    best["config"]["classes"]["names"][4] = "Street"
    torch.save(best, tmp_path / "street.pth")
    runs = (trained / "checkpoint", "street.pth")
    status, out, err = call("evaluate.py", "--data_root", scenes, *runs)
    assert status == 2 and out == ""
    assert "street.pth" in err and err.count("\n") == 1


def test_masks_in_other_colours_than_the_checkpoints_are_one_sentence(trained, tmp_path, call):
    best = trained / "checkpoint" / "unet_best.pth"
    for stem in "abc":
        _, mask = make_pair(tmp_path / "data", stem, split="val")
        save(mask, 255 - np.asarray(opened(mask)))
    status, _, err = call("evaluate.py", "--data_root", "data", "--checkpoint", best)
    assert status == 2 and err.count("\n") == 1
    assert "Road" in err


def test_a_run_in_two_parts_equals_a_plain_one_bit_for_bit(trained, tmp_path, train):
    """Also where the second part has a loader process."""
    train("--epochs 1 --deterministic")
    train("--epochs 2 --deterministic --resume auto --workers 1")
    ours = load(tmp_path)
    plain = load(trained)
    assert rows(tmp_path) == rows(trained)
    torch.testing.assert_close(ours["state_dict"], plain["state_dict"], rtol=0, atol=0)
    for part in ("model", "optimizer"):
        found = ours["training"][part]
        expected = plain["training"][part]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore::UserWarning:google")
def test_tensorboard_logs_every_epoch_of_a_run_in_two_parts_once(tmp_path, train):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train("--epochs 1 --tensorboard")
    train("--resume auto --tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "checkpoint" / "unet_tensorboard"))
    events.Reload()
    for key in ("train_loss", "val_loss", "val_miou", "lr"):
        logged = [float(row[key]) for row in rows(tmp_path)]
        assert [event.value for event in events.Scalars(key)] == pytest.approx(logged, abs=1e-5)
        assert [event.step for event in events.Scalars(key)] == [1, 2]


@pytest.mark.parametrize(
    "recipe, resume",
    [
        ("--scheduler step", "auto"),
        ("--scheduler onecycle --optimizer adamw", "checkpoint/unet_best.pth"),
        ("--scheduler onecycle", "checkpoint"),
        ("", "checkpoint"),  # the drop moves too
    ],
)
def test_a_finished_run_is_extended_by_its_stored_flags(
    scenes, tmp_path, call, train, recipe, resume
):
    """Two epochs become four: the schedule of four continues at its place."""
    train(recipe)
    resume = ("train.py", "--data_root", scenes, "--resume", resume)
    assert call(*resume, "--epochs", 4)[0] == 0
    args = get_args_parser().parse_args([*SMALL, *recipe.split(), "--epochs", "4"])
    resolve_recipe(args)
    optimizer = torch.optim.SGD([torch.ones(1)], args.lr)
    factor = build_scheduler(args, optimizer, steps_per_epoch=2).lr_lambdas[0]
    rates = [float(row["lr"]) for row in rows(tmp_path)]
    assert len(rates) == 4
    assert rates[2:] == pytest.approx([args.lr * factor(update) for update in (5, 7)], abs=1e-6)
    assert "nothing is left to train" in call(*resume)[1]
    assert len(rows(tmp_path)) == 4


def test_a_resumed_run_keeps_the_best_weights_that_it_does_not_beat(trained, tmp_path, train):
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    state = load(tmp_path)
    state["training"]["best_miou"] = 0.99
    torch.save(state, tmp_path / "checkpoint" / "unet_last.pth")
    best = tmp_path / "checkpoint" / "unet_best.pth"
    before = best.read_bytes()
    train("--epochs 3 --resume auto")
    assert load(tmp_path)["training"]["best_miou"] == 0.99
    assert best.read_bytes() == before


def test_flags_that_contradict_a_resumed_run_are_named(trained, scenes, call):
    typed = (
        "--width 8 --optimizer adamw --lr 0.01 --momentum 0.8 --weight_decay 0.1 --seed 5 "
        "--scheduler onecycle --step_size 7 --gamma 1 --batch_size 3 --clip_grad 1 --crop_size 96 "
        "--max_side 90 --scale 1 1 --jitter 0 --class_weights log --loss ce --ema 0.5 "
        "--model unet_resnet18"
    )
    resume = ("--resume", "checkpoint/unet_last.pth", "--epochs", 9)
    status, _, err = call("train.py", "--data_root", scenes, *resume, *typed.split(), cwd=trained)
    assert status == 2
    assert set(re.findall(r"--\w+", typed)) <= set(re.findall(r"--\w+", err))
    assert "--epochs" not in err


def test_a_new_run_archives_the_previous_one(tmp_path, train, monkeypatch):
    """Also several within a second, or after the clock was set back."""
    monkeypatch.setattr("time.strftime", lambda _: "2001-01-01_000000")
    best = tmp_path / "checkpoint" / "unet_best.pth"
    earlier = []
    for _ in range(3):
        train("--epochs 1")
        earlier.append(best.read_bytes())
    archived = sorted(tmp_path.glob("checkpoint/unet_until_*/unet_best.pth"))
    assert [path.read_bytes() for path in archived] == earlier[:2]
    assert visible(archived[0].parent) == {f"unet_{name}" for name in FILES}


def test_fine_tuning_the_shipped_weights_is_one_command(scenes, tmp_path, call):
    """Model and width are those of the file; another class table replaces the classifier."""
    data = shutil.copytree(scenes, tmp_path / "data")
    write_csv(data, COLORS | {"Horse": (1, 2, 3)})
    flags = "--crop_size 64 --epochs 1 --device cpu --init_from"
    command = ("train.py", "--data_root", data, *flags.split(), SHIPPED)
    assert call(*command)[0] == 0
    last = torch.load(tmp_path / "checkpoint" / "unet_lite0_last.pth")
    assert last["config"]["model"] == {"name": "unet_lite0", "options": {"width": 16}}
    assert last["config"]["train"]["lr"] == pytest.approx(0.1 / 5)
    assert last["config"]["max_side"] == 480  # as large as objects were in the training
    assert last["state_dict"]["classifier.weight"].shape[0] == 13
    assert call(*command, "--width", 8)[0] == 2


def test_the_tutorials_commands(scenes, tmp_path, call):
    tutorial = (
        "--data_name CamVid --model UNet --num_classes 12 --epochs 1 --lr 0.01 --momentum 0.9 "
        "--weight-decay 5e-4 --batch_size 2 --step_size 1 --gamma 0.1 --checkpoint C"
    )
    small = ("--width", 4, "--crop_size", 64)
    assert call("train.py", "--data_root", scenes, *tutorial.split(), *small)[0] == 0
    flags = json.loads((tmp_path / "C" / "unet_args.json").read_text())
    assert (flags["weight_decay"], flags["scheduler"], flags["gamma"]) == (5e-4, "step", 0.1)
    image = min((scenes / "test").iterdir())
    predict = "predict.py --model unet --num_classes 12 --checkpoint C/unet_best.pth --image_dir"
    for overlay, kinds in (("False", ["mask"]), ("True", ["mask", "overlay"])):
        typed = (image, "--save_dir", overlay, "--overlay", overlay)
        assert call(*predict.split(), *typed)[0] == 0
        assert visible(tmp_path / overlay) == {f"{image.stem}_{kind}.png" for kind in kinds}


def test_evaluation_scores_the_masks_that_prediction_writes_at_their_own_size(
    scenes, tmp_path, call, train, evaluate
):
    """The network sees images of 64 pixels; images and masks have 96×72."""
    train("--max_side 64 --epochs 3 --val_every 2")
    assert [row["val_miou"] == "" for row in rows(tmp_path)] == [True, False, False]
    best = load(tmp_path, "best")
    metrics = evaluate("--data_root", scenes)
    assert metrics["miou"] == pytest.approx(best["scores"]["miou"], abs=1e-6)
    assert evaluate("--data_root", scenes, "--max_side", 0)["miou"] != metrics["miou"]
    assert "2 images were shrunk to 64" in call("evaluate.py", "--data_root", scenes)[1]
    out = call("predict.py", "--image_dir", scenes / "val", "--save_dir", "twice")[1]
    assert "more than twice" not in out
    large = opened(min((scenes / "val").iterdir())).resize((192, 144))
    large.save(tmp_path / "large.png")
    out = call("predict.py", "--image_dir", "large.png", "--save_dir", "large")[1]
    assert out.index("192×144 pixels are more than twice") < out.index("wrote")
    assert call("predict.py", "--image_dir", scenes / "val", "--no-overlay")[0] == 0
    right = []
    for path in (scenes / "val_labels").iterdir():
        truth = CAMVID.to_ids(np.asarray(opened(path)))
        ids = np.asarray(opened(tmp_path / "predictions" / f"{path.stem}_mask.png"))
        right.append((ids == truth)[truth > 0])
    share = np.concatenate(right).mean()
    assert metrics["pixel_accuracy"] == pytest.approx(share, abs=1e-9)


def test_prediction_writes_what_is_asked_for(trained, scenes, tmp_path, call):
    asked = "--save_confidence --mask_format color --report report --no-overlay"
    flags = ("--image_dir", scenes / "val", "--checkpoint", trained / "checkpoint/unet_best.pth")
    assert call("predict.py", *flags, *asked.split())[0] == 0
    names = {path.stem for path in (scenes / "val").iterdir()}
    kinds = ("mask", "confidence")
    assert visible(tmp_path / "predictions") == {f"{n}_{k}.png" for n in names for k in kinds}
    page = (tmp_path / "report" / "index.html").read_text("utf-8")
    means = dict(re.findall(r'"name": "([^"]+)".*?"confidence": ([\d.]+)', page))
    for name in names:
        grey = np.asarray(opened(tmp_path / "predictions" / f"{name}_confidence.png"))
        assert float(means[name]) == pytest.approx(grey.mean() / 255)


# Folders as tools write them: the places of image and mask, what is in a mask, the file of names.
EXPORTS = {
    "CVAT": (
        "{split}/{name}.png",
        "{split}annot/{name}.png",
        lambda ids: PALETTE[ids],
        ("label_colors.txt", "0 0 0 sky\n128 128 128 road\n128 0 0 car\n192 192 128 pole"),
    ),
    "Roboflow": (
        "{split}/{name}.jpg",
        "{split}/{name}_mask.png",
        np.uint8,
        ("train/_classes.csv", "Pixel Value, Class\n0, sky\n1, road\n2, car\n3, pole"),
    ),
    "own ids": ("{split}/{name}.png", "{split}annot/{name}.png", np.uint8, None),
    "Cityscapes": (
        "leftImg8bit/{split}/aachen/{name}_leftImg8bit.png",
        "gtFine/{split}/aachen/{name}_gtFine_labelTrainIds.png",
        lambda ids: np.array([10, 0, 13, 255], np.uint8)[ids],
        None,
    ),
    "Cityscapes, as downloaded": (
        "leftImg8bit/{split}/aachen/{name}_leftImg8bit.png",
        "gtFine/{split}/aachen/{name}_gtFine_color.png",
        lambda ids: np.array([(70, 130, 180), (128, 64, 128), (0, 0, 142), (0, 0, 0)], np.uint8)[
            ids
        ],
        None,
    ),
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_an_export_trains_and_predicts_without_moving_a_file(tmp_path, call, tool):
    """Classes have the names of the export, and predicted ids are those of the masks."""
    image_place, mask_place, paint, names = EXPORTS[tool]
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            ids = np.kron(rng.permutation(24).reshape(4, 6) % 4, np.ones((16, 16), int))
            image = PALETTE[ids] // 2 + rng.integers(0, 60, (*ids.shape, 3), np.uint8)
            save(tmp_path / "data" / image_place.format(split=split, name=name), image)
            save(tmp_path / "data" / mask_place.format(split=split, name=name), paint(ids))
    if names:
        (tmp_path / "data" / names[0]).write_text(names[1])
    assert call("train.py", "--data_root", "data", *SMALL)[0] == 0
    images = (tmp_path / "data").glob(image_place.format(split="val", name="[ab]"))
    assert call("predict.py", "--image_dir", *images, "--no-overlay")[0] == 0
    found = {int(i) for path in tmp_path.glob("predictions/*.png") for i in np.unique(opened(path))}
    config = load(tmp_path, "best")["config"]["classes"]
    if tool.startswith("Cityscapes"):
        assert len(config["names"]) == 19 and config["names"][10] == "sky"
    else:
        assert found <= {0, 1, 2, 3}
        expected = ["sky", "road", "car", "pole"] if names else [f"class {i}" for i in range(4)]
        assert config["names"] == expected
    assert call("evaluate.py", "--data_root", "data")[0] == 0
    if names:  # the same without the file of names, as on another machine
        names_elsewhere = tmp_path / "elsewhere.txt"
        (tmp_path / "data" / names[0]).rename(names_elsewhere)
        assert call("evaluate.py", "--data_root", "data")[0] == 0


def test_small_crops_of_large_images_get_advice_which_helps(tmp_path, call):
    for split in ("train", "val"):
        make_pair(tmp_path / "data", "a", np.resize(np.arange(12), (64, 1600)), split)
    command = ("train.py", "--data_root", "data", "--data_name", "camvid", *SMALL, "--epochs", 1)
    assert "--max_side 960" in call(*command)[1]
    assert "advice" not in call(*command, "--max_side", 960)[1]


def test_evaluation_reads_the_file_of_classes_that_the_training_read(scenes, tmp_path, train, call):
    table = write_csv(tmp_path, dict(zip(["Void", *"abcdefghijk"], COLORS.values())))
    train(f"--classes {table}")
    assert call("evaluate.py", "--data_root", scenes)[0] == 0


@pytest.mark.slow
def test_compiled_training_has_one_graph(train, monkeypatch):
    """Four images in batches of three: a smaller last batch would be compiled once more."""
    graphs = CompileCounter()
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compile_with(model, backend=graphs))
    train("--batch_size 3 --compile")
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_the_shipped_weights_score_what_their_card_says(camvid, evaluate):
    card = (REPO / "checkpoint" / "README.md").read_text()
    stated = re.search(r"^\| IoU \|(.+)\|$", card, re.M)[1].split("|")
    metrics = evaluate("--data_root", camvid, "--amp", "off")
    found = [entry["iou"] for entry in metrics["per_class"]]
    assert found == pytest.approx([float(text) for text in stated], abs=0.002)
    assert f"{metrics['miou']:.3f}" == re.search(r"\*\*(0\.\d+)\*\*", card)[1]
    in_bf16 = evaluate("--data_root", camvid, "--amp", "bf16")
    assert in_bf16["miou"] == pytest.approx(metrics["miou"], abs=0.002)


def test_prediction_starts_without_the_packages_of_training():
    unused = "{'albumentations', 'cv2', 'matplotlib'} & set(sys.modules)"
    code = f"import predict, sys; sys.exit(bool({unused}))"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_the_demo_trains_and_predicts(tmp_path, monkeypatch):
    """As typed, with fewer scenes."""
    few = {"train": 2, "val": 2, "test": 2}
    generate = synthetic.generate_dataset
    monkeypatch.setattr(
        synthetic, "generate_dataset", lambda *args: generate(args[0], few, args[2])
    )
    monkeypatch.chdir(tmp_path)
    for line in ("train.py --demo --epochs 1 --workers 0", "predict.py --demo"):
        script, *_ = typed = line.split()
        monkeypatch.setattr(sys, "argv", typed)
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(REPO / script), run_name="__main__")
    predictions = visible(tmp_path / "checkpoint" / "demo" / "predictions")
    assert len(predictions) == 2 * 2
