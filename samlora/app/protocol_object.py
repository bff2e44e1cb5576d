"""One object in a volume, outlined by prompts in some of its slices and carried through the others."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from samlora.app.history import History, edit_of
from samlora.app.image import Image
from samlora.app.models import Entry, Models
from samlora.data.grid import Volume
from samlora.data.prompts import sample_points, tight_box
from samlora.errors import InputError
from samlora.inference.predictor import Predictor
from samlora.inference.propagate import Carried

Box = tuple[slice, slice, slice]

_MOST_SLICES = 5  # that one stroke is asked about; the others between them are reached from these
_MOST_POINTS = 5  # of one stroke in one slice
_WAYS = {-1: "down", 1: "up"}
_RUN = "run"  # an edit that only computes; it goes back together with the prompt before it


@dataclass(frozen=True)
class Said:
    """What was said of the object in one slice, in pixels of what the model sees of it, and the answer before.

    points: (x, y, positive). box: XYXY. logits: (L, L). Nothing at all: the mask was given.
    """

    points: tuple[tuple[float, float, bool], ...] = ()
    box: tuple[float, float, float, float] | None = None
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class State:
    """What goes back with an undo, beside the mask.

    said: by slice. waiting: slices whose prompts were not answered yet. open: where time ran out, (prompted slice, way,
    slice reached). span: first and last slice (excluded) that the object may reach, from a box in 3D.
    """

    said: Mapping[int, Said] = field(default_factory=dict)
    waiting: frozenset[int] = frozenset()
    open: tuple[tuple[int, int, int], ...] = ()
    span: tuple[int, int] | None = None


class GrownObject:
    """The mask of one object on the grid of a volume, 0 and 1, and the prompts that it follows from.

    A prompt is answered in the slice that it lies in; the slices are those of the model's recipe. From there the mask
    is carried to both sides by `Predictor.propagate`, until its stop rule ends it, or halfway to the next slice with
    prompts: every slice follows the prompts that are nearest. through: off, only prompted slices change. seconds: no
    prompt is worked on for longer; `run` goes on. Holds no lock but `models.lock`, one slice at a time.
    """

    def __init__(self, models: Models, entry: Entry, volume: Volume, seconds: float = 20.0):
        """Raises InputError where the model's recipe cannot take the volume."""
        self.models, self.seconds, self.through = models, seconds, True
        self.image = Image(volume, "the image")
        self._predictor = Predictor(entry.model, entry.recipe, models.device, models.precision)
        with models.lock:
            geometry = self._predictor.set_image(volume).case.geometry
        self.image.cut(geometry.orientation, geometry.slice_axis)
        self._crop = geometry.box or (0, self.image.shape[1], 0, self.image.shape[2])
        self.reset()

    @property
    def mask(self) -> np.ndarray:
        """(i, j, k) uint8, 0 and 1, on the grid of the volume."""
        return self.image.labels

    def reset(self) -> None:
        """Another object begins: no mask, no prompts, nothing to undo."""
        self.image.labels[:] = 0
        self._state, self._history = State(), History()

    def give(self, mask: np.ndarray) -> None:
        """Begins with a mask on the grid of the volume; what is not 0 belongs to the object.

        Its slices stay as they are until they are prompted. Raises InputError for a mask of another shape.
        """
        if mask.shape != self.image.labels.shape:
            raise InputError(f"a mask of shape {mask.shape} for an image of {self.image.labels.shape} voxels")
        self.reset()
        self.image.labels[:] = mask != 0
        self._state = State(said={int(n): Said() for n in np.flatnonzero(self.image.drawn.any(axis=(1, 2)))})

    def point(self, voxel: tuple[int, int, int], positive: bool, run: bool = True) -> Box | None:
        """A point on the object or beside it. Returns the part of `mask` that changed, None for nothing.

        run: off, it waits for `run`. Raises InputError where no mask can follow from it, and leaves all as it was.
        """
        part = tuple(slice(n, n + 1) for n in voxel)
        return self._prompt("point", self._in_slices(part, None), positive, run)

    def stroke(self, part: Box, marked: np.ndarray, positive: bool, run: bool = True) -> Box | None:
        """A stroke, as thick as it likes, in any plane: points on it, in the slices that it crosses, are the prompts.

        marked: of the shape of `part`; what is not 0 is the stroke. Otherwise as `point`.
        """
        return self._prompt("stroke", self._in_slices(part, marked), positive, run)

    def outline(self, part: Box, marked: np.ndarray, positive: bool, run: bool = True) -> Box | None:
        """A filled outline: in one slice its box and its middle are the prompts; else it counts as a stroke."""
        drawn = self._in_slices(part, marked)
        index = next(iter(drawn), 0)
        box = None if len(drawn) != 1 or not positive else _area(drawn[index])
        if box is None:
            return self._prompt("outline", drawn, positive, run)
        return self._edit("outline", {index: Said(_points(drawn[index], 1, True), box)}, run)

    def box(self, part: Box, positive: bool, run: bool = True) -> Box | None:
        """A box: in one slice it is the prompt there; of several the middle one's, and the object stays within them.

        Drawn across the slices it marks the middle of the object. Beside the object it counts as a stroke.
        """
        drawn = self._in_slices(part, None)
        if not positive or not drawn:
            return self._prompt("box", drawn, positive, run)
        slices = list(drawn)
        index = slices[len(slices) // 2]
        box = _area(drawn[index])
        said = Said(_points(drawn[index], 1, True)) if box is None else Said(box=box)
        return self._edit("box", {index: said}, run, (slices[0], slices[-1] + 1) if len(slices) > 1 else None)

    def run(self) -> Box | None:
        """Answers the prompts that wait; if there are none, goes on where time ran out. Returns as `point` does."""
        return self._edit(_RUN, {}, True)

    def undo(self) -> tuple[bool, Box | None]:
        """Takes the last prompt back, voxel for voxel: whether there was one, and the part of `mask` that changed."""
        before, found = self.mask.copy(), False
        while (edit := self._history.back()) is not None:
            found = True
            self.mask[edit.box] = edit.labels("before")
            self._state = edit.state_before
            if edit.what != _RUN:
                break
        return found, changed(before, self.mask)

    # --- prompts ---------------------------------------------------------------------------------------------------

    def _in_slices(self, part: Box, marked: np.ndarray | None) -> dict[int, np.ndarray]:
        """What is marked within a part of the grid (None: all of it), (H, W) bool by slice, as the model sees them."""
        shape = tuple(side.stop - side.start for side in part)
        if marked is not None and marked.shape != shape:
            raise InputError(f"marks of shape {marked.shape} for a part of {shape} voxels; they must be alike")
        drawn = np.zeros(self.mask.shape, bool, order="F")  # slices are then in one piece
        drawn[part] = True if marked is None else marked != 0
        if not drawn[part].any():
            raise InputError("nothing is marked; draw it again")
        stack = self._cropped(self.image.slices_of(drawn, self.image.plane))
        return {int(n): stack[n] for n in np.flatnonzero(stack.any(axis=(1, 2)))}

    def _prompt(self, what: str, drawn: Mapping[int, np.ndarray], positive: bool, run: bool) -> Box | None:
        """Points in what is marked, of a few slices where it lies in many."""
        if positive and not drawn:
            raise InputError("this prompt lies outside of the part of the slices that the model sees")
        chosen = np.linspace(0, len(drawn) - 1, min(len(drawn), _MOST_SLICES)).round().astype(int)
        slices = [list(drawn)[n] for n in chosen]
        return self._edit(what, {n: Said(_points(drawn[n], _MOST_POINTS, positive)) for n in slices}, run)

    def _say(self, news: Mapping[int, Said], span: tuple[int, int] | None) -> None:
        """Adds what is said of some slices; a box replaces the one before."""
        said = dict(self._state.said)
        for index, new in news.items():
            old = said.get(index, Said())
            logits = old.logits
            if new.box is not None:
                logits = None  # the box says where it is; what was thought before would pull the answer back
            elif logits is None and self.image.drawn[index].any():
                mask = self._cropped(self.image.drawn[index]).astype(bool)
                logits = self._predictor.as_prompt(mask)
                if not old.points and any(positive for *_, positive in new.points):
                    old = replace(old, points=_points(mask, 1, True))  # to what is there, more is added
            said[index] = Said(old.points + new.points, new.box or old.box, logits)
        span = span or self._state.span
        if span is not None and not all(span[0] <= index < span[1] for index in news):
            span = None  # the object goes further than the box said
        self._state = replace(self._state, said=said, waiting=self._state.waiting | news.keys(), span=span)

    def _edit(self, what: str, news: Mapping[int, Said], run: bool, span: tuple[int, int] | None = None) -> Box | None:
        before, state = self.mask.copy(), self._state
        try:
            self._say(news, span)
            if run and (news or what == _RUN):
                self._answer()
        except BaseException:
            self.mask[:], self._state = before, state
            raise
        part = changed(before, self.mask)
        if what != _RUN or state.waiting or part is not None:
            self._history.push(edit_of(what, self.image.plane, 0, before, self.mask, (state, self._state)))
        return part

    def _answer(self) -> None:
        """Masks for the slices that wait, and what follows from them for the others; or on with what was left."""
        until = time.monotonic() + self.seconds
        asked = []
        for index in sorted(self._state.waiting):
            if not asked or time.monotonic() < until:
                self._ask(index)
                asked.append(index)
        going = [open for open in self._state.open if open[0] not in asked]
        if self.through:
            going = self._carry([(index, way, index) for index in asked for way in _WAYS] + going, until)
        if self._state.span is not None:
            first, last = self._state.span
            self._clear(n for n in range(len(self.image.drawn)) if not first <= n < last)
        self._state = replace(self._state, waiting=self._state.waiting.difference(asked), open=tuple(going))

    def _ask(self, index: int) -> None:
        """Draws the mask of a slice anew from its prompts."""
        said, seen = self._state.said[index], self._cropped(self.image.drawn[index]).astype(bool)
        points = np.array([place for *place, _ in said.points], np.float64).reshape(-1, 2)
        labels = np.array([positive for *_, positive in said.points], np.int64)
        box = said.box
        if box is None and not labels.any():
            if not seen.any():
                return  # nothing is here, and nothing will be
            box = _widened(seen)  # points beside the object do not say where it is
        first = len(labels) == 1 and box is None and said.logits is None
        answers = []
        # Not every decoder has learned to take an earlier answer: what it says without one stands beside that.
        for logits in (None,) if said.logits is None else (None, said.logits):
            with self.models.lock:
                given = (points, labels) if len(points) else (None, None)
                answers.append(
                    self._predictor.predict(*given, box, logits, first and self._predictor.knows_three, index)
                )
        masks, scores, logits = (np.concatenate(parts) for parts in zip(*answers))
        cols, rows = points.astype(int).T
        agree = (masks[:, rows, cols] == labels.astype(bool)).sum(axis=1)
        best = int(np.lexsort((scores, agree))[-1])
        self._draw(index, masks[best])
        said = dict(self._state.said) | {index: replace(said, logits=logits[best])}
        self._state = replace(self._state, said=said)

    # --- through the volume ----------------------------------------------------------------------------------------

    def _room(self, index: int, way: int) -> int:
        """How many slices on that side follow the prompts of a slice, and no others."""
        first, last = self._state.span or (0, len(self.image.drawn))
        room = last - 1 - index if way > 0 else index - first
        gaps = [abs(n - index) - 1 for n in self._state.said if (n - index) * way > 0]
        return max(0, min([room, *((gap + 1) // 2 for gap in gaps)]))

    def _carry(self, ways: Iterable[tuple[int, int, int]], until: float) -> list[tuple[int, int, int]]:
        """Carries masks along, a slice of each way in turn, so that what is near comes first; returns what is left.

        ways: as `State.open`; they begin at the slice that was reached.
        """
        going = []
        for index, way, at in ways:
            steps = max(0, self._room(index, way) - abs(at - index))
            mask, masks = self._cropped(self.image.drawn[at]).astype(bool), iter(())
            if mask.any() and steps:
                masks = self._predictor.propagate(at, mask, None, steps, _WAYS[way])
            going.append((masks, index, way, at, steps))
        while going and time.monotonic() < until:
            masks, index, way, at, steps = going.pop(0)
            with self.models.lock:
                carried: Carried | None = next(masks, None)
            if carried is None:  # what followed an earlier answer goes
                self._clear(range(at + way, at + way * (steps + 1), way))
                continue
            self._draw(carried.index, carried.mask)
            going.append((masks, index, way, carried.index, steps - 1))
        return [(index, way, at) for _, index, way, at, _ in going]

    def _clear(self, indices: Iterable[int]) -> None:
        for index in indices:
            if index not in self._state.said:
                self.image.drawn[index] = 0

    def _cropped(self, array: np.ndarray) -> np.ndarray:
        """The part of slices (..., H, W) that the model sees."""
        top, bottom, left, right = self._crop
        return array[..., top:bottom, left:right]

    def _draw(self, index: int, mask: np.ndarray) -> None:
        self.image.drawn[index] = 0
        self._cropped(self.image.drawn[index])[:] = mask


def changed(before: np.ndarray, after: np.ndarray) -> Box | None:
    """The smallest part that holds all voxels in which two arrays (i, j, k) differ; None for none."""
    differs = before != after
    sides = []
    for axis in range(3):
        found = np.flatnonzero(differs.any(axis=tuple({0, 1, 2} - {axis})))
        if not len(found):
            return None
        sides.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(sides)


def _points(mask: np.ndarray, most: int, positive: bool) -> tuple[tuple[float, float, bool], ...]:
    """The middle of a mask (H, W), and where it is long more points along it, far from each other and from its edge."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    core = depth >= depth.max() / 2
    points, _ = sample_points(core, min(most, int(core.sum())), 0, "centre", np.random.default_rng(0))
    return tuple((float(x), float(y), positive) for x, y in points)


def _area(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """The box XYXY of a mask (H, W); None if it is a pixel wide or high."""
    x0, y0, x1, y1 = tight_box(mask).tolist()
    return None if x0 == x1 or y0 == y1 else (x0, y0, x1, y1)


def _widened(mask: np.ndarray) -> np.ndarray:
    """The box of a mask (H, W), a pixel wider to each side as far as the slice goes."""
    height, width = mask.shape
    return np.clip(tight_box(mask) + (-1, -1, 1, 1), 0, (width - 1, height - 1) * 2)
