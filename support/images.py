"""The one way to open an image file, and the one rule of size."""
import contextlib
import os
import stat
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.command import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")  # by content, whatever the name
MAX_PIXELS = 200_000_000  # a gigabyte, decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which warns at 89 and raises at 179 megapixels
warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata


def open_image(path: str | Path) -> Image.Image:
    """The decoded first frame of an image file, upright by its EXIF tag. Raises UserError if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO or a device would never end
            raise ValueError("not a regular file")
        # Through a file object: Pillow maps some TIFFs into memory, and then turns them wrongly. And of these formats
        # alone: by its content it would give a file to Ghostscript, whatever its name.
        with open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height}, more than {MAX_PIXELS / 1e6:.0f} megapixels")
            image.load()
            with contextlib.suppress(ArithmeticError, LookupError, SyntaxError, TypeError, ValueError, struct.error):
                ImageOps.exif_transpose(image, in_place=True)  # broken EXIF does not say that the image is turned
            return image
    except UnidentifiedImageError:
        raise UserError(f"{path}: is no image, or of a format other than {', '.join(IMAGE_FORMATS)}") from None
    except Exception as error:  # broken files raise nearly anything in Pillow's decoders
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any 8-bit image as RGB, without its transparency."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of what the direct way loses
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, upright by its EXIF tag.

    Grey, palette, RGBA, CMYK and 16-bit files are converted. Raises UserError if it cannot be read.
    """
    image = open_image(path)
    # Of 16 bits, which convert("RGB") would clip, not scale.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(f"{path}: has 32 bits a pixel, whose range is unknown; save it with 8 or 16")
    image = to_rgb(image)
    array = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, 500):  # Pillow's own way holds two more copies
        array[top:top + 500] = np.asarray(image.crop((0, top, image.width, min(top + 500, image.height))))
    return array


def limited_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(H, W) shrunk to a longer side of ``max_side`` pixels, keeping its shape; 0 or a smaller image: as it is."""
    longer = max(size)
    if not 0 < max_side < longer:
        return size
    # Rounded in whole numbers, as export.py does it inside an ONNX file.
    height, width = (max(1, (2 * side * max_side + longer) // (2 * longer)) for side in size)
    return height, width


def shrink(image: np.ndarray, max_side: int) -> np.ndarray:
    """(H, W, 3) uint8 image -> (*limited_size, 3), smoothed; (H, W) uint8 class ids -> the nearest pixels' ids."""
    size = limited_size(image.shape[:2], max_side)
    if size == image.shape[:2]:
        return image
    kind = Image.Resampling.BILINEAR if image.ndim == 3 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(image).resize(size[::-1], kind))
