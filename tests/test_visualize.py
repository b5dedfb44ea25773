"""Pictures that read right in code and look right to a person."""
import numpy as np
import pytest
from conftest import PALETTE, opened
from PIL import Image

from datasets.classes import CAMVID
from output.visualize import draw_legend, mask_image, overlay_image, panel_image, save_curves

IDS = np.random.default_rng(0).permutation(17 * 33).reshape(17, 33) % 12
IMAGE = np.random.default_rng(1).integers(0, 256, (17, 33, 3), np.uint8)


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_mask_holds_ids_and_shows_colours(tmp_path, kind):
    mask_image(IDS.astype(kind), CAMVID).save(tmp_path / "mask.png")
    image = opened(tmp_path / "mask.png")
    assert image.mode == "P" and image.size == (33, 17) and (np.asarray(image) == IDS).all()
    assert (np.array(image.getpalette()).reshape(-1, 3)[:12] == PALETTE).all()
    assert (np.asarray(image.convert("RGB")) == PALETTE[IDS]).all()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_overlay_blends_image_and_colours(alpha):
    image = overlay_image(IMAGE, IDS, CAMVID, alpha)
    expected = (1 - alpha) * IMAGE.astype(float) + alpha * PALETTE[IDS]
    assert image.mode == "RGB" and image.size == (33, 17)
    np.testing.assert_allclose(np.asarray(image), expected, atol=0 if alpha in (0, 1) else 1)


def test_panel_shows_image_mask_and_prediction_side_by_side():
    large = np.full((34, 66), 4)  # a mask of twice the size
    panel = np.asarray(panel_image([(IMAGE, IDS, IDS[::-1]), (IMAGE[::-1].copy(), large, IDS)], CAMVID))
    first = IMAGE, PALETTE[IDS], PALETTE[IDS[::-1]]
    second = IMAGE[::-1], PALETTE[large[:17, :33]], PALETTE[IDS]
    np.testing.assert_array_equal(panel, np.vstack([np.hstack(first), np.hstack(second)]))


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves(tmp_path, epochs):
    def colored_share(rows: list[dict]) -> float:
        """The share of the picture's pixels that are neither white nor grey."""
        save_curves(rows, tmp_path / "curves.png")
        assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
        rgb = np.asarray(opened(tmp_path / "curves.png").convert("RGB")).astype(int)
        assert min(rgb.shape[:2]) > 200
        return float((rgb.max(2) - rgb.min(2) > 40).mean())

    rows = [{"epoch": i, "train_loss": 2 / i, "val_loss": 3 / i, "val_miou": i / 40, "lr": 0.1 / i}
            for i in range(1, epochs + 1)]
    flat = colored_share([{**row, "val_miou": float("nan"), "val_loss": float("nan")} for row in rows])
    assert colored_share(rows) > flat > 0
    # Epochs without a validation have no scores: the curve joins the others.
    sparse = [row if i % 3 else {"epoch": row["epoch"], "train_loss": 1.0, "lr": 0.1} for i, row in enumerate(rows)]
    assert epochs == 1 or colored_share(sparse) > 1.2 * flat


def test_legend_names_every_scored_class_in_its_corner():
    image = np.array(draw_legend(Image.new("RGB", (480, 360), (10, 200, 10)), CAMVID))
    changed = (image != (10, 200, 10)).any(-1)
    rows, columns = np.nonzero(changed)
    assert rows.min() > 150 and columns.max() < 200 and 0.05 < changed.mean() < 0.3
    blended = np.array([10, 200, 10]) * 0.2 + PALETTE[1:] * 0.8
    near = np.abs(image[changed][:, None].astype(float) - blended).max(-1).min(0)  # by class
    assert (near <= 1).all(), near


@pytest.mark.parametrize("size", [(480, 80), (60, 360), (1, 1)])
def test_legend_that_would_not_be_legible_is_left_out(size):
    image = Image.new("RGB", size, (10, 200, 10))
    assert (np.array(draw_legend(image.copy(), CAMVID)) == np.array(image)).all()
