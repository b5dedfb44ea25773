"""The one way to open an image file, and the one size rule."""

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.command import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")  # by content, whatever the name


def open_image(path: str | Path) -> Image.Image:
    """The decoded first frame of an image file, upright by its EXIF tag.

    Raises UserError if it cannot be read.
    """
    try:
        # Through a file object: Pillow maps some TIFFs into memory, and then rotates them wrongly.
        with open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF data does not rotate an image
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any 8-bit image as RGB, without its transparency."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of what the direct conversion loses
    return image.convert("RGB")


def read_image(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, upright by its EXIF tag.

    Grey, palette, RGBA, CMYK and 16-bit files are converted. Raises UserError if it cannot be read.
    """
    image = open_image(path)
    if image.mode.startswith("I;16"):
        # convert("RGB") would clip 16 bits, not scale them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(f"{path}: has 32 bits a channel, of unknown range; save it with 8 or 16")
    return np.array(to_rgb(image))


def limited_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(H, W) shrunk to a longer side of ``max_side`` pixels, keeping the aspect ratio.

    A smaller size, or any size for max_side 0, is returned as it is.
    """
    longer = max(size)
    if not 0 < max_side < longer:
        return size
    # Rounded in integers, as export.py does it inside an ONNX file.
    height, width = (max(1, (2 * side * max_side + longer) // (2 * longer)) for side in size)
    return height, width


def shrink(image: np.ndarray, max_side: int) -> np.ndarray:
    """Apply the size rule: (H, W, 3) uint8 images bilinearly, (H, W) class ids by nearest pixel."""
    size = limited_size(image.shape[:2], max_side)
    if size == image.shape[:2]:
        return image
    kind = Image.Resampling.BILINEAR if image.ndim == 3 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(image).resize(size[::-1], kind))
