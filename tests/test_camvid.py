import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import COLORS, COLORS32, MERGED, PALETTE, make_pair, opened, save, write_csv
from PIL import Image
from torch.utils.data import DataLoader

from datasets.camvid import CamVidDataset, EpochSampler, find_classes, find_pairs, find_split, held_out, read_mask
from datasets.check import check_data
from datasets.classes import CAMVID, CAMVID32, ClassSet
from datasets.transforms import train_transform
from support.command import UserError
from support.images import shrink

RNG = np.random.default_rng(0)
OWN = {f"thing {i}": (20 * i, 255 - i, 7) for i in range(12)}


def in_32_colors(ids: np.ndarray) -> np.ndarray:
    """The pixels in the colours of their class and of those merged into it, in turn."""
    colors = [[color, *MERGED.get(name, {}).values()] for name, color in COLORS.items()]
    pixels = [colors[i][n % len(colors[i])] for n, i in enumerate(ids.flat)]
    return np.array(pixels, np.uint8).reshape(*ids.shape, 3)


def as_segnet(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == 0, 11, ids.astype(int) - 1).astype(np.uint8)  # the SegNet copy: 0 Sky … 11 void


# name: the masks' folder and file name, what is in them, the class_dict.csv, options
LAYOUTS = {
    "12 colours": ("{}_labels/{}.png", PALETTE.__getitem__, None, {}),
    "32 colours": ("{}_labels/{}_L.png", in_32_colors, COLORS32, {}),
    "segnet": ("{}annot/{}.png", as_segnet, None, {}),
    "own colours": ("{}_labels/{}.png", np.array([*OWN.values()], np.uint8).__getitem__, OWN, {}),
    "own ids": ("{}_labels/{}.png", np.asarray, None, {"label_format": "ids", "num_classes": 12}),
    "own ids, 16 bits": ("{}_labels/{}.png", np.uint16, OWN, {"label_format": "ids"}),
    "own ids, annot": ("{}annot/{}.png", np.asarray, OWN, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, frames, layout):
    place, paint, csv, options = LAYOUTS[layout]
    for split in frames:
        for stem, image, ids in frames[split]:
            save(tmp_path / split / f"{stem}.png", image, compress_level=1)
            save(tmp_path / place.format(split, stem), paint(ids), compress_level=1)
    if csv:
        write_csv(tmp_path, csv)
    classes, label_format = find_classes(tmp_path, **options), options.get("label_format", "auto")
    own_classes = csv == OWN or options
    assert classes.ignore_index is None if own_classes else classes == CAMVID
    reports = check_data(tmp_path, list(frames), classes, label_format)
    for split, expected in frames.items():
        dataset = CamVidDataset(tmp_path, split, classes, label_format=label_format)
        assert len(dataset) == reports[split].pairs == len(expected) > 1 and not reports[split].stray
        for (stem, image, ids), pair, (found_image, found_ids) in zip(expected, dataset.pairs, dataset):
            assert pair.image.stem == stem and pair.mask.stem.removesuffix("_L") == stem
            assert (found_image == image).all() and (found_ids == ids).all()


def test_a_folder_with_a_split_is_not_one_without(tmp_path):
    """A split that is missing is not made of images/ beside it; one may lie deeper."""
    for folder, stem in ((tmp_path, "a"), (tmp_path / "night", "b1"), (tmp_path / "night", "c1")):
        make_pair(folder, stem)
    assert len(find_split(tmp_path, "night/train")[0]) == len(find_split(tmp_path / "night", "./train")[0]) == 2
    for folder, name in (("images", "d.png"), ("masks", "d.png")):
        save(tmp_path / folder / name, PALETTE[None])
    with pytest.raises(UserError, match="needs the folders val and either"):
        find_split(tmp_path, "val")


def test_find_classes(scenes, tmp_path):
    write_csv(tmp_path, OWN)
    assert find_classes(tmp_path, "camvid", "ids") == CAMVID  # the name comes before the folder's table
    assert find_classes(tmp_path, "camvid32", num_classes=32) == CAMVID32


def test_every_file_is_in_one_pair_or_named_as_a_problem(tmp_path):
    """In each of 256 folders."""
    names = "b.1.png", "b.1.JPG", "b.1_L.png", "b.1_L_L.png"
    for files in range(256):
        folders = tmp_path / f"{files}" / "train", tmp_path / f"{files}" / "train_labels"
        there = [path for i, path in enumerate(itertools.product(folders, names)) if files >> i & 1]
        for folder, name in there:
            save(folder / name, PALETTE[None])
        pairs, problems = find_pairs(*folders)
        assert pairs == sorted(pairs) and (pairs or problems)
        assert all(mask.stem in (image.stem, f"{image.stem}_L") for image, mask in pairs)
        for folder, name in there:
            count = sum(pair.count(folder / name) for pair in pairs)
            assert count == 1 or count == 0 and any(name in problem for problem in problems), (there, name)


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
    assert opened(dataset.pairs[0].mask).mode == mode and dataset[0][1].tolist() == [expected]


def test_a_coloured_mask_is_not_ids(tmp_path):
    with pytest.raises(UserError, match="a.png.*label_format rgb"):
        read_mask(make_pair(tmp_path, "a")[1], CAMVID, "ids")


@pytest.mark.parametrize("options", [{}, {"max_side": 9}, {"max_side": 9, "native_masks": True}])
def test_samples_that_are_kept_come_back_as_read(options, tmp_path):
    for i in range(3):
        make_pair(tmp_path, "abc"[: i + 1], np.random.default_rng(i).integers(0, 12, (8 + i, 13)))
    dataset = CamVidDataset(tmp_path, "train", CAMVID, **options)
    expected = [dataset[i] for i in range(3)]
    dataset.keep_decoded()
    spawned = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 4000, "no pixels go to a worker"
    dataset.read = None  # only what is kept can answer
    dataset[0][0][:] = 0  # a sample is the caller's to change
    for reader in (dataset, spawned):
        for i in range(3):
            for ours, theirs in zip(reader[i], expected[i], strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("native_masks", [False, True])
def test_max_side(scenes, native_masks):
    whole, small = (CamVidDataset(scenes, "train", CAMVID, max_side=n, native_masks=native_masks) for n in (0, 48))
    for (native_image, native_ids), (image, ids) in zip(whole, small):
        assert native_image.shape == (72, 96, 3) and (image == shrink(native_image, 48)).all()
        assert np.array_equal(ids, native_ids if native_masks else shrink(native_ids, 48))


def test_the_order_is_that_of_earlier_versions():  # or a resumed run would see other samples
    sampler = EpochSampler(4, seed=1)
    sampler.epoch = 5
    assert list(sampler) == [(2, 3739010650), (1, 4119617281), (0, 2452079151), (3, 3358404019)] and len(sampler) == 4


def test_a_sample_depends_on_index_and_seed_alone(scenes):
    dataset = CamVidDataset(scenes, "train", CAMVID, train_transform((40, 56), 0))
    samples = {(index, seed): dataset[index, seed] for index in range(4) for seed in (1, 2**32 - 1)}
    worker = pickle.loads(pickle.dumps(dataset))  # what a worker process receives
    for key in reversed(samples):
        worker[0]  # an unseeded sample in between
        assert all(map(torch.equal, samples[key], worker[key])) and samples[key][1].dtype == torch.int64
    assert not any(torch.equal(samples[index, 1][0], samples[index, 2**32 - 1][0]) for index in range(4))


def test_without_a_seed_no_two_samples_of_any_process_and_epoch_are_the_same(scenes):
    loader = DataLoader(CamVidDataset(scenes, "train", CAMVID, train_transform((40, 56), 0)), num_workers=2)
    assert len({image.numpy().tobytes() for _ in range(2) for image, _ in loader}) == 8


def test_a_transform_is_any_function(scenes):
    def transform(image, mask):
        return {"image": torch.from_numpy(image[:8]), "mask": torch.from_numpy(mask[:8])}
    dataset = CamVidDataset(scenes, "train", CAMVID, transform)
    assert len(dataset[0][1]) == 8 and torch.equal(dataset[0, 7][0], dataset[0][0])


@pytest.mark.parametrize("stems, percent, held", [
    ([f"a{i:03}" for i in range(20)], 10, {"a018", "a019"}),  # one video: its end
    ([f"a{i}" for i in range(12)], 25, {"a9", "a10", "a11"}),
    ([f"{drive}_{i}" for drive in "abc" for i in range({"a": 50, "b": 6, "c": 40}[drive])], 5,
     {f"b_{i}" for i in range(6)}),
    ([f"{drive}_{i}" for drive in "abc" for i in range(30)], 40, {f"{drive}_{i}" for drive in "ab" for i in range(30)}),
    (["left", "right"], 10, {"left"}), (["a1", "a2"], 1, {"a2"}), (["a1", "b1"], 90, {"a1"}), (["a1"], 50, set()),
    (["photo", *(f"a{i}" for i in range(29))], 10, {"photo", "a27", "a28"}),  # and the end of the longest, if too few
    ([f"a{i}" for i in range(14)], 10, {"a12", "a13"}),  # at least a tenth
])
def test_held_out_for_validation_are_whole_videos(stems, percent, held):
    assert held_out(stems, percent) == held
