"""The stages that are measured within one process: data, metric, training, networks."""
import time
from collections.abc import Callable, Iterator

import references
import torch
from measure import DEVICE, Row, in_turns
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from datasets.cache import FrameCache
from datasets.camvid import CamVidDataset, EpochSampler
from datasets.classes import CAMVID
from datasets.synthetic import generate_scene
from datasets.transforms import train_transform
from engine import build_ema, train_one_epoch
from loss import SegmentationLoss
from metric import SegmentationMetric
from model import build_model
from runtime import autocast, default_workers, init_worker, select_amp_dtype


def masks(args) -> Iterator[Row]:
    rgb = CAMVID.to_rgb(generate_scene(0, 960, 720)[1])
    assert (references.mask_to_ids(rgb) == CAMVID.to_ids(rgb)).all()
    seconds = in_turns(args.runs, lambda: CAMVID.to_ids(rgb), lambda: references.mask_to_ids(rgb))
    yield Row("RGB mask to ids, 960×720", 1e3 * seconds[0], "ms", 1e3 * seconds[1], "a comparison per class", 80, 2.5)


def items(args) -> Iterator[Row]:
    dataset, cached = (CamVidDataset(args.data_root, "train", CAMVID, train_transform((224, 224), 0)) for _ in range(2))
    cached.cache = FrameCache(args.scratch / "cache", "train", cached)
    plain = references.PlainDataset(dataset.pairs)
    turn = iter(range(1 << 30))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    seconds = in_turns(10 * args.runs, lambda: dataset[next(turn) % len(dataset), 0],
                       lambda: cached[next(turn) % len(cached), 0], lambda: plain[next(turn) % len(dataset)])
    torch.set_num_threads(threads)
    decoded, from_cache, reference = (1e3 * s for s in seconds)
    height, width = dataset.read(0)[1].shape
    yield Row(f"training item, {width}×{height} to 224×224", decoded, "ms", reference, "torchvision v2", at_most=12)
    yield Row("the same with --cache", from_cache, "ms", reference, "torchvision v2", at_most=5)


def metric(args) -> Iterator[Row]:
    from sklearn.metrics import confusion_matrix
    from torchmetrics.classification import MulticlassConfusionMatrix
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randint(0, 12, (8, 360, 480), generator=generator) for _ in range(2))
    ours, theirs = SegmentationMetric(12, 0), MulticlassConfusionMatrix(12, ignore_index=0, validate_args=False)
    seconds = in_turns(args.runs, lambda: ours.update(pred, target), lambda: theirs.update(pred, target),
                       lambda: confusion_matrix(target.numpy().ravel(), pred.numpy().ravel(), labels=range(12)))
    for reference, name, limit in ((seconds[1], "torchmetrics", 2), (seconds[2], "scikit-learn", 5)):
        yield Row("metric update, 8×360×480", 1e3 * seconds[0], "ms", 1e3 * reference, name, limit)


def our_steps(model: nn.Module, batches: list, network: Callable | None = None) -> Callable:
    """The training loop of this repository, with Dice and the weight average, over batches in memory."""
    model.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    amp_dtype = select_amp_dtype("auto", DEVICE)
    loss_fn, ema = SegmentationLoss(0, dice=True).to(DEVICE), build_ema(model, 0.99)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=amp_dtype == torch.float16)
    return lambda: train_one_epoch(network or model, batches, loss_fn, optimizer, scheduler, scaler, device=DEVICE,
                                   amp_dtype=amp_dtype, ema=ema)


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
    """On the CPU, whether or not there is a GPU, for the widths that people train there."""
    if DEVICE.type == "cuda":
        return
    for width in (16,) if args.quick else (16, 64):
        ours, plain = (build_model("unet", 12, width=width) for _ in range(2))
        batches, runs = random_batches(1, 8, 224), args.runs if width == 16 else 3
        flops = 8 * step_flops(plain, 224)
        seconds = in_turns(runs, our_steps(ours, batches), references.training_loop(plain, batches))
        yield Row(f"training step, 8×224×224, width {width}", 1e3 * seconds[0], "ms", 1e3 * seconds[1],
                  "plain loop, cross-entropy alone", 1)
        rate = matmul_rate(torch.float32, 2048)
        yield Row(f"its FLOP/s against a matrix product's {rate / 1e9:.0f} G", flops / seconds[0] / rate, "",
                  at_least=0.8)


def gpu(args) -> Iterator[Row]:
    """Images a second at width 64; what is lost to the peak is in the batch norms and other passes over memory."""
    if DEVICE.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True
    count, size, side = 8, 16, 224
    batches = random_batches(count, size, side, DEVICE)
    models = [build_model("unet", 12) for _ in range(3)]
    flops = count * size * step_flops(models[2].to(DEVICE), side)
    seconds = in_turns(args.runs, our_steps(models[0], batches),
                       our_steps(models[1], batches, torch.compile(models[1])),
                       references.training_loop(models[2], batches, DEVICE, torch.float16))
    peak = matmul_rate(torch.bfloat16, 8192)
    for name, ours in (("", seconds[0]), (" --compile", seconds[1])):
        images = count * size / ours
        yield Row(f"training{name}, {size}×{side}×{side}, width 64: {images:.0f} images/s", 1e3 * ours / count, "ms",
                  1e3 * seconds[2] / count, "plain loop in fp16", 3)
        yield Row(f"its FLOP/s against a bf16 matrix product's {peak / 1e12:.0f} T", flops / ours / peak, "",
                  at_least=0.4)


class TimedLoader:
    """A loader that adds up the seconds in which the training loop waits for it."""

    def __init__(self, loader: DataLoader):
        self.loader, self.waited = loader, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        for _ in range(len(self)):
            started = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - started
            yield batch


def loading(args) -> Iterator[Row]:
    """The share of an epoch that is not spent waiting for frames, with the loader processes that train.py picks."""
    width = 16 if DEVICE.type == "cpu" else 64
    workers = default_workers(DEVICE)
    for flag in ("", " --cache"):
        dataset = CamVidDataset(args.data_root, "train", CAMVID, train_transform((224, 224), 0))
        if flag:
            dataset.cache = FrameCache(args.scratch / "cache", "train", dataset)
        loader = TimedLoader(DataLoader(dataset, 4, sampler=EpochSampler(len(dataset)), num_workers=workers,
                                        persistent_workers=workers > 0, worker_init_fn=init_worker,
                                        pin_memory=DEVICE.type == "cuda"))
        epoch = our_steps(build_model("unet", 12, width=width), loader)
        if DEVICE.type == "cuda":
            epoch()  # starts the workers and chooses the convolutions
        loader.waited, started = 0.0, time.perf_counter()
        epoch()
        total = time.perf_counter() - started
        yield Row(f"an epoch{flag}, {workers} workers: share inside the step", 1 - loader.waited / total, "",
                  at_least=0.95)


def resnet34(args) -> Iterator[Row]:
    import segmentation_models_pytorch as smp
    ours, theirs = build_model("unet_resnet34", 12), smp.Unet("resnet34", encoder_weights=None, classes=12)
    batches = [(torch.randn(4, 3, 352, 480), torch.randint(0, 12, (4, 352, 480)))]
    fp16 = torch.float16 if DEVICE.type == "cuda" else None
    seconds = in_turns(args.runs, our_steps(ours, batches), references.training_loop(theirs, batches, DEVICE, fp16))
    yield Row("unet_resnet34, training step, 4×352×480", 1e3 * seconds[0], "ms", 1e3 * seconds[1],
              "segmentation-models-pytorch", 1.1)
    ours.eval(), theirs.eval()
    images = batches[0][0].to(DEVICE)
    last = images.contiguous(memory_format=torch.channels_last)

    def infer(model: nn.Module, batch: torch.Tensor, dtype: torch.dtype | None) -> Callable:
        @torch.inference_mode()
        def run():
            with autocast(DEVICE, dtype):
                return model(batch)
        return run
    seconds = in_turns(args.runs, infer(ours, last, select_amp_dtype("auto", DEVICE)), infer(theirs, images, fp16))
    yield Row("unet_resnet34, inference, 4×352×480", 1e3 * seconds[0], "ms", 1e3 * seconds[1],
              "segmentation-models-pytorch", 1.1)
