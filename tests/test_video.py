"""Videos: what is written plays in a browser and can be read, at the same size and rate; what is left out is said."""
import html
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import save

from datasets.synthetic import generate_scene
from inference.sources import output_names
from inference.video import VideoReader, write_video
from support.command import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# The page is loaded when the video's first frame is decoded, or cannot be.
PLAY = """<!DOCTYPE html><video src="VIDEO" preload="auto"></video><script>
const video = document.querySelector("video");
onload = () => document.body.append("SEEN" + JSON.stringify([video.readyState >= 2, video.error, video.videoWidth,
                                                             video.videoHeight, video.duration]) + "SEEN");
</script>"""


@pytest.fixture(scope="module")
def drive(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    path = tmp_path_factory.mktemp("video") / "drive.mp4"
    frames = [np.array(generate_scene(i, 96, 72)[0]) for i in range(11)]
    assert write_video(path, iter(frames), (72, 96), 12.5) == 11
    return path, frames


def test_predict_writes_an_overlay_of_every_frame(drive, tmp_path, call):
    """At opacity 0, so that both videos show the same frames but for what compression loses."""
    predict = "predict.py", "--image_dir", drive[0], "--save_dir", "out", "--alpha", 0, "--batch_size", 3
    for flags in (["--no-overlay"], ["--report", "page"], ["--skip_existing"]):
        status, _, err = call(*predict, *flags)
        assert status == 2 and err.count("\n") == 1 and flags[0] in err and not list(tmp_path.iterdir())
    status, out, _ = call(*predict)
    assert status == 0 and "11 frames at 12.5 a second\n" in out
    assert len(list((tmp_path / "out").glob("[!.]*"))) == 1
    for path, difference in ((drive[0], 12), (tmp_path / "out" / "drive_overlay.mp4", 16)):
        video = VideoReader(path)
        assert video.size == (72, 96) and video.rate == 12.5 and video.count == 11 and b"vp09" in path.read_bytes()
        for ours, frame in zip(video, drive[1], strict=True):
            assert np.abs(ours.astype(int) - frame).mean() < difference


@pytest.mark.parametrize("missing, status", [(12, 0), (13, 1)])
def test_a_video_that_ends_a_second_early_is_cut_short(drive, call, monkeypatch, missing, status):
    class Longer(VideoReader):
        def __init__(self, path: Path):
            super().__init__(path)
            self.count += missing

    monkeypatch.setattr("inference.video.VideoReader", Longer)
    found, _, err = call("predict.py", "--image_dir", drive[0], "--save_dir", "out")
    assert found == status and ("announces 24 frames; it may be cut short" in err) == bool(status)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_plays_it(drive, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(PLAY.replace("VIDEO", str(drive[0])))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"],
                          capture_output=True, text=True, timeout=120)
    assert json.loads(html.unescape(done.stdout.split("SEEN")[-2])) == [True, None, 96, 72, pytest.approx(11 / 12.5)]


def test_what_is_left_out_is_said_in_one_line(scenes, tmp_path, call, monkeypatch):
    """A video, photographs of a phone, images in subfolders; the shell's list of files is as good as a pattern."""
    photos, scene = tmp_path / "photos", min((scenes / "test").iterdir())
    for name in ("a.png", "b c.png", ".hidden.png", "deep/d.png", "deep/.hidden.png", "[1]/a.png", "[1]/deep/a.png"):
        save(photos / name, np.zeros((12, 16, 3), np.uint8))
    for name in ("drive.mp4", "IMG_1.HEIC", "IMG_2.heic", "notes.txt"):
        (photos / name).write_bytes(b"")
    left = "left out: 1 .mp4 (give a video by its name), 2 .heic (not read; convert to JPEG or PNG)"
    deeper = ", 2 images in subfolders (give 'photos/**')"
    for paths, said, count in ((["photos"], left + deeper + "\n", 2), (["photos/*"], left + "\n", 2),
                               (["photos/a.png", "photos/b c.png"], "", 2), (["photos/**"], left + "\n", 5),
                               (["photos/.hidden.png", "photos/a.png"], "", 2),
                               (["photos", "photos/deep", "photos/[1]"],
                                left + ", 1 image in subfolders (give 'photos/[[]1]/**')\n", 4),
                               (["photos/[[]1]/**"], "", 2),
                               (["photos/[1]"], "left out: 1 image in subfolders (give 'photos/[[]1]/**')\n", 1),
                               (["photos/a.png", str(scene)], "", 2), (["photos/a*", "photos/deep"], "", 2)):
        status, out, err = call("predict.py", "--image_dir", *paths, "--save_dir", "out")
        assert status == 0 and err == said and f"on {count} image{'s' * (count != 1)}\n" in out, paths
    status, _, err = call("predict.py", "--image_dir", "photos/a.png", "photos/notes.txt")
    assert status == 0 and err == "left out: photos/notes.txt (of an unknown kind; give it alone)\n"
    for path in ("photos/*.mp4", "photos/*.HEIC", "photos/*.txt"):
        status, _, err = call("predict.py", "--image_dir", path)
        assert status == 2 and "no images in it" in err and ("left out: 1" in err) == (path[-1] != "t")


def test_outputs_of_one_name_are_told_apart_by_their_folders_however_these_are_typed():
    assert output_names([Path("b/../a/1.png"), Path("b/1.png")]) == ["a_1_png", "b_1_png"]


@pytest.mark.parametrize("content", [b"no video", None])
def test_broken_videos_are_refused(drive, tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content or drive[0].read_bytes()[:2000])
    with pytest.raises(UserError, match="broken.mp4: cannot be read as a video"):
        VideoReader(path)
