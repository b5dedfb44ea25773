"""The one way to write: whole, over files alone, under names that nobody can guess, and one run a folder."""
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, SMALL, limited

from inference.video import write_video
from support import files
from support.command import RunError, UserError
from support.files import atomic_folder, atomic_path, locked, write_file
from training.checkpoints import save_checkpoint
from training.run import RunFiles

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and limits as on POSIX systems")


def put(path: Path, text: str = "new") -> None:
    write_file(path, lambda temporary: temporary.write_text(text))


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


# What stands where a file is to be written, and what is said of it, if it is refused.
PLACES = {
    "nothing": (lambda path: None, None), "a file": (lambda path: path.write_text("old"), None),
    "a link to a file": (lambda path: path.symlink_to("other"), None),
    "a link to nothing": (lambda path: path.symlink_to("gone"), None),
    "a folder": (Path.mkdir, "not a file"), "a socket": (bind, "not a file"),
    "a pipe": (lambda path: os.mkfifo(path), "not a file"),
    "a device": (lambda path: path.symlink_to(os.devnull), "not a file"),
    "itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "x" * 256: (lambda path: None, "too long"), "gone/below": (lambda path: None, "No such"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_file_is_written_over_a_file_or_nothing(tmp_path, monkeypatch, name):
    """The link goes, what it leads to stays. Permissions are those of any new file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("other")
    path, (make, said) = tmp_path / name, PLACES[name]
    make(path)
    before = sorted(os.listdir(tmp_path))
    if said:
        with pytest.raises(UserError, match=rf"\A[^\n]*{said}[^\n]*\Z"):
            put(path)
        assert sorted(os.listdir(tmp_path)) == before
    else:
        put(path)
        assert path.read_text() == "new" and not path.is_symlink() and len(os.listdir(tmp_path)) == 2
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "other").read_text() == "other"


def test_nobody_can_guess_where_a_file_is_written_and_what_is_there_is_not_followed(tmp_path, monkeypatch):
    names = set()
    for _ in range(100):
        with atomic_path(tmp_path / "a.png") as temporary:
            names.add(temporary.name)
    assert len(names) == 100 and all(name.endswith(".png") for name in names)
    (tmp_path / "victim").write_text("old")
    (tmp_path / ".unfinished-0").symlink_to("victim")
    (tmp_path / ".lock").symlink_to("victim")
    monkeypatch.setattr(files, "unfinished_path", lambda folder, suffix="": folder / ".unfinished-0")
    with pytest.raises(RunError, match="exists"):
        put(tmp_path / "b")
    with pytest.raises(RunError, match="cannot be locked"), locked(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_a_file_system_has_no_locks_a_folder_is_used_with_a_warning(tmp_path, monkeypatch, capsys, number):
    def no_locks(*args):
        raise OSError(number, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path / "d"):
        pass
    assert "cannot be locked (no locks here); keep other runs out" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_video_on_a_full_disk_is_a_failure(tmp_path, share):
    frames, path = np.random.default_rng(0).integers(0, 256, (9, 72, 96, 3), dtype=np.uint8), tmp_path / "out.mp4"
    assert write_video(path, iter(frames), (72, 96), 25) == 9
    whole = path.read_bytes()
    with limited("FSIZE", int(share * len(whole))), pytest.raises(RunError, match=r"out.mp4: cannot be written"):
        write_video(path, iter(frames), (72, 96), 25)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == whole


def test_a_checkpoint_that_is_not_written_says_why(tmp_path, monkeypatch):
    def save(state, file, save=torch.save):
        save(state, file)
        raise RuntimeError("DataLoader worker is killed")  # by a signal, in the midst of anything

    with limited("FSIZE", 1000), pytest.raises(RunError, match="last.pth: cannot be written .File too large"):
        save_checkpoint(tmp_path / "last.pth", {"weights": torch.zeros(1000)})  # as on a full disk
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="worker is killed"):
        save_checkpoint(tmp_path / "last.pth", {"weights": torch.zeros(1000)})
    assert not os.listdir(tmp_path)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a file may be left to the interpreter to close
def test_ctrl_c_at_any_line_of_saving_is_ctrl_c_and_leaves_a_whole_file(tmp_path):
    """At every line of our code and of torch's, one after another, until none is left to interrupt."""
    path, ended = tmp_path / "last.pth", 0
    save_checkpoint(path, {"weights": torch.zeros(10)})
    for moment in range(100_000):
        lines = iter(range(moment))

        def interrupt(frame, event, value, lines=lines):
            swallows = frame.f_globals["__name__"] == "copyreg"  # by an except of all
            if event == "line" and next(lines, None) is None and not swallows:
                sys.settrace(None)
                raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            save_checkpoint(path, {"weights": torch.ones(10)})
            break
        except KeyboardInterrupt:
            ended += 1
        finally:
            sys.settrace(None)
        assert os.listdir(tmp_path) == [path.name] and len(torch.load(path, weights_only=True)["weights"]) == 10
    assert ended > 300 and torch.load(path, weights_only=True)["weights"].all()


# Ten processes at the same instant: each that gets in notes it, stays, and notes when it leaves.
RUSH = """
import os, sys, time
from pathlib import Path
from support.command import UserError
from support.files import locked
log, folder, patience = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), Path("shared"), float(sys.argv[1])
for i in range(9):
    if os.fork() == 0:
        break
try:
    with locked(folder, patience):
        os.write(log, b"in ")
        (folder / "written").touch()
        time.sleep(0.05 if patience > 9 else 3)
        os.write(log, b"out ")
except UserError as error:
    os.write(log, b"refused " if "in use by process" in str(error) and "-c" in str(error) else b"wrong ")
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


@pytest.mark.parametrize("patience", [30, 1])
def test_one_process_at_a_time_holds_a_folder(tmp_path, patience):
    subprocess.run([sys.executable, "-c", RUSH, str(patience)], cwd=tmp_path, timeout=120, check=True,
                   env=os.environ | {"PYTHONPATH": str(REPO)})
    log = (tmp_path / "log").read_text().split()
    assert log == ["in", "out"] * 10 if patience == 30 else sorted(log) == ["in", "out", *["refused"] * 9]


def test_a_killed_run_lets_go_and_the_next_clears_what_it_left(tmp_path):
    code = ("import os, sys; from pathlib import Path; from support.files import *\nwith locked(Path('d')):\n"
            " with atomic_path(Path('d/a')):\n  (Path('d') / f'{UNFINISHED}b').mkdir(); print('in', flush=True)\n"
            "  os.fork(); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid} on "), locked(tmp_path / "d"):
        pass
    process.kill()
    process.wait()
    assert len(os.listdir(tmp_path / "d")) == 3
    with locked(tmp_path / "d"):  # its child lives on
        assert os.listdir(tmp_path / "d") == [".lock"]
    process.communicate()


@pytest.mark.parametrize("kind", ["new", "empty", "a link"])
def test_a_folder_is_filled_whole_or_left_as_it_was(tmp_path, kind):
    """A mounted disk and a link can be filled, but not replaced."""
    path = tmp_path / "data"
    (tmp_path / "disk").mkdir()
    if kind != "new":
        path.symlink_to("disk") if kind == "a link" else path.mkdir()
    inode = path.exists() and path.stat().st_ino
    for failure in (KeyboardInterrupt, None):
        try:
            with atomic_folder(path) as folder:
                (folder / "train").mkdir()
                if failure:
                    raise failure
        except KeyboardInterrupt:
            assert path.exists() == (kind != "new") and not list(path.glob("[!.]*"))
    assert sorted(os.listdir(path)) == [".lock", "train"] and path.stat().st_ino == (inode or path.stat().st_ino)
    with pytest.raises(UserError, match="not an empty folder"), atomic_folder(path):
        pass


def test_runs_set_aside_within_a_second_or_after_the_clock_went_back_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "2001-01-01_000000")
    for i in range(12):
        (tmp_path / "unet_best.pth").write_text(str(i))
        RunFiles(tmp_path, "unet").set_aside()
    assert sorted(int(path.read_text()) for path in tmp_path.glob("unet_until_*/unet_best.pth")) == [*range(12)]


@pytest.mark.parametrize("command", ["train.py", "predict.py"])
def test_the_second_run_in_a_folder_is_refused_and_says_who_is_there(scenes, tmp_path, call, command):
    folder = tmp_path / "shared"
    flags = ("--data_root", scenes, *SMALL, "--checkpoint") if command == "train.py" else (
        "--image_dir", scenes / "val", "--save_dir")
    code = f"from support.files import *\nwith locked(Path({str(folder)!r})): print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(REPO)})
    process.stdout.readline()
    status, _, err = call(command, *flags, folder)
    assert status == 2 and err.count("\n") == 1 and f"in use by process {process.pid} on " in err
    process.communicate(b"\n")
    assert call(command, *flags, folder)[0] == 0
