import numpy as np
import pytest
from conftest import PALETTE, compare_per_class, finish, opened, start

from datasets.synthetic import generate_scene

VOID, SKY, ROAD = 0, 1, 4


@pytest.fixture(scope="module")
def twenty() -> tuple[np.ndarray, np.ndarray]:
    """(20, 120, 160, 3) images and (20, 120, 160) ids."""
    scenes = [generate_scene(seed, 160, 120) for seed in range(20)]
    return np.stack([np.array(image) for image, _ in scenes]), np.stack([ids for _, ids in scenes])


@pytest.mark.parametrize("size", [(61, 47), (40, 90), ()])
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


def test_image_and_mask_agree_about_outlines(twenty):
    """Brightness changes more across the mask's outlines than elsewhere, and more than across shifted outlines."""
    outline, step = np.diff(twenty[1].astype(int)) != 0, np.abs(np.diff(twenty[0].mean(3)))
    assert step[outline].mean() > 1.5 * step[~outline].mean()
    assert step[outline].mean() > 1.3 * step[np.roll(outline, 8, 2)].mean()


def test_command_writes_the_same_scenes_in_another_process_into_an_empty_folder(tmp_path, call):
    counts, folder = {"train": 2, "val": 1, "test": 1}, tmp_path / "new" / "data"
    flags = [word for split, count in counts.items() for word in (f"--{split}", count)]
    out, err = finish(start("datasets.synthetic", "--out", folder, "--size", 96, 72, *flags, cwd=tmp_path))
    assert err == "" and "4 scenes" in out
    places = [(split, f"scene_{i:04d}.png") for split, count in counts.items() for i in range(count)]
    for seed, (split, name) in enumerate(places):  # no scene is in two splits
        image, ids = generate_scene(seed, 96, 72)
        assert (np.array(opened(folder / split / name)) == np.array(image)).all()
        assert (compare_per_class(np.array(opened(folder / f"{split}_labels" / name)), PALETTE) == ids).all()
    for command in ("datasets.synthetic", "datasets.download"):
        status, _, err = call(command, "--out", folder)
        assert status == 2 and "not an empty folder" in err and len(list(folder.rglob("[!.]*.*"))) == 8
