import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PALETTE, compare_per_class
from PIL import Image

from datasets import synthetic
from datasets.synthetic import generate_dataset, generate_scene
from support.command import UserError, run_command

VOID, SKY, ROAD = 0, 1, 4


@pytest.fixture(scope="module")
def twenty() -> tuple[np.ndarray, np.ndarray]:
    """(20, 120, 160, 3) images and (20, 120, 160) ids."""
    scenes = [generate_scene(seed, 160, 120) for seed in range(20)]
    return np.stack([np.array(image) for image, _ in scenes]), np.stack([ids for _, ids in scenes])


@pytest.mark.parametrize("size", [(96, 72), (61, 47), (40, 90), ()])
def test_sizes_and_types(size):
    image, ids = generate_scene(3, *size)
    assert image.mode == "RGB" and image.size == ids.shape[::-1] == (size or (480, 360))
    assert ids.dtype == np.uint8 and ids.max() < 12


def test_every_seed_gives_another_scene(twenty):
    for values, least in zip(twenty, (0.5, 0.1)):
        assert all((values[i] != values[j]).mean() > least for i in range(20) for j in range(i))


def test_the_classes_are_there_and_in_their_places(twenty):
    _, masks = twenty
    assert min(((masks == i).sum((1, 2)) >= 4).sum() for i in range(12)) >= 5
    share = np.bincount(masks.ravel(), minlength=12) / masks.size
    assert share.max() < 0.6 and share[VOID] < 0.1
    for ids in masks:
        sky, road = (np.nonzero(ids == i)[0] for i in (SKY, ROAD))
        assert not len(sky) or sky.mean() + 20 < road.mean()
        assert (ids[-20:] == ROAD).mean() > 0.2 and (ids[:40] == ROAD).mean() < 0.05


def test_colour_alone_tells_something_but_not_the_class(twenty):
    """The nearest mean colour, fitted to the very same pixels: better than nothing, far from enough."""
    pixels, ids = twenty[0][:, ::3, ::3].reshape(-1, 3).astype(np.float32), twenty[1][:, ::3, ::3].ravel()
    means = np.stack([pixels[ids == i].mean(0) for i in range(12)])
    guess = ((pixels[:, None] - means) ** 2).sum(2).argmin(1)
    assert 1.2 / 12 < np.mean([(guess[ids == i] == i).mean() for i in range(1, 12)]) < 0.6


def test_image_and_mask_agree_about_outlines(twenty):
    """Brightness changes more across the mask's outlines than elsewhere, and more than across shifted outlines."""
    outline, step = np.diff(twenty[1].astype(int)) != 0, np.abs(np.diff(twenty[0].mean(3)))
    assert step[outline].mean() > 1.5 * step[~outline].mean()
    assert step[outline].mean() > 1.3 * step[np.roll(outline, 8, 2)].mean()


def test_command_writes_the_same_in_another_process(scenes, tmp_path):
    command = [sys.executable, "-m", "datasets.synthetic", "--out", tmp_path / "new" / "data", "--size", "96", "72",
               "--train", "4", "--val", "2", "--test", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(synthetic.__file__).parents[1])
    assert done.returncode == 0 and done.stderr == "" and "8 scenes" in done.stdout
    files, again = ({path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}
                    for root in (scenes, tmp_path / "new" / "data"))
    names = [f"{split}/scene_{i:04d}.png" for split, n in (("train", 4), ("val", 2), ("test", 2)) for i in range(n)]
    assert files == again and set(files) == {*names, *(name.replace("/", "_labels/") for name in names)}
    assert len({files[name] for name in names}) == 8  # no scene is in two splits
    for seed, name in enumerate(names):
        image, ids = generate_scene(seed, 96, 72)
        assert (np.array(Image.open(scenes / name)) == np.array(image)).all()
        mask = np.array(Image.open(scenes / name.replace("/", "_labels/")))
        assert (compare_per_class(mask, PALETTE) == ids).all()


@pytest.mark.parametrize("taken, out", [("data/.keep", "data"), ("data/train/0.png", "data"), ("data", "data"),
                                        ("data", "data/deeper")])
def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys, taken, out):
    taken, out = tmp_path / taken, tmp_path / out
    taken.parent.mkdir(parents=True, exist_ok=True)
    taken.write_text("mine")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError):
        generate_dataset(out, {"train": 1}, (16, 12))
    monkeypatch.setattr(sys, "argv", ["synthetic", "--out", str(out), "--train", "1"])
    assert run_command(synthetic.main, synthetic.get_args_parser()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "data") in error
    assert set(tmp_path.rglob("*")) == before and taken.read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    generate_dataset(tmp_path, {"val": 1}, (16, 12))
    assert len(list(tmp_path.glob("val*/*.png"))) == 2
