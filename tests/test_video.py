"""Videos: what is written can be read, at the same size and rate; broken files are refused in one line."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets.synthetic import generate_scene
from runtime import RunError, UserError
from video import VideoReader, write_video

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def drive(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    path = tmp_path_factory.mktemp("video") / "drive.mp4"
    frames = [np.array(generate_scene(i, 96, 72)[0]) for i in range(11)]
    assert write_video(path, iter(frames), (72, 96), 12.5) == 11
    return path, frames


def test_frames_come_back(drive):
    path, frames = drive
    video = VideoReader(path)
    assert video.size == (72, 96) and video.rate == 12.5 and video.count == 11
    for ours, frame in zip(video, frames, strict=True):
        assert np.abs(ours.astype(int) - frame).mean() < 12, "lossy, but the same picture with the same channels"


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_broken_videos_are_refused(drive, tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(drive[0].read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match="broken.mp4: cannot be read as a video"):
        VideoReader(path)


def test_a_failure_leaves_no_half_video(tmp_path):
    def frames():
        yield np.zeros((72, 96, 3), np.uint8)
        raise RuntimeError("the network failed")
    with pytest.raises(RuntimeError, match="network"):
        write_video(tmp_path / "out.mp4", frames(), (72, 96), 25)
    with pytest.raises(RunError):
        write_video(tmp_path / "nowhere" / "out.mp4", iter([]), (72, 96), 25)
    assert not list(tmp_path.iterdir())


def test_predict_writes_an_overlay_of_every_frame(drive, tmp_path):
    path, frames = drive
    command = [sys.executable, str(REPO / "predict.py"), "--image_dir", str(path), "--save_dir", str(tmp_path)]
    done = subprocess.run([*command, "--alpha", "0", "--batch_size", "3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    video = VideoReader(tmp_path / "drive_overlay.mp4")
    assert video.size == (72, 96) and video.rate == 12.5 and os.listdir(tmp_path) == ["drive_overlay.mp4"]
    for ours, frame in zip(video, frames, strict=True):  # in their order, with nothing laid over them
        assert np.abs(ours.astype(int) - frame).mean() < 16
    (tmp_path / "drive_overlay.mp4").unlink()
    refused = subprocess.run([*command, "--no-overlay"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
