"""Whatever a command is given: the right exit status, one line that names the mistake, and nothing overwritten."""
import contextlib
import importlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, opened, save
from PIL import Image

from support.command import UserError
from training.checkpoints import load_model

NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


@pytest.fixture
def call(call, tmp_path):
    """As conftest's; what was in the folder before is untouched, and a mistake is one line that adds no file."""
    def files(folder: Path) -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in folder.rglob("[!.]*") if not path.is_dir()}

    def checked(*args, cwd: Path = tmp_path) -> tuple[int, str, str]:
        before = files(cwd)
        status, out, err = call(*args, cwd=cwd)
        after = files(cwd)
        assert before.items() <= after.items()
        assert status != 2 or err.count("\n") == 1 and before == after, err
        return status, out, err
    return checked


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 12), kind: str = "PNG", **options):
    return lambda path: Image.fromarray(NOISE).resize(size).convert(mode).save(path, kind, **options)


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def cut(kind: str):
    return lambda path: (picture(size=(200, 150), kind=kind)(path), os.truncate(path, path.stat().st_size // 2))


BROKEN = {
    "half.jpg": cut("JPEG"), "half.png": cut("PNG"), "half.tif": cut("TIFF"), "empty.png": content(b""),
    "page.jpg": content(b"<html>"), "bomb.ppm": content(b"P6 60000 60000 255\n"),
    "hollow.ppm": content(b"P6 640 480 255\n"), "flat.ppm": content(b"P6 0 12 255\n"),
    "32 bits.tif": picture("F", kind="TIFF"), "folder.png": Path.mkdir,
    "nowhere.png": lambda path: path.symlink_to("gone.png"), "circle.png": lambda path: path.symlink_to(path.name),
}
# An image: how it is written, and the size of its mask.
READABLE = {
    "a.png": (picture(), (16, 12)), "a.jpg": (picture(kind="JPEG"), (16, 12)),  # called a_png and a_jpg in the output
    "jpeg called.png": (picture(kind="JPEG"), (16, 12)), "LOUD.PNG": (picture("L"), (16, 12)),
    "moving.webp": (picture(kind="WEBP", save_all=True, append_images=[Image.new("RGB", (16, 12))]), (16, 12)),
    "one pixel.png": (picture(size=(1, 1)), (1, 1)), "wide.png": (picture(size=(9999, 1)), (9999, 1)),
    "large.bmp": (picture(size=(130, 251), kind="BMP"), (130, 251)),
    "ünï çøde 写真.png": (picture(), (16, 12)), os.fsdecode(b"not utf-8 \xff.png"): (picture(), (16, 12)),
}


@pytest.mark.parametrize("pattern", ["images", "images/*"])
def test_images(call, trained, tmp_path, pattern):
    """Those that can be read get their pictures, whatever lies beside them."""
    images, out = tmp_path / "images", tmp_path / "predictions"
    images.mkdir()
    writers = BROKEN | {name: write for name, (write, _) in READABLE.items()}
    for name, write in (writers | dict.fromkeys((".hidden.png", "notes.txt"), content(b"no image"))).items():
        with contextlib.suppress(OSError):  # a system may have no such names or no links
            write(images / name)
    broken, readable = ([name for name in names if name in os.listdir(images)] for names in (BROKEN, READABLE))
    status, printed, err = call("predict.py", "--image_dir", pattern, "--tile", 64, "--tta", "flip+scale", "--max_side",
                                300, "--checkpoint", trained / "checkpoint" / "unet_best.pth")
    assert status == 1 and "pixels of each class" in printed and err.count("skipped: ") == len(broken) > 6
    assert f"{len(broken)} of {len(broken + readable)} files" in err
    assert len(list(out.glob("[!.]*"))) == 2 * len(readable)
    assert all(f"images/{name}: " in err for name in broken)
    for name in readable:
        stem = name.replace(".", "_") if name.startswith("a.") else Path(name).stem
        mask, overlay = opened(out / f"{stem}_mask.png"), opened(out / f"{stem}_overlay.png")
        assert mask.size == overlay.size == READABLE[name][1] and mask.mode == "P" and overlay.mode == "RGB"
        assert 0 < np.min(mask) <= np.max(mask) < 12, "the ignored class is never predicted"


def test_a_checkpoint_that_is_cut_or_has_a_changed_byte_is_refused_or_the_same(trained, tmp_path):
    """The same where the byte is padding or a time."""
    source, path, refused = trained / "checkpoint" / "unet_best.pth", tmp_path / "changed.pth", 0
    good, rng = source.read_bytes(), np.random.default_rng(0)
    expected = load_model(source)[0].state_dict()
    for place in rng.integers(0, len(good), 100):
        changed = bytearray(good)
        changed[place] ^= rng.integers(1, 256)
        path.write_bytes(changed if place % 3 else good[:place])
        try:
            torch.testing.assert_close(load_model(path)[0].state_dict(), expected, rtol=0, atol=0)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 80


def base(command: str, scenes: Path) -> list:
    """The flags with which a command would run."""
    return {"predict.py": ["--image_dir", scenes / "val"], "export.py": ["--out", "new.onnx"],
            "train.py": ["--data_root", scenes, *SMALL]}.get(command, ["--data_root", scenes])


# What is wrong for a flag whose type does not say it.
WRONG = {"--data_root": "nowhere", "--image_dir": "nowhere", "--save_dir": "file", "--report": "file",
         "--init_from": "nowhere.pth", "--resume": "nowhere.pth", "--num_classes": "5",
         "--device": "tpu", "--split": "dev", "--crop_size": "8", "--scale": "2 1"}


def wrong_flags():
    """For each flag of each command something that it refuses: (command, flag, as typed)."""
    for command in ("train.py", "evaluate.py", "predict.py", "export.py", "datasets.check"):
        wrong = WRONG | {"--checkpoint": "file" if command == "train.py" else "nowhere.pth"}
        parser = importlib.import_module(command.removesuffix(".py")).get_args_parser()
        for action in parser._actions[1:]:  # the first is --help
            flag = action.option_strings[-1]
            if action.nargs == 0:
                yield command, flag, f"{flag}=yes"
                continue
            yield command, flag, f"{flag} {wrong.get(flag, 'nonsense')}"
            if action.type not in (None, Path) and flag not in wrong:
                yield command, flag, f"{flag} -1"


@pytest.mark.parametrize("command, flag, text", [*wrong_flags()])
def test_flags(call, tmp_path, scenes, command, flag, text):
    (tmp_path / "file").write_text("in the way")
    status, out, err = call(command, *base(command, scenes), *text.split(" "))
    assert status == 2 and any(word in err for word in [flag, *text.split(" ")[1:]])


@pytest.mark.parametrize("typed, said", [
    ("train.py", "--data_root DIR"), ("evaluate.py", "--data_root"), ("predict.py", "--image_dir PATH"),
    ("train.py DATA --device cpu:one", "--device cpu:one"), ("train.py DATA --grad_accum 2", "--grad_accum"),
    ("train.py DATA --resume auto --lr 0.7", "--lr 0.1, now 0.7"),
    ("train.py DATA --resume auto --data_name camvid32", "other classes"),
    ("train.py DATA --pretrained", "add --model unet_resnet34"),
    ("predict.py IMAGES --report a --skip_existing", "give one of them"),
    ("train.py DATA --resume best.pth", "best.pth: cannot be resumed, it holds weights alone"),
    ("train.py DATA --resume=", "--resume is empty"), ("predict.py IMAGES --save_dir EMPTY", "--save_dir is empty"),
    ("train.py DATA --init_from checkpoint/unet_best.pth --width 6", "unet_best.pth: holds a unet of width 4"),
    ("evaluate.py DATA --data_name camvid32", "12 classes"),
    ("datasets.check DATA --label_format ids --num_classes 256", "2 to 255"),
    ("datasets.check --data_root TMP", "line 2: "), ("datasets.check --data_root TMP/empty", "train_labels"),
    ("datasets.check --data_root TMP/bare --write_classes", "has no masks"),
    ("datasets.check --data_root TMP/class_dict.csv", "no such folder"),
    ("predict.py --image_dir TMP/empty", "no images in it"), ("predict.py --image_dir TMP", "rename one"),
    ("predict.py --image_dir TMP --save_dir TMP", "--save_dir"),
    ("predict.py IMAGES --save_dir TMP --checkpoint none.pth", "no such checkpoint"),
    ("export.py --out a.tflite", ".onnx or .pth"),
    ("export.py --out m.pth --with_preprocessing", "--with_preprocessing"), ("export.py --out .", ".onnx or .pth"),
    ("export.py --out checkpoint/unet_last.pth --checkpoint checkpoint/unet_last.pth", "is the checkpoint itself"),
    ("datasets.synthetic --out a --size 9 99999", "--size"), ("train.py DATA --epochs 1" + 30 * "0", "--epochs"),
    ("predict.py IMAGES --device cpu:", "--device cpu:"), ("train.py DATA --device cuda:" + 30 * "9", "--device"),
    ("predict.py --image_dir TMP/caf\udce9.mp4", r"caf\udce9.mp4: rename it"),
])
def test_mistakes_change_nothing(call, trained, scenes, tmp_path, typed, said):
    """In a folder with a trained model; test_checkpoints.py has broken checkpoints, test_check.py broken data."""
    for name in ("a.png", "a.jpg", "a_jpg.png"):  # the first two make a_png and a_jpg
        save(tmp_path / name, NOISE)
    with contextlib.suppress(OSError):  # a system may have no such names
        (tmp_path / "caf\udce9.mp4").touch()
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,1,2\ncar,3,4,5\n")
    for folder in ("empty", "bare/train", "bare/train_labels"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(trained / "checkpoint" / "unet_best.pth", trained / "best.pth")
    typed = typed.replace("DATA", "--data_root SCENES").replace("IMAGES", "--image_dir SCENES/val")
    command, *flags = (word.replace("SCENES", str(scenes)).replace("TMP", str(tmp_path)).replace("EMPTY", "")
                       for word in typed.split())
    status, out, err = call(command, *(SMALL if command == "train.py" else ()), *flags, cwd=trained)
    assert status == 2 and said in err and not (tmp_path / ".lock").exists()
