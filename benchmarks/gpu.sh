#!/usr/bin/env bash
# What needs a GPU: tests, training steps, prediction, a training. It should take ten minutes.
#   bash benchmarks/gpu.sh --data_root data/CamVid
#   bash benchmarks/gpu.sh --smoke       on a CPU, small, to try the script
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -q -m cuda tests/test_trainer.py
python benchmarks/bench.py predict gpu "$@"
