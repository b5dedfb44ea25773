"""Two processes under torchrun train like one with the batch of both; a process that dies ends or restarts the run."""
import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distributed
from datasets.camvid import EpochSampler
from datasets.synthetic import generate_dataset

REPO = Path(__file__).parents[1]
# A small rate: rounding errors, which differ with the order of summation, must not grow from step to step.
FLAGS = ("--width", "4", "--crop_size", "64", "--epochs", "2", "--device", "cpu", "--workers", "0", "--lr", "0.001",
         "--warmup_steps", "0")
DYING = """
import os, sys
sys.path.insert(0, {repo!r})
import engine, runtime, train
steps, update = 0, engine.update
def dying(*args):
    global steps
    steps += 1
    if steps == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("struck by lightning")
    update(*args)
engine.update = dying
sys.exit(runtime.run_command(train.main, train.get_args_parser()))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    generate_dataset(root, {"train": 16, "val": 5}, (96, 72))  # 5 do not share out evenly
    return root


def torchrun(script: Path | str, *args, cwd: Path, options: tuple = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, script]
    return subprocess.run([*map(str, command), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def log(folder: Path) -> list[dict[str, float]]:
    with open(folder / "checkpoint" / "unet_log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_processes_train_like_one(data, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, str(REPO / "train.py"), "--data_root", str(data), *FLAGS, "--batch_size", "4"]
    one = subprocess.run(command, cwd=folders[0], capture_output=True, text=True, check=True, timeout=240)
    two = torchrun(REPO / "train.py", "--data_root", data, *FLAGS, "--batch_size", 2, "--cache", cwd=folders[1])
    assert two.returncode == 0, two.stderr
    for ours, theirs in zip(log(folders[1]), log(folders[0]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    counts = [re.findall(r"^(\w+)  .* ([\d,]+)$", done.stdout, re.M) for done in (one, two)]
    assert counts[0] == counts[1] and len(counts[0]) == 12, "every validation pixel once"
    assert two.stdout.count("epoch   1/2") == 1
    assert "Warning" not in two.stderr and not list((folders[1] / "checkpoint").glob(".*"))


@pytest.mark.slow
def test_a_dying_process_ends_the_run_and_a_restart_goes_on(data, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(repo=str(REPO)))
    started = time.monotonic()
    done = torchrun(script, "--data_root", data, *FLAGS, "--batch_size", 2, cwd=tmp_path)
    assert done.returncode == 1 and time.monotonic() - started < 60
    assert done.stderr.index("struck by lightning") < done.stderr.index("torch/distributed/elastic")
    assert done.stderr.count("Traceback") == 2, "the dead process's own, and torchrun's"
    assert torch.load(tmp_path / "checkpoint" / "unet_last.pth", weights_only=True)["epoch"] == 1
    folder = tmp_path / "restarted"
    folder.mkdir()
    done = torchrun(script, "--data_root", data, *FLAGS, "--batch_size", 2, cwd=folder, options=("--max-restarts=1",))
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch 1" in done.stdout and [row["epoch"] for row in log(folder)] == [1, 2]


@pytest.mark.parametrize("size, processes, batch", [(16, 2, 4), (17, 2, 3), (5, 3, 1), (2, 4, 1)])
def test_shards_make_up_the_epoch(size, processes, batch):
    samplers = [EpochSampler(size, 1, rank, processes) for rank in range(processes)]
    shards = [list(sampler) for sampler in samplers]
    assert {len(shard) for shard in shards} == {len(samplers[0])}
    order = list(EpochSampler(size, 1))
    together = [key for keys in zip(*shards) for key in keys]
    assert together[:size] == order and set(together) == set(order)
    # A batch of the run is that of a single process with so many times the batch.
    for step in range(size // (batch * processes)):
        shares = [key for shard in shards for key in shard[step * batch:(step + 1) * batch]]
        assert sorted(shares) == sorted(order[step * batch * processes:(step + 1) * batch * processes])


def synchronized(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    batch = torch.randn(4, 3, 5, 7, dtype=torch.double) * 3 + 1
    torch.manual_seed(1)
    ours, theirs = (torch.nn.Sequential(torch.nn.BatchNorm2d(3)).double() for _ in range(2))
    shared = distributed.synchronize_batch_norm(ours, torch.device("cpu"))
    x, y = batch[rank::2].clone().requires_grad_(), batch.clone().requires_grad_()
    weight = torch.rand(4, 3, 5, 7, dtype=torch.double)
    distributed.sum_over_processes((shared(x) ** 3 * weight[rank::2]).sum()).backward()
    (theirs(y) ** 3 * weight).sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.grad[rank::2])  # both processes hold the sum: its gradient comes twice
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(shared.named_buffers())[name], buffer)
    torch.testing.assert_close(shared.eval()(batch), theirs.eval()(batch))
    assert shared.state_dict().keys() == theirs.state_dict().keys()
    torch.distributed.destroy_process_group()


def test_batch_norm_sees_the_batches_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(synchronized, (str(tmp_path),), nprocs=2)


def test_without_torchrun_nothing_changes():
    model, x = torch.nn.BatchNorm2d(3), torch.randn(2)
    assert distributed.start_processes("auto") == "auto"
    assert distributed.synchronize_batch_norm(model, torch.device("cpu")) is model
    assert type(model) is torch.nn.BatchNorm2d
    assert distributed.replicate(model, torch.device("cpu")) is model and distributed.sum_over_processes(x) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
