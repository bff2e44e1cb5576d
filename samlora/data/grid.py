"""Where voxels lie: volumes indexed as their files are, stacks of slices, and the way from one to the other.

A `Volume` is indexed (i, j, k) as its file is; a `Case` is indexed (slice, row, column) as SAMed stores it. Either
may have a last axis of channels: colours of a picture, weightings of an MR.
`Geometry` remembers how the one was made from the other, so that labels find the way back.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from samlora.errors import InputError

_SAME_VOXEL = 0.1  # voxels: headers are rounded to float32 or to a few digits, a real shift is 0.5 or more


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """The grid a stack of slices was cut from: shape (i, j, k), affine (voxel -> RAS mm), the NIfTI codes.

    `orientation` are the axis codes the array had when it was cut along its axis `slice_axis`. `box` is the part
    of every slice that was kept, (first row, last row + 1, first column, last column + 1); None for all of it.
    has_spacing: as of the `Volume`.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    qform: np.ndarray | None
    qform_code: int
    sform_code: int
    orientation: str
    slice_axis: int
    box: tuple[int, int, int, int] | None = None
    has_spacing: bool = True

    def to_dict(self) -> dict:
        """The geometry as values that JSON can hold; `from_dict` takes them back exactly."""
        arrays = {"affine": self.affine, "qform": self.qform}
        values = {key: None if array is None else array.tolist() for key, array in arrays.items()}
        box = None if self.box is None else list(self.box)
        return dataclasses.asdict(self) | values | {"shape": list(self.shape), "box": box}

    @classmethod
    def from_dict(cls, values: dict) -> "Geometry":
        """The geometry that `to_dict` described; raises KeyError, TypeError or ValueError otherwise."""
        values = dict(values, shape=tuple(int(n) for n in values["shape"]))
        values["affine"] = np.asarray(values["affine"], np.float64).reshape(4, 4)
        if values.get("box") is not None:
            values["box"] = tuple(int(n) for n in values["box"])
        if values["qform"] is not None:
            values["qform"] = np.asarray(values["qform"], np.float64).reshape(4, 4)
        return cls(**values)


@dataclasses.dataclass
class Volume:
    """An array (i, j, k) or (i, j, k, channel), indexed as its file is, and where its voxels lie.

    `affine` (4, 4) float64 maps voxel indices to RAS millimetres. `qform` is the file's second affine where
    it differs from the first (NIfTI may hold two). `path` is where the volume came from, for messages. has_spacing:
    False where the file says nothing about millimetres (pictures, bare arrays); a voxel then counts as 1 x 1 x 1.
    names: of a label map that names its own values: value -> the structures that it shows, several where they overlap.
    """

    array: np.ndarray
    affine: np.ndarray
    qform_code: int = 0
    sform_code: int = 2
    qform: np.ndarray | None = None
    path: str = ""
    has_spacing: bool = True
    names: Mapping[int, tuple[str, ...]] | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along (i, j, k)."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def axes(self) -> str:
        """nibabel's axis codes: "RAS" means that the indices run to Right, Anterior, Superior."""
        return _axes(self.affine)

    def geometry(self, orientation: str | None, slice_axis: int) -> Geometry:
        """What undoes turning to `orientation` (None: left as stored) and cutting along `slice_axis`."""
        grid = self.array.shape[:3], self.affine, self.qform, self.qform_code, self.sform_code
        return Geometry(*grid, orientation or self.axes, slice_axis, has_spacing=self.has_spacing)


@dataclasses.dataclass
class Case:
    """A volume as SAMed stores it: image (D, H, W) or (D, H, W, C) float32, label (D, H, W) integer or None.

    `geometry` and `recipe` are None for published files, which hold neither.
    """

    image: np.ndarray
    label: np.ndarray | None = None
    geometry: Geometry | None = None
    recipe: dict | None = None
    name: str = ""

    @property
    def affine(self) -> np.ndarray | None:
        """The source file's affine (4, 4), voxel (i, j, k) -> RAS mm, or None where it is not known."""
        return None if self.geometry is None else self.geometry.affine

    @property
    def display(self) -> dict[str, bool | float]:
        """flip_ud, flip_lr and aspect (row over column spacing) that show slices as radiologists hang them.

        Then front (or head) is up, and the patient's right (or front) at the left. Slices whose geometry is
        not known are shown as they are stored.
        """
        if self.geometry is None:
            return {"flip_ud": False, "flip_lr": False, "aspect": 1.0}
        _, row, column = (self.geometry.orientation[axis] for axis in slice_order(self.geometry.slice_axis))
        _, height, width = self.spacing or (1.0, 1.0, 1.0)
        return {"flip_ud": row in "AS", "flip_lr": column in "RA", "aspect": height / width}

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size in mm along (D, H, W), or None where it is not known."""
        if self.geometry is None or not self.geometry.has_spacing:
            return None
        order, _ = _arrangement(self.geometry.affine, self.geometry.orientation)
        sizes = np.linalg.norm(self.geometry.affine[:3, :3], axis=0)[order]
        return tuple(float(sizes[axis]) for axis in slice_order(self.geometry.slice_axis))


def slice_order(slice_axis: int) -> tuple[int, int, int]:
    """The transposition from (x, y, z) to (slice, row, column): SAMed stores (x, y, z) as (z, y, x)."""
    return (slice_axis, *(axis for axis in (2, 1, 0) if axis != slice_axis))


def body_axes(codes: str) -> list[int]:
    """For each letter of axis codes such as "LPS": 0 left-right, 1 front-back, 2 up-down.

    Raises InputError unless there is one letter of each.
    """
    axes = [next((n for n, pair in enumerate(("LR", "PA", "IS")) if code in pair), -1) for code in codes]
    if sorted(axes) != [0, 1, 2]:
        raise InputError(f"orientation {codes!r}: one letter each of L/R, P/A, I/S is needed, as in LPS")
    return axes


def reorient(volume: Volume, axes: str) -> Volume:
    """The same voxels in the same places, indices running as `axes` ("LPS", ...) says.

    Only permutes and flips, so no value changes. Raises InputError if `axes` are no three axis codes.
    """
    return _arranged(volume, *_arrangement(volume.affine, axes))


def match_grid(label: Volume, to: Volume) -> Volume:
    """`label` on the grid of `to`, by permuting and flipping, where both describe the same voxels in space.

    Oblique affines too. Voxel centres may differ by a tenth of a voxel (rounded headers). Raises InputError,
    with both grids in it, if they differ in more than the order and direction of their axes.
    """
    step = np.linalg.inv(label.affine) @ to.affine  # index in `to` -> index in `label`
    order = np.abs(step[:3, :3]).argmax(axis=0)
    shape = np.array(to.array.shape[:3])
    if sorted(order) == [0, 1, 2] and np.array_equal(np.array(label.array.shape)[order], shape):
        flips = step[order, range(3)] < 0
        corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*(shape - 1), 1]
        if np.abs((step - _index_map(shape, order, flips)) @ corners.T).max() <= _SAME_VOXEL:
            array = _arranged(label, order, flips).array
            return dataclasses.replace(to, array=array, path=label.path, names=label.names)
    raise InputError(
        f"{label.path or 'label'}: its grid ({_grid(label)}) is not that of {to.path or 'the image'} "
        f"({_grid(to)}); resample the label onto the image, or repair its header if they are the same voxels"
    )


def case_to_volume(case: Case, stack: np.ndarray) -> Volume:
    """A stack (D, H, W) or (D, H, W, C), labels or image, on the grid of the file that `case` was made from.

    Shape, affine and codes are that file's. Where that is not known (published files) the array is (x, y, z)
    with an identity affine. Raises InputError if `stack` has other slices than the case.
    """
    if stack.shape[:3] != case.image.shape[:3]:
        raise InputError(f"{case.name}: a stack of shape {stack.shape} for an image of {case.image.shape}")
    if case.geometry is None:
        return Volume(transposed(stack, (2, 1, 0)), np.eye(4), path=case.name, has_spacing=False)
    g = case.geometry
    order, flips = _arrangement(g.affine, g.orientation)
    if g.box is not None:  # what was cut off comes back as background
        top, bottom, left, right = g.box
        _, rows, columns = (g.shape[order[axis]] for axis in slice_order(g.slice_axis))
        margins = ((0, 0), (top, rows - bottom), (left, columns - right)) + ((0, 0),) * (stack.ndim - 3)
        stack = np.pad(stack, margins)
    array = transposed(stack, np.argsort(slice_order(g.slice_axis)))
    array = transposed(np.flip(array, np.flatnonzero(flips)), np.argsort(order))
    if array.shape[:3] != tuple(g.shape):
        raise InputError(f"{case.name}: slices of shape {case.image.shape} do not fit their source {g.shape}")
    return Volume(array, g.affine, g.qform_code, g.sform_code, g.qform, case.name, g.has_spacing)


def neighbours(stack: np.ndarray, index: Sequence[int]) -> np.ndarray:
    """The slices `index` (B) of a gray stack (D, H, W) with those before and after: (B, H, W, 3).

    The first and the last slice stand in for the neighbour that they lack.
    """
    beside = np.clip(np.asarray(index)[:, None] + (-1, 0, 1), 0, len(stack) - 1)
    return np.moveaxis(stack[beside], 1, -1)


def to_show(stack: np.ndarray) -> np.ndarray:
    """One channel (D, H, W) of a stack for pictures: the middle one, green or the slice itself."""
    return stack if stack.ndim == 3 else stack[..., stack.shape[3] // 2]


def transposed(array: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The first three axes in another order; channels stay the last axis."""
    return array.transpose((*order, *range(3, array.ndim)))


def _axes(affine: np.ndarray) -> str:
    import nibabel

    return "".join(nibabel.aff2axcodes(affine))


def _arrangement(affine: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """For each of the wanted axes: which axis of the array it is, and whether that one runs the other way."""
    current = _axes(affine)
    order = np.array([body_axes(current).index(wanted) for wanted in body_axes(axes)])
    return order, np.array([current[n] != code for n, code in zip(order, axes)])


def _arranged(volume: Volume, order: np.ndarray, flips: np.ndarray) -> Volume:
    array = np.flip(transposed(volume.array, order), np.flatnonzero(flips))
    move = _index_map(np.array(array.shape[:3]), order, flips)
    qform = None if volume.qform is None else volume.qform @ move
    return dataclasses.replace(volume, array=array, affine=volume.affine @ move, qform=qform)


def _index_map(shape: np.ndarray, order: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """(4, 4): index in the arranged array of `shape` -> index in the array it was arranged from."""
    move = np.zeros((4, 4))
    move[order, range(3)] = np.where(flips, -1, 1)
    move[order, 3] = np.where(flips, shape - 1, 0)
    move[3, 3] = 1
    return move


def _grid(volume: Volume) -> str:
    shape = " x ".join(map(str, volume.array.shape[:3]))
    spacing, origin = (" ".join(f"{v:.6g}" for v in vs) for vs in (volume.spacing, volume.affine[:3, 3]))
    return f"shape {shape}, spacing {spacing} mm, axes {volume.axes}, origin {origin}"


def integers(array: np.ndarray, where: str | os.PathLike) -> np.ndarray:
    """A label map as the smallest of uint8, uint16, int32; 1.0000001 counts as 1.

    Raises InputError, naming `where`, for fractions and for values outside -32768..65535.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        broken = np.abs(array - rounded) > 1e-3
        if broken.any():
            values = _listed(np.unique(array[broken]))
            raise InputError(
                f"{where}: label values {values} are not whole; resample labels by nearest, or set a mask_threshold"
            )
        array = rounded
    low, high = array.min(initial=0), array.max(initial=0)
    if low < -32768 or high > 65535:
        raise InputError(f"{where}: label values {low:g}..{high:g}; is this an image? 0..65535 can be used")
    return array.astype(np.int32 if low < 0 else np.uint8 if high < 256 else np.uint16)


def count_values(labels: np.ndarray) -> dict[int, int]:
    """Value -> voxels of an integer array of two axes or more, the background included."""
    if labels.min(initial=0) < 0:
        values, counts = np.unique(labels, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist()))
    length = int(labels.max(initial=0)) + 1
    counts = sum(np.bincount(part.ravel(), minlength=length) for part in labels)  # by parts: bincount widens to 64 bits
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _listed(values: Sequence, most: int = 5) -> str:
    return " ".join(f"{v:g}" for v in values[:most]) + (" ..." if len(values) > most else "")
