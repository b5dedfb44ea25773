"""Generated scenes: the same in every process, every class in its place, image and mask aligned."""

import numpy as np
import pytest
from conftest import PALETTE, compare_per_class, finish, opened, start

from datasets.synthetic import ROAD, SKY, VOID, generate_dataset, generate_scene
from support.command import UserError


@pytest.fixture(scope="module")
def twenty() -> tuple[np.ndarray, np.ndarray]:
    """(20, 120, 160, 3) images and (20, 120, 160) ids."""
    images, masks = zip(*(generate_scene(seed, 160, 120) for seed in range(20)))
    return np.stack([np.array(image) for image in images]), np.stack(masks)


def test_every_seed_gives_another_scene(twenty):
    images, masks = twenty
    assert images.shape == (20, 120, 160, 3) and masks.shape == (20, 120, 160)
    for i in range(20):
        for j in range(i):
            assert (images[i] != images[j]).mean() > 0.5
            assert (masks[i] != masks[j]).mean() > 0.1


def test_every_class_occurs_and_sky_is_above_road(twenty):
    _, masks = twenty
    for class_id in range(12):
        assert ((masks == class_id).sum((1, 2)) >= 4).sum() >= 5
    assert (masks == VOID).mean() < 0.1
    for ids in masks:
        sky_rows = np.nonzero(ids == SKY)[0]
        road_rows = np.nonzero(ids == ROAD)[0]
        assert not len(sky_rows) or sky_rows.mean() + 20 < road_rows.mean()
        assert (ids[-20:] == ROAD).mean() > 0.2 and (ids[:40] == ROAD).mean() < 0.05


def test_image_and_mask_agree_about_outlines(twenty):
    """Brightness changes more across the mask's outlines than elsewhere, or across shifted ones."""
    images, masks = twenty
    outline = np.diff(masks.astype(int)) != 0
    step = np.abs(np.diff(images.mean(3)))
    assert step[outline].mean() > 1.5 * step[~outline].mean()
    assert step[outline].mean() > 1.3 * step[np.roll(outline, 8, 2)].mean()


def test_the_command_writes_the_same_scenes_in_another_process(tmp_path):
    folder = tmp_path / "new" / "data"
    counts = ("--train", 2, "--val", 1, "--test", 1)
    flags = ("--out", folder, "--size", 96, 72, *counts)
    _, err = finish(start("datasets.synthetic", *flags, cwd=tmp_path))
    assert err == ""
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    names = ("train/scene_0000", "train/scene_0001", "val/scene_0000", "test/scene_0000")
    for seed, name in enumerate(names):  # no scene is in two splits
        image, ids = generate_scene(seed, 96, 72)
        mask_name = name.replace("/", "_labels/")
        np.testing.assert_array_equal(opened(folder / f"{name}.png"), image)
        mask = np.array(opened(folder / f"{mask_name}.png"))
        np.testing.assert_array_equal(compare_per_class(mask, PALETTE), ids)
        written -= {f"{name}.png", f"{mask_name}.png"}
    assert not written
    with pytest.raises(UserError):  # the folder is not empty
        generate_dataset(folder, {"train": 1})
