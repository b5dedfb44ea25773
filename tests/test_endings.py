"""How commands end: by a signal, a kill, a closed pipe, a full disk, a mistake or a bug."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, SMALL, load, opened, rows, save, start, wait_for
from PIL import Image

import train
from datasets.synthetic import generate_dataset
from inference.checkpoints import SHIPPED
from inference.predictor import Predictor

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
FROM_THE_REPOSITORY = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def test_flags_may_have_hyphens_and_unknown_ones_name_the_nearest(call):
    args = train.get_args_parser().parse_args(["--batch-size=3", "--val-every", "2"])
    assert (args.batch_size, args.val_every) == (3, 2)
    status, _, err = call("train.py", "--batchsize", 3)
    assert status == 2 and "--batch_size" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_prints_how_to_continue(scenes, tmp_path, call, monkeypatch, number):
    """It is stopped in its second epoch."""
    command = ("train.py", "--data_root", scenes, *SMALL)
    validate = train.validate

    def validate_or_stop(*args):
        if (tmp_path / "checkpoint" / "unet_last.pth").exists():
            signal.raise_signal(number)
        return validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", validate_or_stop)
        status, _, err = call(*command)
    assert status == 128 + number
    assert len(load(tmp_path)["training"]["history"]) == 1
    typed = re.search(r"^  (--resume .*)$", err, re.M)[1]
    assert call(*command, *shlex.split(typed))[0] == 0
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]


@pytest.mark.slow
@needs_posix
def test_ctrl_c_ends_the_processes_that_load_data_too(scenes, tmp_path):
    flags = ("--data_root", scenes, *SMALL, "--epochs", 10_000, "--workers", 1)
    process = start("train.py", *flags, cwd=tmp_path)
    wait_for((tmp_path / "checkpoint" / "unet_last.pth").exists)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(process.pid, 0))
    assert not list(tmp_path.rglob(".unfinished*"))


def test_a_stopped_prediction_continues_with_skip_existing(scenes, tmp_path, call, monkeypatch):
    predict = Predictor.predict_with_confidence
    images = iter(range(4))

    def predict_or_stop(*args):
        if next(images) == 2:
            signal.raise_signal(signal.SIGTERM)
        return predict(*args)

    command = ("predict.py", "--image_dir", scenes / "train", "--no-overlay", "--skip_existing")
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict_with_confidence", predict_or_stop)
        assert call(*command)[0] == 128 + signal.SIGTERM
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("predictions/*_mask.png")}
    assert len(written) < 4
    assert call(*command)[0] == 0
    masks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("predictions/*_mask.png")}
    assert len(masks) == 4
    assert written.items() <= masks.items()


@needs_posix
@pytest.mark.parametrize(
    "command, flag, split",
    [
        ("train.py", "--data_root", ""),
        ("evaluate.py", "--data_root", ""),
        ("predict.py", "--image_dir", "val"),
        ("datasets.check", "--data_root", ""),
    ],
)
def test_a_closed_pipe_ends_quietly(scenes, call, monkeypatch, command, flag, split):
    read, write = os.pipe()
    os.close(read)
    small = SMALL if command == "train.py" else ()
    with open(write, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        status, _, err = call(command, flag, scenes / split, *small)
    assert (status, err) == (128 + signal.SIGPIPE, "")


# Imports once and forks a process for each run.
DRIVER = """
import matplotlib.figure, os, random, signal, sys, time, train
from pathlib import Path
from support.command import run_command

def start(checkpoint, *flags, at=None, nth=0):
    "Fork a training that kills itself with the nth file torn, or before or after its renaming."
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = open(os.devnull, "w")
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
    at = rng.choice(["any time", "any time", "torn", "before", "after"])
    nth = rng.randint(1, 4 if at == "torn" else 12)
    workers = rng.choice(["0", "0", "2"])
    pid = start("killed", "--resume", "auto", "--workers", workers, at=at, nth=nth)
    if at == "any time":
        time.sleep(rng.uniform(0, 0.7 * length))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    if status:
        kills += 1
    else:  # it came to its end: begin once more
        Path("killed").rename("finished%d" % len([*Path().glob("finished*")]))
assert os.waitpid(start("killed", "--resume", "auto"), 0)[1] == 0
"""


def without_folder_and_times(path: Path) -> dict:
    """A checkpoint as it is in every equal run."""
    checkpoint = torch.load(path) | {"config": 0}
    for row in checkpoint.get("training", {}).get("history", ()):
        del row["seconds"]
    return checkpoint


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_twenty_moments_and_resumed_a_run_ends_the_same(tmp_path):
    data = tmp_path / "scenes"
    generate_dataset(data, {"train": 10, "val": 3}, (96, 72))
    flags = ["--data_root", str(data), *SMALL, "--batch_size", "4", "--epochs", "5"]
    code = DRIVER.format(flags=[*flags, "--deterministic"])
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=FROM_THE_REPOSITORY, timeout=500, check=True)
    kills = (tmp_path / "kills").read_text().split()
    assert set(kills) == {"torn", "before", "after"}
    assert len(kills) < 20, "and at any time"
    whole = tmp_path / "whole"
    names = {path.name for path in whole.iterdir()}
    for other in (tmp_path / "killed", *tmp_path.glob("finished*")):
        # A run that is killed in its first epoch, between its best and last file, is archived.
        assert {path.name for path in other.iterdir() if path.is_file()} == names
        for name in ("unet_best.pth", "unet_last.pth"):
            ours = without_folder_and_times(other / name)
            expected = without_folder_and_times(whole / name)
            torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@needs_posix
def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(trained, tmp_path, scenes, call):
    import resource  # which Windows does not have

    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    last = tmp_path / "checkpoint" / "unet_last.pth"
    before = last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # enough for the log alone
    try:
        resume = ("--epochs", 3, "--resume", "auto")
        status, _, err = call("train.py", "--data_root", scenes, *SMALL, *resume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert err.count("\n") == 1
    assert last.read_bytes() == before
    assert not list(tmp_path.rglob(".unfinished*"))


@pytest.mark.parametrize(
    "typed, said",
    [
        ("train.py", "--data_root"),
        ("train.py --data_root nowhere", "nowhere"),
        ("train.py DATA --device tpu", "--device tpu"),
        ("train.py DATA --pretrained", "--pretrained"),
        ("train.py DATA --pretrained --init_from any.pth", "--init_from gives"),
        ("train.py DATA --crop_size 8", "--crop_size 8"),
        ("train.py DATA --resume nowhere.pth", "nowhere.pth"),
        ("train.py DATA --resume moved_best.pth", "moved_last.pth"),
        ("train.py DATA --resume .", "unet_last.pth"),
        ("train.py DATA --device cpu:00", "--device cpu:00"),
        ("train.py DATA --num_classes 32", "--data_name camvid32"),
        ("train.py DATA --checkpoint printed/run", "printed/run"),
        ("evaluate.py DATA --split dev", "dev"),
        ("evaluate.py DATA --data_name camvid32", "was trained on"),
        ("predict.py IMAGES --num_classes 11", "--num_classes 11"),
        ("predict.py IMAGES --save_dir printed", "printed"),
        ("predict.py --image_dir checkpoint --save_dir checkpoint", "--save_dir checkpoint"),
        ("export.py --out model.tflite", "model.tflite"),
        ("datasets.check --data_root checkpoint", "checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(call, trained, scenes, typed, said):
    """In a folder with a trained network."""

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in trained.rglob("[!.]*")}

    before = files()
    typed = typed.replace("DATA", "--data_root SCENES").replace("IMAGES", "--image_dir SCENES/val")
    words = [word.replace("SCENES", str(scenes)) for word in typed.split()]
    status, _, err = call(*words, cwd=trained)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert files() == before


NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
BROKEN = {
    "empty.png": b"",
    "page.jpg": b"<html>",
    "bomb.ppm": b"P6 60000 60000 255\n",
    "half.jpg": b"half",
    "half.png": b"half",
}
READABLE = {
    "a.png": (12, 16),
    "a.jpg": (12, 16),
    "LOUD.PNG": (12, 16),
    "ünï 写真.png": (12, 16),
    "one pixel.png": (1, 1),
    "wide.bmp": (1, 9999),
}


def test_broken_images_are_named_and_the_others_are_predicted(call, trained, tmp_path):
    for name, size in READABLE.items():
        save(tmp_path / "images" / name, np.resize(NOISE, (*size, 3)))
    for name, content in BROKEN.items():
        path = tmp_path / "images" / name
        path.write_bytes(content)
        if content == b"half":
            save(path, np.resize(NOISE, (150, 200, 3)))
            os.truncate(path, path.stat().st_size // 2)
    checkpoint = trained / "checkpoint" / "unet_best.pth"
    command = "predict.py --image_dir images --tile 64 --tta flip+scale --max_side 300 --checkpoint"
    status, _, err = call(*command.split(), checkpoint)
    assert status == 1
    assert all(f"images/{name}" in err for name in BROKEN)
    sizes = {path.name: opened(path).size[::-1] for path in tmp_path.glob("predictions/[!.]*")}
    expected = {}
    for name, size in READABLE.items():
        stem = name.replace(".", "_") if name.startswith("a.") else Path(name).stem
        expected |= {f"{stem}_mask.png": size, f"{stem}_overlay.png": size}
    assert sizes == expected


def run_script(path: Path, code: str, *flags) -> subprocess.CompletedProcess:
    path.write_text(code)
    command = [sys.executable, path, *flags]
    return subprocess.run(command, cwd=path.parent, text=True, capture_output=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository to edit."""
    folder = tmp_path_factory.mktemp("copy") / "unet"
    ignored = shutil.ignore_patterns(".*", "tests", "docs", "checkpoint", "__pycache__")
    return shutil.copytree(REPO, folder, ignore=ignored)


def test_an_error_in_a_users_script_shows_its_traceback(copy):
    done = run_script(copy / "mine.py", 'import datasets.camvid\nopen("missing.json")\n')
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert 'mine.py", line 2' in done.stderr
    assert "FileNotFoundError" in done.stderr


@needs_posix
def test_ctrl_c_in_a_users_script_runs_its_finally_blocks(tmp_path, monkeypatch):
    code = (
        "import signal, datasets.camvid\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\n"
        "finally:\n    print('tidied up')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    done = run_script(tmp_path / "mine.py", code)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "tidied up\n"
    assert done.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_in_an_edited_dataset_shows_its_line(copy, scenes, workers):
    edited = copy / "datasets" / "camvid.py"
    code = (REPO / "datasets" / "camvid.py").read_text()
    broken = 'open("extra_labels.json")'
    edited.write_text(code.replace("if self.decoded:", f"{broken}\n        if self.decoded:"))
    flags = ["--data_root", scenes, *SMALL, "--workers", str(workers)]
    done = run_script(copy / "train.py", (REPO / "train.py").read_text(), *flags)
    assert done.returncode == 1
    assert str(edited) in done.stderr
    assert broken in done.stderr
    assert "FileNotFoundError" in done.stderr


PEAK = """
import predict
from support.command import run_command
assert run_command(predict.main, predict.get_args_parser()) == 0
print(open("/proc/self/status").read())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_photograph_of_88_megapixels_takes_less_than_two_gigabytes(tmp_path):
    photo = Image.linear_gradient("L").resize((11_000, 8_000))
    photo.save(tmp_path / "photo.png", compress_level=1)
    command = [sys.executable, "-c", PEAK, "--image_dir", "photo.png", "--checkpoint", SHIPPED]
    options = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run(command, cwd=tmp_path, env=FROM_THE_REPOSITORY, **options)
    assert 500_000 < int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 2_000_000
    with Image.open(tmp_path / "predictions" / "photo_overlay.png") as overlay:
        assert overlay.size == photo.size
