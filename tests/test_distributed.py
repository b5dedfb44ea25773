"""Two processes under torchrun average their gradients and share validation; a process that dies ends the run."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL, load, rows, wait_for
from torch.utils.data import DataLoader

from datasets.camvid import CamVidDataset, EpochSampler
from datasets.classes import CAMVID
from datasets.synthetic import generate_dataset
from datasets.transforms import eval_transform
from metric import SegmentationMetric
from support.device import default_workers
from training.checkpoints import load_predictor
from training.engine import validate

# Four updates an epoch, with 2 + 2 images each. Each process saves its network in the second; then one dies.
FLAGS = (*SMALL, "--val_every", 1, "--amp", "off", "--resume", "auto")
DYING = """
import os, runpy, torch, train, training.engine
steps, update, rank = iter(range(1, 9)), training.engine.update, os.environ["RANK"]
def dying(model, *args):
    step = next(steps)
    assert step != 6 or rank == "0", "struck by lightning"
    if step == 5:
        torch.save(model.module.state_dict(), f"rank {rank}.pth")
    return update(model, *args)
training.engine.update = dying
runpy.run_path(train.__file__, run_name="__main__")
"""


def torchrun(script: Path, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script,
               "--data_root", "scenes", *FLAGS]
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)})


@pytest.mark.slow
def test_a_dying_process_ends_the_run_and_the_same_command_goes_on(tmp_path):
    data = tmp_path / "scenes"
    generate_dataset(data, {"train": 16, "val": 3}, (96, 72))  # 3 do not share out evenly
    (tmp_path / "dying.py").write_text(DYING)
    started, done = time.monotonic(), torchrun(tmp_path / "dying.py", tmp_path)
    assert done.returncode == 1 and "struck by lightning" in done.stderr and time.monotonic() - started < 60
    first, second = (torch.load(tmp_path / f"rank {rank}.pth") for rank in (0, 1))
    for name, tensor in first.items():  # equal weights by averaged gradients, other statistics of other images
        assert torch.equal(tensor, second[name]) == ("running" not in name), name
    done = torchrun(REPO / "train.py", tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert "resumed after epoch 1" in done.stdout and done.stdout.count("epoch   2/2") == 1
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"] and not list((tmp_path / "checkpoint").glob(".*"))
    # Every pixel is scored once, and the weights that are saved are those scored.
    loader = DataLoader(CamVidDataset(data, "val", CAMVID, eval_transform(), native_masks=True))
    predictor, *_ = load_predictor(tmp_path / "checkpoint" / "unet_last.pth")
    scores, expected = load(tmp_path)["scores"], validate(predictor, loader, SegmentationMetric(12, 0))
    assert scores["pixels"] == expected["pixels"].tolist()
    assert scores["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_killed_torchrun_leaves_no_process_training(scenes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPO / "train.py",
               "--data_root", scenes, *SMALL, "--epochs", 10_000]
    process = subprocess.Popen([*map(str, command)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    wait_for(lambda: (tmp_path / "checkpoint" / "unet_last.pth").exists())
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(process.pid, 0))


@pytest.mark.parametrize("size, processes, batch", [(16, 2, 4), (17, 2, 3), (5, 3, 1), (2, 4, 1)])
def test_shards_make_up_the_epoch(size, processes, batch):
    shards = [list(EpochSampler(size, 1, rank, processes)) for rank in range(processes)]
    assert {len(shard) for shard in shards} == {len(EpochSampler(size, 1, 0, processes))}
    order, together = list(EpochSampler(size, 1)), [key for keys in zip(*shards) for key in keys]
    assert together[:size] == order and set(together) == set(order)
    # A batch of the run is that of a single process with so many times the batch.
    for step in range(size // (batch * processes)):
        shares = [key for shard in shards for key in shard[step * batch:(step + 1) * batch]]
        assert sorted(shares) == sorted(order[step * batch * processes:(step + 1) * batch * processes])


@pytest.mark.parametrize("device,cores,processes,expected", [
    ("cpu", 1, 1, 0), ("cpu", 2, 1, 0), ("cpu", 16, 1, 2), ("cpu", None, 1, 0), ("cpu", 16, 8, 0), ("cuda", 2, 1, 2),
    ("cuda", 16, 1, 8), ("cuda", 16, 4, 4)])
def test_loader_processes_suit_the_machine(monkeypatch, device, cores, processes, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers(torch.device(device)) == expected
