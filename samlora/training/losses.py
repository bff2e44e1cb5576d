"""The loss SAMed trains with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from samlora.data.ignored import IGNORE
from samlora.engine import sum_over_processes

SMOOTH = 1e-5


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """SAMed's soft Dice loss: per class over the whole batch, squared denominators, mean over all classes.

    logits: (B, C, h, w) or (B, C, d, h, w). labels: (B, ...) int64 in 0..C-1. Returns a scalar in 0..1. Source: SAMed,
    utils.DiceLoss, after TransUNet; it is V-Net's Dice (arXiv 1606.04797) over softmax probabilities.
    """
    return _dice(*_overlap_and_sizes(logits, labels))


def _overlap_and_sizes(
    logits: Tensor, labels: Tensor, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per class (C,), summed over the batch: what is shared, and what both have.

    counted: bool, of the shape of labels, which pixels count; None for all.
    """
    probability = logits.float().softmax(dim=1)
    target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(probability.dtype)
    if counted is not None:
        probability = probability.masked_fill(~counted[:, None], 0)
        target = target.masked_fill(~counted[:, None], 0)
    axes = (0, *range(2, logits.ndim))
    return (probability * target).sum(axes), probability.square().sum(axes) + target.sum(axes)


def _dice(overlap: Tensor, sizes: Tensor) -> Tensor:
    return (1 - (2 * overlap + SMOOTH) / (sizes + SMOOTH)).mean()


def dice_ce(
    logits: Tensor,
    labels: Tensor,
    dice_weight: float = 0.8,
    total: int | None = None,
    ignore: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - w) * cross-entropy + w * Dice loss, and the two parts; computed in float32.

    total: samples of the batch in all processes, where each holds a part of it, perhaps none. The loss is that of the
    whole batch, the same in every process (`sum_over_processes` says what becomes of its gradient). ignore: labels may
    be `samlora.data.ignored.IGNORE`; the loss is that of all other pixels.
    """
    if ignore:
        counted = labels != IGNORE
        labels = labels.masked_fill(~counted, 0)
        each = F.cross_entropy(logits.float(), labels, reduction="none")
        parts = torch.stack([each.masked_fill(~counted, 0).sum(), counted.sum().to(each.dtype)])
        sums = torch.cat([parts, *_overlap_and_sizes(logits, labels, counted)])
        sums = sums if total is None else sum_over_processes(sums)
        ce, dice = sums[0] / sums[1].clamp(min=1), _dice(*sums[2:].chunk(2))
    elif total is None:
        ce, dice = F.cross_entropy(logits.float(), labels), dice_loss(logits, labels)
    else:
        # A sum over the whole batch's pixels, since parts differ in size and a mean of none is NaN.
        ce = F.cross_entropy(logits.float(), labels, reduction="sum") / (total * labels.shape[1:].numel())
        sums = sum_over_processes(torch.cat([ce[None], *_overlap_and_sizes(logits, labels)]))
        ce, dice = sums[0], _dice(*sums[1:].chunk(2))
    return (1 - dice_weight) * ce + dice_weight * dice, ce, dice
