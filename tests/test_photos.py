import contextlib

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets.camvid import read_photo
from runtime import UserError

rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (6, 9), dtype=np.uint8)
RGB = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
THREE_GREY = np.repeat(GREY[..., None], 3, 2)
TURNED = Image.Exif()
TURNED[0x112] = 6  # the camera was turned: the upright picture is the stored one turned clockwise
WHOLE = cv2.imencode(".png", RGB)[1].tobytes()
SMOOTH = np.array(Image.fromarray(RGB).resize((48, 48)))  # what JPEG keeps nearly as it is


@pytest.mark.parametrize("name, image, options, expected", [
    ("rgb.png", Image.fromarray(RGB), {}, RGB),
    ("grey.png", Image.fromarray(GREY), {}, THREE_GREY),
    ("grey alpha.png", Image.merge("LA", [Image.fromarray(GREY)] * 2), {}, THREE_GREY),
    ("rgba.png", Image.fromarray(np.dstack([RGB, GREY])), {}, RGB),
    ("palette.png", Image.fromarray(THREE_GREY).convert("P", palette=Image.Palette.ADAPTIVE), {}, THREE_GREY),
    ("palette alpha.png", Image.fromarray(THREE_GREY).convert("P", palette=Image.Palette.ADAPTIVE),
     {"transparency": bytes([0, 99, 255])}, THREE_GREY),
    ("1 bit.png", Image.fromarray(GREY > 99), {}, (THREE_GREY > 99) * np.uint8(255)),
    ("16 bits.png", Image.fromarray(GREY * np.uint16(257)), {}, THREE_GREY),
    ("16 bits.tif", Image.fromarray(GREY * np.uint16(257)), {}, THREE_GREY),
    ("cmyk.tif", Image.fromarray(RGB).convert("CMYK"), {}, RGB),
    ("cmyk.jpg", Image.fromarray(SMOOTH).convert("CMYK"), {"quality": 98}, SMOOTH),
    ("turned.jpg", Image.fromarray(SMOOTH[:30]), {"exif": TURNED, "quality": 98}, np.rot90(SMOOTH[:30], -1)),
    ("turned.png", Image.fromarray(GREY), {"exif": TURNED}, np.rot90(THREE_GREY, -1)),
    ("turned.tif", Image.fromarray(RGB), {"exif": TURNED}, np.rot90(RGB, -1)),
    ("turned grey.tif", Image.fromarray(GREY), {"exif": TURNED}, np.rot90(THREE_GREY, -1)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_read_photo(tmp_path, name, image, options, expected):
    image.save(tmp_path / name, **options)
    photo = read_photo(tmp_path / name)
    assert photo.dtype == np.uint8 and photo.shape == expected.shape and photo.flags.writeable
    assert np.abs(photo.astype(int) - expected).mean() < (4 if name.endswith(".jpg") else 1e-9)


def test_read_photo_of_16_bit_colour(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), RGB[..., ::-1] * np.uint16(257))
    assert (read_photo(tmp_path / "a.png") == RGB).all()


def test_broken_exif_is_no_crash(tmp_path):
    """The photograph is either read or refused in one line."""
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"not what it should be")
    with contextlib.suppress(UserError):
        assert (read_photo(tmp_path / "a.png") == RGB).all()


@pytest.mark.parametrize("content", [b"", b"<html>", WHOLE[:len(WHOLE) // 2], WHOLE[:20], WHOLE[20:]])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_unreadable_files_are_named(tmp_path, content, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: cannot be read"):
        read_photo(path)


def test_a_missing_photograph_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.png"):
        read_photo(tmp_path / "gone.png")
