"""From an image and mask as read to tensors: augmented for training, normalised for evaluation."""

import os
from collections.abc import Sequence

# Importing albumentations would ask the network for a newer version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A  # noqa: E402
import cv2  # noqa: E402

# Data loader workers run in parallel already; further threads would slow down the network.
cv2.setNumThreads(0)


def train_transform(
    crop_size: tuple[int, int],
    ignore_index: int,
    mean: Sequence[float],
    std: Sequence[float],
    scale: tuple[float, float] = (0.4, 1.2),
    jitter: float = 0.4,
) -> A.Compose:
    """Random scale, crop and horizontal flip, and `color_augmentation` for half of the crops:
    (H, W, 3) uint8, (H, W) uint8 -> (3, h, w) float32, (h, w) uint8.

    crop_size: (height, width) in pixels; smaller images are padded with the mean colour, their
    masks with ``ignore_index``. mean, std: of the channels, for images in 0 … 1.
    scale: lowest and highest factor for both sides.
    jitter: of `color_augmentation`; 0 disables it.
    There is no vertical flip: streets are upright.
    """
    padding: dict = {"fill": [round(255 * value) for value in mean], "fill_mask": ignore_index}
    least = 1 + int(1 / scale[0])  # pixels of which one remains at the lowest scale
    return A.Compose(
        [
            A.PadIfNeeded(least, least, **padding),
            A.RandomScale(
                (scale[0] - 1, scale[1] - 1),
                interpolation=cv2.INTER_LINEAR,
                # INTER_NEAREST would shift the mask by half a pixel.
                mask_interpolation=cv2.INTER_NEAREST_EXACT,
                area_for_downscale="image",
                p=1,
            ),
            A.RandomCrop(*crop_size, pad_if_needed=True, pad_position="random", **padding),
            A.HorizontalFlip(p=0.5),
            A.Sequential(color_augmentation(jitter), p=0.5 if jitter else 0),
            A.Normalize(mean, std),
            A.ToTensorV2(),
        ]
    )


def color_augmentation(jitter: float) -> list[A.ImageOnlyTransform]:
    """Lighting, colours and cameras that the few training drives do not show.

    jitter: brightness, contrast and saturation change by a factor of at most 1 ± jitter, the hue by
    jitter / 10.
    """
    factor = (1 - jitter, 1 + jitter)
    return [
        A.ColorJitter(factor, factor, factor, hue=(-jitter / 10, jitter / 10), p=0.8),
        A.RandomGamma((50, 200), p=0.4),
        A.RandomToneCurve(scale=0.2, per_channel=True, p=0.3),
        A.PlanckianJitter(p=0.3),
        A.ToGray(p=0.05),
        A.GaussianBlur((3, 5), p=0.15),
        A.GaussNoise((0.01, 0.06), p=0.2),
        A.ImageCompression("jpeg", (40, 95), p=0.2),
    ]


def eval_transform(mean: Sequence[float], std: Sequence[float]) -> A.Compose:
    """Normalisation alone: (H, W, 3) uint8, (H', W') uint8 -> (3, H, W) float32, (H', W') uint8."""
    return A.Compose([A.Normalize(mean, std), A.ToTensorV2()], is_check_shapes=False)
