"""The slices of a DICOM series, whether each is a file or a frame of one file: their order and their grid."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samlora.data.dicom_frames import Frame, read_detector, read_frames
from samlora.data.dicom_header import Header, check_directions, has_pydicom
from samlora.data.opening import reading
from samlora.errors import InputError

_SAME = 1e-3  # between the slices of one series: cosines, and spacings relative to each other
_SAME_PLACE = 1e-3  # mm along the normal
_APART = "make volumes of it with dcm2niix"


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """One slice. name: of its file, or the number of its frame, for messages. frame: its index in the file.

    position, orientation, spacing: as of `Header`. rescale_differs: whether the frames of its file differ in slope
    or intercept.
    """

    header: Header
    name: str
    frame: int
    position: np.ndarray | None
    orientation: np.ndarray | None
    spacing: tuple[float, float] | None
    rescale_differs: bool = False

    @property
    def placed(self) -> bool:
        """Whether its place is known."""
        return self.position is not None and self.orientation is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """The slices of a series in the order of their places, and their grid.

    affine: (4, 4), voxel (column, row, slice) -> LPS mm. has_spacing: whether the files tell
    millimetres in all three directions, or in two for a slice without a place. has_thickness:
    whether in the third. placed: whether they tell where the slices lie. framed: whether the
    slices are frames of a file.
    """

    planes: list[Plane]
    affine: np.ndarray
    has_spacing: bool
    placed: bool
    framed: bool
    has_thickness: bool = True


def stack(headers: Sequence[Header], path: Path) -> Stack:
    """The slices of the files `headers`, which belong to one series.

    Raises:
        InputError: slices at the same place, of different spacing or direction, in uneven steps, or that shift
            sideways; frames that lack a place others have, or are not in the order of their places.
    """
    framed = any(header.size[2] > 1 for header in headers)
    planes = [plane for header in headers for plane in _planes(header)]
    if not all(plane.placed for plane in planes):
        return _without_places(planes, headers[0], framed)
    if framed:
        planes = _in_order(planes, path)
    affine, steps_known = _grid(planes, path, framed)
    has_spacing = planes[0].spacing is not None and steps_known
    return Stack(planes, affine, has_spacing, True, framed)


def difference(one, other) -> str:
    """Why two slices, `Header` or `Plane`, cannot belong to one volume; "" if they can."""
    first, second = (getattr(slice_, "name", None) or slice_.path.name for slice_ in (one, other))
    for name, a, b in (
        ("pixel spacing", one.spacing, other.spacing),
        ("orientation", one.orientation, other.orientation),
    ):
        if (a is None) != (b is None) or (a is not None and not np.allclose(a, b, rtol=_SAME, atol=_SAME)):
            a, b = ("unknown" if v is None else " ".join(f"{n:g}" for n in v) for v in (a, b))
            return f"{name} {b} in {second}, not {a} as in {first}"
    return ""


def _planes(header: Header) -> list[Plane]:
    """The slices of one file, in the order of its frames."""
    count = header.size[2]
    if count == 1:
        return [Plane(header, header.path.name, 0, header.position, header.orientation, header.spacing)]
    frames = _frames(header)
    places = [(frame.position, frame.orientation) for frame in frames]
    placed = [position is not None and orientation is not None for position, orientation in places]
    if not all(placed) and (any(placed) or header.enhanced):
        number = placed.index(False) + 1
        raise InputError(f"{header.path}: frame {number} of {len(frames)} has no place; {_APART}")
    if not placed or not placed[0]:
        places = _stated_once(header)
    differ = len({frame.rescale for frame in frames}) > 1
    planes = []
    for n, (position, orientation) in enumerate(places):
        name = f"frame {n + 1}"
        if orientation is not None:
            check_directions(orientation, f"{header.path}: {name}")
        spacing = (frames[n].spacing if frames else None) or header.spacing
        planes.append(Plane(header, name, n, position, orientation, spacing, differ))
    return planes


def _frames(header: Header) -> list[Frame]:
    """The functional groups of a file of several frames; empty where it has none."""
    if not has_pydicom():
        if header.enhanced:
            advice = "pip install 'samlora[dicom]' to read them"
            raise InputError(f"{header.path}: its frames have places of their own; {advice}")
        return []
    try:
        with reading(header.path, "DICOM"):
            frames = read_frames(header.path)
    except InputError:
        raise InputError(f"{header.path}: the description of its frames cannot be read; {_APART}") from None
    if frames is None and header.enhanced:
        raise InputError(f"{header.path}: an enhanced file that does not describe its frames; {_APART}")
    return frames or []


def _stated_once(header: Header) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """Place and directions of frames for which the file states one place and their distances; else None."""
    position, orientation = header.position, header.orientation
    if header.offsets is not None and position is None and has_pydicom():
        with reading(header.path, "DICOM"):
            position, orientation = read_detector(header.path) or (None, None)
    if header.offsets is None or position is None:
        return [(None, None)] * header.size[2]
    normal = np.cross(orientation[:3], orientation[3:])
    return [(position + offset * normal, orientation) for offset in header.offsets]


def _in_order(planes: Sequence[Plane], path: Path) -> list[Plane]:
    """Frames sorted by their places. Raises InputError unless they lie in the file upwards or downwards."""
    first = planes[0]
    several = len({id(plane.header) for plane in planes}) > 1
    if several:
        planes = [dataclasses.replace(plane, name=f"{plane.header.path.name}, {plane.name}") for plane in planes]
    for plane in planes:
        if why := difference(first, plane):
            raise InputError(f"{path}: its frames do not belong to one volume: {why}; {_APART}")
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    heights = np.array([plane.position @ normal for plane in planes])
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights)
    sorted_steps = np.diff(heights[order])
    if not several and sorted_steps.size and sorted_steps.min() >= _SAME_PLACE:
        if not (np.all(steps > 0) or np.all(steps < 0)):
            turn = int(np.flatnonzero(np.sign(steps) != np.sign(steps[0]))[0]) + 1
            where = f"frame {turn + 1} does not follow frame {turn}"
            raise InputError(f"{path}: its frames do not follow each other in even steps: {where}; {_APART}")
    return [planes[n] for n in order]


def _without_places(planes: list[Plane], first: Header, framed: bool) -> Stack:
    """Slices that do not say where they lie: X-rays, photographs, frames of a film.

    One slice keeps its pixel spacing; projections have no thickness, whatever a header says.
    Of several frames the distance must be known too, else no direction is in mm: the third one
    may be time.
    """
    if first.enhanced and not framed:  # without pydicom: as GDCM understands it
        return Stack(planes, first.affine, True, True, False)
    width, height = planes[0].spacing or (1.0, 1.0)
    step = 1.0
    known = planes[0].spacing is not None
    if framed:
        along = first.offsets
        known = known and along is not None and _even(along)
        if known:
            step = abs(float(np.diff(along).mean()))
            planes = planes if along[1] > along[0] else planes[::-1]
        else:
            width, height = 1.0, 1.0
    return Stack(planes, np.diag([width, height, step, 1.0]), known, False, framed, framed)


def _even(along: np.ndarray) -> bool:
    steps = np.diff(along)
    return bool(abs(steps.mean()) > _SAME_PLACE and np.abs(steps - steps.mean()).max() <= 0.01 * abs(steps.mean()))


def _grid(planes: Sequence[Plane], path: Path, framed: bool) -> tuple[np.ndarray, bool]:
    """The affine of slices with places, in their order, and whether their distance or thickness is known."""
    first = planes[0]
    across, down = (v / np.linalg.norm(v) for v in (first.orientation[:3], first.orientation[3:]))
    normal = np.cross(across, down)
    places = np.array([plane.position for plane in planes])
    along = np.diff(places @ normal)
    thickness = first.header.thickness
    step = float(np.median(along)) if along.size else thickness or 1.0
    if along.size:
        _check_steps(planes, places, along, step, path, framed)
        drift = places - places[0] - np.outer((places - places[0]) @ normal, normal)
        worst = int(np.linalg.norm(drift, axis=1).argmax())
        sideways = np.linalg.norm(drift[worst])
        # Half a pixel, or what directions rounded to three digits amount to.
        if sideways > max(0.5 * min(first.spacing or (1.0, 1.0)), 0.002 * abs(along.sum())):
            degrees = np.degrees(np.arctan2(sideways, (places[worst] - places[0]) @ normal))
            slices = "frames" if framed else "slices"
            raise InputError(
                f"{path}: its {slices} shift sideways, {sideways:.3g} mm from {first.name} to "
                f"{planes[worst].name} (a gantry tilted by {degrees:.3g} degrees?); straighten it with dcm2niix"
            )
        step = float(along.mean())
    width, height = first.spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([across * width, down * height, normal * step])
    affine[:3, 3] = places[0]
    return affine, bool(along.size) or thickness is not None


def _check_steps(
    planes: Sequence[Plane], places: np.ndarray, along: np.ndarray, step: float, path: Path, framed: bool
) -> None:
    begin = f"{path}: its frames do not follow each other in even steps: " if framed else f"{path}: "
    same = np.flatnonzero(along < _SAME_PLACE)
    if same.size:
        one, other = (planes[same[0] + n].name for n in (0, 1))
        if framed and one.startswith("frame "):
            both = f"frames {one[6:]} and {other[6:]}"
        else:
            both = f"{one} and {other}"
        place = " ".join(f"{v:g}" for v in places[same[0]])
        advice = "keep the files of one phase or echo in a folder"
        if framed:
            advice = "make a volume of each phase or echo with dcm2niix"
        raise InputError(f"{begin}{both} lie at the same place ({place} mm); {advice}")
    # Spread evenly without a word, every organ above a gap would be misplaced.
    if np.abs(along - step).max() > 0.01 * step + 1e-3:
        worst = int(np.abs(along - step).argmax())
        advice = f"a slice is missing or doubled; {_APART}" if framed else "a slice is missing or doubled"
        raise InputError(
            f"{begin}{along[worst]:g} mm between {planes[worst].name} and the next slice, but "
            f"{step:g} mm elsewhere; {advice}"
        )
