from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS, COLORS32, MERGED, OTHER_COPIES, SMALL, compare_per_class, make_pair, save, write_csv

from datasets.camvid import find_classes
from datasets.classes import CAMVID, CAMVID32, ClassSet
from support.command import UserError

ACCEPTED = ({color: name for name, color in COLORS.items()} | OTHER_COPIES
            | {color: into for into, colors in MERGED.items() for color in colors.values()})
THREE = "name,r,g,b\nGrass,0,200,0\nStone,90,90,90\nVoid,0,0,0\n"


def from_text(folder: Path, text) -> ClassSet:
    """The classes of a folder with this class_dict.csv, or with what ``text`` makes of its path."""
    path = folder / "class_dict.csv"
    text(path) if callable(text) else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return find_classes(folder)


def test_the_twelve_classes_and_every_accepted_color():
    assert (CAMVID.names, CAMVID.colors) == (tuple(COLORS), tuple(COLORS.values()))
    assert (len(CAMVID), CAMVID.ignore_index, CAMVID.void_id, CAMVID.scored) == (12, 0, 0, list(range(1, 12)))
    assert {*CAMVID.colors, *(color for color, _ in CAMVID.aliases)} == set(ACCEPTED) and len(ACCEPTED) == 34
    ids = CAMVID.to_ids(np.array([[*ACCEPTED]], np.uint8))[0]
    assert [CAMVID.names[i] for i in ids] == [*ACCEPTED.values()]
    assert (CAMVID.to_rgb(np.array([12, 200, 255])) == 0).all()  # ids outside the set are black


def test_camvid32_keeps_all_32_apart():
    """Checkpoints hold their order."""
    assert CAMVID32 == ClassSet(("Void", *list(COLORS32)[1:]), tuple(COLORS32.values()), 0) and len(CAMVID32) == 32


@pytest.mark.parametrize("classes", [CAMVID, CAMVID32, ClassSet.numbered(5), ClassSet.numbered(255)], ids=len)
def test_colors_become_ids_and_back(classes):
    """Near the classes' colours are others, and a BGR mask must not pass for an RGB one."""
    rng = np.random.default_rng(0)
    known = np.array(classes.colors)[rng.integers(0, len(classes), 400)]
    near = np.concatenate([known, known[:, ::-1], known + rng.integers(-1, 2, (400, 3)), rng.integers(0, 256, (99, 3))])
    rgb = near.clip(0, 255).astype(np.uint8).reshape(-1, 1, 3)
    rgb = rgb[[tuple(color) not in dict(classes.aliases) for color in rgb[:, 0].tolist()]]
    ids = classes.to_ids(rgb)
    assert ids.dtype == np.uint8 and (ids == compare_per_class(rgb, classes.colors)).all() and 255 in ids
    back = classes.to_rgb(ids)
    assert back.dtype == np.uint8 and (back[ids != 255] == rgb[ids != 255]).all()
    data = classes.to_dict()  # for checkpoints, which hold plain types
    assert type(data["colors"][0]) is list and {type(value) for value in data.values()} <= {list, int, type(None)}
    again = ClassSet.from_dict(data)
    assert again == ClassSet(classes.names, classes.colors, classes.ignore_index) and hash(again) is not None
    forged = ClassSet.from_dict(data | {"names": ["road\nerror: \x1b[2J", *classes.names[1:]]})
    assert forged.names[0] == r"road\nerror: \x1b[2J"  # what it prints stays one line


@pytest.mark.parametrize("text", [
    THREE, "\ufeff" + THREE, THREE.replace("\n", "\r\n"), THREE.replace(",", " , "), THREE.rstrip("\n"),
    THREE.replace("name,r,g,b", "Name,R,G,B"), THREE.replace("\n", "\n\n"),
    THREE.replace("Void,0", '"Void", "0"'), "id,b,g,r,name\n7,0,200,0,Grass\n8,90,90,90,Stone\n9,0,0,0,Void\n",
])
def test_from_csv(tmp_path, text):
    expected = ClassSet(("Grass", "Stone", "Void"), ((0, 200, 0), (90, 90, 90), (0, 0, 0)), ignore_index=2)
    classes = from_text(tmp_path, text)
    assert classes == expected and classes.scored == [0, 1]


def test_from_csv_ignores_by_name_alone(tmp_path):
    for name, ignored in (("void", 1), ("UNLABELLED", 1), ("Unlabeled", 1), ("Background", None), ("Avoid", None)):
        classes = ClassSet.from_csv(write_csv(tmp_path, {"Road": (1, 1, 1), name: (0, 0, 0)}))
        assert (classes.ignore_index, classes.void_id) == (ignored, 255 if ignored is None else 1)


@pytest.mark.parametrize("text, said", [
    ("name,r,g,b\na,1,2,3\nb,1,2,3\n", ["line 3", "b has the colour of a"]),
    ("name,r,g,b\na,1,2,3\na,1,2,4\n", ["line 3", "a appears twice"]),
    ("name,r,g\na,1,2\nb,1,3\n", ["no column b"]), ("", ["no column name, r, g, b"]),
    ("name;r;g;b\na;1;2;3\nb;4;5;6\n", ["name,r,g,b"]), ("name,r,g,b\na,1,2,3\n", ["1 classes"]),
    ("name,r,g,b\n" + "".join(f"c{i},{i},{i // 9},0\n" for i in range(256)), ["256 classes"]),
    ("name,r,g,b\na,1,2,256\nb,-1,5,6\nc,4,5\nd,4,5,1.5\ne,4,5,²\n,4,5,6\na,7,8,9\nb,1,2,3,4\n",
     ["line 2", "255", "line 3", "line 4", "line 5", "line 6", "line 7"]),  # all at once
    ("name,r,g,b\nVoid,1,2,3\nUnlabelled,4,5,6\n", ["Void and Unlabelled"]),
    ("name,r,g,b\na,1,2,3\n".encode("utf-16"), ["UTF-8"]), ("name,r,g,b\n" + 200_000 * "a", ["CSV"]),
    *((make, ["cannot be read", "not a regular file"]) for make in (  # not passed over, nor read without an end
        Path.mkdir, lambda path: path.symlink_to("gone"), lambda path: path.symlink_to("/dev/null"))),
])
def test_from_csv_names_what_is_wrong(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        from_text(tmp_path, text)
    message = str(error.value)
    assert all(part in message for part in ["class_dict.csv", *said]) and "\n" not in message


def test_the_32_colors_of_the_kaggle_copy_are_camvid_in_any_order_and_31_are_not(tmp_path):
    rows = sorted(COLORS32.items())
    assert ClassSet.from_csv(write_csv(tmp_path, dict(rows[::-1]))) == CAMVID
    assert len(ClassSet.from_csv(write_csv(tmp_path, dict(rows[1:])))) == 31


def test_numbered_classes_have_the_colors_of_pascal_voc():
    assert ClassSet.numbered(5).colors == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))


# The masks' colours, those of their pixels, and what is said of CamVid's classes.
OTHERS = {
    "binary": ([(0, 0, 0), (255, 255, 255)], [0.9, 0.1], "the masks of train hold no class"),
    "tiny": ([(0, 0, 0), (255, 255, 255)], [0.995, 0.005], "the masks of train hold no class"),
    "labelme": ([(0, 0, 0), (128, 0, 0)], [0.75, 0.25], "the masks of train hold only Building"),
    "own": ([(10, 20, 30), (200, 10, 10), (128, 0, 0), (64, 0, 128)], [0.5, 0.3, 0.15, 0.05],
            "80.0% of the masks' pixels have none of their colours"),
}


@pytest.mark.parametrize("colors, shares, said", OTHERS.values(), ids=OTHERS)
def test_masks_that_are_not_camvids_need_a_table_whose_lines_are_printed(tmp_path, call, colors, shares, said):
    ids = np.repeat(np.arange(len(colors)), np.round(200 * np.array(shares)).astype(int)).reshape(10, 20)
    for split in ("train", "val"):
        save(make_pair(tmp_path, "photo", 0 * ids, split)[1], np.array(colors, np.uint8)[ids])
    for command in (("train.py", *SMALL), ("evaluate.py", "--split", "train"), ("datasets.check",)):
        status, out, err = call(*command, "--data_root", tmp_path)
        sentence, *lines = (out + err)[(out + err).index(f"{tmp_path}: no class_dict.csv"):].splitlines()
        assert status == 2 and said in sentence
        assert f"{tmp_path / 'class_dict.csv'}" in sentence and len(lines) == len(colors) + 1
    assert out.startswith("CamVid's 12 classes, as no class_dict.csv is read; train has no pixel of Sky, ")
    status, _, err = call("train.py", *SMALL, "--data_root", tmp_path, "--num_classes", 2)
    assert status == 2 and "--write_classes" in err and "leave it out" not in err
    (tmp_path / "class_dict.csv").write_text("\n".join(lines))  # as pasted
    pasted = ClassSet.from_csv(tmp_path / "class_dict.csv")
    (tmp_path / "class_dict.csv").unlink()
    assert call("datasets.check", "--data_root", tmp_path, "--write_classes")[0] == 0
    assert call("datasets.check", "--data_root", tmp_path, "--write_classes")[0] == 2  # a table is never overwritten
    assert pasted == ClassSet.from_csv(tmp_path / "class_dict.csv") and pasted.colors == tuple(colors)
    assert [line.rpartition(",")[2] for line in lines[1:]] == [f"{share:.2%}" for share in shares]
    status, out, _ = call("datasets.check", "--data_root", tmp_path)
    assert status == 0 and f"{len(colors)} classes, from {tmp_path / 'class_dict.csv'}\n" in out
    assert "leave --data_name out" in call("train.py", *SMALL, "--data_root", tmp_path, "--data_name", "camvid")[2]


@pytest.mark.parametrize("mask, said", [(np.arange(192) % 3, "--label_format ids --num_classes 3"),
                                        (np.arange(64, 256), "hold 192 colours")])
def test_masks_of_ids_or_of_blended_colors_are_told_from_those_of_colors(tmp_path, call, mask, said):
    for split in ("train", "val"):
        save(make_pair(tmp_path, "photo", split=split)[1], mask.astype(np.uint8).reshape(12, 16))
    status, _, err = call("train.py", *SMALL, "--data_root", tmp_path)
    assert status == 2 and said in err and err.count("\n") == 1
