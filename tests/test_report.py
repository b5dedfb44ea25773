"""The report page: its numbers, and what a browser makes of it (where Chromium is installed)."""
import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.classes import CAMVID, ClassSet
from metric import SegmentationMetric
from report import Report

REPO = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def data_of(page: Path) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[1]
    return json.loads(text)


def decode(url: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as image:
        image.load()
    return image


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, list]:
    """Five pictures of 60×40, the i-th with i tenths of its columns wrong; cars in two of them, no trains at all."""
    rng, classes = np.random.default_rng(0), ClassSet(("void", "a<b", "car", "</script>"), ((0, 0, 0), (255, 0, 0),
                                                                                          (0, 255, 0), (0, 0, 255)), 0)
    report, metric, frames = Report(classes), SegmentationMetric(4, 0), []
    for i in (2, 0, 3, 1, 4):
        label = np.ones((40, 60), np.uint8)
        label[:10] = 2 if i > 2 else 1
        label[:, 0] = 0
        ids = np.where(np.arange(60) < 6 * i, np.where(label == 1, 2, 1), np.maximum(label, 1)).astype(np.uint8)
        photo = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (40, 60, 3))
        frames.append((f"frame {i}", photo, ids, label))
        report.add(*frames[-1])
        metric.update(ids, label)
    return report.write(tmp_path_factory.mktemp("report"), "a <title>", metric), frames


def test_the_page_holds_every_picture_and_its_scores(page):
    path, frames = page
    data = data_of(path)
    assert [card["name"] for card in data["cards"]] == [frame[0] for frame in frames]
    total = SegmentationMetric(4, 0)
    for card, (_, photo, ids, label) in zip(data["cards"], frames):
        wrong = (ids != label) & (label != 0)
        assert card["accuracy"] == pytest.approx(1 - wrong.sum() / (label != 0).sum(), abs=1e-4)
        for key, expected in (("label", label), ("prediction", ids)):
            assert (np.asarray(decode(card[key])) == expected).all()
        assert (np.asarray(decode(card["errors"]).convert("RGBA"))[..., 3] > 0).tolist() == wrong.tolist()
        assert np.abs(np.asarray(decode(card["photo"])).astype(int) - photo).mean() < 3
        assert card["present"] == [k for k, i in enumerate((1, 2, 3)) if (label == i).any()]
        total.update(ids, label)
    assert data["matrix"] == total.confusion_matrix()[1:, 1:].tolist()
    assert data["classes"][2]["iou"] is None
    assert data["classes"][0]["iou"] == pytest.approx(total.compute()["iou"][1], abs=1e-4)


def test_the_page_needs_nothing_from_elsewhere(page):
    text = page[0].read_text("utf-8")
    assert "http" not in text and "<title></title>" in text
    assert text.count("</script>") == 2, "a class called </script> closes nothing"


CLICKS = """
<script>
const seen = { errors: window.failures };
const names = () => [...document.querySelectorAll(".card:not([hidden]) p")].map(p => p.textContent.split(":")[0]);
const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
seen.title = document.title;
seen.worst = names();
set("order", "best"); seen.best = names();
set("order", "name"); seen.name = names();
set("filter", "1"); seen.cars = names(); seen.count = $("count").textContent;
bars[1].click(); seen.all = names().length;
press(document.body, "2"); seen.label = cards[0].layer.src === cards[0].card.label;
press(document.body, "1"); seen.photo = cards[0].layer.hidden;
press(document.body, "3"); seen.prediction = !cards[0].layer.hidden && cards[0].layer.src === cards[0].card.prediction;
cards[0].slider.value = 30; cards[0].slider.oninput(); seen.slider = cards[0].layer.style.clipPath;
const first = document.querySelector(".card"); first.focus(); press(first, "ArrowRight");
seen.focus = document.activeElement === first.nextElementSibling;
seen.sizes = cards.every(({ layer }) => layer.clientWidth === layer.previousElementSibling.clientWidth);
seen.hover = document.querySelector("td").title;
document.body.replaceChildren(document.createTextNode("SEEN" + JSON.stringify(seen) + "SEEN"));
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_sorts_filters_and_compares(page, tmp_path):
    text = page[0].read_text("utf-8")
    watch = "<script>window.failures = []; onerror = message => { failures.push(message); };</script>"
    (tmp_path / "page.html").write_text(text.replace("<title>", watch + "<title>") + CLICKS, "utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           "--enable-logging=stderr", f"file://{tmp_path}/page.html"],
                          capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(done.stdout.split("SEEN")[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["errors"] == [] and seen["title"] == "a <title>"
    ranked = [card["name"] for card in sorted(data_of(page[0])["cards"], key=lambda card: card["miou"])]
    assert seen["worst"] == ranked and seen["best"] == ranked[::-1] and ranked[-1] == "frame 0"
    assert seen["name"] == sorted(ranked)
    assert seen["cars"] == ["frame 3", "frame 4"] and seen["count"] == "2 of 5" and seen["all"] == 5
    assert seen["label"] and seen["photo"] and seen["prediction"] and seen["focus"] and seen["sizes"]
    assert seen["slider"] == "inset(0px 70% 0px 0px)" and "pixels" in seen["hover"]


def test_evaluate_and_predict_write_a_report(scenes, tmp_path):
    for script, flags in (("evaluate.py", ("--data_root", scenes, "--report", "labelled")),
                          ("predict.py", ("--image_dir", scenes / "val", "--report", "unlabelled"))):
        done = subprocess.run([sys.executable, str(REPO / script), *map(str, flags)], cwd=tmp_path,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "index.html" in done.stdout, done.stderr
    labelled, unlabelled = (data_of(tmp_path / folder / "index.html") for folder in ("labelled", "unlabelled"))
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert f"mIoU {metrics['miou']:.3f}" in labelled["headline"] and len(labelled["classes"]) == 11
    names = [path.stem for path in sorted((scenes / "val").iterdir())]
    for data in (labelled, unlabelled):
        assert [card["name"] for card in data["cards"]] == names
        for card in data["cards"]:
            with Image.open(scenes / "val" / f"{card['name']}.png") as photo:
                difference = np.asarray(decode(card["photo"])).astype(int) - np.asarray(photo)
            assert np.abs(difference).mean() < 10
    for ours, theirs in zip(labelled["cards"], unlabelled["cards"]):
        assert ours["prediction"] == theirs["prediction"] and "label" not in theirs
    with Image.open(tmp_path / "predictions" / f"{names[0]}_mask.png") as mask:
        assert (np.asarray(decode(unlabelled["cards"][0]["prediction"])) == np.asarray(mask)).all()
    assert sum(entry["share"] for entry in unlabelled["classes"]) == pytest.approx(1)
    assert CAMVID.names[1:] == tuple(entry["name"] for entry in unlabelled["classes"])
