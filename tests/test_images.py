"""Reading image files of every common kind, and the one size rule."""

import struct

import cv2
import numpy as np
import pytest
from conftest import TURNED, save
from PIL import Image

from support.command import UserError
from support.images import limited_size, open_image, read_image, shrink

rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (6, 9), dtype=np.uint8)
RGB = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
THREE_GREY = np.repeat(GREY[..., None], 3, 2)
PALETTE = Image.fromarray(THREE_GREY).convert("P", palette=Image.Palette.ADAPTIVE)
SMOOTH = np.array(Image.fromarray(RGB).resize((96, 60)))  # JPEG changes it little

# A file's name, what is saved to it, the options of saving it, the expected pixels.
FILES = [
    ("rgba.png", np.dstack([RGB, GREY]), {}, RGB),
    ("palette.png", PALETTE, {}, THREE_GREY),
    ("palette alpha.png", PALETTE, {"transparency": bytes([0, 99, 255])}, THREE_GREY),
    ("1 bit.png", GREY > 99, {}, (THREE_GREY > 99) * np.uint8(255)),
    ("16 bits.png", GREY * np.uint16(257), {}, THREE_GREY),
    ("cmyk.jpg", Image.fromarray(SMOOTH).convert("CMYK"), {"quality": 98}, SMOOTH),
    ("turned.jpg", SMOOTH, {"exif": TURNED, "quality": 98}, np.rot90(SMOOTH, -1)),
    ("turned.png", RGB, {"exif": TURNED}, np.rot90(RGB, -1)),
    ("turned.tif", RGB, {"exif": TURNED}, np.rot90(RGB, -1)),
    ("mask.gif", Image.fromarray(GREY), {}, THREE_GREY),
    ("broken exif.png", RGB, {"exif": b"not what it should be"}, RGB),
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name, content, options, expected", FILES, ids=[row[0] for row in FILES])
def test_any_image_is_read_as_upright_rgb(tmp_path, name, content, options, expected):
    image = Image.fromarray(content) if isinstance(content, np.ndarray) else content
    image.save(tmp_path / name, **options)
    found = read_image(tmp_path / name)
    assert found.dtype == np.uint8 and found.shape == expected.shape and found.flags.writeable
    assert np.abs(found.astype(int) - expected).mean() <= (4 if name.endswith(".jpg") else 0)


def test_other_formats_are_refused_by_their_content(tmp_path):
    """Pillow would start Ghostscript for an EPS file."""
    with pytest.raises(UserError, match="image.png"):
        read_image(save(tmp_path / "image.png", RGB, format="EPS"))


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "rgb.png", "rgb.tif"])
def test_16_bit_images_are_scaled_from_their_range(tmp_path, name):
    """Such as that of a camera with 12 bits."""
    values = rng.integers(0, 4096, (6, 9, 3), dtype=np.uint16)
    expected = ((values.astype(int) - 1000) * 255 // 3000).clip(0, 255)
    if name.startswith("grey"):
        values, expected = values[..., 0], np.repeat(expected[..., :1], 3, 2)
        Image.fromarray(values).save(tmp_path / name)
    else:
        cv2.imwrite(str(tmp_path / name), values[..., ::-1])
    found = read_image(tmp_path / name, (1000, 4000)).astype(int)
    assert np.abs(found - expected).max() <= 1


def tiff(array: np.ndarray) -> bytes:
    """An uncompressed TIFF of (H, W, B) uint8, as rasterio writes several bands."""
    height, width, bands = array.shape
    bits = 8 + 2 + 12 * 11 + 4  # where the bits of each band begin, then the kinds of extra bands
    extra = bits + 2 * bands
    start = extra + 2 * bands
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: start, 277: bands}
    tags |= {278: height, 279: array.size, 284: 1, 338: extra}
    counts = {258: bands, 338: bands - 1}
    entries = (struct.pack("<HHII", tag, 3, counts.get(tag, 1), tags[tag]) for tag in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)
    return header + struct.pack(f"<{bands}H", *[8] * bands) + bytes(2 * bands) + array.tobytes()


@pytest.mark.parametrize("bands", [4, 5, 6, 8])
def test_of_a_tiff_with_many_bands_three_are_read(tmp_path, bands):
    array = rng.integers(0, 256, (6, 9, bands), dtype=np.uint8)
    path = tmp_path / "drone.tif"
    path.write_bytes(tiff(array))
    if bands > 6:
        with pytest.raises(UserError, match="8 bands"):
            read_image(path)
        return
    np.testing.assert_array_equal(read_image(path), array[..., :3])
    assert open_image(path).info["bands"] == bands


@pytest.mark.parametrize(
    "size, max_side, expected",
    [
        ((360, 480), 240, (180, 240)),
        ((720, 960), 481, (361, 481)),
        ((360, 480), 0, (360, 480)),
        ((1, 999), 10, (1, 10)),
    ],
)
def test_the_longer_side_is_at_most_max_side(size, max_side, expected):
    assert limited_size(size, max_side) == expected
    assert shrink(np.zeros((*size, 3), np.uint8), max_side).shape == (*expected, 3)


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)], ids=["wide", "tall"])
def test_shrinking_smooths_images_and_takes_the_nearest_id(axes):
    """A new pixel covers 3×3 ids, or 4×4 pixels of the image, half of them black and half light."""
    ids = rng.integers(0, 12, (15, 27), dtype=np.uint8).transpose(axes)
    np.testing.assert_array_equal(shrink(ids, 9), ids[1::3, 1::3])
    stripes = np.tile(np.repeat(np.uint8([0, 200]), 2), (20, 9)).transpose(axes)
    image = shrink(np.dstack([stripes] * 3), 9)
    assert image.shape[:2] == np.zeros((5, 9)).transpose(axes).shape
    assert np.abs(image.astype(int) - 100).max() < 30
