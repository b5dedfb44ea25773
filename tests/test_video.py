"""Videos: what is written can be read, at the same size and rate; broken files are refused in one line."""
from pathlib import Path

import numpy as np
import pytest

from datasets.synthetic import generate_scene
from inference.video import VideoReader, write_video
from support.command import RunError, UserError


@pytest.fixture(scope="module")
def drive(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    path = tmp_path_factory.mktemp("video") / "drive.mp4"
    frames = [np.array(generate_scene(i, 96, 72)[0]) for i in range(11)]
    assert write_video(path, iter(frames), (72, 96), 12.5) == 11
    return path, frames


def test_predict_writes_an_overlay_of_every_frame(drive, tmp_path, call):
    """At opacity 0, so that both videos show the same frames but for what compression loses."""
    predict = "predict.py", "--image_dir", drive[0], "--save_dir", "out", "--alpha", 0, "--batch_size", 3
    status, _, err = call(*predict, "--no-overlay")
    assert status == 2 and err.count("\n") == 1 and not list(tmp_path.rglob("*.mp4"))
    status, out, _ = call(*predict)
    assert status == 0 and "11 frames at 12.5 a second" in out and len(list((tmp_path / "out").iterdir())) == 1
    for path, difference in ((drive[0], 12), (tmp_path / "out" / "drive_overlay.mp4", 16)):
        video = VideoReader(path)
        assert video.size == (72, 96) and video.rate == 12.5 and video.count == 11
        for ours, frame in zip(video, drive[1], strict=True):
            assert np.abs(ours.astype(int) - frame).mean() < difference


@pytest.mark.parametrize("content", [b"no video", None])
def test_broken_videos_are_refused(drive, tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content or drive[0].read_bytes()[:2000])
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
