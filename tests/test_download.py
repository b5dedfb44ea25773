"""CamVid's archives, as made here with tiny frames, from a disk and from an address."""

import io
import itertools
import threading
import zipfile
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS32, PALETTE, make_pair
from PIL import Image

from datasets.classes import CAMVID
from datasets.layouts import standard_split
from datasets.spec import DataSpec

# The frames of the literature's split, by the lists of the SegNet repository.
STEMS = {
    "train": [f"0001TP_{6690 + 30 * i:06}" for i in range(62)]
    + [f"0006R0_f{930 + 30 * i:05}" for i in range(101)]
    + [f"0016E5_{390 + 30 * i:05}" for i in range(204)],
    "val": [f"0016E5_{7959 + 2 * i:05}" for i in range(101)],
    "test": [f"0001TP_{8550 + 30 * i:06}" for i in range(62)]
    + [f"Seq05VD_f{30 * i:05}" for i in range(171)],
}


def ids_of(stem: str) -> np.ndarray:
    return np.random.default_rng(sum(stem.encode())).integers(0, 12, (6, 8))


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def make_archive(path: Path, layout: str = "segnet", count: int = 701) -> None:
    """The frames, split badly, with masks as in SegNet's repository or in Kaggle's copy."""
    stems = [*itertools.chain(*STEMS.values())][:count]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("CamVid/README.md", "read me")
        for i, stem in enumerate(stems):
            ids = ids_of(stem)
            folder = "CamVid/" + ("train", "val", "test")[i % 3]
            colors = PALETTE[ids]
            archive.writestr(f"{folder}/{stem}.png", png(colors))
            if layout == "kaggle":
                colors[ids == 9] = COLORS32["SUVPickupTruck"]
                archive.writestr(f"{folder}_labels/{stem}_L.png", png(colors))
            else:
                mask = np.where(ids == 0, 11, ids - 1).astype(np.uint8)
                archive.writestr(f"{folder}annot/{stem}.png", png(mask))


@pytest.fixture
def address(tmp_path):
    """The address of a server of the files in tmp_path."""
    with HTTPServer(
        ("localhost", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("layout, online", [("segnet", True), ("kaggle", False)])
def test_an_archive_becomes_the_standard_split(call, tmp_path, address, layout, online):
    make_archive(tmp_path / "archive.zip", layout)
    root = tmp_path / "CamVid"
    root.mkdir()  # an empty folder is filled
    source = f"{address}/archive.zip" if online else "archive.zip"
    assert call("datasets.download", "--out", root, "--from", source)[0] == 0
    assert {path.name for path in root.iterdir()} == {*STEMS, *(f"{s}_labels" for s in STEMS)}
    for split, stems in STEMS.items():
        dataset = DataSpec(root, CAMVID).dataset(split)
        assert [pair.image.stem for pair in dataset.pairs] == sorted(stems)
        for index in range(0, len(dataset), 20):
            image, ids = dataset[index]
            expected = ids_of(dataset.pairs[index].image.stem)
            assert (ids == expected).all() and (image == PALETTE[expected]).all()
    assert "warning" not in call("datasets.check", "--data_root", root)[1]


@pytest.mark.parametrize("command", ["datasets.check", "train.py --width 4 --epochs 1"])
def test_a_random_split_is_warned_of(call, tmp_path, command):
    for i, stem in enumerate(STEMS["train"][:30]):
        make_pair(tmp_path, stem, np.array([[1, 2]]), split="val" if i % 3 == 1 else "train")
    flags = ("--data_root", tmp_path, "--data_name", "camvid")
    status, out, _ = call(*command.split(), *flags)
    assert status == 0 and "10 frames" in out
    assert standard_split("scene_0001") is standard_split("0001TP") is None


def truncate(path: Path) -> None:
    make_archive(path, count=9)
    path.write_bytes(path.read_bytes()[:-99])


def damage(path: Path) -> None:
    """Change the first byte of a packed frame."""
    make_archive(path, count=9)
    with zipfile.ZipFile(path) as archive:
        frame = archive.infolist()[5]
    content = bytearray(path.read_bytes())
    content[frame.header_offset + 30 + len(frame.filename)] = 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"no archive"),
        truncate,
        damage,
        partial(make_archive, count=9),
        lambda path: None,  # no such file, or status 404
    ],
    ids=["no archive", "truncated", "damaged", "incomplete", "missing"],
)
@pytest.mark.parametrize("online", [False, True])
def test_a_broken_archive_leaves_nothing(call, tmp_path, address, make, online):
    make(tmp_path / "archive.zip")
    source = f"{address}/archive.zip" if online else "archive.zip"
    status, _, err = call("datasets.download", "--out", "CamVid", "--from", source)
    assert status == 2 and "archive.zip: " in err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"archive.zip"}
