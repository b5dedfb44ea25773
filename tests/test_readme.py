"""What the README and the pages beside it say: links, commands and code, as they stand."""
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import COLORS, REPO, SMALL, TURNED, code_blocks, opened, save
from PIL import Image

import train
from datasets.synthetic import generate_dataset, generate_scene

PAGES = {str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
         for path in (*REPO.glob("*.md"), REPO / "checkpoint" / "README.md", *sorted((REPO / "docs").glob("*.md")))}


def anchors(page: str) -> set[str]:
    return {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
            for line in page.splitlines() if line.startswith("#")}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_are_there(name):
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            path = (REPO / name).parent / path if path else REPO / name
            assert path.exists() and (not anchor or anchor in anchors(path.read_text(encoding="utf-8"))), target
    for path in re.findall(r"`([\w./-]+\.(?:py|md|toml|txt))`", page):
        assert (REPO / path).exists(), path
    assert name != "README.md" or page.count("\n") <= 150


def typed_commands() -> list[tuple[str, str, list[str]]]:
    """(page, module, flags) of every command of this repository that a page shows with flags."""
    found = []
    for name, page in PAGES.items():
        text = page.replace("\\\n", " ")  # a command may go on in the next line
        lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
        inline = re.findall(r"`((?:python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for words in (shlex.split(line.split(" && ")[-1], comments=True) for line in (*lines, *inline)):
            start = next((i for i, word in enumerate(words) if re.fullmatch(r"datasets\.\w+|\w+\.py", word)), 99)
            if words[start + 1:]:
                found.append((name, words[start].removesuffix(".py"), words[start + 1:]))
    return found


@pytest.mark.parametrize("page, module, flags", typed_commands())
def test_commands_have_these_flags(page, module, flags):
    importlib.import_module(module).get_args_parser().parse_args(flags)


def test_flags_named_in_the_readme_exist():
    parsers = [importlib.import_module(name).get_args_parser() for name in ("train", "predict", "datasets.download")]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    named = set(re.findall(r"`(--\w+)", PAGES["README.md"]))
    assert len(named) > 20 and named <= known, named - known


def test_the_readmes_code_predicts(tmp_path, monkeypatch, capsys):
    on_its_side = generate_scene(3, 131, 90)[0].transpose(Image.Transpose.ROTATE_90)
    on_its_side.save(tmp_path / "photo.jpg", exif=TURNED)
    (tmp_path / "checkpoint").symlink_to(REPO / "checkpoint")
    monkeypatch.chdir(tmp_path)
    code, = code_blocks("README.md", "python")
    exec(code, names := {})
    assert names["ids"].shape == (90, 131) and "'Road': '" in capsys.readouterr().out


def test_the_readme_has_the_classes_and_their_colors():
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in PAGES["README.md"].splitlines()
             if line.startswith(("| IoU |", "| colour |"))]
    names, colors = next(zip(lines, lines[1:]))
    assert {name: tuple(map(int, color.split())) for name, color in zip(names, colors)} | {
        "Unlabelled": (0, 0, 0)} == COLORS


def test_the_chinese_readme_has_the_same_numbers():
    english, chinese = ({*re.findall(r"\d\.\d{3}", PAGES[name])} for name in ("README.md", "README.zh.md"))
    assert chinese < english and len(chinese) == 7


def test_the_notebook(tmp_path, monkeypatch, capsys):
    """Cell by cell, on a few scenes for one epoch. The clone is a copy of the files here, and nothing is installed."""
    shown: list[Image.Image] = []
    ran: list[str] = []
    monkeypatch.chdir(tmp_path)
    names = {"display": lambda image: shown.append(image.copy())}

    def run(line: str) -> None:
        program, *words = line[1:].split()
        ran.append(program)
        if program == "git":
            shutil.copytree(REPO, words[-1], ignore=shutil.ignore_patterns(".git", "demo", "tests", ".*"))
            generate_dataset(tmp_path / "unet" / "checkpoint" / "demo" / "scenes", {"train": 2, "val": 2, "test": 3},
                             (96, 72))
        elif program == "cd":
            monkeypatch.chdir(words[0])
        elif program == "python":
            few = "--epochs 1 --crop_size 64 --workers 0".split() if words[0] == "train.py" else []
            done = subprocess.run([sys.executable, *words, *few], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

    for cell in json.loads((REPO / "docs" / "colab.ipynb").read_text(encoding="utf-8"))["cells"]:
        code = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
        for line in re.findall(r"^[!%].*", code, re.M):
            run(line)
        exec(re.sub(r"^[!%].*", "", code, flags=re.M), names)
    assert ran == ["git", "cd", "pip", "python", "python"] and len(shown) == 6
    assert [image.size for image in shown[2:5]] == 3 * [(480, 360)] and shown[5].size == (96, 72)
    assert "'Road': '" in capsys.readouterr().out


# As the tools write them: the folder of the masks, an image's and a mask's name, and what a mask holds.
EXPORTS = {
    "labelme": ("JPEGImages", "SegmentationClassPNG", "{}.jpg", "{}.png", "palette"),
    "cvat": ("JPEGImages", "SegmentationClass", "{}.jpg", "{}.png", "colours"),
    "milesial": ("images", "masks", "{}.jpg", "{}_mask.png", "colours"),
    "label studio": ("images", "masks", "{}.jpg", "task-{}-annotation-7-by-1-tag-{}-0.png", "brushes"),
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_exports_of_labelling_tools(tmp_path, call, monkeypatch, tool):
    image_dir, mask_dir, image_name, mask_name, kind = EXPORTS[tool]
    colors, ids = {"Road": (128, 64, 128), "Car": (64, 0, 128)}, np.repeat([0, 1, 2], 64).reshape(12, 16)
    palette, data = np.array([(0, 0, 0), *colors.values()], np.uint8), tmp_path / "mydata"
    (data / mask_dir).mkdir(parents=True)
    for i in range(20):
        save(data / image_dir / image_name.format(f"frame{i:02}"), np.full((12, 16, 3), 9, np.uint8))
        if kind == "brushes":
            for k, label in enumerate(colors, 1):
                save(tmp_path / "brushes" / mask_name.format(i, label), np.uint8(255 * (ids == k)))
            continue
        mask = Image.fromarray(ids.astype(np.uint8))
        mask.putpalette(palette.tobytes())
        (mask if kind == "palette" else mask.convert("RGB")).save(data / mask_dir / mask_name.format(f"frame{i:02}"))
    if kind == "brushes":
        tasks = [{"id": i, "image": f"/data/upload/1/frame{i:02}.jpg"} for i in range(20)]
        (tmp_path / "export.json").write_text(json.dumps(tasks))
        monkeypatch.chdir(tmp_path)
        exec(code_blocks("docs/own-data.md", "python")[0], {})
    assert call("datasets.check", "--data_root", data, "--write_classes")[0] == 0
    status, out, _ = call("datasets.check", "--data_root", data, "--val_percent", 20)
    assert status == 0 and "train: 16 pairs" in out and "val: 4 pairs" in out and out.count("33.33%") == 6
    flags = "--data_root", data, "--val_percent", 20, *SMALL, "--epochs", 1
    if tool == "labelme":  # the checkpoint remembers the share: evaluation and a resumed run take the same images
        assert call("train.py", *flags)[0] == 0
        assert "unet_best.pth on val of" in (out := call("evaluate.py", "--data_root", data)[1]) and ", 4 images" in out
        status, out, _ = call("train.py", "--data_root", data, *SMALL, "--epochs", 2, "--resume", "auto")
        assert status == 0 and "resumed after epoch 1" in out and "train: 16 images\nval: 4 images" in out


@pytest.mark.slow
def test_own_data_from_images_to_a_model(tmp_path, call, monkeypatch):
    """As typed, but for a smaller default of --crop_size, which takes a fifth of the time."""
    table, = code_blocks("docs/own-data.md", "csv")
    commands, = code_blocks("docs/own-data.md", "bash")
    names, *colors = zip(*(line.split(",") for line in table.splitlines()[1:]))
    palette, looks = np.array(colors, np.uint8).T, np.uint8([(70, 140, 60), (110, 110, 115), (40, 60, 190)])
    for split, lefts in (("train", (0, 30, 50, 85)), ("val", (20, 70))):
        for i, left in enumerate(lefts):
            ids = np.repeat([0, 1], (40, 50))[:, None].repeat(120, 1)  # a blue car on a grey road under green hills
            ids[50:70, left:left + 35] = 2
            save(tmp_path / "mydata" / split / f"street {i}.jpg", looks[ids], quality=95)
            save(tmp_path / "mydata" / f"{split}_labels" / f"street {i}.png", palette[ids])
    (tmp_path / "mydata" / "class_dict.csv").write_text(table)
    (tmp_path / "checkpoint").mkdir()
    shutil.copy(REPO / "checkpoint" / "camvid_unet.pth", tmp_path / "checkpoint")
    parser = train.get_args_parser()
    parser.set_defaults(crop_size=[96])
    monkeypatch.setattr(train, "get_args_parser", lambda: parser)
    for line in commands.splitlines():
        program, *flags = shlex.split(line, comments=True)
        assert program == "python" and call(*(flags[1:] if flags[0] == "-m" else flags))[0] == 0, line
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["miou"] > 0.8 and [entry["name"] for entry in metrics["per_class"]] == [*names]
    assert (np.array(opened(tmp_path / "predictions" / "street 1_mask.png")) == ids).mean() > 0.9
