"""Train a U-Net on CamVid or on your own street images.

    python train.py --demo                                     no data needed, about three minutes on two CPU cores
    python train.py --data_root data/CamVid --width 16         on a CPU: 34 to 80 minutes on two cores
    python train.py --data_root data/CamVid                    on a GPU
    python train.py --data_root data/CamVid --resume auto      go on where a run stopped
"""
from support.command import Parser, RunError, Terminated, UserError, is_main_process, number, run_command  # isort: split

import contextlib
import copy
import math
import multiprocessing
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from datasets.camvid import CamVidDataset, EpochSampler, find_classes
from datasets.check import SplitReport, add_data_flags, check_data, class_line, stray_line
from datasets.classes import ClassSet
from datasets.synthetic import generate_dataset
from datasets.transforms import eval_transform, train_transform
from inference.predictor import Predictor, fitting_batch, fitting_tile, fold_batch_norm
from loss import SegmentationLoss, class_weights
from metric import SegmentationMetric
from model import MODEL_NAMES, build_model
from support.device import default_workers, init_worker, memory_format, repeatable, select_amp_dtype, select_device
from support.files import locked
from support.images import limited_size
from training import distributed
from training.checkpoints import load_checkpoint, load_weights
from training.engine import NonFiniteLoss, train_one_epoch, validate
from training.monitor import Monitor, describe_loss, print_end, print_epoch, resume_hint
from training.recipe import WeightAverage, add_recipe_flags, build_optimizer, build_scheduler, resolve_recipe
from training.run import KEPT_FLAGS, RunFiles, TrainingState, begin, describe, resumed_file, take_flags
from training.schema import MAX_WIDTH

KEPT_BYTES = 2 << 30  # of decoded images; CamVid at 480×360 has 0.3 GB
# The demo has three minutes on two CPU cores: small images, many small steps, a schedule that ends in time.
DEMO_SCENES, DEMO_SIZE = {"train": 300, "val": 40, "test": 8}, (192, 144)
DEMO = {"data_root": Path("checkpoint/demo/scenes"), "checkpoint": Path("checkpoint/demo"), "width": 8, "epochs": 12,
        "batch_size": 2, "crop_size": [144, 192], "scale": [1.0, 1.0], "jitter": 0.0, "optimizer": "adamw", "lr": 0.006,
        "weight_decay": 0.01, "loss": "ce+dice", "class_weights": "none", "workers": 1}


def get_args_parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__)
    add_data_flags(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODEL_NAMES, help="network; by default unet")
    add("--width", type=number(int, 1, MAX_WIDTH), metavar="N",
        help="channels at full size; by default 64, ResNet encoders 16")
    add("--pretrained", action="store_true", help="start a ResNet encoder from ImageNet weights")
    add_recipe_flags(parser)
    add = parser.add_argument_group("run").add_argument
    add("--demo", action="store_true", help="train on generated scenes, into checkpoint/demo")
    add("--checkpoint", type=Path, default=Path("checkpoint"), metavar="DIR", help="folder for all that a run writes")
    add("--resume", metavar="FILE|auto", help="go on from a _last.pth; auto: the one in --checkpoint, if it is there")
    add("--init_from", type=Path, metavar="FILE", help="start from these weights alone")
    add("--val_every", type=number(int, 1), metavar="EPOCHS",
        help="epochs between validations; by default 1, in long runs a 25th of --epochs")
    add("--workers", type=number(int, 0, 1024), help="data loader processes; by default what suits the machine")
    add("--tensorboard", action="store_true", help="log for TensorBoard too, into --checkpoint")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto",
        help="mixed precision; auto: on CUDA, and bf16 on CPUs that multiply it, with AVX512-BF16 or AMX")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, order and augmentation")
    add("--deterministic", action="store_true", help="repeatable kernels, slower on a GPU")
    return parser


def resolve_flags(args) -> tuple[RunFiles, dict | None]:
    """Fill in the defaults that depend on other flags or on a checkpoint's, and refuse what makes no sense.

    Returns the files of the run, and the checkpoint of --resume, else of --init_from.
    """
    if args.data_root is None:
        raise UserError("--data_root DIR is needed, the folder with train/ and train_labels/ (or try --demo)")
    path, checkpoint = resumed_file(args.resume, args.checkpoint, args.model), None
    if path:  # restores everything; the file of --init_from may have been moved aside since
        checkpoint = load_checkpoint(path, training=True)
        stored = checkpoint["config"]["train"]
        take_flags(args, get_args_parser(), {name: stored.get(name) for name in KEPT_FLAGS}, path)
    elif args.init_from:
        checkpoint = load_checkpoint(args.init_from)
        model = checkpoint["config"]["model"]
        described = {"model": model["name"], "width": model["options"]["width"]}
        take_flags(args, get_args_parser(), described, args.init_from)
        if described != {key: getattr(args, key) for key in described}:
            raise UserError("{}: holds a {model} of width {width}; leave --model and --width out".format(args.init_from,
                                                                                                   **described))
    args.resume = path
    resolve_recipe(args)
    args.val_every = args.val_every or max(1, args.epochs // 25)
    return RunFiles(args.checkpoint, args.model), checkpoint


def build_loaders(args, classes: ClassSet, sizes: Collection, max_side: int,
                  device: torch.device) -> tuple[DataLoader, DataLoader]:
    """The training loader, with its EpochSampler, and the validation loader. sizes: (H, W) of validation images."""
    workers = default_workers(device) if args.workers is None else args.workers
    common: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0,
                              "pin_memory": device.type == "cuda", "worker_init_fn": init_worker}
    transform = train_transform(args.crop_size, classes.void_id, args.scale, args.jitter)
    train_set = CamVidDataset(args.data_root, "train", classes, transform, args.label_format, max_side,
                              val_percent=args.val_percent)
    val_set = CamVidDataset(args.data_root, "val", classes, eval_transform(), args.label_format, max_side,
                            native_masks=True, val_percent=args.val_percent)
    sampler = EpochSampler(len(train_set), args.seed, distributed.rank(), distributed.world_size())
    val_batch = fitting_batch(min(4, args.batch_size), sizes, len(classes))
    val_share = range(distributed.rank(), len(val_set), distributed.world_size())  # each image once, in one process
    whole_batches = len(train_set) >= args.batch_size * distributed.world_size()  # of one shape, to be compiled once
    return (DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=whole_batches, **common),
            DataLoader(val_set, val_batch, sampler=val_share, **common))


def keep_decoded(loaders: Sequence[Any], reports: dict[str, SplitReport]) -> None:
    """Decode every image once, not in every epoch, where memory holds them all and the loaders' processes share it."""
    side = loaders[0].dataset.max_side
    size = sum(count * (3 * math.prod(limited_size(image, side)) + math.prod(image))
               for report in reports.values() for image, count in report.sizes.items())
    shared = not loaders[0].num_workers or multiprocessing.get_start_method() == "fork"
    if shared and size * distributed.world_size() <= KEPT_BYTES:
        for loader in loaders:
            loader.dataset.keep_decoded()


def build_network(args, classes: ClassSet, checkpoint: dict | None) -> nn.Module:
    """The network, with the weights of --pretrained or --init_from. Raises UserError where they cannot be had."""
    pretrained = {"pretrained": True} if args.pretrained and not args.resume else {}
    try:
        model = build_model(args.model, len(classes), width=args.width, **pretrained)
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    if checkpoint and not args.resume:
        print(f"{args.init_from}: {load_weights(model, checkpoint, classes)}; learning rate {args.lr:g}")
    return model


def build_state(args, classes: ClassSet, checkpoint: dict | None, device: torch.device, amp_dtype: torch.dtype | None,
                steps: int) -> TrainingState:
    """The network and all that changes it, as they are before the first epoch. steps: of an epoch."""
    model = build_network(args, classes, checkpoint)
    model.to(device, memory_format=memory_format(device, amp_dtype, args.width))  # type: ignore[call-overload]
    optimizer = build_optimizer(args.optimizer, model, args.lr, args.weight_decay, args.momentum)
    scheduler = build_scheduler(args.scheduler, optimizer, args.epochs * steps, args.step_size * steps, args.gamma)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    return TrainingState(model, optimizer, scheduler, scaler, WeightAverage(model, args.ema), steps)


def main(args) -> int:
    with locked(args.checkpoint) if is_main_process() else contextlib.nullcontext():
        run(args)
    return 0


def run(args) -> None:
    """Train as the flags say, from the data to the last epoch's table."""
    files, checkpoint = resolve_flags(args)
    device = select_device(distributed.start_processes(args.device))
    amp_dtype = select_amp_dtype(args.amp, device)
    repeatable(args.deterministic)
    torch.manual_seed(args.seed)
    with distributed.main_process_first():
        if args.demo and not any(args.data_root.glob("[!.]*")):
            print(f"generating street scenes in {args.data_root}", flush=True)
            generate_dataset(args.data_root, DEMO_SCENES, DEMO_SIZE)
        classes = find_classes(args.data_root, args.data_name, args.label_format, args.num_classes)
        reports = check_data(args.data_root, ["train", "val"], classes, args.label_format, args.val_percent)
        config = describe(args, classes, reports)
        train_loader, val_loader = build_loaders(args, classes, reports["val"].sizes, config["max_side"], device)
    state = build_state(args, classes, checkpoint, device, amp_dtype, len(train_loader))
    begin(args, files, state, config, checkpoint)
    del checkpoint  # its memory
    for report in reports.values():
        print(f"{report.split}: {report.pairs} images" + (f"\n{stray_line(report)}" if report.stray else ""))
    print(class_line(reports["train"], classes))
    print(f"{args.model} of width {args.width}, {sum(p.numel() for p in state.model.parameters()) / 1e6:.1f} M "
          f"parameters, {len(classes)} classes, on {device}{f' in {amp_dtype}' if amp_dtype else ''}", flush=True)
    if device.type == "cpu" and args.width > 32:
        print("this takes many hours on a CPU; --width 16 takes a twelfth of the time", flush=True)
    weight = class_weights(args.class_weights, torch.from_numpy(reports["train"].pixels[: len(classes)]),
                           classes.ignore_index)
    loss_fn = SegmentationLoss(classes.void_id, weight, args.label_smoothing, dice=args.loss == "ce+dice").to(device)
    keep_decoded((train_loader, val_loader), reports)
    try:
        fit(args, state, config, files, classes, train_loader, val_loader, loss_fn, device, amp_dtype)
    except NonFiniteLoss as error:
        raise RunError(describe_loss(error.step, state.epoch + 1, train_loader)) from None
    except (KeyboardInterrupt, Terminated):
        print(f"\nstopped; {resume_hint(files)}", file=sys.stderr)
        raise
    distributed.end_processes()
    if files.path("best.pth").is_file():  # else nothing was left to train, and nothing had been scored
        print_end(args, files, classes)


def fit(args, state: TrainingState, config: dict, files: RunFiles, classes: ClassSet, train_loader: Any,
        val_loader: Any, loss_fn: nn.Module, device: torch.device, amp_dtype: torch.dtype | None) -> None:
    """Train to the last epoch; after each, print its figures, save it and draw it. The loaders: of `build_loaders`."""
    # A copy, whose memory format the Predictor changes; each validation gives it that epoch's.
    predictor = Predictor(copy.deepcopy(state.ema.module), classes.ignore_index, **config["normalize"], device=device,
                          amp_dtype=amp_dtype, max_side=config["max_side"], tile=fitting_tile(len(classes)))
    metric = SegmentationMetric(len(classes), classes.void_id)
    monitor = Monitor(files, val_loader.dataset, classes, predictor, args.tensorboard and is_main_process(),
                      first_epoch=state.epoch + 1)
    network = distributed.replicate(state.model, device)
    if args.compile:
        network.compile()
    started, before = time.perf_counter(), state.epoch
    for epoch in range(state.epoch + 1, args.epochs + 1):
        torch.manual_seed(args.seed + epoch)  # so that a resumed run needs no random state
        train_loader.sampler.epoch, scores = epoch, {}
        row = train_one_epoch(network, train_loader, loss_fn, state.optimizer, state.scheduler, state.scaler,
                              device=device, amp_dtype=amp_dtype, clip_grad=args.clip_grad,
                              after_update=state.ema.update, description=f"epoch {epoch}/{args.epochs}")
        if epoch % args.val_every == 0 or epoch == args.epochs:
            distributed.share_buffers(state.ema.module)
            predictor.model = fold_batch_norm(copy.deepcopy(state.ema.module))  # what predict.py will run
            scores = validate(predictor, val_loader, metric)
            row |= {f"val_{key}": scores[key] for key in ("loss", "miou", "pixel_accuracy")}
        best = state.record(row)
        seconds = (time.perf_counter() - started) / (epoch - before)
        if is_main_process():
            files.save(state, config, scores, best)
            print_epoch(epoch, args.epochs, row, best, seconds)
            monitor(row, state.history)


if __name__ == "__main__":
    parser = get_args_parser()
    if "--demo" in sys.argv:
        parser.set_defaults(**DEMO)
    raise SystemExit(run_command(main, parser))
