"""Videos and the other inputs of predict.py: what is found, and what an overlay video shows."""

from pathlib import Path

import numpy as np
import pytest
from conftest import opened

from datasets.synthetic import generate_scene
from inference.checkpoints import SHIPPED, load_predictor
from inference.sources import find_inputs, output_names
from inference.video import VideoReader, write_video
from support.command import UserError


@pytest.fixture
def drive(tmp_path):
    """The frames of a video, which is in drive.mp4."""
    frames = [np.array(generate_scene(i, 96, 72)[0]) for i in range(11)]
    write_video(tmp_path / "drive.mp4", iter(frames), 12.5)
    return frames


def test_a_video_becomes_a_video_of_the_same_size_and_rate_that_browsers_play(drive, call):
    """At opacity 0 the overlays show the video's own frames, but for what compression loses."""
    assert call("predict.py", "--image_dir", "drive.mp4", "--save_dir", "out", "--alpha", 0)[0] == 0
    for path in (Path("drive.mp4"), Path("out/drive_overlay.mp4")):
        video = VideoReader(path)
        assert (video.first.shape, video.rate, video.count) == ((72, 96, 3), 12.5, 11)
        assert b"vp09" in path.read_bytes()
        for shown, frame in zip(video, drive, strict=True):
            assert np.abs(shown.astype(int) - frame).mean() < 16


def test_a_pattern_of_videos_gives_the_masks_of_their_frames(drive, tmp_path, call):
    """A broken one is named, and the others are predicted."""
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    command = "predict.py --image_dir *.mp4 --save_dir out --save_masks --mask_format ids --amp off"
    status, _, err = call(*command.split(), "--checkpoint", SHIPPED)
    assert status == 1 and "broken.mp4" in err
    names = {path.relative_to("out").as_posix() for path in Path("out").glob("**/[!.]*.*")}
    masks = {f"drive_masks/{i:06}_mask.png" for i in range(11)}
    assert names == masks | {"drive_overlay.mp4"}
    frame = list(VideoReader(Path("drive.mp4")))[7]
    mask = opened(Path("out/drive_masks/000007_mask.png"))
    assert mask.mode == "L"
    np.testing.assert_array_equal(mask, load_predictor(SHIPPED)[0].predict(frame))


@pytest.mark.parametrize("size", [0, 2000])
def test_broken_videos_are_refused(drive, tmp_path, size):
    path = tmp_path / "broken.mp4"
    path.write_bytes((tmp_path / "drive.mp4").read_bytes()[:size])
    with pytest.raises(UserError, match="broken.mp4"):
        VideoReader(path)


@pytest.mark.parametrize(
    "given, found, left_out",
    [
        ("photos", "a.png b.JPG drive.mp4", ".heic 20 photos/**"),
        ("photos/*", "a.png b.JPG drive.mp4", ".heic 20"),
        ("photos/a.png photos/b.JPG", "a.png b.JPG", ""),
        ("photos/**", "a.png b.JPG deep/c.png drive.mp4", ".heic 20"),
        ("photos/drive.mp4", "drive.mp4", ""),
    ],
)
def test_folders_files_and_patterns_give_images_and_a_line_on_the_rest(
    tmp_path, monkeypatch, given, found, left_out
):
    monkeypatch.chdir(tmp_path)
    Path("photos/deep").mkdir(parents=True)
    files = "a.png b.JPG .hidden.png deep/c.png drive.mp4 d.heic notes.txt"
    monkeypatch.setattr("inference.sources.LONGEST_NAME", 20)
    too_long = "e" * 20 + ".png"  # its mask could not be written
    for name in [*files.split(), too_long]:
        Path("photos", name).touch()
    images, videos, line = find_inputs(given.split())
    assert [path.relative_to("photos").as_posix() for path in images + videos] == found.split()
    assert all(path.suffix == ".mp4" for path in videos)
    assert all(name in line for name in left_out.split())
    assert bool(line) == bool(left_out)


def test_outputs_of_images_of_one_name_are_told_apart_by_their_folders():
    assert output_names([Path("b/../a/1.png"), Path("b/1.png")]) == ["a_1_png", "b_1_png"]
