"""Two processes under torchrun average their gradients and share validation; a process that dies ends the run."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL, finish, load, rows, wait_for
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
FLAGS = ("--val_every", 1, "--amp", "off", "--resume", "auto")
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


def torchrun(script: Path, data: Path, folder: Path, *flags) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script,
               "--data_root", data, *SMALL, *flags]
    return subprocess.Popen([*map(str, command)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}, start_new_session=True)


@pytest.mark.slow
def test_a_dying_process_ends_the_run_and_the_same_command_goes_on(tmp_path):
    data = tmp_path / "scenes"
    generate_dataset(data, {"train": 16, "val": 3}, (96, 72))  # 3 do not share out evenly
    (tmp_path / "dying.py").write_text(DYING)
    started, process = time.monotonic(), torchrun(tmp_path / "dying.py", data, tmp_path, *FLAGS)
    assert "struck by lightning" in process.communicate()[1]
    assert process.returncode == 1 and time.monotonic() - started < 60
    first, second = (torch.load(tmp_path / f"rank {rank}.pth") for rank in (0, 1))
    for name, tensor in first.items():  # equal weights by averaged gradients, other statistics of other images
        assert torch.equal(tensor, second[name]) == ("running" not in name), name
    out, err = finish(torchrun(REPO / "train.py", data, tmp_path, *FLAGS))
    assert "Warning" not in err and "resumed after epoch 1" in out and out.count("epoch   2/2") == 1
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"] and not list(tmp_path.glob("*/.unfinished*"))
    # Every pixel is scored once, and the weights that are saved are those scored.
    loader = DataLoader(CamVidDataset(data, "val", CAMVID, eval_transform(), native_masks=True))
    predictor, *_ = load_predictor(tmp_path / "checkpoint" / "unet_last.pth")
    scores, expected = load(tmp_path)["scores"], validate(predictor, loader, SegmentationMetric(12, 0))
    assert scores["pixels"] == expected["pixels"].tolist()
    assert scores["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_killed_torchrun_leaves_no_process_training(scenes, tmp_path):
    process = torchrun(REPO / "train.py", scenes, tmp_path, "--epochs", 10_000)
    wait_for(lambda: (tmp_path / "checkpoint" / "unet_last.pth").exists())
    process.kill()
    process.communicate(timeout=120)
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
    monkeypatch.setattr("os.cpu_count", lambda: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(cores), raising=False)
    if cores is None:  # systems that cannot say it
        monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers(torch.device(device)) == expected
