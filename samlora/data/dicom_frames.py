"""What the frames of one DICOM file say of themselves: place, directions, spacing and scale of each.

Enhanced files keep these in sequences, which SimpleITK does not show; pydicom reads them. Files of older classes
with several frames state one place and a distance for all frames, see `offsets`.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_SLICE_VECTOR = "0054,0080"  # nuclear medicine: the number of the slice that each frame shows
_OTHER_VECTORS = ("0018|1063", "0018|1065")  # FrameTime, FrameTimeVector: the frames follow each other in time
# Functional groups: sequence -> element -> what it is called here, and how many numbers it has. A volume of ultrasound
# lies in a frame of its own (PlanePositionVolumeSequence), which is used where there is no place in the patient.
_ELEMENTS = {
    "PlanePositionSequence": {"ImagePositionPatient": ("position", 3)},
    "PlaneOrientationSequence": {"ImageOrientationPatient": ("orientation", 6)},
    "PlanePositionVolumeSequence": {"ImagePositionVolume": ("position", 3)},
    "PlaneOrientationVolumeSequence": {"ImageOrientationVolume": ("orientation", 6)},
    "PixelMeasuresSequence": {
        "PixelSpacing": ("spacing", 2),
        "SliceThickness": ("thickness", 1),
        "SpacingBetweenSlices": ("between", 1),
    },
    "PixelValueTransformationSequence": {"RescaleSlope": ("slope", 1), "RescaleIntercept": ("intercept", 1)},
    "SegmentIdentificationSequence": {"ReferencedSegmentNumber": ("segment", 1)},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """One frame as its file describes it; None for what the file does not say.

    Attributes:
        position: place of the centre of its first voxel (3), LPS mm.
        orientation: directions (6) in which the columns and the rows are counted, LPS.
        spacing: mm along columns, rows.
        thickness: SliceThickness, mm.
        between: SpacingBetweenSlices, mm.
        rescale: slope and intercept that give the unit of the values.
        segment: the number of the segment that it shows (segmentations).
        sources: UIDs of instances and numbers of frames that it was made from (segmentations).
    """

    position: np.ndarray | None
    orientation: np.ndarray | None
    spacing: tuple[float, float] | None
    thickness: float | None
    between: float | None
    rescale: tuple[float, float] | None
    segment: int | None = None
    sources: tuple[tuple[str, int], ...] = ()


def frames_of(data) -> list[Frame] | None:
    """The frames that the functional groups of a file describe; None for a file without functional groups.

    Args:
        data: the file as `pydicom.dcmread` returns it.

    Raises:
        ValueError: there are less groups than frames, or a value is no number.
    """
    per_frame = data.get("PerFrameFunctionalGroupsSequence") or []
    shared = data.get("SharedFunctionalGroupsSequence") or []
    if not per_frame and not shared:
        return None
    count = int(data.get("NumberOfFrames") or 1)
    if per_frame and len(per_frame) < count:
        raise ValueError(f"{len(per_frame)} functional groups for {count} frames")
    common = _values(shared[0]) if shared else {}
    return [_frame(per_frame[n] if per_frame else {}, common) for n in range(count)]


def _frame(groups, common: Mapping[str, np.ndarray]) -> Frame:
    """The frame that these groups describe, and what is common to all frames where they say nothing."""
    values = {**common, **_values(groups)}
    spacing, thickness, between = (values.get(name) for name in ("spacing", "thickness", "between"))
    slope, intercept, segment = (values.get(name) for name in ("slope", "intercept", "segment"))
    rescale = None
    if slope is not None and intercept is not None:
        rescale = float(slope[0]), float(intercept[0])
    return Frame(
        values.get("position"),
        values.get("orientation"),
        None if spacing is None else (float(spacing[1]), float(spacing[0])),
        None if thickness is None or thickness[0] <= 0 else float(thickness[0]),
        None if between is None or between[0] == 0 else abs(float(between[0])),
        rescale,
        None if segment is None else int(segment[0]),
        _sources(groups),
    )


def _values(groups) -> dict[str, np.ndarray]:
    """The numbers in the functional groups of one frame, or in those of all."""
    found: dict[str, np.ndarray] = {}
    for sequence, elements in _ELEMENTS.items():
        items = groups.get(sequence)
        if not items:
            continue
        for element, (name, count) in elements.items():
            value = items[0].get(element)
            if value is None or value == "" or name in found:
                continue
            numbers = np.atleast_1d(np.array(value, np.float64))
            if len(numbers) < count or not np.isfinite(numbers).all():
                raise ValueError(f"{element} {value}: {count} numbers are needed")
            found[name] = numbers[:count]
    return found


def _sources(groups) -> tuple[tuple[str, int], ...]:
    found = []
    for derivation in groups.get("DerivationImageSequence") or []:
        for source in derivation.get("SourceImageSequence") or []:
            numbers = source.get("ReferencedFrameNumber") or 1
            first = numbers if isinstance(numbers, int) else numbers[0]
            found.append((str(source.get("ReferencedSOPInstanceUID") or ""), int(first)))
    return tuple(found)


def offsets(tags: Mapping[str, str], count: int) -> np.ndarray | None:
    """Where the frames of a file without functional groups lie along the normal of the first, mm from it.

    GridFrameOffsetVector (dose) says it for each frame; SpacingBetweenSlices for frames that are slices. None where
    the file says neither, or says that its frames follow each other in time.

    Args:
        tags: texts of the file's elements by "gggg|eeee".
        count: number of frames.

    Raises:
        ValueError: one of them is no list of numbers.
    """
    vector = _numbers(tags["3004|000c"])
    if len(vector) == count:
        return vector - vector[0]
    step = _numbers(tags["0018|0088"])
    if not step.size or not step[0] or any(tags[key] for key in _OTHER_VECTORS):
        return None
    slices = np.arange(count)
    pointers = tags["0028|0009"].lower()
    if _SLICE_VECTOR in pointers:
        numbers = _numbers(tags["0054|0080"])
        if len(numbers) != count:
            return None
        slices = numbers - numbers[0]
    elif "(0054," in pointers or "(0018,106" in pointers:
        return None
    return slices * step[0]


def _numbers(text: str) -> np.ndarray:
    if not text:
        return np.zeros(0)
    numbers = np.array(text.split("\\"), np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{text}: numbers are needed")
    return numbers


def read_frames(path: Path) -> list[Frame] | None:
    """`frames_of` the file at `path`. Raises ImportError without pydicom, and what pydicom raises."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values that break the standard
        data = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        return frames_of(data)


def read_detector(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Place and directions of the first slice of nuclear medicine, which stand with its detector; None without them.

    Raises ImportError without pydicom, and what pydicom raises.
    """
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values that break the standard
        data = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        detectors = data.get("DetectorInformationSequence") or []
        if not detectors:
            return None
        position = np.array(detectors[0].get("ImagePositionPatient") or [], np.float64)
        orientation = np.array(detectors[0].get("ImageOrientationPatient") or [], np.float64)
    return (position, orientation) if len(position) == 3 and len(orientation) == 6 else None
