"""Made-up masks, file names, class tables and checkpoints are read or refused in one line, never with a crash."""
import csv
import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLORS32, compare_per_class
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.camvid import find_pairs
from datasets.classes import CAMVID32, ClassSet
from support.command import UserError
from support.images import IMAGE_SUFFIXES
from training.checkpoints import SHIPPED, load_model

settings.register_profile("here", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("here")

COLOR = st.sampled_from(sorted(COLORS32.values())) | st.tuples(*3 * [st.integers(0, 255)])
NAME = st.builds("{}{}{}".format, st.text(st.sampled_from("ab_L. ü"), min_size=1, max_size=4),
                 st.sampled_from(["", "_L"]), st.sampled_from([*IMAGE_SUFFIXES, ".PNG", ".txt", ""]))
NAMES = st.sets(NAME.filter(lambda name: name.strip(". ")), max_size=6)
CELL = st.integers(-1, 256).map(str) | st.text(max_size=3)
ROWS = st.lists(st.tuples(st.text(max_size=6), CELL, CELL, CELL), max_size=6)


@given(st.lists(COLOR, min_size=1, max_size=60))
def test_mask_decoder(colors):
    rgb = np.array([colors], np.uint8)
    ids = CAMVID32.to_ids(rgb)
    assert (ids == compare_per_class(rgb, CAMVID32.colors)).all()
    assert (CAMVID32.to_rgb(ids)[ids != 255] == rgb[ids != 255]).all()


@given(NAMES, NAMES)
def test_pairing(images, masks):
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / name for name in ("train", "train_labels")]
        for folder, files in zip(folders, (images, masks)):
            folder.mkdir()
            for name in files:
                (folder / name).touch()
        pairs, problems = find_pairs(*folders)
        for folder, paired in zip(folders, zip(*pairs) if pairs else ((), ())):
            assert len(set(paired)) == len(paired)
            for path in folder.iterdir():
                image = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
                assert path in paired or not image or any(path.name in problem for problem in problems), path
                assert image or path not in paired
        assert all(mask.stem in (image.stem, f"{image.stem}_L") for image, mask in pairs)
        assert pairs or problems


def encode(rows: list[tuple], newline: str, encoding: str) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=newline).writerows([("name", "r", "g", "b"), *rows])
    return file.getvalue().encode(encoding, errors="surrogatepass")


@given(st.binary(max_size=80) | st.binary(max_size=80).map(b"name,r,g,b\n".__add__)
       | st.builds(encode, ROWS, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["utf-8", "utf-8-sig"])))
def test_class_table(data):
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "class_dict.csv"
        path.write_bytes(data)
        try:
            classes = ClassSet.from_csv(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert len(set(classes.names)) == len(set(classes.colors)) == len(classes) >= 2
            assert (classes.to_ids(np.array([classes.colors], np.uint8))[0] == range(len(classes))).all()


@pytest.fixture(scope="module")
def small_checkpoint() -> bytes:
    """The shipped file without its weights, whose names make up most of its structure."""
    state = torch.load(SHIPPED, weights_only=True)
    file = io.BytesIO()
    torch.save({key: {} if "state_dict" in key else value for key, value in state.items()}, file)
    return file.getvalue()


@given(st.data())
def test_checkpoint_with_changed_bytes(small_checkpoint, data):
    content = bytearray(small_checkpoint)
    for place, byte in data.draw(st.dictionaries(st.integers(0, len(content) - 1), st.integers(0, 255), min_size=1,
                                                 max_size=8)).items():
        content[place] = byte
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "changed.pth"
        path.write_bytes(content)
        with pytest.raises(UserError, match="changed.pth"):
            load_model(path)
