"""Pictures: masks, overlays, panels, training curves."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.classes import ClassSet
from support.files import write_file


def mask_image(ids: np.ndarray, classes: ClassSet) -> Image.Image:
    """(H, W) class ids -> a palette image whose pixel values are the ids and whose palette is the classes' colours."""
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(classes.to_rgb(np.arange(256)).tobytes())
    return image


def overlay_image(image: np.ndarray, ids: np.ndarray, classes: ClassSet, alpha: float = 0.5) -> Image.Image:
    """(H, W, 3) uint8 image and (H, W) class ids -> the image under the classes' colours at opacity ``alpha``."""
    overlay = Image.new("RGB", image.shape[1::-1])
    step = max(1, 8_000_000 // image.shape[1])
    for top in range(0, len(image), step):  # rows at a time: a large photograph is in memory once
        rows = slice(top, top + step)
        colors = classes.to_rgb(ids[rows])
        overlay.paste(Image.blend(Image.fromarray(image[rows]), Image.fromarray(colors), alpha), (0, top))
    return overlay


def draw_legend(image: Image.Image, classes: ClassSet, shown: Sequence[int]) -> Image.Image:
    """The image with a box of the ``shown`` classes' colours and names in its lower left corner, if it fits legibly."""
    import matplotlib  # whose font knows more letters than Pillow's

    names = [(classes.names[i], classes.colors[i]) for i in shown]
    row = min(image.height // 24, (image.height - 4) // (len(names) + 1))
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), max(1, round(0.7 * row)))
    width = round(2.5 * row + max(font.getlength(name) for name, _ in names))
    if row < 8 or width > image.width:
        return image
    box = Image.new("RGB", (width, round((len(names) + 0.5) * row)))
    draw = ImageDraw.Draw(box)
    for i, (name, color) in enumerate(names):
        top = round((i + 0.25) * row)
        draw.rectangle((row // 2, top + 1, 3 * row // 2, top + row - 2), fill=color)
        draw.text((2 * row, top + row // 2), name, "white", font, anchor="lm")
    image.paste(box, (row // 2, image.height - box.height - row // 2))
    return image


def panel_image(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: ClassSet) -> Image.Image:
    """Rows of (image (H, W, 3) uint8, mask and prediction class ids), side by side, in the first image's size, below a
    line that says so.
    """
    height, width = rows[0][0].shape[:2]
    head = 2 * max(8, min(width // 12, height // 24))
    panel = Image.new("RGB", (3 * width, head + len(rows) * height))
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(0.7 * head)
    for j, title in enumerate(("image", "mask", "prediction")):
        draw.text((j * width + width // 2, head // 2), title, "white", font, anchor="mm")
    for i, (image, mask, prediction) in enumerate(rows):
        for j, picture in enumerate((image, classes.to_rgb(mask), classes.to_rgb(prediction))):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            panel.paste(tile, (j * width, head + i * height))
    return panel


def save_curves(history: list[dict], path: Path) -> None:
    """Losses, mIoU and learning rate by epoch, as a PNG. The losses have scales of their own: they differ in kind."""
    # Needs no display and no global state, and imported here keeps the commands' start fast.
    from matplotlib.figure import Figure

    curves = {"train_loss": "training loss", "val_loss": "val cross-entropy", "val_miou": "val mIoU",
              "lr": "learning rate"}
    figure = Figure(layout="constrained", figsize=(14, 3.5), dpi=100)
    for axes, (key, title) in zip(figure.subplots(1, 4), curves.items()):
        points = [(row["epoch"], row[key]) for row in history if key in row]  # not every epoch is validated
        axes.plot(*zip(*points), marker="." if len(points) < 20 else "")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    write_file(path, figure.savefig)
