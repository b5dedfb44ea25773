"""Folder layouts: what people's folders hold is found as it lies, and split by video."""

import itertools
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS, COLORS32, MERGED, PALETTE, describe, save, write_csv
from PIL import Image

from datasets.classes import CAMVID, ClassSet
from datasets.layouts import find_splits
from support.command import UserError

# What makes it: where image and mask of a frame lie, and the names of the splits' folders.
TREES = {
    "CamVid": ("{split}/{name}.png", "{split}_labels/{name}_L.png", "train val"),
    "Carvana": ("train/{name}.jpg", "train_masks/{name}_mask.gif", ""),
    "CVAT, CamVid 1.0": ("{split}/{name}.PNG", "{split}annot/{name}.png", "Train Validation"),
    "CVAT, one subset": ("default/{name}.PNG", "defaultannot/{name}.png", ""),
    "Roboflow": ("{split}/{name}_jpg.rf.1.jpg", "{split}/{name}_jpg.rf.1_mask.png", "train valid"),
    "DeepGlobe": ("train/{name}_sat.jpg", "train/{name}_mask.png", ""),
    "MMSegmentation": ("img_dir/{split}/{name}.jpg", "ann_dir/{split}/{name}.png", "train val"),
    "ADE20K": (
        "images/{split}/{name}.jpg",
        "annotations/{split}/{name}.png",
        "training validation",
    ),
    "split first": ("{split}/Images/{name}.jpg", "{split}/Labels/{name}.png", "train valid"),
    "keras": (
        "images_prepped_{split}/{name}.png",
        "annotations_prepped_{split}/{name}.png",
        "train",
    ),
    "Cityscapes": (
        "leftImg8bit/{split}/aachen/{name}_leftImg8bit.png",
        "gtFine/{split}/aachen/{name}_gtFine_labelTrainIds.png",
        "train val",
    ),
    "Cityscapes, as downloaded": (
        "leftImg8bit/{split}/aachen/{name}_leftImg8bit.png",
        "gtFine/{split}/aachen/{name}_gtFine_color.png",
        "train val",
    ),
    "labelme": ("JPEGImages/{name}.jpg", "SegmentationClassPNG/{name}.png", ""),
    "Oxford pets": ("images/{name}.jpg", "annotations/trimaps/{name}.png", ""),
    "COCO-Stuff": ("images/{split}/{name}.jpg", "masks/{split}/{name}.png", "train2017 val2017"),
    "milesial": ("imgs/{name}.jpg", "masks/{name}_mask.gif", ""),
    "drives": ("images/drive 1/{name}.tiff", "masks/drive 1/{name}.bmp", ""),
    "CamVid's archives": ("701_StillsRaw_full/{name}.png", "LabeledApproved_full/{name}_L.png", ""),
}
NAMES = [f"a{i}" for i in range(10)]


def grow(root: Path, image: str, mask: str, splits: str) -> dict[str, Path]:
    """Create the empty files of a tree -> the mask of each image."""
    masks = {}
    for i, name in enumerate(NAMES):
        split = (splits.split() or [""])[i >= 8 and " " in splits]
        paths = [root / text.format(split=split, name=name) for text in (image, mask)]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        masks[paths[0]] = paths[1]
    return masks


@pytest.mark.parametrize("tree", TREES)
def test_a_folder_of_a_common_tool_is_read_as_it_lies(tmp_path, tree):
    masks = grow(tmp_path, *TREES[tree])
    for other in (".hidden.png", "notes.txt", "gtFine/train/aachen/a0_gtFine_instanceIds.png"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).touch()
    splits = find_splits(tmp_path, val_percent=20)[1]
    assert [(pair.image, pair.mask) for pair in splits["train"].pairs] == [*masks.items()][:8]
    assert [(pair.image, pair.mask) for pair in splits["val"].pairs] == [*masks.items()][8:]
    assert not any(split.problems or split.unlabelled for split in splits.values())


@pytest.mark.parametrize(
    "lists, expected",
    [
        ({"ImageSets/Segmentation/Train": "a5\na7\n", "trainval": "a1"}, ("57", "")),
        (
            {"ImageSets/Segmentation/train": "a5\na7\n", "ImageSets/Segmentation/val": "a2"},
            ("57", "2"),
        ),
        ({"ImageSets/val": "a2\na7\n"}, ("01345689", "27")),
        ({"valid": "a3.png\na4.png\n"}, ("01256789", "34")),
        ({"train": "/JPEGImages/a1.jpg x/a1_mask.png\n/JPEGImages/a3.jpg x/a3.png"}, ("13", "")),
    ],
)
def test_lists_of_names_divide_a_folder(tmp_path, lists, expected):
    """Where no list names frames for val, the last frame of train is held out."""
    grow(tmp_path, "JPEGImages/{name}.jpg", "SegmentationClass/{name}.png", "")
    for name, text in lists.items():
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    splits = find_splits(tmp_path)[1]
    train, val = ("".join(pair.image.stem[1] for pair in splits[s].pairs) for s in ("train", "val"))
    assert (train, val) == (expected if expected[1] else (expected[0][:-1], expected[0][-1]))


def test_lists_tell_images_of_one_name_by_their_folders(tmp_path):
    for drive in ("drive1", "drive2"):
        for folder in ("images", "masks"):
            (tmp_path / folder / drive).mkdir(parents=True)
            (tmp_path / folder / drive / "0000.png").touch()
    (tmp_path / "train.txt").write_text("drive1/0000.png\n")
    (tmp_path / "val.txt").write_text("drive2/0000.png\n")
    splits = find_splits(tmp_path)[1]
    assert [splits[s].pairs[0].image.parent.name for s in ("train", "val")] == ["drive1", "drive2"]


def test_drives_that_are_called_as_a_split_hide_no_others(tmp_path):
    for drive in ("drive1", "test"):
        for folder in ("images", "masks"):
            (tmp_path / folder / drive).mkdir(parents=True)
            (tmp_path / folder / drive / "1.png").touch()
    splits = find_splits(tmp_path)[1]
    assert sum(len(split.pairs) for split in splits.values()) == 2


def test_camvids_frames_are_divided_as_in_the_literature(tmp_path):
    """Without its lists, in any folder without splits."""
    stems = {"0016E5_07959": "val", "Seq05VD_f00000": "test", "0006R0_f00930": "train"}
    for stem in stems:
        for path in (tmp_path / f"images/{stem}.png", tmp_path / f"labels/{stem}_P.png"):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    splits = find_splits(tmp_path)[1]
    assert {s.pairs[0].image.stem: name for name, s in splits.items()} == stems


def test_every_file_is_in_one_pair_or_named(tmp_path):
    """In each of 256 folders: images without a mask are left out, other files are problems."""
    names = ("b.1.png", "b.1.JPG", "b.1_L.png", "b.1_L_L.png")
    for number, present in enumerate(itertools.product([False, True], repeat=8)):
        root = tmp_path / f"{number}"
        places = [root / folder / name for folder in ("train", "train_labels") for name in names]
        files = [*itertools.compress(places, present)]
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if not any(present[:4]) or not any(present[4:]):
            continue  # no folder of images, or none of masks
        train = find_splits(root, 0)[1]["train"]
        assert all(mask.stem in (image.stem, f"{image.stem}_L") for image, mask in train.pairs)
        paired = [path for pair in train.pairs for path in pair] + train.unlabelled
        for path in files:
            named = any(path.name in problem for problem in train.problems)
            assert paired.count(path) == 1 or named and path not in paired


def test_links_to_folders_are_followed(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / "elsewhere" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "elsewhere" / folder / "1.png").touch()
        (tmp_path / "data" / folder / "drive").symlink_to(tmp_path / "elsewhere" / folder)
    assert len(find_splits(tmp_path / "data")[1]["train"].pairs) == 1


@pytest.mark.parametrize("name, class_set", [("2007_00003{}", "voc"), ("frame{}", "")])
def test_vocs_names_are_for_vocs_images_alone(tmp_path, name, class_set):
    for i in range(3):
        for place in ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", "Annotations/{}.xml"):
            path = tmp_path / place.format(name.format(i))
            path.parent.mkdir(exist_ok=True)
            path.touch()
    assert find_splits(tmp_path)[0].class_set == class_set


def test_a_folder_may_have_test_alone(tmp_path, scenes, call):
    for folder in ("test", "test_labels"):
        shutil.copytree(scenes / folder, tmp_path / "data" / folder)
    flags = ("--data_root", tmp_path / "data", "--data_name", "camvid")
    assert call("datasets.check", *flags)[0] == 0
    status, _, err = call("train.py", *flags)
    assert status == 2 and "has no train" in err


def test_names_are_compared_in_one_unicode_form(tmp_path):
    for folder, form in (("images", "NFC"), ("masks", "NFD")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / unicodedata.normalize(form, "Straße ü.png")).touch()
    assert len(find_splits(tmp_path)[1]["train"].pairs) == 1


@pytest.mark.parametrize(
    "files, said",
    [
        ("imgs/1.jpg mask/1.npy readme.txt", "imgs/ (1 .jpg), mask/ (1 .npy) and readme.txt"),
        ("archive/CamVid/train/1.png archive/CamVid/train_labels/1.png", "is in .*archive/CamVid;"),
        ("seq1/images/1.png seq1/masks/1.png seq2/images/1.png seq2/masks/1.png", "seq1, .*seq2;"),
        ("train/1/images/1.png train/1/masks/2.png", "no known layout"),
        ("", "nothing"),
    ],
)
def test_other_folders_are_refused_with_what_they_hold(tmp_path, files, said):
    for name in files.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
        find_splits(tmp_path)


@pytest.mark.parametrize(
    "count, percent, held", [(14, 10, "a12 a13"), (12, 25, "a9 a10 a11"), (2, 1, "a1"), (1, 50, "")]
)
def test_the_last_images_by_name_are_held_out_for_validation(tmp_path, count, percent, held):
    for i in range(count):
        for folder in ("train", "train_labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"a{i}.png").touch()
    splits = find_splits(tmp_path, percent)[1]
    assert {pair.image.stem for pair in splits["val"].pairs} == {*held.split()}
    assert len(splits["train"].pairs) == count - len(held.split())


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


def with_palette(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(OWN_PALETTE.tobytes())
    return image


# The masks' folder, what is in them, the colours of class_dict.csv, the flags.
COPIES = {
    "12 colours": ("{}_labels", PALETTE.__getitem__, None, ""),
    "32 colours": ("{}_labels", in_32_colors, COLORS32, ""),
    "segnet": ("{}annot", as_segnet, None, "--data_name camvid"),
    "own colours": ("{}_labels", OWN_PALETTE.__getitem__, OWN, ""),
    "own palette": ("{}_labels", with_palette, OWN, ""),
    "own ids": ("{}_labels", np.uint8, None, "--num_classes 12 --label_format ids"),
    "own ids, named": ("{}annot", np.uint8, OWN, ""),
    "own ids, 16 bits": ("{}_labels", np.uint16, OWN, ""),
    "own ids, RGB": ("{}annot", lambda ids: np.dstack([np.uint8(ids)] * 3), OWN, ""),
}


@pytest.mark.parametrize("copy", COPIES)
def test_every_copy_gives_the_same_samples(tmp_path, frames, copy):
    folder, paint, table, flags = COPIES[copy]
    for split, samples in frames.items():
        for stem, image, ids in samples:
            save(tmp_path / split / f"{stem}.png", image, compress_level=1)
            mask = paint(ids)
            mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
            (tmp_path / folder.format(split)).mkdir(exist_ok=True)
            mask.save(tmp_path / folder.format(split) / f"{stem}.png", compress_level=1)
    if table:
        write_csv(tmp_path, table)
    data = describe(tmp_path, *flags.split())
    assert (data.classes == CAMVID) == (not copy.startswith("own"))
    assert not data.problems(data.check(frames))
    for split, samples in frames.items():
        dataset = data.dataset(split)
        assert [pair.image.stem for pair in dataset.pairs] == [stem for stem, *_ in samples]
        for i, (_, image, ids) in enumerate(samples):
            found_image, found_ids = dataset[i]
            np.testing.assert_array_equal(found_image, image)
            np.testing.assert_array_equal(found_ids, ids)


@pytest.mark.parametrize(
    "stem, expected", [("0001TP_00669{}", CAMVID), ("a{}", ClassSet.numbered(12))]
)
def test_ids_in_annot_are_segnets_for_camvids_frames_alone(tmp_path, stem, expected):
    """Or the classes of one's own data would be called after CamVid's."""
    ids = np.kron(np.arange(12).reshape(3, 4), np.ones((4, 4))).astype(np.uint8)
    for i in range(3):
        save(tmp_path / "train" / f"{stem.format(i)}.png", np.dstack([ids] * 3))
        save(tmp_path / "trainannot" / f"{stem.format(i)}.png", ids)
    data = describe(tmp_path)
    assert data.classes == expected
