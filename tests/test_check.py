"""The check of a data folder: it names every problem, and what to do about unknown classes."""

import numpy as np
import pytest
from conftest import COLORS, PALETTE, SMALL, compare_per_class, make_pair, opened, save

from datasets.classes import CAMVID, ClassSet
from datasets.spec import DataSpec
from support.command import UserError

# Stem of a pair -> what breaks its image or mask.
DEFECTS = {
    "missing": lambda image, mask: mask.unlink(),
    "jpeg": lambda image, mask: opened(mask).save(mask, "JPEG"),
    "narrow": lambda image, mask: save(mask, PALETTE[:, None]),
    "empty": lambda image, mask: image.write_bytes(b""),
    "torn": lambda image, mask: mask.write_bytes(mask.read_bytes()[:-60]),
    "ids": lambda image, mask: save(mask, np.eye(12, 16, dtype=np.uint8)),
}


def save_masks(root, values, splits=("train", "val")) -> None:
    """One pair a split, whose mask repeats these values: (N,) ids or (N, 3) colours."""
    values = np.array(values)
    pixels = np.resize(values, (12, 16, *values.shape[1:]))
    for split in splits:
        _, mask = make_pair(root, "photo", split=split)
        save(mask, pixels.astype(np.uint16 if values.max() > 255 else np.uint8))


def test_all_problems_are_found_at_once(tmp_path, call):
    for split in ("train", "val"):
        make_pair(tmp_path, "fine_L", split=split)  # both files are called so
    for stem, spoil in DEFECTS.items():
        spoil(*make_pair(tmp_path, stem))
    for name in (".hidden.png", "Thumbs.db"):
        (tmp_path / "train" / name).write_text("no image")
    status, out, _ = call("datasets.check", "--data_root", tmp_path)
    first, *problems = out.splitlines()[-7:]
    assert status == 1 and first == "6 problems"
    for stem in DEFECTS:
        assert sum(f"{stem}." in problem for problem in problems) == 1
    for command in (("train.py", *SMALL), ("evaluate.py", "--split", "train")):
        status, _, err = call(*command, "--data_root", tmp_path)
        assert status == 2 and err.splitlines()[1:] == problems


def test_a_missing_folder_is_named_with_the_other_problems(tmp_path):
    make_pair(tmp_path, "a")[1].unlink()
    data = DataSpec(tmp_path, CAMVID)
    missing, unpaired = data.problems(data.check(["val", "train"]))
    assert "val_labels" in missing and "a.png" in unpaired


def test_up_to_one_percent_of_stray_pixels_is_ignored(tmp_path):
    ids = np.random.default_rng(0).integers(1, 12, (20, 20))
    for stem, count in (("spotted", 4), ("blotted", 5)):
        colors = PALETTE[ids]
        colors[0, :count] = (1, 2, 3)
        save(make_pair(tmp_path, stem, ids)[1], colors)
    data = DataSpec(tmp_path, CAMVID)
    report = data.check(["train"])["train"]
    [problem] = report.problems
    assert "blotted.png" in problem and "(1, 2, 3) × 5" in problem
    assert report.stray == {"spotted.png": 4}
    assert report.pixels[255] == 9 and report.pixels[1:12].sum() == 791
    ids[0, :4] = CAMVID.ignore_index
    np.testing.assert_array_equal(data.dataset("train")[1][1], ids)


@pytest.mark.parametrize("value, known", [(255, True), (11, True), (12, False), (256, False)])
def test_of_ids_beyond_the_classes_only_255_is_usual(tmp_path, value, known):
    save_masks(tmp_path, [value, 1], ["train"])
    report = DataSpec(tmp_path, CAMVID, "ids").check(["train"])["train"]
    assert (report.problems == []) == known and not report.stray
    assert report.pixels[11 if value == 11 else 255] == report.pixels[1] == 96


@pytest.mark.parametrize(
    "train, val, ignore_index, problems",
    [
        ([0, 1], [0], 255, 0),
        ([0, 255], [0, 1], 255, 1),
        ([0, 1], [255], 255, 1),
        ([0, 255], [0], 0, 2),
    ],
)
def test_masks_that_teach_or_score_nothing_are_a_problem(
    tmp_path, train, val, ignore_index, problems
):
    save_masks(tmp_path, train, ["train"])
    save_masks(tmp_path, val, ["val"])
    data = DataSpec(tmp_path, ClassSet(("a", "b"), ((0,) * 3, (1,) * 3), ignore_index), "ids")
    assert len(data.problems(data.check(["train", "val"]))) == problems


@pytest.mark.parametrize(
    "colors, sixteenths",
    [
        ([(0, 0, 0), (255, 255, 255)], [12, 4]),
        ([(10, 20, 30), (200, 10, 10), COLORS["Car"], COLORS["Road"]], [9, 4, 2, 1]),
    ],
)
def test_masks_that_are_not_camvids_need_a_table_which_is_printed(
    tmp_path, call, colors, sixteenths
):
    save_masks(tmp_path, np.repeat(colors, sixteenths, axis=0))
    status, _, err = call("datasets.check", "--data_root", tmp_path)
    assert status == 2
    lines = [line.strip() for line in err.splitlines()[1:]]
    assert [line.rpartition(",")[2] for line in lines[1:]] == [f"{n / 16:.2%}" for n in sixteenths]
    assert call("datasets.check", "--data_root", tmp_path, "--write_classes")[0] == 0
    table = tmp_path / "class_dict.csv"
    assert table.read_text().splitlines() == lines
    assert ClassSet.from_csv(table).colors == tuple(colors)
    assert call("datasets.check", "--data_root", tmp_path)[0] == 0
    assert call("datasets.check", "--data_root", tmp_path, "--write_classes")[0] == 2
    assert table.read_text().splitlines() == lines, "a table was overwritten"


@pytest.mark.parametrize(
    "values, said", [([0, 1, 2, 255], "--num_classes 3"), ([*range(64, 256)], "192 colours")]
)
def test_masks_of_ids_or_of_blended_colours_get_no_table(tmp_path, values, said):
    save_masks(tmp_path, values)
    with pytest.raises(UserError, match=said):
        DataSpec(tmp_path, CAMVID).color_table(["train"])


def test_the_share_of_each_class_is_printed(scenes, call):
    status, out, err = call("datasets.check", "--data_root", scenes)
    assert status == 0 and err == "" and "warning" not in out
    masks = np.concatenate([np.array(opened(path)) for path in (scenes / "train_labels").iterdir()])
    ids = compare_per_class(masks, PALETTE)
    train = out[out.index("train: 4 pairs, 96×72 (4)") : out.index("val: 2 pairs")]
    for i, name in enumerate(COLORS):
        [line] = [line for line in train.splitlines() if f" {name} " in line]
        assert f"{(ids == i).mean():.2%}" in line


def test_a_single_image_of_two_pixels_trains(tmp_path, call):
    for split in ("train", "val"):
        make_pair(tmp_path / "data", "a", np.array([[1, 2]]), split)
    assert call("train.py", "--data_root", "data", *SMALL, "--scale", 0.1, 0.4)[0] == 0
