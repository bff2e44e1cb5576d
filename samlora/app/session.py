"""One person's work on one image: prompts, brush, labels, undo; free of HTTP, so that any protocol can drive it.

    session = Session(models)                      # models.Models
    session.open(image)                            # image.Image; nothing drawn, nothing to undo
    session.choose_model(number)                   # of models.entries; 0 is chosen at first
    session.click(index, x, y, positive=True)      # a point for the object being drawn; its mask is drawn at once
    session.draw_box(index, box)                   # XYXY; begins the object anew within this box
    session.finish_object()                        # the next click begins another object
    session.put_mask(index, mask); session.brush(index, path, radius, erase); session.clear(index | None, every)
    session.automatic(index)                       # the model's classes on one slice; start_automatic(): on all, a Job
    session.start_propagation(index, steps, way)   # the label's mask of one slice into others: a jobs.Job
    session.undo(); session.redo()                 # exact, one edit each
    session.image.label_volume()                   # everything, on the grid of the input
    session.state()                                # all but voxels as plain values

`index` counts slices of `session.image.stack`; x, y are its columns and rows. Every method raises InputError for what
cannot be, and leaves everything as it was then. All may be called from any thread; they wait for each other.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from samlora.app.asking import Asking, Prompted
from samlora.app.drawing import box_within, painted, stroke
from samlora.app.history import Edit, History, edit_of
from samlora.app.image import Image
from samlora.app.jobs import Job
from samlora.app.labels import MOST_LABELS, Label, Labels
from samlora.app.models import Entry, Models
from samlora.data.usual import usual_recipe
from samlora.errors import InputError

WAYS = ("both", "up", "down")


class Session:
    """See the top of this file. keep: other labels are not drawn over, by whatever is drawn."""

    def __init__(self, models: Models):
        self.models = models
        self.image: Image | None = None
        self.labels = Labels()
        self.model = 0
        self.channel = 0
        self.keep = True
        self.job: Job | None = None
        self.number = 0  # counts images
        self.revision = 0  # counts changes of the labels
        self._exported = 0  # the revision that was exported last
        self._named = False  # whether a person named labels
        self._lock = threading.RLock()
        self._history = History()
        self._prompted: Prompted | None = None
        self._counts = np.zeros(MOST_LABELS + 1, np.int64)
        self._model: Asking | None = None
        self.choose_model(0)

    # --- image, model, labels ----------------------------------------------------------------------------

    def open(self, image: Image) -> None:
        """Takes another image. What was drawn on the one before is gone; names that a person gave stay."""
        with self._lock:
            self._idle()
            self.image, self._history, self.job, self.channel = image, History(), None, 0
            self.number += 1
            self._counts[:] = 0
            self._counts[0] = image.labels.size
            self.choose_model(self.model)
            self.revision += 1
            self._exported = self.revision

    def choose_model(self, number: int) -> None:
        """Takes another model for what comes next, and the names of its classes as labels.

        Slices are cut as the model's recipe says; what is drawn already stays where it is in the volume. Labels that
        were drawn, even if undone since, or named by a person stay as they are.
        """
        with self._lock:
            self._idle()
            entry = self.models.entry(number)
            if self._named or self._history.last or self._history.next:
                self.labels = self.labels.with_names(entry.class_names)
            else:
                self.labels = Labels(entry.class_names or ("object",))
            self.model, self._prompted = number, None
            if self.image is not None:
                recipe = entry.recipe or usual_recipe(self.image.volume)
                self.image.cut(recipe.orientation, recipe.slice_axis)
                self._ask_anew()

    @property
    def entry(self) -> Entry:
        """The model in use."""
        return self.models.entry(self.model)

    def choose_channel(self, channel: int) -> None:
        """Of an image of several channels, shows this one, and gives it to models that have no recipe of their own."""
        with self._lock:
            self._ready(0)
            self.values_on(0, channel)
            if channel != self.channel:
                self.channel, self._prompted = channel, None
                self._ask_anew()

    def _ask_anew(self) -> None:
        """Lets go of the model asked before, and of the slices that it has encoded."""
        recipe = self.entry.recipe
        if recipe is None and self.image.channels > 1:
            recipe = replace(usual_recipe(self.image.volume), channels=(self.channel,))
        self._model = Asking(self.models, self.entry, self.image, recipe)

    def add_label(self, name: str) -> Label:
        """A new label under the first free value; it becomes the active one."""
        with self._lock:
            label = self.labels.add(name)
            self._named = True
            self.choose_label(label.value)
            return label

    def rename_label(self, value: int, name: str) -> None:
        with self._lock:
            self.labels.rename(value, name)
            self._named = True

    def choose_label(self, value: int) -> None:
        """Takes the label that is drawn from now on; another object begins."""
        with self._lock:
            if self.labels.of(value).value != self.labels.active:
                self._prompted = None
            self.labels.active = value

    # --- prompts -----------------------------------------------------------------------------------------

    def click(self, index: int, x: int, y: int, positive: bool = True) -> None:
        """Adds a point to the object being drawn on this slice, or begins one, and draws what the model says."""
        with self._lock:
            self._ready(index, prompts=True)
            _, height, width = self.image.shape
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(f"point {x}, {y}: outside of the slice of {width} x {height} pixels")
            now = self._object(index)
            if not positive and not now.points and now.box is None:
                raise InputError("the first click of an object says where it is: left click, or drag a box")
            self._draw("point", replace(now, points=(*now.points, (int(x), int(y), bool(positive)))))

    def draw_box(self, index: int, box: Sequence[float]) -> None:
        """Begins the object on this slice anew, within a box x0, y0, x1, y1."""
        with self._lock:
            self._ready(index, prompts=True)
            box = box_within(box, self.image.shape[1:])
            self._draw("box", replace(self._object(index), points=(), box=box, logits=None))

    def finish_object(self) -> None:
        """What is drawn stays; the next click begins another object of the label."""
        with self._lock:
            self._prompted = None

    def _object(self, index: int) -> Prompted:
        now = self._prompted
        if now is not None and (now.index, now.label, now.model) == (index, self.labels.active, self.model):
            return now
        return Prompted(index, self.labels.active, self.model, self.labels_on(index))

    def _draw(self, what: str, asked: Prompted) -> None:
        """Asks the model and draws its mask on what was there before the object."""
        mask, logits, score = self._model.prompt(asked.index, asked.points, asked.box, asked.logits)
        said = replace(asked, logits=logits, score=score)
        self._commit(what, asked.index, painted(asked.ground, mask, asked.label, self.keep)[None], said)

    # --- by hand -----------------------------------------------------------------------------------------

    def put_mask(self, index: int, mask: np.ndarray, what: str = "mask") -> None:
        """Draws a mask, bool (H, W), with the active label."""
        with self._lock:
            self._ready(index)
            if mask.shape != self.image.shape[1:]:
                raise InputError(f"a mask of shape {mask.shape} for slices of {self.image.shape[1:]}")
            self._commit(what, index, painted(self.labels_on(index), mask, self.labels.active, self.keep)[None])

    def brush(self, index: int, path: Sequence[Sequence[float]], radius: float, erase: bool = False) -> None:
        """Draws with the active label along a path of (x, y), or erases.

        radius: in columns; the brush is round as it is seen, whatever the shape of the pixels. The centres of pixels
        have whole coordinates. Erasing takes away the active label, or any if `keep` is off.
        """
        with self._lock:
            self._ready(index)
            mask = stroke(self.image.shape[1:], path, radius, self.image.case.display["aspect"])
            if not erase:
                self.put_mask(index, mask, "brush")
                return
            labels = self.labels_on(index)
            labels[mask & ((labels == self.labels.active) | (not self.keep))] = 0
            self._commit("eraser", index, labels[None])

    def clear(self, index: int | None = None, every: bool = False) -> None:
        """Takes the active label, or every one, from one slice or from all."""
        with self._lock:
            self._ready(0 if index is None else index)
            part = slice(None) if index is None else slice(index, index + 1)
            labels = self.image.drawn[part].copy()
            labels[(labels == self.labels.active) | every] = 0
            self._commit("clearing", 0 if index is None else index, labels)

    # --- the model by itself -----------------------------------------------------------------------------

    def automatic(self, index: int) -> None:
        """Draws the model's classes on one slice; with `keep` only where nothing is drawn yet."""
        with self._lock:
            self._ready(index, classes=True)
            self._commit("automatic", index, self._classes(index)[None])

    def start_automatic(self) -> Job:
        """Draws the model's classes on every slice."""

        def work(job: Job, before: np.ndarray) -> str:
            for index in range(len(before)):
                if job.cancelled:
                    return f"stopped after {index} of {len(before)} slices"
                self._show(index, self._classes(index))
                job.done = index + 1
            return f"all {len(before)} slices segmented"

        with self._lock:
            self._ready(0, classes=True)
            return self._start("automatic segmentation", self.image.shape[0], work)

    def start_propagation(self, index: int, steps: int | None = None, way: str = "both") -> Job:
        """Carries the active label's mask of one slice to its neighbours: `steps` to each side, None for all.

        way: "both", "up" (towards the last slice) or "down". It stops where the object ends (`Predictor.propagate`).
        """
        with self._lock:
            self._ready(index, prompts=True)
            if way not in WAYS:
                raise InputError(f"direction {way!r}: allowed is {', '.join(WAYS)}")
            if steps is not None and steps < 1:
                raise InputError(f"{steps} slices: 1 or more are needed")
            label, depth = self.labels.active, self.image.shape[0]
            mask = self.image.drawn[index] == label
            if not mask.any():
                raise InputError(f"nothing of {self.labels.of(label).name} on this slice: draw it, then carry it on")
            most = depth if steps is None else steps
            there = {"up": min(most, depth - 1 - index), "down": min(most, index)}
            total = sum(count for side, count in there.items() if way in ("both", side))
            if not total:
                raise InputError("there is no slice on that side")

            def work(job: Job, before: np.ndarray) -> str:
                for at, found in self._model.carried(index, mask, steps, way):
                    if job.cancelled:
                        break
                    self._show(at, painted(before[at], found, label, self.keep))
                    job.done += 1
                told = f"carried to {job.done} slice{'s' * (job.done != 1)}"
                if job.cancelled or job.done == total:
                    return told + "; stopped" * job.cancelled
                return f"{told}; there the object ends, or the model is no longer sure"

            return self._start("propagation", total, work)

    def _start(self, what: str, total: int, work: Callable[[Job, np.ndarray], str]) -> Job:
        """Runs work that changes many slices; all of it becomes one edit, also where it ends early."""
        before, plane = self.image.drawn.copy(), self.image.plane
        prompted, self._prompted = self._prompted, None

        def run(job: Job) -> str:
            try:
                return work(job, before)
            finally:
                with self._lock:
                    self._remember(edit_of(what, plane, 0, before, self.image.drawn, (prompted, None)))

        self.job = Job(what, total, run)
        self.job.start()
        return self.job

    def _show(self, index: int, labels: np.ndarray) -> None:
        """Writes one slice of work in progress."""
        with self._lock:
            self._count(self.image.drawn[index], labels)
            self.image.drawn[index] = labels
            self.revision += 1

    def _classes(self, index: int) -> np.ndarray:
        """The slice's labels with the model's classes drawn on them."""
        found = self._model.classes(index)
        with self._lock:
            values = [0, *(self.labels.named(name).value for name in self.entry.class_names)]
            drawn, now = np.array(values, np.uint8)[found], self.image.drawn[index]
            return np.where(now > 0, now, drawn) if self.keep else drawn

    def warm(self, index: int) -> bool:
        """Encodes a slice ahead of the first click, unless a model is at work; returns whether it is encoded now."""
        with self._lock:
            self._index(index)
            return not (self.job is not None and self.job.running) and self._model.warm(index)

    # --- changes -----------------------------------------------------------------------------------------

    def undo(self) -> Edit | None:
        """Takes the last edit back and returns it; None where there is none."""
        with self._lock:
            self._ready(0)
            return self._move(self._history.back(), "before")

    def redo(self) -> Edit | None:
        """Makes the edit that was taken back last again and returns it; None where there is none."""
        with self._lock:
            self._ready(0)
            return self._move(self._history.forward(), "after")

    def slices_of(self, edit: Edit) -> tuple[int, int] | None:
        """First and last slice + 1 of the image, as it is cut now, where an edit changed labels; None where none."""
        return None if edit.slices is None else self.opened.met_by(edit.plane, edit.box)

    @property
    def unsaved(self) -> bool:
        """Whether anything is drawn that was not exported as it is now."""
        return self.revision != self._exported and bool(self._counts[1:].any())

    def exported(self, revision: int) -> None:
        """Says that the labels were written to a file as they were at that revision."""
        self._exported = revision

    @property
    def opened(self) -> Image:
        """The image. Raises InputError where none is open."""
        if self.image is None:
            raise InputError("no image is open; open one first")
        return self.image

    def values_on(self, index: int, channel: int = 0) -> np.ndarray:
        """A slice of the image as `Image.values` gives it."""
        if not 0 <= channel < self.opened.channels:
            raise InputError(f"channel {channel}: the image has {self.image.channels}, counted from 0")
        return self.opened.values(self._index(index), channel)

    def labels_on(self, index: int) -> np.ndarray:
        """The labels of a slice, (H, W) uint8, a copy; does not wait for a model that is at work."""
        return self.opened.drawn[self._index(index)].copy()

    def _move(self, edit: Edit | None, to: str) -> Edit | None:
        if edit is None:
            return None
        place = self.image.slices_of(self.image.labels, edit.plane)[edit.box]
        labels = edit.labels(to)
        self._count(place, labels)
        place[...] = labels
        state = edit.state_before if to == "before" else edit.state_after
        # The object goes on as the undone click had found it, if its label and model are still those in use.
        fits = state is not None and (state.label, state.model) == (self.labels.active, self.model)
        self._prompted = state if fits else None
        self.revision += 1
        return edit

    def _commit(self, what: str, first: int, labels: np.ndarray, prompted: Prompted | None = None) -> None:
        """Writes slices (D, H, W) from `first` on, as one edit."""
        place = self.image.drawn[first : first + len(labels)]
        edit = edit_of(what, self.image.plane, first, place, labels, (self._prompted, prompted))
        self._count(place, labels)
        place[...] = labels
        self._remember(edit)
        self._prompted = prompted

    def _remember(self, edit: Edit) -> None:
        """Keeps an edit for undo, unless it changed neither a voxel nor a prompt."""
        if edit.slices or edit.state_after is not None:
            self._history.push(edit)
        self.revision += 1

    def _count(self, before: np.ndarray, after: np.ndarray) -> None:
        for sign, labels in ((-1, before), (1, after)):
            self._counts += sign * np.bincount(labels.ravel(), minlength=len(self._counts))

    # --- checks ------------------------------------------------------------------------------------------

    def _idle(self) -> None:
        if self.job is not None and self.job.running:
            raise InputError(f"{self.job.what} is running; wait for it, or cancel it first")

    def _ready(self, index: int, prompts: bool = False, classes: bool = False) -> None:
        """Raises InputError unless something may be drawn on that slice, by prompts or by the model itself."""
        self._index(index)
        self._idle()
        if prompts and not self.entry.promptable:
            raise InputError(
                f"{self.entry.name}: draws its classes by itself and takes no clicks; choose another model"
            )
        if classes and not self.entry.automatic:
            raise InputError(f"{self.entry.name}: draws nothing by itself, it answers clicks; choose another model")

    def _index(self, index: int) -> int:
        if not 0 <= index < self.opened.shape[0]:
            raise InputError(f"slice {index}: the image has slices 0 to {self.image.shape[0] - 1}")
        return index

    def state(self) -> dict:
        """Everything but voxels, as values that JSON can hold."""
        with self._lock:
            now, last, following = self._prompted, self._history.last, self._history.next
            image = None
            if self.image is not None:
                image = self.image.description() | {"number": self.number}
            return {
                "image": image,
                "model": self.model,
                "channel": self.channel,
                "labels": [vars(label) | {"voxels": int(self._counts[label.value])} for label in self.labels],
                "active": self.labels.active,
                "keep": self.keep,
                "revision": self.revision,
                "unsaved": self.unsaved,
                "prompts": None if now is None else now.told(),
                "undo": last.what if last else None,
                "redo": following.what if following else None,
                "job": None if self.job is None else self.job.state(),
            }
