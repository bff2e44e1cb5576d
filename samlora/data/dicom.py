"""DICOM files as volumes: which series a folder holds, in what order its slices lie, and their values.

Headers and pixels are read by SimpleITK (GDCM), which also undoes MONOCHROME1 (bright = low), palettes and YBR
colours, and applies slope and intercept. Order, places and series are found here, from every slice's own header.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samlora.data.dicom_header import SEGMENTATIONS, Header, check_frames, quiet, read_header, read_pixels, storage
from samlora.data.grid import Volume
from samlora.errors import InputError, MissingFileError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SAME = 1e-3  # between the headers of slices of one series: cosines, and spacings relative to each other


@dataclasses.dataclass(frozen=True)
class Series:
    """A DICOM series: its files in the order of their slices, size (columns, rows, slices).

    uid: SeriesInstanceUID, "" in many anonymised files. differs: why these files are not part of the series before
    that has the same UID, or no UID either; mostly "".
    """

    uid: str
    description: str
    modality: str
    files: tuple[Path, ...]
    size: tuple[int, int, int]
    differs: str = ""

    def __str__(self) -> str:
        columns, rows, slices = self.size
        named = f"{self.uid or '(no UID)'}{f' {self.description!r}' if self.description else ''}"
        size = f"{self.modality or 'no modality'}, {slices} slice{'s' * (slices != 1)} of {columns} x {rows}"
        return f"{named}, {size}" + (f" ({self.differs})" if self.differs else "")


def list_series(folder: str | os.PathLike) -> list[Series]:
    """The series of images in `folder` (not in its subfolders), in the order of their numbers.

    Files that are not DICOM, DICOMDIR, reports, plans and segmentations are not listed. Raises MissingFileError, or
    InputError if a file is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder; give the folder that holds the slices")
    return [series for series, _ in _found(folder)]


def segmentation_file(path: Path) -> Path | None:
    """`path` if it is a DICOM segmentation, or the one that lies in the folder `path`; None if there is none.

    Raises InputError if there are several.
    """
    files = [file for file in _files(path) if storage(file) in SEGMENTATIONS]
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
        raise InputError(f"{path}: {len(files)} DICOM segmentations in it ({names}); give one of the files")
    return files[0] if files else None


def read_dicom(path: Path, series: str | int | None) -> Volume:
    """Reads a DICOM file, or one series of a folder: (columns, rows, slices), or (..., 3) for colours.

    Slices lie where ImagePositionPatient says, in the order of their places along the normal of the slices; one slice
    alone is as thick as its header says. Files without PixelSpacing have has_spacing False.
    Raises InputError naming the file: broken, a gap or two slices at one place, uneven frames in one file, slices
    that shift sideways (a tilted gantry: no grid with right angles holds them).
    """
    headers = choose(path, series)
    affine = grid(headers, path)
    with quiet():
        arrays = [read_pixels(header.path) for header in headers]
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise InputError(f"{path}: gray and coloured slices in one series ({sorted(shapes)}); separate them")
    array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    array = array.transpose((2, 1, 0, *range(3, array.ndim)))
    return Volume(array, _LPS_TO_RAS @ affine, 1, 1, None, str(path), has_spacing=headers[0].has_spacing)


def choose(path: Path, series: str | int | None) -> list[Header]:
    """The headers of the file `path`, or of the one series of a folder that `series` names, in slice order.

    Raises InputError: no image, several series and none chosen, a name that fits none or several.
    """
    found = _found(path)
    if not found:
        if path.is_dir():
            raise InputError(f"{path}: no DICOM series in this folder; give the folder that holds the slices")
        raise InputError(f"{path}: no DICOM image in this file; give a file or folder of slices")
    every = "; ".join(f"{number} = {entry}" for number, (entry, _) in enumerate(found, start=1))
    if series is None or not path.is_dir():
        if len(found) > 1:
            raise InputError(f"{path}: {len(found)} DICOM series: {every}; choose one with --series NUMBER or UID")
        return found[0][1]
    wanted = str(series).strip()
    if wanted.isdigit() and 1 <= int(wanted) <= len(found):
        return found[int(wanted) - 1][1]
    text = wanted.lower()
    fits = [headers for entry, headers in found if text and text in (entry.uid, entry.description.lower())]
    if not fits and text:
        fits = [headers for entry, headers in found if text in entry.uid or text in entry.description.lower()]
    if len(fits) != 1:
        raise InputError(
            f"{path}: --series {series!r} fits {len(fits) or 'none'} of its series: {every}; give a number"
        )
    return fits[0]


def grid(headers: Sequence[Header], path: Path) -> np.ndarray:
    """The affine (4, 4), voxel (column, row, slice) -> LPS mm, of a series in slice order.

    Raises InputError, as `read_dicom` does, if its slices lie on no even grid with right angles.
    """
    first = headers[0]
    if len(headers) == 1 and (first.size[2] > 1 or first.position is None):
        if first.enhanced and first.size[2] > 1:
            check_frames(first)
        affine = first.affine.copy()
        if first.spacing is not None:  # for X-rays GDCM looks at the detector, not at the calibrated PixelSpacing
            affine[:3, :2] *= np.array(first.spacing) / np.linalg.norm(affine[:3, :2], axis=0)
        return affine
    across, down = (v / np.linalg.norm(v) for v in (first.orientation[:3], first.orientation[3:]))
    normal = np.cross(across, down)
    places = np.array([header.position for header in headers])
    along = np.diff(places @ normal)
    step = float(np.median(along)) if along.size else first.thickness or 1.0
    if along.size:
        _check_steps(headers, places, along, step, path)
        drift = places - places[0] - np.outer((places - places[0]) @ normal, normal)
        worst = int(np.linalg.norm(drift, axis=1).argmax())
        sideways = np.linalg.norm(drift[worst])
        # Half a pixel, or what directions rounded to three digits amount to.
        if sideways > max(0.5 * min(first.spacing or (1.0, 1.0)), 0.002 * abs(along.sum())):
            degrees = np.degrees(np.arctan2(sideways, (places[worst] - places[0]) @ normal))
            raise InputError(
                f"{path}: its slices shift sideways, {sideways:.3g} mm from {first.path.name} to "
                f"{headers[worst].path.name} (a gantry tilted by {degrees:.3g} degrees?); straighten it with dcm2niix"
            )
        step = float(along.mean())
    width, height = first.spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([across * width, down * height, normal * step])
    affine[:3, 3] = places[0]
    return affine


def _check_steps(headers: Sequence[Header], places: np.ndarray, along: np.ndarray, step: float, path: Path) -> None:
    same = np.flatnonzero(along < 1e-3)
    if same.size:
        one, other = (headers[same[0] + n].path.name for n in (0, 1))
        place = " ".join(f"{v:g}" for v in places[same[0]])
        advice = "keep the files of one phase or echo in a folder"
        raise InputError(f"{path}: {one} and {other} lie at the same place ({place} mm); {advice}")
    # Spread evenly without a word, every organ above a gap would be misplaced.
    if np.abs(along - step).max() > 0.01 * step + 1e-3:
        worst = int(np.abs(along - step).argmax())
        raise InputError(
            f"{path}: {along[worst]:g} mm between {headers[worst].path.name} and the next slice, but "
            f"{step:g} mm elsewhere; a slice is missing or doubled"
        )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))


def _found(path: Path) -> list[tuple[Series, list[Header]]]:
    """The series in a folder or file, and their headers in slice order."""
    groups: dict[tuple, list[list[Header]]] = {}
    with quiet():
        for header in filter(None, map(read_header, _files(path))):
            alike = groups.setdefault(header.key, [])
            fitting = next((group for group in alike if not _difference(group[0], header)), None)
            if fitting is None:
                alike.append(fitting := [])
            fitting.append(header)
    found = []
    for alike in groups.values():
        for headers in alike:
            first = headers[0]
            differs = "" if headers is alike[0] else _difference(alike[0][0], first)
            if all(h.position is not None for h in headers):
                normal = np.cross(first.orientation[:3], first.orientation[3:])
                headers.sort(key=lambda header: float(header.position @ normal))
            files = tuple(header.path for header in headers)
            size = (*first.size[:2], first.size[2] * len(headers))
            found.append((Series(first.uid, first.description, first.modality, files, size, differs), headers))
    return sorted(found, key=lambda f: (f[1][0].number, f[0].uid, bool(f[0].differs), min(f[0].files)))


def _difference(one: Header, other: Header) -> str:
    """Why the two cannot be slices of one volume; "" if they can."""
    if one.size[:2] != other.size[:2]:
        a, b = ("{} x {}".format(*header.size) for header in (one, other))
        return f"size {b} in {other.path.name}, not {a} as in {one.path.name}"
    if one.size[2] > 1 or other.size[2] > 1:
        return f"{other.size[2]} frames in {other.path.name}"
    if one.position is None or other.position is None:
        return f"no place in {(other if other.position is None else one).path.name}"
    for name, a, b in (
        ("pixel spacing", one.spacing, other.spacing),
        ("orientation", one.orientation, other.orientation),
    ):
        if (a is None) != (b is None) or (a is not None and not np.allclose(a, b, rtol=_SAME, atol=_SAME)):
            a, b = ("unknown" if v is None else " ".join(f"{n:g}" for n in v) for v in (a, b))
            return f"{name} {b} in {other.path.name}, not {a} as in {one.path.name}"
    return ""
