"""DICOM segmentations: label maps written over their source series, and read back. Needs highdicom."""

import hashlib
import importlib.metadata
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samlora.colours import class_colour, lab
from samlora.data.dicom import choose, grid
from samlora.data.dicom_header import Header
from samlora.data.grid import Volume, integers, match_grid
from samlora.data.opening import reading, writing
from samlora.errors import InputError

KINDS = ("BINARY", "FRACTIONAL", "LABELMAP")
WAYS = ("AUTOMATIC", "SEMIAUTOMATIC", "MANUAL")
_UTF8 = "ISO_IR 192"  # the character set with the letters of every name: that of the source may lack some
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
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
    Raises InputError: highdicom is missing, labels on another grid or above n, a source it cannot describe.
    """
    highdicom = _highdicom(path)
    version = (version or importlib.metadata.version("samlora"))[:64]
    source, names = Path(source), list(class_names)
    if kind not in KINDS:
        raise InputError(f"{path}: segmentation kind {kind!r}; allowed is {', '.join(KINDS)}")
    if algorithm_type not in WAYS:
        raise InputError(f"{path}: algorithm_type {algorithm_type!r}; allowed is {', '.join(WAYS)}")
    headers = choose(source, series)
    shape = (*headers[0].size[:2], headers[0].size[2] * len(headers))
    affine = grid(headers, source)
    target = Volume(np.broadcast_to(np.uint8(0), shape), _LPS_TO_RAS @ affine, path=str(source))
    array = integers(match_grid(labels, to=target).array, path)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > len(names) or not names:
        raise InputError(f"{path}: labels {low}..{high}, but {len(names)} class names; one name per label is needed")
    with reading(source, "source of a segmentation"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values of the source that break the standard
        images = _images(headers, affine)
        segmentation = highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=np.ascontiguousarray(array.transpose(2, 1, 0)),
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
        for _ in segmentation.iterall():  # what was copied unread would be written as it is, in the source's letters
            pass
    with writing(path) as temporary:
        segmentation.save_as(temporary)


def read_dicom_seg(path: Path) -> Volume:
    """Reads a DICOM segmentation as a label map (columns, rows, slices): the numbers of the segments, 0 elsewhere.

    The grid comes from the places of the frames; slices without a frame, between others, are empty.
    Raises InputError: highdicom is missing, segments overlap, frames without places or in uneven steps, or fractions.
    """
    highdicom = _highdicom(path)
    with reading(path, "DICOM segmentation"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = highdicom.seg.segread(path).get_volume(combine_segments=True)
    array = volume.array.transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = volume.affine[:3, 2::-1]
    affine[:3, 3] = volume.affine[:3, 3]
    if np.linalg.det(affine) < 0:  # the order of slices in which a series is read
        array = array[:, :, ::-1]
        affine[:3, 3] += affine[:3, 2] * (array.shape[2] - 1)
        affine[:3, 2] *= -1
    return Volume(array, _LPS_TO_RAS @ affine, 1, 1, None, str(path))


def _highdicom(path: str | os.PathLike):
    try:
        import highdicom
        import highdicom.seg
    except ImportError:
        advice = "pip install 'samlora[dicom]', or choose --format nii.gz"
        raise InputError(f"{path}: DICOM segmentations need highdicom; {advice}") from None
    return highdicom


def _images(headers: Sequence[Header], affine: np.ndarray) -> list:
    """The headers of the source in slice order, as pydicom reads them, with what they lack filled in."""
    import pydicom
    from pydicom import uid
    from pydicom.valuerep import DS

    images = [pydicom.dcmread(header.path, stop_before_pixels=True, force=True) for header in headers]
    needed = {"StudyInstanceUID", "SeriesInstanceUID"}
    if headers[0].position is not None or headers[0].enhanced:
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
    columns, rows, step = (DS(float(size), auto_format=True) for size in np.linalg.norm(affine[:3, :3], axis=0))
    for image, header in zip(images, headers):
        if header.position is not None:  # the distance of slices is that of their places
            image.SpacingBetweenSlices = step
            image.SliceThickness = image.get("SliceThickness") or step
            image.PixelSpacing = image.get("PixelSpacing") or [rows, columns]
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
