"""What systems train on: a batch of samples in, losses out. One objective per kind of answer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samlora.data.batch import make_batch, make_targets
from samlora.data.dataset import Sample
from samlora.data.ignored import ignores
from samlora.data.patches import patch_batch
from samlora.engine import sum_over_processes
from samlora.errors import InputError
from samlora.inference.prompted import in_turn, least_sure
from samlora.model.baselines import Baseline
from samlora.model.methods import system_row
from samlora.model.sam import Activations, Sam
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.losses import dice_ce
from samlora.training.prompting import Objects, draw_objects

_NOTHING = -30.0  # a logit beyond every doubt, whose loss rounds to 0


@dataclass(frozen=True)
class Losses:
    """What a batch gave.

    total: the scalar to minimise, the same in every process. parts: what it is made of, under the names of
    metrics.csv. finite: (B,) whether each sample's logits are.
    """

    total: Tensor
    parts: dict[str, Tensor]
    finite: Tensor


class Objective:
    """Base of the objectives: makes a batch of what the loader gave.

    parts: names of the parts of the loss. low: L, side of the model's logits. fill: what images are padded with. chunk:
    slices of an item, which follow one another in a batch. total of a call: items of the batch in all processes, None
    where there is one process. own: how many of this process's samples count (one without any was dealt one to keep in
    step).
    """

    parts: tuple[str, ...]

    def __init__(self, config: TrainConfig, model: Sam | Baseline, prompting: Prompting):
        self.config, self.prompting, self.spec = config, prompting, model.spec
        self.row, self.chunk = system_row(model.spec.system), model.chunk
        self.ignore = ignores(model.spec.recipe)
        self.low, self.fill, self.pixels = model.logit_side, model.fill, model.spec.pixels

    def __call__(
        self, model: Any, batch: Sequence[Sample], own: int, total: int | None, kept: Activations | None = None
    ) -> Losses:
        """The losses of a batch. model: as the engine wrapped it. kept: what its encoder had computed of the images."""
        raise NotImplementedError

    def _inputs(
        self, model: Any, batch: Sequence[Sample], kept: Activations | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Images (B, C, S, S), None where the encoder has seen them, and classes (B, L, L)."""
        images, labels = ([torch.from_numpy(getattr(s, kind)) for s in batch] for kind in ("image", "label"))
        transforms, device = [s.transform for s in batch], next(model.parameters()).device
        side = self.spec.image_size
        if kept is not None:
            return None, make_targets(labels, transforms, side, device, self.pixels, self.low)
        return make_batch(images, labels, transforms, side, device, self.pixels, self.fill, self.low)


class Classes(Objective):
    """All classes without prompts: SAMed's cross-entropy and Dice over the mask tokens."""

    parts = ("loss_ce", "loss_dice")

    def __call__(self, model, batch, own, total, kept=None):
        images, labels = self._inputs(model, batch, kept)
        logits = model(images) if kept is None else model(None, embeddings=kept)
        loss, ce, dice = dice_ce(
            logits[:own], labels[:own], self.config.dice_param, total, self.ignore
        )
        return Losses(loss, {"loss_ce": ce, "loss_dice": dice}, _finite(logits))


class Patches(Classes):
    """All classes of patches of volumes: the same loss over their voxels, at full resolution."""

    def _inputs(self, model, batch, kept=None):
        return patch_batch(batch, next(model.parameters()).device)


class Masks(Objective):
    """One mask for each prompt: Dice with squared denominators and cross-entropy, each mask counting alike.

    MONAI's DiceCELoss(sigmoid=True, squared_pred=True) over single masks, as Sam_LoRA and MedSAM train. Padding and
    what is ignored do not count.
    """

    parts = ("loss_dice", "loss_bce")

    def __init__(self, config, model, prompting):
        from monai.losses import DiceLoss  # here, before the clock of training runs: it takes seconds

        super().__init__(config, model, prompting)
        self._dice_loss = DiceLoss(sigmoid=True, squared_pred=True, reduction="none")

    def __call__(self, model, batch, own, total, kept=None):
        images = self._inputs(model, batch)[0] if kept is None else None
        objects = self._objects(model, batch, images, kept)
        answer = model(images, objects.prompts, kept, details=True)
        each = self._each(answer.masks[:, 0], answer.iou[:, 0], objects)
        means = _mean_of_masks(each, objects.counts(own), total)
        parts = dict(zip(self.parts, means))
        return Losses(self._sum(parts), parts, _finite_of(answer.masks, objects.prompts.image_index, len(batch)))

    def _objects(
        self, model: Any, batch: Sequence[Sample], images: Tensor | None, kept: Activations | None
    ) -> Objects:
        """What the prompts of this batch ask for, on the model's device."""
        device, (asked, later) = next(model.parameters()).device, in_turn(self.prompting)
        objects = draw_objects(
            batch,
            asked,
            self.spec.image_size,
            self.pixels,
            self.config.seed,
            device,
            self.low,
            self.spec.recipe,
        )
        if later:
            with torch.no_grad():
                masks = model(images, objects.prompts, kept, details=True).masks[:, 0]
            prompts = least_sure(objects.prompts, masks, objects.targets, objects.inside, later, self.spec.image_size)
            objects = replace(objects, prompts=prompts)
        return objects

    def _each(self, masks: Tensor, iou: Tensor, objects: Objects) -> list[Tensor]:
        """For every part of the loss its value for each mask, (P,)."""
        logits = masks.float().masked_fill(~objects.inside, _NOTHING)
        bce = F.binary_cross_entropy_with_logits(logits, objects.targets, reduction="none")
        return [self._dice(logits, objects.targets), bce.sum((1, 2)) / objects.pixels]

    def _dice(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._dice_loss(logits[:, None], targets[:, None]).flatten()

    def _sum(self, parts: dict[str, Tensor]) -> Tensor:
        return sum(parts.values())


class FocalDiceIoU(Masks):
    """SAM's own loss (arXiv 2304.02643, appendix A): 20 x focal + Dice + squared error of the predicted IoU."""

    parts = ("loss_focal", "loss_dice", "loss_iou")

    def __init__(self, config, model, prompting):
        from monai.losses import FocalLoss

        super().__init__(config, model, prompting)
        self._focal_loss = FocalLoss(gamma=2.0, alpha=0.25, reduction="none")

    def _each(self, masks, iou, objects):
        logits = masks.float().masked_fill(~objects.inside, _NOTHING)
        focal = self._focal_loss(logits[:, None], objects.targets[:, None])[:, 0]
        error = _iou_error(logits, iou, objects)
        return [focal.sum((1, 2)) / objects.pixels, self._dice(logits, objects.targets), error]

    def _sum(self, parts):
        return 20 * parts["loss_focal"] + parts["loss_dice"] + parts["loss_iou"]


class DiceBceIoU(Masks):
    """LiteMedSAM's fine-tuning loss: Dice + cross-entropy + squared error of the predicted IoU."""

    parts = ("loss_dice", "loss_bce", "loss_iou")

    def _each(self, masks, iou, objects):
        return [*super()._each(masks, iou, objects), _iou_error(masks, iou, objects)]


class Joint(Masks):
    """Classes without prompts and masks by prompts from one encoding: (1 - r) and r of their losses, r prompt_ratio."""

    parts = ("loss_ce", "loss_dice", "loss_prompted")

    def __call__(self, model, batch, own, total, kept=None):
        images, labels = self._inputs(model, batch, kept)
        objects = self._objects(model, batch, images, kept)
        answer = model(images, objects.prompts, kept, details=True)
        loss, ce, dice = dice_ce(
            answer.classes[:own], labels[:own], self.config.dice_param, total, self.ignore
        )
        each = self._each(answer.masks[:, 0], answer.iou[:, 0], objects)
        prompted = sum(_mean_of_masks(each, objects.counts(own), total))
        ratio = self.config.prompt_ratio
        finite = _finite(answer.classes) & _finite_of(answer.masks, objects.prompts.image_index, len(batch))
        parts = {"loss_ce": ce, "loss_dice": dice, "loss_prompted": prompted}
        return Losses((1 - ratio) * loss + ratio * prompted, parts, finite)


OBJECTIVES = {
    "classes": Classes,
    "patches": Patches,
    "masks": Masks,
    "focal_dice_iou": FocalDiceIoU,
    "dice_bce_iou": DiceBceIoU,
    "joint": Joint,
}


def make_objective(config: TrainConfig, model: Sam | Baseline) -> Objective:
    """What a model's system trains on. Raises InputError for options that do not fit it."""
    system = model.spec.system
    return OBJECTIVES[system_row(system).objective](config, model, prompting_of(config, system))


def prompting_of(config: TrainConfig, system: str) -> Prompting:
    """How a run draws prompts: as the system's row says, with what the options change.

    Raises InputError for options of prompts where the system has none, or that contradict each other.
    """
    row = system_row(system)
    given = {f.name: getattr(config, f.name) for f in fields(Prompting) if hasattr(config, f.name)}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not row.promptable:
        name, value = next(iter(given.items()))
        raise InputError(f"--{name} {value}: the system {system} has no prompts; leave it out")
    prompting = replace(row.prompting, **given)
    takes_points = "pt" in prompting.prompt or prompting.prompt == "any"
    if takes_points and prompting.sample_num < 1:
        raise InputError(f"--sample_num {prompting.sample_num}: --prompt {prompting.prompt} needs a point at least")
    if prompting.point_strategy == "entropy" and (prompting.prompt not in ("pt", "pt_box") or prompting.sample_num < 2):
        raise InputError(
            "--point_strategy entropy: chooses the points after the first; it needs --prompt pt or pt_box and "
            "--sample_num 2 or more"
        )
    return prompting


def _mean_of_masks(each: Sequence[Tensor], counts: Tensor, total: int | None) -> list[Tensor]:
    """The mean of every part over the masks that count, those of all processes where there are several."""
    sums = torch.stack([(values * counts).sum() for values in each] + [counts.sum()])
    if total is not None:
        sums = sum_over_processes(sums)
    return list(sums[:-1] / sums[-1].detach().clamp(min=1))


def _iou_error(masks: Tensor, iou: Tensor, objects: Objects) -> Tensor:
    """Squared error (P,) of the IoU (P,) that was predicted for masks of logits (P, L, L); padding does not count."""
    drawn, truth = (masks.detach() > 0) & objects.inside, objects.targets > 0
    shared, either = (drawn & truth).sum((1, 2)), (drawn | truth).sum((1, 2))
    return (iou.float() - shared / either.clamp(min=1)).square()


def _finite(logits: Tensor) -> Tensor:
    return torch.isfinite(logits).flatten(1).all(dim=1)


def _finite_of(masks: Tensor, image_index: Tensor, count: int) -> Tensor:
    """Which of `count` images have finite masks alone."""
    broken = torch.zeros(count, device=masks.device).index_add(0, image_index, (~_finite(masks)).float())
    return broken == 0
