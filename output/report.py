"""A self-contained HTML page of images: image, mask, prediction and errors, sorted and filtered."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.classes import ClassSet
from metric import SegmentationMetric, format_score
from output.visualize import mask_image
from support.files import make_folder, write_file
from support.images import limited_size

TEMPLATE = Path(__file__).with_name("report.html")
SIDE = 440  # pixels of the longer side: a thousand CamVid frames with masks stay below 40 MB


class Report:
    """Collects pictures as they are predicted, then writes index.html."""

    def __init__(self, classes: ClassSet):
        self.classes = classes
        self.cards: list[dict] = []

    def add(
        self,
        name: str,
        image: np.ndarray,
        ids: np.ndarray,
        mask: np.ndarray | None = None,
        confidence: float | None = None,
    ) -> None:
        """image: (H, W, 3) uint8 RGB. ids, the prediction, and mask: (H', W') class ids.

        confidence: the mean probability of the predicted classes.
        """
        size = limited_size(ids.shape, SIDE)[::-1]
        shown = ids if mask is None else mask
        scored = self.classes.scored
        card: dict = {
            "name": name,
            "present": [k for k, i in enumerate(scored) if (shown == i).any()],
            "image": _data_url(Image.fromarray(image), size, "webp", quality=60),
            "prediction": _data_url(mask_image(ids, self.classes), size),
            "confidence": confidence,
        }
        if mask is not None:
            ignore_index = self.classes.ignore_index
            metric = SegmentationMetric(len(self.classes), ignore_index)
            metric.update(ids, mask)
            scores = metric.compute()
            wrong = (ids != mask) & (mask != ignore_index)
            errors = Image.fromarray(wrong.astype(np.uint8))
            errors.putpalette([0, 0, 0, 230, 0, 0])  # red
            card["mask"] = _data_url(mask_image(mask, self.classes), size)
            card["errors"] = _data_url(errors, size, transparency=0)
            card["miou"] = plain(scores["miou"])
            card["accuracy"] = plain(scores["pixel_accuracy"])
            card["iou"] = [plain(scores["iou"][i]) for i in scored]
        self.cards.append(card)

    def write(
        self, folder: Path, title: str, scores: dict | None = None, pixels: np.ndarray | None = None
    ) -> Path:
        """Create the folder and write index.html there. Raises UserError if that fails.

        scores: of `validate`; without masks, pixels: (C,) predicted pixels of each class.
        """
        scored = self.classes.scored
        headline = f"images: {len(self.cards)}"
        data: dict = {"title": title, "cards": self.cards}
        if scores:
            column = "iou"
            values = scores["iou"]
            data["matrix"] = scores["confusion_matrix"][scored][:, scored].tolist()
            for key in ("miou", "pixel_accuracy", "fwiou"):
                headline += f", {key} {format_score(scores[key])}"
        else:
            column = "share"
            values = pixels / max(1, pixels.sum())  # type: ignore[union-attr]
        data["headline"] = headline
        data["classes"] = [
            {
                "name": self.classes.names[i],
                "color": self.classes.colors[i],
                column: plain(values[i]),
            }
            for i in scored
        ]
        # A class or a file may be called "</script>".
        text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
        page = TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1)
        path = make_folder(folder) / "index.html"
        write_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
        return path


def plain(value: float) -> float | None:
    """A score for JSON: None if it is undefined."""
    return None if np.isnan(value) else float(value)


def _data_url(image: Image.Image, size: tuple[int, int], kind: str = "png", **options) -> str:
    """The image at that (width, height) as text for a page; a PNG keeps its palette's indices."""
    buffer = io.BytesIO()
    resampling = Image.Resampling.NEAREST if kind == "png" else Image.Resampling.BILINEAR
    image.resize(size, resampling).save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
