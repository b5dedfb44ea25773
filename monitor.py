"""What a run shows of itself: curves and predictions after every validation, TensorBoard, a table at the end."""
import shlex

import numpy as np
import torch
from torch.utils.data import DataLoader

from checkpoints import Run, load_model
from datasets.camvid import CamVidDataset
from engine import validate
from inference import TILE, Predictor
from metric import SegmentationMetric, score_table
from runtime import UserError, atomic_path, init_worker, is_main_process
from visualize import panel_image, save_curves


class Monitor:
    """Pictures of a run, and with --tensorboard its scalars, panels and flags. Idle in further processes.

    Raises UserError where TensorBoard is asked for and missing.
    """

    def __init__(self, run: Run, val_set: CamVidDataset, predictor: Predictor):
        self.run, self.val_set, self.predictor, self.writer = run, val_set, predictor, None
        self.frames = sorted({0, len(val_set) // 2, len(val_set) - 1})
        if run.args.tensorboard and is_main_process():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs one more package: pip install tensorboard") from None
            # What a killed run logged of the epoch that is repeated is dropped.
            self.writer = SummaryWriter(str(run.path("tensorboard")), purge_step=run.epoch + 1)

    def __call__(self, row: dict) -> None:
        """After an epoch with these figures, of which some are there after a validation alone."""
        if not is_main_process():
            return
        if "val_miou" in row:
            save_curves(self.run.history, self.run.path("curves.png"))
            panel = self.panel()
            with atomic_path(self.run.path("panel.png")) as temporary:
                panel.save(temporary)
            if self.writer:
                self.writer.add_image("photograph, label, prediction", np.asarray(panel), row["epoch"],
                                      dataformats="HWC")
        if self.writer:
            for key in row.keys() - {"epoch"}:
                self.writer.add_scalar(key, row[key], row["epoch"])
            self.writer.flush()

    def panel(self):
        """The first, the middle and the last validation frame with label and prediction, as an image."""
        rows = []
        for i in self.frames:
            photo, label = self.val_set.read(i)
            prediction = self.predictor(self.predictor.prepare([photo]), label.shape)[0].cpu().numpy()
            rows.append((photo, label, prediction))
        return panel_image(rows, self.run.classes)

    def close(self) -> None:
        if self.writer:
            flags = {key: value if isinstance(value, bool | int | float | str) else str(value)
                     for key, value in self.run.flags().items()}
            self.writer.add_hparams(flags, {"best val mIoU": self.run.best_miou}, run_name=".")
            self.writer.close()


def summarize(run: Run, val_loader: DataLoader, device: torch.device, amp_dtype: torch.dtype | None) -> None:
    """Score the best checkpoint as it lies on the disk: the table per class, and what to run next."""
    best = run.path("best.pth")
    model, classes, config = load_model(best)
    predictor = Predictor(model, classes.ignore_index, **config["normalize"], device=device, amp_dtype=amp_dtype,
                          tile=TILE, max_side=config["max_side"])
    metric = SegmentationMetric(len(classes), classes.void_id)
    # Anew, because in a distributed run that loader holds a share of the split.
    whole = DataLoader(val_loader.dataset, val_loader.batch_size, num_workers=val_loader.num_workers,
                       worker_init_fn=init_worker)
    validate(predictor, whole, metric)
    print(f"\nbest epoch, {best}:\n{score_table(metric.compute(), classes.names, classes.ignore_index)}")
    print(f"\npictures: {run.path('panel.png')} (photograph, label, prediction), {run.path('curves.png')}\nnext:")
    predict = ["--demo"] if run.args.demo else ["--image_dir", "PHOTOS", "--checkpoint", str(best)]
    evaluate = ["--data_root", str(run.args.data_root), "--split", "val", "--checkpoint", str(best)]
    print(f"  python predict.py {shlex.join(predict)}\n  python evaluate.py {shlex.join(evaluate)}")
