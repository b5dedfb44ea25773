"""Decoded frames in one file, which all loader processes map into their memory and share."""
import hashlib
from pathlib import Path

import numpy as np

from datasets.camvid import CamVidDataset
from runtime import atomic_path, make_folder, progress, remove_file

STALE = ("{split}_{digits}.npy", "{split}_{digits}.bin", ".{split}_{digits}.tmp.*")  # the last a killed run's


class FrameCache:
    """What ``dataset.read`` returns, decoded once and for all later runs: uint8 photographs and ids, one file a split.

    The file's name ends in a fingerprint of all that its content depends on: names, sizes and times of the images, the
    classes, the flags that change what is read. A stale file of the split is removed when a new one is made.
    Raises RunError if it cannot be written.
    """

    def __init__(self, folder: Path, split: str, dataset: CamVidDataset):
        self.path = make_folder(folder) / f"{split}_{fingerprint(dataset)}.bin"
        index = self.path.with_suffix(".npy")  # written last: where it lies, the frames are whole
        if not (index.is_file() and self.path.is_file()):
            for pattern in STALE:
                for stale in folder.glob(pattern.format(split=split, digits=16 * "[0-9a-f]")):
                    remove_file(stale)
            self._write(index, split, dataset)
        self.index = np.load(index)  # (N, 5): offset in bytes, height and width of the photograph, of the mask
        self._frames: np.memmap | None = None

    def _write(self, index: Path, split: str, dataset: CamVidDataset) -> None:
        rows, offset = [], 0
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            for i in progress(range(len(dataset)), desc=f"decoding {split}", unit="frame"):
                photo, ids = dataset.read(i)
                rows.append((offset, *photo.shape[:2], *ids.shape))
                offset += file.write(photo.tobytes()) + file.write(ids.tobytes())
        with atomic_path(index) as temporary:
            np.save(temporary, np.array(rows, np.int64))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_frames": None}  # a spawned worker opens the file itself, and receives no frames

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 photograph and (H', W') uint8 ids, copies that may be changed."""
        if self._frames is None:
            self._frames = np.memmap(self.path, np.uint8, "r")
        start, height, width, label_height, label_width = self.index[i]
        middle = start + 3 * height * width
        end = middle + label_height * label_width
        return (np.array(self._frames[start:middle]).reshape(height, width, 3),
                np.array(self._frames[middle:end]).reshape(label_height, label_width))


def fingerprint(dataset: CamVidDataset) -> str:
    """16 hex digits that change with everything that `CamVidDataset.read` depends on."""
    files = [(str(path), stat.st_size, stat.st_mtime_ns) for pair in dataset.pairs for path in pair
             for stat in [path.stat()]]
    how = (dataset.classes, dataset.label_format, dataset.image_size, dataset.native_labels)
    return hashlib.sha256(repr((files, how)).encode()).hexdigest()[:16]
