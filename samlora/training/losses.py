"""The loss SAMed trains with."""

import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1e-5


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """SAMed's soft Dice loss: per class over the whole batch, squared denominators, mean over all classes.

    logits: (B, C, h, w). labels: (B, h, w) int64 in 0..C-1. Returns a scalar in 0..1. Source: SAMed,
    utils.DiceLoss, after TransUNet; it is V-Net's Dice (arXiv 1606.04797) over softmax probabilities.
    """
    probability = logits.float().softmax(dim=1)
    target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(probability.dtype)
    axes = (0, 2, 3)
    overlap = (probability * target).sum(axes)
    sizes = probability.square().sum(axes) + target.sum(axes)
    return (1 - (2 * overlap + SMOOTH) / (sizes + SMOOTH)).mean()


def dice_ce(logits: Tensor, labels: Tensor, dice_weight: float = 0.8) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - w) * cross-entropy + w * Dice loss, and the two parts; computed in float32."""
    ce = F.cross_entropy(logits.float(), labels)
    dice = dice_loss(logits, labels)
    return (1 - dice_weight) * ce + dice_weight * dice, ce, dice
