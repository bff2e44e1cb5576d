"""DICOM files as volumes: which series a folder holds, in what order its slices lie, and their values.

Headers and pixels are read by SimpleITK (GDCM), which also undoes MONOCHROME1 (bright = low), palettes and YBR
colours, and applies slope and intercept. Order and places are those of every slice's own header, or of every frame's
own description where a file holds several (`dicom_planes`); values are checked by a second decoder (`dicom_pixels`).
"""

import collections
import dataclasses
import os
from pathlib import Path

import numpy as np

from samlora.data.dicom_header import DOSE, SEGMENTATIONS, Header, kind_of, quiet, read_header, storage
from samlora.data.dicom_pixels import read_planes
from samlora.data.dicom_planes import difference, stack
from samlora.data.grid import Volume
from samlora.errors import InputError, MissingFileError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


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
    alone is as thick as its header says. has_spacing is False for files without PixelSpacing, for one slice without a
    thickness, and for frames of which no distance is stated (films); has_thickness for one slice without a place.
    Raises InputError naming the file: broken, a gap or two slices at one place, slices that shift sideways (a tilted
    gantry: no grid with right angles holds them); the same of frames of one file.
    """
    headers = choose(path, series)
    with quiet():
        slices = stack(headers, path)
        array = read_planes(slices.planes, path)
    array = array.transpose((2, 1, 0, *range(3, array.ndim)))
    known = {"has_spacing": slices.has_spacing, "has_thickness": slices.has_thickness}
    return Volume(array, _LPS_TO_RAS @ slices.affine, 1, 1, None, str(path), **known)


def choose(path: Path, series: str | int | None) -> list[Header]:
    """The headers of the file `path`, or of the one series of a folder that `series` names, in slice order.

    Raises InputError: no image, several series and none chosen, a name that fits none or several.
    """
    found = _found(path)
    if not found:
        others = collections.Counter(filter(None, map(kind_of, _files(path))))
        listed = ", ".join(f"{count} x {kind}" if path.is_dir() else kind for kind, count in others.items())
        holds = f" (it holds {listed})" if listed else ""
        if path.is_dir():
            raise InputError(f"{path}: no DICOM series in this folder{holds}; give the folder that holds the slices")
        raise InputError(f"{path}: no DICOM image in this file{holds}; give a file or folder of slices")
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
    if len(groups) > 1:  # a dose beside its scan is nothing to choose
        groups = {key: alike for key, alike in groups.items() if alike[0][0].kind != DOSE} or groups
    found = []
    for alike in groups.values():
        for headers in alike:
            first = headers[0]
            differs = "" if headers is alike[0] else _difference(alike[0][0], first)
            if all(header.placed for header in headers):
                normal = np.cross(first.orientation[:3], first.orientation[3:])
                headers.sort(key=lambda header: float(header.position @ normal))
            else:
                headers.sort(key=lambda header: header.part)
            files = tuple(header.path for header in headers)
            size = (*first.size[:2], sum(header.size[2] for header in headers))
            found.append((Series(first.uid, first.description, first.modality, files, size, differs), headers))
    return sorted(found, key=lambda f: (f[1][0].number, f[0].uid, bool(f[0].differs), min(f[0].files)))


def _difference(one: Header, other: Header) -> str:
    """Why the two cannot be slices of one volume; "" if they can."""
    if one.size[:2] != other.size[:2]:
        a, b = ("{} x {}".format(*header.size) for header in (one, other))
        return f"size {b} in {other.path.name}, not {a} as in {one.path.name}"
    if one.concatenation and one.concatenation == other.concatenation:  # parts of one file of frames
        return ""
    if one.size[2] > 1 or other.size[2] > 1:
        return f"{other.size[2]} frames in {other.path.name}"
    if not one.placed or not other.placed:
        return f"no place in {(one if other.placed else other).path.name}"
    return difference(one, other)
