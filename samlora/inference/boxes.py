"""Label maps by boxes: every box is answered on its slice, or carried through the volume."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from samlora.data.boxes import Box, BoxFile, ReferenceBoxes
from samlora.data.folders import Pair
from samlora.data.grid import Case
from samlora.data.sources import read_image
from samlora.inference.predictor import Predictor
from samlora.inference.propagate import Step, carry


class BoxSegmenter:
    """Makes label maps of inputs by boxes, as a `samlora.inference.predict.Segmenter`."""

    remark = ""

    def __init__(self, predictor: Predictor, source: BoxFile | ReferenceBoxes, propagate: bool):
        """Takes a predictor and boxes. propagate: as of `label_by_boxes`."""
        self._predictor = predictor
        self._source = source
        self._propagate = propagate

    @property
    def heading(self) -> str:
        """The model, the boxes and the recipe, for people."""
        spec = self._predictor.model.spec
        recipe = self._predictor.recipe
        way = ", propagated" if self._propagate else ""
        by = "chosen for each input" if recipe is None else recipe.name
        model = f"{spec.system} on {spec.variant}, base {spec.base}, {spec.image_size} px"
        return f"{model}; boxes from {self._source.origin}{way}; recipe {by}"

    def made_by(self, pair: Pair) -> dict:
        spec = self._predictor.model.spec
        recipe = self._predictor.recipe
        return {
            "base": [spec.base, spec.base_sha256],
            "recipe": None if recipe is None else recipe.to_dict(),
            "boxes": self._source.stamp(pair),
            "propagate": self._propagate,
        }

    def read(self, pair: Pair, series: str | None) -> Case:
        path = pair.images[0]
        prepared = str(path).endswith(".npy.h5")
        return self._predictor.to_case(path if prepared else read_image(pair, series))

    def steps(self, case: Case) -> int:
        return len(case.image) * (2 if self._propagate else 1)

    def labels(
        self, pair: Pair, case: Case, progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        boxes, names = self._source.boxes(pair, case)
        if not boxes:
            return np.zeros(case.image.shape[:3], np.uint8), names
        self._predictor.set_image(case, _given_on(boxes[0], self._propagate)[0])
        return label_by_boxes(self._predictor, boxes, self._propagate, progress), names


def label_by_boxes(
    predictor: Predictor,
    boxes: Sequence[Box],
    propagate: bool = False,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """The label map of an image by boxes. Where masks overlap, the one of the highest logit wins.

    Args:
        predictor: Holds the image and answers the boxes.
        boxes: On slices of the image, in its pixels.
        propagate: A box is given on its slice, of several slices on the middle one, and the mask
            is carried to the other slices (`samlora.inference.propagate`): of several slices to
            the ends of them, of one until the object ends. Otherwise a box is given on each of
            its slices.
        progress: Called with the number of slices done; with `propagate` each slice counts twice.

    Returns:
        Labels (D, H, W) uint8, 0 is background.
    """
    by_slice: dict[int, list[Box]] = {}
    for box in boxes:
        for index in _given_on(box, propagate):
            by_slice.setdefault(index, []).append(box)
    canvas = _Canvas(predictor)
    starts: dict[int, list[tuple[Box, np.ndarray]]] = {}
    for index in range(len(predictor)):
        if on_slice := by_slice.get(index):
            corners = np.array([box.corners for box in on_slice])
            answer = predictor.predict(box=predictor.whole_pixels(corners), index=index)
            for box, mask, logits in zip(on_slice, answer.masks[:, 0], answer.logits[:, 0]):
                canvas.draw(index, mask, logits, box.label)
                if mask.any():
                    starts.setdefault(index, []).append((box, mask))
        if progress is not None and not propagate:
            progress(1)
    if propagate:
        _carry_all(predictor, canvas, starts, progress)
    return canvas.labels


class _Canvas:
    """The labels of a stack, (D, H, W) uint8, as masks are drawn; of several the surest stays."""

    def __init__(self, predictor: Predictor):
        shape = predictor.case.image.shape[:3]
        self.labels = np.zeros(shape, np.uint8)
        self._predictor = predictor
        self._best = np.zeros(shape, np.float32)

    def draw(self, index: int, mask: np.ndarray, logits: np.ndarray, label: int) -> None:
        """Draws a mask (H, W) bool that was made of logits (L, L) on slice `index`."""
        on_image = self._predictor.on_image(logits)
        surer = mask & (on_image > self._best[index])
        self._best[index][surer] = on_image[surer]
        self.labels[index][surer] = label


def _carry_all(
    predictor: Predictor,
    canvas: _Canvas,
    starts: Mapping[int, Sequence[tuple[Box, np.ndarray]]],
    progress: Callable[[int], object] | None,
) -> None:
    """Carries masks from the slices where they start up, then down, and draws them.

    All masks advance together, so that a slice is encoded once for all of them.
    """
    depth = len(canvas.labels)
    for direction, order in (("up", range(depth)), ("down", range(depth - 1, -1, -1))):
        going: list[tuple[Box, Iterator[Step]]] = []
        for index in order:
            reached = []
            for box, steps in going:
                step = next(steps, None)
                if step is not None:
                    canvas.draw(index, step.carried.mask, step.logits, box.label)
                    reached.append((box, steps))
            going = reached
            for box, mask in starts.get(index, ()):
                count = _room(box, index, direction)
                going.append((box, carry(predictor, index, mask, count, direction)))
            if progress is not None:
                progress(1)


def _given_on(box: Box, propagate: bool) -> range:
    """The slices on which a box is given to the model."""
    middle = (box.first + box.last) // 2
    return range(middle, middle + 1) if propagate else range(box.first, box.last + 1)


def _room(box: Box, index: int, direction: str) -> int | str:
    """How many slices a mask is carried from slice `index`, as `steps` of `carry`."""
    if box.first == box.last:
        return "all"
    return box.last - index if direction == "up" else index - box.first
