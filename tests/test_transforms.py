import os
import random
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import PALETTE, REPO

from datasets.transforms import eval_transform, train_transform

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
QUARTERS = np.kron([[2, 7], [5, 11]], np.ones((48, 64), int)).astype(np.uint8)  # ids: 2 and 7 above 5 and 11
CENTRE = np.pad(np.full((20, 20), 9, np.uint8), 20, constant_values=3)


def draw(count: int, ids: np.ndarray, crop: tuple[int, int], void_id: int = 0, **options):
    """``count`` augmented samples of an image painted from ``ids`` -> ((H, W, 3) image in 0-255, (H, W) mask)."""
    transform = train_transform(crop, void_id, **options)
    for seed in range(count):
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        sample = transform(image=PALETTE[ids], mask=ids)
        assert sample["image"].shape == (3, *crop) and sample["image"].dtype == torch.float32
        assert sample["mask"].shape == crop and sample["mask"].dtype == torch.uint8
        yield 255 * (sample["image"].permute(1, 2, 0).numpy() * STD + MEAN), sample["mask"].numpy()


@pytest.mark.parametrize("crop, void_id", [((70, 90), 0), ((300, 40), 255)])
def test_image_and_mask_stay_aligned(crop, void_id):
    for image, mask in draw(40, QUARTERS, crop, void_id, jitter=0):
        assert set(mask.flat) & {2, 5, 7, 11} and set(mask.flat) <= {2, 5, 7, 11, void_id}  # no id in between
        for i in set(mask.flat) - {void_id}:
            inside = cv2.erode(np.uint8(mask == i), np.ones((5, 5))) > 0  # outlines are blends of two colours
            assert not inside.any() or np.abs(image[inside] - PALETTE[i]).max() < 2


@pytest.mark.parametrize("scale", [0.4, 0.65])
def test_a_scaled_mask_is_not_shifted_against_its_image(scale):
    """Both hold where their pixels came from, which agrees but for rounding to whole pixels, and that on average."""
    for place in np.mgrid[0:160, 0:200].astype(np.uint8):
        sample = train_transform((40, 50), 255, (scale, scale), jitter=0)(image=np.dstack([place] * 3), mask=place)
        shift = 255 * (sample["image"][0].numpy() * STD[0] + MEAN[0]) - sample["mask"].numpy()
        assert abs(shift.mean()) < 0.15


def test_flips_left_and_right_but_never_upside_down():
    flipped = []
    for _, mask in draw(80, QUARTERS, (150, 200)):
        assert np.nonzero(np.isin(mask, (2, 7)))[0].max() < np.nonzero(np.isin(mask, (5, 11)))[0].min()
        left, right = (np.nonzero(np.isin(mask, ids))[1] for ids in ((2, 5), (7, 11)))
        assert left.max() < right.min() or right.max() < left.min()
        flipped.append(bool(right.max() < left.min()))
    assert 20 < sum(flipped) < 60


@pytest.mark.parametrize("low, high, options", [(0.4, 1.2, {}), (0.8, 1.25, {"scale": (0.8, 1.25)})])
def test_scales_both_sides_alike_within_the_range_and_pads_with_void(low, high, options):
    factors = []
    for image, mask in draw(60, CENTRE, (130, 130), void_id=6, jitter=0, **options):
        height, width = (np.ptp(index) + 1 for index in np.nonzero(mask == 9))
        assert abs(height - width) <= 1 and 20 * low - 1 <= height <= 20 * high + 1
        factors.append(height / 20)
        rows, columns = np.nonzero(mask != 6)
        assert abs(np.ptp(rows) + 1 - 3 * height) <= 5 and abs(np.ptp(columns) + 1 - 3 * width) <= 5
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # the whole image, one solid rectangle
        assert np.ptp(image[mask == 6], 0).max() < 2.5  # one colour
    assert min(factors) < low + 0.2 * (high - low) and max(factors) > high - 0.2 * (high - low)


def test_crops_reach_every_part():
    offsets = {tuple(np.argwhere(mask == 9)[0]) for _, mask in draw(40, CENTRE, (50, 50), scale=(1, 1)) if 9 in mask}
    assert min(y for y, _ in offsets) < 14 and max(y for y, _ in offsets) > 16 and len({x for _, x in offsets}) > 4


def test_half_of_the_crops_are_seen_in_other_light_and_the_mask_stays():
    (plain, ids), *_ = draw(1, QUARTERS, (96, 128), scale=(1, 1), jitter=0)
    shifts, edges, rough = [], [], []
    for image, mask in draw(80, QUARTERS, (96, 128), scale=(1, 1)):
        if mask[0, 0] != ids[0, 0]:  # mirrored
            image, mask = image[:, ::-1], mask[:, ::-1]
        assert (mask == ids).all()
        shifts.append(np.abs(image - plain).mean())
        rough.append(image[5:40, 5:50].std(axis=(0, 1)).max())
        edges.append(np.abs(image[20, 63] - image[20, 62]).max() > 1)
    assert 0.35 < np.mean(np.array(shifts) < 1e-3) < 0.65, "half of the crops keep their colours"
    assert np.mean(np.array(shifts) > 4) > 0.3 and max(shifts) > 30
    assert 0.05 < np.mean(np.array(rough) > 1) < 0.35, "noise and compression are the exception"
    assert 0.02 < np.mean(edges) < 0.4, "blur is the exception"


def test_eval_only_normalises():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (17, 33, 3), dtype=np.uint8)
    mask = rng.integers(0, 12, (20, 66), dtype=np.uint8)  # at its own size
    sample = eval_transform()(image=image, mask=mask)
    expected = ((image / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(sample["image"].numpy(), expected, atol=1e-5)
    assert sample["image"].dtype == torch.float32 and (sample["mask"].numpy() == mask).all()


def test_importing_asks_the_network_for_nothing():
    watch = ("import sys\nsys.addaudithook(lambda event, args: event in ('socket.connect', 'socket.getaddrinfo', "
             "'urllib.Request') and sys.exit(event))\nimport datasets.transforms")
    env = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", watch], env=env, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
