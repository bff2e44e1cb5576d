"""The values of DICOM slices: decoded by GDCM, checked by pydicom where both decode them alike."""

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samlora.data.dicom_frames import frames_of
from samlora.data.dicom_header import ADVICE, BROKEN, Header, has_pydicom, open_reader
from samlora.data.dicom_planes import Plane
from samlora.errors import InputError

_BIG_ENDIAN, _RLE = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"
# Transfer syntaxes without loss that pydicom decodes without a further library.
_EXACT = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", _BIG_ENDIAN, _RLE)
_COMPARED = ("MONOCHROME1", "MONOCHROME2", "RGB")
# Those that pydicom decodes with a further library, where one is installed: lossless JPEG, JPEG-LS
# and JPEG 2000, near-lossless JPEG-LS.
_PLUGGED = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (57, 70, 80, 81, 90))
_LOSSY_JPEG2000 = "1.2.840.10008.1.2.4.91"  # decoders round differently
_MOST_ROUNDING = 0.01  # of the range of values, on average; other bytes or signs differ by more
_PLUGGED_COLOURS = (*_COMPARED, "YBR_FULL", "YBR_RCT", "YBR_ICT")


def read_planes(planes: Sequence[Plane], path: Path) -> np.ndarray:
    """The values of the slices, (slices, rows, columns), or with 3 colours as the last axis, in their units.

    Raises:
        InputError: a file is broken, gray and coloured slices are mixed, a file is of a kind that GDCM decodes
            wrongly and pydicom is not installed, or two decoders of JPEG differ.
    """
    files: dict[Path, list[Plane]] = {}
    for plane in planes:
        files.setdefault(plane.header.path, []).append(plane)
    right: dict[tuple, bool] = {}  # kind of pixels -> whether GDCM decodes it rightly
    arrays = []
    for own in files.values():
        array = _read(own[0], right)
        order = [plane.frame for plane in own]
        arrays.append(array if order == list(range(len(array))) else array[order])
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise InputError(f"{path}: gray and coloured slices in one series ({sorted(shapes)}); separate them")
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def _read(plane: Plane, right: dict[tuple, bool]) -> np.ndarray:
    """The frames of the file of `plane`. right: what was found of files with the same kind of pixels."""
    header = plane.header
    _check_length(header)
    if plane.rescale_differs:  # GDCM takes one for all
        return _by_pydicom(header, "a scale of its own for each frame")
    kind = tuple(header.pixels.values())
    if kind not in right:
        if _known_as_wrong(header):
            right[kind] = False
        else:
            array = _by_gdcm(header)
            right[kind] = _agrees(header, array)
            if right[kind]:
                return array
    if right[kind]:
        return _by_gdcm(header)
    syntax = header.pixels["syntax"]
    if syntax in (*_PLUGGED, _LOSSY_JPEG2000):  # nothing says which of the two is right
        raise InputError(
            f"{header.path}: GDCM and pydicom decode transfer syntax {syntax} into different values; "
            "save the file without compression, by the program that made it"
        )
    bits = f"{header.pixels['bits']} bits per value in transfer syntax {header.pixels['syntax']}"
    return _by_pydicom(header, bits)


def _check_length(header: Header) -> None:
    """Raises InputError for a file of several frames that holds less than it says: GDCM makes the rest up."""
    if header.size[2] == 1 or header.pixels["syntax"] not in _EXACT[:2] or not has_pydicom():
        return
    import pydicom
    from pydicom.pixels.utils import get_expected_length

    try:
        with warnings.catch_warnings(), open(header.path, "rb") as file:
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            left = os.fstat(file.fileno()).st_size - file.tell()  # the file is read up to its pixels
            short = left < get_expected_length(data)
    except Exception:  # without what the length follows from, GDCM decides
        return
    if short:
        raise InputError(f"{header.path}: {BROKEN}; {ADVICE}")


def _known_as_wrong(header: Header) -> bool:
    """Whether GDCM is known to decode this kind of pixels wrongly, as seen with SimpleITK 2.5."""
    pixels = header.pixels
    bits = int(pixels["bits"] or 0)
    deep_colours = bits > 8 and pixels["samples"] not in ("", "1")
    rle = pixels["syntax"] == _RLE and (deep_colours or bits > 16)
    return rle or (pixels["syntax"] == _BIG_ENDIAN and bits > 16)


def _by_gdcm(header: Header) -> np.ndarray:
    import SimpleITK

    try:
        return SimpleITK.GetArrayFromImage(open_reader(header.path).Execute())
    except RuntimeError:
        pass
    if header.pixels["syntax"] in _EXACT and has_pydicom():
        with contextlib.suppress(Exception):  # of the many that pydicom raises; GDCM has failed already
            return _decoded(header, None)
    raise InputError(f"{header.path}: {BROKEN}; {ADVICE}")


def _by_pydicom(header: Header, kind: str) -> np.ndarray:
    """The frames as pydicom decodes them. kind: of the pixels, for messages."""
    if not has_pydicom():
        raise InputError(f"{header.path}: {kind} need pydicom; pip install 'samlora[dicom]'")
    try:
        return _decoded(header, None)
    except Exception:  # of the many that pydicom and its plug-ins raise
        raise InputError(f"{header.path}: {kind} cannot be decoded; convert it with dcm2niix") from None


def _agrees(header: Header, array: np.ndarray) -> bool:
    """Whether pydicom reads one frame, the middle one, as GDCM did; True where that cannot be seen."""
    syntax, colours = (header.pixels[name] for name in ("syntax", "colours"))
    exact = syntax in _EXACT and colours in _COMPARED
    plugged = syntax in (*_PLUGGED, _LOSSY_JPEG2000) and colours in _PLUGGED_COLOURS
    if not (exact or plugged) or not has_pydicom():
        return True
    middle = len(array) // 2
    try:
        other = _decoded(header, middle)[0]
    except Exception:  # a file that only GDCM can read
        return True
    if array[middle].shape != other.shape:
        return False
    if syntax == _LOSSY_JPEG2000:
        apart = np.abs(array[middle].astype(np.float64) - other).mean()
        return bool(apart <= _MOST_ROUNDING * max(np.ptp(other.astype(np.float64)), 1))
    return np.allclose(array[middle], other, rtol=1e-5, atol=1e-5)


def _decoded(header: Header, frame: int | None) -> np.ndarray:
    """All frames, or one, as pydicom decodes them: (frames, rows, columns[, 3]), in their units, low values dark."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, pixel_array

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values that break the standard
        data = pydicom.dcmread(header.path, stop_before_pixels=True, force=True)
        array = pixel_array(header.path, index=frame, correct_unused_bits=False)
    colours = int(data.get("SamplesPerPixel") or 1)
    count = header.size[2] if frame is None else 1
    array = array.reshape(count, header.size[1], header.size[0], *([] if colours == 1 else [colours]))
    if colours > 1:
        return array
    array = _stored(array, data)
    if "ModalityLUTSequence" in data:
        return apply_modality_lut(array, data)
    frames = frames_of(data) or []
    if frame is not None:
        frames = frames[frame : frame + 1]
    slope = float(data.get("RescaleSlope") or 1)
    scale = slope, float(data.get("RescaleIntercept") or 0)
    scales = [one.rescale or scale for one in frames] or [scale] * count
    if set(scales) == {(1.0, 0.0)}:
        return array
    slopes, intercepts = (np.reshape(part, (-1, 1, 1)) for part in zip(*scales))
    values = array * slopes + intercepts
    integral = all(number == int(number) for pair in scales for number in pair)
    small = integral and abs(values).max(initial=0) < 2**31
    return values.astype(np.int32) if small else values


def _stored(array: np.ndarray, data) -> np.ndarray:
    """The bits that hold the value, without what else (overlays) lies beside them; MONOCHROME1 turned over."""
    if array.dtype.kind not in "iu":
        return array
    allocated, signed = array.dtype.itemsize * 8, bool(data.get("PixelRepresentation"))
    stored = int(data.get("BitsStored") or allocated)
    shift = int(data.get("HighBit", stored - 1)) + 1 - stored
    if stored < allocated and 0 <= shift <= allocated - stored:
        # Shifted up to the sign bit and down again, so that signed values keep their sign.
        up = allocated - stored - shift
        array = (array << up) >> (allocated - stored)
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
        array = (low + high - array.astype(np.int64)).astype(array.dtype)
    return array
