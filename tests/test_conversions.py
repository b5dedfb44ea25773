"""docs/conversions.md: its code makes a folder that is read from what labelling tools export."""

import base64
import io
import json
import os
import shlex
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import code_blocks, describe, save
from PIL import Image

STEMS = [f"{number:02}" for number in range(12)]
SIZE = {"height": 72, "width": 96}
LABELME = Path(os.environ.get("LABELME", "not set"))


def scene(stem: str) -> tuple[np.ndarray, np.ndarray, dict[str, tuple[int, ...]]]:
    """(72, 96, 3) image, (72, 96) ids, and left, top, right, bottom of a road and a car on it."""
    top, left = np.random.default_rng(int(stem)).integers((30, 8), (42, 60)).tolist()
    boxes = {"road": (0, top, 96, 72), "car": (left, top - 8, left + 24, top + 8)}
    ids = np.zeros((72, 96), np.uint8)
    for class_id, (x0, y0, x1, y1) in enumerate(boxes.values(), start=1):
        ids[y0:y1, x0:x1] = class_id
    return np.array([(70, 120, 200), (90, 90, 90), (200, 40, 40)], np.uint8)[ids], ids, boxes


def corners(x0: int, y0: int, x1: int, y1: int) -> list[list[int]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def write_json(path: Path, **content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_coco(root: Path) -> None:
    images, shapes = [], []
    for number, stem in enumerate(STEMS, start=1):
        image, _, boxes = scene(stem)
        save(root / "images" / f"{stem}.jpg", image)
        images.append({"id": number, "file_name": f"{stem}.jpg", **SIZE})
        for category, (x0, y0, x1, y1) in enumerate(boxes.values(), start=1):
            shape = {"id": len(shapes) + 1, "image_id": number, "category_id": category}
            shape |= {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]], "iscrowd": 0}
            shape |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            shapes.append(shape)
    categories = [{"id": 1, "name": "road"}, {"id": 2, "name": "car"}]
    path = root / "annotations/instances_default.json"
    write_json(path, images=images, annotations=shapes, categories=categories)


def write_labelme(root: Path) -> None:
    common = {"version": "7.9.1", "imageHeight": 72, "imageWidth": 96, "imageData": None}
    kind = {"shape_type": "polygon", "group_id": None, "flags": {}}
    for stem in STEMS:
        image, _, boxes = scene(stem)
        save(root / f"{stem}.jpg", image)
        shapes = [{"label": name, "points": corners(*box), **kind} for name, box in boxes.items()]
        write_json(root / f"{stem}.json", shapes=shapes, imagePath=f"{stem}.jpg", **common)


def write_supervisely(root: Path) -> None:
    """The car is a bitmap above the road, or below a hole of it. Corners belong to a polygon."""
    classes = [{"title": "road", "shape": "polygon"}, {"title": "car", "shape": "bitmap"}]
    write_json(root / "meta.json", classes=classes, tags=[])
    for stem in STEMS:
        image, ids, boxes = scene(stem)
        save(root / "dataset/img" / f"{stem}.jpg", image)
        (x0, y0, x1, y1), (left, top, right, bottom) = boxes.values()
        hole = corners(left, y0, right - 1, bottom - 1)
        above = int(stem) % 2
        points = {"exterior": corners(x0, y0, x1 - 1, y1 - 1), "interior": [] if above else [hole]}
        bitmap = Image.fromarray((ids == 2)[top:, left - 5 :].astype(np.uint8))
        bitmap.putpalette([0, 0, 0, 255, 255, 255])
        bitmap.save(png := io.BytesIO(), "PNG", transparency=0)
        data = base64.b64encode(zlib.compress(png.getvalue()))
        pixels = {"origin": [left - 5, top], "data": data.decode()}
        car = {"classTitle": "car", "geometryType": "bitmap", "tags": [], "bitmap": pixels}
        road = {"classTitle": "road", "geometryType": "polygon", "tags": [], "points": points}
        content = {"tags": [], "size": SIZE, "objects": [road, car] if above else [car, road]}
        write_json(root / "dataset/ann" / f"{stem}.jpg.json", description="", **content)


# The tool, the page's block, whether it can run here, and the pixels that must agree.
TOOLS = {
    "coco": (write_coco, "python", "coco_instances", find_spec("datumaro"), 1),
    "annotated": (write_labelme, "bash", "labelme2voc", LABELME.is_dir(), 0.99),
    "project": (write_supervisely, "python", "zlib", True, 1),
}


@pytest.mark.parametrize("source", TOOLS)
def test_the_page_converts_what_a_labelling_tool_exports(tmp_path, call, source):
    write, language, word, available, agreement = TOOLS[source]
    if not available:
        pytest.skip("needs Datumaro, or labelme's source in the folder that LABELME names")
    write(tmp_path / source)
    (tmp_path / "labelme").symlink_to(LABELME.resolve())
    (tmp_path / "labels.txt").write_text(code_blocks("docs/conversions.md", "text")[0])
    block = next(text for text in code_blocks("docs/conversions.md", language) if word in text)
    args = ["-c", block] if language == "python" else shlex.split(block)[1:]
    subprocess.run([sys.executable, *args], cwd=tmp_path, check=True)
    status, out, err = call("datasets.check", "--data_root", tmp_path / "mydata")
    assert status == 0 and "train: 10 pairs" in out and "val: 2 pairs" in out, out + err
    data = describe(tmp_path / "mydata")
    assert [name.strip("_") for name in data.classes.names] == ["background", "road", "car"]
    for dataset in map(data.dataset, data.splits):
        for i, pair in enumerate(dataset.pairs):
            assert (dataset[i][1] == scene(pair.image.stem)[1]).mean() >= agreement
