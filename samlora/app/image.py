"""An image that is open on the page: its voxels, the labels drawn on it, and how both are cut into slices."""

import dataclasses
from pathlib import Path

import numpy as np

from samlora.data.grid import Case, Volume, body_axes, reorient, slice_order, transposed
from samlora.data.usual import usual_recipe

_SOFT_TISSUE = (-160.0, 240.0)  # HU, as of the recipe generic_ct
_WIRE = (np.uint8, np.int16, np.uint16)


class Image:
    """A volume and its label map, uint8 on the same grid, indexed (i, j, k) as the file is.

    What is shown are slices of both, (D, H, W): views of the arrays, turned to `orientation` (axis codes, None: as
    stored) and cut along `slice_axis`; writing into `drawn` writes the labels. source: the file or DICOM folder,
    series: which of its series. modality: of the DICOM series, "" where it is not known. limits: lowest and highest
    value.
    """

    def __init__(
        self,
        volume: Volume,
        name: str,
        source: Path | None = None,
        series: str | None = None,
        modality: str = "",
    ):
        self.volume, self.name, self.source, self.series = volume, name, source, series
        self.labels = np.zeros(volume.array.shape[:3], np.uint8)
        self.limits = float(volume.array.min()), float(volume.array.max())
        self.is_ct = modality == "CT" or (not modality and usual_recipe(volume).modality == "ct")
        self.cut(None, 2)

    def cut(self, orientation: str | None, slice_axis: int) -> None:
        """Cuts the slices: turned to these axis codes (None: as stored), along this axis."""
        self.plane = orientation, slice_axis
        self.stack = self.slices_of(self.volume.array, self.plane)
        self.drawn = self.slices_of(self.labels, self.plane)

    def slices_of(self, array: np.ndarray, plane: tuple[str | None, int]) -> np.ndarray:
        """An array on the volume's grid as slices (D, H, W[, C]): a view of it, never a copy."""
        orientation, slice_axis = plane
        volume = dataclasses.replace(self.volume, array=array)
        turned = volume if orientation is None else reorient(volume, orientation)
        return transposed(turned.array, slice_order(slice_axis))

    def met_by(self, plane: tuple[str | None, int], box: tuple[slice, slice, slice]) -> tuple[int, int]:
        """First and last slice + 1, as they are cut now, that a box of slices cut as `plane` says meets."""
        for indices in np.indices(self.labels.shape, sparse=True):
            here = np.broadcast_to(indices, self.labels.shape)
            found = self.slices_of(here, self.plane)[:, 0, 0]
            if found[0] != found[-1]:  # this axis of the file runs along the slices
                there = self.slices_of(here, plane)[box]
                ends = there[0, 0, 0], there[-1, -1, -1]
                met = np.flatnonzero((min(ends) <= found) & (found <= max(ends)))
                return int(met[0]), int(met[-1]) + 1
        return 0, 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        return self.drawn.shape

    @property
    def case(self) -> Case:
        """The slices as a Case, whose `display` and `spacing` say how to show them."""
        return Case(self.stack, geometry=self.volume.geometry(*self.plane), name=self.name)

    def values(self, index: int, channel: int = 0) -> np.ndarray:
        """One slice as the page gets it: (H, W), or (H, W, 3) uint8 for colours; little-endian, of type `wire`."""
        array = self.stack[index]
        if array.ndim == 3 and not self.has_colours:
            array = array[..., channel]
        return np.ascontiguousarray(array, dtype=self.wire.newbyteorder("<"))

    @property
    def has_colours(self) -> bool:
        return self.stack.ndim == 4 and self.stack.shape[3] == 3 and self.stack.dtype == np.uint8

    @property
    def channels(self) -> int:
        """How many channels can be looked at one by one."""
        return self.stack.shape[3] if self.stack.ndim == 4 and not self.has_colours else 1

    @property
    def wire(self) -> np.dtype:
        """The smallest of uint8, int16, uint16 and float32 that holds all values."""
        low, high = self.limits
        if self.stack.dtype.kind in "biu":
            for kind in _WIRE:
                if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                    return np.dtype(kind)
        return np.dtype(np.float32)

    def window(self) -> tuple[float, float]:
        """The range of values to show first: (low, high)."""
        if self.is_ct:
            return _SOFT_TISSUE
        if self.volume.array.dtype == np.uint8:
            return 0.0, 255.0
        array = self.volume.array
        sample = array[tuple(slice(None, None, max(1, n // 64)) for n in array.shape[:3])]
        seen = sample[sample != 0]
        low, high = np.percentile(seen, (0.5, 99.5)) if seen.size else self.limits
        return (float(low), float(high)) if high > low else (self.limits[0], self.limits[0] + 1)

    def description(self) -> dict:
        """What the page must know to show the slices, as values that JSON can hold."""
        case = self.case
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.wire.name,
            "colours": self.has_colours,
            "channels": self.channels,
            "limits": list(self.limits),
            "window": list(self.window()),
            "ct": self.is_ct,
            "spacing": None if case.spacing is None else [round(step, 4) for step in case.spacing],
            "has_thickness": case.has_thickness,
            "display": case.display,
            "plane": self.plane_name,
            "edges": self.edges,
            "dicom": self.from_dicom,
        }

    @property
    def plane_name(self) -> str:
        """axial, coronal or sagittal, by the body axis that the slices are cut along; "" where it is not known."""
        if not self.volume.has_spacing:
            return ""
        axes = self.plane[0] or self.volume.axes
        return ("sagittal", "coronal", "axial")[body_axes(axes)[self.plane[1]]]

    @property
    def edges(self) -> dict[str, str]:
        """The sides of the body at the edges of a slice as it is shown: left, right, top, bottom; "" if not known."""
        if not self.volume.has_spacing:
            return dict.fromkeys(("left", "right", "top", "bottom"), "")
        axes = self.plane[0] or self.volume.axes
        _, row, column = (axes[axis] for axis in slice_order(self.plane[1]))
        other, display = dict(zip("LRAPSI", "RLPAIS")), self.case.display
        right = other[column] if display["flip_lr"] else column
        bottom = other[row] if display["flip_ud"] else row
        return {"left": other[right], "right": right, "top": other[bottom], "bottom": bottom}

    @property
    def from_dicom(self) -> bool:
        """Whether a DICOM segmentation can refer to the source."""
        return self.source is not None and (self.source.is_dir() or self.source.suffix.lower() == ".dcm")

    def label_volume(self) -> Volume:
        """The labels on the grid of the file: its shape, affine and codes."""
        return dataclasses.replace(self.volume, array=self.labels.copy())
