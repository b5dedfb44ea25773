"""Files are written whole or not at all, and one run at a time uses a folder."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import REPO, SMALL

from support.command import UserError
from support.files import atomic_folder, atomic_path, locked, make_folder, write_file

STAY = """
import sys
from support.files import *
with locked(Path("shared")), atomic_path(Path("shared/half")) as path:
    path.write_text("half")
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that uses the folder ``shared`` until its stdin is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    env = os.environ | {"PYTHONPATH": str(REPO)}
    with subprocess.Popen([sys.executable, "-c", STAY], cwd=tmp_path, env=env, **pipes) as process:
        assert process.stdout.readline() == b"in\n"
        yield process


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(), UserError("bad")])
def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, failure):
    path = tmp_path / "last.pth"
    write_file(path, lambda temporary: temporary.write_text("old"))
    kinds = (KeyboardInterrupt, UserError)
    with pytest.raises(kinds), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["last.pth"]
    write_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["folder", "missing/file", "file/below"])
def test_what_cannot_be_written_is_one_sentence(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"\A{tmp_path / name}: .*\Z"):
        write_file(tmp_path / name, lambda temporary: temporary.write_text("new"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("kind", ["new", "empty"])
def test_a_folder_is_filled_whole_or_left_as_it_was(tmp_path, kind):
    path = tmp_path / "data"
    if kind == "empty":
        path.mkdir()
    before = os.listdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as folder:
        (folder / "train").mkdir()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == before
    with atomic_folder(path) as folder:
        (folder / "train").mkdir()
    assert os.listdir(path) == ["train"]
    with pytest.raises(UserError), atomic_folder(path):
        pass
    with pytest.raises(UserError):
        make_folder(tmp_path / "data" / "train" / ("x" * 256))


@pytest.mark.parametrize(
    "command, flag, split, folder",
    [
        ("train.py", "--data_root", "", "--checkpoint"),
        ("predict.py", "--image_dir", "val", "--save_dir"),
    ],
)
def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(
    scenes, tmp_path, call, other_run, command, flag, split, folder
):
    small = SMALL if command == "train.py" else ()
    typed = (command, flag, scenes / split, *small, folder, "shared")
    status, _, err = call(*typed)
    assert status == 2
    assert "shared is in use" in err
    other_run.communicate()
    assert call(*typed)[0] == 0


def test_a_killed_run_releases_its_folder_and_the_next_removes_what_it_left(tmp_path, other_run):
    other_run.send_signal(signal.SIGTERM)
    other_run.wait()
    assert (tmp_path / "shared" / ".unfinished-half").exists()
    with locked(tmp_path / "shared"):
        assert os.listdir(tmp_path / "shared") == [".lock"]
