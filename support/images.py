"""The one way to open an image file, and the one size rule."""

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from support.command import UserError

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".gif",
)
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")  # whatever the file's name
ORIENTATION = 0x112  # the EXIF tag that says how the camera was turned
SAMPLES_PER_PIXEL = 277  # the TIFF tag with the number of bands
FULL_RANGE = (0, 65535)  # of 16-bit values


def open_image(path: str | Path) -> Image.Image:
    """The decoded first frame of an image file, upright by its EXIF tag.

    ``info`` also records ``orientation``, the EXIF tag (1: upright, from 5: turned by 90°);
    ``deep``, whether it has 16 bits a channel; ``bands``, the number of its channels; ``pages`` of
    a TIFF.
    Raises UserError if it cannot be read.
    """
    try:
        # Through a file object: Pillow maps some TIFFs into memory, and then rotates them wrongly.
        with open(path, "rb") as file, _identify(file) as image:
            # Pillow's decoder is called such as RGB;16B, where its image has 8 bits.
            image.info["deep"] = ";16" in f"{image.mode} {image.tile}"  # type: ignore[attr-defined]
            tags = getattr(image, "tag_v2", {})
            image.info["bands"] = tags.get(SAMPLES_PER_PIXEL, len(image.getbands()))
            image.info["pages"] = image.n_frames if tags else 1  # type: ignore[attr-defined]
            image.load()
            image.info["orientation"] = 1
            with contextlib.suppress(Exception):  # broken EXIF data does not rotate an image
                image.info["orientation"] = image.getexif().get(ORIENTATION, 1)
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def _identify(file) -> Image.Image:
    """Image.open, which here reads the first three bands of TIFFs with up to six."""
    try:
        return Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        header = file.read(8)
        if header[:4] not in TiffImagePlugin.PREFIXES:
            raise
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        bits = tags[TiffImagePlugin.BITSPERSAMPLE]
        if len(bits) not in (4, 5, 6) or set(bits) != {8}:
            raise ValueError(
                f"a TIFF of {len(bits)} bands with {bits[0]} bits; save red, green and blue as PNG"
            ) from None
        layout = (tags.prefix, 1, (1,), 1, bits, tags.get(TiffImagePlugin.EXTRASAMPLES, ()))
        TiffImagePlugin.OPEN_INFO[layout] = ("RGB", "RGB" + "X" * (len(bits) - 3))
        return Image.open(file, formats=("TIFF",))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any 8-bit image as RGB, without its transparency."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of what the direct conversion loses
    return image.convert("RGB")


def read_image(path: str | Path, value_range: tuple[int, int] = FULL_RANGE) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, upright by its EXIF tag.

    Grey, palette, RGBA, CMYK and 16-bit files are converted. Raises UserError if it cannot be read.
    value_range: of 16-bit values, which becomes 0 … 255.
    """
    return to_array(open_image(path), path, value_range)


def to_array(image: Image.Image, path: str | Path, value_range: tuple[int, int]) -> np.ndarray:
    """`read_image` of a file that has been opened."""
    if image.info["deep"]:
        low, high = value_range
        scaled = (deep_values(image, path).astype(np.float32) - low) * (255 / (high - low))
        return scaled.clip(0, 255).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise UserError(f"{path}: has 32 bits a channel, of unknown range; save it with 8 or 16")
    return np.array(to_rgb(image))


def deep_values(image: Image.Image, path: str | Path) -> np.ndarray:
    """(H, W, 3) uint16 RGB of a 16-bit file, which has been opened."""
    if image.mode.startswith("I"):
        return np.repeat(np.asarray(image, np.uint16)[..., None], 3, axis=2)
    import cv2  # Pillow keeps 8 bits of several channels

    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR  # which turns it upright
    values = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    if values is None or values.dtype != np.uint16:
        raise UserError(f"{path}: 16 bits a channel cannot be read; save it with 8")
    return np.ascontiguousarray(values[..., ::-1])  # OpenCV has BGR


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
