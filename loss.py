"""The training losses and the class weights."""
import torch
from torch import Tensor, nn

from distributed import sum_over_processes


class SegmentationLoss(nn.Module):
    """Cross-entropy, plus the soft Dice loss with ``dice``. Pixels of ``ignore_index`` count nowhere.

    In a distributed run, the loss of the batches of all processes together.

    weight: (C,) float class weights of the cross-entropy, or None.
    Shape: logits (N, C, H, W), mask (N, H, W) int64 -> scalar; 0 where a batch has no labelled pixel.
    """

    def __init__(self, ignore_index: int, weight: Tensor | None = None, label_smoothing: float = 0.0,
                 dice: bool = False):
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.dice = dice
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        log_prob = logits.float().log_softmax(1)  # sums over many pixels lose small terms in half precision
        labelled = mask != self.ignore_index
        target = torch.where(labelled, mask, 0)
        # Gathered, not F.cross_entropy: its CUDA kernel for (N, C, H, W) has no deterministic variant, and Dice
        # needs the same probabilities.
        of_target = log_prob.gather(1, target.unsqueeze(1)).squeeze(1)  # (N, H, W)
        weight = log_prob.new_ones(log_prob.shape[1]) if self.weight is None else self.weight
        pixel_weight = weight[target] * labelled
        loss = -(of_target * pixel_weight).sum()
        if self.label_smoothing:
            of_all = -((log_prob * weight.view(-1, 1, 1)).mean(1) * labelled).sum()
            loss = torch.lerp(loss, of_all, self.label_smoothing)
        loss, total_weight = sum_over_processes(torch.stack([loss, pixel_weight.sum()]))
        loss = loss / total_weight.clamp_min(1e-6)
        return loss + dice_loss(log_prob, of_target, target, labelled) if self.dice else loss


def dice_loss(log_prob: Tensor, of_target: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    """1 - the mean soft Dice coefficient (Milletari et al. 2016) of the classes in the batch's labels.

    Shape: log_prob (N, C, H, W), and of the label's class of_target (N, H, W), target (N, H, W) int64 in 0 … C-1,
    labelled (N, H, W) bool -> scalar; 0 without labelled pixels.
    """
    zeros, ids = log_prob.new_zeros(log_prob.shape[1]), target.flatten()
    # Sums by class: adding by index costs a fifth of multiplying with a one-hot mask.
    overlap = zeros.index_add(0, ids, (of_target.exp() * labelled).flatten())  # (C,)
    pixels = zeros.index_add(0, ids, labelled.flatten().to(zeros.dtype))
    predicted = (log_prob.exp() * labelled.unsqueeze(1)).sum((0, 2, 3))
    overlap, pixels, predicted = sum_over_processes(torch.stack([overlap, pixels, predicted]))
    dice = 2 * overlap / (predicted + pixels).clamp_min(1e-6)
    present = pixels > 0
    return ((1 - dice) * present).sum() / present.sum().clamp_min(1)


def class_weights(kind: str, pixels: Tensor, ignore_index: int | None) -> Tensor | None:
    """(C,) float32 weights from the (C,) pixel counts of the training labels; None for ``none``.

    ``median``: median share / share (Eigen & Fergus 2015), capped at 10; ``log``: 1 / ln(1.02 + share)
    (Paszke et al. 2016, ENet), up to fifteenfold; ``mild``: the same with 1.1, up to fourfold.
    Shares are among the labelled pixels; the ignored class weighs 0, an absent one 1.
    """
    if kind == "none":
        return None
    pixels = pixels.double().clone()
    if ignore_index is not None and ignore_index < len(pixels):
        pixels[ignore_index] = 0
    share = pixels / pixels.sum().clamp_min(1)
    present = share > 0
    if kind == "median":
        middle = share[present].quantile(0.5) if present.any() else 1.0
        weight = (middle / share.clamp_min(1e-12)).clamp_max(10)
    else:
        weight = 1 / torch.log((1.02 if kind == "log" else 1.1) + share)
    weight = torch.where(present, weight, 1.0)
    if ignore_index is not None and ignore_index < len(pixels):
        weight[ignore_index] = 0
    return weight.float()
