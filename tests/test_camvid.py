import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import COLORS, COLORS32, MERGED, PALETTE, make_pair, save, write_csv
from PIL import Image

from datasets.camvid import CamVidDataset, EpochSampler, find_classes, find_folders, read_mask
from datasets.check import check_data
from datasets.classes import CAMVID, CAMVID32, ClassSet
from datasets.transforms import train_transform
from support.command import UserError

RNG = np.random.default_rng(0)
OWN = {f"thing {i}": (20 * i, 255 - i, 7) for i in range(12)}


def in_32_colors(ids: np.ndarray) -> np.ndarray:
    """Every pixel in the colour of its class or, at random, of a class merged into it."""
    rgb = PALETTE[ids]
    for into, colors in MERGED.items():
        pixels = ids == list(COLORS).index(into)
        rgb[pixels] = RNG.choice([COLORS[into], *colors.values()], pixels.sum())
    return rgb


in_own_colors = np.array([*OWN.values()], np.uint8).__getitem__


def as_segnet(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == 0, 11, ids.astype(int) - 1).astype(np.uint8)  # the SegNet copy: 0 Sky … 11 void


# name: the masks' folder and file name, what is in them, the class_dict.csv, options, the ignored id
LAYOUTS = {
    "12 colours": ("{}_labels/{}.png", PALETTE.__getitem__, None, {}, 0),
    "32 colours": ("{}_labels/{}_L.png", in_32_colors, COLORS32, {}, 0),
    "segnet": ("{}annot/{}.png", as_segnet, None, {}, 0),
    "own colours": ("{}_labels/{}.png", in_own_colors, OWN, {}, None),
    "own ids": ("{}_labels/{}.png", np.asarray, None, {"label_format": "ids", "num_classes": 12}, None),
    "own ids, 16 bits": ("{}_labels/{}.png", np.uint16, OWN, {"label_format": "ids"}, None),
    "own ids, annot": ("{}annot/{}.png", np.asarray, OWN, {}, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, frames, layout):
    place, paint, csv, options, ignored = LAYOUTS[layout]
    for split in frames:
        for stem, image, ids in frames[split]:
            save(tmp_path / split / f"{stem}.png", image, compress_level=1)
            save(tmp_path / place.format(split, stem), paint(ids), compress_level=1)
    if csv:
        write_csv(tmp_path, csv)
    classes, label_format = find_classes(tmp_path, **options), options.get("label_format", "auto")
    assert (len(classes), classes.ignore_index) == (12, ignored)
    assert csv == OWN or options or classes == CAMVID
    reports = check_data(tmp_path, list(frames), classes, label_format)
    for split, expected in frames.items():
        dataset = CamVidDataset(tmp_path, split, classes, label_format=label_format)
        assert len(dataset) == reports[split].pairs == len(expected) > 1
        for (stem, image, ids), pair, (found_image, found_ids) in zip(expected, dataset.pairs, dataset):
            assert pair.image.stem == stem and pair.mask.stem.removesuffix("_L") == stem
            assert (found_image == image).all() and (found_ids == ids).all()
        count = sum(np.bincount(ids.ravel(), minlength=256) for _, _, ids in expected)
        assert (reports[split].pixels == count).all() and not reports[split].stray


def test_find_classes(scenes, tmp_path):
    write_csv(tmp_path, OWN)
    assert find_classes(tmp_path).names == tuple(OWN) and find_classes(tmp_path, "camvid", "ids") == CAMVID
    assert find_classes(tmp_path, "camvid32", num_classes=32) == CAMVID32 and find_classes(scenes) == CAMVID


@pytest.mark.parametrize("options, said", [
    ({"num_classes": 7}, "num_classes 7.*12 classes"),
    ({"label_format": "ids"}, "class_dict.csv"), ({"label_format": "ids", "num_classes": 1}, "num_classes is 1"),
    ({"label_format": "ids", "num_classes": 256}, "is 256.* 2 to 255"),
    ({"data_name": "camvid32", "num_classes": 12}, "32 classes")])
def test_find_classes_refuses(scenes, options, said):
    with pytest.raises(UserError, match=said):
        find_classes(scenes, **options)


@pytest.mark.parametrize("folders, said", [
    ([], "no such folder"), (["train"], "train_labels or trainannot"), (["train_labels"], "the folders train and"),
    (["train", "train_labels", "trainannot"], "either")])
def test_find_folders_refuses(tmp_path, folders, said):
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{tmp_path / 'data'}.*{said}"):
        find_folders(tmp_path / "data", "train")


def test_pairs_by_stem_not_by_position(tmp_path):
    """Masks with and without _L, images of several types: their orders differ if sorted by file name."""
    stems = ["a", "a_b", "a0", "b_L", "b.1", "Z", "10", "9"]  # a.png < a0.png, but a0_L.png < a_L.png
    for i, stem in enumerate(stems):
        image, mask = make_pair(tmp_path, stem, np.full((4, 5), i))
        image.rename(image.with_name(stem + (".png", ".JPG", ".webp")[i % 3]))
        mask.rename(mask.with_name(stem + ("_L.png", ".png")[i % 2]))
    dataset = CamVidDataset(tmp_path, "train", CAMVID)
    assert [pair.image.name for pair in dataset.pairs] == sorted(path.name for path in (tmp_path / "train").iterdir())
    assert [dataset[i][1].max() for i in range(8)] == [stems.index(pair.image.stem) for pair in dataset.pairs]


@pytest.mark.parametrize("label_format, classes, values, expected", [
    ("ids", ClassSet.numbered(3), [0, 1, 2, 3, 200, 255], [0, 1, 2, 255, 255, 255]),
    ("ids", replace(ClassSet.numbered(3), ignore_index=1), [0, 1, 2, 3, 255], [0, 1, 2, 1, 1]),
    ("segnet", CAMVID, [0, 1, 10, 11, 12, 255], [1, 2, 11, 0, 0, 0])])
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_values_of_id_masks(tmp_path, label_format, classes, values, expected, mode):
    """Ids beyond the classes become void in the dataset: the ignored class, or 255 if there is none."""
    image = Image.fromarray(np.array([values], np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette(RNG.bytes(768))
    image.save(make_pair(tmp_path, "a", np.zeros((1, len(values)), int))[1])
    dataset = CamVidDataset(tmp_path, "train", classes, label_format=label_format)
    with Image.open(dataset.pairs[0].mask) as image:
        assert image.mode == mode and dataset[0][1].tolist() == [expected]


def test_a_coloured_mask_is_not_ids(tmp_path):
    with pytest.raises(UserError, match="a.png.*label_format rgb"):
        read_mask(make_pair(tmp_path, "a")[1], CAMVID, "ids")


@pytest.mark.parametrize("max_side, size", [(0, (72, 96)), (100, (72, 96)), (48, (36, 48)), (70, (53, 70))])
@pytest.mark.parametrize("native_masks", [False, True])
def test_max_side(scenes, max_side, size, native_masks):
    dataset = CamVidDataset(scenes, "train", CAMVID, max_side=max_side, native_masks=native_masks)
    for (native_image, native_ids), (image, ids) in zip(CamVidDataset(scenes, "train", CAMVID), dataset):
        assert image.shape == (*size, 3) and image.dtype == ids.dtype == np.uint8
        assert np.abs(image.mean((0, 1)) - native_image.mean((0, 1))).max() < 3
        assert ids.shape == ((72, 96) if native_masks else size)
        # An id is that of the native pixel under the centre of the new one, or beside it where rounding decides.
        y, x = (((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(ids.shape, native_ids.shape))
        assert (ids == native_ids[np.ix_(y, x)]).mean() > 0.95 and set(ids.flat) <= set(native_ids.flat)


def test_epoch_sampler():
    sampler, orders = EpochSampler(50), {}
    for sampler.seed, sampler.epoch in 2 * [(0, 2), (0, 0), (1, 2), (1, 0)]:
        torch.rand(3)  # neither torch's own random state nor the object's past may matter
        order = list(sampler)
        assert orders.setdefault((sampler.seed, sampler.epoch), order) == order and len(sampler) == 50
        assert sorted(index for index, _ in order) == list(range(50))
    assert len({tuple(index for index, _ in order) for order in orders.values()}) == 4
    assert len({seed for order in orders.values() for _, seed in order}) == 4 * 50


def test_the_order_is_that_of_earlier_versions():  # or a resumed run would see other samples
    sampler = EpochSampler(4, seed=1)
    sampler.epoch = 5
    assert list(sampler) == [(2, 3739010650), (1, 4119617281), (0, 2452079151), (3, 3358404019)]


def test_a_sample_depends_on_index_and_seed_alone(scenes):
    dataset = CamVidDataset(scenes, "train", CAMVID, train_transform((40, 56), 0))
    samples = {(index, seed): dataset[index, seed] for index in range(4) for seed in (1, 2**32 - 1)}
    worker = pickle.loads(pickle.dumps(dataset))  # what a worker process receives
    for key in [*samples][::-1]:
        worker[0]  # an unseeded sample in between
        assert all(map(torch.equal, samples[key], worker[key]))
    assert not any(torch.equal(samples[index, 1][0], samples[index, 2**32 - 1][0]) for index in range(4))
    image, mask = samples[0, 1]
    assert image.shape == (3, 40, 56) and mask.shape == (40, 56)
    assert image.dtype == torch.float32 and mask.dtype == torch.int64
