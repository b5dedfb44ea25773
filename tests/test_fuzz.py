"""Made-up masks, file names, class tables and checkpoints are answered or refused in one line, never with a crash."""
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
from hypothesis.extra import numpy as hnp

from checkpoints import SHIPPED, load_model
from datasets.camvid import PHOTO_SUFFIXES, find_pairs
from datasets.classes import CAMVID32, ClassSet
from runtime import UserError

settings.register_profile("here", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("here")

COLOR = st.tuples(*3 * [st.integers(0, 255)])
NEAR_CLASSES = st.sampled_from(sorted(COLORS32.values())) | COLOR


@given(st.data(), hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
def test_mask_decoder(data, shape):
    colors = data.draw(st.lists(NEAR_CLASSES, min_size=1, max_size=20))
    rgb = np.array(colors, np.uint8)[data.draw(hnp.arrays(int, shape, elements=st.integers(0, len(colors) - 1)))]
    ids = CAMVID32.to_ids(rgb)
    np.testing.assert_array_equal(ids, compare_per_class(rgb, CAMVID32.colors))
    known = ids != 255
    np.testing.assert_array_equal(CAMVID32.to_rgb(ids)[known], rgb[known])


NAME = st.builds(lambda stem, end, suffix: stem + end + suffix,
                 st.text(st.sampled_from("ab_L. ü"), min_size=1, max_size=4), st.sampled_from(["", "_L"]),
                 st.sampled_from([*PHOTO_SUFFIXES, ".PNG", ".txt", ""])).filter(lambda name: name.strip(". "))


@given(st.sets(NAME, max_size=6), st.sets(NAME, max_size=6))
def test_pairing(photos, labels):
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / name for name in ("train", "train_labels")]
        for folder, names in zip(folders, (photos, labels)):
            folder.mkdir()
            for name in names:
                (folder / name).touch()
        pairs, problems = find_pairs(*folders)
        for side, folder in enumerate(folders):
            paired = [pair[side] for pair in pairs]
            assert len(set(paired)) == len(paired)
            for path in folder.iterdir():
                image = path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".")
                assert path in paired or not image or any(path.name in problem for problem in problems), path
                assert image or path not in paired
        assert all(label.stem in (photo.stem, f"{photo.stem}_L") for photo, label in pairs)
        assert pairs or problems


ROW = st.tuples(st.text(max_size=6), *3 * [st.integers(-1, 256).map(str) | st.text(max_size=3)])


@given(st.lists(ROW, max_size=6), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_class_table_of_rows(rows, newline, bom):
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=newline).writerows([("name", "r", "g", "b"), *rows])
    read_table(file.getvalue().encode("utf-8-sig" if bom else "utf-8", errors="surrogatepass"))


@given(st.binary(max_size=80))
def test_class_table_of_bytes(data):
    read_table(data)
    read_table(b"name,r,g,b\n" + data)


def read_table(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "class_dict.csv"
        path.write_bytes(data)
        try:
            classes = ClassSet.from_csv(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return
    assert len(set(classes.names)) == len(set(classes.colors)) == len(classes) >= 2
    np.testing.assert_array_equal(classes.to_ids(np.array([classes.colors], np.uint8))[0], range(len(classes)))


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> bytes:
    state = torch.load(SHIPPED, weights_only=True)
    state["model_state_dict"] = {}  # the names of the weights make up most of the file's structure
    path = tmp_path_factory.mktemp("small") / "small.pth"
    torch.save(state, path)
    return path.read_bytes()


@given(st.data())
def test_checkpoint_with_changed_bytes(small_checkpoint, data):
    content = bytearray(small_checkpoint)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "changed.pth"
        path.write_bytes(content)
        with pytest.raises(UserError, match="changed.pth"):
            load_model(path)
