"""Pictures: palette masks, overlays, panels, training curves, confusion matrices."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.classes import ClassSet
from runtime import atomic_path


def mask_image(ids: np.ndarray, classes: ClassSet) -> Image.Image:
    """(H, W) ids -> a palette image whose pixel values are the ids and whose palette is the classes' colours."""
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(classes.to_rgb(np.arange(256)).tobytes())
    return image


def overlay_image(photo: np.ndarray, ids: np.ndarray, classes: ClassSet, alpha: float = 0.5) -> Image.Image:
    """(H, W, 3) uint8 photograph and (H, W) ids -> the photograph under the classes' colours at opacity ``alpha``."""
    return Image.blend(Image.fromarray(photo), Image.fromarray(classes.to_rgb(ids)), alpha)


def draw_legend(image: Image.Image, classes: ClassSet) -> Image.Image:
    """The image with a box of the classes' colours and names in its lower left corner, as large as fits legibly."""
    names = [(classes.names[i], classes.colors[i]) for i in classes.scored]
    row = min(image.height // 24, (image.height - 4) // (len(names) + 1))
    font = ImageFont.load_default(max(1, round(0.8 * row)))
    width = round(2.5 * row + max(font.getlength(name) for name, _ in names))
    if row < 8 or width > image.width:
        return image
    box = Image.new("RGB", (width, round((len(names) + 0.5) * row)))
    draw = ImageDraw.Draw(box)
    for i, (name, color) in enumerate(names):
        top = round((i + 0.25) * row)
        draw.rectangle((row // 2, top + 1, 3 * row // 2, top + row - 2), fill=color)
        draw.text((2 * row, top + row // 2), name, "white", font, anchor="lm")
    corner = (row // 2, image.height - box.height - row // 2, row // 2 + width, image.height - row // 2)
    image.paste(Image.blend(image.crop(corner), box, 0.8), corner)
    return image


def panel_image(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: ClassSet) -> Image.Image:
    """Rows of (photograph (H, W, 3), label ids, predicted ids), side by side, in the first row's size."""
    height, width = rows[0][0].shape[:2]
    panel = Image.new("RGB", (3 * width, len(rows) * height))
    for i, (photo, label, prediction) in enumerate(rows):
        for j, picture in enumerate((photo, classes.to_rgb(label), classes.to_rgb(prediction))):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            panel.paste(tile, (j * width, i * height))
    return panel


def _figure(**kwargs):
    # The object interface needs no global state and no display; importing it here keeps the commands' start fast.
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **kwargs)


def save_curves(history: list[dict], path: Path) -> None:
    """Losses, mIoU and learning rate by epoch, as a PNG."""
    figure = _figure(figsize=(12, 3.5), dpi=100)
    for axes, title, keys in zip(figure.subplots(1, 3), ("loss", "val mIoU", "learning rate"),
                                 (("train_loss", "val_loss"), ("val_miou",), ("lr",))):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if key in row]  # not every epoch is validated
            axes.plot(*zip(*points), label=key, marker="." if len(points) < 20 else "")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def save_confusion_matrix(matrix: np.ndarray, names: tuple[str, ...], path: Path) -> None:
    """(C, C) counts by label and prediction -> a PNG of the shares of each label's pixels, in percent."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = 2.5 + 0.55 * len(names)
    figure = _figure(figsize=(size, size), dpi=100)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label", title="pixels of each label, %")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for i, j in zip(*np.nonzero(share >= 0.005)):
        axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if share[i, j] > 0.5 else "black")
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
