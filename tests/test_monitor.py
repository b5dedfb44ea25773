"""What a run shows of itself: a panel and curves after every validation, and TensorBoard's files."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from runtime import run_command

REPO = Path(__file__).parents[1]
FLAGS = ("--width", "4", "--crop_size", "64", "--step_size", "1", "--workers", "0", "--device", "cpu")


@pytest.mark.slow
def test_tensorboard_holds_every_epoch_once_and_the_pictures(scenes, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for flags in (("--epochs", "1"), ("--epochs", "3", "--resume", "auto")):
        command = [sys.executable, REPO / "train.py", "--data_root", scenes, *FLAGS, "--tensorboard", *flags]
        done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    events = accumulator.EventAccumulator(str(tmp_path / "checkpoint" / "unet_tensorboard"))
    events.Reload()
    for key in ("train_loss", "val_loss", "val_miou", "lr", "images_per_second"):
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3]
    log = (tmp_path / "checkpoint" / "unet_log.csv").read_text().splitlines()
    column = log[0].split(",").index("val_miou")
    assert [event.value for event in events.Scalars("val_miou")] == pytest.approx(
        [float(line.split(",")[column]) for line in log[1:]], abs=1e-5)
    picture = events.Images("photograph, label, prediction")[-1]
    with Image.open(tmp_path / "checkpoint" / "unet_panel.png") as panel:
        assert (picture.width, picture.height) == panel.size == (3 * 96, 2 * 72)  # two frames are all there are
        left = np.asarray(panel)[:72, :96]
    with Image.open(min((scenes / "val").iterdir())) as photo:
        assert (left == np.asarray(photo)).all()


def test_without_tensorboard_one_line_says_what_to_install(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_root", str(scenes), *FLAGS, "--tensorboard"])
    assert run_command(train.main, train.get_args_parser()) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
