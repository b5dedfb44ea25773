"""What a run shows of itself: curves and a panel of predictions after every validation, and TensorBoard."""
import numpy as np

from datasets.camvid import CamVidDataset
from datasets.classes import ClassSet
from inference.predictor import Predictor
from output.visualize import panel_image, save_curves
from support.command import UserError, is_main_process
from support.files import write_file
from training.run import RunFiles


class Monitor:
    """Writes the pictures of a run, and with ``tensorboard`` its scalars, panels and flags from ``first_epoch`` on.

    Does nothing in torchrun's further processes. Raises UserError where TensorBoard is asked for and missing.
    """

    def __init__(self, files: RunFiles, val_set: CamVidDataset, classes: ClassSet, predictor: Predictor,
                 tensorboard: bool = False, first_epoch: int = 1):
        self.files, self.val_set, self.classes, self.predictor = files, val_set, classes, predictor
        self.writer = None
        if tensorboard and is_main_process():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs one more package: pip install tensorboard") from None
            # What a killed run logged of the epoch that is repeated is dropped.
            self.writer = SummaryWriter(str(files.path("tensorboard")), purge_step=first_epoch)
            self.writer.add_text("flags", files.path("args.json").read_text())

    def __call__(self, row: dict[str, float], history: list[dict]) -> None:
        """Show an epoch's figures; also its pictures, if it was validated."""
        if not is_main_process():
            return
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
        rows = [(image, mask, self.predictor(self.predictor.prepare([image]), mask.shape)[0].cpu().numpy())
                for image, mask in frames]
        panel = panel_image(rows, self.classes)
        write_file(self.files.path("panel.png"), panel.save)
        if self.writer:
            self.writer.add_image("image, mask, prediction", np.asarray(panel), epoch, dataformats="HWC")
