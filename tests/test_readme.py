"""The README and the pages beside it: links, commands and code, as they stand."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, SMALL, TURNED, code_blocks, opened, save
from PIL import Image

import train
from datasets.synthetic import generate_scene
from inference.checkpoints import SHIPPED

PAGES = {
    str(path.relative_to(REPO)): path.read_text("utf-8")
    for pattern in ("*.md", "checkpoint/*.md", "docs/*.md")
    for path in REPO.glob(pattern)
}
COMMAND = r"(?:^ *|&& )((?:python|torchrun) .*)|`((?:python|torchrun) [^`]*)`"
SCRIPTS = "train evaluate predict export datasets.check datasets.download datasets.synthetic"
PARSERS = {name: importlib.import_module(name).get_args_parser() for name in SCRIPTS.split()}


def commands(page):
    """(script, its flags) of every command with flags, in blocks and within lines."""
    for found in re.findall(COMMAND, PAGES[page].replace("\\\n", " "), re.M):
        words = shlex.split("".join(found), comments=True)
        for i, word in enumerate(words[:-1], 1):
            if word.removesuffix(".py") in PARSERS:
                yield word.removesuffix(".py"), words[i:]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", PAGES[page]):
        target = (REPO / page).parent / (path or Path(page).name)
        assert target.exists(), path
        if anchor:
            text = re.sub(r"[^\w\n -]", "", target.read_text("utf-8").lower())
            assert f"\n-{anchor}\n" in text.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_exist(page):
    for script, flags in commands(page):
        PARSERS[script].parse_args(flags)
    known = {flag for parser in PARSERS.values() for flag in parser._option_string_actions}
    named = set(re.findall(r"`(--\w[\w-]*)", PAGES[page]))
    assert page in ("CHANGELOG.md", "RESULTS.md") or named <= known


def test_the_readme_has_at_most_160_lines():
    assert PAGES["README.md"].count("\n") <= 160


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_are_narrow_enough_for_github(page):
    """At a window of 830 pixels, a block shows 88 characters. Full-width characters take two."""
    for line in "".join(code_blocks(page, "(?:bash|python|text|diff)")).splitlines():
        width = sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in line)
        assert width <= 88, line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the included weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    shutil.copy(SHIPPED, "checkpoint")
    return tmp_path


def test_the_readmes_code_predicts_a_turned_photograph(folder):
    photo = generate_scene(3, 131, 90)[0].transpose(Image.Transpose.ROTATE_90)
    photo.save("photo.jpg", exif=TURNED)
    names = {}
    exec(code_blocks("README.md", "python")[0], names)
    assert names["ids"].shape == (90, 131)


def test_brushes_of_label_studio_become_masks(folder):
    """Whatever the annotator and the brush are called; a photograph without brushes is black."""
    tasks = [{"id": i, "image": f"/data/upload/1/frame{i}.jpg"} for i in (7, 8)]
    Path("export.json").write_text(json.dumps(tasks))
    ids = np.arange(12).reshape(3, 4) % 3
    for task in tasks:
        save(folder / "mydata" / "images" / Path(task["image"]).name, np.zeros((3, 4, 3), np.uint8))
    for middle, name in (("by-1-tag", "Road"), ("by-a-b@example.com-brush", "Car")):
        path = folder / "brushes" / f"task-7-annotation-1-{middle}-{name}-0.png"
        save(path, np.uint8(255 * (ids == ["Road", "Car"].index(name) + 1)))
    exec(code_blocks("docs/own-data.md", "python")[0], {})
    colors = np.array([(0, 0, 0), (128, 64, 128), (64, 0, 128)])
    assert (np.asarray(opened("mydata/masks/frame7.png")) == colors[ids]).all()
    assert not np.any(opened("mydata/masks/frame8.png"))


@pytest.mark.slow
@pytest.mark.parametrize("section", PAGES["docs/extending.md"].split("\n## ")[1:6])
def test_the_documented_edits_train(section, scenes, tmp_path):
    """In a copy of the repository."""
    ignored = shutil.ignore_patterns(".*", "docs", "tests", "checkpoint")
    copy = shutil.copytree(REPO, tmp_path / "copy", ignore=ignored)
    name, diff = re.search(r"```diff\n\+\+\+ (\S+)\n(.*?)```", section, re.S).groups()
    code = (copy / name).read_text("utf-8")
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        assert code.count(before) == 1
        code = code.replace(before, "".join(line[1:] for line in lines if line[0] != "-"))
    (copy / name).write_text(code, "utf-8")
    typed = re.findall(r"`(--(?:model|scheduler|loss) \w+)`", section)
    flags = " ".join([*SMALL, *typed]).split()
    command = [sys.executable, copy / "train.py", "--data_root", scenes, *flags]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=True)
    if name == "training/trainer.py":
        (log,) = tmp_path.glob("checkpoint/*.csv")
        assert ",norm," in log.read_text().replace("\n", ",")


def test_the_documented_loop_trains(folder, scenes):
    shutil.copytree(scenes, "data/CamVid")
    names = {}
    exec(code_blocks("docs/extending.md", "python")[0], names)
    assert names["loss"].isfinite() and names["masks"].shape == (4, 224, 224)


@pytest.mark.slow
def test_the_notebook_runs(folder, monkeypatch, scenes, call):
    """With fewer scenes and one epoch. Nothing is cloned, installed or downloaded."""
    shutil.copytree(scenes, "data/CamVid")
    monkeypatch.setattr(train, "DEMO_SCENES", {"train": 2, "val": 2, "test": 3})
    shown = []
    names = {"display": lambda image: shown.append(image.copy())}
    for cell in json.loads((REPO / "docs" / "colab.ipynb").read_text("utf-8"))["cells"]:
        code = "".join(cell["source"])
        if "train.py" in code:
            code += " --epochs 1"
        if "git clone" in code or "download" in code:
            continue
        if code.startswith("!python"):
            assert call(*code.split()[1:])[0] == 0
        elif cell["cell_type"] == "code":
            exec(code, names)
    assert len(shown) == 7
    assert shown[-1].width == 960


@pytest.mark.slow
def test_the_commands_for_own_data_run_one_after_the_other(folder, scenes, call):
    """With two epochs of small crops."""
    shutil.copytree(scenes, "mydata")
    shutil.copytree(scenes / "val", "photos")
    for script, flags in commands("docs/own-data.md"):
        small = ("--epochs", 2, "--crop_size", 64) if script == "train" else ()
        assert call(script, *flags, *small)[0] == 0
    assert len(list(Path("predictions").glob("*_mask.png"))) == 2
