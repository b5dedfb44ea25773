"""The benchmark's references compute what ours does, and the benchmark itself still runs."""
import json
import sys

import numpy as np
import torch
from conftest import PALETTE, REPO, compare_per_class, opened

from datasets.camvid import CamVidDataset
from datasets.classes import CAMVID
from datasets.synthetic import generate_scene
from training.checkpoints import SHIPPED

sys.path.append(str(REPO / "benchmarks"))


def test_masks_equal_those_of_the_plain_loop(tmp_path, call):
    import references
    images = tmp_path / "images"
    images.mkdir()
    for i, size in enumerate([(160, 120), (160, 120), (160, 120), (90, 131), (33, 20)]):
        generate_scene(i, *size)[0].save(images / f"{i}.png")
    assert call("predict.py", "--image_dir", images, "--save_dir", "ours", "--device", "cpu")[0] == 0
    references.predict(SHIPPED, images, tmp_path / "plain", "cpu")
    for path in (tmp_path / "plain").iterdir():
        ours, plain = (np.array(opened(p).convert("RGB")) for p in (tmp_path / "ours" / path.name, path))
        assert (ours != plain).any(-1).mean() < 1e-3, "but for pixels where two classes are equal to six digits"
    assert len(list((tmp_path / "plain").iterdir())) == len(list((tmp_path / "ours").iterdir())) == 10


def test_plain_items_hold_the_same_ids(scenes):
    import references
    dataset = CamVidDataset(scenes, "train", CAMVID)
    for pair in dataset.pairs:
        rgb = np.array(opened(pair.mask))
        assert (references.mask_to_ids(rgb) == compare_per_class(rgb, PALETTE)).all()
    image, mask = references.PlainDataset(dataset.pairs)[0]
    assert image.shape == (3, 224, 224) and image.dtype == torch.float32 and mask.shape == (224, 224)


def test_the_benchmark_prints_its_table_and_writes_its_rows(scenes, tmp_path, monkeypatch, capsys):
    import bench
    monkeypatch.chdir(tmp_path)
    stages = "masks", "items", "start"
    bench.main(bench.get_args_parser().parse_args([*stages, "--runs", "1", "--data_root", str(scenes)]))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == [line.split(" | ")[0][2:] for line in
                                              capsys.readouterr().out.splitlines()[4:]]
    assert len(rows) == 4 and all(row["ours"] > 0 for row in rows)
    assert [row["ratio"] for row in rows] == [row["reference"] and row["reference"] / row["ours"] for row in rows]
