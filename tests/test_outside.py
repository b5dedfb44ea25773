"""What the system and the libraries refuse ends in one line and an exit status, in every command, at every moment."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, SMALL, limited, load
from PIL import Image

from datasets.camvid import CamVidDataset
from support.command import Parser, RunError, UserError, run_command
from support.images import read_image

resource = pytest.importorskip("resource", reason="signals and limits as on POSIX systems")
COMMANDS = ("train.py", "evaluate.py", "predict.py", "export.py", "datasets.check", "datasets.download",
            "datasets.synthetic")
INTERRUPT = "import signal\ntry:\n    signal.raise_signal(2)\nexcept BaseException:\n    pass"


@pytest.mark.parametrize("command, happens, status, said", [
    *((command, INTERRUPT, 130, "interrupted") for command in COMMANDS),
    ("predict.py", "raise MemoryError", 1, "out of memory"), ("predict.py", "import missing", 1, "pip install -r"),
    ("predict.py", "raise OSError(24, 'Too many open files', 'lib\x1b.so')", 1, r"lib\x1b.so: Too many open files"),
    ("predict.py", "raise ImportError('lib.so: failed to map segment from shared object')", 1, "out of memory")])
def test_what_happens_during_the_imports_is_one_line(tmp_path, command, happens, status, said):
    """A library may catch what is raised in it."""
    (tmp_path / "numpy.py").write_text(happens)
    name, *program = command.rpartition(".")[2] + ".py", "-m", command
    if command.endswith(".py"):
        name, program = command, [REPO / command]
    done = subprocess.run([sys.executable, *program], env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPO}"}, text=True,
                          cwd=tmp_path, capture_output=True)
    assert done.returncode == status and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{name}: ") and said in done.stderr


@pytest.mark.parametrize("error, status, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more"), 1, "out of memory; lower"),
    (RuntimeError("could not create a primitive"), 1, "out of memory; lower"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in config.cpp.cxx"), 1, "--compile needs a C++"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 1, "out of memory; lower"),
    (ConnectionResetError(104, "Connection reset by peer"), 1, "a process that loads data was lost"),
    (RuntimeError("[gloo/tcp/pair.cc:534] Connection closed by peer [::1]:80"), 1, "another process of this run"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. Out of shared memory."), 1, "/dev/shm"),
    (RuntimeError("unable to write to file </torch_7_0>: No space left on device (28)"), 1, "/dev/shm; lower"),
    (OSError(13, "Permission denied", "a\nb"), 1, r"a\nb: Permission denied"), (OSError("a\nb"), 1, "a b"),
    (UserError("a\x1b\n\udcff\u202e b"), 2, r"error: a\x1b\n\udcff\u202e b"), (RunError("a"), 1, "error: a"),
    (TypeError("a fault of this program"), 1, "Traceback")])
def test_what_fails_outside_is_one_line(capsys, monkeypatch, error, status, said):
    class Loader:
        def __del__(self):
            raise RuntimeError("the same once more")

    def fail(args):
        loader = Loader()  # noqa: F841
        raise error

    more: list = []
    monkeypatch.setattr(sys, "unraisablehook", more.append)
    monkeypatch.setattr(sys, "argv", ["prog"])
    assert run_command(fail, Parser(prog="prog")) == status and not more and sys.unraisablehook == more.append
    err = capsys.readouterr().err
    assert said in err and ("Traceback" in said or err.startswith("prog: error: ") and err.count("\n") == 1)


@pytest.mark.parametrize("fault, status, said", [
    (lambda *_: os.kill(os.getpid(), signal.SIGKILL), 1, "was lost"),
    (lambda *_: os.kill(os.getpid(), signal.SIGBUS), 1, "or /dev/shm; lower --workers"),
    (lambda *_: torch.empty(1 << 60), 1, "out of memory"), (lambda *_: np.empty(1 << 50), 1, "out of memory"),
    (lambda *_: read_image(Path("a\x1b\nb.png")), 2, r"a\x1b\nb.png: cannot be read"),
    (lambda *_: open("gone"), 1, "No such file or directory: 'gone'")])
def test_a_fault_in_a_loaders_process_is_one_line(scenes, call, monkeypatch, fault, status, said):
    monkeypatch.setattr(CamVidDataset, "__getitem__", fault)
    got, _, err = call("train.py", "--data_root", scenes, *SMALL, "--workers", 1)
    assert got == status and err.count("\n") == 1 and said in err and "error: " in err


def test_a_process_that_a_loader_forgot_delays_the_end_but_does_not_prevent_it():
    code = ("from torch.utils.data import DataLoader; from support.device import init_worker\n"
            "class Cycle: pass\n"
            "it = iter(DataLoader([1, 2], num_workers=1, worker_init_fn=init_worker)); next(it)\n"
            "cycle = Cycle(); cycle.it, cycle.itself = it, cycle")
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPO)}, timeout=60, check=True)


def test_too_little_memory_is_one_line(scenes, trained, tmp_path, call):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "large.png")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with limited("AS", pages * resource.getpagesize() + 300_000_000):
        status, _, err = call("predict.py", "--image_dir", "large.png", "--tile", 9999, "--max_side", 0, "--device",
                              "cpu", "--checkpoint", trained / "checkpoint" / "unet_best.pth")
    assert status == 1 and err.count("\n") == 1 and "out of memory; lower" in err
    assert not (tmp_path / "predictions").exists()


def test_streams_that_are_closed_or_full_end_no_command(scenes, tmp_path, call, monkeypatch):
    command = f"exec {sys.executable} -m datasets.synthetic --out out --train 1 --val 1 --test 1 --size 40 30"
    done = subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(REPO)})
    assert done.returncode == 0 and len(list(tmp_path.glob("out/*/*.png"))) == 6
    for stream, status, said in (("stdout", 1, "not everything could be printed (No space left"), ("stderr", 0, "")):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, stream, full)
            got, _, err = call("train.py", "--data_root", scenes, *SMALL, "--workers", 1)
        assert got == status and said in err and len(load(tmp_path)["training"]["history"]) == 2
