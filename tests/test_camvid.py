"""CamVidDataset: from the files of a pair to a sample, and the order of the samples."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_pair, opened
from PIL import Image
from torch.utils.data import DataLoader

from datasets.camvid import CamVidDataset, EpochSampler, read_mask
from datasets.classes import CAMVID, ClassSet
from datasets.layouts import Pair
from datasets.spec import DataSpec
from datasets.transforms import train_transform
from model import normalization
from support.command import UserError
from support.images import shrink


@pytest.fixture
def augmented(scenes) -> CamVidDataset:
    """The four training scenes, augmented."""
    return DataSpec(scenes, CAMVID).dataset(
        "train", train_transform((40, 56), 0, **normalization("unet"))
    )


@pytest.mark.parametrize(
    "label_format, classes, values, expected",
    [
        ("ids", ClassSet.numbered(3), [0, 1, 2, 3, 200, 255], [0, 1, 2, 255, 255, 255]),
        ("ids", replace(ClassSet.numbered(3), ignore_index=1), [0, 1, 2, 3], [0, 1, 2, 1]),
        ("segnet", CAMVID, [0, 1, 10, 11, 12, 255], [1, 2, 11, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_ids_beyond_the_classes_are_ignored(
    tmp_path, label_format, classes, values, expected, mode
):
    pair = Pair(*make_pair(tmp_path, "a", np.zeros((1, len(values)), int)))
    mask = Image.fromarray(np.array([values], np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        mask.putpalette(np.random.default_rng(0).bytes(768))
    mask.save(pair.mask)
    assert opened(pair.mask).mode == mode
    dataset = CamVidDataset([pair], classes, label_format=label_format)
    assert dataset[0][1].tolist() == [expected]


def test_a_coloured_mask_is_not_ids(tmp_path):
    with pytest.raises(UserError, match="a.png"):
        read_mask(make_pair(tmp_path, "a")[1], CAMVID, "ids")


@pytest.mark.parametrize("native_masks", [False, True])
@pytest.mark.parametrize("max_side", [0, 48])
def test_large_images_are_shrunk_and_masks_only_if_asked(scenes, native_masks, max_side):
    """Whether the files are read anew, were decoded by the check, or went to a worker."""
    data = DataSpec(scenes, CAMVID, max_side=max_side)
    dataset = data.dataset("train", native_masks=native_masks)
    decoded = data.dataset("train", native_masks=native_masks)
    decoded.decoded = data.check(["train"])["train"].samples
    worker = pickle.loads(pickle.dumps(decoded))
    assert len(decoded.decoded) == 4 and not worker.decoded, "no pixels go to a worker"
    decoded[0][0][:] = 0  # a sample is the caller's to change
    for index, pair in enumerate(dataset.pairs):
        image = np.array(opened(pair.image))
        mask = CAMVID.to_ids(np.array(opened(pair.mask)))
        for reader in (dataset, decoded, worker):
            found_image, found_mask = reader[index]
            np.testing.assert_array_equal(found_image, shrink(image, max_side))
            np.testing.assert_array_equal(
                found_mask, mask if native_masks else shrink(mask, max_side)
            )


def test_the_order_is_that_of_earlier_versions():
    """Or a run that an earlier version began would resume with other samples."""
    sampler = EpochSampler(4, seed=1)
    sampler.set_epoch(5)
    assert [*sampler] == [(2, 3739010650), (1, 4119617281), (0, 2452079151), (3, 3358404019)]


def test_a_sample_depends_on_its_index_and_seed_alone(augmented):
    keys = [(index, seed) for index in range(4) for seed in (1, 2**32 - 1)]
    samples = {key: augmented[key] for key in keys}
    assert len({image.numpy().tobytes() for image, _ in samples.values()}) == 8
    worker = pickle.loads(pickle.dumps(augmented))
    for key in reversed(keys):
        worker[0]  # an unseeded sample in between
        image, mask = worker[key]
        assert torch.equal(image, samples[key][0]) and torch.equal(mask, samples[key][1])
        assert mask.dtype == torch.int64


def test_unseeded_samples_differ_between_workers_and_epochs(augmented):
    loader = DataLoader(augmented, num_workers=2)
    assert len({image.numpy().tobytes() for _ in range(2) for image, _ in loader}) == 8


def test_a_transform_is_any_function(scenes):
    def transform(image, mask):
        return {"image": torch.from_numpy(image[:8]), "mask": torch.from_numpy(mask[:8])}

    data = DataSpec(scenes, CAMVID)
    for found, whole in zip(data.dataset("train", transform)[0, 7], data.dataset("train")[0]):
        np.testing.assert_array_equal(found, whole[:8])
