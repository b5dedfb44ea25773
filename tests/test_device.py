"""What no command's output shows: the memory allocator, loader processes, and training steps on a GPU."""
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import ConstantLR

from loss import SegmentationLoss
from model import build_model
from support.device import default_workers
from training.distributed import replicate
from training.engine import train_one_epoch

MEASURE = """
import torch
from support.device import keep_freed_memory
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
{call}
before = resident()
tensors = [torch.ones(20_000_000) for _ in range(3)]
assert resident() > before + 200e6
del tensors
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("call,kept", [("", False), ("keep_freed_memory()", True)])
def test_freed_memory_is_kept(call, kept):
    done = subprocess.run([sys.executable, "-c", MEASURE.format(call=call)], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 200e6) == kept


@pytest.mark.parametrize("device,cores,expected", [("cpu", 1, 0), ("cpu", 2, 0), ("cpu", 16, 2), ("cuda", 2, 2),
                                                   ("cuda", 16, 8), ("cpu", None, 0)])
def test_loader_processes_suit_the_machine(monkeypatch, device, cores, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert default_workers(torch.device(device)) == expected


@pytest.mark.filterwarnings("default")  # torch's compiler warns of settings that would be faster
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind,dtype", [("plain", torch.bfloat16), ("plain", torch.float16),
                                        ("compiled", torch.bfloat16), ("replicated", None)])
def test_training_steps_on_a_gpu(tmp_path, kind, dtype):
    torch.manual_seed(0)
    device = torch.device("cuda:0")
    model = build_model("unet", 12, width=8).to(device, memory_format=torch.channels_last)
    before, network = model.classifier.weight.clone(), model
    if kind == "replicated":
        dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        network = replicate(model, device)
        assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in model.modules())
    elif kind == "compiled":
        network.compile()
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    batches = [(torch.randn(2, 3, 64, 96), torch.randint(0, 12, (2, 64, 96))) for _ in range(2)]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)
    row = train_one_epoch(network, batches, SegmentationLoss(0, dice=True), optimizer, ConstantLR(optimizer, 1.0),
                          scaler, device=device, amp_dtype=dtype, clip_grad=1.0)
    if kind == "replicated":
        dist.destroy_process_group()
    assert 0 < row["train_loss"] < 20
    assert model.classifier.weight.isfinite().all() and not torch.equal(model.classifier.weight, before)
