"""Whatever a command is fed: the right exit status, one line that names the mistake, and nothing overwritten."""
import argparse
import os
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PALETTE, make_pair, save
from PIL import Image

import checkpoints
import evaluate
import predict
import train
from datasets import check, synthetic
from runtime import run_command

COMMANDS = {"train": train, "evaluate": evaluate, "predict": predict, "check": check}
NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
NO_PIXELS_LOST = ("--width", "4", "--crop_size", "64", "--epochs", "1", "--workers", "0", "--device", "cpu")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder -> status, stdout, stderr; what was there before is untouched."""
    def call(command: str, *flags) -> tuple[int, str, str]:
        before = {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in tmp_path.rglob("*")
                  if not path.is_dir()}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [command, *map(str, flags)])
        module = COMMANDS[command]
        try:
            status = run_command(module.main, module.get_args_parser())
        except SystemExit as error:  # argparse
            status = error.code
        assert before.items() <= {path: (path.lstat().st_mtime_ns, path.lstat().st_size)
                                  for path in tmp_path.rglob("*")}.items()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err
    return call


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG whose header says that size, whatever its pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 12), kind: str = "PNG", **options):
    return lambda path: Image.fromarray(NOISE).resize(size).convert(mode).save(path, kind, **options)


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def cut(kind: str):
    def write(path: Path) -> None:
        Image.fromarray(NOISE).resize((200, 150)).save(path, kind)
        os.truncate(path, path.stat().st_size // 2)
    return write


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# A photograph: how it is written, and the size of its mask, or None where it cannot be read.
PHOTOS = {
    "truncated.png": (cut("PNG"), None),
    "truncated.jpg": (cut("JPEG"), None),
    "truncated.tif": (cut("TIFF"), None),
    "empty.png": (content(b""), None),
    "page.jpg": (content(b"<!DOCTYPE html>"), None),
    "bomb.png": (content(png(60_000, 60_000)), None),
    "hollow.png": (content(png(640, 480)), None),
    "headless.png": (content(png(16, 12)[20:]), None),
    "flat.png": (content(png(0, 12)), None),
    "folder.png": (Path.mkdir, None),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), None),
    "circle.png": (lambda path: path.symlink_to(path.name), None),
    "32 bits.tif": (picture("F", kind="TIFF"), None),
    "jpeg called.png": (picture(kind="JPEG"), (16, 12)),
    "LOUD.PNG": (picture(), (16, 12)),
    "16 bits.png": (lambda path: Image.fromarray(NOISE[..., 0] * np.uint16(257)).save(path), (16, 12)),
    "cmyk.jpg": (picture("CMYK", kind="JPEG"), (16, 12)),
    "grey alpha.png": (picture("LA"), (16, 12)),
    "one bit.png": (picture("1"), (16, 12)),
    "moving.webp": (picture(kind="WEBP", save_all=True, append_images=[Image.new("RGB", (16, 12))]), (16, 12)),
    "turned.jpg": (picture(kind="JPEG", exif=turned()), (12, 16)),
    "one pixel.png": (picture(size=(1, 1)), (1, 1)),
    "wide.png": (picture(size=(20_000, 1)), (20_000, 1)),
    "tall.bmp": (picture(size=(1, 3000), kind="BMP"), (1, 3000)),
    "ünï çøde 写真.png": (picture(), (16, 12)),
    os.fsdecode(b"not utf-8 \xff.png"): (picture(), (16, 12)),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_photographs(call, tmp_path, name):
    photos = tmp_path / "photos"
    write, size = PHOTOS[name]
    photos.mkdir()
    try:
        write(photos / name)
    except OSError as error:
        pytest.skip(f"this system has no such name: {error}")
    picture()(photos / "zebra.png")
    (photos / ".hidden.png").write_bytes(b"no photograph")
    status, out, err = call("predict", "--image_dir", photos, "--no-overlay")
    masks = {path.stem.removesuffix("_mask"): opened(path).size for path in (tmp_path / "predictions").iterdir()}
    expected = {"zebra": (16, 12)} | ({Path(name).stem: size} if size else {})
    assert masks == expected and status == (0 if size else 1)
    if not size:
        assert err.count("\n") == 2 and "1 of 2" in err and name in err


def relabel(path: Path, color: tuple[int, int, int], pixels: int = 150) -> None:
    mask = np.array(opened(path))
    mask.reshape(-1, 3)[:pixels] = color
    save(path, mask)


# A photograph and its mask: how they are spoilt, and what is said of it.
PAIRS = {
    "alien colours": (lambda photo, label: relabel(label, (1, 2, 3)), "(1,2,3) × 150"),
    "mask of another size": (lambda photo, label: save(label, PALETTE[np.ones((9, 16), int)]), "16×9"),
    "mask as JPEG": (lambda photo, label: label.rename(label.with_suffix(".jpeg")), "JPEG changes the colours"),
    "mask of grey levels": (lambda photo, label: save(label, np.full((12, 16), 7, np.uint8)), "--label_format ids"),
    "truncated mask": (lambda photo, label: os.truncate(label, 60), "cannot be read"),
    "empty mask": (lambda photo, label: label.write_bytes(b""), "cannot be read"),
    "truncated photograph": (lambda photo, label: os.truncate(photo, 200), "cannot be read"),
    "flipped bit": (lambda photo, label: photo.write_bytes(photo.read_bytes()[:80] + b"#" + photo.read_bytes()[81:]),
                    "cannot be read"),
    "no mask": (lambda photo, label: label.unlink(), "no mask"),
    "no photograph": (lambda photo, label: photo.unlink(), "no photograph"),
    "two photographs": (lambda photo, label: opened(photo).save(photo.with_suffix(".bmp")), "share the name"),
    "two masks": (lambda photo, label: opened(label).save(label.with_stem("a_L")), "share the name"),
    "dangling photograph": (lambda photo, label: (photo.unlink(), photo.symlink_to("nowhere")), "cannot be read"),
    "bomb": (lambda photo, label: photo.write_bytes(png(60_000, 60_000)), "cannot be read"),
    "photograph of 32 bits": (lambda photo, label: (photo.unlink(), picture("F", kind="TIFF")(photo)), "32 bits"),
}


@pytest.mark.parametrize("defect", PAIRS)
@pytest.mark.parametrize("command", ["check", "train", "evaluate"])
def test_pairs(call, tmp_path, defect, command):
    root = tmp_path / "data"
    spoil, said = PAIRS[defect]
    for split in ("train", "val"):
        for stem in ("a", "b"):
            make_pair(root, stem, split=split)
    split = "val" if command == "evaluate" else "train"
    spoil(root / split / "a.png", root / f"{split}_labels" / "a.png")
    status, out, err = call(command, "--data_root", root, *(NO_PIXELS_LOST if command == "train" else ()))
    if command == "check":
        assert status == 1 and out.count("\n  ") >= 1 and said in out.split("1 problems\n")[1] and not err
    else:
        assert status == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "checkpoint").exists()


# class_dict.csv, and what is said of it; None where it is read.
TABLES = {
    "Windows": (b"\xef\xbb\xbfname,r,g,b\r\nroad,128,64,128\r\ncar,64,0,128\r\n", None),
    "spaces and blank lines": (b"name, r, g, b\n\nroad, 128, 64, 128\n\ncar, 64, 0, 128\n\n", None),
    "more columns": (b"name,r,g,b,class_11\nroad,128,64,128,Road\ncar,64,0,128,Car\n", None),
    "empty": (b"", "no column name, r, g, b"),
    "no header": (b"road,128,64,128\ncar,64,0,128\n", "no column name, r, g, b"),
    "no blue": (b"name,r,g\nroad,128,64\ncar,64,0\n", "no column b"),
    "header alone": (b"name,r,g,b\n", "0 classes"),
    "one class": (b"name,r,g,b\nroad,128,64,128\n", "1 classes"),
    "300 classes": (b"name,r,g,b\n" + b"".join(b"c%d,%d,%d,0\n" % (i, i // 256, i % 256) for i in range(300)), "300"),
    "colour twice": (b"name,r,g,b\nroad,128,64,128\ncar,128,64,128\n", "line 3: car has the colour of road"),
    "name twice": (b"name,r,g,b\nroad,128,64,128\nroad,64,0,128\n", "line 3: the name road appears twice"),
    "no number": (b"name,r,g,b\nroad,128,64,violet\ncar,64,0,128\n", "line 2"),
    "too bright": (b"name,r,g,b\nroad,128,64,256\ncar,64,0,128\n", "line 2"),
    "short line": (b"name,r,g,b\nroad,128\ncar,64,0,128\n", "line 2"),
    "no name": (b"name,r,g,b\n,128,64,128\ncar,64,0,128\n", "line 2"),
    "void twice": (b"name,r,g,b\nvoid,0,0,0\nunlabelled,1,1,1\ncar,64,0,128\n", "both ignored"),
    "UTF-16": ("name,r,g,b\nroad,128,64,128\n".encode("utf-16"), "UTF-8"),
    "not text": (bytes(range(256)), "UTF-8"),
}


@pytest.mark.parametrize("table", TABLES)
def test_class_tables(call, tmp_path, table):
    data, said = TABLES[table]
    make_pair(tmp_path / "data", "a", np.full((12, 16), 9))  # cars alone
    (tmp_path / "data" / "class_dict.csv").write_bytes(data)
    status, out, err = call("check", "--data_root", tmp_path / "data")
    if said is None:
        assert status == 0 and "100.00%" in out
    else:
        assert status == 2 and said in err and "class_dict.csv" in err and err.count("\n") == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def altered(change) -> bytes:
    def write(path: Path) -> None:
        state = torch.load(checkpoints.SHIPPED, weights_only=True)
        change(state)
        torch.save(state, path)
    return write


# A checkpoint, and what is said of it.
CHECKPOINTS = {
    "empty": (content(b""), "not a readable checkpoint"),
    "text": (content(b"not a checkpoint"), "not a readable checkpoint"),
    "half": (lambda path: path.write_bytes(checkpoints.SHIPPED.read_bytes()[:2_000_000]), "not a readable checkpoint"),
    "pickle with code": (lambda path: path.write_bytes(pickle.dumps(Evil())), "not a readable checkpoint"),
    "torch file with code": (lambda path: torch.save({"model_state_dict": Evil()}, path), "not a readable checkpoint"),
    "list": (lambda path: torch.save([1, 2], path), "not a checkpoint of this program"),
    "weights alone": (lambda path: torch.save({"weight": torch.ones(3)}, path), "not a checkpoint of this program"),
    "newer": (altered(lambda state: state.update(format=99)), "checkpoint format 99"),
    "no config": (altered(lambda state: state.pop("config")), "not a checkpoint of this program"),
    "no weights": (altered(lambda state: state.pop("model_state_dict")), "not a checkpoint of this program"),
    "missing layer": (altered(lambda state: state["model_state_dict"].popitem()), "do not fit"),
    "another model": (altered(lambda state: state["config"]["model"].update(name="unet_resnet18")), "do not fit"),
    "another width": (altered(lambda state: state["config"]["model"]["options"].update(width=8)), "do not fit"),
    "unknown model": (altered(lambda state: state["config"]["model"].update(name="segformer")), "segformer"),
    "NaN weights": (altered(lambda state: state["model_state_dict"]["classifier.bias"].fill_(torch.nan)), "NaN"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("flag", ["predict --checkpoint", "evaluate --checkpoint", "train --init_from",
                                  "train --resume"])
def test_checkpoints(call, tmp_path, scenes, kind, flag):
    write, said = CHECKPOINTS[kind]
    write(tmp_path / "model.pth")
    command, flag = flag.split()
    if command == "train":
        known = kind in ("missing layer", "another model", "another width", "unknown model", "NaN weights")
        said = (("fit" if flag == "--init_from" else "cannot be resumed") if known else said)
    flags = ("--image_dir", scenes / "val") if command == "predict" else ("--data_root", scenes)
    flags += NO_PIXELS_LOST if command == "train" else ()
    status, out, err = call(command, *flags, flag, "model.pth")
    assert status == 2 and said in err and "model.pth" in err and err.count("\n") == 1, err
    assert not (tmp_path / "pwned").exists()


# What is wrong for a flag whose type does not say it.
WRONG = {"--data_root": "nowhere", "--image_dir": "nowhere", "--save_dir": "file", "--report": "file",
         "--device": "tpu", "--init_from": "nowhere.pth", "--resume": "nowhere.pth", "--cache": "file",
         "--ignore_class": "Unicorn", "--num_classes": "5", "--split": "dev",
         "--crop_size": "8", "--scale": "2 1", "--image_size": "0 0"}


def wrong_flags() -> list[tuple[str, str, str]]:
    cases = []
    for command, module in COMMANDS.items():
        for action in module.get_args_parser()._actions:
            flag = action.option_strings[-1]
            if isinstance(action, argparse._HelpAction):
                continue
            if action.nargs == 0:
                cases.append((command, flag, f"{flag}=yes"))
            elif flag == "--checkpoint":
                cases.append((command, flag, f"{flag} {'file' if command == 'train' else 'nowhere.pth'}"))
            else:
                cases.append((command, flag, f"{flag} {WRONG.get(flag, 'nonsense')}"))
                if action.type is not None and flag not in WRONG:
                    cases.append((command, flag, f"{flag} -1"))
    return cases


@pytest.mark.parametrize("command, flag, text", wrong_flags())
def test_flags(call, tmp_path, scenes, command, flag, text):
    (tmp_path / "file").write_text("in the way")
    flags = ["--image_dir", scenes / "val"] if command == "predict" else ["--data_root", scenes]
    flags += NO_PIXELS_LOST if command == "train" else []
    status, out, err = call(command, *flags, *text.split(" "))
    assert status == 2 and err.count("\n") == 1, err
    assert any(word in err for word in [flag, *text.split(" ")[1:]])


def test_generated_scenes_refuse_a_full_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "precious").write_text("data")
    monkeypatch.setattr(sys, "argv", ["synthetic", "--out", str(tmp_path)])
    assert run_command(synthetic.main, synthetic.get_parser()) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_too_small_a_gpu_is_one_line_that_names_the_flags(call, scenes, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more lines")

    monkeypatch.setattr(train, "train_one_epoch", full)
    status, out, err = call("train", "--data_root", scenes, *NO_PIXELS_LOST)
    assert status == 1 and err.count("\n") == 1 and not list(Path("checkpoint").glob("*.pth"))
    assert "out of memory with --batch_size 4, --crop_size 64 64 and --width 4; lower one" in err
    monkeypatch.setattr(predict.Predictor, "__call__", full)
    status, out, err = call("predict", "--image_dir", scenes / "val")
    assert status == 1 and err.count("\n") == 1 and "lower --batch_size or --tile" in err
    assert not list(Path("predictions").iterdir())
