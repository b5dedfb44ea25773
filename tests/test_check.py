import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS, PALETTE, compare_per_class, make_pair, save, write_csv
from PIL import Image

from datasets import check
from datasets.camvid import CamVidDataset
from datasets.classes import CAMVID, ClassSet
from runtime import UserError, run_command


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-path.stat().st_size // 3])


# Stem of a pair: what breaks its photo or mask; what is said of it; whether the names alone reveal it.
DEFECTS = {
    "missing": (lambda photo, label: label.unlink(), "train/missing.png: no mask", True),
    "extra": (lambda photo, label: photo.unlink(), "train_labels/extra.png: no photograph", True),
    "double": (lambda photo, label: Image.open(photo).save(photo.with_suffix(".jpg")), "double.jpg and doub", True),
    "twin": (lambda photo, label: Image.open(label).save(label.with_stem("twin_L")), "twin.png and twin_L.png", True),
    "jpeg": (lambda photo, label: label.rename(label.with_suffix(".jpg")), "train_labels/jpeg.jpg: JPEG", True),
    "disguised": (lambda photo, label: Image.open(label).save(label, "JPEG"), "train_labels/disguised.png", False),
    "narrow": (lambda photo, label: save(label, PALETTE[np.ones((12, 15), int)]), "narrow.png: .*15×12.*16×12", False),
    "turned": (lambda photo, label: save(label, PALETTE[np.ones((16, 12), int)]), "turned.png: .*12×16.*16×12", False),
    "empty": (lambda photo, label: photo.write_bytes(b""), "train/empty.png: cannot be read", False),
    "nothing": (lambda photo, label: label.write_bytes(b""), "train_labels/nothing.png: cannot be read", False),
    "half": (lambda photo, label: cut(photo), "train/half.png: cannot be read", False),
    "torn": (lambda photo, label: cut(label), "train_labels/torn.png: cannot be read", False),
    "folder": (lambda photo, label: (photo.unlink(), photo.mkdir()), "train/folder.png: cannot be read", False),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "broken"
    for stem in ("fine", *DEFECTS):
        pair = make_pair(root, stem)
        if stem in DEFECTS:
            DEFECTS[stem][0](*pair)
    for folder in ("train", "train_labels"):
        for name in (".hidden.png", "._fine.png", "Thumbs.db", "notes.txt"):
            (root / folder / name).write_text("neither photograph nor mask")
    return root


def test_all_problems_are_found_at_once(broken):
    with pytest.raises(UserError) as error:
        check.check_data(broken, ["train"], CAMVID)
    first, *problems = str(error.value).splitlines()
    assert f"{broken}: {len(DEFECTS)} problems" == first and len(problems) == len(DEFECTS)
    with pytest.raises(UserError) as error:
        CamVidDataset(broken, "train", CAMVID)  # what the names alone reveal
    assert set(str(error.value).splitlines()[1:]) < set(problems)


@pytest.mark.parametrize("stem", DEFECTS)
def test_each_problem_names_its_file(broken, stem):
    _, said, by_name = DEFECTS[stem]
    with pytest.raises(UserError, match=said):
        check.check_data(broken, ["train"], CAMVID)
    with pytest.raises(UserError) as error:
        CamVidDataset(broken, "train", CAMVID)
    assert (stem in str(error.value)) == by_name


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("behind", [False, True])
def test_quick_and_full_checks_agree(tmp_path, suffix, orientation, behind):
    """A tag may turn the photograph; in a PNG it stands before the pixels or behind them."""
    photo, _ = make_pair(tmp_path, "a", np.ones((12, 16) if orientation == 1 else (16, 12), int))
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(photo) as image:
        image.resize((16, 12)).save(photo.with_suffix(suffix), exif=exif)
    if suffix != ".png":
        photo.unlink()
    elif behind:
        data = photo.read_bytes()
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start:start + 4])
        photo.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    quick, full = (check.check_split(tmp_path, "train", CAMVID, quick=quick) for quick in (True, False))
    assert not quick.problems and quick.sizes == full.sizes == {(12, 16) if orientation == 1 else (16, 12): 1}


@pytest.mark.parametrize("strays", [3, 300])
def test_masks_of_few_and_of_many_colours_are_counted_alike(tmp_path, strays):
    ids = np.ones((200, 400), int)
    ids[1, :10] = 4
    _, label = make_pair(tmp_path, "a", ids)
    pixels = PALETTE[ids]
    pixels[0, :strays] = [(i % 256, 255, i // 256) for i in range(strays)]
    save(label, pixels)
    report = check.check_split(tmp_path, "train", CAMVID)
    assert report.pixels[[1, 4, 255]].tolist() == [79_990 - strays, 10, strays] and not report.problems
    assert report.pixels.sum() == 80_000 and report.stray == {"a.png": strays}


def test_problems_of_several_splits_come_together(tmp_path):
    for split in ("train", "val"):
        make_pair(tmp_path, f"{split}_good", split=split)
        make_pair(tmp_path, f"{split}_bad", split=split)[1].unlink()
    with pytest.raises(UserError, match="(?s)2 problems.*train_bad.*val_bad"):
        check.check_data(tmp_path, ["train", "val"], CAMVID)


def paint_stray(root: Path, count: int) -> tuple[Path, np.ndarray]:
    """A mask of 400 pixels, of which ``count`` are of two unknown colours (one of them once) -> path, its ids."""
    ids = np.random.default_rng(0).integers(1, 12, (20, 20))
    label, rgb = make_pair(root, "spotted", ids)[1], PALETTE[ids]
    rgb.reshape(-1, 3)[:count] = (1, 2, 3)
    rgb[0, 0] = (250, 251, 252)
    save(label, rgb)
    return label, compare_per_class(rgb, PALETTE)


def test_a_few_stray_pixels_become_void(tmp_path):
    label, ids = paint_stray(tmp_path, 4)  # exactly 1 %
    report = check.check_data(tmp_path, ["train"], CAMVID)["train"]
    line = check.stray_line(report)
    assert "4 pixels" in line and "spotted.png" in line and "\n" not in line
    assert check.describe(report, CAMVID).count("spotted.png") == 1
    mask = CamVidDataset(tmp_path, "train", CAMVID)[0][1]
    assert (mask == np.where(ids == 255, 0, ids)).all() and (mask == 0).sum() == 4
    own = ClassSet(CAMVID.names, CAMVID.colors)  # where nothing is ignored, void is no class
    assert (CamVidDataset(tmp_path, "train", own)[0][1] == ids).all()


def test_more_than_one_percent_of_unknown_colours_is_an_error(tmp_path):
    label, _ = paint_stray(tmp_path, 5)
    with pytest.raises(UserError) as error:
        check.check_data(tmp_path, ["train"], CAMVID)
    message = str(error.value).replace(" ", "")
    assert str(label) in message and "1.2%" in message
    assert "(1,2,3)×4,(250,251,252)×1" in message  # the frequent one first


def test_ids_painted_as_colours_are_explained(tmp_path):
    photo, label = make_pair(tmp_path, "a")
    save(label, np.random.default_rng(0).integers(0, 12, (12, 16), dtype=np.uint8))
    with pytest.raises(UserError, match="--label_format ids"):
        check.check_data(tmp_path, ["train"], CAMVID)


@pytest.mark.parametrize("value, wrong", [(255, False), (11, False), (12, True), (200, True)])
def test_unknown_ids(tmp_path, value, wrong):
    """255 is the customary void of id masks, as often as it likes; any other id beyond the classes is an error."""
    _, label = make_pair(tmp_path, "a")
    save(label, np.where(np.arange(192).reshape(12, 16) < 100, value, 1).astype(np.uint8))
    if wrong:
        with pytest.raises(UserError, match=f"a.png.*{value}.*100"):
            check.check_data(tmp_path, ["train"], CAMVID, "ids")
    else:
        report = check.check_data(tmp_path, ["train"], CAMVID, "ids")["train"]
        assert report.pixels[value] == 100 and report.pixels[1] == 92


def run_check(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "datasets.check", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(check.__file__).parents[1])


def test_command_on_good_data(scenes):
    done = run_check("--data_root", scenes)
    assert done.returncode == 0 and done.stderr == ""
    for said in ("train: 4 pairs", "val: 2 pairs", "test: 2 pairs", "96×72 (4)", "0 problems", *COLORS):
        assert said in done.stdout
    masks = np.concatenate([np.array(Image.open(path)) for path in sorted((scenes / "train_labels").iterdir())])
    share = (compare_per_class(masks, PALETTE) == 4).mean()
    assert f"{share:.2%}" in next(line for line in done.stdout.splitlines() if "Road" in line)


def test_command_on_bad_data(broken):
    done = run_check("--data_root", broken)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{len(DEFECTS)} problems" in done.stdout and "train: " in done.stdout
    assert all(stem in done.stdout for stem in DEFECTS)


@pytest.mark.parametrize("flags, said", [
    ([], "--data_root"), (["--data_root", "no/such"], "no/such"), (["--data_root", __file__], "no such folder"),
    (["--data_root", "{empty}"], "train_labels"), (["--data_root", "{scenes}", "--ignore_class", "Moon"], "Moon"),
    (["--data_root", "{scenes}", "--num_classes", "7"], "--num_classes 7"),
    (["--data_root", "{scenes}", "--num_classes", "x"], "--num_classes"),
    (["--data_root", "{scenes}", "--label_format", "hsv"], "--label_format"),
    (["--data_root", "{csv}"], "class_dict.csv"), (["--data_rot", "{scenes}"], "--data_rot")])
def test_bad_flags_end_in_one_line(scenes, tmp_path, monkeypatch, capsys, flags, said):
    (tmp_path / "csv").mkdir()
    (tmp_path / "empty").mkdir()
    write_csv(tmp_path / "csv", {"one": (300, 0, 0)})
    places = {"scenes": scenes, "csv": tmp_path / "csv", "empty": tmp_path / "empty"}
    monkeypatch.setattr(sys, "argv", ["check", *(flag.format(**places) for flag in flags)])
    try:
        status = run_command(check.main, check.get_args_parser())
    except SystemExit as end:  # argparse
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and said in err and err.count("\n") == 1
