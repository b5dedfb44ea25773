"""What masks hold: colours, blends of them, or ids; and the classes if no file names them."""

import io

import numpy as np
import pytest
from conftest import PALETTE, describe, opened, save, write_csv
from PIL import Image

from datasets.classes import CAMVID, ClassSet
from datasets.masks import detect_format, find_stray, read_mask, survey_masks
from support.command import UserError

THREE = {"sky": (0, 0, 0), "road": (128, 64, 128), "car": (64, 0, 128)}
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def draw(number: int = 0) -> np.ndarray:
    """(90, 120) ids: 0 above, 1 below, 2 a disc of another size in each."""
    y, x = np.mgrid[:90, :120]
    ids = (y > 40 + number).astype(np.uint8)
    ids[(y - 45) ** 2 + (x - 60) ** 2 < (12 + 3 * number) ** 2] = 2
    return ids


def colored(ids: np.ndarray, colors) -> Image.Image:
    return Image.fromarray(np.array(colors, np.uint8)[ids])


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def softened(image: Image.Image) -> Image.Image:
    large = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR)
    return large.resize(image.size, Image.Resampling.BILINEAR)


def make_data(root, paint, count=4):
    """A data folder whose masks are what ``paint`` makes of `draw`; returns the masks' paths."""
    paths = []
    for i in range(count):
        save(root / "images" / f"{i}.png", np.dstack([draw(i)] * 3))
        paths.append(root / "masks" / f"{i}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        paint(draw(i)).save(paths[-1])
    return paths


BLENDS = {
    "soft edges": softened,
    "JPEG, quality 95": lambda image: as_jpeg(image, 95),
    "JPEG, quality 60": lambda image: as_jpeg(image, 60),
    "half the size": lambda image: image.resize((60, 45), Image.Resampling.BICUBIC),
}


@pytest.mark.parametrize("colors", [[*THREE.values()], [BLACK, WHITE, (255, 0, 0)]], ids=["a", "b"])
@pytest.mark.parametrize("blend", BLENDS)
def test_blended_colours_take_the_nearest_colour(tmp_path, blend, colors):
    paths = make_data(tmp_path, lambda ids: BLENDS[blend](colored(ids, colors)))
    classes = ClassSet(("sky", "road", "car"), tuple(colors))
    survey = survey_masks(paths)
    assert detect_format(survey, classes) == "nearest"
    assert len(survey.flat_colors()) == 3
    ids = read_mask(paths[0], classes, "nearest")
    expected = draw(0) if blend != "half the size" else draw(0)[::2, ::2]
    assert (ids != expected).mean() < 0.06
    stray, blended = find_stray(paths[0], classes, "nearest", ids)
    assert blended > 20 * stray.total()


@pytest.mark.parametrize("missing", range(3))
@pytest.mark.parametrize("blend", [lambda image: image, softened])
def test_a_class_that_the_table_lacks_is_no_blend(tmp_path, missing, blend):
    """Even (64, 64, 64), halfway between two other classes."""
    colors = [(0, 0, 0), (128, 128, 128), (64, 64, 64)]
    paths = make_data(tmp_path, lambda ids: blend(colored(ids, colors)))
    del colors[missing]
    assert detect_format(survey_masks(paths), ClassSet(("a", "b"), tuple(colors))) != "nearest"


def test_thin_classes_are_listed_although_they_have_no_area(tmp_path):
    """Such as cracks and lane markings on a road."""
    ids = np.zeros((90, 120), int)
    ids[::30] = 1
    ids[:, ::40] = 2
    paths = make_data(tmp_path, lambda _: colored(ids, [BLACK, (0, 200, 0), WHITE]))
    assert {*survey_masks(paths).flat_colors()} == {0x000000, 0x00C800, 0xFFFFFF}


def test_masks_are_ids_only_if_colours_do_not_explain_them(tmp_path):
    """Softened black and white, or a palette in another order than the table."""
    disc = Image.fromarray((draw() > 1) * np.uint8(255))
    softened(disc).save(tmp_path / "soft.png")
    classes = ClassSet(("ground", "tree"), (BLACK, WHITE))
    assert detect_format(survey_masks([tmp_path / "soft.png"]), classes) == "nearest"
    palette = Image.fromarray(np.where(draw() > 1, 255, draw()))
    palette.putpalette([*BLACK, 255, 0, 0] + [0, 200, 0] * 254)
    palette.save(tmp_path / "palette.png")
    classes = ClassSet(("tree", "ground", "car"), ((0, 200, 0), BLACK, (255, 0, 0)))
    assert detect_format(survey_masks([tmp_path / "palette.png"]), classes) == "rgb"


# What the masks of images without a table hold -> the classes, or the rows of the table to paste.
UNNAMED = {
    "ids": (lambda ids: Image.fromarray(ids), ClassSet.numbered(3)),
    "ids from 1": (lambda ids: Image.fromarray(ids + 1), ClassSet.numbered(4)),
    "ids and 255": (
        lambda ids: Image.fromarray(np.where(ids == 2, 255, ids)),
        ClassSet.numbered(2),
    ),
    "ids in RGB": (lambda ids: Image.fromarray(np.dstack([ids] * 3)), ClassSet.numbered(3)),
    "100 ids": (
        lambda ids: Image.fromarray((np.arange(90 * 120) // 108).reshape(90, 120).astype(np.uint8)),
        ClassSet.numbered(100),
    ),
    "CamVid": (
        lambda ids: Image.fromarray(PALETTE[np.arange(ids.size).reshape(ids.shape) // 900]),
        CAMVID,
    ),
    "few of CamVid": (lambda ids: Image.fromarray(PALETTE[ids]), 3),
    "own colours": (lambda ids: colored(ids, [BLACK, WHITE, (255, 0, 0)]), 3),
    "black and white": (lambda ids: Image.fromarray((ids > 0) * np.uint8(255)), 2),
    "grey colours": (lambda ids: Image.fromarray(ids * np.uint8(100)), 3),
    "soft edges": (lambda ids: softened(Image.fromarray((ids > 0) * np.uint8(255))), 2),
    "palette": (lambda ids: Image.fromarray(ids).convert("P"), 3),
}


def test_255_is_not_ignored_where_it_is_half_of_the_masks(tmp_path):
    """Black and white with a stray pixel of 1."""
    for i, path in enumerate(make_data(tmp_path, lambda ids: Image.fromarray(ids))):
        mask = (draw(i) > 0) * np.uint8(255)
        mask[0, 0] = 1
        save(path, mask)
    with pytest.raises(UserError, match="class_dict.csv"):
        describe(tmp_path)


@pytest.mark.parametrize("kind", UNNAMED)
def test_without_names_classes_are_assumed_only_if_they_are_sure(tmp_path, kind):
    """The lines of the sentence are a table that can be pasted, and then the masks are read."""
    paint, expected = UNNAMED[kind]
    make_data(tmp_path, paint)
    if isinstance(expected, ClassSet):
        assert describe(tmp_path).classes == expected
        return
    with pytest.raises(UserError) as error:
        describe(tmp_path)
    _, *lines = map(str.strip, str(error.value).splitlines())
    (tmp_path / "class_dict.csv").write_text("\n".join(lines))
    data = describe(tmp_path)
    reports = data.check(["train", "val"])
    assert not data.problems(reports)
    assert len(data.classes) == expected


def test_a_table_of_ids_masks_can_be_written_and_named(tmp_path, call):
    make_data(tmp_path, Image.fromarray)
    assert call("datasets.check", "--data_root", tmp_path, "--write_classes")[0] == 0
    table = tmp_path / "class_dict.csv"
    table.write_text(table.read_text().replace("class 2", "car"))
    data = describe(tmp_path)
    assert data.classes.names == ("Background", "class 1", "car")
    np.testing.assert_array_equal(data.dataset("train")[0][1], draw(0))


def test_a_table_may_lie_elsewhere(tmp_path, call):
    make_data(tmp_path / "data", lambda ids: colored(ids, [*THREE.values()]))
    table = tmp_path / "mine.csv"
    flags = ("datasets.check", "--data_root", tmp_path / "data", "--classes", table)
    assert call(*flags, "--write_classes")[0] == 0
    assert call(*flags)[0] == 0
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"images", "masks"}


def test_rows_of_equal_names_are_one_class_in_masks_of_colours_and_of_ids(tmp_path):
    """And several rows may be ignored."""
    rows = "name,r,g,b\nVoid,9,9,9\nroad,1,1,100\ncar,2,2,200\ncar,3,3,30\nunlabelled,4,4,40\n"
    (tmp_path / "class_dict.csv").write_text(rows)
    classes = ClassSet.from_file(tmp_path / "class_dict.csv")
    assert classes.names == ("Void", "road", "car") and classes.ignore_index == 0
    colors = [(9, 9, 9), (1, 1, 100), (2, 2, 200), (3, 3, 30), (4, 4, 40)]
    values = np.arange(5, dtype=np.uint8)[None]
    for label_format, image in (("rgb", colored(values, colors)), ("ids", Image.fromarray(values))):
        image.save(tmp_path / "mask.png")
        ids = read_mask(tmp_path / "mask.png", classes, label_format)
        assert ids.tolist() == [[0, 1, 2, 2, 0]]


def test_black_and_white_masks_with_a_table_are_colours_and_0_and_1_are_ids(tmp_path):
    table = write_csv(tmp_path, {"soil": BLACK, "plant": WHITE})
    masks = draw() > 0
    for high, label_format in ((255, "rgb"), (1, "ids")):
        path = save(tmp_path / f"{high}.png", masks * np.uint8(high))
        assert detect_format(survey_masks([path]), ClassSet.from_file(table)) == label_format


@pytest.mark.parametrize("drop", [None, "Building", "Car"])
@pytest.mark.parametrize("quality", [None, 90])
def test_real_masks_are_told_from_blended_ones(camvid, tmp_path, drop, quality):
    names = [name for name in CAMVID.names if name != drop]
    colors = tuple(CAMVID.colors[CAMVID.names.index(name)] for name in names)
    paths = sorted((camvid / "val_labels").iterdir())[::20]
    if quality:
        for path in paths:
            as_jpeg(opened(path).convert("RGB"), quality).save(tmp_path / path.name)
        paths = sorted(tmp_path.iterdir())
    survey = survey_masks(paths)
    classes = ClassSet(tuple(names), colors, 0)
    assert bool(survey.strange_colors(classes)) == bool(drop)
    assert drop or detect_format(survey, classes) == ("nearest" if quality else "rgb")
