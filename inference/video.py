"""Videos, read and written frame by frame with OpenCV."""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: errors are raised here

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from support.command import UserError  # noqa: E402
from support.files import atomic_path  # noqa: E402


class VideoReader:
    """The frames of a file, (H, W, 3) uint8 RGB, upright. Raises UserError if there are none.

    rate: frames per second. count: the number that the file announces, 0 if it does not.
    """

    def __init__(self, path: Path):
        self.capture = cv2.VideoCapture(str(path))
        self.rate = self.capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.first = self.capture.read()[1]
        if self.first is None:
            raise UserError(f"{path}: cannot be read as a video")

    def __iter__(self) -> Iterator[np.ndarray]:
        frame = self.first
        while frame is not None:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            frame = self.capture.read()[1]


def write_video(path: Path, frames: Iterator[np.ndarray], rate: float) -> int:
    """Write (H, W, 3) uint8 RGB frames of one size to an .mp4 file. Returns their number.

    The codec drops the last pixel of an odd side. Raises UserError if the file cannot be written.
    """
    count = 0
    first = next(frames)
    height, width = first.shape[:2]
    with atomic_path(path) as temporary:
        fourcc = cv2.VideoWriter.fourcc(*"vp09")  # VP9, which browsers play and OpenCV can write
        writer = cv2.VideoWriter(str(temporary), fourcc, rate, (width, height))
        if not writer.isOpened():
            raise UserError(f"{path}: cannot be written (disk full, or an OpenCV without VP9?)")
        try:
            for frame in chain([first], frames):
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
                count += 1
        finally:
            writer.release()
        written = cv2.VideoCapture(str(temporary))  # OpenCV does not report a full disk
        if sum(1 for _ in iter(written.grab, False)) != count:
            raise UserError(f"{path}: is not complete (disk full?)")
        written.release()  # Windows renames no open file
    return count
