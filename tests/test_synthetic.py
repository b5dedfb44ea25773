import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PALETTE, compare_per_class
from PIL import Image

from datasets import synthetic
from datasets.synthetic import generate_dataset, generate_scene
from runtime import UserError, run_command

SKY, ROAD, VOID = 1, 4, 0


@pytest.fixture(scope="module")
def twenty() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array(photo), ids) for photo, ids in (generate_scene(seed, 160, 120) for seed in range(20))]


@pytest.mark.parametrize("size", [(96, 72), (160, 120), (61, 47), (40, 90)])
def test_sizes_and_types(size):
    photo, ids = generate_scene(3, *size)
    assert photo.mode == "RGB" and photo.size == size
    assert ids.shape == size[::-1] and ids.dtype == np.uint8 and ids.max() < 12
    assert generate_scene(3)[0].size == (480, 360)


def test_the_seed_is_all_that_matters(twenty):
    np.random.seed(1)
    again = [generate_scene(seed, 160, 120) for seed in (7, 2)]
    for (photo, ids), seed in zip(again, (7, 2)):
        assert (np.array(photo) == twenty[seed][0]).all() and (ids == twenty[seed][1]).all()
    for i, (photo, ids) in enumerate(twenty):
        for other_photo, other_ids in twenty[:i]:
            assert (photo != other_photo).mean() > 0.5 and (ids != other_ids).mean() > 0.1


def test_all_12_classes_are_there(twenty):
    scenes_with = [sum((ids == i).sum() >= 4 for _, ids in twenty) for i in range(12)]
    assert min(scenes_with) >= 5
    share = np.bincount(np.concatenate([ids.ravel() for _, ids in twenty]), minlength=12) / (20 * 160 * 120)
    assert share.max() < 0.6 and share[VOID] < 0.1


def test_the_sky_is_above_and_the_road_below(twenty):
    for _, ids in twenty:
        rows = {i: np.nonzero(ids == i)[0] for i in (SKY, ROAD)}
        if len(rows[SKY]):
            assert rows[SKY].mean() + 20 < rows[ROAD].mean()
        assert (ids[-20:] == ROAD).mean() > 0.2 and (ids[:40] == ROAD).mean() < 0.05


def test_colour_alone_tells_something_but_not_the_class(twenty):
    """The nearest mean colour, fitted to the very same pixels: better than nothing, far from enough."""
    pixels = np.concatenate([photo[::3, ::3].reshape(-1, 3) for photo, _ in twenty]).astype(np.float32)
    ids = np.concatenate([ids[::3, ::3].ravel() for _, ids in twenty])
    means = np.stack([pixels[ids == i].mean(0) for i in range(12)])
    guess = ((pixels[:, None] - means) ** 2).sum(2).argmin(1)
    recall = np.mean([(guess[ids == i] == i).mean() for i in range(1, 12)])
    assert 1.2 / 12 < recall < 0.6


def test_photo_and_mask_agree_about_outlines(twenty):
    """Brightness changes more across the mask's outlines than elsewhere, and more than across shifted outlines."""
    grey = np.stack([photo.mean(2) for photo, _ in twenty])
    ids = np.stack([ids for _, ids in twenty])
    outline, step = ids[:, :, 1:] != ids[:, :, :-1], np.abs(np.diff(grey, axis=2))
    assert step[outline].mean() > 1.5 * step[~outline].mean()
    assert step[outline].mean() > 1.3 * step[np.roll(outline, 8, 2)].mean()


def test_written_data(scenes):
    seen = {}
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        photos, masks = (sorted((scenes / folder).iterdir()) for folder in (split, f"{split}_labels"))
        assert [path.name for path in photos] == [path.name for path in masks] and len(photos) == count
        for photo_path, mask_path in zip(photos, masks):
            photo, mask = Image.open(photo_path), Image.open(mask_path)
            assert photo.size == mask.size == (96, 72) and photo.mode == mask.mode == "RGB"
            assert mask_path.suffix == ".png"
            assert compare_per_class(np.array(mask), PALETTE).max() < 12  # the 12 colours and no other
            assert seen.setdefault(photo.tobytes(), photo_path) == photo_path  # no scene twice, in no two splits
    assert {path.name for path in scenes.iterdir()} == {
        f"{split}{end}" for split in ("train", "val", "test") for end in ("", "_labels")}
    photo, ids = generate_scene(0, 96, 72)
    assert np.array(Image.open(scenes / "train" / "scene_0000.png")).tolist() == np.array(photo).tolist()
    assert (np.array(Image.open(scenes / "train_labels" / "scene_0000.png")) == PALETTE[ids]).all()


def test_seeds_share_no_scene(tmp_path):
    for seed in (0, 1):
        generate_dataset(tmp_path / str(seed), {"train": 2}, (48, 36), seed)
    files = [path.read_bytes() for seed in (0, 1) for path in (tmp_path / str(seed) / "train").iterdir()]
    assert len(set(files)) == 4


def test_command_writes_the_same_in_another_process(scenes, tmp_path):
    command = [sys.executable, "-m", "datasets.synthetic", "--out", tmp_path / "new" / "data", "--size", "96", "72",
               "--train", "4", "--val", "2", "--test", "2"]
    env = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(synthetic.__file__).parents[1])
    assert done.returncode == 0 and done.stderr == "" and "8 scenes" in done.stdout
    for path in scenes.glob("*/*.png"):
        assert (tmp_path / "new" / "data" / path.relative_to(scenes)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("case", ["holds a file", "holds a folder", "is a file", "is inside a file", "negative seed"])
def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys, case):
    out, seed = tmp_path / "data", 0
    if case == "holds a file":
        out.mkdir()
        (out / ".keep").write_text("mine")
    elif case == "holds a folder":
        (out / "train").mkdir(parents=True)
    elif case == "is a file":
        out.write_text("mine")
    elif case == "is inside a file":
        out.write_text("mine")
        out = out / "deeper"
    else:
        seed = -1
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    with pytest.raises(UserError):
        generate_dataset(out, {"train": 1}, (16, 12), seed)
    monkeypatch.setattr(sys, "argv", ["synthetic", "--out", str(out), "--train", "1", "--seed", str(seed)])
    assert run_command(synthetic.main, synthetic.get_parser()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("seed" if seed else str(out)) in error
    assert {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path):
    generate_dataset(tmp_path, {"val": 1}, (16, 12))
    assert len(list(tmp_path.glob("val*/*.png"))) == 2
