"""The report page: its numbers, and what a browser makes of it (where Chromium is installed)."""
import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import PALETTE, opened
from PIL import Image

from datasets.classes import CAMVID, ClassSet
from metric import SegmentationMetric
from output.report import Report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def data_of(page: Path) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[1]
    return json.loads(text)


def decode(url: str, mode: str | None = None) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as image:
        return np.asarray(image.convert(mode) if mode else image).astype(int)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, list]:
    """Five images, in the i-th i tenths of the pixels wrong, void predicted as a car; cars in two, class 3 in none."""
    rng, classes = np.random.default_rng(0), ClassSet(("void", "a<b", "car", "</script>"), PALETTE[:4].tolist(), 0)
    report, metric, frames = Report(classes), SegmentationMetric(4, 0), []
    for i in (2, 0, 3, 1, 4):
        mask = rng.integers(0, 3 if i > 2 else 2, (40, 60), dtype=np.uint8)
        ids = np.where(mask == 0, 2, np.where(rng.random((40, 60)) < i / 10, 3 - mask, mask))
        frames.append((f"frame {i}", np.full((40, 60, 3), (50 * i, 200, 90), np.uint8), ids, mask))
        report.add(*frames[-1])
        metric.update(ids, mask)
    return report.write(tmp_path_factory.mktemp("report"), "a <title>", metric), frames


def test_the_page_holds_every_image_and_its_scores_and_needs_nothing_from_elsewhere(page):
    path, frames = page
    data, total = data_of(path), SegmentationMetric(4, 0)
    for card, (name, image, ids, mask) in zip(data["cards"], frames, strict=True):
        wrong = (ids != mask) & (mask != 0)
        assert card["name"] == name
        assert card["accuracy"] == pytest.approx(1 - wrong.sum() / (mask != 0).sum(), abs=1e-4)
        assert (decode(card["mask"]) == mask).all() and (decode(card["prediction"]) == ids).all()
        assert ((decode(card["errors"], "RGBA")[..., 3] > 0) == wrong).all()
        assert np.abs(decode(card["image"]) - image).mean() < 3
        assert card["present"] == [k for k, i in enumerate((1, 2, 3)) if (mask == i).any()]
        total.update(ids, mask)
    assert data["matrix"] == total.confusion_matrix()[1:, 1:].tolist() and data["classes"][2]["iou"] is None
    assert data["classes"][0]["iou"] == pytest.approx(total.compute()["iou"][1], abs=1e-4)
    text = path.read_text("utf-8")
    assert "http" not in text and text.count("</script>") == 2, "a class called </script> closes nothing"


CLICKS = """<script>
const names = () => [...document.querySelectorAll(".card:not([hidden]) p")].map(p => p.textContent.split(":")[0]);
const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); return names(); };
const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const seen = { errors: window.failures, title: document.title, worst: names(), best: set("order", "best"),
               name: set("order", "name"), cars: set("filter", "1"), count: $("count").textContent };
bars[1].click(); seen.all = names().length;
const { card, layer, slider } = cards[0], first = document.querySelector(".picture");
press(document.body, "2"); seen.mask = layer.src === card.mask;
press(slider, "1"); seen.image = layer.hidden;
press($("order"), "3"); seen.prediction = !layer.hidden && layer.src === card.prediction;
slider.value = 30; slider.oninput(); seen.slider = layer.style.clipPath;
const wide = first.clientWidth, next = document.querySelectorAll(".picture")[1];
const large = () => next.clientWidth > 1.5 * wide;
first.focus(); press(first, "ArrowRight"); seen.focus = document.activeElement === next;
next.click(); seen.large = large(); press(next, "ArrowLeft"); seen.moved = !large() && first.clientWidth > 1.5 * wide;
press(first, "Escape"); seen.small = first.clientWidth === wide && first.ariaExpanded === "false";
seen.called = [first.ariaLabel, next.parentElement.ariaLabel, slider.ariaLabel].map(name => name.split("frame").length);
seen.unit = [$("unit").textContent, bars[0].textContent.slice(-5)];
seen.sizes = cards.every(({ layer }) => layer.clientWidth === layer.previousElementSibling.clientWidth);
seen.hover = document.querySelector("td").title;
document.body.replaceChildren(document.createTextNode("SEEN" + JSON.stringify(seen) + "SEEN"));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_sorts_filters_and_compares(page, tmp_path):
    watch = "<script>window.failures = []; onerror = message => { failures.push(message); };</script>"
    text = page[0].read_text("utf-8").replace("<title>", watch + "<title>")
    (tmp_path / "page.html").write_text(text + CLICKS, "utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           "--enable-logging=stderr", f"file://{tmp_path}/page.html"],
                          capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen, iou = json.loads(html.unescape(done.stdout.split("SEEN")[1])), f"{data_of(page[0])['classes'][0]['iou']:.3f}"
    ranked = [card["name"] for card in sorted(data_of(page[0])["cards"], key=lambda card: card["miou"])]
    assert "pixels" in seen.pop("hover") and ranked[-1] == "frame 0"
    assert seen == {"errors": [], "title": "a <title>", "worst": ranked, "best": ranked[::-1], "name": sorted(ranked),
                    "cars": ["frame 3", "frame 4"], "count": "2 of 5", "all": 5, "mask": True, "image": True,
                    "prediction": True, "slider": "inset(0px 70% 0px 0px)", "focus": True, "sizes": True,
                    "large": True, "moved": True, "small": True,
                    "called": [2, 2, 2], "unit": ["IoU of each class, from 0 to 1", iou]}


def test_evaluate_and_predict_write_a_report(scenes, tmp_path, call):
    for flags in (("evaluate.py", "--data_root", scenes), ("predict.py", "--image_dir", scenes / "val")):
        assert call(*flags, "--report", flags[0])[0] == 0
    labelled, unlabelled = (data_of(tmp_path / folder / "index.html") for folder in ("evaluate.py", "predict.py"))
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert f"mIoU {metrics['miou']:.3f}" in labelled["headline"] and len(labelled["classes"]) == 11
    for path, ours, theirs in zip(sorted((scenes / "val").iterdir()), labelled["cards"], unlabelled["cards"]):
        assert ours["name"] == theirs["name"] == path.stem and "mask" not in theirs
        assert ours["prediction"] == theirs["prediction"] and ours["image"] == theirs["image"]
        assert np.abs(decode(ours["image"]) - np.asarray(opened(path))).mean() < 10
        predicted = opened(tmp_path / "predictions" / f"{path.stem}_mask.png")
        assert (decode(theirs["prediction"]) == np.asarray(predicted)).all()
    assert sum(entry["share"] for entry in unlabelled["classes"]) == pytest.approx(1)
    assert CAMVID.names[1:] == tuple(entry["name"] for entry in unlabelled["classes"])
