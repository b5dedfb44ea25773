"""Write a trained network as an ONNX file for any batch and image size, checked against PyTorch's logits.

    pip install onnx onnxruntime onnxscript
    python export.py --out model.onnx                                    the shipped network, or your newest
    python export.py --out model.onnx --checkpoint checkpoint/unet_best.pth --with_preprocessing

The input is `image`, (N, 3, H, W) float32, normalised; the output `logits`, (N, C, H, W). With --with_preprocessing
they are `photo`, (N, H, W, 3) uint8 RGB, and `ids`, (N, H, W) uint8 class ids. The file's metadata holds the classes.
"""
import importlib.util
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import default_checkpoint, load_model
from inference import fold_batch_norm
from runtime import OneLineParser, RunError, UserError, atomic_path, run_command

PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # the last is what torch's exporter needs
SIZES = ((1, 64, 96), (2, 90, 131), (1, 33, 17))  # (N, H, W) of the check: multiples of 16 or not, a batch or not
TOLERANCE = 1e-3  # of logits, whose range is about 20


class FromPhotos(nn.Module):
    """(N, H, W, 3) uint8 RGB -> (N, H, W) uint8 ids, never the ignored one."""

    def __init__(self, model: nn.Module, mean: list[float], std: list[float], ignore_index: int | None, classes: int):
        super().__init__()
        self.model = model
        penalty = torch.zeros(classes)
        if ignore_index is not None:
            penalty[ignore_index] = -1e9
        for name, value in (("mean", torch.tensor(mean)), ("std", torch.tensor(std)), ("penalty", penalty)):
            self.register_buffer(name, value.view(-1, 1, 1))

    def forward(self, photo: Tensor) -> Tensor:
        image = (photo.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return (self.model(image) + self.penalty).argmax(1).to(torch.uint8)


def write_onnx(network: nn.Module, path: Path, metadata: dict[str, str], with_preprocessing: bool) -> None:
    """Export with dynamic N, H and W."""
    import onnx

    name, height = ("photo", 1) if with_preprocessing else ("image", 2)
    dynamic = {0: "batch", height: "height", height + 1: "width"}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # its own, on its insides
        program = torch.onnx.export(network, (example(2, 48, 80, with_preprocessing),), dynamo=True, verbose=False,
                                    input_names=[name], output_names=["ids" if with_preprocessing else "logits"],
                                    dynamic_shapes=({axis: torch.export.Dim(side, min=1, max=1 << 15)
                                                     for axis, side in dynamic.items()},))
    written = program.model_proto
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, path)


def example(batch: int, height: int, width: int, with_preprocessing: bool) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    if with_preprocessing:
        return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)
    return torch.randn(batch, 3, height, width, generator=generator)


@torch.inference_mode()
def check_onnx(network: nn.Module, path: Path, with_preprocessing: bool) -> float:
    """The largest difference to PyTorch over SIZES: of logits, or the share of other ids.

    Raises RunError where it is more than rounding.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for size in SIZES:
        batch = example(*size, with_preprocessing)
        theirs = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        ours = network(batch).numpy()
        difference = (ours != theirs).mean() if with_preprocessing else np.abs(ours - theirs).max()
        largest = max(largest, float(difference)) if ours.shape == theirs.shape else float("inf")
    if not largest <= TOLERANCE:
        raise RunError(f"onnxruntime's results differ from PyTorch's by {largest:.2g}; nothing was written")
    return largest


def get_args_parser() -> OneLineParser:
    parser = OneLineParser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help="trained model; when not given: the newest checkpoint/*_best.pth, else the shipped one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .onnx file to write")
    parser.add_argument("--with_preprocessing", action="store_true", help="photographs in, class ids out")
    return parser


def main(args) -> int:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: pip install {' '.join(PACKAGES)}")
    checkpoint = args.checkpoint or default_checkpoint()
    model, classes, config = load_model(checkpoint)
    network = fold_batch_norm(model)
    if args.with_preprocessing:
        network = FromPhotos(network, **config["normalize"], ignore_index=classes.ignore_index, classes=len(classes))
    metadata = {"classes": json.dumps(classes.to_dict()), "normalize": json.dumps(config["normalize"])}
    with atomic_path(args.out) as temporary:
        write_onnx(network.eval(), temporary, metadata, args.with_preprocessing)
        difference = check_onnx(network, temporary, args.with_preprocessing)
    what = "share of other ids" if args.with_preprocessing else "largest difference of a logit"
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB; {what} on {len(SIZES)} sizes: {difference:.1g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
