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
    has_spacing, has_thickness: as of the `Volume`.
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
    has_thickness: bool = True

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
    has_thickness: False for one slice of unknown thickness (X-rays, files of two axes), which counts as 1 mm: distances
    are in mm, but nothing has a volume.
    sparse: the slices (along the last axis) are known one by one, and what lies between or beside them is empty, as
    in DICOM segmentations, which leave out empty frames.
    names: of a label map that names its own values: value -> the structures that it shows, several where they overlap.
    """

    array: np.ndarray
    affine: np.ndarray
    qform_code: int = 0
    sform_code: int = 2
    qform: np.ndarray | None = None
    path: str = ""
    has_spacing: bool = True
    has_thickness: bool = True
    sparse: bool = False
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
        known = {"has_spacing": self.has_spacing, "has_thickness": self.has_thickness}
        return Geometry(*grid, orientation or self.axes, slice_axis, **known)


@dataclasses.dataclass
class Case:
    """A volume as SAMed stores it: image (D, H, W) or (D, H, W, C) float32, label (D, H, W) integer or None.

    `geometry` and `recipe` are None for published files, which hold neither. ignored: (D, H, W) bool, where nobody has
    labelled anything and the label says background; None where the recipe ignores nothing.
    """

    image: np.ndarray
    label: np.ndarray | None = None
    geometry: Geometry | None = None
    recipe: dict | None = None
    name: str = ""
    ignored: np.ndarray | None = None

    @property
    def affine(self) -> np.ndarray | None:
        """The source file's affine (4, 4), voxel (i, j, k) -> RAS mm, or None where it is not known."""
        return None if self.geometry is None else self.geometry.affine

    @property
    def has_thickness(self) -> bool:
        """Whether voxels have a volume, where their spacing is known; see `Volume`."""
        return self.geometry is None or self.geometry.has_thickness

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


def match_grid(label: Volume, to: Volume, *, part: bool = False) -> Volume:
    """`label` on the grid of `to`, by permuting and flipping, where both describe the same voxels in space.

    Oblique affines too. Voxel centres may differ by a tenth of a voxel (rounded headers).

    Args:
        part: `label` may cover a part of the grid: whole voxels away, in the same directions and distances. What it
            does not cover becomes 0. For label maps only.

    Raises:
        InputError: with both grids in it, if they differ in more than the order and direction of their axes (and,
            with `part`, in what they cover).
    """
    placed = _placed_in(label, to)
    if placed is not None:
        array, indices = placed
        shape = to.array.shape[:3]
        if array.shape[:3] == shape and all(np.array_equal(i, np.arange(n)) for i, n in zip(indices, shape)):
            return dataclasses.replace(to, array=array, path=label.path, names=label.names, sparse=False)
        if part and all(not i.size or (i.min() >= 0 and i.max() < n) for i, n in zip(indices, shape)):
            padded = np.zeros(shape, array.dtype)
            padded[np.ix_(*indices)] = array
            return dataclasses.replace(to, array=padded, path=label.path, names=label.names, sparse=False)
    raise InputError(
        f"{label.path or 'label'}: its grid ({_grid(label)}) is not that of {to.path or 'the image'} "
        f"({_grid(to)}); resample the label onto the image, or repair its header if they are the same voxels"
    )


def common_grid(one: Volume, other: Volume) -> tuple[Volume, Volume]:
    """Two label maps on the smallest grid that holds both, 0 where one of them says nothing.

    The axes run as those of `other` (of `one`, where `other` leaves out slices that `one` has). Raises
    InputError, as `match_grid` does, unless both lie on one lattice and share voxels of it.
    """
    placed = _placed_in(one, other)
    if placed is None and _placed_in(other, one) is not None:  # `other` leaves out slices that `one` has
        turned, kept = common_grid(other, one)
        return kept, turned
    shape = np.array(other.array.shape[:3])
    if placed is None or any(i.size and (i.max() < 0 or i.min() >= n) for i, n in zip(placed[1], shape)):
        return match_grid(one, other), other
    low = np.array([min(0, i.min(initial=0)) for i in placed[1]])
    high = np.array([max(n, i.max(initial=0) + 1) for i, n in zip(placed[1], shape)])
    affine = other.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    empty = np.broadcast_to(np.zeros((), np.uint8), tuple(high - low))
    both = dataclasses.replace(other, array=empty, affine=affine, sparse=False)
    if not low.any() and np.array_equal(high, shape):
        both = other
    return match_grid(one, both, part=True), match_grid(other, both, part=True)


def _placed_in(label: Volume, to: Volume) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """`label` with its axes running as those of `to`, and for each axis the indices that its voxels have in `to`.

    The indices may lie outside of `to`. None if voxels of the label lie between those of `to`.
    """
    order = np.abs(np.linalg.inv(label.affine)[:3, :3] @ to.affine[:3, :3]).argmax(axis=0)
    if sorted(order) != [0, 1, 2]:
        return None
    direction = (np.linalg.inv(label.affine) @ to.affine)[order, range(3)]
    turned = _arranged(label, order, direction < 0)
    array = turned.array
    move = np.linalg.inv(to.affine) @ turned.affine  # index in `turned` -> index in `to`
    indices = [np.arange(n) + round(start) for n, start in zip(array.shape, move[:3, 3])]
    if label.sparse:
        axis = list(order).index(2)
        used = np.flatnonzero(array.any(axis=tuple(n for n in range(3) if n != axis)))
        exact = move[axis, 3] + move[axis, axis] * used
        indices[axis] = np.rint(exact).astype(int)
        if np.abs(exact - indices[axis]).max(initial=0) > _SAME_VOXEL or len(set(indices[axis])) < len(used):
            return None
        array = np.take(array, used, axis=axis)
        origin, scale = move[:3, axis] * (used[0] if used.size else 0), move[:, axis].copy()
        move[:3, 3] += origin
        if used.size > 1:
            move[:3, axis] = scale[:3] * (used[-1] - used[0]) / (used.size - 1)
    if not all(array.shape[:3]):
        return array, indices
    ends = [(i[0], i[-1]) for i in indices]
    for corner in np.ndindex(2, 2, 2):
        inside = [c * (n - 1) for c, n in zip(corner, array.shape)]
        meant = [end[c] for c, end in zip(corner, ends)]
        if np.abs((move @ [*inside, 1])[:3] - meant).max() > _SAME_VOXEL:
            return None
    return array, indices


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
    codes = g.qform_code, g.sform_code
    return Volume(array, g.affine, *codes, g.qform, case.name, g.has_spacing, g.has_thickness)


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
    sparse = volume.sparse and bool(order[2] == 2)
    return dataclasses.replace(volume, array=array, affine=volume.affine @ move, qform=qform, sparse=sparse)


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
