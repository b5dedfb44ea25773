"""A self-contained HTML page of a split's images: image, mask, prediction and errors, sorted and filtered."""
import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.classes import ClassSet
from metric import SegmentationMetric, format_score
from output.visualize import mask_image
from support.files import write_file
from support.images import limited_size

TEMPLATE = Path(__file__).with_name("report.html")
SIDE = 440  # pixels of the longer side of an image: a thousand CamVid frames with masks stay below 40 MB


class Report:
    """Gathers pictures as they are predicted, then writes index.html, which needs nothing but a browser."""

    def __init__(self, classes: ClassSet):
        self.classes, self.void_id = classes, classes.void_id
        self.bits = 4 if len(classes) <= 16 and classes.ignore_index is not None else 8  # of a mask's pixel
        self.cards: list[dict] = []

    def add(self, name: str, image: np.ndarray, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """image: (H, W, 3) uint8 RGB. ids, the prediction, and mask: (H', W') class ids."""
        size = limited_size(ids.shape, SIDE)[::-1]
        shown = ids if mask is None else mask
        card: dict[str, Any] = {
            "name": name, "present": [k for k, i in enumerate(self.classes.scored) if (shown == i).any()],
            "image": _data_url(Image.fromarray(image), size, "webp", quality=60),
            "prediction": _data_url(mask_image(ids, self.classes), size, bits=self.bits)}
        if mask is not None:
            metric = SegmentationMetric(len(self.classes), self.void_id)
            metric.update(ids, mask)
            scores = metric.compute()
            errors = Image.fromarray(((ids != mask) & (mask != self.void_id)).astype(np.uint8))
            errors.putpalette([0, 0, 0, 230, 0, 0])  # red
            card |= {"mask": _data_url(mask_image(mask, self.classes), size, bits=self.bits),
                     "errors": _data_url(errors, size, transparency=0, bits=1),
                     "miou": plain(scores["miou"]), "accuracy": plain(scores["pixel_accuracy"]),
                     "iou": [plain(scores["iou"][i]) for i in self.classes.scored]}
        self.cards.append(card)

    def write(self, folder: Path, title: str, metric: SegmentationMetric | None = None, pixels: Any = None) -> Path:
        """Write folder/index.html, with the scores of ``metric``, or without masks the shares of the predicted
        ``pixels``, a (C,) array. Raises RunError.
        """
        scored, count = self.classes.scored, len(self.cards)
        data: dict[str, Any] = {"title": title, "headline": f"{count} image{'s' * (count != 1)}", "cards": self.cards}
        if metric is None:
            column, values = "share", pixels / max(1, pixels.sum())
        else:
            scores = metric.compute()
            column, values = "iou", scores["iou"]
            data["matrix"] = metric.confusion_matrix()[scored][:, scored].tolist()
            miou, accuracy, fwiou = (format_score(scores[key]) for key in ("miou", "pixel_accuracy", "fwiou"))
            data["headline"] += f", mIoU {miou}, pixel accuracy {accuracy}, frequency-weighted IoU {fwiou}"
        data["classes"] = [{"name": self.classes.names[i], "color": self.classes.colors[i], column: plain(values[i])}
                           for i in scored]
        # A class or file may be called "</script>".
        text = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
        page = TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1)
        write_file(folder / "index.html", lambda path: path.write_text(page, encoding="utf-8"))
        return folder / "index.html"


def plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _data_url(image: Image.Image, size: tuple[int, int], kind: str = "png", **options) -> str:
    """The image at that (width, height) as text for a page; a PNG keeps its palette's indices, of ``bits`` each."""
    buffer = io.BytesIO()
    resampling = Image.Resampling.NEAREST if kind == "png" else Image.Resampling.BILINEAR
    image.resize(size, resampling).save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
