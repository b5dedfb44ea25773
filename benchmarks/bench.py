"""Every stage against the obvious code, and against the packages that people would pick instead.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench.py --data_root data/CamVid              every stage, about an hour: a table, and bench.json
    python benchmarks/bench.py masks metric step                    some stages, on generated frames

A figure is the median of repeated runs, ours and the reference in turns within one process. The references are in
`references.py`, as people would write them. A stage that needs a GPU is left out where there is none.
"""
import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import commands  # noqa: E402
import stages  # noqa: E402
from measure import DEVICE  # noqa: E402

from datasets.synthetic import generate_dataset  # noqa: E402
from support.device import keep_freed_memory  # noqa: E402

STAGES = {f.__name__: f for f in (
    stages.masks, stages.items, stages.metric, stages.step, stages.profile, stages.gpu, stages.loading,
    commands.predict, commands.start, commands.quality)}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="all of: " + " ".join(STAGES))
    parser.add_argument("--data_root", type=lambda path: Path(path).resolve(),
                        help="images with masks; when not given: generated ones")
    parser.add_argument("--runs", type=int, default=7, help="repetitions of the shorter stages")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON file to write")
    return parser


def main(args) -> None:
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        raise SystemExit(f"bench.py: no stage {unknown.pop()}; there are {' '.join(STAGES)}")
    keep_freed_memory()
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
               "cpu": torch.backends.cpu.get_cpu_capability(),
               "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\n| stage | here | the other |\n|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        if args.data_root is None:
            args.data_root = args.scratch / "scenes"
            generate_dataset(args.data_root, {"train": 40, "val": 4}, (480, 360))
        for name in args.stages or STAGES:
            for row in STAGES[name](args):
                rows.append(asdict(row) | {"ratio": row.ratio})
                print(row, flush=True)
                args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
