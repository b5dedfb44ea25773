"""The README's walk through one's own data works as typed."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save
from PIL import Image

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def photograph(rng: np.random.Generator, colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A blue car on a grey road under green hills, (90, 120, 3), and its mask in the table's colours."""
    ids = np.zeros((90, 120), int)
    horizon, left = rng.integers(30, 50), rng.integers(0, 80)
    ids[horizon:] = 1
    ids[horizon + 10:horizon + 30, left:left + 35] = 2
    looks = np.array([(70, 140, 60), (110, 110, 115), (40, 60, 190)]) + rng.integers(-15, 16, (3, 3))
    return np.clip(looks[ids] + rng.normal(0, 8, (90, 120, 3)), 0, 255).astype(np.uint8), colors[ids]


@pytest.mark.slow
def test_own_data_from_photographs_to_a_model(tmp_path):
    table, = blocks("csv")
    commands = next(block for block in blocks("bash") if "--data_root mydata" in block)
    colors = np.array([[int(value) for value in line.split(",")[1:]] for line in table.splitlines()[1:]], np.uint8)
    root, rng = tmp_path / "mydata", np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for i in range(count):
            photo, mask = photograph(rng, colors)
            save(root / split / f"street {i}.jpg", photo, quality=95)
            save(root / f"{split}_labels" / f"street {i}.png", mask)
    (root / "class_dict.csv").write_text(table)
    for line in commands.splitlines():
        program, script, *flags = shlex.split(line, comments=True)
        assert program == "python"
        script = ["-m", flags.pop(0)] if script == "-m" else [str(REPO / script)]
        done = subprocess.run([sys.executable, *script, *flags], cwd=tmp_path, capture_output=True, text=True,
                              timeout=300, env=os.environ | {"PYTHONPATH": str(REPO)})
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["miou"] > 0.8 and [entry["name"] for entry in metrics["per_class"]] == ["Background", "Road", "Car"]
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    with Image.open(tmp_path / "predictions" / "street 0_mask.png") as mask, \
            Image.open(root / "val_labels" / "street 0.png") as label:
        assert (np.array(mask.convert("RGB")) == np.array(label)).all(-1).mean() > 0.9


def test_every_file_and_heading_that_the_readme_names_is_there():
    files = re.findall(r"^\| ((?:`[\w./]+` ?,? ?)+)\|", README[README.index("## Files"):], re.M)
    names = [name for cell in files for name in re.findall(r"`([\w./]+)`", cell)]
    assert len(names) > 20 and all((REPO / name).exists() for name in names), names
    listed = {name for name in names if name.endswith(".py")}
    assert {str(path.relative_to(REPO)) for folder in (".", "datasets") for path in (REPO / folder).glob("*.py")} \
        - {"datasets/__init__.py"} == listed
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
               for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= anchors
    assert all((REPO / path).exists() for path in re.findall(r"\]\(([\w./]+)\)", README))
