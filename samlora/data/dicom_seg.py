"""DICOM segmentations: label maps written over their source series by highdicom, and read back by pydicom."""

import contextlib
import hashlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from samlora.colours import class_colour, lab
from samlora.data.dicom import choose
from samlora.data.dicom_frames import Frame, frames_of
from samlora.data.dicom_header import Header
from samlora.data.dicom_planes import Plane, Stack, difference, stack
from samlora.data.grid import Volume, integers, match_grid
from samlora.data.opening import reading, writing
from samlora.errors import InputError, NoSegmentationError

KINDS = ("BINARY", "FRACTIONAL", "LABELMAP")
WAYS = ("AUTOMATIC", "SEMIAUTOMATIC", "MANUAL")
_UTF8 = "ISO_IR 192"  # the character set with the letters of every name: that of the source may lack some
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_BROKEN = "cannot be read as DICOM segmentation (cut short, damaged or of an unknown compression); export it again"
_CLASSES = {"CT": "CTImageStorage", "MR": "MRImageStorage", "PT": "PositronEmissionTomographyImageStorage"}


def write_dicom_seg(
    labels: Volume,
    source: str | os.PathLike,
    path: str | os.PathLike,
    class_names: Sequence[str],
    *,
    series: str | int | None = None,
    kind: str = "BINARY",
    algorithm: str = "samlora",
    version: str | None = None,
    algorithm_type: str = "AUTOMATIC",
) -> None:
    """Writes labels 0..n as a DICOM segmentation of the series they belong to, whole or not at all.

    source: the DICOM file or folder that was read (with `series`). labels: on its grid; axes may run otherwise.
    class_names: of labels 1..n; each becomes a segment of that number, also where it has no voxel, so an empty label
    map gives a valid file. Every slice has a frame per segment (LABELMAP: one frame), empty ones too, so that a reader
    without the series finds the whole grid. Segments are coded as SNOMED's "Anatomical structure", their label is the
    name, of which DICOM holds 64 characters, in any script. algorithm, version: what made the labels; samlora's own
    version by default. algorithm_type: "AUTOMATIC", "SEMIAUTOMATIC" where a person clicked or corrected, or "MANUAL";
    a segment drawn by hand names no algorithm.
    Study, series, frame of reference and instances of an anonymised series may have no UIDs, which a segmentation must
    refer to: they are made up, in the new file only, from the content of the source, so that two segmentations
    of the same series refer to the same UIDs.
    The file is read back before it takes its place: by highdicom, and by `read_dicom_seg`, which must find the labels
    that were given.
    Raises InputError: highdicom is missing, labels on another grid or above n; NoSegmentationError: a source that no
    segmentation can refer to, as the frames of a film.
    """
    highdicom = _highdicom(path)
    version = (version or importlib.metadata.version("samlora"))[:64]
    source, names = Path(source), list(class_names)
    if kind not in KINDS:
        raise InputError(f"{path}: segmentation kind {kind!r}; allowed is {', '.join(KINDS)}")
    if algorithm_type not in WAYS:
        raise InputError(f"{path}: algorithm_type {algorithm_type!r}; allowed is {', '.join(WAYS)}")
    headers = choose(source, series)
    slices = stack(headers, source)
    shape = (*headers[0].size[:2], len(slices.planes))
    empty = np.broadcast_to(np.uint8(0), shape)
    target = Volume(empty, _LPS_TO_RAS @ slices.affine, path=str(source), has_spacing=slices.has_spacing)
    array = integers(match_grid(labels, to=target).array, path)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > len(names) or not names:
        raise InputError(f"{path}: labels {low}..{high}, but {len(names)} class names; one name per label is needed")
    _check_source(slices, source)
    frames = array.transpose(2, 1, 0)
    if slices.framed:  # as they are counted in the source
        frames = frames[np.argsort([plane.frame for plane in slices.planes])]
    with _describing(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values of the source that break the standard
        images = _images(slices)
        segmentation = highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=np.ascontiguousarray(frames),
            segmentation_type=kind,
            segment_descriptions=[
                _segment(n, name, algorithm_type, algorithm, version) for n, name in enumerate(names, start=1)
            ],
            series_instance_uid=highdicom.UID(),
            series_number=headers[0].number + 1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="samlora",
            manufacturer_model_name=algorithm[:64],
            software_versions=version,
            device_serial_number="none",
            series_description=f"{algorithm} segmentation"[:64],
            content_label="SEGMENTATION",
            omit_empty_frames=False,
        )
        segmentation.SpecificCharacterSet = _UTF8
        # What was copied unread would be written as it is, in the source's letters; so all of it is looked at.
        for element in segmentation.iterall():
            if element.keyword == "ReferencedSOPClassUID" and not slices.framed:
                element.value = headers[0].kind or element.value
    with writing(path) as temporary:
        segmentation.save_as(temporary)
        with _describing(source), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            highdicom.seg.segread(temporary)
            read = read_dicom_seg(temporary)
            kept = match_grid(read, target, part=True) if slices.placed else read
            if not np.array_equal(kept.array, array):
                raise ValueError("the labels do not come back")


def read_dicom_seg(path: Path) -> Volume:
    """Reads a DICOM segmentation as a label map (columns, rows, slices): the numbers of the segments, 0 elsewhere.

    The grid comes from the places of the frames; slices without a frame are empty, those before the first and after
    the last are not part of the array (`sparse`). Without places (X-rays, photographs) the slices are the images that
    the frames were made from, and has_spacing is False.
    Raises InputError: highdicom is missing, segments overlap, frames in uneven steps, with fractions, or of which
    neither the place nor the source is known.
    """
    _highdicom(path)
    import pydicom

    try:
        with reading(path, "DICOM segmentation"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(path)
            frames = frames_of(data) or []
            names = _segment_names(data)
            size = int(data.Rows), int(data.Columns)
    except InputError:
        raise InputError(f"{path}: {_BROKEN}") from None
    if not frames or "TotalPixelMatrixRows" in data:
        what = "tiles of a slide" if frames else "no frames"
        raise InputError(f"{path}: a segmentation of {what}; export it as TIFF or NIfTI")
    placed = all(frame.position is not None and frame.orientation is not None for frame in frames)
    if placed:
        numbers, affine, known = _lattice(frames, path)
    else:
        numbers, affine, known = _sources(frames, path), np.eye(4), False
    array = _painted(data, frames, numbers, (max(numbers) + 1, *size), names, path)
    return Volume(
        array.transpose(2, 1, 0), _LPS_TO_RAS @ affine, 1, 1, None, str(path), has_spacing=known, sparse=placed
    )


def _segment_names(data: Mapping) -> dict[int, str]:
    """The names of the segments by their numbers, of what `pydicom.dcmread` made of a segmentation."""
    items = data.get("SegmentSequence") or []
    return {int(item.SegmentNumber): str(item.get("SegmentLabel") or "") for item in items if item.SegmentNumber}


def _lattice(frames: Sequence[Frame], path: Path) -> tuple[list[int], np.ndarray, bool]:
    """The slice that each frame shows, the affine of the slices (LPS mm), and whether their distance is known."""
    first = frames[0]
    planes = [
        Plane(None, f"frame {n}", n, frame.position, frame.orientation, frame.spacing)
        for n, frame in enumerate(frames, start=1)
    ]
    for plane in planes:
        if why := difference(planes[0], plane):
            raise InputError(f"{path}: its frames lie on no grid: {why}; export it as NIfTI")
    across, down = (v / np.linalg.norm(v) for v in (first.orientation[:3], first.orientation[3:]))
    normal = np.cross(across, down)
    places = np.array([frame.position for frame in frames])
    heights = places @ normal
    lowest = int(heights.argmin())
    above = heights - heights[lowest]
    drift = places - places[lowest] - np.outer(above, normal)
    width, height = first.spacing or (1.0, 1.0)
    if np.linalg.norm(drift, axis=1).max() > max(0.5 * min(width, height), 0.002 * above.max()):
        raise InputError(f"{path}: its frames shift sideways; export it as NIfTI")
    step, known = _step(above, first)
    if step is None:
        raise InputError(f"{path}: its frames lie in uneven steps; export it as NIfTI")
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([across * width, down * height, normal * step])
    affine[:3, 3] = places[lowest]
    return np.rint(above / step).astype(int).tolist(), affine, known and first.spacing is not None


def _step(above: np.ndarray, first: Frame) -> tuple[float | None, bool]:
    """The distance of slices, mm, of which all heights `above` are multiples, and whether it is known; None: none is.

    Empty frames may be left out, so that the least distance of two frames can be several times that of the slices.
    """
    gaps = np.diff(np.unique(np.round(above, 3)))
    gaps = gaps[gaps > 2e-3]
    stated = first.between or first.thickness
    if not gaps.size:
        return stated or 1.0, stated is not None
    parts = [float(gaps.min()) / n for n in range(1, 7)]
    for step in [first.between, *parts] if first.between else parts:
        numbers = np.rint(above / step)
        exact = float(above.max() / numbers.max()) if numbers.max() else step
        if np.abs(above - numbers * exact).max() <= 0.02 * exact + 1e-3:
            return exact, True
    return None, False


def _sources(frames: Sequence[Frame], path: Path) -> list[int]:
    """The slice that each frame shows, by the images that the frames were made from."""
    of = [frame.sources[0] if frame.sources else None for frame in frames]
    if None in of:
        segments = [frame.segment for frame in frames]
        if len(set(segments)) < len(segments):
            why = "its frames say neither where they lie nor what they show"
            raise InputError(f"{path}: {why}; export it as PNG or NIfTI")
        return [0] * len(frames)
    instances = list(dict.fromkeys(uid for uid, _ in of))
    if len(instances) == 1:
        return [number - 1 for _, number in of]
    listed = sorted(set(of), key=lambda one: (instances.index(one[0]), one[1]))
    return [listed.index(one) for one in of]


def _painted(
    data, frames: Sequence[Frame], numbers: Sequence[int], shape: tuple[int, int, int], names: Mapping, path: Path
) -> np.ndarray:
    """The labels (slices, rows, columns) of all frames. Raises InputError where segments overlap or are fractions."""
    from pydicom.pixels import iter_pixels

    labels = data.get("SegmentationType") == "LABELMAP"
    most = int(data.get("MaximumFractionalValue") or 1) if data.get("SegmentationType") == "FRACTIONAL" else 1
    highest = max([1, *names, *(frame.segment or 0 for frame in frames)])
    array = np.zeros(shape, np.uint8 if highest < 256 and not labels else np.uint16)
    try:
        decoded = iter_pixels(data)
        for pixels, frame, number in zip(decoded, frames, numbers):
            if labels:
                array[number] = pixels
                continue
            if not pixels.any():
                continue
            inside = pixels != 0
            if most > 1 and not np.isin(pixels[inside], most).all():
                raise InputError(f"{path}: its segments are fractions (probabilities); export it as BINARY")
            there = array[number][inside]
            other = there[(there != 0) & (there != frame.segment)]
            if other.size:
                both = " and ".join(repr(names.get(int(n), f"segment {n}")) for n in (other[0], frame.segment))
                advice = "a label map holds one label per voxel; export one file per segment"
                raise InputError(f"{path}: segments overlap ({both}); {advice}")
            array[number][inside] = frame.segment
    except InputError:
        raise
    except Exception:  # of the many that pydicom and its plug-ins raise
        raise InputError(f"{path}: {_BROKEN}") from None
    return array if array.max(initial=0) > 255 else array.astype(np.uint8)


def _check_source(slices: Stack, source: Path) -> None:
    """Raises InputError for a source of which no segmentation can be made."""
    why = ""
    if slices.framed and not slices.placed:
        why = "its frames have no place in space"
    elif len({plane.header.path for plane in slices.planes}) > 1 and slices.framed:
        why = "its frames are spread over several files"
    elif slices.framed and not slices.planes[0].header.enhanced:
        why = "it does not describe its frames"
    if why:
        raise NoSegmentationError(f"{source}: no DICOM segmentation can refer to it: {why}; choose --format nii.gz")


@contextlib.contextmanager
def _describing(source: Path) -> Iterator[None]:
    """Whatever highdicom raises about a source becomes one line; its own words are about its own calls."""
    try:
        yield
    except Exception as error:
        why = "its headers lack what a DICOM segmentation refers to"
        raise NoSegmentationError(f"{source}: {why}; choose --format nii.gz") from error


def _highdicom(path: str | os.PathLike):
    try:
        import highdicom
        import highdicom.seg
    except ImportError:
        advice = "pip install 'samlora[dicom]', or choose --format nii.gz"
        raise InputError(f"{path}: DICOM segmentations need highdicom; {advice}") from None
    return highdicom


def _images(slices: Stack) -> list:
    """The headers of the source in slice order, as pydicom reads them, with what they lack filled in."""
    import pydicom
    from pydicom import uid
    from pydicom.valuerep import DS

    headers = list({plane.header.path: plane.header for plane in slices.planes}.values())
    images = [pydicom.dcmread(header.path, stop_before_pixels=True, force=True) for header in headers]
    needed = {"StudyInstanceUID", "SeriesInstanceUID"}
    if slices.placed:
        needed.add("FrameOfReferenceUID")
    instances = {image.get("SOPInstanceUID") or "" for image in images}
    if len(instances) < len(images) or "" in instances or not all(i.get(key) for i in images for key in needed):
        digests = [_digest(header.path) for header in headers]
        made = {key: uid.generate_uid(entropy_srcs=[key, *sorted(digests)]) for key in sorted(needed)}
        for image, digest in zip(images, digests):
            for key, value in made.items():
                if not image.get(key):
                    setattr(image, key, value)
            if len(instances) < len(images) or "" in instances:
                image.SOPInstanceUID = uid.generate_uid(entropy_srcs=["SOPInstanceUID", digest])
    sizes = np.linalg.norm(slices.affine[:3, :3], axis=0)
    columns, rows, step = (DS(float(size), auto_format=True) for size in sizes)
    for image, header in zip(images, headers):
        if header.placed:  # the distance of slices is that of their places
            if header.enhanced:
                _flatten(image, header)
            image.SpacingBetweenSlices = step
            image.SliceThickness = image.get("SliceThickness") or step
            image.PixelSpacing = image.get("PixelSpacing") or [rows, columns]
        elif not slices.placed:  # a spacing without a place and a thickness makes the segmentation invalid
            image.pop("PixelSpacing", None)
            _as_single(image, "SecondaryCaptureImageStorage")
        if not image.get("SOPClassUID"):
            named = _CLASSES.get(header.modality, "SecondaryCaptureImageStorage")
            image.SOPClassUID = header.kind or getattr(uid, named)
        if "FrameOfReferenceUID" in image and "FrameOfReferenceUID" not in needed:
            del image.FrameOfReferenceUID  # it would promise places that this image has not
        image.Modality = header.modality or "OT"
        image.SpecificCharacterSet = _UTF8  # what is read is decoded as the file says; highdicom refuses some sets
        for key in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            image.setdefault(key, "")
        for key in ("StudyDate", "StudyTime"):
            image.setdefault(key, None)
    return images


def _flatten(image, header: Header) -> None:
    """Makes an enhanced file of one frame, as pydicom reads it, like a slice with its place in its own header."""
    from pydicom.valuerep import DS

    image.ImagePositionPatient = [DS(float(v), auto_format=True) for v in header.position]
    image.ImageOrientationPatient = [DS(float(v), auto_format=True) for v in header.orientation]
    if header.spacing is not None:
        image.PixelSpacing = [DS(v, auto_format=True) for v in header.spacing[::-1]]
    _as_single(image, _CLASSES.get(header.modality, "MRImageStorage"))


def _as_single(image, name: str) -> None:
    """Gives an image a class of one frame, for highdicom, which goes by the class; references are put right later."""
    from pydicom import uid

    image.SOPClassUID = getattr(uid, name)
    for key in ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        image.pop(key, None)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _segment(number: int, name: str, way: str, algorithm: str, version: str):
    import highdicom
    from pydicom.sr.codedict import codes

    made_by = None
    if way != "MANUAL":
        family = codes.cid7162.ArtificialIntelligence
        made_by = highdicom.AlgorithmIdentificationSequence(algorithm[:64], family, version)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name.replace("\\", "/")[:64],  # a backslash would part it into two values
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.AnatomicalStructure,
        algorithm_type=way,
        algorithm_identification=made_by,
        display_color=highdicom.color.CIELabColor(*lab(class_colour(number)).tolist()),
    )
