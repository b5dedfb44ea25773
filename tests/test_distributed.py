"""Two processes under torchrun train as one that accumulates their gradients."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, SMALL, finish, load, opened, rows, wait_for

from datasets.camvid import EpochSampler
from datasets.flags import open_data
from datasets.synthetic import generate_dataset
from datasets.transforms import train_transform
from model import normalization
from train import get_args_parser
from training.recipe import resolve_recipe
from training.trainer import Trainer

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(*flags, cwd) -> subprocess.Popen:
    """Start train.py in two processes."""
    command = [sys.executable, *TORCHRUN, REPO / "train.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command)], cwd=cwd, text=True, env=env, start_new_session=True, **pipes
    )


@pytest.fixture
def one_thread():
    """As in torchrun's processes: more threads sum in another order, which training amplifies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(tmp_path, one_thread):
    """Two epochs of two updates, in two parts; each process has batches of two images."""
    root = tmp_path / "scenes"
    generate_dataset(root, {"train": 8, "val": 3}, (96, 72))  # 3 do not share out evenly
    flags = ["--data_root", str(root), *SMALL, "--amp", "off", "--resume", "auto"]
    for epochs in (1, 2):
        _, err = finish(torchrun(*flags, "--epochs", epochs, cwd=tmp_path))
        assert "Warning" not in err
    args = get_args_parser().parse_args(flags)
    args.resume = None
    resolve_recipe(args)
    data = open_data(args)
    normalize = normalization(args.model)
    transform = train_transform(
        args.crop_size, 0, **normalize, scale=args.scale, jitter=args.jitter
    )
    dataset = data.dataset("train", transform)
    alone = Trainer(args, data, torch.device("cpu"), normalize, steps_per_epoch=2)
    alone.model.train()
    samplers = [EpochSampler(8, args.seed, rank, 2) for rank in range(2)]
    losses = {1: [], 2: []}
    for epoch in (1, 2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        for step in range(2):
            for share in shares:
                samples = [dataset[key] for key in share[2 * step : 2 * step + 2]]
                images, masks = map(torch.stack, zip(*samples))
                loss = alone.loss_fn(alone.model(images), masks)
                losses[epoch].append(loss.item())
                (loss / 2).backward()
            alone.optimizer.step()
            alone.optimizer.zero_grad()
            alone.scheduler.step()
            alone.ema.update(alone.model)
    last = load(tmp_path)
    for name, parameter in alone.model.named_parameters():
        torch.testing.assert_close(last["training"]["model"][name], parameter.data)
    for name, parameter in alone.ema.module.named_parameters():
        torch.testing.assert_close(last["state_dict"][name], parameter)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]
    logged = [float(row["train_loss"]) for row in rows(tmp_path)]
    assert logged == pytest.approx([np.mean(losses[1]), np.mean(losses[2])], rel=1e-4)
    masks = [np.asarray(opened(path)) for path in (root / "val_labels").iterdir()]
    labelled = sum(mask.any(-1).sum() for mask in masks)
    assert sum(last["scores"]["pixels"]) == labelled, "each image is scored once"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a parent has died")
def test_a_killed_torchrun_leaves_no_process(scenes, tmp_path):
    process = torchrun("--data_root", scenes, *SMALL, "--epochs", 10_000, cwd=tmp_path)
    wait_for((tmp_path / "checkpoint" / "unet_last.pth").exists)
    process.kill()
    process.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(process.pid, 0))


@pytest.mark.parametrize("size, processes, batch", [(16, 2, 4), (17, 2, 3), (5, 3, 1), (2, 4, 1)])
def test_the_shares_of_the_processes_make_up_the_epoch(size, processes, batch):
    """A batch of all processes is one of a single process that is so many times as large."""
    order = list(EpochSampler(size, seed=1))
    shares = [list(EpochSampler(size, 1, rank, processes)) for rank in range(processes)]
    together = [key for keys in zip(*shares) for key in keys]
    assert together[:size] == order
    assert set(together) == set(order)
    for start in range(0, size - batch * processes + 1, batch * processes):
        of_one = order[start : start + batch * processes]
        first = start // processes
        of_all = [key for share in shares for key in share[first : first + batch]]
        assert sorted(of_all) == sorted(of_one)
