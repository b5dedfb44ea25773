"""Every stage against the obvious code, and against the packages that people would pick instead.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench.py --data_root data/CamVid      every stage, about an hour
    python benchmarks/bench.py masks metric step            some stages, on generated frames

It prints a table and writes bench.json. A figure is the median of repeated runs, ours and the
reference in turns. The references are in `references.py`, as people would write them. A stage that
needs a GPU is left out if there is none.
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

STAGES = {
    "masks": stages.masks,
    "items": stages.items,
    "metric": stages.metric,
    "step": stages.step,
    "gpu": stages.gpu,
    "predict": commands.predict,
    "start": commands.start,
    "quality": commands.quality,
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help="all of: " + " ".join(STAGES))
    add("--data_root", type=Path, help="images with masks; if not given: generated ones")
    add("--runs", type=int, default=7, help="repetitions of the shorter stages")
    add("--smoke", action="store_true", help="few and small runs, to try the stages")
    add("--out", type=Path, default=Path("bench.json"), help="JSON file to write")
    return parser


def describe_machine() -> dict:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
    }


def main(args) -> None:
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        raise SystemExit(f"bench.py: no stage {unknown.pop()}; there are {' '.join(STAGES)}")
    keep_freed_memory()
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\n| stage | here | the other |\n|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        if args.data_root is None:
            args.data_root = args.scratch / "scenes"
            generate_dataset(args.data_root, {"train": 40, "val": 4})
        args.data_root = args.data_root.resolve()
        for name in args.stages or STAGES:
            for row in STAGES[name](args):
                rows.append(asdict(row) | {"ratio": row.ratio})
                print(row, flush=True)
                args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
