"""Pictures: masks, overlays, panels, curves and legends, pixel by pixel."""

import numpy as np
import pytest
from conftest import PALETTE, opened
from PIL import Image

from datasets.classes import CAMVID, CAMVID32
from output.visualize import draw_legend, mask_image, overlay_image, panel_image, save_curves

IDS = np.random.default_rng(0).permutation(17 * 33).reshape(17, 33) % 12
IMAGE = np.random.default_rng(1).integers(0, 256, (17, 33, 3), np.uint8)


def classes_in(image: np.ndarray) -> list[int]:
    """The classes whose colours a (H, W, 3) legend shows."""
    swatches = (image[..., None, :] == PALETTE).all(-1).sum((0, 1))
    return [i for i in range(1, 12) if swatches[i] > 50]


def test_a_mask_holds_ids_and_shows_colours(tmp_path):
    mask_image(IDS, CAMVID).save(tmp_path / "mask.png")
    image = opened(tmp_path / "mask.png")
    assert (np.asarray(image) == IDS).all()
    assert (np.asarray(image.convert("RGB")) == PALETTE[IDS]).all()


def test_a_mask_holds_ids_alone_or_colours_alone():
    assert (np.asarray(mask_image(IDS, CAMVID, "color")) == PALETTE[IDS]).all()
    ids = mask_image(IDS, CAMVID, "ids")
    assert ids.mode == "L" and (np.asarray(ids) == IDS).all()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_an_overlay_blends_the_image_and_the_colours(alpha):
    blend = (1 - alpha) * IMAGE + alpha * PALETTE[IDS]
    np.testing.assert_allclose(overlay_image(IMAGE, IDS, CAMVID, alpha), blend, atol=1)


def test_a_panel_shows_image_mask_and_prediction_side_by_side():
    large = np.kron(IDS, np.ones((2, 2), int))  # a mask of twice the size
    panel = np.asarray(panel_image([(IMAGE, large, IDS[::-1])], CAMVID))
    expected = np.hstack([IMAGE, PALETTE[IDS], PALETTE[IDS[::-1]]])
    titles = 12  # pixels in height
    np.testing.assert_array_equal(panel[titles : titles + 17, : 3 * 33], expected)
    for left in (0, 33, 66):
        assert (panel[:titles, left : left + 33] > 0).any()
    assert classes_in(panel[:, 3 * 33 :]) == [*range(1, 12)]


def test_every_series_has_a_curve(tmp_path):
    row = {"train_loss": 2, "lr": 0.1, "val_loss": 3, "val_miou": 0.4, "iou/Road": 0.6}

    def colored(last):  # pixels that are neither white nor grey
        save_curves([row | {"epoch": 1}, last | {"epoch": 2}], tmp_path / "curves.png", CAMVID)
        rgb = np.array(opened(tmp_path / "curves.png").convert("RGB"), int)
        return (np.ptp(rgb, axis=2) > 40).sum()

    every = colored(row)
    for key in row:
        assert colored(row | {key: np.nan}) < every - 100, key


def test_a_legend_of_many_classes_leaves_the_height_and_has_columns():
    image = Image.new("RGB", (100, 150))
    legend = draw_legend(image, CAMVID32, CAMVID32.scored)
    assert legend.height == 150
    colors = {*map(tuple, np.array(legend)[:, 100:].reshape(-1, 3).tolist())}
    assert colors >= {CAMVID32.colors[i] for i in CAMVID32.scored}


@pytest.mark.parametrize("shown", [[*range(1, 12)], [4, 9]])
@pytest.mark.parametrize("size", [(480, 360), (96, 72), (40, 500), (500, 100)])
def test_a_legend_shows_these_classes_in_their_colours(shown, size):
    """In the image, or beside one that has no room for it."""
    image = np.array(draw_legend(Image.new("RGB", size, (10, 200, 10)), CAMVID, shown))
    assert classes_in(image) == shown
    fits = size == (480, 360)
    assert (image.shape == (360, 480, 3)) == fits
    assert fits or (image[: size[1], : size[0]] == (10, 200, 10)).all()
