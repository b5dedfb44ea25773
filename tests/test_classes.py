"""Class sets: CamVid's, those of a class_dict.csv, and the conversion of colours to ids."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import COLORS, COLORS32, MERGED, OTHER_COPIES, compare_per_class, write_csv

from datasets.classes import CAMVID, CAMVID32, CITYSCAPES, ClassSet
from support.command import UserError

GARDEN = "name,r,g,b\nGrass,0,200,0\nStone,90,90,90\nVoid,0,0,0\n"


def test_camvid_has_twelve_classes_and_accepts_34_colours():
    accepted = {color: name for name, color in COLORS.items()} | OTHER_COPIES
    for into, colors in MERGED.items():
        accepted |= dict.fromkeys(colors.values(), into)
    assert CAMVID.names == tuple(COLORS) and CAMVID.colors == tuple(COLORS.values())
    assert CAMVID.ignore_index == 0 and CAMVID.scored == [*range(1, 12)]
    assert len(accepted) == len(CAMVID.colors) + len(CAMVID.aliases) == 34
    ids = CAMVID.to_ids(np.array([[*accepted]], np.uint8))[0]
    assert [CAMVID.names[i] for i in ids] == [*accepted.values()]


def test_camvid32_keeps_the_32_classes_apart():
    """In this order, which checkpoints hold."""
    assert ClassSet(("Void", *[*COLORS32][1:]), tuple(COLORS32.values()), 0) == CAMVID32


@pytest.mark.parametrize("classes", [CAMVID, CAMVID32, ClassSet.numbered(255)], ids=len)
def test_colours_become_ids_and_back(classes):
    """Near the classes' colours are others, and a BGR mask must not pass for an RGB one."""
    rng = np.random.default_rng(0)
    known = np.array(classes.colors)[rng.integers(0, len(classes), 400)]
    shifted = known + rng.integers(-1, 2, (400, 3))
    rgb = np.concatenate([known, known[:, ::-1], shifted]).clip(0, 255).astype(np.uint8)[None]
    expected = compare_per_class(rgb, classes.colors)
    for color, class_id in classes.aliases:
        expected[(rgb == color).all(-1)] = class_id
    ids = classes.to_ids(rgb)
    np.testing.assert_array_equal(ids, expected)
    assert ids.dtype == np.uint8 and 255 in ids
    np.testing.assert_array_equal(classes.to_rgb(ids[:, :400]), known[None])
    assert not classes.to_rgb(ids[ids == 255]).any(), "ids outside the set are black"
    restored = ClassSet.from_dict(classes.to_dict())
    assert restored == replace(classes, aliases=())


@pytest.mark.parametrize(
    "text",
    [
        GARDEN,
        "\ufeff" + GARDEN,
        GARDEN.replace("\n", "\r\n\r\n"),
        GARDEN.replace(",", " , "),
        GARDEN.replace("Void,0", '"Void", "0"'),
        "id,b,g,r,name\n7,0,200,0,Grass\n8,90,90,90,Stone\n9,0,0,0,Void",
        "id,name,r,g,b\n2,Void,0,0,0\n0,Grass,0,200,0\n1,Stone,90,90,90\n",
    ],
)
def test_a_class_dict_may_be_written_in_several_ways(tmp_path, text):
    (tmp_path / "class_dict.csv").write_bytes(text.encode())
    expected = ClassSet(("Grass", "Stone", "Void"), ((0, 200, 0), (90,) * 3, (0,) * 3), 2)
    assert ClassSet.from_file(tmp_path / "class_dict.csv") == expected


@pytest.mark.parametrize(
    "name, ignore_index", [("void", 1), ("UNLABELLED", 1), ("Unlabeled", 1), ("Avoid", 255)]
)
def test_a_class_is_ignored_by_its_name(tmp_path, name, ignore_index):
    classes = ClassSet.from_file(write_csv(tmp_path, {"Road": (1, 1, 1), name: (0, 0, 0)}))
    assert classes.ignore_index == ignore_index


@pytest.mark.parametrize(
    "text, wrong_lines",
    [
        ("name,r,g,b\na,1,2,256\nb,-1,5,6\nc,4,5\nd,4,5,²\n,4,5,6\n", [2, 3, 4, 5, 6]),
        ("name,r,g,b\na,1,2,3\na,7,8,9\nb,1,2,3\n", [4]),  # a colour twice
        ("name,r,g,b\na,1,2,3\n", []),
        ("name,r,g\na,1,2\nb,1,3\n", []),
        ("", []),
    ],
)
def test_a_wrong_class_dict_is_refused_with_every_wrong_line(tmp_path, text, wrong_lines):
    path = tmp_path / "class_dict.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"\A.*class_dict.csv: .*\Z") as error:
        ClassSet.from_file(path)
    assert [i for i in range(2, 9) if f"line {i}" in str(error.value)] == wrong_lines


# A file's name, what is in it, the colours of the classes sky and road, and of what is ignored.
FORMS = {
    "label_colors.txt": ("1 2 3 sky\n4  5\t6\troad\n7 8 9 Void", 3),
    "labelmap.txt": (
        "# label:color:parts:actions\nsky:1,2,3::\nroad:4, 5, 6:a,b:c\nvoid:7,8,9::",
        3,
    ),
    "_classes.csv": ("Pixel Value, Class\n2, Void\n0, sky\n1, road\n", 0),
    "codes.txt": ("sky\nroad\n\nUnlabeled", 0),
    "class_names.txt": ("__ignore__\nsky\nroad\nVoid\n", 0),
    "labelmap": ("sky:::\nroad:::\nvoid:::", 0),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_files_of_labelling_tools_name_classes(tmp_path, name):
    """Without colours, classes have those of Pascal VOC."""
    text, last = FORMS[name]
    (tmp_path / name).write_text(text)
    classes = ClassSet.from_file(tmp_path / name)
    assert classes.names[:2] == ("sky", "road") and classes.ignore_index == 2
    expected = ((1, 2, 3), (4, 5, 6), (7, 8, 9)) if last else ClassSet.numbered(3).colors
    assert classes.colors == expected
    assert ((224, 224, 192) in classes.known_colors) == (not last), "VOC's border, the id 255"


def test_cityscapes_has_19_classes_and_ignores_the_other_colours():
    assert CITYSCAPES.names[:2] == ("road", "sidewalk") and len(CITYSCAPES.scored) == 19
    colors = np.array([[(0, 0, 142), (119, 11, 32), (111, 74, 0), (1, 2, 3)]], np.uint8)
    assert CITYSCAPES.to_ids(colors).tolist() == [[13, 18, 255, 255]]
    assert (111, 74, 0) in CITYSCAPES.known_colors and (1, 2, 3) not in CITYSCAPES.known_colors


def test_the_32_colours_of_kaggles_copy_are_camvid_in_any_order_and_31_are_not(tmp_path):
    rows = sorted(COLORS32.items(), reverse=True)
    assert ClassSet.from_file(write_csv(tmp_path, dict(rows))) == CAMVID
    assert len(ClassSet.from_file(write_csv(tmp_path, dict(rows[1:])))) == 31


def test_numbered_classes_have_the_colours_of_pascal_voc():
    expected = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert ClassSet.numbered(5).colors == expected
