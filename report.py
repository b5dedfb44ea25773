"""A self-contained HTML page of a split's pictures: photograph, label, prediction and errors, sorted and filtered."""
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.classes import ClassSet
from metric import SegmentationMetric, format_score
from runtime import atomic_path
from visualize import mask_image

TEMPLATE = Path(__file__).with_name("report.html")
SIDE = 480  # pixels of the longer side of a picture: 233 CamVid frames stay below 15 MB


class Report:
    """Gathers pictures as they are predicted, then writes index.html, which needs nothing but a browser."""

    def __init__(self, classes: ClassSet):
        self.classes, self.void_id = classes, classes.void_id
        self.cards: list[dict] = []

    def add(self, name: str, photo: np.ndarray, ids: np.ndarray, label: np.ndarray | None = None) -> None:
        """photo: (H, W, 3) uint8 RGB; ids, label: (H', W') class ids."""
        size = _fit(*ids.shape[::-1])
        shown = ids if label is None else np.where(label == self.void_id, ids, label)
        card = {"name": name, "present": [k for k, i in enumerate(self.classes.scored) if (shown == i).any()],
                "photo": _jpeg(photo, size), "prediction": self._mask(ids, size)}
        if label is not None:
            metric = SegmentationMetric(len(self.classes), self.void_id)
            metric.update(ids, label)
            scores = metric.compute()
            card |= {"label": self._mask(label, size), "errors": _red((ids != label) & (label != self.void_id), size),
                     "miou": _plain(scores["miou"]), "accuracy": _plain(scores["pixel_accuracy"]),
                     "iou": [_plain(scores["iou"][i]) for i in self.classes.scored]}
        self.cards.append(card)

    def write(self, folder: Path, title: str, metric: SegmentationMetric | None = None,
              pixels: np.ndarray | None = None) -> Path:
        """Write folder/index.html, with the scores of ``metric`` where there are labels, else the shares of the (C,)
        predicted ``pixels``. Raises RunError.
        """
        scored = self.classes.scored
        data = {"title": title, "headline": f"{len(self.cards)} photographs", "cards": self.cards,
                "classes": [{"name": self.classes.names[i], "color": self.classes.colors[i]} for i in scored]}
        if pixels is not None:
            for entry, i in zip(data["classes"], scored):
                entry["share"] = pixels[i] / max(1, pixels.sum())
        if metric is not None:
            scores = metric.compute()
            for entry, i in zip(data["classes"], scored):
                entry["iou"] = _plain(scores["iou"][i])
            data["matrix"] = metric.confusion_matrix()[scored][:, scored].tolist()
            data["headline"] += (f", mIoU {format_score(scores['miou'])}, pixel accuracy "
                                 f"{format_score(scores['pixel_accuracy'])}, frequency-weighted IoU "
                                 f"{format_score(scores['fwiou'])}")
        # A class or file may be called "</script>".
        text = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
        page = TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1)
        with atomic_path(folder / "index.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
        return folder / "index.html"

    def _mask(self, ids: np.ndarray, size: tuple[int, int]) -> str:
        return _png(mask_image(ids, self.classes).resize(size, Image.Resampling.NEAREST))


def _fit(width: int, height: int) -> tuple[int, int]:
    factor = min(1.0, SIDE / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _jpeg(photo: np.ndarray, size: tuple[int, int]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(photo).resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=70)
    return _url("jpeg", buffer)


def _png(image: Image.Image, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return _url("png", buffer)


def _red(errors: np.ndarray, size: tuple[int, int]) -> str:
    """A picture that is red where ``errors`` is true and transparent elsewhere."""
    image = Image.fromarray(errors.astype(np.uint8))
    image.putpalette([0, 0, 0, 230, 0, 0])
    return _png(image.resize(size, Image.Resampling.NEAREST), transparency=0, bits=1)
