"""The stages that are measured from outside, as whole commands: start, speed, time to quality."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import references
from measure import DEVICE, ROOT, Row, command, compare

from datasets.synthetic import generate_scene
from inference.checkpoints import SHIPPED

GOALS = (0.30, 0.50, 0.65)
START = """
import os, sys, predict
predict.read_image = lambda path: os._exit(0)
predict.main(predict.get_args_parser().parse_args())
"""


def make_images(folder: Path, count: int) -> Path:
    """``count`` images of 480×360, of eight generated scenes."""
    folder.mkdir()
    scenes = [generate_scene(i)[0] for i in range(8)]
    for i in range(count):
        scenes[i % 8].save(folder / f"{i:05}.png", compress_level=1)
    return folder


def predict(args) -> Iterator[Row]:
    count, runs = (4, 1) if args.smoke else (100, 3)
    images = make_images(args.scratch / "images", count)
    flags = ("--image_dir", images, "--save_dir", args.scratch / "ours", "--checkpoint", SHIPPED)
    plain = (references.__file__, SHIPPED, images, args.scratch / "plain", DEVICE)
    yield from compare(
        f"predict.py, {count} images of 480×360",
        runs,
        lambda: command("predict.py", *flags),
        {"plain loop": lambda: command(*plain)},
    )


def start(args) -> Iterator[Row]:
    image = make_images(args.scratch / "one", 1)
    flags = ("--image_dir", image, "--save_dir", args.scratch / "none")
    yield from compare(
        "predict.py until the first image is read",
        args.runs,
        lambda: command("-c", START, *flags),
        {"import torch": lambda: command("-c", "import os, torch; os._exit(0)")},
    )


def quality(args) -> Iterator[Row]:
    """The minutes of train.py, start and validation included, on CamVid itself."""
    if DEVICE.type == "cuda" or len(list((args.data_root / "train").glob("*"))) < 300:
        return
    recipe = ("--width", "16", "--scheduler", "onecycle")
    flags = ("--data_root", args.data_root, "--checkpoint", args.scratch / "run", *recipe)
    goals = list(GOALS)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    for line in process.stdout or ():
        score = float(line.split("mIoU")[1].split()[0]) if "mIoU" in line else 0.0
        while goals and score >= goals[0]:
            minutes = (time.perf_counter() - started) / 60
            yield Row(
                f"train.py {' '.join(recipe)}, to val mIoU {goals.pop(0):.2f}", minutes, "min"
            )
        if not goals:
            process.send_signal(signal.SIGTERM)
    process.wait()
