"""What a run shows of itself: a panel and curves after every validation, and TensorBoard's files."""
import csv
import sys

import numpy as np
import pytest
from PIL import Image

import train
from support.command import run_command


def run(scenes, folder, monkeypatch, *flags) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_root", str(scenes), "--width", "4", "--crop_size", "64",
                                      "--step_size", "1", "--workers", "0", "--device", "cpu", "--tensorboard", *flags])
    return run_command(train.main, train.get_args_parser())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore::UserWarning:google")
def test_tensorboard_holds_every_epoch_once_and_the_pictures(scenes, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for flags in (("--epochs", "1"), ("--epochs", "3", "--resume", "auto")):
        assert run(scenes, tmp_path, monkeypatch, *flags) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "checkpoint" / "unet_tensorboard"))
    events.Reload()
    for key in ("train_loss", "val_loss", "val_miou", "lr", "images_per_second"):
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3]
    rows = csv.DictReader((tmp_path / "checkpoint" / "unet_log.csv").read_text().splitlines())
    logged = [float(row["val_miou"]) for row in rows]
    assert [event.value for event in events.Scalars("val_miou")] == pytest.approx(logged, abs=1e-5)
    picture = events.Images("image, mask, prediction")[-1]
    with Image.open(tmp_path / "checkpoint" / "unet_panel.png") as panel:
        assert (picture.width, picture.height) == panel.size == (3 * 96, 2 * 72)  # two images are all there are
        left = np.asarray(panel)[:72, :96]
    with Image.open(min((scenes / "val").iterdir())) as image:
        assert (left == np.asarray(image)).all()


def test_without_tensorboard_one_line_says_what_to_install(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(scenes, tmp_path, monkeypatch) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
