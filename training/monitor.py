"""What a run shows of itself: its lines, curves and a panel of predictions after every validation, and TensorBoard."""
import shlex
from typing import Any

import numpy as np

from datasets.camvid import CamVidDataset
from datasets.classes import ClassSet
from inference.predictor import Predictor
from metric import score_table
from output.visualize import panel_image, save_curves
from support.command import UserError
from support.files import write_file
from training.checkpoints import load_checkpoint
from training.run import RunFiles


class Monitor:
    """Writes the pictures of a run, and with ``tensorboard`` its scalars, panels and flags from ``first_epoch`` on.

    Raises UserError where TensorBoard is asked for and missing.
    """

    def __init__(self, files: RunFiles, val_set: CamVidDataset, classes: ClassSet, predictor: Predictor,
                 tensorboard: bool = False, first_epoch: int = 1):
        self.files, self.val_set, self.classes, self.predictor = files, val_set, classes, predictor
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs one more package: pip install tensorboard") from None
            # What a killed run logged of the epoch that is repeated is dropped.
            self.writer = SummaryWriter(str(files.path("tensorboard")), purge_step=first_epoch)
            self.writer.add_text("flags", files.path("args.json").read_text())

    def __call__(self, row: dict[str, float], history: list[dict]) -> None:
        """Show an epoch's figures; also its pictures, if it was validated."""
        if "val_miou" in row:
            save_curves(history, self.files.path("curves.png"))
            self.save_panel(len(history))
        if self.writer:
            for key, value in row.items():
                self.writer.add_scalar(key, value, len(history))
            self.writer.flush()

    def save_panel(self, epoch: int) -> None:
        """Draw the first, the middle and the last validation image with mask and prediction."""
        frames = [self.val_set.read(i) for i in sorted({0, len(self.val_set) // 2, len(self.val_set) - 1})]
        rows = [(image, mask, self.predictor.predict([image])[0]) for image, mask in frames]
        panel = panel_image(rows, self.classes)
        write_file(self.files.path("panel.png"), panel.save)
        if self.writer:
            self.writer.add_image("image, mask, prediction", np.asarray(panel), epoch, dataformats="HWC")


def print_epoch(epoch: int, epochs: int, row: dict[str, float], best: bool, seconds: float) -> None:
    """One line of figures. seconds: of an epoch, on average."""
    scores = ("val {val_loss:.3f} mIoU {val_miou:.3f} acc {val_pixel_accuracy:.3f}  ".format(**row)
              if "val_miou" in row else "")
    rest = seconds * (epochs - epoch)
    left = f"{rest:.0f} s" if rest < 90 else f"{rest / 60:.0f} min" if rest < 5400 else f"{rest / 3600:.1f} h"
    print(f"epoch {epoch:>3}/{epochs}  loss {row['train_loss']:.3f}  {scores}lr {row['lr']:.2g}  "
          f"{row['images_per_second']:.1f} img/s  {left} left{' *best' if best else ''}", flush=True)


def print_end(args, files: RunFiles, classes: ClassSet) -> None:
    """The best epoch's table, and what to run next."""
    best, data = shlex.quote(str(files.path("best.pth"))), shlex.quote(str(args.data_root))
    scores = load_checkpoint(files.path("best.pth")).get("scores")
    table = score_table(scores, classes.names, classes.ignore_index) if scores else ""
    predict = "--demo" if args.demo else f"--image_dir IMAGES --checkpoint {best}"
    print(f"\nbest epoch, {best}:\n{table}\n\npictures: {files.path('panel.png')} (image, mask, prediction), "
          f"{files.path('curves.png')}\nnext:\n  python predict.py {predict}\n"
          f"  python evaluate.py --data_root {data} --split val --checkpoint {best}")


def resume_hint(files: RunFiles) -> str:
    """What to type to go on after a signal."""
    if not files.path("last.pth").is_file():
        return "no epoch was finished, so there is nothing to resume"
    return ("to go on after the last finished one, add to the same command:\n"
            f"  --resume {shlex.quote(str(files.path('last.pth')))}")


def describe_loss(step: int | None, epoch: int, loader: Any) -> str:
    """Where the loss was lost, and what to try. step: None in validation."""
    where = "the validation"
    if step is not None:
        batch = [*loader.sampler][step * loader.batch_size:(step + 1) * loader.batch_size]
        names = [loader.dataset.pairs[i].image.name for i, _ in batch]
        where = f"step {step + 1}, with {', '.join(names)}"
    return (f"the loss is NaN or infinite in epoch {epoch}, {where}; try a lower --lr or --clip_grad 1. The checkpoint "
            f"of the last finished epoch is untouched")
