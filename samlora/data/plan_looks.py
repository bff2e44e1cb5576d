"""What single labels and images of a data set show, as far as `samlora plan` wants to know."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np

from samlora.data.folders import Pair
from samlora.data.grid import Volume, count_values
from samlora.data.pictures import is_lossy
from samlora.data.sources import on_grid, read_image, read_label_map
from samlora.data.volume import read_volume
from samlora.errors import InputError

SOFT = 127  # above it a pixel of a mask 0..255 belongs to the object
AIR = -500  # HU: below are lungs and what surrounds the body
_COLOUR = 24  # difference of the channels, of 255, from which on a pixel is coloured


@dataclasses.dataclass
class LabelLook:
    """What the label of one case shows. shape, spacing, axes: as in the file; spacing None and axes "" if unknown.

    values: structure ("" for a label map) -> value -> voxels, background included; what a label map names itself is a
    structure. filled: along each axis, how many slices show anything. soft: the threshold that the file needs, being a
    JPEG (lossy) or having fractions. names: value -> structures, as the label map has them.
    """

    case: str
    test: bool
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    axes: str
    values: dict[str, dict[int, int]]
    filled: tuple[int, int, int]
    soft: float | None
    lossy: bool
    names: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    has_thickness: bool = True

    @property
    def voxel_ml(self) -> float | None:
        """The volume of a voxel in ml; None where it is not known."""
        if self.spacing is None or not self.has_thickness:
            return None
        return float(np.prod(self.spacing)) / 1000


@dataclasses.dataclass
class ImageLook:
    """What one image holds. colour: share of coloured pixels. air: share of values that would be air in a CT."""

    case: str
    dtype: np.dtype
    low: float
    high: float
    shape: tuple[int, ...]
    channels: int
    colour: float
    air: float


def look_at_label(pair: Pair) -> LabelLook:
    """Reads the label of a case whole. Raises InputError or MissingFileError if it cannot be used."""
    files = {"": (pair.label,)} if isinstance(pair.label, Path) else pair.label
    values: dict[str, dict[int, int]] = {}
    shown, soft = None, None
    names: dict[int, tuple[str, ...]] = {}
    for structure, paths in files.items():
        counts: Counter[int] = Counter()
        for path in paths:
            volume, threshold = _raw(path, pair if structure == "" else None)
            soft = soft if threshold is None else threshold
            counts.update(count_values(volume.array))
            if shown is not None and shown.shape != volume.array.shape:
                raise InputError(
                    f"{path}: shape {volume.array.shape}, but {shown.shape} in the other masks of the case"
                )
            shown = volume.array != 0 if shown is None else shown | (volume.array != 0)
        names = dict(volume.names or {}) if structure == "" else {}
        values[structure] = {value: count for value, count in counts.items() if value not in names}
        for value in names:
            for name in names[value]:
                own = values.setdefault(name, {0: 0})
                own[1] = own.get(1, 0) + counts.get(value, 0)
    filled = tuple(int(shown.any(axis=tuple({0, 1, 2} - {axis})).sum()) for axis in range(3))
    known = volume.has_spacing
    spacing, axes = (volume.spacing, volume.axes) if known else (None, "")
    lossy = any(is_lossy(path) for paths in files.values() for path in paths)
    shape, thick = volume.array.shape, volume.has_thickness
    found = values, filled, soft, lossy, names, thick
    return LabelLook(pair.name, pair.test, shape, spacing, axes, *found)


def _raw(path: Path, pair: Pair | None = None) -> tuple[Volume, float | None]:
    """A label file as it is, and None; or, of a JPEG or of fractions, 0 and 1 and the threshold that made them.

    pair: the case whose label map it is, for the names of its values.
    """
    if is_lossy(path):
        return read_volume(path, labels=True, threshold=SOFT), SOFT
    try:
        if pair is not None:
            return read_label_map(dataclasses.replace(pair, names={})), None
        return read_volume(path, labels=True), None
    except InputError:
        volume = read_volume(path)
        array = volume.array
        if array.dtype.kind != "f" or array.ndim != 3 or array.min() < 0:
            raise
        threshold = _soft_threshold(float(array.max()))
        if threshold is None:
            raise
    return dataclasses.replace(volume, array=(array > threshold).astype(np.uint8)), threshold


def _soft_threshold(highest: float) -> float | None:
    """The middle of the range that a soft mask with this highest value has, or None if it is none.

    Soft masks go up to 1, to 100 (per cent), or to the 255 of pictures; what ends elsewhere are labels that somebody
    has resampled.
    """
    ranges = ((0.5, 1.0, 0.5), (50.0, 100.0, 50.0), (SOFT, 255.0, float(SOFT)))
    near = 1e-3  # single precision, and filters that overshoot
    return next((middle for low, high, middle in ranges if low < highest <= high * (1 + near)), None)


def look_at_image(pair: Pair) -> ImageLook:
    """Reads the image of a case whole, and one file of its label. Raises as above, also if their grids differ."""
    volume = read_image(pair)
    array, path = volume.array, pair.label if isinstance(pair.label, Path) else next(iter(pair.label.values()))[0]
    on_grid(_raw(path)[0], volume)
    colour = 0.0
    if array.ndim == 4 and array.shape[3] == 3:
        scale = 255 if array.dtype == np.uint8 else max(float(array.max()), 1e-6)
        apart = array.max(axis=3).astype(np.float32) - array.min(axis=3)
        colour = float((apart > _COLOUR * scale / 255).mean())
    channels = array.shape[3] if array.ndim == 4 else 1
    air = float((array <= AIR).mean()) if array.min() <= AIR else 0.0
    low, high = float(array.min()), float(array.max())
    return ImageLook(pair.name, array.dtype, low, high, array.shape, channels, colour, air)
