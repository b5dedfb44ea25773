"""Pictures that read right in code and look right to a person."""
import io

import numpy as np
import pytest
from PIL import Image

from datasets.classes import CAMVID
from visualize import draw_legend, mask_image, overlay_image, panel_image, save_confusion_matrix, save_curves

COLORS = np.array(CAMVID.colors, np.uint8)


@pytest.fixture
def ids():
    ids = np.random.default_rng(0).integers(0, 12, (17, 33))
    ids[0, :12] = range(12)
    return ids


@pytest.fixture
def photo():
    return np.random.default_rng(1).integers(0, 256, (17, 33, 3), np.uint8)


def reread(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    return Image.open(file)


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_mask_holds_ids_and_shows_colours(ids, kind):
    image = reread(mask_image(ids.astype(kind), CAMVID))
    assert image.mode == "P" and image.size == (33, 17)
    np.testing.assert_array_equal(np.asarray(image), ids)
    np.testing.assert_array_equal(np.array(image.getpalette()).reshape(-1, 3)[:12], COLORS)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), COLORS[ids])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_overlay_blends_photo_and_colours(photo, ids, alpha):
    image = overlay_image(photo, ids, CAMVID, alpha)
    assert image.mode == "RGB" and image.size == (33, 17)
    expected = (1 - alpha) * photo.astype(float) + alpha * COLORS[ids]
    np.testing.assert_allclose(np.asarray(image), expected, atol=0 if alpha in (0, 1) else 1)


def test_panel_shows_photo_label_and_prediction_side_by_side(photo, ids):
    other = np.full((34, 66), 4)  # labels at twice the size
    panel = np.asarray(panel_image([(photo, ids, ids[::-1]), (photo[::-1].copy(), other, ids)], CAMVID))
    assert panel.shape == (34, 99, 3)
    for found, expected in [(panel[:17, :33], photo), (panel[:17, 33:66], COLORS[ids]),
                            (panel[:17, 66:], COLORS[ids[::-1]]), (panel[17:, :33], photo[::-1]),
                            (panel[17:, 33:66], COLORS[np.full((17, 33), 4)]), (panel[17:, 66:], COLORS[ids])]:
        np.testing.assert_array_equal(found, expected)


def colored_share(path) -> float:
    """The share of a PNG's pixels that are neither white nor grey."""
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 200
        rgb = np.asarray(image.convert("RGB")).astype(int)
    return float((rgb.max(2) - rgb.min(2) > 40).mean())


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves(tmp_path, epochs):
    path, flat = tmp_path / "curves.png", tmp_path / "flat.png"
    rows = [{"epoch": i, "train_loss": 2 / i, "val_loss": 3 / i, "val_miou": i / 40, "lr": 0.1 / i, "seconds": 1.0}
            for i in range(1, epochs + 1)]
    save_curves(rows, path)
    save_curves([{**row, "val_miou": float("nan"), "val_loss": float("nan")} for row in rows], flat)
    assert colored_share(path) > colored_share(flat) > 0
    # Epochs without a validation have no scores: the curve joins the others.
    save_curves([row if i % 3 else {"epoch": row["epoch"], "train_loss": 1.0, "lr": 0.1} for i, row in enumerate(rows)],
                path)
    assert epochs == 1 or colored_share(path) > 1.2 * colored_share(flat)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "flat.png"]


def test_confusion_matrix_shades_the_shares_of_each_label(tmp_path):
    names = CAMVID.names[1:]
    shares = {}
    for name, matrix in [("right", np.eye(11, dtype=np.int64) * 7), ("nothing", np.zeros((11, 11), np.int64)),
                         ("everywhere", np.ones((11, 11), np.int64))]:
        save_confusion_matrix(matrix, names, tmp_path / f"{name}.png")
        shares[name] = colored_share(tmp_path / f"{name}.png")
    rescaled = np.diag(np.arange(1, 12) ** 3)  # other counts, the same shares
    save_confusion_matrix(rescaled, names, tmp_path / "rescaled.png")
    assert shares["right"] > 0.02 and shares["right"] > shares["nothing"] + 0.02
    assert (tmp_path / "rescaled.png").read_bytes() == (tmp_path / "right.png").read_bytes()
    assert shares["everywhere"] < shares["right"]  # a ninth of a label's pixels is nearly white
    save_confusion_matrix(np.array([[3, 1], [0, 0]]), ("a", "b"), tmp_path / "small.png")


def test_legend_names_every_scored_class_in_its_corner():
    photo = Image.new("RGB", (480, 360), (10, 200, 10))
    image = np.array(draw_legend(photo.copy(), CAMVID))
    changed = (image != np.array(photo)).any(-1)
    rows, columns = np.nonzero(changed)
    assert rows.min() > 150 and columns.max() < 200 and 0.05 < changed.mean() < 0.3
    patches = {tuple(color) for color in image[changed]}
    for i in CAMVID.scored:
        blended = np.array([10, 200, 10]) * 0.2 + np.array(CAMVID.colors[i]) * 0.8
        assert min(np.abs(np.array(patch) - blended).max() for patch in patches) <= 1, CAMVID.names[i]


@pytest.mark.parametrize("size", [(480, 80), (60, 360), (1, 1)])
def test_legend_that_would_not_be_legible_is_left_out(size):
    photo = Image.new("RGB", size, (10, 200, 10))
    assert (np.array(draw_legend(photo.copy(), CAMVID)) == np.array(photo)).all()
