"""Write a trained network as an ONNX file, checked against PyTorch, or in half precision.

    pip install onnx onnxruntime onnxscript
    python export.py --out model.onnx                      the newest network, else the shipped one
    python export.py --out model.onnx --with_preprocessing
    python export.py --out model.pth --checkpoint checkpoint/unet_best.pth

The ONNX input is `image`, (N, 3, H, W) float32, normalised; the output `logits`, (N, C, H, W). With
--with_preprocessing they are `photo`, (N, H, W, 3) uint8 RGB of any size, and `ids`, (N, H, W)
uint8 class ids; images longer than max_side are shrunk inside the graph. For a network trained on
16-bit images, `photo` is int32 and has their values. The metadata of the file holds classes,
normalize, max_side and value_range.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.checkpoints import find_checkpoint, load_model, release
from inference.predictor import CHECKPOINT_HELP, MAX_SIDE_HELP, fold_batch_norm
from support.command import Parser, UserError, number, run_command
from support.files import atomic_path
from support.images import FULL_RANGE

TOLERANCE = 1e-3  # of logits, whose range is about 20; or the share of other class ids
SIZES = ((1, 64, 96), (2, 90, 131), (1, 33, 17))  # multiples of 16 or not, a batch or not


class FromPhotos(nn.Module):
    """(N, H, W, 3) uint8 RGB -> (N, H, W) uint8 class ids, as `Predictor` computes them."""

    def __init__(self, model: Any, config: dict):
        super().__init__()
        self.model = model
        self.max_side = config["max_side"] or 2**30
        self.low, self.high = config["value_range"]
        self.dtype = torch.uint8 if config["value_range"] == FULL_RANGE else torch.int32
        self.mean = nn.Buffer(torch.tensor(config["normalize"]["mean"]).view(3, 1, 1))
        self.std = nn.Buffer(torch.tensor(config["normalize"]["std"]).view(3, 1, 1))
        classes = config["classes"]
        if classes.ignore_index < len(classes):
            model.classifier.bias.data[classes.ignore_index] = -1e9  # never predicted

    def forward(self, photo: Tensor) -> Tensor:
        size = photo.shape[1:3]
        longer = torch.sym_max(*size)  # sizes are symbols while the network is exported
        limit = torch.sym_min(longer, self.max_side)
        small: Any = [
            torch.sym_max(1, (2 * side * limit + longer) // (2 * longer)) for side in size
        ]
        if self.dtype != torch.uint8:  # as `to_array` does it
            photo = ((photo - self.low) * (255 / (self.high - self.low))).clamp(0, 255).floor()
        image = photo.permute(0, 3, 1, 2).float()
        image = F.interpolate(image, small, mode="bilinear", antialias=True)
        prob = self.model((image / 255 - self.mean) / self.std).softmax(1)
        return F.interpolate(prob, size, mode="bilinear").argmax(1).to(torch.uint8)


def example(network: nn.Module, batch: int, height: int, width: int) -> Tensor:
    """A random input of the exported network."""
    generator = torch.Generator().manual_seed(height)
    if isinstance(network, FromPhotos):
        size = (batch, height, width, 3)
        top = 256 if network.dtype == torch.uint8 else network.high
        return torch.randint(0, top, size, dtype=network.dtype, generator=generator)
    return torch.randn(batch, 3, height, width, generator=generator)


def write_onnx(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Export with dynamic N, H and W."""
    import onnx

    photos = isinstance(network, FromPhotos)
    axes = ("batch", "height", "width", None) if photos else ("batch", None, "height", "width")
    dynamic = {i: axis for i, axis in enumerate(axes) if axis}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # on the exporter's internals
        program: Any = torch.onnx.export(
            network,
            (example(network, 2, 48, 80),),
            dynamo=True,
            verbose=False,
            input_names=["photo" if photos else "image"],
            output_names=["ids" if photos else "logits"],
            dynamic_shapes=(dynamic,),
        )
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


@torch.inference_mode()
def check_onnx(network: nn.Module, path: Path) -> float:
    """The largest difference to PyTorch over several sizes: of logits, or the share of other ids.

    Raises RuntimeError if it is more than rounding.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = []
    for size in SIZES:
        batch = example(network, *size)
        ours = network(batch).numpy()
        theirs = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        if isinstance(network, FromPhotos):
            differences.append((ours != theirs).mean())
        else:
            differences.append(np.abs(ours - theirs).max())
    largest = np.max(differences)  # NaN if one is NaN
    if not largest <= TOLERANCE:
        raise RuntimeError(f"the results of onnxruntime differ by {largest:.2g}")
    return largest


def export_onnx(
    checkpoint: Path, out: Path, with_preprocessing: bool = False, max_side: int | None = None
) -> str:
    """Write a checkpoint's network as an ONNX file. Returns what the check found.

    max_side: None takes that of the training.
    Raises UserError if a package is missing or the checkpoint cannot be read.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ModuleNotFoundError as error:
        sentence = f"{error.name} is missing: pip install onnx onnxruntime onnxscript"
        raise UserError(sentence) from None
    model, config = load_model(checkpoint)
    if max_side is not None:
        config["max_side"] = max_side
    metadata = {
        "classes": json.dumps(config["classes"].to_dict()),
        "normalize": json.dumps(config["normalize"]),
        "max_side": json.dumps(config["max_side"]),
        "value_range": json.dumps(config["value_range"]),
    }
    network = fold_batch_norm(model)
    if with_preprocessing:
        network = FromPhotos(network, config).eval()
    with atomic_path(out) as temporary:
        write_onnx(network, temporary, metadata)
        difference = check_onnx(network, temporary)
    shrunk = f"; images are shrunk to {config['max_side']} pixels" if config["max_side"] else ""
    return f"largest difference to PyTorch: {difference:.1g}{shrunk}"


def get_args_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, help=CHECKPOINT_HELP)
    add("--out", type=Path, required=True, help=".onnx or .pth file to write")
    add("--with_preprocessing", action="store_true", help="ONNX: photographs in, class ids out")
    add("--max_side", type=number(int, 0), help=MAX_SIDE_HELP)
    return parser


def main(args) -> None:
    checkpoint = find_checkpoint(args.checkpoint)
    if args.out.resolve() == checkpoint.resolve():
        raise UserError(f"--out {args.out} is the checkpoint itself; name another file")
    if args.out.suffix == ".onnx":
        found = export_onnx(checkpoint, args.out, args.with_preprocessing, args.max_side)
    elif args.out.suffix == ".pth" and not args.with_preprocessing:
        release(checkpoint, args.out)
        found = "half precision"
    else:
        raise UserError(
            f"--out {args.out}: the name must end in .onnx, or in .pth without --with_preprocessing"
        )
    print(f"wrote {args.out} from {checkpoint}, {args.out.stat().st_size / 1e6:.1f} MB; {found}")


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
