"""Two processes under torchrun average their gradients and share validation; a process that dies ends the run."""
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL
from torch.utils.data import DataLoader

from datasets.camvid import CamVidDataset, EpochSampler
from datasets.classes import CAMVID
from datasets.synthetic import generate_dataset
from datasets.transforms import eval_transform, train_transform
from loss import SegmentationLoss
from metric import SegmentationMetric
from model import build_model
from training import distributed
from training.checkpoints import load_predictor
from training.engine import validate
from training.recipe import build_optimizer, build_scheduler

# Four updates an epoch, with 2 + 2 images each.
FLAGS = (*SMALL, "--lr", 0.01, "--class_weights", "none", "--val_every", 1, "--cache", "--resume", "auto")
DYING = """
import os, sys
sys.path.insert(0, {repo!r})
import train, training.engine
from support.command import run_command
steps, update = iter(range(1, 9)), training.engine.update
def dying(*args):
    assert next(steps) != 6 or os.environ["RANK"] == "0", "struck by lightning"
    return update(*args)
training.engine.update = dying
sys.exit(run_command(train.main, train.get_args_parser()))
"""


def torchrun(script: Path, data: Path, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script,
               "--data_root", data, *FLAGS]
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def dead(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess, float]:
    """The data, the folder, the outcome and the seconds of a run whose second process dies in epoch 2."""
    folder = tmp_path_factory.mktemp("dead")
    generate_dataset(folder / "scenes", {"train": 16, "val": 3}, (96, 72))  # 3 do not share out evenly
    (folder / "dying.py").write_text(DYING.format(repo=str(REPO)))
    started = time.monotonic()
    done = torchrun(folder / "dying.py", folder / "scenes", folder)
    return folder / "scenes", folder, done, time.monotonic() - started


def log(folder: Path) -> list[dict[str, str]]:
    return [*csv.DictReader((folder / "checkpoint" / "unet_log.csv").read_text().splitlines())]


@pytest.mark.slow
def test_a_dying_process_ends_the_run_and_the_epoch_before_was_right(dead):
    """The log has the losses of the first process: those of a single one that averages the gradients of both halves."""
    data, folder, done, seconds = dead
    assert done.returncode == 1 and "struck by lightning" in done.stderr and seconds < 60
    dataset = CamVidDataset(data, "train", CAMVID, train_transform((64, 64), 0))
    samplers = [EpochSampler(16, 0, rank, processes=2) for rank in (0, 1)]
    torch.manual_seed(0)
    model, loss_fn, losses = build_model("unet", 12, width=4), SegmentationLoss(0, dice=True), []
    optimizer = build_optimizer("sgd", model, 0.01, 5e-4)
    scheduler = build_scheduler("step", optimizer, 0.01, 8, 4, 0.2)
    for sampler in samplers:
        sampler.epoch = 1
    for halves in zip(*(DataLoader(dataset, 2, sampler=sampler) for sampler in samplers), strict=True):
        losses.append([loss_fn(model(images), masks) for images, masks in halves])
        (sum(losses[-1]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    row, = log(folder)
    assert float(row["train_loss"]) == pytest.approx(sum(loss.item() for loss, _ in losses) / 4, abs=1e-5)


@pytest.fixture(scope="module")
def resumed(dead) -> subprocess.CompletedProcess:
    return torchrun(REPO / "train.py", *dead[:2])


def rescored(data: Path, file: Path) -> tuple[dict, dict]:
    """The scores in a checkpoint, and those of a single process that validates its weights."""
    loader = DataLoader(CamVidDataset(data, "val", CAMVID, eval_transform(), native_masks=True))
    return (torch.load(file, weights_only=True)["scores"],
            validate(load_predictor(file)[0], loader, SegmentationMetric(12, 0)))


@pytest.mark.slow
def test_the_same_command_goes_on_and_scores_every_pixel_once(dead, resumed):
    data, folder, *_ = dead
    assert resumed.returncode == 0 and "Warning" not in resumed.stderr, resumed.stderr
    assert "resumed after epoch 1" in resumed.stdout and resumed.stdout.count("epoch   2/2") == 1
    assert [row["epoch"] for row in log(folder)] == ["1", "2"] and not list((folder / "checkpoint").glob(".*"))
    scores, expected = rescored(data, folder / "checkpoint" / "unet_last.pth")
    assert scores["pixels"] == expected["pixels"].tolist()
    assert scores["loss"] == pytest.approx(expected["loss"], abs=1e-5), "the weights that are saved are those scored"


@pytest.mark.parametrize("size, processes, batch", [(16, 2, 4), (17, 2, 3), (5, 3, 1), (2, 4, 1)])
def test_shards_make_up_the_epoch(size, processes, batch):
    shards = [list(EpochSampler(size, 1, rank, processes)) for rank in range(processes)]
    assert {len(shard) for shard in shards} == {len(EpochSampler(size, 1, 0, processes))}
    order = list(EpochSampler(size, 1))
    together = [key for keys in zip(*shards) for key in keys]
    assert together[:size] == order and set(together) == set(order)
    # A batch of the run is that of a single process with so many times the batch.
    for step in range(size // (batch * processes)):
        shares = [key for shard in shards for key in shard[step * batch:(step + 1) * batch]]
        assert sorted(shares) == sorted(order[step * batch * processes:(step + 1) * batch * processes])


def test_without_torchrun_nothing_changes():
    model, x = torch.nn.BatchNorm2d(3), torch.randn(2)
    assert distributed.start_processes("auto") == "auto"
    assert distributed.replicate(model, torch.device("cpu")) is model and distributed.sum_over_processes(x) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
