"""The stages that are measured from outside, as whole commands: start, speed, memory, scaling, time to quality."""
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import references
from measure import DEVICE, ROOT, Row, command, in_turns, peak_memory

from datasets.camvid import CamVidDataset
from datasets.check import check_data
from datasets.classes import CAMVID
from datasets.synthetic import generate_scene

SHIPPED = ROOT / "checkpoint" / "camvid_unet.pth"


def predict_flags(photos: Path, *flags) -> tuple:
    return ("predict.py", "--image_dir", photos, "--save_dir", photos.with_name(f"{photos.name}_out"), "--checkpoint",
            SHIPPED, *flags)


def make_photos(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """``count`` generated scenes of (width, height), enlarged from 480×360 where they are larger."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [generate_scene(i, *min(size, (480, 360)))[0].resize(size) for i in range(min(count, 8))]
    for i in range(count):
        scenes[i % 8].save(folder / f"{i:05}.png", compress_level=1)
    return folder


def predict(args) -> Iterator[Row]:
    count = 100
    photos = make_photos(args.scratch / "photos", count, (480, 360))
    seconds = in_turns(3, lambda: command(*predict_flags(photos)),
                       lambda: command(references.__file__, SHIPPED, photos, args.scratch / "plain", DEVICE))
    yield Row(f"predict.py, {count} photographs of 480×360", seconds[0], "s", seconds[1], "plain loop",
              1.5 if DEVICE.type == "cpu" else 8)


def start(args) -> Iterator[Row]:
    photo = make_photos(args.scratch / "one", 1, (64, 48))
    code = ("import os, sys, predict\n"
            "predict.read_photo = lambda path: os._exit(0)\n"
            f"sys.argv = ['predict.py', '--image_dir', {str(photo)!r}, '--save_dir', {str(args.scratch / 'none')!r}]\n"
            "predict.main(predict.get_args_parser().parse_args())")
    seconds = in_turns(args.runs, lambda: command("-c", code), lambda: command("-c", "import os, torch; os._exit(0)"))
    yield Row("predict.py until the first image is read", seconds[0], "s", seconds[1], "import torch",
              min_ratio=1 / 1.3)


def check(args) -> Iterator[Row]:
    source = CamVidDataset(args.data_root, "train", CAMVID).pairs
    for count, limit in ((468, 3),) if args.quick else ((468, 3), (10_000, 15)):
        root = args.scratch / f"pairs{count}"
        for folder, side in (("train", 0), ("train_labels", 1)):
            (root / folder).mkdir(parents=True)
            for i in range(count):
                path = source[i % len(source)][side]
                (root / folder / f"{i:05}{path.suffix}").symlink_to(path.resolve())
        yield Row(f"train.py's check of {count:,} pairs", in_turns(
            1 if count > 1000 else 3, lambda root=root: check_data(root, ["train"], CAMVID))[0], "s", at_most=limit)


def memory(args) -> Iterator[Row]:
    for count in (1,) if args.quick else (1, 8):
        photos = make_photos(args.scratch / f"large{count}", count, (4000, 3000))
        for flags in ((), ("--max_side", "0")):
            yield Row(f"predict.py {' '.join(flags)} on {count} of 4000×3000: peak memory",
                      peak_memory(*predict_flags(photos, *flags)), "GB", at_most=4)


def scaling(args) -> Iterator[Row]:
    """Seconds beyond those of a single image, shared out."""
    def each(size: tuple[int, int], count: int) -> float:
        folders = [make_photos(args.scratch / f"scaling_{size[0]}_{n}", n, size) for n in (1, count)]
        first, all_of_them = in_turns(3 if count <= 100 else 1, *(
            lambda folder=folder: command(*predict_flags(folder, "--max_side", 0, "--tile", 0)) for folder in folders))
        return (all_of_them - first) / (count - 1)
    for count in (10, 100) if args.quick else (10, 100, 1000):
        yield Row(f"predict.py, {count} of 240×180, each", 1e3 * each((240, 180), count), "ms")
    for size in ((480, 360), (960, 720), (1920, 1440)):
        yield Row(f"predict.py, {size[0]}×{size[1]}, a megapixel", 1e9 * each(size, 12) / size[0] / size[1], "ms")


def quality(args) -> Iterator[Row]:
    """Minutes that train.py itself needs, start and validation included, on CamVid's own frames."""
    if args.quick or DEVICE.type == "cuda" or len(CamVidDataset(args.data_root, "train", CAMVID)) < 300:
        return
    flags = ["--width", "16", "--scheduler", "onecycle", "--cache", str(args.scratch / "frames")]
    started, goals = time.perf_counter(), {0.30: 6, 0.50: 15}
    process = subprocess.Popen([sys.executable, "train.py", "--data_root", str(args.data_root), *flags, "--checkpoint",
                                str(args.scratch / "run")], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        score = float(line.split("val mIoU")[1].split()[0]) if "val mIoU" in line else 0.0
        for goal in [goal for goal in goals if score >= goal]:
            yield Row(f"train.py {' '.join(flags[:5])}: to val mIoU {goal:.2f}", (time.perf_counter() - started) / 60,
                      "min", at_most=goals.pop(goal))
        if not goals:
            process.send_signal(signal.SIGTERM)
    process.wait()
