import timeit

import numpy as np
import pytest
from conftest import COLORS, COLORS32, MERGED, OTHER_COPIES, PALETTE, compare_per_class, write_csv

from datasets.classes import CAMVID, CAMVID32, ClassSet
from support.command import UserError

ACCEPTED = ({color: name for name, color in COLORS.items()} | OTHER_COPIES
            | {color: into for into, colors in MERGED.items() for color in colors.values()})
THREE = "name,r,g,b\nGrass,0,200,0\nStone,90,90,90\nVoid,0,0,0\n"
SETS = pytest.mark.parametrize("classes", [CAMVID, CAMVID32, ClassSet.numbered(5), ClassSet.numbered(255)],
                               ids=["camvid", "camvid32", "numbered5", "numbered255"])


def from_text(folder, text: str | bytes) -> ClassSet:
    path = folder / "class_dict.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ClassSet.from_csv(path)


def test_the_twelve_classes_and_every_accepted_color():
    assert (CAMVID.names, CAMVID.colors) == (tuple(COLORS), tuple(COLORS.values()))
    assert (len(CAMVID), CAMVID.ignore_index, CAMVID.void_id, CAMVID.scored) == (12, 0, 0, list(range(1, 12)))
    assert {*CAMVID.colors, *(color for color, _ in CAMVID.aliases)} == set(ACCEPTED) and len(ACCEPTED) == 34
    ids = CAMVID.to_ids(np.array([[*ACCEPTED]], np.uint8))[0]
    assert [CAMVID.names[i] for i in ids] == [*ACCEPTED.values()]
    assert (CAMVID.to_rgb(np.array([12, 200, 255])) == 0).all()  # ids outside the set are black


def test_camvid32_keeps_all_32_apart():
    assert (len(CAMVID32), CAMVID32.colors[0], CAMVID32.ignore_index) == (32, (0, 0, 0), 0)
    assert CAMVID32.names == ("Void", *list(COLORS32)[1:])  # checkpoints hold this order
    assert CAMVID32.to_ids(np.array([[*COLORS32.values()]], np.uint8)).tolist() == [list(range(32))]


@SETS
def test_unknown_colors_are_255(classes):
    known = {*classes.colors, *(color for color, _ in classes.aliases)}
    near = {tuple(np.clip(np.add(color, step), 0, 255)) for color in known for step in np.eye(3, dtype=int)}
    swapped = {color[::-1] for color in known}  # a BGR mask must not pass for an RGB one
    unknown = sorted((near | swapped | {(255, 255, 255), (1, 2, 3)}) - known)
    ids = classes.to_ids(np.array([unknown], np.uint8))
    assert ids.dtype == np.uint8 and len(unknown) > 10 and (ids == 255).all()


@SETS
@pytest.mark.parametrize("shape", [(37, 53), (1, 1), (3, 200)])
def test_round_trip_agrees_with_a_comparison_per_class(classes, shape):
    ids = np.random.default_rng(0).integers(0, len(classes), shape).astype(np.uint8)
    rgb = classes.to_rgb(ids)
    assert rgb.dtype == np.uint8 and (rgb == np.array(classes.colors)[ids]).all()
    assert (compare_per_class(rgb, classes.colors) == ids).all() and (classes.to_ids(rgb) == ids).all()


def test_to_ids_looks_up_instead_of_comparing():
    rgb = CAMVID.to_rgb(np.random.default_rng(0).integers(0, 12, (360, 480)))
    ours, slow = (min(timeit.repeat(function, number=1, repeat=5)) for function in (
        lambda: CAMVID.to_ids(rgb), lambda: compare_per_class(rgb, PALETTE)))
    assert ours < slow / 8


@pytest.mark.parametrize("text", [
    THREE, "\ufeff" + THREE, THREE.replace("\n", "\r\n"), THREE.replace(",", " , "), THREE.rstrip("\n"),
    THREE.replace("name,r,g,b", "Name,R,G,B"), THREE.replace("\n", "\n\n"),
    THREE.replace("Void,0", '"Void", "0"'), "id,b,g,r,name\n7,0,200,0,Grass\n8,90,90,90,Stone\n9,0,0,0,Void\n",
], ids=["plain", "bom", "crlf", "spaces", "no last newline", "upper case", "blank lines", "quoted", "other columns"])
def test_from_csv(tmp_path, text):
    expected = ClassSet(("Grass", "Stone", "Void"), ((0, 200, 0), (90, 90, 90), (0, 0, 0)), ignore_index=2)
    classes = from_text(tmp_path, text)
    assert classes == expected and classes.scored == [0, 1]
    assert classes.to_ids(np.array([[(0, 200, 0), (128, 128, 128)]], np.uint8)).tolist() == [[0, 255]]


@pytest.mark.parametrize("name, ignored", [
    ("Void", 1), ("void", 1), ("UNLABELLED", 1), ("Unlabeled", 1), ("Background", None), ("Avoid", None)])
def test_from_csv_ignores_by_name_alone(tmp_path, name, ignored):
    classes = ClassSet.from_csv(write_csv(tmp_path, {"Road": (1, 1, 1), name: (0, 0, 0)}))
    assert (classes.ignore_index, classes.void_id) == (ignored, 255 if ignored is None else 1)


@pytest.mark.parametrize("text, said", [
    ("name,r,g,b\na,1,2,3\nb,1,2,3\n", ["line 3", "b has the colour of a"]),
    ("name,r,g,b\na,1,2,3\na,1,2,4\n", ["line 3", "a appears twice"]),
    ("name,r,g\na,1,2\nb,1,3\n", ["no column b"]), ("", ["no column name, r, g, b"]),
    ("a,1,2,3\nb,4,5,6\n", ["no column name, r, g, b"]), ("name;r;g;b\na;1;2;3\nb;4;5;6\n", ["name,r,g,b"]),
    ("name,r,g,b\na,1,2,256\nb,4,5,6\n", ["line 2", "255"]), ("name,r,g,b\na,1,2,3\nb,-1,5,6\n", ["line 3", "255"]),
    ("name,r,g,b\na,1,2,3\nb,4,5\n", ["line 3"]), ("name,r,g,b\na,1,2,3\nb,4,5,1.5\n", ["line 3"]),
    ("name,r,g,b\na,1,2,3\n,4,5,6\n", ["line 3", "name"]),
    ("name,r,g,b\na,1,2,3\n", ["1 classes"]), ("name,r,g,b\n", ["0 classes"]),
    ("name,r,g,b\n" + "".join(f"c{i},{i},{i // 9},0\n" for i in range(256)), ["256 classes"]),
    ("name,r,g,b\na,1,2,3\nb,4,5,x\na,7,8,9\nc,1,2,3\n", ["line 3", "line 4", "line 5"]),  # all at once
    ("name,r,g,b\nVoid,1,2,3\nUnlabelled,4,5,6\n", ["Void and Unlabelled"]),
    ("name,r,g,b\na,1,2,3\n".encode("utf-16"), ["UTF-8"]),
])
def test_from_csv_names_what_is_wrong(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        from_text(tmp_path, text)
    message = str(error.value)
    assert all(part in message for part in ["class_dict.csv", *said]) and "\n" not in message


def test_the_32_colors_of_the_kaggle_copy_are_camvid(tmp_path):
    rows = sorted(COLORS32.items())
    assert ClassSet.from_csv(write_csv(tmp_path, dict(rows))) == CAMVID
    assert ClassSet.from_csv(write_csv(tmp_path, dict(rows[::-1]))) == CAMVID
    own = ClassSet.from_csv(write_csv(tmp_path, dict(rows[1:])))
    assert len(own) == 31 and own.names[0] == rows[1][0]


@SETS
def test_to_dict_is_plain_and_from_dict_reads_it(classes):
    data = classes.to_dict()
    assert type(data["colors"][0]) is list and {type(value) for value in data.values()} <= {list, int, type(None)}
    again = ClassSet.from_dict(data)
    assert again == ClassSet(classes.names, classes.colors, classes.ignore_index) and hash(again) is not None


def test_numbered():
    classes = ClassSet.numbered(255)
    assert len(set(classes.colors)) == len(set(classes.names)) == 255
    assert classes.ignore_index is None and classes.void_id == 255
    assert classes.colors[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert classes.colors[:100] == ClassSet.numbered(100).colors
