"""How commands end when they are stopped, when nobody reads what they print, when the disk is full or gone."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets.synthetic import generate_dataset

REPO = Path(__file__).parents[1]
SMALL = ("--width", "4", "--crop_size", "64", "--batch_size", "4", "--device", "cpu", "--workers", "0")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and links as on POSIX systems")


def start(script: str, *args, cwd: Path, **options) -> subprocess.Popen:
    module = ("-m", script) if script.startswith("datasets.") else (REPO / script,)
    return subprocess.Popen([sys.executable, *map(str, (*module, *args))], cwd=cwd, text=True, start_new_session=True,
                            env=os.environ | {"PYTHONPATH": str(REPO)},
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A few scenes under many names."""
    root = tmp_path_factory.mktemp("data")
    generate_dataset(root / "scenes", {"train": 6, "val": 8}, (96, 72))
    for folder in ("val", "val_labels"):
        (root / "many" / folder).mkdir(parents=True)
        scenes = sorted((root / "scenes" / folder).iterdir())
        for i in range(10_000):
            os.link(scenes[i % 8], root / "many" / folder / f"{i:05}.png")
    return root


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def reads(process: subprocess.Popen, folder: Path) -> bool:
    """Whether the process has a file of the folder open just now."""
    for path in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(path).startswith(str(folder)):
                return True
    return False


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["predict", "evaluate", "check", "synthetic"])
def test_a_signal_leaves_what_is_finished_and_nothing_else(data, tmp_path, command, number):
    script, *flags = {
        "predict": ("predict.py", "--image_dir", data / "many" / "val", "--save_dir", "out"),
        "evaluate": ("evaluate.py", "--data_root", data / "many", "--workers", "2"),
        "check": ("datasets.check", "--data_root", data / "many"),
        "synthetic": ("datasets.synthetic", "--out", "out", "--size", "96", "72", "--train", "100000"),
    }[command]
    process = start(script, *flags, cwd=tmp_path)
    wait_for({
        "predict": lambda: len(list(tmp_path.glob("out/*"))) > 20,
        "evaluate": lambda: any(path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")),
        "check": lambda: reads(process, data / "many"),
        "synthetic": lambda: list(tmp_path.glob(".out.tmp/train_labels/*")),
    }[command])
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and err.count("\n") == 1 and "Traceback" not in err, err
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(process.pid, 0))  # no worker is left
    assert not list(tmp_path.rglob(".*"))
    for path in tmp_path.glob("out/*.png"):
        with Image.open(path) as image:
            image.load()


@pytest.mark.parametrize("script, flags", [
    ("predict.py", ("--image_dir", "{data}/scenes/val")), ("evaluate.py", ("--data_root", "{data}/scenes")),
    ("train.py", ("--data_root", "{data}/scenes", "--epochs", "1", *SMALL)),
    ("datasets.check", ("--data_root", "{data}/scenes")),
])
def test_a_closed_pipe_ends_quietly(data, tmp_path, script, flags):
    read, write = os.pipe()
    os.close(read)
    process = start(script, *(flag.format(data=data) for flag in flags), cwd=tmp_path, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE and "Traceback" not in err and "BrokenPipe" not in err, err


def finish(process: subprocess.Popen, status: int) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    return err


def test_a_vanished_folder_ends_training_in_one_line(data, tmp_path):
    process = start("train.py", "--data_root", data / "scenes", "--epochs", "9999", *SMALL, cwd=tmp_path)
    wait_for((tmp_path / "checkpoint" / "unet_last.pth").is_file)
    while (tmp_path / "checkpoint").exists():
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
    assert "cannot be written" in finish(process, 1)


IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-e", "-c"]


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run([*IN_A_NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True).returncode != 0
                    if shutil.which("unshare") else True, reason="needs a private file system")
def test_a_full_and_a_read_only_disk_keep_the_last_checkpoint(data, tmp_path):
    train = " ".join([sys.executable, str(REPO / "train.py"), "--data_root", str(data / "scenes"), *SMALL,
                      "--checkpoint disk/run --resume auto --step_size 1 --epochs"])
    check = f"{sys.executable} -c 'import sys, torch; print(torch.load(sys.argv[1], weights_only=True)[\"epoch\"])'"
    script = f"""
        mkdir disk && mount -t tmpfs -o size=20m none disk
        {train} 1
        dd if=/dev/zero of=disk/filler bs=1k 2>/dev/null || true
        {train} 2 || echo full: $?
        {check} disk/run/unet_last.pth
        ls -A disk/run
        rm disk/filler && mount -o remount,ro disk
        {train} 2 || echo read-only: $?
        mount -o remount,rw disk
        {train} 2
        {check} disk/run/unet_last.pth
    """
    done = subprocess.run([*IN_A_NAMESPACE, script], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    full = lines.index("full: 1")
    assert lines[full + 1] == "1" and not any(line.startswith(".unet") for line in lines)
    assert "read-only: 1" in lines and lines[-1] == "2"
    assert done.stderr.count("error: disk/run") == 2 and "Traceback" not in done.stderr
    assert "No space left" in done.stderr and "Read-only" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_prediction_of_10_000_files_stays_flat_and_goes_on_where_it_was_killed(data, tmp_path):
    flags = ("--image_dir", data / "many" / "val", "--save_dir", "out", "--no-overlay", "--skip_existing",
             "--max_side", "32")
    process = start("predict.py", *flags, cwd=tmp_path)
    wait_for(lambda: len(os.listdir(tmp_path / "out") if (tmp_path / "out").is_dir() else ()) > 500)
    process.kill()
    process.communicate()
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*_mask.png")}
    process = start("predict.py", *flags, cwd=tmp_path)
    memory, files = [], []
    while process.poll() is None:
        if len(there) + 500 < len(os.listdir(tmp_path / "out")) < 9_900:
            memory.append(resident(process.pid))
            files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
        time.sleep(0.2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"{len(there)} of 10000 photographs have their pictures already" in out
    masks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*_mask.png")}
    assert len(masks) == 10_000 and there.items() <= masks.items() and not list(tmp_path.glob("out/.*"))
    assert len(memory) > 10 and max(memory) < memory[0] + 20e6 and max(files) < 64


def resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_trained_model_survives_the_kill_of_the_next_run(data, tmp_path):
    finish(start("train.py", "--data_root", data / "scenes", "--epochs", "1", *SMALL, cwd=tmp_path), 0)
    last = tmp_path / "checkpoint" / "unet_last.pth"
    weights = last.read_bytes()
    process = start("train.py", "--data_root", data / "scenes", "--epochs", "9999", *SMALL, cwd=tmp_path)
    wait_for(lambda: list(last.parent.glob("unet_until_*/unet_last.pth")))
    process.kill()
    process.communicate()
    aside, = last.parent.glob("unet_until_*/unet_last.pth")
    assert aside.read_bytes() == weights and torch.load(aside, weights_only=True)["epoch"] == 1
