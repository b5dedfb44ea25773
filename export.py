"""Write a trained network for others: as an ONNX file, checked against PyTorch, or its weights in half precision.

    pip install onnx onnxruntime onnxscript
    python export.py --out model.onnx                                    the shipped network, or your newest
    python export.py --out model.onnx --checkpoint checkpoint/unet_best.pth --with_preprocessing
    python export.py --out model.pth --checkpoint checkpoint/unet_best.pth

The ONNX input is `image`, (N, 3, H, W) float32, normalised; the output `logits`, (N, C, H, W). With
--with_preprocessing they are `photo`, (N, H, W, 3) uint8 RGB of any size, and `ids`, (N, H, W) uint8 class ids: images
longer than max_side are shrunk to it inside. The file's metadata holds classes, normalize and max_side.
"""
from support.command import Parser, RunError, UserError, run_command  # isort: split

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.predictor import fold_batch_norm
from support.files import atomic_path
from training.checkpoints import default_checkpoint, load_model, release

PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # the last is what torch's exporter needs
TOLERANCE = 1e-3  # of logits, whose range is about 20; or the share of other class ids


class FromPhotos(nn.Module):
    """(N, H, W, 3) uint8 RGB -> (N, H, W) uint8 class ids, as `Predictor` computes them."""

    def __init__(self, model: Any, mean: list[float], std: list[float], ignore_index: int | None, max_side: int):
        super().__init__()
        self.model, self.max_side = model, max_side or 2**30
        self.mean, self.std = (nn.Buffer(torch.tensor(values).view(3, 1, 1)) for values in (mean, std))
        if ignore_index is not None:
            model.classifier.bias.data[ignore_index] = -1e9  # never the most probable

    def forward(self, photo: Tensor) -> Tensor:
        size = photo.shape[1:3]
        longer = torch.sym_max(*size)  # sizes are symbols while the network is exported
        limit = torch.sym_min(longer, self.max_side)
        small: Any = [torch.sym_max(1, (2 * side * limit + longer) // (2 * longer)) for side in size]
        image = F.interpolate(photo.permute(0, 3, 1, 2).float(), small, mode="bilinear", antialias=True)
        prob = self.model((image / 255 - self.mean) / self.std).softmax(1)
        return F.interpolate(prob, size, mode="bilinear").argmax(1).to(torch.uint8)


def example(name: str, batch: int, height: int, width: int) -> Tensor:
    """A random input of the exported network, ``photo`` or ``image``."""
    generator = torch.Generator().manual_seed(height)
    if name == "photo":
        return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)
    return torch.randn(batch, 3, height, width, generator=generator)


def write_onnx(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Export with dynamic N, H and W."""
    import onnx

    name, output, height = ("photo", "ids", 1) if isinstance(network, FromPhotos) else ("image", "logits", 2)
    dynamic = {0: "batch", height: "height", height + 1: "width"}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # the exporter's own, on its insides
        program = torch.onnx.export(network, (example(name, 2, 48, 80),), dynamo=True, verbose=False,
                                    input_names=[name], output_names=[output],
                                    dynamic_shapes=({axis: torch.export.Dim(side, min=1, max=1 << 15)
                                                     for axis, side in dynamic.items()},))
    written = program.model_proto  # type: ignore[union-attr]  # None only without dynamo
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, path)


@torch.inference_mode()
def check_onnx(network: nn.Module, path: Path) -> float:
    """The largest difference to PyTorch over several sizes: of logits, or the share of other class ids.

    Raises RunError where it is more than rounding.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name, largest = session.get_inputs()[0].name, 0.0
    for size in ((1, 64, 96), (2, 90, 131), (1, 33, 17)):  # multiples of 16 or not, a batch or not
        batch = example(name, *size)
        ours, theirs = network(batch).numpy(), session.run(None, {name: batch.numpy()})[0]
        if ours.shape != theirs.shape:
            raise RunError(f"onnxruntime's result has the shape {theirs.shape}, PyTorch's {ours.shape}")
        difference = (ours != theirs).mean() if name == "photo" else np.abs(ours - theirs).max()
        largest = float(np.maximum(largest, difference))  # NaN, if there is one
    if not largest <= TOLERANCE:
        raise RunError(f"onnxruntime's results differ from PyTorch's by {largest:.2g}; nothing was written")
    return largest


def export_onnx(checkpoint: Path, out: Path, with_preprocessing: bool) -> str:
    """Write a checkpoint's network as an ONNX file. Returns what the check found. Raises UserError, RunError."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: pip install {' '.join(PACKAGES)}")
    model, classes, config = load_model(checkpoint)
    network = fold_batch_norm(model)
    if with_preprocessing:
        network = FromPhotos(network, **config["normalize"], ignore_index=classes.ignore_index,
                             max_side=config["max_side"])
    metadata = {"classes": classes.to_dict(), "normalize": config["normalize"], "max_side": config["max_side"]}
    with atomic_path(out) as temporary:
        write_onnx(network.eval(), temporary, {key: json.dumps(value) for key, value in metadata.items()})
        difference = check_onnx(network, temporary)
    return f"{'share of other ids' if with_preprocessing else 'largest difference of a logit'}: {difference:.1g}"


def get_args_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help="trained model; when not given: the newest checkpoint/*_best.pth, else the shipped one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .onnx or .pth file to write")
    parser.add_argument("--with_preprocessing", action="store_true", help="ONNX: photographs in, class ids out")
    return parser


def main(args) -> int:
    checkpoint, found = args.checkpoint or default_checkpoint(), "half precision"
    if args.out.resolve() == checkpoint.resolve():
        raise UserError(f"--out {args.out}: is the checkpoint itself; name another file")
    if args.out.suffix == ".onnx":
        found = export_onnx(checkpoint, args.out, args.with_preprocessing)
    elif args.out.suffix == ".pth" and args.with_preprocessing:
        raise UserError(f"--with_preprocessing: {args.out} holds weights alone; leave it out, or name an .onnx file")
    elif args.out.suffix == ".pth":
        release(checkpoint, args.out)
    else:
        raise UserError(f"--out {args.out}: the name must end in .onnx or .pth")
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB; {found}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
