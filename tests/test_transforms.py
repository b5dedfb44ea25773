"""Augmentation: image and mask stay aligned, and every change stays within its range."""

import random
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch
from conftest import PALETTE

from datasets.transforms import eval_transform, train_transform

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
QUARTERS = np.kron([[2, 7], [5, 11]], np.ones((48, 64), int)).astype(np.uint8)
CENTRE = np.pad(np.full((20, 20), 9, np.uint8), 20, constant_values=3)


def draw(
    count: int, ids: np.ndarray, crop: tuple[int, int], ignore_index: int = 0, **options
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Augmented samples of an image painted from ``ids``: (H, W, 3) in 0-255 and (H, W) ids."""
    transform = train_transform(crop, ignore_index, MEAN, STD, **options)
    for seed in range(count):
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        sample = transform(image=PALETTE[ids], mask=ids)
        assert sample["image"].shape == (3, *crop) and sample["image"].dtype == torch.float32
        assert sample["mask"].shape == crop and sample["mask"].dtype == torch.uint8
        yield 255 * (sample["image"].permute(1, 2, 0).numpy() * STD + MEAN), sample["mask"].numpy()


@pytest.mark.parametrize("crop, ignore_index", [((70, 90), 0), ((300, 40), 255)])
def test_image_and_mask_stay_aligned(crop, ignore_index):
    for image, mask in draw(40, QUARTERS, crop, ignore_index, jitter=0):
        found = set(mask.flat) - {ignore_index}
        assert found and found <= {2, 5, 7, 11}, "no id is between two ids"
        for i in found:
            # Outlines are blends of two colours.
            inside = cv2.erode(np.uint8(mask == i), np.ones((5, 5))) > 0
            assert not inside.any() or np.abs(image[inside] - PALETTE[i]).max() < 2


@pytest.mark.parametrize("scale", [0.4, 0.65])
def test_a_scaled_mask_is_not_shifted_against_its_image(scale):
    """Both hold where their pixels came from, and agree on average."""
    transform = train_transform((40, 50), 255, MEAN, STD, (scale, scale), jitter=0)
    for place in np.mgrid[0:160, 0:200].astype(np.uint8):
        sample = transform(image=np.dstack([place] * 3), mask=place)
        source = 255 * (sample["image"][0].numpy() * STD[0] + MEAN[0])
        assert abs((source - sample["mask"].numpy()).mean()) < 0.15


def test_half_of_the_images_are_mirrored_and_none_is_upside_down():
    mirrored = 0
    for _, mask in draw(80, QUARTERS, (150, 200)):
        places = {i: np.argwhere(mask == i).mean(0) for i in (2, 5, 7)}
        assert places[2][0] < places[5][0]
        mirrored += places[7][1] < places[2][1]
    assert 20 < mirrored < 60


@pytest.mark.parametrize("low, high", [(0.4, 1.2), (0.8, 1.25)])
def test_both_sides_are_scaled_alike_and_padding_is_ignored(low, high):
    factors = []
    for image, mask in draw(60, CENTRE, (130, 130), 6, scale=(low, high), jitter=0):
        height, width = (np.ptp(index) + 1 for index in np.nonzero(mask == 9))
        assert abs(height - width) <= 1 and 20 * low - 1 <= height <= 20 * high + 1
        factors.append(height / 20)
        whole_height, whole_width = (np.ptp(index) + 1 for index in np.nonzero(mask != 6))
        assert abs(whole_height - 3 * height) <= 5 and abs(whole_width - 3 * width) <= 5
        assert (mask != 6).sum() == whole_height * whole_width
        assert np.abs(image[mask == 6] - 255 * MEAN).max() < 1.5
    assert min(factors) < low + 0.2 * (high - low)
    assert max(factors) > high - 0.2 * (high - low)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5)])
@pytest.mark.parametrize("scale", [0.1, 0.4])
def test_tiny_images_keep_a_pixel_at_every_scale(size, scale):
    ids = np.full(size, 7, np.uint8)
    for _, mask in draw(5, ids, (40, 50), scale=(scale, scale)):
        assert (mask == 7).any()


def test_crops_reach_every_part():
    masks = [mask for _, mask in draw(40, CENTRE, (50, 50), scale=(1, 1))]
    corners = np.array([np.argwhere(mask == 9)[0] for mask in masks])
    assert (corners.min(0) < 13).all() and (corners.max(0) > 17).all()


def test_half_of_the_crops_change_their_colours_and_no_mask_changes():
    [(plain, ids)] = draw(1, QUARTERS, (96, 128), scale=(1, 1), jitter=0)
    shifts = []
    for image, mask in draw(80, QUARTERS, (96, 128), scale=(1, 1)):
        if mask[0, 0] != ids[0, 0]:  # mirrored
            image = image[:, ::-1]
            mask = mask[:, ::-1]
        np.testing.assert_array_equal(mask, ids)
        shifts.append(np.abs(image - plain).mean())
    assert 0.35 < np.mean(np.array(shifts) < 1e-3) < 0.65
    assert np.mean(np.array(shifts) > 4) > 0.3 and max(shifts) > 30


def test_evaluation_only_normalises():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (17, 33, 3), dtype=np.uint8)
    mask = rng.integers(0, 12, (20, 66), dtype=np.uint8)  # at its own size
    sample = eval_transform(MEAN, STD)(image=image, mask=mask)
    expected = ((image / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(sample["image"], expected, atol=1e-5)
    np.testing.assert_array_equal(sample["mask"], mask)
