"""Decoded images and masks in a file of the run, which all data loader workers map into memory and share."""
import contextlib
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from datasets.camvid import CamVidDataset
from support.command import is_main_process, progress
from support.images import limited_size


class FrameCache:
    """What ``dataset.read`` returns, decoded once into the file ``path``: set it as the dataset's ``cache``.

    The first process writes the file, an index before the pixels. Where the disk has not twice ``size`` bytes free or
    refuses it, or somebody removes the file, samples are read from their own files as before.
    """

    def __init__(self, path: Path, dataset: CamVidDataset, size: int = 0):
        self.path, self.dataset = path, dataset
        self._index: Any = None  # (N, 5) int64: offset in bytes, height and width of the image, of the mask
        self._pixels: Any = None  # the mapped file, opened in the process that reads it
        if is_main_process():
            try:
                if shutil.disk_usage(path.parent).free >= 2 * size:
                    self._write()
            except BaseException as error:
                self.remove()
                if not isinstance(error, OSError):
                    raise

    def _write(self) -> None:
        index = np.zeros((len(self.dataset), 5), np.int64)
        self.path.unlink(missing_ok=True)
        with (open(self.path, "xb") as file, ThreadPoolExecutor() as pool,
              progress(total=len(index), desc="decoding", unit="image") as bar):
            file.write(index.tobytes())
            for i in range(len(index)):
                if i % 64 == 0:  # few at a time, so that what is decoded does not fill the memory
                    decoded = pool.map(self.dataset.read, range(i, min(i + 64, len(index))))
                image, mask = next(decoded)
                index[i] = file.tell(), *image.shape[:2], *mask.shape
                file.write(image.tobytes() + mask.tobytes())
                bar.update()
            file.seek(0)
            file.write(index.tobytes())

    def remove(self) -> None:
        """Remove the file, if this process wrote it."""
        self._index = self._pixels = None  # Windows removes no file that is mapped
        if is_main_process():
            with contextlib.suppress(OSError):
                self.path.unlink()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_index": None, "_pixels": None}  # pickled to a worker without the pixels

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 image and (H', W') uint8 class ids, copies that may be changed."""
        if self._pixels is None:
            try:
                self._pixels = np.memmap(self.path, np.uint8, "r")
            except OSError:
                return self.dataset.read(i)
            self._index = self._pixels[:40 * len(self.dataset)].view(np.int64).reshape(-1, 5)
        start, height, width, mask_height, mask_width = self._index[i]
        middle = start + 3 * height * width
        return (np.array(self._pixels[start:middle]).reshape(height, width, 3),
                np.array(self._pixels[middle:middle + mask_height * mask_width]).reshape(mask_height, mask_width))


def cache_bytes(sizes: dict[tuple[int, int], int], max_side: int) -> int:
    """How large a file can become. sizes: number of images by (height, width). max_side: as of the dataset."""
    return sum(count * (3 * math.prod(limited_size(size, max_side)) + math.prod(size)) for size, count in sizes.items())
