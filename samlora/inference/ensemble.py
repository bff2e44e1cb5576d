"""Several views of a slice, or several adapters, averaged into one answer."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlora.errors import InputError

FLIPS = ((), (-1,), (-2,), (-2, -1))  # axes of (B, C, H, W)
_SIDES = re.compile(
    r"left|right|lt|rt|lh|rh|l|r|links|rechts|linke\w?|rechte\w?|gauche|droite?|izquierd[oa]|derech[oa]|"
    r"sinist(?:er|ra|rum|ro)|dext(?:er|ra|rum)|destr[oa]|sin|dex"
)
_SIDE_SIGNS = re.compile("[左右]")
# Of what both views draw. Measured: 0.94 to 1 for a model that knows left and right by their place, 0.24 for random
# weights.
_EXCHANGED = 1 / 3
_SEEN_IN_BOTH = 0.5  # Dice of the foregrounds of two views, below which they agree on nothing


def sided(names: Iterable[str]) -> list[str]:
    """The class names that say left or right, and so mean another structure in a mirror image."""
    words = {name: re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) for name in names}
    return [name for name, parts in words.items() if any(map(_SIDES.fullmatch, parts)) or _SIDE_SIGNS.search(name)]


def without_exchanges(model: nn.Module, predict: Callable[[nn.Module], np.ndarray]) -> tuple[np.ndarray, str]:
    """The labels that `predict` makes with `model`, and a remark for people, "" if there is none.

    Where an average's mirror images show other classes than the image itself, such as left and right organs exchanged,
    the image is predicted again without them, and the remark says so.
    """
    if not isinstance(model, Averaged) or len(model.flips) == 1:
        return predict(model), ""
    model.counts = None
    labels = predict(model)
    share = model.exchanged()
    if share <= _EXCHANGED:
        return labels, ""
    flips, model.flips = model.flips, FLIPS[:1]
    try:
        labels = predict(model)
    finally:
        model.flips = flips
    text = f"mirror images show other classes in {100 * share:.0f} % of what is drawn, as left and right exchanged"
    return labels, f"--tta is not used here: {text}"


class Averaged(nn.Module):
    """The mean of the class probabilities of several models, each asked about several flips of every slice.

    Takes the place of a model: `averaged(images (B, C, S, S)) -> log-probabilities (B, classes + 1, L, L)`. Systems may
    differ; L is the side of the finest logits, and coarser ones are enlarged to it, bilinear, as every model's are.
    models: as `samlora.load_model` gives them. flips: True asks about the slice and its three mirror images, unless a
    class name says left or right: `note` then says that they are not used.
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
        sides = sided(first.class_names) if flips else []
        self.flips = FLIPS if flips and not sides else FLIPS[:1]
        self.note = ""
        if sides:
            named = ", ".join(sides[:4]) + (", ..." if len(sides) > 4 else "")
            self.note = f"--tta is not used: in mirror images the classes {named} mean another side"
        # Voxels that a mirror image and the image itself draw: of different classes, both, either one, all views.
        self.counts: Tensor | None = None
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
        if len(self.flips) > 1:
            self._compare(probabilities)
        # In logarithms, as probabilities of confident models round to 0 and could not be compared.
        return torch.stack(probabilities).logsumexp(dim=0) - math.log(len(answers))

    def exchanged(self) -> float:
        """The share of what the image and a mirror image both draw that has another class there, of `counts`.

        The highest of the mirror images; 0 for those that draw something else altogether, which are no exchange.
        """
        if self.counts is None:
            return 0.0
        different, both, drawn = self.counts.double().cpu().unbind(dim=1)
        seen = 2 * both / drawn.clamp(min=1) >= _SEEN_IN_BOTH
        return float(torch.where(seen, different / both.clamp(min=1), 0.0).max())

    def _compare(self, probabilities: Sequence[Tensor]) -> None:
        """Counts where mirror images show other classes than the image; probabilities: model by model, view by view."""
        views = len(self.flips)
        counts = []
        for view in range(1, views):
            sums = torch.zeros(3, dtype=torch.int64, device=probabilities[0].device)
            for first in range(0, len(probabilities), views):
                plain, mirrored = (probabilities[n].argmax(dim=1) for n in (first, first + view))
                both = (plain > 0) & (mirrored > 0)
                drawn = (plain > 0).sum() + (mirrored > 0).sum()
                sums += torch.stack([((plain != mirrored) & both).sum(), both.sum(), drawn])
            counts.append(sums)
        found = torch.stack(counts)
        self.counts = found if self.counts is None else self.counts + found
