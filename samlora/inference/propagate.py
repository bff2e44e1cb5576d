"""A mask carried from slice to slice of a volume, until the object ends or the answers can no longer be trusted."""

import dataclasses
from collections.abc import Iterator, Sized
from typing import NamedTuple, Protocol

import numpy as np

from samlora.data.prompts import tight_box
from samlora.errors import InputError

_LEAST_SPREAD = 0.02  # of gray values 0..1: of flat objects every shade would be another
DIRECTIONS = {"both": (1, -1), "up": (1,), "down": (-1,)}


class Answers(Sized, Protocol):
    """What is needed of a `samlora.Predictor`, which offers `propagate` as a method."""

    knows_score: bool
    carries_masks: bool

    def predict(self, points=None, labels=None, box=None, mask=None, multimask=False, index: int | None = None): ...

    def as_prompt(self, mask: np.ndarray) -> np.ndarray: ...

    def gray(self, index: int) -> np.ndarray: ...


class Carried(NamedTuple):
    """The mask (H, W) bool of slice `index`, and the IoU that the model predicts for it."""

    index: int
    mask: np.ndarray
    score: float


class Step(NamedTuple):
    """What was carried to a slice, and the logits (L, L) float32 that its mask was made of."""

    carried: Carried
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class StopRule:
    """When a mask is carried no further: where the next one shows something else.

    score: least predicted IoU, as a share of that on the slice it began with; only of systems that know it. growth:
    most ratio of the larger area to the smaller, of one slice and the next. overlap: least share of the smaller of the
    two that both have in common. shift: most difference of the mean gray value from that of the first slice's object,
    in its standard deviations. least_pixels: smaller masks are the object's end.
    """

    score: float = 0.8
    growth: float = 1.5
    overlap: float = 0.7
    shift: float = 1.0
    least_pixels: int = 9

    def ends(self, before: np.ndarray, after: np.ndarray, score: float, shift: float) -> bool:
        """Whether the mask `after` is no longer the object that `before`, (H, W) bool both, shows.

        score, shift: as above, of `after`; 1 and 0 where they are not known.
        """
        small, large = sorted((int(before.sum()), int(after.sum())))
        if small < self.least_pixels or score < self.score or shift > self.shift:
            return True
        return large > self.growth * small or int((before & after).sum()) < self.overlap * small


def propagate(
    predictor: Answers,
    index: int,
    mask: np.ndarray,
    steps: int | str = "all",
    direction: str = "both",
    stop: StopRule | None = None,
    widen: float = 0.1,
) -> Iterator[Carried]:
    """Carries the mask (H, W) of slice `index` to its neighbours, theirs to the next ones, and so on.

    Each slice is asked with the box of the mask before, each side moved outwards by the share `widen` of its length
    (at least 2 pixels), and with that mask's low-resolution logits, if the model draws the mask of slice `index` better
    with than without them: not every model has learned what to do with them. Of the answer the parts that touch the
    mask before are kept. steps: how many slices each way, or "all"; `stop` (None: its defaults) ends a way earlier.
    direction: "up" for growing index, then "down", or "both". Raises InputError for an empty mask or another word.
    """
    for step in carry(predictor, index, mask, steps, direction, stop, widen):
        yield step.carried


def carry(
    predictor: Answers,
    index: int,
    mask: np.ndarray,
    steps: int | str = "all",
    direction: str = "both",
    stop: StopRule | None = None,
    widen: float = 0.1,
) -> Iterator[Step]:
    """As `propagate`, which takes the same; with the logits of every mask."""
    if direction not in DIRECTIONS:
        raise InputError(f"direction {direction!r} is unknown; allowed: {', '.join(DIRECTIONS)}")
    if steps != "all" and not (isinstance(steps, int) and steps >= 0):
        raise InputError(f'steps {steps!r}: a number of slices, or "all", is needed')
    stop = StopRule() if stop is None else stop
    box, sure = _widened(mask, widen), predictor.as_prompt(mask)
    first, guide = predictor.predict(box=box, index=index), False
    if predictor.carries_masks:
        guided = predictor.predict(box=box, mask=sure, index=index)
        guide = _common(guided.masks[0], mask) > _common(first.masks[0], mask)
        first = guided if guide else first
    usual = float(first.scores[0])
    object_gray = predictor.gray(index)[mask]
    mean, spread = float(object_gray.mean()), max(float(object_gray.std()), _LEAST_SPREAD)
    for way in DIRECTIONS[direction]:
        before, logits = mask, sure
        ahead = range(index + way, len(predictor) if way > 0 else -1, way)
        for there in ahead if steps == "all" else ahead[:steps]:
            answer = predictor.predict(box=_widened(before, widen), mask=logits if guide else None, index=there)
            after, score = touching(answer.masks[0], before), float(answer.scores[0])
            share = score / usual if predictor.knows_score and usual > 0 else 1.0
            shift = abs(float(predictor.gray(there)[after].mean()) - mean) / spread if after.any() else 0.0
            if stop.ends(before, after, share, shift):
                break
            yield Step(Carried(there, after, score), answer.logits[0])
            before, logits = after, answer.logits[0]


def _common(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two masks of which the second is not empty."""
    return 2 * int((one & other).sum()) / int(one.sum() + other.sum())


def touching(mask: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The connected parts of a mask (H, W) that share a pixel with another."""
    from scipy.ndimage import label

    parts, count = label(mask)
    shared = np.bincount(parts[other], minlength=count + 1) > 0
    shared[0] = False
    return shared[parts]


def _widened(mask: np.ndarray, share: float) -> np.ndarray:
    """The box of a mask, each side moved outwards, within the image."""
    height, width = mask.shape
    box = tight_box(mask)
    margin = np.maximum(2, share * (box[2:] - box[:2]))
    return np.clip(np.concatenate([box[:2] - margin, box[2:] + margin]), 0, (width - 1, height - 1) * 2)
