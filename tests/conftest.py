"""What several test files share: CamVid's colours, generated scenes, ways to run commands."""

import contextlib
import csv
import importlib
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.check import get_args_parser
from datasets.flags import describe_data
from datasets.spec import DataSpec
from datasets.synthetic import generate_dataset
from support.command import run_command

# A shell starts background jobs with Ctrl-C ignored, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
REPO = Path(__file__).resolve().parents[1]
# A training of seconds.
SMALL = shlex.split("--width 4 --crop_size 64 --batch_size 2 --epochs 2 --device cpu --workers 0")

# The 12 classes in the order of their ids, then what joins them from the original 32.
CLASSES = """Unlabelled 0,0,0; Sky 128,128,128; Building 128,0,0; Pole 192,192,128; Road 128,64,128;
Sidewalk 0,0,192; Tree 128,128,0; SignSymbol 192,128,128; Fence 64,64,128; Car 64,0,128;
Pedestrian 64,64,0; Bicyclist 0,128,192"""
MERGES = """Building ← Bridge 0,128,64; Wall 64,192,0; Tunnel 64,0,64; Archway 192,0,128.
Pole ← TrafficCone 0,0,64. Road ← LaneMkgsDriv 128,0,192; LaneMkgsNonDriv 192,0,64.
Sidewalk ← ParkingBlock 64,192,128; RoadShoulder 128,128,192. Tree ← VegetationMisc 192,192,0.
SignSymbol ← Misc_Text 128,128,64; TrafficLight 0,64,64.
Car ← SUVPickupTruck 64,128,192; Truck_Bus 192,128,192; Train 192,64,128; OtherMoving 128,64,64.
Pedestrian ← Child 192,128,64; CartLuggagePram 64,0,192; Animal 64,128,64.
Bicyclist ← MotorcycleScooter 192,0,192"""
OTHER_COPIES = {(60, 40, 222): "Sidewalk", (255, 69, 0): "Road"}


def read_table(text: str) -> dict[str, tuple[int, int, int]]:
    """{"Sky": (128, 128, 128), …} of "Sky 128,128,128; …"."""
    colors = {}
    for entry in text.split(";"):
        name, color = entry.split()
        colors[name] = tuple(map(int, color.split(",")))
    return colors


def read_merges(text: str) -> dict[str, dict[str, tuple[int, int, int]]]:
    """{"Building": {"Bridge": (0, 128, 64), …}, …} of "Building ← Bridge 0,128,64; … . …"."""
    parts = (line.split("←") for line in text.split("."))
    return {into.strip(): read_table(colors) for into, colors in parts}


TURNED = Image.Exif()
TURNED[0x112] = 6  # the camera was turned: the upright image is the stored one turned clockwise
COLORS = read_table(CLASSES)
MERGED = read_merges(MERGES)
COLORS32 = COLORS | {name: color for colors in MERGED.values() for name, color in colors.items()}
PALETTE = np.array([*COLORS.values()], np.uint8)  # (12, 3)


def compare_per_class(rgb: np.ndarray, colors) -> np.ndarray:
    """(H, W, 3) -> (H, W) uint8 ids, one comparison per class; 255 where none matches."""
    matches = np.stack([(rgb == color).all(-1) for color in colors])
    return np.where(matches.any(0), matches.argmax(0), 255).astype(np.uint8)


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def opened(path: Path) -> Image.Image:
    """The decoded image of a file, which is closed."""
    with Image.open(path) as image:
        image.load()
    return image


def code_blocks(page: str, language: str) -> list[str]:
    """The blocks of code in a page of the documentation."""
    return re.findall(rf"```{language}\n(.*?)```", (REPO / page).read_text(encoding="utf-8"), re.S)


def make_pair(
    root: Path, stem: str, ids: np.ndarray | None = None, split: str = "train"
) -> tuple[Path, Path]:
    """Write an image of noise and the mask of ``ids`` (default: 12×16 at random) -> their paths."""
    rng = np.random.default_rng(len(stem))
    if ids is None:
        ids = rng.integers(0, 12, (12, 16))
    noise = rng.integers(0, 256, (*ids.shape, 3), dtype=np.uint8)
    image = save(root / split / f"{stem}.png", noise)
    return image, save(root / f"{split}_labels" / f"{stem}.png", PALETTE[ids])


def write_csv(root: Path, colors: dict[str, tuple[int, int, int]]) -> Path:
    lines = [f"{name},{r},{g},{b}\n" for name, (r, g, b) in colors.items()]
    path = root / "class_dict.csv"
    path.write_text("name,r,g,b\n" + "".join(lines))
    return path


def describe(root: Path, *flags: str) -> DataSpec:
    """The data as a command describes it that has these flags."""
    return describe_data(get_args_parser().parse_args(["--data_root", str(root), *flags]))


def load(folder: Path, kind: str = "last") -> dict:
    """The last or the best checkpoint that train.py left there."""
    return torch.load(folder / "checkpoint" / f"unet_{kind}.pth", weights_only=True)


def rows(folder: Path) -> list[dict[str, str]]:
    """The log that train.py left there, without the time of each epoch."""
    with open(folder / "checkpoint" / "unet_log.csv") as file:
        log = [*csv.DictReader(file)]
    assert all(float(row.pop("seconds")) > 0 for row in log)
    return log


def start(script: str, *args, cwd: Path, **options) -> subprocess.Popen:
    """Start a command in a process of its own; ``datasets.check`` and the like by ``python -m``."""
    # Newer Pythons warn of every fork of a process with threads, such as of a loader's worker.
    # An interrupted command may leave a file to the interpreter.
    ignored = ("ignore:This process:DeprecationWarning", "ignore::ResourceWarning")
    warnings = [f"-W{rule}" for rule in ("error", *ignored)]
    program = ("-m", script) if script.startswith("datasets.") else (REPO / script,)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *warnings, *map(str, (*program, *args))],
        cwd=cwd,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        **pipes | options,
    )


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """Wait for a process that is to end with that exit status -> its stdout and stderr."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == status and "Traceback" not in err, out + err
    return out, err


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # a process closes what it has just had open
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a command within this process, in a folder (by default tmp_path).

    Returns the exit status, stdout and stderr.
    """

    def call(script: str, *flags, cwd: Path = tmp_path) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        module = importlib.import_module(script.removesuffix(".py"))
        capsys.readouterr()
        try:
            status = run_command(module.main, module.get_args_parser())
        except SystemExit as error:  # argparse
            status = error.code
        finally:
            torch.use_deterministic_algorithms(False)  # what --deterministic has set
        out, err = capsys.readouterr()
        assert not multiprocessing.active_children()  # the interpreter would wait for them
        return status, out, err

    return call


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A data folder of generated scenes, 96×72: 4 in train, 2 in val, 2 in test; read only."""
    root = tmp_path_factory.mktemp("data") / "street scenes ü"
    generate_dataset(root, {"train": 4, "val": 2, "test": 2}, (96, 72))
    return root


@pytest.fixture(scope="session")
def trained(scenes, tmp_path_factory) -> Path:
    """A folder in which train.py ran with the flags SMALL; ``printed`` holds what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    out, err = finish(start("train.py", "--data_root", scenes, *SMALL, cwd=folder))
    assert err == ""
    (folder / "printed").write_text(out)
    return folder


@pytest.fixture(scope="session")
def camvid() -> Path:
    """The 11-class CamVid, in the folder that the environment variable CAMVID names."""
    root = REPO / os.environ.get("CAMVID", "not set")
    if not root.is_dir():
        pytest.skip("needs CamVid, in the folder that the environment variable CAMVID names")
    return root


@pytest.fixture(scope="module", params=["scenes", "camvid"])
def frames(request) -> dict[str, list[tuple[str, np.ndarray, np.ndarray]]]:
    """By split: (stem, (H, W, 3) uint8 image, (H, W) uint8 ids) of frames, generated and real."""
    root = request.getfixturevalue(request.param)
    found = {"train": [], "val": []}
    for split, samples in found.items():
        paths = sorted((root / split).iterdir())
        for path in paths[:: len(paths) // 2]:
            image = np.array(opened(path))
            mask = np.array(opened(root / f"{split}_labels" / path.name))
            step = max(1, image.shape[1] // 160)  # fewer pixels are faster, with real colours
            ids = compare_per_class(mask[::step, ::step], PALETTE)
            samples.append((path.stem, image[::step, ::step], ids))
    return found
