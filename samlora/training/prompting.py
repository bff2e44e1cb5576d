"""Prompts of a training batch: drawn from its labels, with what they ask for as targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samlora.data.batch import frame_of, transformed
from samlora.data.dataset import Sample
from samlora.data.ignored import split_ignored
from samlora.inference.prompted import as_prompts, choose, draw_prompt
from samlora.model.sam import Prompts
from samlora.pixels import Pixels
from samlora.prompting import Prompting


@dataclass(frozen=True)
class Objects:
    """The objects that a batch is asked for, P of them, at least one.

    prompts: their prompts, with image_index. targets: (P, L, L) float 0 or 1. inside: (P, L, L) bool, false in
    the padding and where the label is ignored. real: (P,) float, 0 for one that only stands in where a batch shows no
    object at all.
    """

    prompts: Prompts
    targets: Tensor
    inside: Tensor
    real: Tensor

    @property
    def pixels(self) -> Tensor:
        """(P,) pixels of each target that count, at least 1."""
        return self.inside.sum((1, 2)).clamp(min=1)

    def counts(self, own: int) -> Tensor:
        """(P,) float: which of them count when the first `own` images do."""
        return self.real * (self.prompts.image_index < own)


def draw_objects(
    batch: Sequence[Sample],
    prompting: Prompting,
    side: int,
    pixels: Pixels,
    seed: int,
    device: torch.device,
    low: int | None = None,
    recipe: Mapping | None = None,
) -> Objects:
    """Chooses objects of every sample and draws prompts for them; both depend on the seed and the sample's key alone.

    side: S of the model's square. Boxes and points lie in its pixels. low: L, side of the targets; None for S/4.
    recipe: what made the labels, as plain values.
    """
    found, targets, inside, where = [], [], [], []
    for number, sample in enumerate(batch):
        random = np.random.default_rng([seed, 4, *sample.key])
        label = transformed(torch.from_numpy(sample.label), sample.transform).numpy()
        label, ignored = split_ignored(label, recipe)
        frame = frame_of(*label.shape, side, pixels, low)
        counted = frame.inside
        if ignored is not None:
            counted = counted & ~frame.label(ignored)
        for mask in choose(label, prompting, random):
            found.append(draw_prompt(mask, prompting, frame, random))
            targets.append(frame.label(mask))
            inside.append(counted)
            where.append(number)
    if not found:  # a forward pass needs something to ask for, and processes must keep in step
        frame = frame_of(*batch[0].label.shape, side, pixels, low)
        empty = np.zeros(batch[0].label.shape, bool)
        found = [draw_prompt(~empty, prompting, frame, np.random.default_rng(seed))]
        targets, inside, where = [frame.label(empty)], [frame.inside], [0]
    real = torch.ones(len(where)) if any(map(np.any, targets)) else torch.zeros(len(where))
    return Objects(
        as_prompts(found, where, prompting, device),
        torch.from_numpy(np.stack(targets)).float().to(device),
        torch.from_numpy(np.stack(inside)).to(device),
        real.to(device),
    )
