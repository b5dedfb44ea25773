"""The recipe: its flags, and the optimiser and schedule that they describe."""

import math

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from support.command import Parser, UserError, number

MAX_SIDE_HELP = """shrink longer images to it, in training and prediction; 0: never; if not given,
that of --init_from, else the longest side of the training images"""
LR_HELP = """learning rate; if not given, 0.1 for sgd, 0.001 for adamw, and a fifth of it with
--init_from"""
ENCODER_LR_HELP = """learning rate of the encoder, as a share of --lr; if not given, 0.2 with
--pretrained, else 1"""
SCHEDULER_HELP = "of the learning rate: StepLR or OneCycleLR"
STEP_SIZE_HELP = "epochs between drops; if not given, 5/6 of all, so that the rate drops once"


def add_recipe_flags(parser: Parser) -> None:
    """The flags of a training recipe."""
    count = number(int, 1)
    share = number(float, 0, 1)
    positive = number(float, 0)
    parser.add_flags(
        "recipe",
        ("--epochs", count, 100, "passes over the training images"),
        ("--batch_size", count, 4, "crops per update"),
        ("--max_side", number(int, 0), None, MAX_SIDE_HELP),
        ("--jitter", share, 0.4, "strength of colour augmentation; 0 disables it"),
        ("--optimizer", ("sgd", "adamw"), "sgd", "SGD has Nesterov momentum"),
        ("--lr", positive, None, LR_HELP),
        ("--encoder_lr", share, None, ENCODER_LR_HELP),
        ("--momentum", share, 0.9, "of sgd"),
        ("--weight_decay", positive, 5e-4, "of convolutions"),
        ("--scheduler", ("step", "onecycle"), "step", SCHEDULER_HELP),
        ("--step_size", count, None, STEP_SIZE_HELP),
        ("--gamma", positive, 0.05, "factor of the drops"),
        ("--loss", ("ce", "ce+dice"), "ce+dice", "cross-entropy, with or without soft Dice"),
        ("--class_weights", ("none", "log", "mild"), "mild", "of the cross-entropy; see loss.py"),
        ("--ema", share, 0.99, "decay per update of the averaged weights; 0: none"),
        ("--clip_grad", positive, 0.0, "largest norm of the gradient; 0: any"),
    )
    add = parser.add_argument
    add("--crop_size", type=int, nargs="+", default=[224], help="px, one or two (default: 224)")
    add(
        "--scale",
        type=positive,
        nargs=2,
        default=[0.4, 1.2],
        help="random scale (default: 0.4 1.2)",
    )


def resolve_recipe(args) -> None:
    """Set the defaults that depend on other flags. Raises UserError if flags contradict."""
    args.model = args.model or "unet"
    is_unet = args.model == "unet"
    if args.pretrained and is_unet:
        raise UserError(
            "--pretrained: the plain U-Net has no ImageNet weights; add --model unet_lite0"
        )
    smallest = 32 if is_unet else 64  # batch norm needs two pixels at the bottom
    if len(args.crop_size) > 2 or min(args.crop_size) < smallest:
        given = " ".join(map(str, args.crop_size))
        raise UserError(f"--crop_size {given}: give one or two numbers of at least {smallest}")
    if not 0 < args.scale[0] <= args.scale[1]:
        raise UserError(
            f"--scale {args.scale[0]} {args.scale[1]}: give two positive numbers, the smaller first"
        )
    args.crop_size = (args.crop_size * 2)[:2]
    args.width = args.width or (64 if is_unet else 16)
    if args.lr is None:
        args.lr = 0.1 if args.optimizer == "sgd" else 0.001
        if args.init_from:
            args.lr /= 5  # fine-tuning
    if args.encoder_lr is None:
        args.encoder_lr = 0.2 if args.pretrained else 1.0
    args.val_every = args.val_every or max(1, args.epochs // 25)


def build_optimizer(args, model: nn.Module) -> Optimizer:
    """``sgd`` with Nesterov momentum, or ``adamw``.

    The encoder learns at ``encoder_lr`` times the rate. Weight decay is applied to convolution
    weights, not to norms and biases.
    """
    parameters: dict[tuple[float, float], list] = {}  # by learning rate and weight decay
    for name, p in model.named_parameters():
        in_encoder = name.startswith(("stem.", "encoder."))
        lr = args.lr * args.encoder_lr if in_encoder else args.lr
        decay = args.weight_decay if p.ndim > 1 else 0.0
        parameters.setdefault((lr, decay), []).append(p)
    groups = [
        {"params": params, "lr": lr, "weight_decay": decay}
        for (lr, decay), params in parameters.items()
    ]
    if args.optimizer == "adamw":
        return AdamW(groups, args.lr, fused=True)
    optimizer = SGD(groups, args.lr, args.momentum, nesterov=args.momentum > 0, fused=True)
    for p in model.parameters():  # torch leaves them unset where fp16 skips the first update
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def build_scheduler(args, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """``step``: StepLR, with a linear warm-up over 30 % of the updates before the first drop.
    ``onecycle``: OneCycleLR (Smith & Topin 2018).

    The rate depends on the number of the update and the flags alone, so that a resumed run of
    another length continues at its place in the schedule of that length.
    """
    total = args.epochs * steps_per_epoch
    step_size = args.step_size or max(1, args.epochs * 5 // 6)
    drop_every = step_size * steps_per_epoch
    warmup = max(1, 3 * min(drop_every, total) // 10)
    peak = max(1.0, 0.3 * total - 1)
    last = total - 1

    def step(update: int) -> float:
        rise = 0.01 + 0.99 * min(1.0, update / warmup)
        return rise * args.gamma ** (update // drop_every)

    def onecycle(update: int) -> float:
        """As torch's OneCycleLR: a cosine from 1/25 within 30 % of the updates, one to 4e-6."""
        if update <= peak:
            return cosine(0.04, update / peak)
        return cosine(4e-6, (last - update) / max(1.0, last - peak))

    return LambdaLR(optimizer, onecycle if args.scheduler == "onecycle" else step)


def cosine(low: float, position: float) -> float:
    """From ``low`` at position 0 to 1 at position 1, along half a cosine."""
    return low + (1 - low) * (1 - math.cos(math.pi * max(0.0, position))) / 2
