r"""Train without one of CamVid's drives and score on it: how good a recipe is on unseen streets.

    python benchmarks/drives.py --data_root data/CamVid --out runs/plain --seeds 0 1 2 \
        -- --width 16 --epochs 60

What follows ``--`` goes to train.py. A stopped comparison continues when it is started again. Each
score is that of the last epoch, so that nothing is chosen on the held-out drive; the frames of val,
neighbours of training frames, are not used.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parents[1]
DRIVES = ("0006R0", "0001TP")  # day and dusk; without 0016E5 too few frames are left


def link_frames(source: Path, target: Path, drive: str) -> Path:
    """A data folder of links to the training frames; those of ``drive`` are val."""
    for kind in ("", "_labels"):
        for path in sorted((source / f"train{kind}").iterdir()):
            split = "val" if path.name.startswith(drive) else "train"
            link = target / f"{split}{kind}" / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path.resolve())
    return target


def score_held_out(args, drive: str, seed: int) -> dict:
    """The last epoch's scores of a training without ``drive``, on that drive."""
    data = link_frames(args.data_root, args.out / "data" / drive, drive)
    run = args.out / f"{drive}_{seed}"
    flags = ("--data_root", data, "--checkpoint", run, "--resume", "auto", "--seed", str(seed))
    command = (sys.executable, ROOT / "train.py", *flags, *args.flags)
    subprocess.run(command, check=True, stdout=sys.stderr)
    (last,) = run.glob("*_last.pth")
    return torch.load(last, weights_only=True)["scores"]


def main(args) -> None:
    print("| seed | held-out drive | mIoU | IoU per class |\n|---|---|---|---|")
    means = []
    for seed in args.seeds:
        mious = []
        for drive in DRIVES:
            scores = score_held_out(args, drive, seed)
            mious.append(scores["miou"])
            per_class = " ".join(f"{iou:.3f}" for iou in scores["iou"])
            print(f"| {seed} | {drive} | {scores['miou']:.3f} | {per_class} |", flush=True)
        means.append(mean(mious))
    spread = f" ± {stdev(means):.3f} (one standard deviation)" if len(means) > 1 else ""
    print(f"mean mIoU of {len(means)} seeds: {mean(means):.3f}{spread}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the links and the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    main(parser.parse_args())
