"""Folder layouts: every known one gives the same samples, and splits made here are by video."""

import itertools

import numpy as np
import pytest
from conftest import COLORS, COLORS32, MERGED, PALETTE, save, write_csv

from datasets.classes import CAMVID
from datasets.layouts import find_pairs, find_split, held_out, list_splits
from datasets.spec import DataSpec, find_classes
from support.command import UserError

OWN = {f"thing {i}": (20 * i, 255 - i, 7) for i in range(12)}
OWN_PALETTE = np.array([*OWN.values()], np.uint8)


def in_32_colors(ids: np.ndarray) -> np.ndarray:
    """The pixels in the colours of their class and of those merged into it, in turn."""
    colors = [[color, *MERGED.get(name, {}).values()] for name, color in COLORS.items()]
    pixels = [colors[i][n % len(colors[i])] for n, i in enumerate(ids.flat)]
    return np.array(pixels, np.uint8).reshape(*ids.shape, 3)


def as_segnet(ids: np.ndarray) -> np.ndarray:
    """The ids of the SegNet copy: 0 Sky … 10 Bicyclist, 11 void."""
    return np.array([11, *range(11)], np.uint8)[ids]


# The masks' folder and name, what is in them, the colours of class_dict.csv, how to read them.
LAYOUTS = {
    "12 colours": ("{}_labels/{}.png", PALETTE.__getitem__, None, {}),
    "32 colours": ("{}_labels/{}_L.png", in_32_colors, COLORS32, {}),
    "segnet": ("{}annot/{}.png", as_segnet, None, {}),
    "own colours": ("{}_labels/{}_mask.png", OWN_PALETTE.__getitem__, OWN, {}),
    "own ids": ("{}_labels/{}.png", np.uint8, None, {"label_format": "ids", "num_classes": 12}),
    "own ids, 16 bits": ("{}_labels/{}.png", np.uint16, OWN, {"label_format": "ids"}),
    "own ids, annot": ("{}annot/{}.png", np.uint8, OWN, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path, frames, layout):
    place, paint, table, flags = LAYOUTS[layout]
    for split, samples in frames.items():
        for stem, image, ids in samples:
            save(tmp_path / split / f"{stem}.png", image, compress_level=1)
            save(tmp_path / place.format(split, stem), paint(ids), compress_level=1)
    if table:
        write_csv(tmp_path, table)
    classes = find_classes(tmp_path, **flags)
    assert (classes == CAMVID) == (not layout.startswith("own"))
    data = DataSpec(tmp_path, classes, flags.get("label_format", "auto"))
    assert not data.problems(data.check(frames))
    for split, samples in frames.items():
        dataset = data.dataset(split)
        assert [pair.image.stem for pair in dataset.pairs] == [stem for stem, *_ in samples]
        for i, (_, image, ids) in enumerate(samples):
            found_image, found_ids = dataset[i]
            np.testing.assert_array_equal(found_image, image)
            np.testing.assert_array_equal(found_ids, ids)


@pytest.mark.parametrize(
    "images, masks, suffix",
    [("images", "masks", "_mask"), ("JPEGImages", "SegmentationClassPNG", "")],
)
def test_images_without_splits_are_split_into_train_and_val(tmp_path, images, masks, suffix):
    for folder, name in ((images, "{}.JPG"), (masks, f"{{}}{suffix}.png"), ("test", "{}.png")):
        (tmp_path / folder).mkdir()
        for i in range(10):
            (tmp_path / folder / name.format(i)).touch()
    assert list_splits(tmp_path) == ["train", "val", "test"]
    for split, stems in (("train", "01234567"), ("val", "89")):
        pairs, problems, _ = find_split(tmp_path, split, val_percent=20)
        assert "".join(pair.image.stem for pair in pairs) == stems
        assert not problems


def test_a_missing_val_is_not_made_of_images_beside_train(tmp_path):
    for folder in ("train", "train_labels", "images", "masks"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match="val_labels"):
        find_split(tmp_path, "val", 10)


def test_every_file_is_in_one_pair_or_named_as_a_problem(tmp_path):
    """In each of 256 folders."""
    names = ("b.1.png", "b.1.JPG", "b.1_L.png", "b.1_L_L.png")
    for number, present in enumerate(itertools.product([False, True], repeat=8)):
        images = tmp_path / f"{number}" / "train"
        masks = tmp_path / f"{number}" / "train_labels"
        images.mkdir(parents=True)
        masks.mkdir()
        places = [folder / name for folder in (images, masks) for name in names]
        files = [*itertools.compress(places, present)]
        for path in files:
            path.touch()
        pairs, problems = find_pairs(images, masks)
        paired = [path for pair in pairs for path in pair]
        for pair in pairs:
            assert pair.mask.stem in (pair.image.stem, f"{pair.image.stem}_L")
        for path in files:
            named = any(path.name in problem for problem in problems)
            assert paired.count(path) == 1 or named and path not in paired
        assert pairs or problems


@pytest.mark.parametrize(
    "count, percent, held",
    [(14, 10, ["a12", "a13"]), (12, 25, ["a9", "a10", "a11"]), (2, 1, ["a1"]), (1, 50, [])],
)
def test_the_last_images_by_name_are_held_out_for_validation(count, percent, held):
    assert held_out([f"a{i}" for i in range(count)], percent) == set(held)
