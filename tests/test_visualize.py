"""Pictures that read right in code and look right to a person."""
import numpy as np
import pytest
from conftest import PALETTE, opened
from PIL import Image

from datasets.classes import CAMVID, ClassSet
from output.visualize import draw_legend, mask_image, overlay_image, panel_image, save_curves

IDS = np.random.default_rng(0).permutation(17 * 33).reshape(17, 33) % 12
IMAGE = np.random.default_rng(1).integers(0, 256, (17, 33, 3), np.uint8)


def test_mask_holds_ids_and_shows_colours(tmp_path):
    mask_image(IDS, CAMVID).save(tmp_path / "mask.png")
    image = opened(tmp_path / "mask.png")
    assert image.mode == "P" and (np.asarray(image) == IDS).all()
    assert (np.asarray(image.convert("RGB")) == PALETTE[IDS]).all()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_overlay_blends_image_and_colours(alpha):
    image = overlay_image(IMAGE, IDS, CAMVID, alpha)
    np.testing.assert_allclose(np.asarray(image), (1 - alpha) * IMAGE + alpha * PALETTE[IDS], atol=alpha % 1 > 0)


def test_panel_shows_image_mask_and_prediction_side_by_side():
    large = np.kron(IDS, np.ones((2, 2), int))  # a mask of twice the size
    panel = np.asarray(panel_image([(IMAGE, IDS, IDS[::-1]), (IMAGE[::-1].copy(), large, IDS)], CAMVID))
    first = IMAGE, PALETTE[IDS], PALETTE[IDS[::-1]]
    second = IMAGE[::-1], PALETTE[IDS], PALETTE[IDS]
    np.testing.assert_array_equal(panel[-34:], np.vstack([np.hstack(first), np.hstack(second)]))
    head = np.array(panel_image([(np.zeros((90, 120, 3), np.uint8), IDS, IDS)], CAMVID))[:-90]
    titles = np.split(head.max((0, 2)) > 200, 3)
    assert [40 < np.nonzero(title)[0].mean() < 80 for title in titles] == [True] * 3 and not titles[0][:30].any()


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves(tmp_path, epochs):
    """Each draws something, but not where it is NaN. Epochs without a validation have no scores: the curve goes on."""
    rows = [{"epoch": i, "train_loss": 2 / i, "lr": 0.1 / i, "val_loss": 3 / i, "val_miou": i / 40}
            for i in range(1, epochs + 1)]
    sparse = [row if i % 3 else dict([*row.items()][:3]) for i, row in enumerate(rows)]
    without = [[row | {key: np.nan} for row in rows] for key in ("train_loss", "lr", "val_loss", "val_miou")]
    colored = []  # the shares of the pictures that are neither white nor grey
    for history in (rows, sparse, *without):
        save_curves(history, tmp_path / "curves.png")
        rgb = np.asarray(opened(tmp_path / "curves.png").convert("RGB")).astype(int)
        colored.append((np.ptp(rgb, axis=2) > 40).mean())
    assert colored[0] > max(colored[2:]) and len(list(tmp_path.iterdir())) == 1
    assert epochs == 1 or colored[1] > 0.9 * colored[0]


@pytest.mark.parametrize("shown", [[*range(1, 12)], [4, 9]])
def test_legend_shows_these_classes_in_their_colours_in_its_corner_or_is_left_out(shown):
    image = np.array(draw_legend(Image.new("RGB", (480, 360), (10, 200, 10)), CAMVID, shown))
    changed = (image != (10, 200, 10)).any(-1)
    rows, columns = np.nonzero(changed)
    assert rows.min() > 150 and columns.max() < 200 and 0.005 < changed.mean() < 0.3
    swatches = (image[changed][:, None] == PALETTE).all(-1).sum(0)  # pixels by class
    assert [i for i in range(1, 12) if swatches[i] > 50] == shown, swatches
    for size in ((480, 80), (60, 360), (1, 1)):  # too small to be legible
        image = Image.new("RGB", size, (10, 200, 10))
        assert (np.array(draw_legend(image.copy(), CAMVID, range(1, 12))) == np.array(image)).all()


def test_legend_tells_letters_beyond_ascii_apart():
    images = [draw_legend(Image.new("RGB", (480, 360)), ClassSet(("void", name), ((0, 0, 0), (1, 2, 3)), 0), [1])
              for name in ("Straße", "Strase", "улица", "улипа")]
    assert len({image.tobytes() for image in images}) == 4
