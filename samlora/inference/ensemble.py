"""Several views of a slice, or several adapters, averaged into one answer."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlora.errors import InputError

FLIPS = ((), (-1,), (-2,), (-2, -1))  # axes of (B, C, H, W)


class Averaged(nn.Module):
    """The mean of the class probabilities of several models, each asked about several flips of every slice.

    Takes the place of a model: `averaged(images (B, C, S, S)) -> log-probabilities (B, classes + 1, L, L)`. Systems may
    differ; L is the side of the finest logits, and coarser ones are enlarged to it, bilinear, as every model's are.
    models: as `samlora.load_model` gives them. flips: True asks about the slice and its three mirror images.
    Raises InputError when the models do not belong together.
    """

    def __init__(self, models: Sequence[nn.Module], flips: bool):
        super().__init__()
        first = models[0].spec
        takes = {getattr(model, "volumetric", False): model.spec.system for model in models}
        if len(takes) > 1:
            raise InputError(
                f"--adapter: the system of one is {takes[True]}, which takes patches of volumes, of another "
                f"{takes[False]}, which takes slices; average them apart"
            )
        for other in (model.spec for model in models[1:]):
            for name in ("class_names", "image_size", "in_channels", "recipe"):
                ours, theirs = getattr(first, name), getattr(other, name)
                if ours != theirs:
                    raise InputError(
                        f"--adapter: the {name} of one is {ours}, of another {theirs}; only adapters "
                        "that were trained alike can be averaged"
                    )
        self.models = nn.ModuleList(models)
        self.flips = FLIPS if flips else FLIPS[:1]
        self.spec = first
        if len(framings := {(model.pixels, model.fill) for model in models}) > 1:
            raise InputError(f"--adapter: these adapters prepare images differently ({framings}); average them apart")
        self.pixels, self.fill = models[0].pixels, models[0].fill
        self.logit_side = max(model.logit_side for model in models)
        self.volumetric = getattr(models[0], "volumetric", False)
        if self.volumetric:
            self.name, self.in_channels, self.roi = models[0].name, models[0].in_channels, models[0].roi

    def forward(self, images: Tensor) -> Tensor:
        answers = [model(images.flip(axes)).flip(axes).float() for model in self.models for axes in self.flips]
        finest = max(answer.shape[2:] for answer in answers)
        probabilities = [
            (answer if answer.shape[2:] == finest else F.interpolate(answer, finest, mode="bilinear")).log_softmax(
                dim=1
            )
            for answer in answers
        ]
        # In logarithms, as probabilities of confident models round to 0 and could not be compared.
        return torch.stack(probabilities).logsumexp(dim=0) - math.log(len(answers))
