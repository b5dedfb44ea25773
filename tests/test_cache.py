"""The cache returns what the files hold, in every process, and samples do without it."""
import pickle

import numpy as np
import pytest
from conftest import make_pair

from datasets.cache import FrameCache, cache_bytes
from datasets.camvid import CamVidDataset
from datasets.classes import CAMVID


@pytest.fixture(params=[{}, {"max_side": 9}, {"max_side": 9, "native_masks": True}])
def dataset(tmp_path, request):
    """Three pairs of different sizes."""
    for i in range(3):
        make_pair(tmp_path / "data", "abc"[: i + 1], np.random.default_rng(i).integers(0, 12, (8 + i, 13)))
    return CamVidDataset(tmp_path / "data", "train", CAMVID, **request.param)


def assert_same(dataset, expected):
    for i in range(3):
        for ours, theirs in zip(dataset[i], expected[i], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_samples_are_decoded_once_and_come_back_as_read(dataset, tmp_path):
    expected = [dataset[i] for i in range(3)]
    dataset.cache = FrameCache(tmp_path / "frames", dataset)
    assert (tmp_path / "frames").stat().st_size <= 3 * 40 + cache_bytes({(8 + i, 13): 1 for i in range(3)},
                                                                        dataset.max_side)
    dataset.read = None  # only the cache can answer
    dataset[0][0][:] = 0  # a sample is the caller's to change
    worker = pickle.loads(pickle.dumps(dataset))  # as to a loader process that is started anew
    for reader in (dataset, worker):
        assert_same(reader, expected)
    assert len(pickle.dumps(dataset)) < 4000, "no pixels go to a worker"


def test_without_its_file_samples_are_read_as_before(dataset, tmp_path, monkeypatch):
    expected = [dataset[i] for i in range(3)]
    dataset.cache = FrameCache(tmp_path / "frames", dataset)
    (tmp_path / "frames").unlink()
    assert_same(dataset, expected)
    for path, size in ((tmp_path / "no folder" / "frames", 0), (tmp_path / "frames", 2**60)):
        dataset.cache = FrameCache(path, dataset, size)
        assert_same(dataset, expected)
        assert not path.exists(), "the disk is missing, or too full"
    with monkeypatch.context() as patch, pytest.raises(KeyError):  # a file that vanishes before it is decoded
        patch.setattr(dataset, "read", {i: dataset[i] for i in (0, 1)}.__getitem__)
        FrameCache(tmp_path / "frames", dataset)
    assert not (tmp_path / "frames").exists()
    other = FrameCache(tmp_path / "frames", dataset)
    other.remove()
    assert not (tmp_path / "frames").exists()
