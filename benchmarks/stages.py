"""The stages that are measured within one process: data, metric, training, networks."""
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import references
import torch
from measure import DEVICE, Row, command, in_turns
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from datasets.camvid import CamVidDataset, EpochSampler
from datasets.classes import CAMVID
from datasets.synthetic import generate_scene
from datasets.transforms import train_transform
from loss import SegmentationLoss
from metric import SegmentationMetric
from model import build_model
from support.device import default_workers, init_worker, memory_format, select_amp_dtype
from training.checkpoints import SHIPPED, load_checkpoint, load_predictor
from training.engine import train_one_epoch
from training.recipe import WeightAverage, build_optimizer


def masks(args) -> Iterator[Row]:
    rgb = CAMVID.to_rgb(generate_scene(0, 960, 720)[1])
    assert (references.mask_to_ids(rgb) == CAMVID.to_ids(rgb)).all()
    seconds = in_turns(args.runs, lambda: CAMVID.to_ids(rgb), lambda: references.mask_to_ids(rgb))
    yield Row("RGB mask to ids, 960×720", 1e3 * seconds[0], "ms", 1e3 * seconds[1], "a comparison per class")


def items(args) -> Iterator[Row]:
    dataset, cached = (CamVidDataset(args.data_root, "train", CAMVID, train_transform((224, 224), 0)) for _ in range(2))
    cached.keep_decoded()
    plain = references.PlainDataset(dataset.pairs)
    turn = iter(range(1 << 30))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    seconds = in_turns(10 * args.runs, lambda: cached[next(turn) % len(cached), 0],
                       lambda: dataset[next(turn) % len(dataset), 0], lambda: plain[next(turn) % len(dataset)])
    torch.set_num_threads(threads)
    height, width = dataset.read(0)[1].shape
    for reference, name in ((seconds[1], "decoding it each time"), (seconds[2], "torchvision v2")):
        yield Row(f"training item, {width}×{height} to 224×224", 1e3 * seconds[0], "ms", 1e3 * reference, name)


def metric(args) -> Iterator[Row]:
    from torchmetrics.classification import MulticlassConfusionMatrix
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randint(0, 12, (8, 360, 480), generator=generator) for _ in range(2))
    ours, theirs = SegmentationMetric(12, 0), MulticlassConfusionMatrix(12, ignore_index=0, validate_args=False)
    seconds = in_turns(args.runs, lambda: ours.update(pred, target), lambda: theirs.update(pred, target),
                       lambda: references.confusion_matrix(pred.numpy(), target.numpy()))
    for reference, name in ((seconds[1], "torchmetrics"), (seconds[2], "NumPy's bincount")):
        yield Row("metric update, 8×360×480", 1e3 * seconds[0], "ms", 1e3 * reference, name)


def our_steps(model: nn.Module, batches: Any, amp_dtype: torch.dtype | None,
              network: Callable | None = None) -> Callable:
    """The training loop of this repository, with Dice and the weight average, over batches in memory."""
    model.to(DEVICE, memory_format=memory_format(DEVICE, amp_dtype, model.classifier.in_channels)).train()
    optimizer = build_optimizer("sgd", model, 0.01, 5e-4)
    loss_fn, ema = SegmentationLoss(0, dice=True).to(DEVICE), WeightAverage(model, 0.99)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=amp_dtype == torch.float16)
    return lambda: train_one_epoch(network or model, batches, loss_fn, optimizer, scheduler, scaler, device=DEVICE,
                                   amp_dtype=amp_dtype, after_update=ema.update)


def random_batches(count: int, size: int, side: int, device: torch.device | str = "cpu") -> list:
    return [(torch.randn(size, 3, side, side, device=device), torch.randint(0, 12, (size, side, side), device=device))
            for _ in range(count)]


def matmul_rate(dtype: torch.dtype, size: int) -> float:
    """The FLOP/s of a plain matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / in_turns(9, lambda: torch.mm(a, b, out=out))[0]


def step_flops(model: nn.Module, side: int) -> int:
    """Of one image's forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, side, side, device=next(model.parameters()).device)).sum().backward()
    return counter.get_total_flops()


def step(args) -> Iterator[Row]:
    """On a CPU, for the widths that people train there."""
    if DEVICE.type == "cuda":
        return
    for width, runs in ((16, args.runs), (64, 3)):
        batches = random_batches(1, 8, 224)
        amp_dtype = select_amp_dtype("auto", DEVICE)
        ours, full, plain = (build_model("unet", 12, width=width) for _ in range(3))
        seconds = in_turns(runs, our_steps(ours, batches, amp_dtype), our_steps(full, batches, None),
                           references.training_loop(plain, batches))
        for dtype, own in ((amp_dtype, seconds[0]), (torch.float32, seconds[1])):
            yield Row(f"training step in {dtype}, 8×224×224, width {width}", 1e3 * own, "ms", 1e3 * seconds[2],
                      "plain loop, cross-entropy alone")


def profile(args) -> Iterator[Row]:
    """Where a step's time goes, by groups of torch's operators: ours, in bf16 where it pays, and the plain loop."""
    if DEVICE.type == "cuda":
        return
    groups = {"convolutions": "conv", "batch norm": "norm", "ReLU and pooling": "threshold|clamp|relu|pool",
              "copies and concatenation": "copy|cat|fill|empty", "loss, optimiser, average and the rest": ""}
    batches, found = random_batches(1, 8, 224), []
    ours, plain = (build_model("unet", 12, width=16) for _ in range(2))
    for run in (our_steps(ours, batches, select_amp_dtype("auto", DEVICE)), references.training_loop(plain, batches)):
        run()
        with torch.profiler.profile() as profiler:
            for _ in range(args.runs):
                run()
        milliseconds: Counter[str] = Counter()
        for event in profiler.key_averages():
            group = next(name for name, pattern in groups.items() if re.search(pattern, event.key))
            milliseconds[group] += event.self_cpu_time_total / 1e3 / args.runs
        found.append(milliseconds)
    for name in groups:
        yield Row(f"of a step, 8×224×224, width 16: {name}", found[0][name], "ms", found[1][name], "plain loop")


def gpu(args) -> Iterator[Row]:
    """All that needs a GPU: images a second at width 64, what waits for the host, and masks against the CPU's."""
    if DEVICE.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True
    count, size, side = 16, 16, 224
    batches = random_batches(count, size, side, DEVICE)
    models = [build_model("unet", 12) for _ in range(3)]
    flops = count * size * step_flops(models[2].to(DEVICE), side)
    amp_dtype = select_amp_dtype("auto", DEVICE)
    seconds = in_turns(args.runs, our_steps(models[0], batches, amp_dtype),
                       our_steps(models[1], batches, amp_dtype, torch.compile(models[1])),
                       references.training_loop(models[2], batches, DEVICE, torch.float16))
    peak = matmul_rate(torch.bfloat16, 8192)
    for name, ours in (("", seconds[0]), (" --compile", seconds[1])):
        images = count * size / ours
        yield Row(f"training{name}, {size}×{side}×{side}, width 64: {images:.0f} images/s", 1e3 * ours / count, "ms",
                  1e3 * seconds[2] / count, "plain loop in fp16")
        yield Row(f"its FLOP/s against a bf16 matrix product's {peak / 1e12:.0f} T", flops / ours / peak, "")
    yield Row(f"waits for the GPU in {count} steps; the last reads the losses", waits(our_steps(
        models[0], batches, amp_dtype)), "")
    photo = np.array(generate_scene(0, 480, 360)[0])
    on_gpu, on_cpu = (load_predictor(SHIPPED, device=device, amp_dtype=dtype)[0].predict([photo])
                      for device, dtype in ((DEVICE, amp_dtype), ("cpu", None)))
    yield Row("pixels that equal those of the CPU in float32", float((on_gpu == on_cpu).mean()), "")
    started = time.perf_counter()
    command("train.py", "--data_root", args.data_root, "--epochs", 5, "--checkpoint", args.scratch / "run")
    scores = load_checkpoint(args.scratch / "run" / "unet_best.pth")["scores"]
    yield Row(f"train.py, five epochs, to val mIoU {scores['miou']:.3f}", time.perf_counter() - started, "s")


def waits(run: Callable) -> int:
    """How often the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def loading(args) -> Iterator[Row]:
    """The share of an epoch that is left when its batches lie in memory already."""
    width, workers = 16 if DEVICE.type == "cpu" else 64, default_workers(DEVICE)
    dataset = CamVidDataset(args.data_root, "train", CAMVID, train_transform((224, 224), 0))
    dataset.keep_decoded()
    loader = DataLoader(dataset, 4, sampler=EpochSampler(len(dataset)), num_workers=workers,
                        persistent_workers=workers > 0, pin_memory=DEVICE.type == "cuda", worker_init_fn=init_worker)
    model, amp_dtype = build_model("unet", 12, width=width), select_amp_dtype("auto", DEVICE)
    loaded, in_memory = in_turns(3, our_steps(model, loader, amp_dtype), our_steps(model, list(loader), amp_dtype))
    yield Row(f"an epoch, {workers} workers: share inside the step", in_memory / loaded, "")
