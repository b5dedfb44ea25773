"""Decoded images and masks in one file, which all data loader workers map into memory and share."""
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from datasets.camvid import CamVidDataset
from support.command import progress
from support.files import atomic_path, make_folder, remove_file


class FrameCache:
    """What ``dataset.read`` returns, decoded once for this run and later ones: one file of uint8 pixels per split.

    The file's name ends in the `fingerprint` of the dataset. Making a new cache removes the split's older ones.
    Raises UserError if the folder cannot be created, RunError if the files cannot be written.
    """

    def __init__(self, folder: Path, split: str, dataset: CamVidDataset):
        self.path = make_folder(folder) / f"{split}_{fingerprint(dataset)}.bin"
        index = self.path.with_suffix(".npy")  # written last: if it is there, the pixels are complete
        if not (index.is_file() and self.path.is_file()):
            # Hidden files are what a killed run was writing.
            for stale in (path for dot in ("", ".") for path in folder.glob(f"{dot}{split}_{16 * '[0-9a-f]'}.*")):
                remove_file(stale)
            self._write(index, split, dataset)
        self.index = np.load(index)  # (N, 5): offset in bytes, height and width of the image, of the mask
        self._pixels: Any = None  # the mapped file, opened in the process that reads it

    def _write(self, index: Path, split: str, dataset: CamVidDataset) -> None:
        rows, offset = [], 0
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            for i in progress(range(len(dataset)), desc=f"decoding {split}", unit="image"):
                image, mask = dataset.read(i)
                rows.append((offset, *image.shape[:2], *mask.shape))
                offset += file.write(image.tobytes()) + file.write(mask.tobytes())
        with atomic_path(index) as temporary:
            np.save(temporary, np.array(rows, np.int64))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pixels": None}  # pickled to a worker without the pixels

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 image and (H', W') uint8 class ids, copies that may be changed."""
        if self._pixels is None:
            self._pixels = np.memmap(self.path, np.uint8, "r")
        start, height, width, mask_height, mask_width = self.index[i]
        middle = start + 3 * height * width
        return (np.array(self._pixels[start:middle]).reshape(height, width, 3),
                np.array(self._pixels[middle:middle + mask_height * mask_width]).reshape(mask_height, mask_width))


def fingerprint(dataset: CamVidDataset) -> str:
    """16 hex digits that change with the files' names, sizes and times, the classes, and how the files are read."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for pair in dataset.pairs for path in pair]
    how = (dataset.classes, dataset.label_format, dataset.max_side, dataset.native_masks)
    return hashlib.sha256(repr((files, how)).encode()).hexdigest()[:16]
