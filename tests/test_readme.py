"""What the README and the pages beside it say: links, commands and code, as they stand."""
import importlib
import json
import re
import shlex

import numpy as np
import pytest
from conftest import REPO, code_blocks, opened, save

import train
from datasets.synthetic import generate_scene

PAGES = {str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
         for path in (REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md")))}


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
    generate_scene(3, 131, 90)[0].save(tmp_path / "photo.jpg")
    (tmp_path / "checkpoint").symlink_to(REPO / "checkpoint")
    monkeypatch.chdir(tmp_path)
    code, = code_blocks("README.md", "python")
    exec(code, {})
    assert "'Road': '" in capsys.readouterr().out


@pytest.mark.slow
def test_own_data_from_images_to_a_model(tmp_path, call, monkeypatch):
    """As typed, but for a smaller default of --crop_size, which takes a fifth of the time."""
    table, = code_blocks("docs/own-data.md", "csv")
    commands, = code_blocks("docs/own-data.md", "bash")
    names, *colors = zip(*(line.split(",") for line in table.splitlines()[1:]))
    palette, rng = np.array(colors, np.uint8).T, np.random.default_rng(0)
    looks = np.array([(70, 140, 60), (110, 110, 115), (40, 60, 190)])
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            ids, left = np.zeros((90, 120), int), rng.integers(0, 80)  # a blue car on a grey road under green hills
            ids[40:] = 1
            ids[50:70, left:left + 35] = 2
            image = rng.normal(looks[ids], 10).clip(0, 255).astype(np.uint8)
            save(tmp_path / "mydata" / split / f"street {i}.jpg", image, quality=95)
            save(tmp_path / "mydata" / f"{split}_labels" / f"street {i}.png", palette[ids])
    (tmp_path / "mydata" / "class_dict.csv").write_text(table)
    parser = train.get_args_parser()
    parser.set_defaults(crop_size=[96])
    monkeypatch.setattr(train, "get_args_parser", lambda: parser)
    for line in commands.splitlines():
        program, *flags = shlex.split(line, comments=True)
        assert program == "python" and call(*(flags[1:] if flags[0] == "-m" else flags))[0] == 0, line
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["miou"] > 0.8 and [entry["name"] for entry in metrics["per_class"]] == [*names]
    assert (np.array(opened(tmp_path / "predictions" / "street 1_mask.png")) == ids).mean() > 0.9
