"""The obvious code for each stage: what `bench.py` compares with.

python benchmarks/references.py CHECKPOINT IMAGES OUT DEVICE        the plain prediction loop
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.classes import CAMVID  # noqa: E402


def mask_to_ids(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) uint8 class ids, by one comparison per class."""
    ids = np.zeros(rgb.shape[:2], np.uint8)
    for i, color in enumerate(CAMVID.colors):
        ids[(rgb == np.array(color)).all(-1)] = i
    return ids


def confusion_matrix(pred: np.ndarray, mask: np.ndarray, classes: int = 12) -> np.ndarray:
    """(C, C) pixels by the mask's id and the predicted one, as in the FCN reference code."""
    legal = (mask >= 0) & (mask < classes)
    code = classes * mask[legal].astype(int) + pred[legal]
    return np.bincount(code, minlength=classes**2).reshape(classes, classes)


class PlainDataset:
    """Random scale, crop, flip, jitter and normalisation by torchvision's transforms."""

    def __init__(self, pairs: Sequence):
        from torchvision.transforms import v2

        self.pairs = pairs
        sizes = [(round(360 * scale), round(480 * scale)) for scale in (0.5, 0.75, 1.0, 1.25, 1.5)]
        self.transform = v2.Compose(
            [
                v2.RandomChoice([v2.Resize(size) for size in sizes]),
                v2.RandomCrop(224, pad_if_needed=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.2, 0.2, 0.2, 0.02),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __getitem__(self, index: int):
        from torchvision import tv_tensors

        image, rgb = (np.array(Image.open(path).convert("RGB")) for path in self.pairs[index])
        image = tv_tensors.Image(image.transpose(2, 0, 1))
        image, mask = self.transform(image, tv_tensors.Mask(mask_to_ids(rgb)))
        return image, mask.long()


def training_loop(model: nn.Module, batches: list, device="cpu", dtype=None) -> Callable:
    """Cross-entropy and SGD in the default memory format, in autocast if ``dtype`` is given."""
    model.to(device).train()
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is not None)

    def run():
        for images, masks in batches:
            images, masks = images.to(device), masks.to(device)
            optimizer.zero_grad()
            with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
                loss = criterion(model(images), masks)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss.item()  # for the progress bar

    return run


def predict(checkpoint: Path, images: Path, out: Path, device: str) -> None:
    """One image after the other: a mask in RGB and an overlay."""
    from inference.checkpoints import load_model

    model, config = load_model(checkpoint)
    model.to(device)
    mean, std = (torch.tensor(config["normalize"][key]).view(3, 1, 1) for key in ("mean", "std"))
    out.mkdir(exist_ok=True)
    for path in sorted(images.iterdir()):
        picture = Image.open(path).convert("RGB")
        image = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - mean) / std
        with torch.no_grad():
            ids = model(image[None].to(device))[0].argmax(0).cpu().numpy().astype(np.uint8)
        color = Image.fromarray(config["classes"].to_rgb(ids))
        color.save(out / f"{path.stem}_mask.png")
        Image.blend(picture, color, 0.5).save(out / f"{path.stem}_overlay.png")


if __name__ == "__main__":
    predict(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
