"""Masks by clicks and boxes: an image is encoded once, prompts are answered often, slice after slice of a volume."""

import dataclasses
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from samlora.data.frame import Frame
from samlora.data.given import check_case, check_picture, check_volume, kind_of
from samlora.data.grid import Case, Volume, case_to_volume
from samlora.data.pictures import PICTURE_AFFINE
from samlora.data.recipe import Recipe
from samlora.data.usual import usual_recipe
from samlora.data.volume import read_volume
from samlora.device import pick_device
from samlora.errors import InputError
from samlora.inference.asked import check_prompts
from samlora.inference.predict import as_case, fitting_recipe
from samlora.inference.prompted import encode_slices
from samlora.inference.propagate import Carried, StopRule, propagate
from samlora.inference.slices import check_answer
from samlora.model import checkpoint
from samlora.model.bases import ALL_PROMPTS, BASES, base_name, default_base, known_base
from samlora.model.build import build_model, load_model
from samlora.model.lora import merge
from samlora.model.methods import system_row, trained_names
from samlora.model.sam import Prompts, Sam
from samlora.model.variants import VARIANTS

_SURE = 6.9  # logit of 0.999
_PROMPTS_AT_ONCE = 32  # every prompt has its own copy of the embeddings in the decoder


class Masks(NamedTuple):
    """What a prompt gave.

    masks: (M, H, W) bool, in pixels of the image. scores: (M,) float32, the IoU that the model predicts for each.
    logits: (M, L, L) float32, one of which can be given back as `mask`. M is 1, or 3 with `multimask`. Of P boxes, or
    P sets of points, every one has P in front.
    """

    masks: np.ndarray
    scores: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Step:
    """A state of the click session: the prompts so far, and what they gave."""

    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None
    score: float = float("nan")
    logits: np.ndarray | None = None


class Predictor:
    """Answers prompts on one image or volume at a time, and draws label maps of it.

    `set_image` once, then `predict`, or `click`, `draw_box`, `undo`, `keep` as a person works, then `to_volume`. Points
    are (x, y), boxes (x0, y0, x1, y1), in pixels of `image`, the current slice as the recipe turned and cropped it.
    Holds state and no lock: several threads must take turns.
    """

    def __init__(
        self,
        model: Sam,
        recipe: Recipe | None = None,
        device: torch.device | str | None = None,
        precision: torch.dtype = torch.float32,
        cache_bytes: int = 2**29,
    ):
        """Takes a model from `samlora.load_model` or `samlora.build_model`.

        recipe: how volumes become slices; only for models whose adapter holds none. Where there is none at all,
        `samlora.data.usual` chooses. device: None for where the model is, "auto" for the best there is. precision: of
        the image encoder; prompts are answered in float32. cache_bytes: embeddings of so many slices are kept, those
        used last: 1 MiB a slice at 512 px, 4 MiB at 1024 px, half of it in half precision.
        Raises InputError when the recipe is not the adapter's, or the model is no SAM (a baseline such as a U-Net).
        """
        if not isinstance(getattr(model, "spec", None), checkpoint.Spec):
            raise InputError(f"{kind_of(model)} is no model of samlora; load one with samlora.load_model")
        if not isinstance(model, Sam):
            raise InputError(
                f"the system {model.spec.system} is no SAM and takes no prompts; use samlora.predict_volume"
            )
        known = model.spec.recipe is not None or recipe is not None
        self.recipe = fitting_recipe(model.spec, recipe) if known else None
        if device is not None:
            model = model.to(pick_device("auto") if device == "auto" else torch.device(device))
        self.model, self.row = model.eval(), system_row(model.spec.system)
        self.device, self.precision = next(model.parameters()).device, precision
        trained = trained_names(model, model.spec.system, model.spec.options)
        decoder = "prompt_decoder." if model.prompt_decoder is not None else "mask_decoder."
        untouched = not any(name.startswith(decoder) for name in trained)
        # A decoder that was trained without its IoU head, or the heads of the three masks, left these behind.
        self.knows_score = untouched or any(name.startswith(f"{decoder}iou_prediction_head") for name in trained)
        # Of a base that has not learned them a mask prompt spoils the answer, and its three masks mean nothing.
        known = known_base(model.spec.base)
        learned = ALL_PROMPTS if known is None else known.prompts
        self.takes_masks = "masks" in learned
        self.carries_masks = "carried masks" in learned
        three = untouched or any(name.startswith(f"{decoder}output_hypernetworks_mlps.1") for name in trained)
        self.knows_three = three and "three" in learned
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._case: Case | None = None
        self._steps = [_Step()]
        self.index = 0

    @classmethod
    def load(
        cls,
        adapter: str | os.PathLike | None = None,
        base: str | os.PathLike | None = "default",
        recipe: Recipe | None = None,
        device: torch.device | str | None = None,
        precision: torch.dtype = torch.float32,
        image_size: int | None = None,
    ) -> "Predictor":
        """A predictor for an adapter file, its LoRA merged, or without one for SAM as it is.

        base: the base's file; "default" for the usual place of the adapter's, and without an adapter for LiteMedSAM,
        or the demo base where LiteMedSAM is not installed, with a warning. image_size: None for the adapter's own;
        without an adapter the one that the base was trained at, 1024 px for SAM's and 256 px for LiteMedSAM. Raises
        what `load_model` and `build_model` raise.
        """
        if adapter is not None:
            return cls(merge(load_model(adapter, base, image_size)), recipe, device, precision)
        if base is None or base == "default":
            base = default_base()
            if base_name(base) == "vit_ti":
                warnings.warn(BASES["vit_ti"].note, stacklevel=2)
        opened = checkpoint.open_base(base)
        size = image_size or VARIANTS[opened.variant].image_size
        return cls(build_model("sam", opened, image_size=size), recipe, device, precision)

    # --- the image -------------------------------------------------------------------------------------------------

    def set_image(self, image: np.ndarray | str | os.PathLike | Volume | Case, index: int | None = None) -> "Predictor":
        """Takes an image, forgets the one before, and encodes a slice of it.

        image: (H, W) or (H, W, C), uint8 or float in 0..1; a path that `read_volume` reads (picture, NIfTI, DICOM
        folder, .npy.h5, ...); a `Volume`; or a `Case`. Paths and volumes go through the recipe; so do arrays, if it is
        one of pictures, otherwise they are slices already. index: the slice to begin with; None for the middle one.
        Raises InputError, or what `read_volume` raises, for what cannot be used.
        """
        self._case = None
        self._cache.clear()
        case = self.to_case(image)
        height, width = case.image.shape[1:3]
        through = None if self.recipe is None else self.recipe.size
        self._frame = Frame(height, width, self.model.image_size, self.model.pixels, through, self.model.logit_side)
        self._case, self.labels = case, np.zeros(case.image.shape[:3], np.uint8)
        return self.select(len(case.image) // 2 if index is None else index)

    def to_case(self, image: np.ndarray | str | os.PathLike | Volume | Case) -> Case:
        """The slices that `set_image` takes of an image. Raises what it raises."""
        if isinstance(image, Case):
            return check_case(image)
        if isinstance(image, np.ndarray):
            image = check_picture(image, "the image", self._channels())
            if self.recipe is None or self.recipe.modality != "image":
                return Case(image[None])
            array = np.swapaxes(image, 0, 1)[:, :, None]
            return self.recipe.to_case(Volume(array, PICTURE_AFFINE.copy(), path="the image", has_spacing=False))
        known = isinstance(image, str | os.PathLike | Volume)
        if self.recipe is not None and known:
            return as_case(image, self.recipe)
        if isinstance(image, Volume):
            check_volume(image)
        elif not isinstance(image, str | os.PathLike):
            advice = "a NumPy array (H, W) or (H, W, 3): numpy.asarray(...), a path, a Volume or a Case is needed"
            raise InputError(f"the image is of type {kind_of(image)}; {advice}")
        else:
            if str(image).endswith(".npy.h5"):
                raise InputError(f"{image}: prepared slices need the recipe that made them; give it as recipe")
            image = read_volume(Path(image))
        recipe = usual_recipe(image)
        case = recipe.to_case(image)
        if image.array.dtype == np.uint8 and recipe.modality == "image":
            # Eight bits stay eight bits, so that Pillow scales them as in SAM's own predictor.
            case.image = np.rint(case.image * 255).astype(np.uint8)
        return case

    def _channels(self) -> int | None:
        """The channels that an array of colours must have; None for any, of which the recipe takes some."""
        if self.recipe is not None and self.recipe.modality == "image":
            return None if isinstance(self.recipe.channels, tuple) else 3
        return self.model.spec.in_channels

    def select(self, index: int) -> "Predictor":
        """Goes to slice `index` of the volume, from 0, and encodes it; the clicks of the slice before are forgotten."""
        self._embedding(index)
        self.index = index
        self._steps = [_Step()]
        return self

    @property
    def case(self) -> Case:
        """The slices of the current image; `display` says how to show them. Raises InputError without an image."""
        if self._case is None:
            raise InputError("no image is set; call set_image first")
        return self._case

    @property
    def image(self) -> np.ndarray:
        """The current slice, (H, W) or (H, W, C), float in 0..1 or uint8."""
        return self.case.image[self.index]

    def gray(self, index: int) -> np.ndarray:
        """Slice `index` as one gray channel: (H, W) float32 in 0..1."""
        shown = self.case.image[self._checked_index(index)]
        scaled = shown / np.float32(255) if shown.dtype == np.uint8 else shown
        return scaled if scaled.ndim == 2 else scaled.mean(axis=-1)

    def __len__(self) -> int:
        """How many slices the current image has."""
        return len(self.case.image)

    # --- prompts ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(
        self,
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        multimask: bool = False,
        index: int | None = None,
    ) -> Masks:
        """The masks of one prompt, or of P prompts at once, on the current slice or slice `index`.

        points: (N, 2), or (P, N, 2), x, y. labels: (N,) or (P, N), 1 on the object, 0 beside it, -1 for points that do
        not count; None for all 1. box: (4,) or (P, 4) XYXY. mask: (L, L) or (1, L, L), or with P in front, logits that
        an earlier answer gave. multimask: three masks, for a prompt that may mean several things.
        Raises InputError without an image, for points or boxes outside of it, shapes that do not fit, and for
        systems without prompts.
        """
        if not self.row.promptable:
            raise InputError(f"the system {self.model.spec.system} takes no prompts; use classes() or another adapter")
        height, width = self.case.image.shape[1:3]
        index = self.index if index is None else index
        asked = check_prompts(points, labels, box, mask, (height, width), self._frame.low_side)
        points = None if asked.points is None else self._frame.points(asked.points)
        boxes = None if asked.boxes is None else self._frame.boxes(asked.boxes)
        embedding, answers = self._embedding(index).float(), []
        for start in range(0, asked.count, _PROMPTS_AT_ONCE):
            part = slice(start, start + _PROMPTS_AT_ONCE)
            given = (points, asked.labels, boxes, asked.masks)
            tensors = [None if x is None else torch.from_numpy(x[part]).to(self.device) for x in given]
            image = torch.zeros(min(_PROMPTS_AT_ONCE, asked.count - start), dtype=torch.int64, device=self.device)
            prompts = Prompts(*tensors, image)
            answers.append(self.model.answer(embedding, prompts, classes=False))
        chosen = slice(1, None) if multimask else slice(0, 1)
        logits = torch.cat([answer.masks[:, chosen] for answer in answers])
        scores = torch.cat([answer.iou[:, chosen] for answer in answers])
        check_answer(logits)
        drawn = self._frame.logits(logits) > 0
        results = (x.cpu().numpy() for x in (drawn, scores, logits))
        return Masks(*(x if asked.many else x[0] for x in results))

    def whole_pixels(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (..., 4) of pixels of the current image, wide enough to hold their last column and row completely.

        For boxes that were made of masks; see `samlora.data.frame.Frame.whole_pixels`.
        """
        return self._frame.whole_pixels(boxes)

    @torch.inference_mode()
    def classes(self, index: int | None = None) -> np.ndarray:
        """The classes of the current slice, or slice `index`, without prompts: (H, W) uint8, 0 is background.

        Raises InputError for systems that need prompts, or without an image.
        """
        if not self.row.automatic:
            raise InputError(f"the system {self.model.spec.system} needs prompts; use predict(), click() or draw_box()")
        embedding = self._embedding(self.index if index is None else index)
        logits = self.model.answer(embedding.float()).classes
        check_answer(logits)
        return self._frame.classes(logits)[0].to(torch.uint8).cpu().numpy()

    # --- a person at work ------------------------------------------------------------------------------------------

    @property
    def mask(self) -> np.ndarray:
        """What the prompts so far select on the current slice: (H, W) bool, empty without prompts."""
        shape, drawn = self.case.image.shape[1:3], self._steps[-1].mask
        return np.zeros(shape, bool) if drawn is None else drawn

    @property
    def score(self) -> float:
        """The IoU that the model predicts for `mask`; NaN without prompts. See `knows_score`."""
        return self._steps[-1].score

    def click(self, x: float, y: float, positive: bool = True) -> np.ndarray:
        """Adds a point on the object, or beside it, to the prompts of this slice and returns the mask (H, W).

        The answer before goes in as mask prompt (see `takes_masks`). For a first click alone the best of three masks is
        taken, as far as the system has them.
        """
        now = self._steps[-1]
        return self._ask((*now.points, (x, y, int(positive))), now.box, now.logits if self.takes_masks else None)

    def draw_box(self, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
        """Sets the box of this slice, in place of an earlier one, beside the clicks; returns the mask (H, W)."""
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        return self._ask(self._steps[-1].points, box, None)

    def undo(self) -> np.ndarray:
        """Takes the last click or box back and returns the mask before it."""
        if len(self._steps) > 1:
            self._steps.pop()
        return self.mask

    def reset(self) -> np.ndarray:
        """Forgets all clicks and boxes of this slice and returns the empty mask; what was kept stays."""
        self._steps = [_Step()]
        return self.mask

    def keep(self, label: int = 1) -> None:
        """Draws the current mask as `label` into the label map, over what was there, and begins a new object."""
        self.accept(self.mask, label)
        self.reset()

    def accept(self, mask: np.ndarray, label: int, index: int | None = None) -> None:
        """Draws a mask (H, W) as `label`, 0 to 255, into slice `index` of the label map; 0 erases.

        Raises InputError for masks of another shape, labels outside this range, slices that are not there.
        """
        shape, index = self.case.image.shape[1:3], self.index if index is None else index
        if np.shape(mask) != shape:
            raise InputError(
                f"a mask of shape {np.shape(mask)} for slices of {shape}; it must lie on the image's pixels"
            )
        if not 0 <= label <= 255:
            raise InputError(f"label {label}: 1 to 255 can be drawn, and 0 erases")
        self.labels[self._checked_index(index)][np.asarray(mask, bool)] = label

    def to_volume(self) -> Volume:
        """The label map drawn so far, uint8, on the grid of the file or volume that was given."""
        return case_to_volume(self.case, self.labels)

    def propagate(
        self,
        index: int | None = None,
        mask: np.ndarray | None = None,
        label: int | None = None,
        steps: int | str = "all",
        direction: str = "both",
        stop: StopRule | None = None,
    ) -> Iterator[Carried]:
        """Carries a mask from slice to slice, see `samlora.inference.propagate`.

        index, mask: where to begin; None for the current slice and its mask. label: what is carried is drawn into
        the label map as this, the mask it begins with too; None to draw nothing. Yields (index, mask, score), one slice
        after the other as they are asked for.
        """
        index = self._checked_index(self.index if index is None else index)
        mask = self.mask if mask is None else np.asarray(mask, bool)
        if label is not None:
            self.accept(mask, label, index)
        for carried in propagate(self, index, mask, steps, direction, stop):
            if label is not None:
                self.accept(carried.mask, label, carried.index)
            yield carried

    def as_prompt(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) as logits (L, L) that `predict` takes: what it would be if the model were sure of it."""
        return np.where(self._frame.label(np.asarray(mask, bool)), _SURE, -_SURE).astype(np.float32)

    def on_image(self, logits: np.ndarray) -> np.ndarray:
        """Logits (..., L, L) of an answer on the pixels of the image: (..., H, W) float32, above 0 in its masks."""
        return self._frame.logits(torch.from_numpy(logits)).numpy()

    # --- within ----------------------------------------------------------------------------------------------------

    def _ask(self, points: tuple, box: tuple | None, logits: np.ndarray | None) -> np.ndarray:
        places, labels = (
            (np.array([p[:2] for p in points]), np.array([p[2] for p in points])) if points else (None,) * 2
        )
        unclear = len(points) == 1 and box is None and logits is None and self.knows_three
        answer = self.predict(places, labels, None if box is None else np.array(box), logits, multimask=unclear)
        best = int(answer.scores.argmax())
        step = _Step(points, box, answer.masks[best], float(answer.scores[best]), answer.logits[best])
        self._steps.append(step)
        return step.mask

    def _checked_index(self, index: int) -> int:
        if not isinstance(index, int | np.integer):
            raise InputError(f"slice {index!r}: a whole number is needed")
        if not 0 <= index < len(self):
            raise InputError(f"slice {index}: the image has slices 0 to {len(self) - 1}")
        return int(index)

    def _embedding(self, index: int) -> Tensor:
        """(1, 256, h, w), from the cache or made."""
        index = self._checked_index(index)
        if index not in self._cache:
            self._cache |= self._encode(index)
            self._cache.move_to_end(index)
            while len(self._cache) > 1 and sum(e.nbytes for e in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        self._cache.move_to_end(index)
        return self._cache[index]

    @torch.inference_mode()
    def _encode(self, index: int) -> dict[int, Tensor]:
        with_neighbours = self.recipe is not None and self.recipe.channels == "neighbours"
        half = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision, enabled=half):
            found = encode_slices(self.model, self.case.image, [index], self._frame, with_neighbours)
        return {n: embedding[None].to(self.precision) for n, embedding in found.items()}
