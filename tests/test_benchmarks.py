"""The benchmark's references compute what ours does, and the benchmark itself still runs."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoints import SHIPPED
from datasets.camvid import CamVidDataset
from datasets.classes import CAMVID
from datasets.synthetic import generate_scene

REPO = Path(__file__).parents[1]
sys.path.append(str(REPO / "benchmarks"))


def test_masks_equal_those_of_the_plain_loop(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, size in enumerate([(160, 120), (160, 120), (160, 120), (90, 131), (33, 20)]):
        generate_scene(i, *size)[0].save(photos / f"{i}.png")
    commands = [[REPO / "predict.py", "--image_dir", photos, "--save_dir", tmp_path / "ours", "--checkpoint", SHIPPED],
                [REPO / "benchmarks" / "references.py", SHIPPED, photos, tmp_path / "plain", "cpu"]]
    for command in commands:
        subprocess.run([sys.executable, *map(str, command), *(["--device", "cpu"] if command[-1] != "cpu" else [])],
                       check=True, capture_output=True)
    for i in range(5):
        for kind in ("mask", "overlay"):
            ours, plain = (np.array(Image.open(tmp_path / run / f"{i}_{kind}.png").convert("RGB"))
                           for run in ("ours", "plain"))
            differ = (ours != plain).any(-1)
            assert differ.mean() < 1e-3, "but for pixels where two classes are equally probable to six digits"


def test_plain_items_hold_the_same_ids(scenes):
    import references
    dataset = CamVidDataset(scenes, "train", CAMVID)
    for i, (_, label) in enumerate(dataset.pairs):
        with Image.open(label) as mask:
            assert (references.mask_to_ids(np.array(mask.convert("RGB"))) == dataset[i][1]).all()
    image, mask = references.PlainDataset(dataset.pairs)[0]
    assert image.shape == (3, 224, 224) and image.dtype == torch.float32 and mask.shape == (224, 224)


def test_the_benchmark_prints_its_table_and_writes_its_rows(tmp_path):
    command = [sys.executable, str(REPO / "benchmarks" / "bench.py"), "masks", "items", "start", "--runs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == [line.split(" | ")[0][2:] for line in done.stdout.splitlines()[4:]]
    assert len(rows) == 4 and all(row["ours"] > 0 and row["ratio"] == row["reference"] / row["ours"] for row in rows)
