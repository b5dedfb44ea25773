"""The recipe: its flags, and the optimiser, the schedule and the weight average that they describe."""
import copy
import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from support.command import Parser, UserError, number

WARMUP_STEPS = 100
FINE_TUNING = 5  # divides the learning rate; a factor of 0.2 would make it 0.020000000000000004


def add_recipe_flags(parser: Parser) -> None:
    """The flags of what a network learns with."""
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=number(int, 1), default=100, help="passes over the training images")
    add("--batch_size", type=number(int, 1), default=4, help="crops per update")
    add("--crop_size", type=number(int, 1), nargs="+", default=[224], metavar="PX", help="height and width of crops")
    add("--max_side", type=number(int, 0), metavar="PX", help="shrink longer images to it, in training and prediction; "
        "0: never; scores stay at the masks' own size; when not given: the longest side of the training images")
    add("--scale", type=number(float, 0.1, 10), nargs=2, default=[0.4, 1.2], metavar=("MIN", "MAX"),
        help="range of the random scale before cropping")
    add("--jitter", type=number(float, 0, 1), default=0.4,
        help="range of brightness, contrast and saturation around 1; 0 also leaves out gamma, tint, blur and noise")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="SGD is with Nesterov momentum")
    add("--lr", type=number(float, 1e-12, 100),
        help="learning rate; when not given: 0.1 for sgd, 0.001 for adamw, a fifth of it with --init_from")
    add("--momentum", type=number(float, 0, 0.9999), default=0.9, help="of sgd")
    add("--weight-decay", "--weight_decay", type=number(float, 0, 10), default=5e-4,
        help="of convolution weights, per update; norms and biases have none")
    add("--scheduler", choices=("step", "onecycle"),
        help="of the learning rate; step is StepLR; by default onecycle, with --step_size or --gamma step")
    add("--step_size", type=number(int, 1), metavar="EPOCHS", help="between StepLR's drops; by default a third of all")
    add("--gamma", type=number(float, 1e-12, 1), help="factor of StepLR's drops; by default 0.2")
    add("--loss", choices=("ce", "ce+dice"), default="ce+dice", help="cross-entropy, or with soft Dice")
    add("--class_weights", choices=("none", "log", "mild"), default="mild",
        help="of the cross-entropy: 1 / ln(1.02 + pixel share), or milder, with 1.1")
    add("--label_smoothing", type=number(float, 0, 0.99), default=0.0, help="of the cross-entropy")
    add("--ema", type=number(float, 0, 0.99999), default=0.99,
        help="decay per update of the averaged weights that are scored and predict; 0: of the network itself")
    add("--clip_grad", type=number(float, 0, 1e9), default=0.0, help="largest norm of the gradient; 0: any")


def resolve_recipe(args) -> None:
    """Fill in the defaults that depend on other flags. Raises UserError where flags contradict each other."""
    args.model = args.model or "unet"
    if args.pretrained and args.model == "unet":
        raise UserError("--pretrained: ImageNet weights are those of ResNet encoders; add --model unet_resnet34")
    smallest = 32 if args.model == "unet" else 64  # two pixels at the bottom, for batch norm to have a variance
    if len(args.crop_size) > 2 or min(args.crop_size) < smallest:
        given = " ".join(map(str, args.crop_size))
        raise UserError(f"--crop_size {given}: give one or two numbers, for {args.model} of at least {smallest}")
    if args.scale[0] > args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: the smaller number comes first")
    args.crop_size = args.crop_size * 2 if len(args.crop_size) == 1 else args.crop_size
    args.width = args.width or (64 if args.model == "unet" else 16)
    args.lr = args.lr or (0.1 if args.optimizer == "sgd" else 0.001) / (FINE_TUNING if args.init_from else 1)
    args.scheduler = args.scheduler or ("step" if args.step_size or args.gamma else "onecycle")
    args.step_size, args.gamma = args.step_size or -(-args.epochs // 3), args.gamma or 0.2


def build_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9) -> Optimizer:
    """``sgd`` with Nesterov momentum, or ``adamw``. Weight decay acts on convolution weights, not on norms and biases.

    lr: per update. weight_decay: per update, times the rate.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    for p in model.parameters() if momentum else ():  # torch's own begin as unset memory if the first update is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def build_scheduler(name: str, optimizer: Optimizer, total_steps: int, step_size: int, gamma: float) -> LambdaLR:
    """``onecycle`` up to the optimiser's rate and back (Smith & Topin 2018), or ``step``: drops after a linear warm-up.

    total_steps and step_size, between the drops by the factor gamma, are updates. The rate depends on the number of
    the update alone: a resumed run of other length goes on at its place in the schedule of that length.
    """
    warmup = min(WARMUP_STEPS, max(1, 3 * step_size // 10))
    top, last = max(1.0, 0.3 * total_steps - 1), total_steps - 1

    def step(update: int) -> float:
        return (0.01 + 0.99 * min(1.0, update / warmup)) * gamma ** (update // step_size)

    def onecycle(update: int) -> float:
        """A cosine from 1/25 within the first 30 % of the updates, and a cosine to 4e-6, as torch's OneCycleLR."""
        low, share = (0.04, update / top) if update <= top else (4e-6, (last - update) / max(1.0, last - top))
        return low + (1 - low) * (1 - math.cos(math.pi * max(0.0, share))) / 2

    return LambdaLR(optimizer, onecycle if name == "onecycle" else step)


class WeightAverage:
    """An exponential moving average (EMA) of a network's weights and batch-norm statistics, in ``module``.

    The decay rises to ``decay`` as (1 + n) / (10 + n) with the number n of updates, as in TensorFlow's
    ExponentialMovingAverage: early weights are far off and are soon forgotten. With 0 the average is the network.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.model = copy.deepcopy(model).requires_grad_(False).eval(), model
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's present weights."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        # Not batch norm's counters, which nothing reads. Asked for anew: a module that changes its format or its device
        # has other tensors.
        averages, values = ([tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
                            for module in (self.module, self.model))
        torch._foreach_lerp_(averages, values, 1 - keep)
