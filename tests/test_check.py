import numpy as np
import pytest
from conftest import COLORS, PALETTE, SMALL, compare_per_class, make_pair, opened, save
from PIL import Image

from datasets import check
from datasets.camvid import CamVidDataset
from datasets.classes import CAMVID, ClassSet
from support.command import UserError

# Stem of a pair: what breaks its image or mask, and what is said of it; those of the names come first.
# More images that cannot be read are in test_bad_input.py.
DEFECTS = {
    "missing": (lambda image, mask: mask.unlink(), "train/missing.png: has no mask"),
    "extra": (lambda image, mask: image.unlink(), "train_labels/extra.png: has no image"),
    "double": (lambda image, mask: Image.open(image).save(image.with_suffix(".jpg")), "double.jpg and double.png"),
    "twin": (lambda image, mask: mask.with_stem("twin_L").write_bytes(b""), "twin.png and twin_L.png share"),
    "jpeg": (lambda image, mask: Image.open(mask).save(mask, "JPEG"), "train_labels/jpeg.png: JPEG changes"),
    "narrow": (lambda image, mask: save(mask, PALETTE[:, None]), "narrow.png: is 1×12, its image is 16×12"),
    "empty": (lambda image, mask: image.write_bytes(b""), "train/empty.png: is no image"),
    "torn": (lambda image, mask: mask.write_bytes(mask.read_bytes()[:-60]), "train_labels/torn.png: cannot be read"),
    "ids": (lambda image, mask: save(mask, np.arange(192, dtype=np.uint8).reshape(12, 16) % 12), "--label_format ids"),
}


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    return str(error.value)


def test_all_problems_are_found_at_once(tmp_path, call):
    for split in ("train", "val"):
        make_pair(tmp_path, "fine_L", split=split)  # both files are called so
    for stem, (spoil, _) in DEFECTS.items():
        spoil(*make_pair(tmp_path, stem))
    for name in (".hidden.png", "._fine.png", "Thumbs.db", "notes.txt"):
        (tmp_path / "train" / name).write_text("no image")
        (tmp_path / "train_labels" / name).write_text("no mask")
    first, *problems = error_of(check.check_data, tmp_path, ["train"], CAMVID).splitlines()
    assert f"{tmp_path}: 9 problems" == first and len(problems) == 9
    assert all(sum(said in problem for problem in problems) == 1 for _, said in DEFECTS.values())
    by_name = error_of(CamVidDataset, tmp_path, "train", CAMVID).splitlines()[1:]
    assert set(by_name) < set(problems) and len(by_name) == 4
    status, out, _ = call("datasets.check", "--data_root", tmp_path)
    assert status == 1 and "train: 8 pairs" in out and out.splitlines()[-10:] == ["9 problems", *problems]
    for command in (("train.py", *SMALL), ("evaluate.py", "--split", "train")):
        status, _, err = call(*command, "--data_root", tmp_path)
        assert status == 2 and err.splitlines()[1:] == problems


def test_problems_of_several_splits_come_together(tmp_path):
    for split in ("train", "val"):
        make_pair(tmp_path, f"{split}_good", split=split)
        for i in range(30):
            make_pair(tmp_path, f"{split}_bad{i:02}", split=split)[1].unlink()
    for folder in ("test", "test_labels", "testannot"):
        (tmp_path / folder).mkdir()
    lines = error_of(check.check_data, tmp_path, ["test", "train", "val"], CAMVID).splitlines()
    assert "61 problems" in lines[0] and "either test_labels or testannot" in lines[1] and len(lines) == 52
    assert "train_bad00" in lines[2] and "val_bad18" in lines[50]
    assert "\n" not in error_of(check.check_data, tmp_path / "gone", ["train", "val"], CAMVID)  # said once


def test_up_to_one_percent_of_stray_pixels_becomes_void(tmp_path):
    ids, paths = np.random.default_rng(0).integers(1, 12, (20, 20)), []
    for stem, count in (("spotted", 4), ("blotted", 5)):
        rgb = PALETTE[ids]
        rgb.reshape(-1, 3)[:count] = (1, 2, 3)
        rgb[0, 0] = (250, 251, 252)
        paths.append(save(make_pair(tmp_path, stem, ids)[1], rgb))
    report = check.check_split(tmp_path, "train", CAMVID)
    assert report.problems == [f"{paths[1]}: 1.2% of its pixels are in none of the 12 classes: (1,2,3) × 4, "
                               f"(250,251,252) × 1"]
    assert report.stray == {"spotted.png": 4} and report.sizes == {(20, 20): 2}
    assert report.pixels[255] == 9 and report.pixels[:12].sum() == 791
    line = check.stray_line(report)
    assert "4 pixels" in line and "spotted.png (4)" in line and line in check.describe(report, CAMVID)
    ids.flat[:4] = 0
    assert (CamVidDataset(tmp_path, "train", CAMVID)[1][1] == ids).all()


@pytest.mark.parametrize("value, wrong", [(255, False), (11, False), (12, True), (256, True)])
def test_unknown_ids(tmp_path, value, wrong):
    """255 is the usual void of id masks, as often as it likes; any other id beyond the classes is an error."""
    save(make_pair(tmp_path, "a")[1], np.where(np.arange(192) < 100, value, 1).astype(np.uint16).reshape(12, 16))
    report = check.check_split(tmp_path, "train", CAMVID, "ids")
    assert [problem.split(": ")[-1] for problem in report.problems] == [f"({value}) × 100"] * wrong
    assert wrong or (report.pixels[value], report.pixels[1], report.stray) == (100, 92, {})


@pytest.mark.parametrize("train, val, void, said", [
    ((0, 255), (0, 1), False, ["hold only class 0: there is nothing to learn; 255 counts as void"]),
    ((0, 1), (255,), False, ["val: its 1 masks hold no class"]), ((0, 1), (0,), False, []),
    ((0, 255), (0,), True, ["2 problems", "val: its 1 masks hold no class", "masks of train hold no class"])])
def test_masks_that_teach_nothing_are_a_problem(tmp_path, train, val, void, said):
    for split, values in (("train", train), ("val", val)):
        save(make_pair(tmp_path, "a", np.zeros((12, 16), int), split)[1],
             np.resize(np.array(values, np.uint8), (12, 16)))
    classes = ClassSet(("class 0", "b"), ((0, 0, 0), (1, 1, 1)), 0 if void else None)
    arguments = tmp_path, ["train", "val"], classes, "ids"
    if said:
        assert all(words in line for words, line in zip(said, error_of(check.check_data, *arguments).splitlines()))
    else:
        assert check.check_data(*arguments)["val"].pixels[0]


@pytest.mark.parametrize("stems, size", [("ab", (1, 1)), ("ab", (200, 2)), ("a", (3, 200))])
def test_few_and_small_frames_train(tmp_path, call, stems, size):
    for split in ("train", "val"):
        for i, stem in enumerate(stems, start=1):
            make_pair(tmp_path / "data", stem, np.resize([i, 2], size), split)
    assert call("train.py", "--data_root", "data", *SMALL, "--scale", 0.1, 0.4)[0] == 0


@pytest.mark.parametrize("values, said", [
    ((0, 1, 2), "ids from 0 to 2, not colours; give --label_format ids --num_classes 3"),
    ((0, 1, 2, 255), "ids from 0 to 2, not colours; give --label_format ids --num_classes 3"),
    ((0, 255), "Background,0,0,0"), ((255,), "class 0,255,255,255")])
def test_masks_of_ids_get_no_table_of_colours(tmp_path, call, values, said):
    for split in ("train", "val"):
        save(make_pair(tmp_path, "a", split=split)[1], np.resize(np.array(values, np.uint8), (12, 16)))
    _, out, err = call("datasets.check", "--data_root", tmp_path, "--write_classes")
    assert said in out + err


def test_a_folder_without_val_is_said_to_be_too_little_for_training(tmp_path, call):
    make_pair(tmp_path, "a", np.array([[1, 2]], np.uint8))
    status, out, _ = call("datasets.check", "--data_root", tmp_path)
    assert status == 0 and "warning: train.py needs" in out
    assert call("train.py", "--data_root", tmp_path)[0] == 2


def test_images_and_masks_beside_a_test_split_are_checked_and_in_the_table(tmp_path, call):
    for stem, ids in (("a", [1, 2]), ("b", [1, 3])):
        make_pair(tmp_path, stem, np.array([ids], np.uint8), "images")
    make_pair(tmp_path, "c", np.array([[1, 1]], np.uint8), "test")
    (tmp_path / "images_labels").rename(tmp_path / "masks")
    _, out, _ = call("datasets.check", "--data_root", tmp_path, "--write_classes")
    assert len([line for line in out.splitlines() if line.startswith("class ")]) == 3
    _, out, _ = call("datasets.check", "--data_root", tmp_path)
    assert all(f"{split}: 1 pairs" in out for split in ("train", "val", "test")) and "warning" not in out


def test_command_on_good_data(scenes, call):
    status, out, err = call("datasets.check", "--data_root", scenes)
    assert status == 0 and err == "" and "warning" not in out
    assert all(said in out for said in ("train: 4 pairs", "val: 2 pairs", "test: 2 pairs", "96×72 (4)", *COLORS))
    masks = np.concatenate([opened(path) for path in (scenes / "train_labels").iterdir()])
    road = next(line for line in out.splitlines() if "Road" in line)
    assert f"{(compare_per_class(masks, PALETTE) == 4).mean():.2%}" in road
