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
    """Three frames of different sizes."""
    for i in range(3):
        make_pair(tmp_path / "data", "abc"[: i + 1], np.random.default_rng(i).integers(0, 12, (8 + i, 13)))
    return tmp_path / "data"


def equal(first, second) -> bool:
    return len(first) == len(second) and all(np.array_equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))


@pytest.mark.parametrize("options", [{}, {"image_size": (6, 10)}, {"image_size": (6, 10), "native_labels": True}])
def test_frames_come_back_as_read(data, tmp_path, options):
    dataset = CamVidDataset(data, "train", CAMVID, **options)
    expected = [dataset[i] for i in range(3)]
    dataset.cache = FrameCache(tmp_path / "cache", "train", dataset)
    for pair in dataset.pairs:
        pair.photo.unlink()  # nothing but the cache can answer now
    assert equal([dataset[i] for i in range(3)], expected)
    dataset[0][0][:] = 0  # a sample is the caller's to change
    assert equal([pickle.loads(pickle.dumps(dataset))[i] for i in range(3)], expected)


def test_frames_are_decoded_once(data, tmp_path, monkeypatch):
    dataset = CamVidDataset(data, "train", CAMVID)
    expected = [dataset[i] for i in range(3)]
    FrameCache(tmp_path, "train", dataset)
    monkeypatch.setattr(dataset, "read", None)
    again = FrameCache(tmp_path, "train", dataset)
    assert equal([again.read(i) for i in range(3)], expected)


def test_a_changed_file_makes_a_new_cache_and_removes_the_old(data, tmp_path):
    dataset = CamVidDataset(data, "train", CAMVID)
    other, old = (FrameCache(tmp_path, split, dataset).path for split in ("val", "train"))
    make_pair(data, "ab", np.full((30, 40), 3))
    dataset = CamVidDataset(data, "train", CAMVID)
    new = FrameCache(tmp_path, "train", dataset)
    assert (new.read(1)[1] == 3).all() and new.read(1)[0].shape == (30, 40, 3)
    assert new.path != old and not old.exists() and other.exists()


def test_fingerprint_depends_on_what_changes_the_frames(data):
    def current(classes=CAMVID, **options):
        return fingerprint(CamVidDataset(data, "train", classes, **options))
    prints = [current(), current(CAMVID32), current(image_size=(6, 10)), current(native_labels=True),
              current(label_format="ids")]
    assert prints[0] == current()
    os.utime(data / "train" / "a.png", ns=(0, 0))
    assert len({*prints, current()}) == 6


def test_an_unfinished_cache_is_made_again(data, tmp_path, monkeypatch):
    dataset = CamVidDataset(data, "train", CAMVID)
    read = dataset.read

    def interrupted(i):
        if i == 2:
            raise KeyboardInterrupt
        return read(i)
    monkeypatch.setattr(dataset, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FrameCache(tmp_path / "cache", "train", dataset)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(dataset, "read", read)
    assert equal([FrameCache(tmp_path / "cache", "train", dataset).read(2)], [read(2)])
