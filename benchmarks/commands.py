"""The stages that are measured from outside, as whole commands: start, speed, time to quality."""
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import references
from measure import DEVICE, ROOT, Row, command, in_turns

from datasets.camvid import CamVidDataset
from datasets.classes import CAMVID
from datasets.synthetic import generate_scene

SHIPPED = ROOT / "checkpoint" / "camvid_unet.pth"


def make_images(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """``count`` images of (width, height), of eight generated scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [generate_scene(i, *size)[0] for i in range(min(count, 8))]
    for i in range(count):
        scenes[i % 8].save(folder / f"{i:05}.png", compress_level=1)
    return folder


def predict(args) -> Iterator[Row]:
    count = 100
    images = make_images(args.scratch / "images", count, (480, 360))
    ours = "predict.py", "--image_dir", images, "--save_dir", args.scratch / "ours", "--checkpoint", SHIPPED
    seconds = in_turns(3, lambda: command(*ours),
                       lambda: command(references.__file__, SHIPPED, images, args.scratch / "plain", DEVICE))
    yield Row(f"predict.py, {count} images of 480×360", seconds[0], "s", seconds[1], "plain loop")


def start(args) -> Iterator[Row]:
    image = make_images(args.scratch / "one", 1, (64, 48))
    code = ("import os, sys, predict\n"
            "predict.read_image = lambda path: os._exit(0)\n"
            f"sys.argv = ['predict.py', '--image_dir', {str(image)!r}, '--save_dir', {str(args.scratch / 'none')!r}]\n"
            "predict.main(predict.get_args_parser().parse_args())")
    seconds = in_turns(args.runs, lambda: command("-c", code), lambda: command("-c", "import os, torch; os._exit(0)"))
    yield Row("predict.py until the first image is read", seconds[0], "s", seconds[1], "import torch")


def quality(args) -> Iterator[Row]:
    """Minutes that train.py itself needs, start and validation included, on CamVid's own images."""
    if DEVICE.type == "cuda" or len(CamVidDataset(args.data_root, "train", CAMVID)) < 300:
        return
    flags = ["--width", "16"]
    started, goals = time.perf_counter(), [0.30, 0.50, 0.65]
    process = subprocess.Popen([sys.executable, "train.py", "--data_root", str(args.data_root), *flags, "--checkpoint",
                                str(args.scratch / "run")], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout or ():
        score = float(line.split("mIoU")[1].split()[0]) if line.startswith("epoch") and "mIoU" in line else 0.0
        while goals and score >= goals[0]:
            yield Row(f"train.py {' '.join(flags)}: to val mIoU {goals.pop(0):.2f}",
                      (time.perf_counter() - started) / 60, "min")
        if not goals:
            process.send_signal(signal.SIGTERM)
    process.wait()
