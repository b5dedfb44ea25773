"""The report page: its numbers, and what a browser makes of it (where Chromium is installed)."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from datasets.classes import CAMVID, ClassSet
from metric import SegmentationMetric
from output.report import Report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def decode(url, mode):
    file = io.BytesIO(base64.b64decode(url.partition("base64,")[2]))
    return np.array(Image.open(file).convert(mode), int)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Its text, images, predictions and masks: i tenths of image i are wrong, 3 and 4 have cars."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 1, 1, 3), np.uint8).repeat(40, 1).repeat(60, 2)
    masks = rng.integers(0, 2, (5, 40, 60))
    masks[3:, :9] = 2
    wrong = rng.random(masks.shape) < np.arange(5).reshape(5, 1, 1) / 10
    ids = np.where(wrong, 3 - masks, masks)
    ids[masks == 0] = 2
    colors = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    report = Report(ClassSet(("void", "a<b", "car", "</script>"), colors, 0))
    for i in (2, 0, 3, 1, 4):
        report.add(f"frame {i}", images[i], ids[i], masks[i])
    metric = SegmentationMetric(4, 0)
    metric.update(ids, masks)
    path = report.write(tmp_path_factory.mktemp("report"), "a <title>", metric.compute())
    return path.read_text("utf-8"), images, ids, masks


def test_the_page_holds_every_image_and_its_scores(page):
    text, images, ids, masks = page
    data = data_of(text)
    wrong = (ids != masks) & (masks != 0)
    for card in data["cards"]:
        i = int(card["name"][-1])
        accuracy = 1 - wrong[i].sum() / (masks[i] != 0).sum()
        assert card["accuracy"] == pytest.approx(accuracy)
        assert (decode(card["mask"], "P") == masks[i]).all()
        assert (decode(card["prediction"], "P") == ids[i]).all()
        assert ((decode(card["errors"], "RGBA")[..., 3] > 0) == wrong[i]).all()
        assert np.abs(decode(card["image"], "RGB") - images[i]).mean() < 3
    matrix = confusion_matrix(masks.ravel(), ids.ravel(), labels=[1, 2, 3])
    assert data["matrix"] == matrix.tolist()
    assert data["classes"][2]["iou"] is None, "there is no pixel of it"
    assert "http" not in text, "it needs nothing from elsewhere"


def test_without_masks_the_page_shows_each_classs_share_of_the_pixels(tmp_path):
    path = Report(CAMVID).write(tmp_path, "", pixels=np.arange(12))
    shares = [entry["share"] for entry in data_of(path.read_text("utf-8"))["classes"]]
    assert shares == pytest.approx(np.arange(1, 12) / 66)


# Writes the names of the checks that fail.
CHECKS = """<script>
const names = () => [...document.querySelectorAll(".card:not([hidden]) p")]
  .map(p => p.textContent.split(":")[0]).join();
const set = (id, value) => {
  $(id).value = value;
  $(id).dispatchEvent(new Event("change"));
  return names();
};
const press = (target, key) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const checks = { "no errors": failures.length === 0, title: document.title === "a <title>" };
const ranked = data.cards.toSorted((a, b) => a.miou - b.miou).map(card => card.name);
checks.worst = names() === ranked.join();
checks.best = set("order", "best") === ranked.toReversed().join();
checks.name = set("order", "name") === ranked.toSorted().join();
checks.filter = set("filter", "1") === "frame 3,frame 4" && $("count").textContent === "2 of 5";
bars[1].click();
checks.all = names().split(",").length === 5;
const { card, layer, slider } = cards[0];
press(document.body, "2");
checks.mask = layer.src === card.mask;
press(slider, "1");
checks.image = layer.hidden;
press($("order"), "3");
checks.prediction = !layer.hidden && layer.src === card.prediction;
slider.value = 30;
slider.oninput();
checks.slider = layer.style.clipPath === "inset(0px 70% 0px 0px)";
const [first, next] = document.querySelectorAll(".picture");
const wide = first.clientWidth;
const isLarge = picture => picture.clientWidth > 1.5 * wide;
first.focus();
press(first, "ArrowRight");
checks.focus = document.activeElement === next;
next.click();
checks.large = isLarge(next);
press(next, "ArrowLeft");
checks.moved = isLarge(first) && !isLarge(next);
press(first, "Escape");
checks.small = !isLarge(first) && first.ariaExpanded === "false";
checks.labels = first.ariaLabel.includes("frame") && slider.ariaLabel.includes("frame");
checks.hover = document.querySelector("td").title.includes("pixels");
const failed = Object.keys(checks).filter(name => !checks[name]);
document.body.replaceChildren(`FAILED:${failed}.`);
</script>"""
WATCH = "<script>const failures = []; onerror = message => { failures.push(message); };</script>"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_sorts_filters_and_compares(page, tmp_path):
    text = page[0].replace("<title>", WATCH + "<title>") + CHECKS
    (tmp_path / "page.html").write_text(text, "utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    command = (CHROMIUM, *flags, tmp_path / "page.html")
    assert b"FAILED:." in subprocess.run(command, capture_output=True).stdout
