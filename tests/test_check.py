"""The check of a data folder: it names every problem, and what to do about unknown classes."""

import numpy as np
import pytest
from conftest import COLORS, PALETTE, SMALL, compare_per_class, make_pair, opened, save
from PIL import Image

from datasets.classes import CAMVID, ClassSet
from datasets.layouts import find_splits
from datasets.masks import class_table, survey_masks
from datasets.spec import DataSpec
from support.command import UserError

# Stem of a pair -> what breaks its image or mask.
DEFECTS = {
    "alone": lambda image, mask: image.unlink(),
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
        make_pair(tmp_path, "without a mask", split=split)[1].unlink()
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


def test_a_split_without_masks_is_a_problem_unless_it_is_test(tmp_path, call):
    """Test images without masks are usual: those of competitions."""
    make_pair(tmp_path, "a")
    for split in ("val", "test"):
        make_pair(tmp_path, "b", split=split)[1].unlink()
        (tmp_path / f"{split}_labels").rmdir()
    status, out, _ = call("datasets.check", "--data_root", tmp_path)
    [problem] = out.splitlines()[-1:]
    assert status == 1 and "val/b.png" in problem
    (tmp_path / "val" / "b.png").unlink()
    make_pair(tmp_path, "c")
    status, out, _ = call("datasets.check", "--data_root", tmp_path)
    assert status == 0 and "val: 1 image held out" in out and "test: left out" in out


def test_up_to_one_percent_of_stray_pixels_is_ignored(tmp_path):
    ids = np.random.default_rng(0).integers(1, 12, (20, 20))
    for stem, count in (("spotted", 4), ("blotted", 5)):
        colors = PALETTE[ids]
        colors[0, :count] = (1, 2, 3)
        save(make_pair(tmp_path, stem, ids)[1], colors)
    data = DataSpec(tmp_path, CAMVID, found=find_splits(tmp_path, 0)[1])
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
    status, _, err = call("train.py", *SMALL, "--data_root", tmp_path)
    assert status == 2
    lines = [line.strip() for line in err.splitlines()[1:]]
    assert [line.rpartition(",")[2] for line in lines[1:]] == [f"{n / 16:.2%}" for n in sixteenths]
    assert call("datasets.check", "--data_root", tmp_path, "--write_classes")[0] == 0
    table = tmp_path / "class_dict.csv"
    assert table.read_text().splitlines() == lines
    assert ClassSet.from_file(table).colors == tuple(colors)
    assert call("datasets.check", "--data_root", tmp_path)[0] == 0
    assert call("datasets.check", "--data_root", tmp_path, "--write_classes")[0] == 2
    assert table.read_text().splitlines() == lines, "a table was overwritten"


def test_photographs_are_no_masks(tmp_path):
    save_masks(tmp_path, [(i, 255 - i, 7) for i in range(192)])
    with pytest.raises(UserError, match="192 colours"):
        class_table(tmp_path, survey_masks([tmp_path / "train_labels" / "photo.png"]))


@pytest.mark.parametrize("turn, status, said", [(6, 1, "EXIF"), (3, 0, "EXIF"), (1, 0, "")])
@pytest.mark.parametrize("size", [(12, 16), (16, 16)])
def test_masks_of_turned_images_are_doubted(tmp_path, call, size, turn, status, said):
    """Of square images the size does not tell whether the mask is turned too."""
    exif = Image.Exif()
    exif[0x112] = turn
    image, _ = make_pair(tmp_path, "a", np.resize(np.arange(12), size))
    opened(image).save(image, exif=exif)
    make_pair(tmp_path, "b")
    found, out, _ = call("datasets.check", "--data_root", tmp_path)
    assert found == (0 if size == (16, 16) else status)
    assert said in out


def test_images_with_more_than_three_channels_are_counted(tmp_path, call):
    for stem, alpha in (("a", 255), ("b", 7)):
        image, mask = make_pair(tmp_path, stem)
        rgb = np.asarray(opened(image))
        save(image, np.dstack([rgb, np.full(rgb.shape[:2], alpha, np.uint8)]))
    make_pair(tmp_path, "c")
    out = call("datasets.check", "--data_root", tmp_path)[1]
    assert "train: 1 image with 4 channels" in out


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
    flags = ("--data_name", "camvid", "--scale", 0.1, 0.4)
    assert call("train.py", "--data_root", "data", *SMALL, *flags)[0] == 0
