"""Pictures: masks, overlays, panels, training curves."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.classes import ClassSet
from support.files import write_file

COLUMN = 20  # class names in a column beside the curves
TITLES = ("image", "mask", "prediction")  # of the columns of a panel
SMALLEST_ROW = 12  # pixels of a row of a legend
STRIP = 256  # rows of an overlay that are blended at a time, to save memory


def mask_image(ids: np.ndarray, classes: ClassSet, kind: str = "palette") -> Image.Image:
    """(H, W) class ids -> a palette image: its values are the ids, its palette their colours.

    ids: of the classes, or their ``ignore_index``.
    kind: ``ids`` leaves the palette out, ``color`` gives RGB.
    """
    if kind == "color":
        return Image.fromarray(classes.to_rgb(ids))
    image = Image.fromarray(ids.astype(np.uint8))
    if kind == "ids":
        return image
    colors = max(len(classes), classes.ignore_index + 1)  # few colours save with 4 bits a pixel
    image.putpalette(classes.to_rgb(np.arange(colors)).tobytes())
    return image


def overlay_image(
    image: np.ndarray, ids: np.ndarray, classes: ClassSet, alpha: float = 0.5
) -> Image.Image:
    """(H, W, 3) uint8 image, (H, W) class ids -> the image under colours of opacity ``alpha``."""
    overlay = Image.new("RGB", image.shape[1::-1])
    for top in range(0, len(image), STRIP):
        rows = slice(top, top + STRIP)
        colors = Image.fromarray(classes.to_rgb(ids[rows]))
        overlay.paste(Image.blend(Image.fromarray(image[rows]), colors, alpha), (0, top))
    return overlay


def load_font(size: float) -> ImageFont.FreeTypeFont:
    """Matplotlib's font, which has more letters than Pillow's. size: in pixels."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(path, size)


def legend_image(classes: ClassSet, shown: Sequence[int], row: int, height: int) -> Image.Image:
    """The colours and names of the ``shown`` classes, in columns of at most ``height`` pixels.

    row: pixels of a line.
    """
    font = load_font(0.7 * row)
    names = max((font.getlength(classes.names[i]) for i in shown), default=0)
    width = round(2.5 * row + names)
    lines = min(len(shown), max(1, (height - row // 2) // row))
    columns = -(-len(shown) // lines) if shown else 0
    box = Image.new("RGB", (columns * width, lines * row + row // 2))
    draw = ImageDraw.Draw(box)
    for k, i in enumerate(shown):
        column, line = divmod(k, lines)
        left = column * width + row // 2
        top = line * row + row // 4
        swatch = (left, top + 1, left + row, top + row - 2)
        draw.rectangle(swatch, fill=classes.colors[i], outline="white")
        place = (left + 3 * row // 2, top + row // 2)
        draw.text(place, classes.names[i], "white", font, anchor="lm")
    return box


def beside(image: Image.Image, strip: Image.Image) -> Image.Image:
    """Both, the strip to the right."""
    both = Image.new("RGB", (image.width + strip.width, max(image.height, strip.height)))
    both.paste(image, (0, 0))
    both.paste(strip, (image.width, 0))
    return both


def draw_legend(image: Image.Image, classes: ClassSet, shown: Sequence[int]) -> Image.Image:
    """The image with a legend of the ``shown`` classes in its lower left corner, or to its right if
    it does not fit there.
    """
    row = max(SMALLEST_ROW, image.height // max(24, len(shown) + 2))
    legend = legend_image(classes, shown, row, image.height)
    is_small = image.height < 16 * SMALLEST_ROW  # and would be covered by it
    if is_small or legend.height + row > image.height or legend.width + row > image.width:
        return beside(image, legend)
    image.paste(legend, (row // 2, image.height - legend.height - row // 2))
    return image


def panel_image(
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: ClassSet
) -> Image.Image:
    """Rows of (image (H, W, 3) uint8, mask and prediction class ids), side by side under titles,
    and a legend.

    All are shown at the size of the first image.
    """
    height, width = rows[0][0].shape[:2]
    row = max(SMALLEST_ROW, height // 24)
    shown: set[int] = set()
    panel = Image.new("RGB", (3 * width, row + len(rows) * height))
    draw = ImageDraw.Draw(panel)
    font = load_font(0.7 * row)
    for j, title in enumerate(TITLES):
        draw.text((j * width + width // 2, row // 2), title, "white", font, anchor="mm")
    for i, (image, mask, prediction) in enumerate(rows):
        for j, picture in enumerate((image, classes.to_rgb(mask), classes.to_rgb(prediction))):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            panel.paste(tile, (j * width, row + i * height))
        shown.update(np.unique(mask), np.unique(prediction))
    legend = legend_image(classes, sorted(shown & {*classes.scored}), row, panel.height)
    return beside(panel, legend)


def save_curves(history: list[dict], path: Path, classes: ClassSet) -> None:
    """Losses, mIoU, IoU per class in the class's colour, and learning rate by epoch, as a PNG."""
    # Imported here, to keep the start of the commands fast. A Figure needs no display.
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    keys = ("train_loss", "val_loss", "val_miou", "lr")
    figure = Figure(layout="constrained", figsize=(19, 3.5))
    *panels, last = figure.subplots(1, len(keys) + 1)

    def draw(axes, key: str, color="tab:blue"):
        rows = [row for row in history if key in row]  # not every epoch is validated
        epochs = [row["epoch"] for row in rows]
        values = [row[key] for row in rows]
        return axes.plot(epochs, values, ".-", markersize=3, color=color)[0]

    for axes, key in zip(panels, keys):
        draw(axes, key)
        axes.set_title(key)
    names = [classes.names[i] for i in classes.scored]
    colors = [np.divide(classes.colors[i], 255) for i in classes.scored]
    lines = [draw(last, f"iou/{name}", color) for name, color in zip(names, colors)]
    for line in lines:
        line.set_path_effects([withStroke(linewidth=2.5, foreground="gray")])  # shows white too
    last.set_title("IoU of each class")
    columns = -(-len(names) // COLUMN)
    if columns <= 2:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": columns}
        last.legend(lines, names, fontsize="small", **place)
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
    with warnings.catch_warnings(action="ignore"):  # of letters that the font does not have
        write_file(path, figure.savefig)
