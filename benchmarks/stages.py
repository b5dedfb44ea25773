"""The stages that are measured within one process: data, metric, training, GPU."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import references
import torch
from measure import DEVICE, Row, command, compare

import train
from datasets.classes import CAMVID
from datasets.spec import DataSpec
from datasets.synthetic import generate_scene
from datasets.transforms import train_transform
from inference.checkpoints import SHIPPED, load_checkpoint, load_predictor
from metric import SegmentationMetric
from model import build_model, normalization
from support.device import select_amp_dtype
from training.recipe import resolve_recipe
from training.trainer import Trainer


@cache
def checked_data(root: Path) -> DataSpec:
    """CamVid's classes in a data folder, with the training images decoded."""
    data = DataSpec(root, CAMVID)
    return replace(data, reports=data.check(["train"]))


def masks(args) -> Iterator[Row]:
    rgb = CAMVID.to_rgb(generate_scene(0, 960, 720)[1])
    assert (references.mask_to_ids(rgb) == CAMVID.to_ids(rgb)).all()
    others = {"a comparison per class": lambda: references.mask_to_ids(rgb)}
    yield from compare("RGB mask to ids, 960×720", args.runs, lambda: CAMVID.to_ids(rgb), others)


def items(args) -> Iterator[Row]:
    transform = train_transform((224, 224), CAMVID.ignore_index, **normalization("unet"))
    decoded = checked_data(args.data_root).dataset("train", transform)
    dataset = DataSpec(args.data_root, CAMVID).dataset("train", transform)
    plain = references.PlainDataset(dataset.pairs)
    indices = iter(range(1 << 30))
    height, width = dataset.read(0)[1].shape
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data loader process
    yield from compare(
        f"training item, {width}×{height} to 224×224",
        10 * args.runs,
        lambda: decoded[next(indices) % len(decoded)],
        {
            "decoded each time": lambda: dataset[next(indices) % len(dataset)],
            "torchvision v2": lambda: plain[next(indices) % len(dataset)],
        },
    )
    torch.set_num_threads(threads)


def metric(args) -> Iterator[Row]:
    from torchmetrics.classification import MulticlassConfusionMatrix

    pred, mask = torch.randint(0, 12, (2, 8, 360, 480))
    ours = SegmentationMetric(12, 0)
    theirs = MulticlassConfusionMatrix(12, ignore_index=0, validate_args=False)
    yield from compare(
        "metric update, 8×360×480",
        args.runs,
        lambda: ours.update(pred, mask),
        {
            "torchmetrics": lambda: theirs.update(pred, mask),
            "NumPy's bincount": lambda: references.confusion_matrix(pred.numpy(), mask.numpy()),
        },
    )


def random_batches(count: int, size: int) -> list:
    """(images, masks) of 224×224 on the device."""
    images = torch.randn(count, size, 3, 224, 224, device=DEVICE)
    masks = torch.randint(0, 12, (count, size, 224, 224), device=DEVICE)
    return list(zip(images, masks))


def our_steps(args, batches: list, *flags: str) -> Callable:
    """The training of this repository with train.py's defaults and ``flags``, over batches."""
    recipe = train.get_args_parser().parse_args(flags)
    resolve_recipe(recipe)
    data = checked_data(args.data_root)
    trainer = Trainer(recipe, data, DEVICE, normalization(recipe.model), len(batches))
    return lambda: trainer.train_one_epoch(batches)


def step(args) -> Iterator[Row]:
    """On a CPU, for the widths that people train there."""
    if DEVICE.type == "cuda":
        return
    batches = random_batches(1, 8)
    for width, runs in ((16, args.runs), (64, 3)):
        plain = references.training_loop(build_model("unet", 12, width=width), batches)
        for amp in ("auto", "off"):
            dtype = select_amp_dtype(amp, DEVICE) or torch.float32
            yield from compare(
                f"training step in {dtype}, 8×224×224, width {width}",
                runs,
                our_steps(args, batches, "--width", str(width), "--amp", amp),
                {"plain loop, cross-entropy alone": plain},
            )


def gpu(args) -> Iterator[Row]:
    """What needs a GPU: a training, steps, waits, its masks. --smoke: a little of it on a CPU."""
    if DEVICE.type == "cpu" and not args.smoke:
        return
    count, size = (2, 2) if args.smoke else (16, 16)
    batches = random_batches(count, size)
    yield training(args)
    for width in (4,) if args.smoke else (16, 32, 64):
        for amp in ("bf16",) if args.smoke else ("fp16", "bf16"):
            yield from gpu_steps(args, batches, width, amp)
    photo = np.array(generate_scene(0)[0])
    on_cpu = load_predictor(SHIPPED)[0].predict(photo)
    dtype = select_amp_dtype("auto", DEVICE)
    on_gpu = load_predictor(SHIPPED, device=DEVICE, amp_dtype=dtype)[0].predict(photo)
    yield Row("pixels equal to those of the CPU in float32", (on_gpu == on_cpu).mean().item(), "")


def gpu_steps(args, batches: list, width: int, amp: str) -> Iterator[Row]:
    """Steps with and without --compile against a plain loop, and the waits of one epoch."""
    torch.backends.cudnn.benchmark = True
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[amp]
    model = build_model("unet", 12, width=width)
    plain = references.training_loop(model, batches, DEVICE, dtype)
    flags = ("--width", str(width), "--amp", amp)
    ours = our_steps(args, batches, *flags)
    variants = {"": ours}
    if DEVICE.type == "cuda":
        yield Row(f"waits for the GPU in {len(batches)} steps, {amp}", waits(ours), "")
        variants[" --compile"] = our_steps(args, batches, *flags, "--compile")
    for name, steps in variants.items():
        stage = f"step, {len(batches[0][0])}×224×224, {' '.join(flags)}{name}"
        yield from compare(stage, args.runs, steps, {"plain loop": plain}, len(batches))


def training(args) -> Row:
    """The README's recipe for GPUs, for 60 epochs."""
    run = args.scratch / "run"
    recipe = "--width 4 --epochs 1" if args.smoke else "--scheduler onecycle --epochs 60"
    started = time.perf_counter()
    command("train.py", "--data_root", args.data_root, "--checkpoint", run, *recipe.split())
    minutes = (time.perf_counter() - started) / 60
    miou = load_checkpoint(run / "unet_best.pth")["scores"]["miou"]
    return Row(f"train.py {recipe}, to val mIoU {miou:.3f}", minutes, "min")


def waits(run: Callable) -> int:
    """How often the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
