"""The model in use on the image that is open: prompts, classes and masks carried on, in pixels of the page's slices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from samlora.app.image import Image
from samlora.app.models import Entry, Models
from samlora.data.recipe import Recipe
from samlora.errors import InputError
from samlora.inference.predictor import Predictor

_CACHE_BYTES = 128 << 20  # of encoded slices, for each session


@dataclass(frozen=True)
class Prompted:
    """The object being drawn: its slice, label and model, the prompts so far, what the model said last.

    ground: the slice's labels before its first prompt. points: (x, y, positive).
    """

    index: int
    label: int
    model: int
    ground: np.ndarray
    points: tuple[tuple[int, int, bool], ...] = ()
    box: tuple[float, float, float, float] | None = None
    logits: np.ndarray | None = None
    score: float = float("nan")

    def told(self) -> dict:
        """The prompts, as values that JSON can hold."""
        score = None if np.isnan(self.score) else round(self.score, 3)
        return {"index": self.index, "points": self.points, "box": self.box, "score": score}


class Said(NamedTuple):
    """An answer: mask (H, W) bool, logits (L, L) for the next prompt, the predicted IoU, NaN where it is not known."""

    mask: np.ndarray
    logits: np.ndarray
    score: float


class Asking:
    """A `Predictor` that is made when it is first needed, and knows slices as they are shown: without a recipe's crop.

    recipe: for models that hold none themselves. Holds `models.lock` while the model computes and at no other time.
    """

    def __init__(self, models: Models, entry: Entry, image: Image, recipe: Recipe | None):
        self._models, self._entry, self._image, self._recipe = models, entry, image, recipe
        self._made: Predictor | None = None

    def prompt(
        self,
        index: int,
        points: Sequence[tuple[int, int, bool]],
        box: Sequence[float] | None,
        logits: np.ndarray | None,
    ) -> Said:
        """The mask for points (x, y, positive) and a box XYXY on a slice. logits: of the answer before, or None.

        Raises InputError for a point outside of what the model sees.
        """
        with self._models.lock:
            predictor, seen = self._at(index)
            rows, cols = seen
            corner, size = (cols.start, rows.start), (cols.stop - cols.start, rows.stop - rows.start)
            places = np.array([point[:2] for point in points], np.float64).reshape(-1, 2) - corner
            if ((places < 0) | (places >= size)).any():
                raise InputError("this point lies outside of the part of the slice that the model sees")
            if box is not None:
                box = np.clip(np.reshape(box, (2, 2)) - corner, 0, np.subtract(size, 1)).ravel()
                if (box[2:] <= box[:2]).any():
                    raise InputError("this box lies outside of the part of the slice that the model sees")
            masks, scores, found = predictor.predict(
                points=places if len(points) else None,
                labels=np.array([positive for *_, positive in points], np.int64) if len(points) else None,
                box=box,
                mask=logits if predictor.takes_masks else None,
                # A first click alone may mean a part or the whole: the best of three masks is taken.
                multimask=predictor.knows_three and len(points) == 1 and box is None and logits is None,
            )
        best = int(np.argmax(scores))
        score = float(scores[best]) if predictor.knows_score else float("nan")
        return Said(self._whole(masks[best], seen), found[best], score)

    def classes(self, index: int) -> np.ndarray:
        """The classes that the model draws by itself on a slice, (H, W) uint8."""
        with self._models.lock:
            predictor, seen = self._at(index)
            return self._whole(predictor.classes(), seen)

    def carried(self, index: int, mask: np.ndarray, steps: int | None, way: str) -> Iterator[tuple[int, np.ndarray]]:
        """(slice, mask) of `Predictor.propagate`; others may use the models between two slices. steps: None for all."""
        with self._models.lock:
            predictor, seen = self._at(index)
            carried = predictor.propagate(index, mask[seen], None, "all" if steps is None else steps, way)
        while True:
            with self._models.lock:
                step = next(carried, None)
            if step is None:
                return
            yield step.index, self._whole(step.mask, seen)

    def warm(self, index: int) -> bool:
        """Encodes a slice, unless a model is at work; returns whether it is encoded now."""
        if not self._models.lock.acquire(blocking=False):
            return False
        try:
            self._at(index)
            return True
        finally:
            self._models.lock.release()

    def _at(self, index: int) -> tuple[Predictor, tuple[slice, slice]]:
        """The predictor at a slice, and the rows and columns that it sees; `models.lock` is held."""
        if self._made is None:
            models = self._models
            made = Predictor(self._entry.model, self._recipe, models.device, models.precision, _CACHE_BYTES)
            self._made = made.set_image(self._image.volume, index)
        elif self._made.index != index:
            self._made.select(index)
        _, height, width = self._image.shape
        top, bottom, left, right = self._made.case.geometry.box or (0, height, 0, width)
        return self._made, (slice(top, bottom), slice(left, right))

    def _whole(self, part: np.ndarray, seen: tuple[slice, slice]) -> np.ndarray:
        """A mask or label map of what the model sees on the whole slice."""
        whole = np.zeros(self._image.shape[1:], part.dtype)
        whole[seen] = part
        return whole
