import pickle

import numpy as np
import pytest
import torch
from conftest import COLORS, COLORS32, MERGED, PALETTE, compare_per_class, make_pair, save, write_csv
from PIL import Image

from datasets.camvid import CamVidDataset, EpochSampler, find_classes, find_folders, read_label
from datasets.check import check_data
from datasets.classes import CAMVID, ClassSet
from datasets.transforms import train_transform
from runtime import UserError

RNG = np.random.default_rng(0)
OWN = {f"thing {i}": (20 * i, 255 - i, 7) for i in range(12)}


def in_32_colors(ids: np.ndarray) -> np.ndarray:
    """Every pixel in its class's colour or in that of a class merged into it, by chance."""
    rgb = PALETTE[ids]
    for into, colors in MERGED.items():
        choice = RNG.integers(0, len(colors) + 1, ids.shape)
        for i, color in enumerate(colors.values()):
            rgb[(ids == list(COLORS).index(into)) & (choice == i)] = color
    return rgb


def as_segnet(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == 0, 11, ids.astype(int) - 1).astype(np.uint8)  # the SegNet copy: 0 Sky … 11 void


# name: the masks' folder and file name, what is in them, the class_dict.csv, flags, the ignored id
LAYOUTS = {
    "12 colours": ("{}_labels/{}.png", PALETTE.__getitem__, None, {}, 0),
    "32 colours": ("{}_labels/{}_L.png", in_32_colors, COLORS32, {}, 0),
    "segnet": ("{}annot/{}.png", as_segnet, None, {}, 0),
    "own colours": ("{}_labels/{}.png", np.array([*OWN.values()], np.uint8).__getitem__, OWN, {}, None),
    "own colours, one ignored": ("{}_labels/{}.png", np.array([*OWN.values()], np.uint8).__getitem__, OWN,
                                 {"ignore_class": "Thing 3"}, 3),
    "own ids": ("{}_labels/{}.png", np.asarray, None, {"label_format": "ids", "num_classes": 12}, None),
    "own ids, 16 bits": ("{}_labels/{}.png", np.uint16, OWN, {"label_format": "ids"}, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, frames, layout):
    place, paint, csv, flags, ignored = LAYOUTS[layout]
    for split in frames:
        for stem, photo, ids in frames[split]:
            save(tmp_path / split / f"{stem}.png", photo, compress_level=1)
            save(tmp_path / place.format(split, stem), paint(ids), compress_level=1)
    if csv:
        write_csv(tmp_path, csv)
    classes, label_format = find_classes(tmp_path, **flags), flags.get("label_format", "auto")
    assert (len(classes), classes.ignore_index) == (12, ignored)
    assert csv == OWN or flags or classes == CAMVID
    reports = check_data(tmp_path, list(frames), classes, label_format)
    for split, expected in frames.items():
        dataset = CamVidDataset(tmp_path, split, classes, label_format=label_format)
        assert len(dataset) == reports[split].pairs == len(expected) > 1
        for (stem, photo, ids), pair, (image, mask) in zip(expected, dataset.pairs, dataset):
            assert pair.photo.stem == stem and pair.label.stem.removesuffix("_L") == stem
            assert (image == photo).all() and (mask == ids).all()
        count = sum(np.bincount(ids.ravel(), minlength=256) for _, _, ids in expected)
        assert (reports[split].pixels == count).all() and not reports[split].stray


def test_camvid32_on_32_colors(tmp_path):
    rgb = RNG.permutation(np.array([*COLORS32.values()], np.uint8)).reshape(4, 8, 3)
    save(tmp_path / "val/a.png", rgb)
    save(tmp_path / "val_labels/a_L.png", rgb)
    write_csv(tmp_path, COLORS32)
    classes = find_classes(tmp_path, "camvid32", num_classes=32)
    assert (CamVidDataset(tmp_path, "val", classes)[0][1] == compare_per_class(rgb, classes.colors)).all()


def test_the_whole_real_set_pairs_up(camvid):
    for split, count in (("train", 367), ("val", 101)):
        dataset = CamVidDataset(camvid, split, find_classes(camvid))
        assert len({pair.photo for pair in dataset.pairs}) == len(dataset) == count


@pytest.mark.parametrize("flags, said", [
    ({"num_classes": 7}, "--num_classes 7.*12 classes"), ({"ignore_class": "Moon"}, "--ignore_class Moon"),
    ({"label_format": "ids"}, "--num_classes N"), ({"label_format": "ids", "num_classes": 1}, "--num_classes 1"),
    ({"label_format": "ids", "num_classes": 256}, "256"), ({"data_name": "camvid32", "num_classes": 12}, "32 classes")])
def test_find_classes_refuses(scenes, flags, said):
    with pytest.raises(UserError, match=said):
        find_classes(scenes, **flags)


@pytest.mark.parametrize("folders, said", [
    ([], "no such folder"), (["other"], "train.*has other"), (["train"], "train_labels or trainannot"),
    (["train_labels"], "train"), (["train", "train_labels", "trainannot"], "one of")])
def test_find_folders_refuses(tmp_path, folders, said):
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{tmp_path / 'data'}.*{said}"):
        find_folders(tmp_path / "data", "train")


def test_pairs_by_stem_not_by_position(tmp_path):
    """Masks named with and without _L, photographs of other types: orders that differ if sorted by file name."""
    stems = ["a", "a_b", "a0", "b_L", "b.1", "Z", "10", "9"]  # a.png < a0.png, but a0_L.png < a_L.png
    ids = {stem: np.full((4, 5), i, np.uint8) for i, stem in enumerate(stems)}
    for i, (stem, mask) in enumerate(ids.items()):
        photo, label = make_pair(tmp_path, stem, mask)
        photo.rename(photo.with_name(stem + (".png", ".JPG", ".webp")[i % 3]))
        label.rename(label.with_name(stem + ("_L.png", ".png")[i % 2]))
    dataset = CamVidDataset(tmp_path, "train", CAMVID)
    assert {pair.photo.stem: dataset[i][1].tolist() for i, pair in enumerate(dataset.pairs)} == {
        stem: mask.tolist() for stem, mask in ids.items()}


@pytest.mark.parametrize("label_format, ignored, values, expected", [
    ("ids", None, [0, 1, 2, 3, 200, 255], [0, 1, 2, 255, 255, 255]), ("ids", 1, [0, 1, 2, 3, 255], [0, 1, 2, 1, 1]),
    ("segnet", 0, [0, 1, 2, 11, 12, 255], [1, 2, 255, 0, 255, 255])])
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_values_of_id_masks(tmp_path, label_format, ignored, values, expected, mode):
    """Ids beyond the classes become void in the dataset: the ignored class, or 255 where there is none."""
    classes = ClassSet.numbered(3) if ignored is None else ClassSet.numbered(3).ignoring(f"class {ignored}")
    photo, label = make_pair(tmp_path, "a", np.zeros((1, len(values)), int))
    mask = Image.fromarray(np.array([values], np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        mask.putpalette(RNG.bytes(768))
    mask.save(label)
    with Image.open(label) as image:
        assert image.mode == mode
    mask = CamVidDataset(tmp_path, "train", classes, label_format=label_format)[0][1]
    assert mask.tolist() == [[classes.void_id if i == 255 else i for i in expected]]


def test_a_coloured_mask_is_not_ids(tmp_path):
    _, label = make_pair(tmp_path, "a")
    with pytest.raises(UserError, match="a.png.*--label_format rgb"):
        read_label(label, CAMVID, "ids")


@pytest.mark.parametrize("size", [(36, 48), (50, 40), (144, 192)])
@pytest.mark.parametrize("native_labels", [False, True])
def test_image_size(scenes, size, native_labels):
    native = CamVidDataset(scenes, "train", CAMVID)
    dataset = CamVidDataset(scenes, "train", CAMVID, image_size=size, native_labels=native_labels)
    for (photo, ids), (image, mask) in zip(native, dataset):
        assert image.shape == (*size, 3) and image.dtype == mask.dtype == np.uint8
        assert np.abs(image.mean((0, 1)) - photo.mean((0, 1))).max() < 3
        assert mask.shape == ((72, 96) if native_labels else size)
        # The nearest pixel: no id but that of the frame's pixel under the centre of the new one, or one beside it.
        y, x = (((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(mask.shape, ids.shape))
        near = [ids[np.ix_(np.clip(y + dy, 0, 71), np.clip(x + dx, 0, 95))] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert (mask == near).any(0).all() and (mask == near[4]).mean() > 0.9


def test_epoch_sampler():
    keys = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            torch.manual_seed(epoch)  # neither torch's own random state nor the object's past may matter
            sampler = EpochSampler(50, seed)
            sampler.epoch = epoch
            keys[seed, epoch] = list(sampler)
            assert list(sampler) == keys[seed, epoch] and len(sampler) == 50
            assert sorted(index for index, _ in keys[seed, epoch]) == list(range(50))
    sampler.seed = 0
    for sampler.epoch in (2, 1, 0):
        torch.rand(3)
        assert list(sampler) == keys[0, sampler.epoch]
    assert len({tuple(index for index, _ in order) for order in keys.values()}) == 6
    assert len({seed for order in keys.values() for _, seed in order}) == 6 * 50


def test_a_sample_depends_on_index_and_seed_alone(scenes):
    dataset = CamVidDataset(scenes, "train", CAMVID, train_transform((40, 56), 0))
    keys = [(index, seed) for index in range(4) for seed in (1, 2**32 - 1)]
    samples = {key: dataset[key] for key in keys}
    worker = pickle.loads(pickle.dumps(dataset))  # what a worker process receives
    for key in keys[::-1]:
        worker[0]  # an unseeded sample in between
        np.random.seed(key[0])
        for expected, found in zip(samples[key], worker[key]):
            assert torch.equal(expected, found)
    for index in range(4):
        assert not torch.equal(samples[index, 1][0], samples[index, 2**32 - 1][0])
    image, mask = samples[0, 1]
    assert image.shape == (3, 40, 56) and image.dtype == torch.float32
    assert mask.shape == (40, 56) and mask.dtype == torch.int64
