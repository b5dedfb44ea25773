"""The training loss, cross-entropy with or without soft Dice, and the class weights.

loss_fn = SegmentationLoss(ignore_index=0, dice=True)
loss_fn(logits, mask).backward()                          # (N, C, H, W) float, (N, H, W) int64
"""

import torch
from torch import Tensor, nn


class SegmentationLoss(nn.Module):
    """Cross-entropy, with ``dice`` plus soft Dice. Pixels of ``ignore_index`` do not count.

    weight: (C,) float class weights of the cross-entropy, or None.
    Shape: logits (N, C, H, W), mask (N, H, W) int64 -> scalar; 0 for a batch without labels.
    """

    weight: Tensor | None

    def __init__(self, ignore_index: int = 255, weight: Tensor | None = None, dice: bool = False):
        super().__init__()
        self.ignore_index = ignore_index
        self.dice = dice
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        # In float32: sums over many pixels lose small terms in half precision.
        log_prob = logits.float().log_softmax(1)
        labelled = mask != self.ignore_index
        target = torch.where(labelled, mask, 0)
        # Gathered, not F.cross_entropy: its CUDA kernel for (N, C, H, W) has no deterministic
        # variant, and Dice needs the same probabilities.
        of_target = log_prob.gather(1, target.unsqueeze(1)).squeeze(1)  # (N, H, W)
        pixel_weight = labelled.float()
        if self.weight is not None:
            pixel_weight = pixel_weight * self.weight[target]
        loss = -(of_target * pixel_weight).sum() / pixel_weight.sum().clamp_min(1e-6)
        if not self.dice:
            return loss
        return loss + dice_loss(log_prob, of_target, target, labelled)


def dice_loss(log_prob: Tensor, of_target: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    """1 - the mean soft Dice coefficient (Milletari et al. 2016) of the classes in the masks.

    Shape: log_prob (N, C, H, W), of_target (N, H, W) its values at the target, target (N, H, W)
    int64 in 0 … C-1, labelled (N, H, W) bool -> scalar; 0 without labelled pixels.
    """
    images, classes = log_prob.shape[:2]
    zeros = log_prob.new_zeros(images * classes)
    first_cell = classes * torch.arange(images, device=target.device).view(-1, 1, 1)
    cell = (target + first_cell).flatten()

    def sum_by_class(values: Tensor) -> Tensor:  # (N, H, W) -> (C,)
        # index_add takes a fifth of the time of a product with a one-hot mask. One sum for each
        # image, because float32 counts to 2²⁴ only.
        return zeros.index_add(0, cell, values.flatten()).view(images, classes).sum(0)

    overlap = sum_by_class(of_target.exp() * labelled)
    pixels = sum_by_class(labelled.float())
    predicted = (log_prob.exp() * labelled.unsqueeze(1)).sum((0, 2, 3))
    dice = 2 * overlap / (predicted + pixels).clamp_min(1e-6)
    present = pixels > 0
    return ((1 - dice) * present).sum() / present.sum().clamp_min(1)


def class_weights(kind: str, pixels: Tensor, ignore_index: int = 255) -> Tensor | None:
    """(C,) float32 weights from the (C,) pixel counts of the training masks; None for ``none``.

    ``log``: 1 / ln(1.02 + share) (Paszke et al. 2016, ENet); a rare class weighs up to 15 times as
    much as a common one. ``mild``: 1 / ln(1.1 + share), up to 4 times; the constant was chosen by
    measurement (RESULTS.md). Shares are of the labelled pixels. The ignored class weighs 0, an
    absent one 1. Raises KeyError for another kind.
    """
    if kind == "none":
        return None
    constants = {"log": 1.02, "mild": 1.1}
    scored = torch.arange(len(pixels), device=pixels.device) != ignore_index
    pixels = pixels.double() * scored
    share = pixels / pixels.sum().clamp_min(1)
    weight = 1 / torch.log(constants[kind] + share)
    return (torch.where(share > 0, weight, 1.0) * scored).float()
