import os

import numpy as np
import pytest
from conftest import TURNED, save
from PIL import Image

from support.command import UserError
from support.images import limited_size, read_image, shrink

rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (6, 9), dtype=np.uint8)
RGB = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
THREE_GREY = np.repeat(GREY[..., None], 3, 2)
PALETTE = Image.fromarray(THREE_GREY).convert("P", palette=Image.Palette.ADAPTIVE)
SMOOTH = np.array(Image.fromarray(RGB).resize((48, 48)))  # JPEG changes it little


@pytest.mark.parametrize("name, image, options, expected", [
    ("rgba.png", Image.fromarray(np.dstack([RGB, GREY])), {}, RGB), ("palette.png", PALETTE, {}, THREE_GREY),
    ("palette alpha.png", PALETTE, {"transparency": bytes([0, 99, 255])}, THREE_GREY),
    ("grey alpha.png", Image.merge("LA", [Image.fromarray(GREY)] * 2), {}, THREE_GREY),
    ("1 bit.png", Image.fromarray(GREY > 99), {}, (THREE_GREY > 99) * np.uint8(255)),
    ("16 bits.png", Image.fromarray(GREY * np.uint16(257)), {}, THREE_GREY),
    ("16 bits.tif", Image.fromarray(GREY * np.uint16(257)), {}, THREE_GREY),
    ("16 bits.ppm", Image.fromarray(GREY * np.uint16(257)), {}, THREE_GREY),
    ("cmyk.jpg", Image.fromarray(SMOOTH).convert("CMYK"), {"quality": 98}, SMOOTH),
    ("turned.jpg", Image.fromarray(SMOOTH[:30]), {"exif": TURNED, "quality": 98}, np.rot90(SMOOTH[:30], -1)),
    *((f"turned {array.ndim}.{kind}", Image.fromarray(array), {"exif": TURNED}, np.rot90(expected, -1))
      for array, expected in ((GREY, THREE_GREY), (RGB, RGB)) for kind in ("png", "tif")),
], ids=lambda value: value if isinstance(value, str) else "")
def test_read_image(tmp_path, name, image, options, expected):
    image.save(tmp_path / name, **options)
    found = read_image(tmp_path / name)
    assert found.dtype == np.uint8 and found.shape == expected.shape and found.flags.writeable
    assert np.abs(found.astype(int) - expected).mean() < (4 if name.endswith(".jpg") else 1e-9)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # as support.images has it, outside tests
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("exif", [b"not what it should be", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"])
def test_an_image_with_broken_exif_is_read_unturned(tmp_path, name, exif):
    assert read_image(save(tmp_path / name, RGB, exif=exif)).shape == RGB.shape


def test_what_is_no_image_of_a_promised_format_is_refused_by_its_content(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", refuse)
    paths = {kind: tmp_path / f"{kind}.png" for kind in ("EPS", "GIF", "fifo", "large")}
    for kind in ("EPS", "GIF"):
        Image.fromarray(RGB).save(paths[kind], kind)
    os.mkfifo(paths["fifo"])
    paths["large"].write_bytes(b"P6 20000 10001 255\n")
    for kind, said in (("EPS", "PNG, JPEG"), ("GIF", "PNG, JPEG"), ("fifo", "not a regular file"),
                       ("large", "20000×10001, more than 200 megapixels")):
        with pytest.raises(UserError, match=rf"\A{paths[kind]}: .*{said}.*\Z"):
            read_image(paths[kind])


@pytest.mark.parametrize("size, max_side, expected", [
    ((360, 480), 240, (180, 240)), ((480, 360), 240, (240, 180)), ((720, 960), 481, (361, 481)),
    ((360, 480), 480, (360, 480)), ((360, 480), 0, (360, 480)), ((1, 1000), 10, (1, 10))])
def test_limited_size(size, max_side, expected):
    assert limited_size(size, max_side) == shrink(np.zeros((*size, 3), np.uint8), max_side).shape[:2] == expected


@pytest.mark.parametrize("turn", [lambda array: array, lambda array: array.swapaxes(0, 1)], ids=["wide", "tall"])
def test_shrink_smooths_images_and_takes_the_nearest_id(turn):
    """Each new pixel covers 3×3 old ones of the mask, and 4×4 of the image, half of them black and half light."""
    ids = rng.integers(0, 12, (15, 27), dtype=np.uint8)
    stripes = np.tile(np.repeat(np.uint8([0, 200]), 2), (20, 9))[..., None].repeat(3, 2)
    assert (shrink(turn(ids), 9) == turn(ids[1::3, 1::3])).all()
    image = shrink(turn(stripes), 9)
    assert image.shape == turn(np.zeros((5, 9, 3))).shape and np.abs(image.astype(int) - 100).max() < 30
