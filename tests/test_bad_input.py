"""Whatever a command is given: the right exit status, one line that names the mistake, and nothing overwritten."""
import argparse
import importlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PALETTE, SMALL, make_pair, opened, save
from PIL import Image

COMMANDS = ("train.py", "evaluate.py", "predict.py", "export.py", "datasets.check")
NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


@pytest.fixture
def call(call, tmp_path):
    """As conftest's; what was in the folder before is untouched, and a mistake is one line that adds no file."""
    def files(folder: Path) -> dict[Path, tuple[int, int]]:
        return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")
                if not path.is_dir()}

    def checked(*args, cwd: Path = tmp_path) -> tuple[int, str, str]:
        before = files(cwd)
        status, out, err = call(*args, cwd=cwd)
        after = files(cwd)
        assert before.items() <= after.items()
        assert status != 2 or err.count("\n") == 1 and before == after, err
        return status, out, err
    return checked


def png(width: int, height: int) -> bytes:
    """A PNG whose header says that size, and whose pixels are missing."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 12), kind: str = "PNG", **options):
    return lambda path: Image.fromarray(NOISE).resize(size).convert(mode).save(path, kind, **options)


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def cut(kind: str):
    return lambda path: (picture(size=(200, 150), kind=kind)(path), os.truncate(path, path.stat().st_size // 2))


TURNED = Image.Exif()
TURNED[0x0112] = 6
# An image: how it is written, and the size of its mask, or None where it cannot be read.
IMAGES = {
    "half.jpg": (cut("JPEG"), None), "half.tif": (cut("TIFF"), None), "bomb.png": (content(png(60_000, 60_000)), None),
    "hollow.png": (content(png(640, 480)), None), "flat.png": (content(png(0, 12)), None),
    "32 bits.tif": (picture("F", kind="TIFF"), None), "folder.png": (Path.mkdir, None),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), None),
    "circle.png": (lambda path: path.symlink_to(path.name), None),
    "jpeg called.png": (picture(kind="JPEG"), (16, 12)), "LOUD.PNG": (picture("L"), (16, 12)),
    "moving.webp": (picture(kind="WEBP", save_all=True, append_images=[Image.new("RGB", (16, 12))]), (16, 12)),
    "turned.jpg": (picture(kind="JPEG", exif=TURNED), (12, 16)), "one pixel.png": (picture(size=(1, 1)), (1, 1)),
    "wide.png": (picture(size=(9999, 1)), (9999, 1)), "large.bmp": (picture(size=(130, 251), kind="BMP"), (130, 251)),
    "ünï çøde 写真.png": (picture(), (16, 12)), os.fsdecode(b"not utf-8 \xff.png"): (picture(), (16, 12)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(call, trained, tmp_path, name):
    """Beside two good images of one name and what is no image."""
    images, out = tmp_path / "images", tmp_path / "predictions"
    write, size = IMAGES[name]
    images.mkdir()
    try:
        write(images / name)
    except OSError as error:
        pytest.skip(f"this system has no such name: {error}")
    for twin in ("a.png", "a.jpg"):
        picture(kind="JPEG")(images / twin)
    for other in (".hidden.png", "notes.txt"):
        (images / other).write_bytes(b"no image")
    pattern = images / "*" if name == "large.bmp" else images
    status, printed, err = call("predict.py", "--image_dir", pattern, "--tile", 64, "--tta", "flip+scale", "--max_side",
                                300, "--checkpoint", trained / "checkpoint" / "unet_best.pth")
    sizes = {"a_png": (16, 12), "a_jpg": (16, 12)} | ({Path(name).stem: size} if size else {})
    assert {path.name for path in out.iterdir()} == {f"{n}_{kind}.png" for n in sizes for kind in ("mask", "overlay")}
    for stem, shape in sizes.items():
        mask, overlay = opened(out / f"{stem}_mask.png"), opened(out / f"{stem}_overlay.png")
        assert mask.size == overlay.size == shape and mask.mode == "P" and overlay.mode == "RGB"
        ids = np.asarray(mask)
        assert ids.min() > 0 and ids.max() < 12, "the ignored class is never predicted"
        assert (np.asarray(mask.convert("RGB")) == PALETTE[ids]).all()
    assert status == (0 if size else 1) and "pixels of each class" in printed
    assert size or err.count("\n") == 2 and "1 of 3" in err and name in err


# An image and its mask: how they are spoilt, and what is said of it; test_check.py has more of them.
PAIRS = {
    "unknown colours": (lambda image, mask: save(mask, np.full_like(NOISE, 1)), "(1,1,1) × 192"),
    "truncated image": (lambda image, mask: os.truncate(image, 200), "cannot be read"),
    "no pixels": (lambda image, mask: content(image.read_bytes().replace(b"IDAT", b"IDAU"))(image), "cannot be read"),
    "two masks": (lambda image, mask: opened(mask).save(mask.with_stem("a_L")), "share the name"),
    "bomb": (lambda image, mask: content(png(60_000, 60_000))(image), "cannot be read"),
    "32 bits": (lambda image, mask: (image.unlink(), picture("F", kind="TIFF")(image)), "32 bits"),
}


@pytest.mark.parametrize("defect", PAIRS)
@pytest.mark.parametrize("command", ["datasets.check", "train.py", "evaluate.py"])
def test_pairs(call, tmp_path, defect, command):
    root, split = tmp_path / "data", "val" if command == "evaluate.py" else "train"
    spoil, said = PAIRS[defect]
    for stem in ("a", "b"):
        for folder in ("train", "val"):
            make_pair(root, stem, split=folder)
    spoil(root / split / "a.png", root / f"{split}_labels" / "a.png")
    status, out, err = call(command, *base(command, root))
    if command == "datasets.check":
        assert status == 1 and said in out.split("1 problems\n")[1] and not err
    else:
        assert status == 2 and said in err


def base(command: str, scenes: Path) -> list:
    """The flags with which a command would run."""
    return {"predict.py": ["--image_dir", scenes / "val"], "export.py": ["--out", "new.onnx"],
            "train.py": ["--data_root", scenes, *SMALL]}.get(command, ["--data_root", scenes])


# What is wrong for a flag whose type does not say it.
WRONG = {"--data_root": "nowhere", "--image_dir": "nowhere", "--save_dir": "file", "--report": "file",
         "--init_from": "nowhere.pth", "--resume": "nowhere.pth", "--cache": "file", "--num_classes": "5",
         "--device": "tpu", "--split": "dev", "--crop_size": "8", "--scale": "2 1"}


def wrong_flags() -> list[tuple[str, str, str]]:
    """For each flag of each command something that it refuses: (command, flag, as typed)."""
    cases = []
    for command in COMMANDS:
        for action in importlib.import_module(command.removesuffix(".py")).get_args_parser()._actions:
            flag = action.option_strings[-1]
            wrong = WRONG.get(flag, "nonsense")
            if flag == "--checkpoint":
                wrong = "file" if command == "train.py" else "nowhere.pth"
            if action.nargs == 0:
                cases += [] if isinstance(action, argparse._HelpAction) else [(command, flag, f"{flag}=yes")]
            else:
                numeric = action.type not in (None, Path) and flag not in WRONG
                cases += [(command, flag, f"{flag} {text}") for text in (wrong, *(["-1"] if numeric else []))]
    return cases


@pytest.mark.parametrize("command, flag, text", wrong_flags())
def test_flags(call, tmp_path, scenes, command, flag, text):
    (tmp_path / "file").write_text("in the way")
    status, out, err = call(command, *base(command, scenes), *text.split(" "))
    assert status == 2 and any(word in err for word in [flag, *text.split(" ")[1:]])


@pytest.mark.parametrize("typed, said", [
    ("train.py", "--data_root DIR"), ("evaluate.py", "--data_root"), ("predict.py", "--image_dir PATH"),
    ("train.py DATA --device cpu:one", "--device cpu:one"), ("train.py DATA --grad_accum 2", "--grad_accum"),
    ("train.py DATA --resume auto --lr 0.7", "--lr 0.1, now 0.7"),
    ("train.py DATA --resume auto --data_name camvid32", "other classes"),
    ("train.py DATA --resume a.pth --init_from a.pth", "give one of them"),
    ("train.py DATA --resume TMP/half.pth", "half.pth: not a readable checkpoint"),
    ("train.py DATA --resume checkpoint/unet_best.pth", "holds weights alone"),
    ("train.py DATA --init_from TMP/half.pth", "half.pth: not a readable checkpoint"),
    ("train.py DATA --init_from checkpoint/unet_best.pth --width 6", "unet_best.pth: its weights do not fit"),
    ("evaluate.py DATA --checkpoint TMP/half.pth", "half.pth: not a readable checkpoint"),
    ("evaluate.py DATA --data_name camvid32", "12 classes"), ("datasets.check --data_root TMP", "line 2: "),
    ("predict.py --image_dir TMP/empty", "no images in it"), ("predict.py --image_dir TMP", "rename one"),
    ("predict.py IMAGES --checkpoint TMP/half.pth", "half.pth: not a readable checkpoint"),
    ("predict.py IMAGES --checkpoint TMP/nan.pth", "nan.pth: its weights hold NaN"),
    ("predict.py --image_dir TMP --save_dir TMP", "--save_dir"), ("predict.py IMAGES --tile 63", "--tile"),
    ("export.py --out model.onnx --checkpoint TMP/nan.pth", "nan.pth: its weights hold NaN"),
    ("export.py --out model.tflite", "must end in .onnx or .pth"), ("datasets.synthetic --out TMP", "not an empty"),
])
def test_mistakes_change_nothing(call, trained, scenes, tmp_path, typed, said):
    """In a folder with a trained model; test_checkpoints.py has more broken checkpoints."""
    best = trained / "checkpoint" / "unet_best.pth"
    (tmp_path / "half.pth").write_bytes(best.read_bytes()[:99_999])
    state = torch.load(best, weights_only=True)
    state["state_dict"]["classifier.bias"].fill_(torch.nan)
    torch.save(state, tmp_path / "nan.pth")
    for name in ("a.png", "a.jpg", "a_jpg.png"):  # the first two make a_png and a_jpg
        save(tmp_path / name, NOISE)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,1,2\ncar,3,4,5\n")
    (tmp_path / "empty").mkdir()
    typed = typed.replace("DATA", "--data_root SCENES").replace("IMAGES", "--image_dir SCENES/val")
    command, *flags = (word.replace("SCENES", str(scenes)).replace("TMP", str(tmp_path)) for word in typed.split())
    status, out, err = call(command, *(SMALL if command == "train.py" else ()), *flags, cwd=trained)
    assert status == 2 and said in err


def test_too_small_a_gpu_is_one_line_that_names_the_flags(call, scenes, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more lines")

    monkeypatch.setattr("train.train_one_epoch", full)
    monkeypatch.setattr("predict.Predictor.__call__", full)
    for command in ("train.py", "predict.py"):
        status, out, err = call(command, *base(command, scenes))
        assert status == 1 and err.count("\n") == 1 and "lower --batch_size, --crop_size, --width or --tile" in err
    assert not list(Path("checkpoint").glob("*.pth")) and not list(Path("predictions").iterdir())
