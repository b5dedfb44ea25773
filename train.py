"""Train a U-Net on CamVid or on your own images.

python train.py --demo                                      no data needed, three minutes on a CPU
python train.py --data_root data/CamVid --width 16          on a CPU; on a GPU, leave --width out
python train.py --data_root data/CamVid --resume auto       continue a stopped run
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from datasets.camvid import EpochSampler
from datasets.flags import add_data_flags, open_data
from datasets.spec import DataSpec
from datasets.synthetic import generate_dataset
from datasets.transforms import eval_transform, train_transform
from inference.checkpoints import find_checkpoint, load_checkpoint, load_model
from inference.predictor import validate
from model import MODEL_NAMES, normalization
from support.command import Parser, UserError, number, run_command
from support.device import add_device_flags, loader_options, select_device, set_deterministic
from training import distributed
from training.recipe import add_recipe_flags, resolve_recipe
from training.run import Run, refuse_changes, resume_path, take_flags_of_run
from training.trainer import Trainer

# The demo has three minutes on two CPU cores: small images, many small updates.
DEMO_SCENES = {"train": 300, "val": 40, "test": 8}
DEMO_SIZE = (192, 144)
DEMO = """--data_root checkpoint/demo/scenes --checkpoint checkpoint/demo --width 8 --epochs 12
--batch_size 2 --crop_size 144 192 --scale 1 1 --jitter 0 --optimizer adamw --lr 0.006
--scheduler onecycle --weight_decay 0.01 --class_weights none --workers 1"""
LARGE = 1500  # pixels of the longer side of a photograph
RESUME_HELP = """continue the run of a _last.pth, in its folder and with its flags; auto: the one in
--checkpoint, if there is one"""


def main(args) -> None:
    args, checkpoint = resolve_flags(args)
    device = select_device(distributed.start_processes(args.device))
    set_deterministic(args.deterministic)
    data = distributed.from_main_process(lambda: prepare_data(args))
    normalize = checkpoint["config"]["normalize"] if checkpoint else normalization(args.model)
    train_loader, val_loader = build_loaders(args, data, device, normalize)
    trainer = Trainer(args, data, device, normalize, steps_per_epoch=len(train_loader))
    print_recipe(trainer)
    with Run(args, data, trainer, checkpoint) as run:  # resumes, or archives a previous run
        for epoch in range(run.epoch + 1, args.epochs + 1):
            torch.manual_seed(args.seed + epoch)  # so that a resumed run needs no random state
            train_loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            row = trainer.train_one_epoch(train_loader)
            scores = {}
            if epoch % args.val_every == 0 or epoch == args.epochs:
                scores = validate(trainer.predictor(), val_loader)  # the averaged weights
            run.record(row, scores, trainer)  # line, log.csv, last.pth, best.pth, pictures
        run.print_summary()
    distributed.end_processes()


def resolve_flags(args) -> tuple:
    """Set the defaults that depend on other flags or on a checkpoint.

    Returns the flags and the checkpoint of --resume or --init_from, empty without both.
    Raises UserError if flags contradict each other or the checkpoint.
    """
    checkpoint: dict = {}
    parser = get_args_parser()
    if args.demo:
        args = parser.parse_args(DEMO.split() + sys.argv[1:])
    path = resume_path(args.resume, args.checkpoint, args.model) if args.resume else None
    args.resume = path
    if path:
        checkpoint = load_checkpoint(path)
        args = take_flags_of_run(parser, path, checkpoint)
    elif args.init_from:
        if args.pretrained:
            raise UserError("--pretrained: --init_from gives the encoder's weights; leave one out")
        args.init_from = find_checkpoint(args.init_from)
        checkpoint = load_checkpoint(args.init_from)
        _, config = load_model(args.init_from, checkpoint)  # raises UserError if it is damaged
        for flag in ("model", "width"):
            if getattr(args, flag) not in (None, config[flag]):
                raise UserError(f"--{flag}: {args.init_from} has {config[flag]}; leave it out")
            setattr(args, flag, config[flag])
        if args.max_side is None:
            args.max_side = config["max_side"]  # objects have the size that its network knows
    resolve_recipe(args)
    if args.resume:
        refuse_changes(args, checkpoint)
    return args, checkpoint


def prepare_data(args) -> DataSpec:
    """The checked training and validation data; with --demo, generated if they are missing."""
    if args.demo and not args.data_root.is_dir():
        print(f"generating street scenes in {args.data_root}", flush=True)
        generate_dataset(args.data_root, DEMO_SCENES, DEMO_SIZE)
    data = open_data(args)
    if data.max_side > LARGE and max(args.crop_size) < LARGE / 5:
        print(
            f"advice: crops of {max(args.crop_size)} pixels show little of images with up to "
            f"{data.max_side}; --max_side 960 shrinks the images"
        )
    return data


def build_loaders(
    args, data: DataSpec, device: torch.device, normalize: dict
) -> tuple[DataLoader, DataLoader]:
    """The loaders of training and of validation; under torchrun, each process has its share."""
    rank, processes = distributed.rank(), distributed.world_size()
    transform = train_transform(
        args.crop_size, data.classes.ignore_index, **normalize, scale=args.scale, jitter=args.jitter
    )
    train_set = data.dataset("train", transform)
    val_set = data.dataset("val", eval_transform(**normalize), native_masks=True)
    options = loader_options(device, args.workers)
    # Validation is short; on Windows and macOS each worker is an interpreter of its own.
    val_options = dict(options)
    if args.workers is None:
        val_options["num_workers"] = min(2, options["num_workers"])
    options["persistent_workers"] = options["num_workers"] > 0
    sampler = EpochSampler(len(train_set), args.seed, rank, processes)
    whole_batches = len(train_set) >= args.batch_size * processes  # of one shape, compiled once
    train_loader = DataLoader(
        train_set, args.batch_size, sampler=sampler, drop_last=whole_batches, **options
    )
    share = range(rank, len(val_set), processes)  # each image once, in one process
    return train_loader, DataLoader(val_set, sampler=share, **val_options)


def print_recipe(trainer: Trainer) -> None:
    """One line on the network and its device, one on the recipe."""
    args = trainer.args
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    network = f"{args.model} of width {args.width}, {millions:.1f} M parameters"
    print(f"{network}, on {trainer.device} in {trainer.amp_dtype or torch.float32}")
    height, width = args.crop_size
    crops = args.batch_size * distributed.world_size()
    limit = f"at most {trainer.data.max_side} pixels" if trainer.data.max_side else "any size"
    print(
        f"epochs × updates: {args.epochs} × {trainer.steps_per_epoch}; optimiser "
        f"{args.optimizer}, schedule {args.scheduler}, peak learning rate {args.lr:g}; batches of "
        f"{crops} crops of {width}×{height}; images of {limit}",
        flush=True,
    )


def get_args_parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__)
    add_data_flags(parser)
    width_help = "channels at full size; if not given, 64, or 16 with another encoder"
    parser.add_flags(
        "model",
        ("--model", MODEL_NAMES, None, "network; if not given, unet"),
        ("--width", number(int, 1), None, width_help),
        ("--pretrained", bool, False, "start the encoder from ImageNet weights"),
    )
    add_recipe_flags(parser)
    parser.add_flags(
        "run",
        ("--demo", bool, False, "train on generated scenes, into checkpoint/demo"),
        ("--checkpoint", Path, Path("checkpoint"), "folder for the run's files"),
        ("--resume", str, None, RESUME_HELP),
        ("--init_from", Path, None, "start from the weights of a checkpoint, or of a run's folder"),
        ("--val_every", number(int, 1), None, "epochs between validations; else a 25th of all"),
        ("--workers", number(int, 0), None, "data loader processes; if not given, as suits"),
        ("--tensorboard", bool, False, "log for TensorBoard too, into --checkpoint"),
        ("--compile", bool, False, "torch.compile the network"),
        ("--seed", number(int, 0), 0, "of weights, order and augmentation"),
        ("--deterministic", bool, False, "repeatable kernels, slower on a GPU"),
    )
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
