"""Videos frame by frame, by OpenCV: reading, and writing a file that browsers play, of the same rate and even sides."""
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: what goes wrong is said in one line

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from support.command import RunError, UserError  # noqa: E402
from support.files import atomic_path  # noqa: E402

CODEC = "vp09"  # VP9, which every browser plays and OpenCV's packages can write


class VideoReader:
    """The frames of a file, (H, W, 3) uint8 RGB, upright. Raises UserError if there is not even one.

    rate: frames a second. count: how many the file announces, 0 where it does not say.
    """

    def __init__(self, path: Path):
        self.capture = cv2.VideoCapture(opencv_name(path))
        self.rate = self.capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.count = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        known, self.first = self.capture.read()
        if not known:
            raise UserError(f"{path}: cannot be read as a video")
        self.size = self.first.shape[:2]  # (H, W)

    def __iter__(self) -> Iterator[np.ndarray]:
        known, frame = True, self.first
        while known:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            known, frame = self.capture.read()
        self.capture.release()


def opencv_name(path: Path) -> str:
    """The name for OpenCV, which crashes on one that is not UTF-8. Raises UserError for such a name."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: rename it, videos need names in UTF-8") from None


def write_video(path: Path, frames: Iterator[np.ndarray], size: tuple[int, int], rate: float) -> int:
    """Write (H, W, 3) uint8 RGB frames of ``size`` (H, W) to an .mp4 file. Returns their number.

    The codec leaves out the last pixel of an odd side. The file appears when it is whole. Raises RunError if it cannot
    be written, such as on a full disk: OpenCV does not say so, and what was written is therefore read again.
    """
    count = 0
    with atomic_path(path) as temporary:
        writer = cv2.VideoWriter(opencv_name(temporary), cv2.VideoWriter.fourcc(*CODEC), rate, size[::-1])
        if not writer.isOpened():
            raise RunError(f"{path}: cannot be written (disk full, or an OpenCV without VP9?)")
        try:
            for frame in frames:
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
                count += 1
        finally:
            writer.release()
        written = cv2.VideoCapture(str(temporary))
        readable = sum(1 for _ in iter(written.grab, False))
        if readable != count:
            raise RunError(f"{path}: cannot be written, {readable} of {count} frames can be read again (disk full?)")
    return count
