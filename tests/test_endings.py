"""How commands end when they are stopped, when nobody reads what they print, when the disk is full or gone."""
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL, finish, opened, start

import train
from training.engine import NonFiniteLoss

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and links as on POSIX systems")
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
MANY = 1500


@pytest.fixture(scope="module")
def many(scenes, tmp_path_factory) -> Path:
    """A data folder of two scenes under many names, as images and masks of val."""
    root = tmp_path_factory.mktemp("many")
    for folder in ("val", "val_labels"):
        (root / folder).mkdir()
        for i in range(MANY):
            os.link(sorted((scenes / folder).iterdir())[i % 2], root / folder / f"{i:05}.png")
    return root


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def reads(process: subprocess.Popen, folder: str) -> bool:
    """Whether the process has a file of a folder of that name open just now."""
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        return any(folder in os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


# A command, what shows that it is at work, and the signal: Ctrl-C reaches loader processes too, SIGTERM the command.
SIGNALS = {
    "train.py": (lambda process, cwd: list(cwd.glob("checkpoint/unet_last.pth")), signal.SIGINT),
    "predict.py": (lambda process, cwd: len(list(cwd.glob("out/*"))) > 20, signal.SIGTERM),
    "evaluate.py": (lambda process, cwd: any(path.read_text() for path in
                                             Path(f"/proc/{process.pid}/task").glob("*/children")), signal.SIGINT),
    "datasets.check": (lambda process, cwd: reads(process, "/many"), signal.SIGTERM),
    "datasets.synthetic": (lambda process, cwd: list(cwd.glob(".*/train_labels/*")), signal.SIGINT),
}


@needs_proc
@pytest.mark.parametrize("command", SIGNALS)
def test_a_signal_leaves_what_is_finished_and_nothing_else(scenes, many, tmp_path, command):
    flags = {"train.py": ("--data_root", scenes, *SMALL, "--epochs", 10_000, "--workers", 1),
             "predict.py": ("--image_dir", many / "val", "--save_dir", "out"),
             "evaluate.py": ("--data_root", many, "--workers", 2), "datasets.check": ("--data_root", many),
             "datasets.synthetic": ("--out", "out", "--size", 96, 72, "--train", 100_000)}[command]
    process, (at_work, number) = start(command, *flags, cwd=tmp_path), SIGNALS[command]
    wait_for(lambda: at_work(process, tmp_path))
    time.sleep(0.1)
    assert process.poll() is None
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, err = finish(process, 128 + number)
    assert err.count("\n") == (4 if command == "train.py" else 1), err
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(process.pid, 0))  # no worker is left
    assert not list(tmp_path.rglob(".*"))
    for path in tmp_path.glob("out/*.png"):
        opened(path)


def test_a_closed_pipe_ends_quietly(scenes, tmp_path, call, monkeypatch):
    """In a process, for what the interpreter says at its end; then the other commands."""
    def closed() -> int:
        read, write = os.pipe()
        os.close(read)
        return write

    process = start("predict.py", "--image_dir", scenes / "val", cwd=tmp_path, stdout=closed())
    assert finish(process, 128 + signal.SIGPIPE)[1] == ""
    for command, *flags in (("train.py", *SMALL), ("evaluate.py",), ("datasets.check",)):
        with open(closed(), "w") as pipe, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", pipe)
            status, _, err = call(command, "--data_root", scenes, *flags)
        assert status == 128 + signal.SIGPIPE and err == ""


def train_until(monkeypatch, call, scenes: Path, epoch: int, action) -> tuple[int, str, str]:
    """Run train.py, and ``action()`` after the updates of an epoch, before its validation."""
    def train_one_epoch(*args, description, **options):
        row = original(*args, description=description, **options)
        if description.startswith(f"epoch {epoch}/"):
            action()
        return row

    original = train.train_one_epoch
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", train_one_epoch)
        return call("train.py", "--data_root", scenes, *SMALL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_says_how_to_go_on(trained, scenes, tmp_path, call, monkeypatch, number):
    """In its second epoch; in the first there is nothing to go on from, but what an earlier run left is untouched."""
    def stop():
        signal.raise_signal(number)

    status, _, err = train_until(monkeypatch, call, scenes, 2, stop)
    *_, hint, typed, _ = err.splitlines()
    assert status == 128 + number and "to go on after the last finished one:" in hint
    assert shlex.split(typed) == ["python", "train.py", "--data_root", *map(str, (scenes, *SMALL)), "--resume", "auto"]
    assert len(torch.load("checkpoint/unet_last.pth", weights_only=True)["training"]["history"]) == 1
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    status, out, err = train_until(monkeypatch, call, scenes, 1, stop)
    assert status == 128 + number and "moved the earlier run" in out and "no epoch was finished" in err
    aside, = (tmp_path / "checkpoint").glob("unet_until_*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before


def test_a_vanished_folder_or_a_lost_loss_end_training_in_one_line(scenes, tmp_path, call, monkeypatch):
    def lose():
        raise NonFiniteLoss(1)

    status, _, err = train_until(monkeypatch, call, scenes, 1, lose)
    named = [path.name for path in (scenes / "train").iterdir() if path.name in err]
    assert status == 1 and err.count("\n") == 1 and "in epoch 1, step 2, with " in err and len(named) == 2
    status, _, err = train_until(monkeypatch, call, scenes, 2, lambda: shutil.rmtree(tmp_path / "checkpoint"))
    assert status == 1 and "train.py: error: checkpoint/unet_" in err and "cannot be written" in err


IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-e", "-c"]
FULL_DISK = """
import os, subprocess, sys, torch, train
from support.command import run_command

def run(epochs):
    sys.argv = ["train.py", *{flags!r}, "--checkpoint", "disk/run", "--resume", "auto", "--epochs", str(epochs)]
    return run_command(train.main, train.get_args_parser())

def epoch():
    assert not [name for name in os.listdir("disk/run") if name.startswith(".")]
    return len(torch.load("disk/run/unet_last.pth", weights_only=True)["training"]["history"])

assert run(1) == 0
for left in (64, 0):  # kilobytes: enough for the log alone, or for nothing
    with open("disk/filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs("disk").f_bavail * os.statvfs("disk").f_bsize - 1024 * left)
    assert run(2) == 1 and epoch() == 1
    os.remove("disk/filler")
subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
assert run(2) == 1
subprocess.run(["mount", "-o", "remount,rw", "disk"], check=True)
assert run(2) == 0 and epoch() == 2
"""


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run([*IN_A_NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True).returncode != 0
                    if shutil.which("unshare") else True, reason="needs a private file system")
def test_a_full_and_a_read_only_disk_keep_the_last_checkpoint(scenes, tmp_path):
    code = FULL_DISK.format(flags=["--data_root", str(scenes), *map(str, SMALL)])
    script = f"mkdir disk; mount -t tmpfs -o size=20m none disk; exec {sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run([*IN_A_NAMESPACE, script], cwd=tmp_path, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"PYTHONPATH": str(REPO)})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    weights, full, read_only = [line for line in done.stderr.splitlines() if "error: disk/run" in line]
    assert ".pth: cannot be written" in weights and "No space left" in full and "Read-only" in read_only


def resident(process: int) -> int:
    """The bytes that a process has in memory."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_proc
@pytest.mark.slow
def test_prediction_of_many_files_stays_flat_and_goes_on_where_it_was_killed(trained, many, tmp_path):
    """1,500 small images stand for the 10,000 that are promised: a picture that stays in memory would add 20 kB each,
    30 MB in all, an open file one descriptor.
    """
    flags = ("--image_dir", many / "val", "--save_dir", "out", "--no-overlay", "--skip_existing", "--checkpoint",
             trained / "checkpoint" / "unet_best.pth")
    process = start("predict.py", *flags, cwd=tmp_path)
    wait_for(lambda: len(os.listdir(tmp_path / "out") if (tmp_path / "out").is_dir() else ()) > 50)
    process.kill()
    process.communicate()
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*_mask.png")}
    process = start("predict.py", *flags, cwd=tmp_path)
    memory, files = [], []
    while process.poll() is None:
        if len(there) + 200 < len(os.listdir(tmp_path / "out")) < MANY - 20:
            memory.append(resident(process.pid))
            files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
            if files[-1] >= 64:
                process.kill()
        time.sleep(0.02)
    assert f"{len(there)} of {MANY} images have their pictures already" in finish(process)[0]
    masks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*_mask.png")}
    assert len(masks) == MANY and there.items() <= masks.items() and not list(tmp_path.glob("out/.*"))
    assert len(memory) > 10 and max(memory) < memory[0] + 10e6
