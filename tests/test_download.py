"""CamVid's archives, as made here with tiny frames, from a disk and from an address."""
import contextlib
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import COLORS32, PALETTE, make_pair

from datasets.camvid import CamVidDataset, standard_split
from datasets.classes import CAMVID

STEMS = {
    "train": [f"0001TP_{6690 + 30 * i:06}" for i in range(62)] + [f"0006R0_f{930 + 30 * i:05}" for i in range(101)]
             + [f"0016E5_{390 + 30 * i:05}" for i in range(204)],
    "val": [f"0016E5_{7959 + 2 * i:05}" for i in range(101)],
    "test": [f"0001TP_{8550 + 30 * i:06}" for i in range(62)] + [f"Seq05VD_f{30 * i:05}" for i in range(171)],
}


def expected_ids(stem: str) -> np.ndarray:
    return np.random.default_rng(sum(stem.encode())).integers(0, 12, (6, 8))


def make_archive(path: Path, layout: str = "segnet", leave_out: str = "", spoil: str = "") -> bytes:
    """The 701 frames, split badly, with masks as in SegNet's repository or as in Kaggle's copy: 32 colours, with _L."""
    def png(array: np.ndarray) -> bytes:
        return cv2.imencode(".png", array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()  # OpenCV takes BGR

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("CamVid/README.md", "read me")
        archive.writestr("__MACOSX/CamVid/train/._0001TP_006690.png", "no image")
        for i, stem in enumerate(stem for stems in STEMS.values() for stem in stems if stem != leave_out):
            ids, split = expected_ids(stem), [*STEMS][i % 3]
            colors = PALETTE[ids]
            archive.writestr(f"CamVid/{split}/{stem}.png", png(colors))
            colors[ids == 9] = COLORS32["SUVPickupTruck"]
            mask = png(colors) if layout == "kaggle" else png(np.where(ids == 0, 11, ids - 1).astype(np.uint8))
            name = f"CamVid/{split}annot/{stem}.png" if layout == "segnet" else f"CamVid/{split}_labels/{stem}_L.png"
            archive.writestr(name, mask[:30] if stem == spoil else mask)
    return path.read_bytes()


@contextlib.contextmanager
def sending(answer: bytes) -> Iterator[str]:
    """The address of a server that sends ``answer``, once."""
    def send() -> None:
        with server.accept()[0] as connection:
            connection.recv(9999)
            connection.sendall(answer)

    with socket.create_server(("localhost", 0)) as server:
        threading.Thread(target=send, daemon=True).start()
        yield f"http://localhost:{server.getsockname()[1]}/a.zip"


@pytest.mark.parametrize("layout, online", [("segnet", True), ("kaggle", False)])
def test_an_archive_becomes_the_standard_split(call, tmp_path, layout, online):
    archive, root = tmp_path / "archive.zip", tmp_path / "CamVid"
    content = make_archive(archive, layout)
    root.mkdir()  # an empty folder is filled
    answer = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    with sending(answer) if online else contextlib.nullcontext(archive) as source:
        status, _, err = call("datasets.download", "--out", root, "--from", source)
    assert status == 0 and not err
    assert {path.name for path in root.glob("[!.]*")} == {s + e for s in STEMS for e in ("", "_labels")}
    for split, stems in STEMS.items():
        dataset = CamVidDataset(root, split, CAMVID)
        assert [pair.image.stem for pair in dataset.pairs] == sorted(stems)
        for stem, (image, ids) in list(zip(sorted(stems), dataset))[::20]:
            assert (ids == expected_ids(stem)).all() and (image == PALETTE[ids]).all()
    assert "scores are too high" not in call("datasets.check", "--data_root", root)[1]


def test_the_check_warns_of_a_random_split(call, tmp_path):
    for i, stem in enumerate(STEMS["train"][:30]):
        make_pair(tmp_path, stem, np.ones((2, 2), int), split="val" if i % 3 == 1 else "train")
    out = call("datasets.check", "--data_root", tmp_path)[1]
    assert "warning: the literature trains on 10 frames" in out and "scores are too high" in out
    assert standard_split("scene_0001") is standard_split("0001TP") is None


def pack(name: str, content: bytes, method: int = zipfile.ZIP_DEFLATED, flags: bytes = b"\0"):
    """Writes an archive of one file. flags: general purpose, in the local and in the central header."""
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr(name, content)
        path.write_bytes(path.read_bytes().replace(b"\x14\0\0\0", b"\x14\0" + flags + b"\0"))
    return write


FRAME = "CamVid/train/0001TP_006690.png"


@pytest.mark.parametrize("make, said", [
    (lambda path: path.write_bytes(b"no archive"), "not a zip archive of CamVid"),
    (lambda path: path.write_bytes(make_archive(path).replace(b"IDAT", b"IDAD")), "Bad CRC"),
    (lambda path: make_archive(path, leave_out="0016E5_08001"), "'val': 100"),
    (lambda path: make_archive(path, spoil="0006R0_f00930"), "train_labels/0006R0_f00930.png: is no image"),
    (pack(FRAME, bytes(99), flags=b"\1"), "is encrypted"), (pack(FRAME, bytes(99), zipfile.ZIP_LZMA), "99 bytes long"),
    (pack(FRAME, bytes(20_000_000)), "20,000,000 bytes"), (pack(FRAME, bytes(99), zipfile.ZIP_BZIP2), "so packed"),
    (pack("a/../../evil.png", b""), "it holds"), (pack("bomb.bin", bytes(20_000_000)), "it holds"),
    (Path.mkdir, "no such file"), (lambda path: None, "no such file")])
def test_broken_archives_leave_nothing(call, tmp_path, make, said):
    make(tmp_path / "archive.zip")
    status, _, err = call("datasets.download", "--out", "CamVid", "--from", "archive.zip")
    assert status == 2 and "archive.zip: " in err and said in err and err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"archive.zip"}


@pytest.mark.parametrize("answer, said", [
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2000\r\n\r\nhalf", "1,996 bytes too early"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf", "IncompleteRead"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhalf", "IncompleteRead"),
    (b"HTTP/1.0 200 OK\r\n" + 200 * b"A: b\r\n" + b"\r\n", "headers"), (b"\x1b[31m\n\n", r"\x1b[31m"),
    (b"", "closed"),
    (b"HTTP/1.0 404 Gone\x1b\r\n\r\n", "404"), (b"HTTP/1.0 200 OK\r\n\r\n" + bytes(5000), "larger than 4,096"),
    ("http://localhost:1/a.zip", "refused"), ("http://localhost:port/", "port"), ("x://", "unknown"),
    ("http://[::/", "Invalid IPv6"), ("file:///nowhere.zip", "nowhere.zip"), ("http://a b/", "control")])
def test_failed_downloads_leave_nothing(call, tmp_path, monkeypatch, answer, said):
    monkeypatch.setattr("datasets.download.LARGEST", 4096)
    with contextlib.nullcontext(answer) if isinstance(answer, str) else sending(answer) as url:
        status, _, err = call("datasets.download", "--out", "CamVid", "--from", url)
    assert status == 1 and said in err and "--from FILE" in err and err.count("\n") == 1 and "\x1b" not in err
    assert not list(tmp_path.iterdir())
