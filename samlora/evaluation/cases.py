"""One case of an evaluation of files: read, laid on one grid, measured, drawn. Runs in any process."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from samlora.data.folders import Masks, folder_or_file
from samlora.data.grid import Case, Volume, common_grid, count_values, match_grid, reorient, slice_order, transposed
from samlora.data.ignored import split_ignored, with_ignored
from samlora.data.label_tables import names_beside, numbers_of
from samlora.data.recipe import Recipe
from samlora.data.volume import read_volume, stem
from samlora.errors import InputError
from samlora.evaluation.frames import Frames, draw_frames
from samlora.evaluation.matching import Trio
from samlora.evaluation.metrics import evaluate_case

_CT_WINDOW = (-160.0, 240.0)  # HU; shows the soft tissues
_LOW_HU = -300  # no other kind of image has values as low as air in CT
_MOST_VALUES = 256
_ANISOTROPIC = 1.5  # slices thicker than this many pixels are shown as they were taken


@dataclasses.dataclass(frozen=True)
class Job:
    """One case and how it is to be measured; see `folders.evaluate_folders`.

    values: structure -> label, for masks and label maps that name their values. labels: those to measure; None for
    those found. ignored: values of the reference whose voxels are not measured.
    """

    trio: Trio
    recipe: Recipe | None
    values: Mapping[str, int]
    threshold: float | None
    labels: tuple[int, ...] | None
    tolerances: tuple[float, ...]
    ignored: tuple[int, ...] = ()

    def read(self) -> tuple[Volume, Volume, set[int]]:
        """Prediction and reference on one grid, and the values of voxels of the reference that are not measured.

        Raises InputError naming the file that cannot be used.
        """
        soft = self.recipe.mask_threshold if self.recipe is not None and self.threshold is None else self.threshold
        reference = self._label_map(self.trio.reference, soft)
        left_out = np.isin(reference.array, self.ignored) if self.ignored and soft is None else None
        ignored: set[int] = set()
        if left_out is not None:
            ignored |= set(np.unique(reference.array[left_out]).tolist())
            reference.array = with_ignored(reference.array, left_out, 0)
        if self.recipe is not None and isinstance(self.trio.reference, Path):
            try:
                mapped = self.recipe.map_labels(reference.array, reference.names)
                mapped, unlabelled = split_ignored(mapped, self.recipe.to_dict())
                if unlabelled is not None:
                    ignored |= set(np.unique(reference.array[unlabelled]).tolist())
                    left_out = unlabelled if left_out is None else left_out | unlabelled
                reference = dataclasses.replace(reference, array=mapped, names=None)
            except InputError as error:
                raise InputError(f"{self.trio.path}: {error}") from None
        if self.trio.prediction is None:
            empty = dataclasses.replace(reference, array=np.zeros_like(reference.array))
            return empty, reference, ignored
        prediction, reference = _on_one_grid(self._label_map(self.trio.prediction, self.threshold, True), reference)
        prediction.array = with_ignored(prediction.array, left_out, 0)
        return prediction, reference, ignored

    def _label_map(self, side: Path | Masks, threshold: float | None, predicted: bool = False) -> Volume:
        """A label map, structures that it names numbered as they are here; or made of masks, which must not overlap."""
        if isinstance(side, Path):
            volume = read_volume(side, labels=True, threshold=threshold)
            if threshold is None and volume.names is None:
                volume.names = names_beside(side, stem(side)) or None
            # The values of a reference that a recipe describes are still those of its data set.
            of_data_set = self.recipe is not None and not predicted
            return volume if of_data_set or volume.names is None else self._numbered(volume)
        painted = None
        for name, path in ((name, path) for name, paths in side.items() for path in paths):
            mask = read_volume(path, labels=True, threshold=threshold)
            if painted is None:
                painted = dataclasses.replace(mask, array=np.zeros(mask.array.shape, np.uint16))
                painted.path = str(folder_or_file(side))
            value = self.values.get(name)
            if value is None:  # no class of the recipe
                continue
            mask, painted = _on_one_grid(mask, painted)
            inside = mask.array != 0
            if not np.isin(painted.array[inside], (0, value)).all():
                raise InputError(f"{path}: overlaps another mask of its case; measure overlapping structures apart")
            painted.array[inside] = value
        return painted

    def _numbered(self, volume: Volume) -> Volume:
        """A label map that names its values, with the numbers that those structures have here."""
        counts = count_values(volume.array)
        table = np.arange(max(counts) + 1, dtype=np.uint16)
        for value in sorted(counts.keys() & volume.names.keys()):
            found = volume.names[value]
            numbers = numbers_of(found, self.values)
            if len(numbers) > 1:
                both = " and ".join(found)
                raise InputError(f"{volume.path}: {both} overlap; measure overlapping structures apart")
            if numbers:
                table[value] = numbers.pop()
        return dataclasses.replace(volume, array=table[volume.array], names=None)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came of a case. results: policy -> label -> measures. has_spacing: whether they are in mm. has_thickness:
    whether there are volumes in ml.

    bare: the file of the two that says nothing about mm, where the other one does. ignored: the values of voxels
    of the reference that were not measured.
    """

    name: str
    path: Path
    results: dict[str, dict[int, dict[str, float]]]
    has_spacing: bool
    has_thickness: bool
    bare: str = ""
    ignored: frozenset[int] = frozenset()


def measure(job: Job) -> Measured:
    """Measures a case under every policy."""
    prediction, reference, ignored = job.read()
    if job.labels is None:
        for volume in (prediction, reference):
            values = len(count_values(volume.array))
            if values > _MOST_VALUES:
                advice = "is it an image? Choose labels with --labels"
                raise InputError(f"{volume.path}: {values} different values; {advice}")
    placed = [volume for volume in (prediction, reference) if volume.has_spacing]
    spacing = placed[0].spacing if placed else None
    thick = all(volume.has_thickness for volume in (prediction, reference))
    how = spacing, job.labels, job.tolerances, thick
    try:
        results = evaluate_case(prediction.array, reference.array, *how)
    except InputError as error:
        raise InputError(f"{prediction.path} and {reference.path}: {error}") from None
    bare = next((v.path for v in (prediction, reference) if not v.has_spacing), "") if placed else ""
    name = Path(bare).name if bare else ""
    return Measured(job.trio.name, job.trio.path, results, bool(placed), thick, name, frozenset(ignored))


def draw(job: Job, labels: tuple[int, ...]) -> tuple[Frames, str]:
    """The pictures of a case, with `labels` as classes 1, 2, ..., and a note where its image could not be used."""
    prediction, reference, _ = job.read()
    stacks, note = [None], ""
    axis = _slice_axis(reference)
    if job.trio.image is not None:
        try:
            stacks = [_stack(_background(read_volume(job.trio.image), reference), axis)]
        except InputError as error:
            note = f"{job.trio.name} is shown without its image: {error}"
    highest = max(int(reference.array.max()), int(prediction.array.max()), *labels)
    place = np.zeros(highest + 1, np.uint16)
    place[list(labels)] = range(1, len(labels) + 1)
    for volume in (reference, prediction):
        stacks.append(_stack(dataclasses.replace(reference, array=place[volume.array]), axis))
    display = Case(stacks[1], geometry=reference.geometry("LPS", axis)).display
    return draw_frames(*stacks, **display), note


def _on_one_grid(volume: Volume, to: Volume) -> tuple[Volume, Volume]:
    """Both on one grid; voxel by voxel where one of them says nothing about where it lies.

    Where one covers more slices than the other (DICOM SEG without its empty frames), the rest of the other is empty.
    """
    if volume.has_spacing == to.has_spacing:
        return common_grid(volume, to)
    if volume.array.shape[:3] != to.array.shape[:3]:
        sizes = [" x ".join(map(str, v.array.shape[:3])) for v in (volume, to)]
        raise InputError(f"{volume.path}: has {sizes[0]} voxels, {to.path} has {sizes[1]}; they must be on one grid")
    return volume, to


def _slice_axis(volume: Volume) -> int:
    """The axis, of the volume turned to LPS, whose slices are shown: across thick slices, else from feet to head."""
    turned = reorient(volume, "LPS")
    if 1 in turned.array.shape:
        return turned.array.shape.index(1)
    _, middle, largest = sorted(turned.spacing)
    return turned.spacing.index(largest) if largest > _ANISOTROPIC * middle else 2


def _stack(volume: Volume, axis: int) -> np.ndarray:
    return transposed(reorient(volume, "LPS").array, slice_order(axis))


def _background(image: Volume, reference: Volume) -> Volume:
    """The image on the reference's grid, 0..1; colours stay, of other channels the first is shown."""
    alike = image.has_spacing == reference.has_spacing
    array = match_grid(image, to=reference).array if alike else _on_one_grid(image, reference)[0].array
    if array.ndim == 4 and array.shape[3] == 3 and array.dtype == np.uint8:
        return dataclasses.replace(reference, array=array.astype(np.float32) / 255)
    array = (array[..., 0] if array.ndim == 4 else array).astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if low <= _LOW_HU:
        low, high = _CT_WINDOW
    elif low < 0 or high > 1:
        there = array[array != 0]
        low, high = np.percentile(there if there.size else array, [0.5, 99.5])
    else:
        low, high = 0.0, 1.0
    return dataclasses.replace(reference, array=(array - low) / max(high - low, 1e-6))
