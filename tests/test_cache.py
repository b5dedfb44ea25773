"""The cache returns what the files hold, and notices when they change."""
import os
import pickle

import numpy as np
import pytest
from conftest import make_pair

from datasets.cache import FrameCache, fingerprint
from datasets.camvid import CamVidDataset
from datasets.classes import CAMVID, CAMVID32


@pytest.fixture
def data(tmp_path):
    """Three pairs of different sizes."""
    for i in range(3):
        make_pair(tmp_path / "data", "abc"[: i + 1], np.random.default_rng(i).integers(0, 12, (8 + i, 13)))
    return tmp_path / "data"


@pytest.mark.parametrize("options", [{}, {"max_side": 9}, {"max_side": 9, "native_masks": True}])
def test_samples_are_decoded_once_and_come_back_as_read(data, tmp_path, options):
    dataset, again = (CamVidDataset(data, "train", CAMVID, **options) for _ in range(2))
    expected = [dataset[i] for i in range(3)]
    dataset.cache = FrameCache(tmp_path / "cache", "train", dataset)
    again.read = None  # only the cache can answer
    again.cache = FrameCache(tmp_path / "cache", "train", again)
    again[0][0][:] = 0  # a sample is the caller's to change
    for cached in (dataset, again, pickle.loads(pickle.dumps(again))):
        for i in range(3):
            for ours, theirs in zip(cached[i], expected[i], strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert len(pickle.dumps(again.cache)) < len(pickle.dumps(expected))  # no pixels go to a spawned worker


def test_a_changed_file_makes_a_new_cache_and_removes_the_old(data, tmp_path):
    dataset = CamVidDataset(data, "train", CAMVID)
    other, longer, old = (FrameCache(tmp_path, split, dataset).path for split in ("val", "train_b", "train"))
    killed = tmp_path / f".train_{16 * 'f'}.tmp.bin"
    killed.touch()
    make_pair(data, "ab", np.full((30, 40), 3))
    new = FrameCache(tmp_path, "train", CamVidDataset(data, "train", CAMVID))
    assert (new.read(1)[1] == 3).all() and new.read(1)[0].shape == (30, 40, 3)
    assert new.path != old and not old.exists() and not killed.exists() and other.exists() and longer.exists()


def test_fingerprint_depends_on_what_changes_the_samples(data):
    def current(classes=CAMVID, **options):
        return fingerprint(CamVidDataset(data, "train", classes, **options))
    before = current()
    prints = {before, current(CAMVID32), current(max_side=9), current(native_masks=True), current(label_format="ids")}
    assert current() == before and len(prints) == 5
    os.utime(data / "train" / "a.png", ns=(0, 0))
    assert current() not in prints


def test_an_unfinished_cache_is_made_again(data, tmp_path, monkeypatch):
    dataset = CamVidDataset(data, "train", CAMVID)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(dataset, "read", {i: dataset[i] for i in (0, 1)}.__getitem__)
        FrameCache(tmp_path, "train", dataset)
    assert not list(tmp_path.glob("*train*")) + list(tmp_path.glob(".*"))
    assert (FrameCache(tmp_path, "train", dataset).read(2)[1] == dataset[2][1]).all()
