"""What several test files share: the specification's colours, generated scenes, and real frames where they exist."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.synthetic import generate_dataset

# The specification's table: the 12 classes in the order of their ids, then what joins them from the original 32.
CLASSES = """Unlabelled 0,0,0; Sky 128,128,128; Building 128,0,0; Pole 192,192,128; Road 128,64,128; Sidewalk 0,0,192;
Tree 128,128,0; SignSymbol 192,128,128; Fence 64,64,128; Car 64,0,128; Pedestrian 64,64,0; Bicyclist 0,128,192"""
MERGES = """Building ← Bridge 0,128,64; Wall 64,192,0; Tunnel 64,0,64; Archway 192,0,128.
Pole ← TrafficCone 0,0,64. Road ← LaneMkgsDriv 128,0,192; LaneMkgsNonDriv 192,0,64.
Sidewalk ← ParkingBlock 64,192,128; RoadShoulder 128,128,192. Tree ← VegetationMisc 192,192,0.
SignSymbol ← Misc_Text 128,128,64; TrafficLight 0,64,64.
Car ← SUVPickupTruck 64,128,192; Truck_Bus 192,128,192; Train 192,64,128; OtherMoving 128,64,64.
Pedestrian ← Child 192,128,64; CartLuggagePram 64,0,192; Animal 64,128,64. Bicyclist ← MotorcycleScooter 192,0,192"""
OTHER_COPIES = {(60, 40, 222): "Sidewalk", (255, 69, 0): "Road"}


def read_table(text: str) -> dict[str, tuple[int, int, int]]:
    """{"Sky": (128, 128, 128), …} of "Sky 128,128,128; …"."""
    return {name: tuple(map(int, color.split(","))) for name, color in map(str.split, text.split(";"))}


COLORS = read_table(CLASSES)
MERGED = {into: read_table(text) for into, text in (line.strip().split(" ← ") for line in MERGES.split("."))}
COLORS32 = COLORS | {name: color for colors in MERGED.values() for name, color in colors.items()}
PALETTE = np.array([*COLORS.values()], np.uint8)  # (12, 3)


def compare_per_class(rgb: np.ndarray, colors) -> np.ndarray:
    """(H, W, 3) -> (H, W) uint8 ids, the slow way: one comparison per class; 255 where none matches."""
    ids = np.full(rgb.shape[:2], 255, np.uint8)
    for i, color in enumerate(colors):
        ids[(rgb == color).all(-1)] = i
    return ids


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def make_pair(root: Path, stem: str, ids: np.ndarray | None = None, split: str = "train") -> tuple[Path, Path]:
    """Write a photograph of noise and the mask of ``ids`` (default: 12×16 at random) -> their paths."""
    rng = np.random.default_rng(len(stem))
    ids = rng.integers(0, 12, (12, 16)) if ids is None else ids
    return (save(root / split / f"{stem}.png", rng.integers(0, 256, (*ids.shape, 3), dtype=np.uint8)),
            save(root / f"{split}_labels" / f"{stem}.png", PALETTE[ids]))


def write_csv(root: Path, colors: dict[str, tuple[int, int, int]]) -> Path:
    lines = [f"{name},{r},{g},{b}\n" for name, (r, g, b) in colors.items()]
    path = root / "class_dict.csv"
    path.write_text("name,r,g,b\n" + "".join(lines))
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A data folder of generated scenes, 96×72: 4 in train, 2 in val, 2 in test. Read it, do not change it."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    generate_dataset(root, {"train": 4, "val": 2, "test": 2}, (96, 72))
    return root


@pytest.fixture(scope="session")
def camvid() -> Path:
    """The folder of the real data; the test is skipped where there is none."""
    root = Path(__file__).resolve().parents[2] / "shared" / "camvid"
    if not root.is_dir():
        pytest.skip("needs ../shared/camvid")
    return root


@pytest.fixture(scope="module", params=["scenes", "camvid"])
def frames(request) -> dict[str, list[tuple[str, np.ndarray, np.ndarray]]]:
    """By split: (stem, (H, W, 3) uint8 photo, (H, W) uint8 ids) of a few frames, generated and real."""
    root, found = request.getfixturevalue(request.param), {}
    for split in ("train", "val"):
        paths, found[split] = sorted((root / split).iterdir()), []
        for path in paths[::len(paths) // 2]:
            photo, mask = (np.array(Image.open(root / folder / path.name)) for folder in (split, f"{split}_labels"))
            step = max(1, photo.shape[1] // 160)  # pixels left out keep tests fast; colours stay the real ones
            ids = compare_per_class(mask[::step, ::step], PALETTE)
            found[split].append((path.stem, photo[::step, ::step], ids))
    return found
