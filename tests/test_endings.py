"""How commands end when they are stopped, nobody reads what they print, or the disk is full; what memory they take."""
import importlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, SMALL, finish, load, opened, start, wait_for
from PIL import Image

import train
from support.command import Parser, run_command
from support.images import open_image
from training.checkpoints import SHIPPED
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


# A command, what shows that it is at work (a file that it wrote, both workers, because importing starts a process too,
# or that it has an image open just now), and the signal: Ctrl-C reaches workers too, SIGTERM the command alone.
@needs_proc
@pytest.mark.parametrize("typed, at_work, number", [
    (f"train.py --data_root SCENES {' '.join(map(str, SMALL))} --epochs 10000 --workers 1",
     lambda cwd, proc: (cwd / "checkpoint" / "unet_last.pth").exists(), signal.SIGINT),
    ("predict.py --image_dir MANY/val --save_dir out",
     lambda cwd, proc: len(list(cwd.glob("out/*"))) > 20, signal.SIGTERM),
    ("evaluate.py --data_root MANY --workers 2",
     lambda cwd, proc: sum(len(path.read_text().split()) for path in proc.glob("task/*/children")) == 2, signal.SIGINT),
    ("datasets.check --data_root MANY",
     lambda cwd, proc: any("/many" in os.path.realpath(path) for path in proc.glob("fd/*")), signal.SIGTERM),
    ("datasets.synthetic --out out --size 96 72 --train 100000",
     lambda cwd, proc: list(cwd.glob("out/.*/train_labels/*")), signal.SIGINT)])
def test_a_signal_leaves_what_is_finished_and_nothing_else(scenes, many, tmp_path, typed, at_work, number):
    words = [word.replace("SCENES", str(scenes)).replace("MANY", str(many)) for word in typed.split()]
    process = start(*words, cwd=tmp_path)
    wait_for(lambda: at_work(tmp_path, Path(f"/proc/{process.pid}")))
    time.sleep(0.5)  # for workers to have started
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, err = finish(process, 128 + number)
    assert err.count("\n") == (4 if "train.py" in typed else 1), err
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(process.pid, 0))  # no worker is left
    assert not list(tmp_path.rglob(".unfinished*"))
    for path in tmp_path.glob("out/*.png"):
        opened(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_an_import(tmp_path, monkeypatch, capsys, number):
    """A module written in C could turn it into an ImportError, and break at the interpreter's end."""
    (tmp_path / f"library{number}.py").write_text(
        f"import signal, time\ntry:\n    signal.raise_signal({number})\n    time.sleep(0.2)\nexcept BaseException:\n"
        "    raise ImportError('initialization failed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prog"])

    def work(args):
        importlib.import_module(f"library{number}")
        time.sleep(10)

    assert run_command(work, Parser(prog="prog")) == 128 + number and f"library{number}" in sys.modules
    assert capsys.readouterr().err == f"prog: {'interrupted' if number == signal.SIGINT else 'terminated'}\n"


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
    validate, epochs = train.validate, iter((1, 2))

    def act_and_validate(*args):
        if next(epochs) == epoch:
            action()
        return validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", act_and_validate)
        return call("train.py", "--data_root", scenes, *SMALL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_says_how_to_go_on(trained, scenes, tmp_path, call, monkeypatch, number):
    """In its second epoch; in the first there is nothing to go on from, but what an earlier run left is untouched."""
    status, _, err = train_until(monkeypatch, call, scenes, 2, lambda: signal.raise_signal(number))
    *_, hint, typed, _ = err.splitlines()
    assert status == 128 + number and "add to the same command:" in hint
    assert shlex.split(typed) == ["--resume", "checkpoint/unet_last.pth"]
    assert len(load(tmp_path)["training"]["history"]) == 1
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").glob("[!.]*")}
    status, out, err = train_until(monkeypatch, call, scenes, 1, lambda: signal.raise_signal(number))
    assert status == 128 + number and "moved the earlier run" in out and "no epoch was finished" in err
    aside, = (tmp_path / "checkpoint").glob("unet_until_*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    # Its own best weights, where a fine-tuning began, are among what has moved.
    resume = "--init_from", "checkpoint/unet_best.pth", "--resume", aside / "unet_last.pth"
    assert "resumed after epoch 1" in call("train.py", "--data_root", scenes, *SMALL, *resume)[1]


def test_a_vanished_folder_or_a_lost_loss_end_training_in_one_line(scenes, tmp_path, call, monkeypatch):
    def lose():
        raise NonFiniteLoss(1)

    status, _, err = train_until(monkeypatch, call, scenes, 1, lose)
    assert status == 1 and err.count("\n") == 1 and "in epoch 1, step 2, with " in err
    assert [i for i, path in enumerate(sorted((scenes / "train").iterdir())) if path.name in err] == [0, 2]
    status, _, err = train_until(monkeypatch, call, scenes, 2, lambda: shutil.rmtree(tmp_path / "checkpoint"))
    assert status == 1 and "train.py: error: checkpoint/unet_" in err and "cannot be written" in err


IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-e", "-c"]
FULL_DISK = """
import os, subprocess, sys, torch, train
from support.command import run_command

def run(epochs):
    sys.argv = ["train.py", *{flags!r}, "--checkpoint", "disk/run", "--resume", "auto", "--epochs", str(epochs)]
    status = run_command(train.main, train.get_args_parser())
    assert not [name for name in os.listdir("disk/run") if name.startswith(".unfinished")]
    return status, len(torch.load("disk/run/unet_last.pth")["training"]["history"])

assert run(1) == (0, 1)
for left in (64, 0):  # kilobytes: enough for the log alone, or for nothing
    with open("disk/filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs("disk").f_bavail * os.statvfs("disk").f_bsize - 1024 * left)
    assert run(2) == (1, 1)
    os.remove("disk/filler")
subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
assert run(2) == (1, 1)
subprocess.run(["mount", "-o", "remount,rw", "disk"], check=True)
assert run(2) == (0, 2)
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
    assert ".pth: cannot be written (No space" in weights and "No space left" in full and "Read-only" in read_only


@needs_proc
@pytest.mark.slow
def test_prediction_of_many_files_stays_flat_and_goes_on_where_it_was_killed(trained, many, tmp_path):
    """1,500 small images stand for the 10,000 that are promised: a picture that stays in memory would add 20 kB each,
    30 MB in all, an open file one descriptor.
    """
    flags = ("--image_dir", many / "val", "--save_dir", "out", "--no-overlay", "--skip_existing", "--checkpoint",
             trained / "checkpoint" / "unet_best.pth")
    process = start("predict.py", *flags, cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("out/*"))) > 50)
    process.kill()
    process.communicate()
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*_mask.png")}
    process, memory = start("predict.py", *flags, cwd=tmp_path), []
    while process.poll() is None:
        if len(there) + 200 < len(os.listdir(tmp_path / "out")) < MANY - 20:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])  # in memory
            memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
            if len(os.listdir(f"/proc/{process.pid}/fd")) >= 64:
                process.kill()
        time.sleep(0.02)
    assert f"{len(there)} of {MANY} images have their pictures already" in finish(process)[0]
    masks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*_mask.png")}
    assert len(masks) == MANY and there.items() <= masks.items() and not list(tmp_path.glob("out/.unfinished*"))
    assert len(memory) > 10 and max(memory) < memory[0] + 10e6


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("size, max_side", [((11_000, 8_000), 480), ((11_000, 8_000), 2000), ((88_000, 1000), 480)])
def test_a_photograph_of_88_megapixels_takes_less_than_two_gigabytes(tmp_path, size, max_side):
    image = Image.linear_gradient("L").resize(size).convert("RGBA")
    image.save(tmp_path / "photo.png", compress_level=1)
    process = start("predict.py", "--image_dir", "photo.png", "--save_dir", "out", "--checkpoint", SHIPPED,
                    "--max_side", max_side, cwd=tmp_path)
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:  # not wait4's peak: a started program inherits that of the one which started it
        known = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())  # of a process that has just ended nothing
        peak = int(known[1]) * 1024 if known else peak
        time.sleep(0.02)
    assert process.returncode == 0 and 5e8 < peak < 2e9
    assert open_image(tmp_path / "out" / "photo_overlay.png").size == image.size
    finish(process)


MEASURE = """
import torch
from support.device import keep_freed_memory
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
keep_freed_memory()
before = resident()
torch.ones(60_000_000)
assert resident() > before + 200e6
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    subprocess.run([sys.executable, "-c", MEASURE], cwd=REPO, check=True)
