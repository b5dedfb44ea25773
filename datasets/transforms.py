"""From an image and mask as read to tensors: with augmentation for training, without for evaluation."""
import math
import os
from collections.abc import Sequence

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it would ask the network for a newer version

import albumentations as A  # noqa: E402
import cv2  # noqa: E402

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

cv2.setNumThreads(0)  # data loader workers run in parallel already; further threads would slow down the network


def train_transform(crop_size: tuple[int, int], void_id: int, scale: tuple[float, float] = (0.4, 1.2),
                    jitter: float = 0.4) -> A.Compose:
    """Random scale, crop and flip, and `appearance` for half of them: (H, W, 3) uint8, (H, W) uint8 -> tensors.

    crop_size: (height, width) in pixels; smaller images are padded with the mean colour, their masks with void_id.
    scale: the lowest and highest factor for both sides. jitter: of `appearance`; 0 leaves the colours as they are.
    There is no vertical flip: streets are upright.
    """
    padding: dict = {"fill": [round(255 * mean) for mean in IMAGENET_MEAN], "fill_mask": void_id}
    least = math.ceil(1 / scale[0])  # pixels of which one is left at the lowest scale
    return A.Compose([
        A.PadIfNeeded(least, least, **padding),
        A.RandomScale((scale[0] - 1, scale[1] - 1), interpolation=cv2.INTER_LINEAR,
                      mask_interpolation=cv2.INTER_NEAREST_EXACT, area_for_downscale="image", p=1),
        A.RandomCrop(*crop_size, pad_if_needed=True, pad_position="random", **padding),
        A.HorizontalFlip(p=0.5),
        A.Sequential(appearance(jitter), p=0.5 if jitter else 0),
        A.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        A.ToTensorV2(),
    ])


def appearance(jitter: float) -> list[A.ImageOnlyTransform]:
    """Other light, colours and cameras: without them a network learns those of its few training drives.

    jitter: brightness, contrast and saturation change by a factor of at most 1 ± jitter, the hue by jitter / 10.
    """
    return [A.ColorJitter(*3 * [(1 - jitter, 1 + jitter)], hue=(-jitter / 10, jitter / 10), p=0.8),
            A.RandomGamma((50, 200), p=0.4),
            A.RandomToneCurve(scale=0.2, per_channel=True, p=0.3),
            A.PlanckianJitter(p=0.3),
            A.ToGray(p=0.05),
            A.GaussianBlur((3, 5), p=0.15),
            A.GaussNoise((0.01, 0.06), p=0.2),
            A.ImageCompression("jpeg", (40, 95), p=0.2)]


def eval_transform(mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> A.Compose:
    """Normalisation alone: (H, W, 3) uint8, (H', W') uint8 -> (3, H, W) float32, (H', W') uint8."""
    return A.Compose([A.Normalize(mean, std), A.ToTensorV2()], is_check_shapes=False)
