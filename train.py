"""Train a U-Net on CamVid or on your own street photographs.

    python train.py --demo                                     no data needed, about three minutes on two CPU cores
    python train.py --data_root data/CamVid                    the default recipe
    python train.py --data_root data/CamVid --resume auto      go on where a run stopped
"""
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import distributed
from checkpoints import Run, load_checkpoint, load_weights
from datasets.cache import FrameCache
from datasets.camvid import CamVidDataset, EpochSampler, find_classes
from datasets.check import SplitReport, add_data_flags, check_data, stray_line
from datasets.classes import ClassSet
from datasets.synthetic import generate_dataset
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transform, train_transform
from engine import (
    Interrupted,
    NonFiniteLoss,
    TimeEstimate,
    build_ema,
    build_optimizer,
    build_scheduler,
    train_one_epoch,
    validate,
)
from inference import TILE, Predictor
from loss import SegmentationLoss, class_weights
from metric import SegmentationMetric
from model import MODEL_NAMES, build_model
from monitor import Monitor, summarize
from runtime import (
    OneLineParser,
    RunError,
    UserError,
    atomic_path,
    catch_signals,
    default_workers,
    init_worker,
    is_main_process,
    keep_freed_memory,
    make_folder,
    number_in,
    positive_int,
    run_command,
    seed_everything,
    select_amp_dtype,
    select_device,
    whole_number,
)

# The demo has three minutes on two CPU cores: small frames, many small steps, a schedule that ends in time.
DEMO_SCENES, DEMO_SIZE = {"train": 300, "val": 40, "test": 8}, (192, 144)
DEMO = {"data_root": Path("checkpoint/demo/scenes"), "checkpoint": Path("checkpoint/demo"), "width": 8, "epochs": 16,
        "batch_size": 2, "crop_size": [144, 192], "scale": [1.0, 1.0], "jitter": 0.0, "optimizer": "adamw", "lr": 0.006,
        "scheduler": "onecycle", "weight_decay": 0.01, "loss": "ce+dice", "class_weights": "none", "workers": 1}


def get_args_parser() -> OneLineParser:
    parser = OneLineParser(prog="train.py", description=__doc__.splitlines()[0])
    add_data_flags(parser)
    add_model_flags(parser)
    add_recipe_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--demo", action="store_true", help="train on generated scenes, into checkpoint/demo")
    group.add_argument("--checkpoint", type=Path, default=Path("checkpoint"), metavar="DIR",
                       help="folder for checkpoints, log and pictures")
    group.add_argument("--resume", metavar="FILE|auto",
                       help="go on from a _last.pth; auto takes the one in --checkpoint where there is one")
    group.add_argument("--init_from", type=Path, metavar="FILE", help="start from these weights alone")
    group.add_argument("--val_every", type=positive_int, metavar="EPOCHS",
                       help="epochs between validations; when not given: 1, in long runs a 25th of --epochs")
    group.add_argument("--cache", type=Path, nargs="?", const=Path("checkpoint/cache"), metavar="DIR",
                       help="decode every frame once, into a file in DIR that later runs use too; without DIR: "
                            "checkpoint/cache")
    group.add_argument("--workers", type=whole_number,
                       help="loader processes; 0 loads in the main one; when not given: what suits the machine")
    group.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too, into --checkpoint")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    group.add_argument("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto",
                       help="mixed precision on CUDA; auto: bf16 where the GPU has it, else fp16")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--seed", type=whole_number, default=0, help="of weights, order and augmentation")
    group.add_argument("--deterministic", action="store_true", help="repeatable kernels, slower on a GPU")
    return parser


def add_model_flags(parser: OneLineParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=MODEL_NAMES, default="unet", help="network")
    group.add_argument("--width", type=positive_int, metavar="N",
                       help="channels at full size; the model's own when not given: 64, ResNet encoders 16")
    group.add_argument("--pretrained", action="store_true", help="start a ResNet encoder from ImageNet weights")


def add_recipe_flags(parser: OneLineParser) -> None:
    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=positive_int, default=100, help="passes over the training frames")
    group.add_argument("--batch_size", type=positive_int, default=4, help="crops per step")
    group.add_argument("--crop_size", type=positive_int, nargs="+", default=[224], metavar="PX",
                       help="height and width of training crops, or one number for both")
    group.add_argument("--image_size", type=positive_int, nargs=2, metavar=("H", "W"),
                       help="resize frames as they are read; scores stay at the labels' own size")
    group.add_argument("--scale", type=number_in(0.1, 10), nargs=2, default=[0.4, 1.2], metavar=("MIN", "MAX"),
                       help="range of the random scale before cropping")
    group.add_argument("--jitter", type=number_in(0, 1), default=0.2,
                       help="range of brightness, contrast and saturation around 1; 0: none")
    group.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="SGD is with Nesterov momentum")
    group.add_argument("--lr", type=number_in(0, 100, open_low=True),
                       help="of an update; when not given: 0.1 for sgd, 0.001 for adamw")
    group.add_argument("--momentum", type=number_in(0, 0.9999), default=0.9, help="of sgd")
    group.add_argument("--weight-decay", "--weight_decay", type=number_in(0, 10), default=5e-4,
                       help="of convolution weights; norms and biases have none")
    group.add_argument("--scheduler", choices=("step", "poly", "cosine", "onecycle", "none"), default="step",
                       help="how the learning rate falls; step is StepLR")
    group.add_argument("--step_size", type=positive_int, metavar="EPOCHS",
                       help="StepLR: epochs between drops; when not given: a third of --epochs")
    group.add_argument("--gamma", type=number_in(0, 1, open_low=True), default=0.2, help="StepLR: factor of a drop")
    group.add_argument("--warmup_steps", type=whole_number, default=100, help="updates of linear warm-up")
    group.add_argument("--loss", choices=("ce", "ce+dice"), default="ce+dice", help="cross-entropy, or with soft Dice")
    group.add_argument("--class_weights", choices=("none", "median", "log", "mild"), default="mild",
                       help="of the cross-entropy: median frequency, 1 / ln(1.02 + pixel share), or milder, with 1.1")
    group.add_argument("--label_smoothing", type=number_in(0, 0.99), default=0.0, help="of the cross-entropy")
    group.add_argument("--ema", type=number_in(0, 0.99999), default=0.99,
                       help="decay per update of the averaged weights that are scored and predict; 0: no average")
    group.add_argument("--grad_accum", type=positive_int, default=1, help="batches per update")
    group.add_argument("--clip_grad", type=number_in(0, 1e9), default=0.0, help="largest gradient norm; 0: no limit")


def resolve_flags(args) -> None:
    """Fill in the defaults that depend on other flags, and refuse combinations that make no sense."""
    if args.data_root is None:
        raise UserError("--data_root DIR is needed, the folder with train/ and train_labels/ (or try --demo)")
    smallest = 32 if args.model == "unet" else 64  # two pixels at the bottom, for batch norm to have a variance
    if len(args.crop_size) > 2 or min(args.crop_size) < smallest:
        given = " ".join(map(str, args.crop_size))
        raise UserError(f"--crop_size {given}: give one or two numbers, for {args.model} of at least {smallest}")
    if args.scale[0] > args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: the smaller number comes first")
    if args.resume not in (None, "auto") and args.init_from:
        raise UserError("--resume restores everything, --init_from the weights alone; give one of them")
    args.crop_size = args.crop_size * 2 if len(args.crop_size) == 1 else args.crop_size
    args.width = args.width or (64 if args.model == "unet" else 16)
    args.lr = args.lr or (0.1 if args.optimizer == "sgd" else 0.001)
    args.step_size = args.step_size or -(-args.epochs // 3)
    args.val_every = args.val_every or max(1, args.epochs // 25)


def build_loaders(args, classes: ClassSet, reports: dict[str, SplitReport], pin: bool):
    """The training loader, with its sampler, and the validation loader."""
    common = {"num_workers": args.workers, "persistent_workers": args.workers > 0, "pin_memory": pin,
              "worker_init_fn": init_worker}
    train_set = CamVidDataset(args.data_root, "train", classes,
                              train_transform(args.crop_size, classes.void_id, args.scale, args.jitter),
                              args.label_format, args.image_size)
    val_set = CamVidDataset(args.data_root, "val", classes, eval_transform(), args.label_format, args.image_size,
                            native_labels=True)
    for dataset, split in ((train_set, "train"), (val_set, "val")) if args.cache else ():
        dataset.cache = FrameCache(args.cache, split, dataset)
    sampler = EpochSampler(len(train_set), args.seed, distributed.rank(), distributed.world_size())
    sizes = reports["val"].sizes
    val_batch = min(4, args.batch_size, max(1, TILE**2 // max(h * w for h, w in sizes))) if len(sizes) == 1 else 1
    val_share = range(distributed.rank(), len(val_set), distributed.world_size())  # each frame once, in one process
    return (DataLoader(train_set, args.batch_size, sampler=sampler, **common),
            DataLoader(val_set, val_batch, sampler=val_share, **common))


def build_run(args, classes: ClassSet, device: torch.device, steps: int, sizes: Iterable[tuple[int, int]]) -> Run:
    """Model, optimiser, schedule, scaler and average, from scratch, from --init_from or from --resume.

    steps: updates an epoch. sizes: (height, width) of the training frames.
    """
    pretrained = {"pretrained": True} if args.pretrained and not args.resume else {}
    model = build_model(args.model, len(classes), width=args.width, **pretrained)
    if args.init_from and not args.resume:
        state = load_checkpoint(args.init_from)
        load_weights(model, state.get("ema_state_dict") or state["model_state_dict"], args.init_from)
    model.to(device, memory_format=torch.channels_last)  # a fifth faster than the default, on CPUs too
    model = distributed.synchronize_batch_norm(model, device)
    optimizer = build_optimizer(args, model)
    fp16 = select_amp_dtype(args.amp, device) == torch.float16
    run = Run(args, classes, model, optimizer, build_scheduler(args, optimizer, steps),
              torch.amp.GradScaler(device.type, enabled=fp16), build_ema(model, args.ema) if args.ema else None,
              steps, {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
              max(args.image_size or (max(size) for size in sizes)))
    if args.resume:
        run.restore(Path(args.resume))
        print(f"resumed after epoch {run.epoch}, best val mIoU {run.best_miou:.3f}")
    return run


def main(args) -> int:
    resolve_flags(args)
    device = select_device(distributed.start_processes(args.device))
    amp_dtype = select_amp_dtype(args.amp, device)
    args.workers = default_workers(device) if args.workers is None else args.workers
    seed_everything(args.seed, args.deterministic)
    if device.type == "cpu":
        keep_freed_memory()
    last = args.checkpoint / f"{args.model}_last.pth"
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun, with the same flags
    if args.resume == "auto" or restarted and last.is_file():
        args.resume = str(last) if last.is_file() else None
    with distributed.main_process_first():
        if args.demo and not args.data_root.is_dir():
            print(f"generating street scenes in {args.data_root}", flush=True)
            generate_dataset(args.data_root, DEMO_SCENES, DEMO_SIZE)
        classes = find_classes(args.data_root, args.data_name, args.label_format, args.num_classes, args.ignore_class)
        reports = check_data(args.data_root, ["train", "val"], classes, args.label_format)
        train_loader, val_loader = build_loaders(args, classes, reports, pin=device.type == "cuda")
    make_folder(args.checkpoint)
    run = build_run(args, classes, device, -(-len(train_loader) // args.grad_accum), reports["train"].sizes)
    distributed.agree("the last finished epoch", run.epoch)
    run.remove_unfinished()
    if not args.resume or Path(args.resume).resolve() != last.resolve():
        run.best_miou = -1.0  # where a run goes on from another folder, this folder's best is yet to come
        if args.checkpoint != DEMO["checkpoint"]:
            run.set_earlier_aside()
    for report in reports.values():
        print(f"{report.split}: {report.pairs} pairs" + (f"\n{stray_line(report)}" if report.stray else ""))
    print(f"{args.model}, {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} M parameters, "
          f"{len(classes)} classes, on {device}{f' in {amp_dtype}' if amp_dtype else ''}", flush=True)
    if is_main_process():
        with atomic_path(run.path("args.json")) as temporary:
            temporary.write_text(json.dumps(run.flags(), indent=2) + "\n")
    status = fit(run, train_loader, val_loader, reports, device, amp_dtype)
    distributed.end_processes()
    if status == 0 and is_main_process():
        summarize(run, val_loader, device, amp_dtype)
    return status


def fit(run: Run, train_loader: DataLoader, val_loader: DataLoader, reports: dict[str, SplitReport],
        device: torch.device, amp_dtype: torch.dtype | None) -> int:
    """Train to the last epoch, saving after each. Returns the exit status: 0, or 128 + a signal.

    Raises RunError where the loss is not finite, or the device's memory too small.
    """
    args, classes = run.args, run.classes
    pixels = torch.from_numpy(reports["train"].pixels[: len(classes)])
    weight = class_weights(args.class_weights, pixels, classes.ignore_index)
    loss_fn = SegmentationLoss(classes.void_id, weight, args.label_smoothing, dice=args.loss == "ce+dice").to(device)
    metric = SegmentationMetric(len(classes), classes.void_id)
    scored_model = run.ema.module if run.ema else run.model
    predictor = Predictor(scored_model, classes.ignore_index, **run.normalize, device=device, amp_dtype=amp_dtype,
                          tile=TILE, max_side=run.max_side)
    monitor = Monitor(run, val_loader.dataset, predictor)
    network = distributed.replicate(run.model, device)
    network = torch.compile(network) if args.compile else network
    val_pixels = sum(height * width * count for (height, width), count in reports["val"].sizes.items())
    estimate = TimeEstimate(args, len(train_loader), val_pixels)
    with catch_signals() as stop:
        while run.epoch < args.epochs:
            epoch, started = run.epoch + 1, time.perf_counter()
            train_loader.sampler.epoch = epoch
            try:
                row = train_one_epoch(
                    network, train_loader, loss_fn, run.optimizer, run.scheduler, run.scaler, device=device,
                    amp_dtype=amp_dtype, grad_accum=args.grad_accum, clip_grad=args.clip_grad, ema=run.ema,
                    stop=lambda: bool(stop), on_step=lambda step: estimate(run.epoch, step),
                    description=f"epoch {epoch}/{args.epochs}")
                val = {}
                if epoch % args.val_every == 0 or epoch == args.epochs:
                    val_loss = validate(predictor, val_loader, metric, stop=lambda: bool(stop))
                    scores = metric.compute()
                    if math.isnan(val_loss) and scores["pixels"].sum():  # the last update of the epoch diverged
                        raise NonFiniteLoss(len(train_loader) - 1)
                    val = {"val_loss": val_loss, "val_miou": scores["miou"],
                           "val_pixel_accuracy": scores["pixel_accuracy"]}
            except Interrupted:
                print(f"\nstopped in epoch {epoch}; {resume_command(run)}", file=sys.stderr)
                return 128 + stop.number
            except NonFiniteLoss as error:
                raise RunError(describe_lost_loss(error.step, epoch, train_loader)) from None
            except torch.OutOfMemoryError:
                raise RunError(f"{device} is out of memory with --batch_size {args.batch_size}, --crop_size "
                               f"{' '.join(map(str, args.crop_size))} and --width {args.width}; lower one of them, or "
                               f"give half the --batch_size and --grad_accum {2 * args.grad_accum}") from None
            row = {"epoch": epoch, **row, "seconds": time.perf_counter() - started, **val}
            record(run, row)
            monitor(row)
    monitor.close()
    return 0


def record(run: Run, row: dict) -> None:
    """Print an epoch's line and save the run after it."""
    # Without its times, so that the files of two equal runs are equal.
    run.history.append({key: value if isinstance(value, int) else round(value, 6) for key, value in row.items()
                        if key not in ("seconds", "images_per_second")})
    best, scores = False, ""
    if "val_miou" in row:
        score = row["val_miou"] if row["val_miou"] == row["val_miou"] else 0.0  # NaN: no labelled pixel in val
        best = score > run.best_miou or not run.path("best.pth").exists()
        run.best_miou = max(score, run.best_miou)
        scores = "val loss {val_loss:.3f}  val mIoU {val_miou:.3f}  acc {val_pixel_accuracy:.3f}  ".format(**row)
    run.save(best)
    print(f"epoch {row['epoch']:>3}/{run.args.epochs}  loss {row['train_loss']:.3f}  {scores}lr {row['lr']:.2g}  "
          f"{row['images_per_second']:.1f} images/s  {row['seconds']:.0f} s{'  *best' if best else ''}", flush=True)


def resume_command(run: Run) -> str:
    if not run.history:
        return "no epoch was finished, so there is nothing to resume"
    flags = sys.argv[1:] if sys.argv[-2:] == ["--resume", "auto"] else [*sys.argv[1:], "--resume", "auto"]
    return f"{run.path('last.pth')} holds epoch {run.epoch}. To go on:\n  python train.py {shlex.join(flags)}"


def describe_lost_loss(step: int, epoch: int, loader: DataLoader) -> str:
    size = loader.batch_size * distributed.world_size()
    indices = loader.sampler.order()[step * size:(step + 1) * size]
    names = ", ".join(loader.dataset.pairs[i].photo.name for i in indices)
    return (f"the loss is NaN or infinite in epoch {epoch}, step {step + 1}, with {names}; try a lower --lr or "
            f"--clip_grad 1. The checkpoint of the last finished epoch is untouched")


if __name__ == "__main__":
    parser = get_args_parser()
    if "--demo" in sys.argv:
        parser.set_defaults(**DEMO)
    distributed.exit_process(run_command(main, parser))
