"""What one DICOM file says of itself: kind, series, size, place. Read by SimpleITK (GDCM)."""

import contextlib
import dataclasses
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from samlora.data.dicom_frames import Frame, offsets, read_frames
from samlora.data.opening import reading
from samlora.errors import InputError

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
# Classes of DICOM objects that are images; others (reports, plans, DICOMDIR) may lie beside the slices.
_IMAGES = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(1|2|3|4|5|6|7|12|13|14|20|77|128|130|481\.1)(\.\d+)*")
# Of these families, but without pixels: spectroscopy of MR, stereometric relationship.
_NO_IMAGES = ("1.2.840.10008.5.1.4.1.1.4.2", "1.2.840.10008.5.1.4.1.1.77.1.5.3")
# Those whose frames have places of their own (enhanced CT, MR, PET and their kin).
_ENHANCED = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2\.[12]|4\.[134]|6\.2|13\.1\.\d|128\.1|130)")
# A dose is an image, but none that lies beside a scan to be chosen instead of it.
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"
DIRECTORY = "1.2.840.10008.1.3.10"
_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
BROKEN = "cannot be read as DICOM (cut short, damaged or of an unknown compression)"
ADVICE = "copy it again, or convert it with dcm2niix"
_TAGS = {
    "kind": "0008|0016",
    "characters": "0008|0005",
    "patient": "0010|0020",
    "study": "0020|000d",
    "uid": "0020|000e",
    "number": "0020|0011",
    "description": "0008|103e",
    "modality": "0008|0060",
    "frame": "0020|0052",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "spacing": "0028|0030",
    "imager_spacing": "0018|1164",
    "thickness": "0018|0050",
    "between": "0018|0088",
    "concatenation": "0020|9161",
    "part": "0020|9162",
}
# How frames of files of the older classes follow each other, see `dicom_frames.offsets`.
_FRAME_TAGS = ("3004|000c", "0018|0088", "0018|1063", "0018|1065", "0028|0009", "0054|0080")
_PIXEL_TAGS = {
    "bits": "0028|0100",
    "samples": "0028|0002",
    "colours": "0028|0004",
}
_EVERY_TAG = tuple(dict.fromkeys((*_TAGS.values(), *_FRAME_TAGS, *_PIXEL_TAGS.values())))
# Bytes of text by Specific Character Set; others than these are read as the plain alphabet.
_CODECS = {
    "ISO_IR 192": "utf-8",
    "GB18030": "gb18030",
    "GBK": "gbk",
    "ISO_IR 13": "shift_jis",
    "ISO_IR 144": "iso8859-5",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Header:
    """What one file says of itself; None for what it does not say.

    Attributes:
        size: columns, rows, frames.
        spacing: mm along columns, rows.
        thickness: SliceThickness, or SpacingBetweenSlices where there is none, mm.
        position: ImagePositionPatient (3), LPS mm; of a file of several frames that of the first.
        orientation: ImageOrientationPatient (6).
        offsets: mm from the first frame along the normal, see `dicom_frames.offsets`.
        affine: (4, 4), as GDCM understands the file on its own, LPS.
        pixels: transfer syntax, bits allocated, samples and photometric interpretation, as text.
        concatenation: UID of the file that this one is a part of, "" where it is complete. part: which one, from 1.
    """

    path: Path
    kind: str
    key: tuple[str, ...]
    uid: str
    description: str
    modality: str
    number: int
    size: tuple[int, int, int]
    spacing: tuple[float, float] | None
    thickness: float | None
    position: np.ndarray | None
    orientation: np.ndarray | None
    offsets: np.ndarray | None
    affine: np.ndarray
    pixels: dict[str, str]
    concatenation: str = ""
    part: int = 0

    @property
    def placed(self) -> bool:
        """Whether the file is one slice with a place of its own."""
        return self.size[2] == 1 and self.position is not None and self.orientation is not None

    @property
    def enhanced(self) -> bool:
        """Whether the frames of the file have places of their own."""
        return _ENHANCED.fullmatch(self.kind) is not None


def is_dicom(path: Path) -> bool:
    """Whether the file calls itself DICOM, whatever its name is."""
    return path.is_file() and storage(path) is not None


def holds_image(path: Path) -> bool:
    """Whether a file is a DICOM image or segmentation, a broken one too; directories, reports and plans are not."""
    if not path.is_file():
        return False
    kind = storage(path)
    if kind is None or kind in _NO_IMAGES:
        return False
    if not kind or kind in (*SEGMENTATIONS, DOSE) or _IMAGES.fullmatch(kind):
        return True
    if kind.startswith("1.2.840.10008."):
        return False
    try:  # classes of manufacturers: some hold images, some raw data
        with quiet():
            return read_header(path) is not None
    except InputError:
        return True


def kind_of(path: Path) -> str:
    """What a DICOM file that is no image is called, for messages: its class; "" for other files."""
    kind = storage(path) if path.is_file() else None
    if not kind or not has_pydicom():
        return kind or ""
    from pydicom.uid import UID

    return UID(kind).name


def read_header(path: Path) -> Header | None:
    """The header of an image; None for anything else. Raises InputError if it is one, but broken."""
    kind = storage(path)
    if kind in SEGMENTATIONS:
        return None
    reader = open_reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        if kind is not None and kind not in _NO_IMAGES and (not kind or _IMAGES.fullmatch(kind)):
            raise InputError(f"{path}: {BROKEN}; {ADVICE}") from None
        return None
    if kind == _SLIDE:
        raise InputError(f"{path}: holds the tiles of a whole slide image; export the region as TIFF or PNG")
    texts = {tag: reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else "" for tag in _EVERY_TAG}
    codec = _CODECS.get(texts[_TAGS["characters"]].strip().split("\\")[-1], "latin-1")
    raw = {tag: text.encode("utf-8", "surrogateescape") for tag, text in texts.items()}
    texts = {tag: " ".join(text.decode(codec, "replace").replace("\0", " ").split()) for tag, text in raw.items()}
    tags = {name: texts[tag] for name, tag in _TAGS.items()}
    with reading(path, "DICOM"):
        spacing = _numbers(tags["spacing"] or tags["imager_spacing"], 2)
        orientation, position = _numbers(tags["orientation"], 6), _numbers(tags["position"], 3)
        thickness = _positive(tags["thickness"]) or _positive(tags["between"])
        size = (*reader.GetSize(), 1)[:3]
        affine = np.eye(4)
        affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * reader.GetSpacing()
        affine[:3, 3] = reader.GetOrigin()
        along = None if size[2] == 1 else offsets(texts, size[2])
    spacing = None if spacing is None else (float(spacing[1]), float(spacing[0]))
    if size[2] == 1 and _ENHANCED.fullmatch(kind or tags["kind"]) and (frame := _only_frame(path)):
        position, orientation = frame.position, frame.orientation
        spacing, thickness = frame.spacing or spacing, frame.thickness or frame.between or thickness
    if orientation is None or position is None:
        orientation = position = None
    else:
        check_directions(orientation, str(path))
    told = ("study", "uid", "modality")
    untold = ("patient", "study", "modality", "number", "description", "frame")  # where there is no UID
    return Header(
        path=path,
        kind=kind or tags["kind"],
        key=tuple(tags[name] for name in (told if tags["uid"] else untold)),
        uid=tags["uid"],
        description=tags["description"],
        modality=tags["modality"],
        number=int(tags["number"]) if tags["number"].isdigit() else 0,
        size=size,
        spacing=spacing,
        thickness=thickness,
        position=position,
        orientation=orientation,
        offsets=along,
        affine=affine,
        pixels={name: texts[tag] for name, tag in _PIXEL_TAGS.items()} | {"syntax": _meta(path, 0x10) or ""},
        concatenation=tags["concatenation"],
        part=int(tags["part"]) if tags["part"].isdigit() else 0,
    )


def check_directions(orientation: np.ndarray, where: str) -> None:
    """Raises InputError unless the two directions (6) are of unit length and at right angles."""
    if not np.allclose(_products(orientation), (1, 1, 0), atol=0.01):
        shown = " ".join(f"{v:g}" for v in orientation)
        raise InputError(f"{where}: ImageOrientationPatient {shown} is no pair of directions at right angles")


def _only_frame(path: Path) -> Frame | None:
    """The frame of an enhanced file that has one; None without pydicom, GDCM's view of the file is taken then."""
    if not has_pydicom():
        return None
    with reading(path, "enhanced DICOM"):
        frames = read_frames(path)
    return frames[0] if frames else None


def has_pydicom() -> bool:
    """Whether the extra `dicom` is installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        return False
    return True


def _products(orientation: np.ndarray) -> tuple[float, float, float]:
    across, down = orientation[:3], orientation[3:]
    return across @ across, down @ down, across @ down


def _numbers(text: str, count: int) -> np.ndarray | None:
    if not text:
        return None
    numbers = np.array(text.split("\\"), np.float64)
    if len(numbers) < count or not np.isfinite(numbers).all():
        raise ValueError(f"{text}: {count} numbers are needed")
    return numbers[:count]


def _positive(text: str) -> float | None:
    numbers = _numbers(text, 1)
    return None if numbers is None or numbers[0] <= 0 else float(numbers[0])


def storage(path: Path) -> str | None:
    """The class of DICOM object, a UID ("" if the file does not say); None if the file does not call itself DICOM."""
    return _meta(path, 0x02)


def _meta(path: Path, element: int) -> str | None:
    """A UID of the file's meta information, group 0002, which is written alike in every transfer syntax."""
    with reading(path, "DICOM"), open(path, "rb") as file:
        head = file.read(1024)
    if head[128:132] != b"DICM":
        return None
    at = head.find(bytes((2, 0, element, 0)) + b"UI", 132)
    if at < 0:
        return ""
    end = at + 8 + int.from_bytes(head[at + 6 : at + 8], "little")
    return head[at + 8 : end].rstrip(b"\0 ").decode("ascii", "replace")


def open_reader(path: Path):
    """SimpleITK's reader of the file, by GDCM."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


class _Silence:
    """The standard error of the process, pointed to nowhere while any thread decodes.

    libjpeg and OpenJPEG write there directly, past ITK, also about what GDCM tries first and does right afterwards.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._depth = 0
        self._kept = -1

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            try:
                self._kept = os.dup(2)
                nowhere = os.open(os.devnull, os.O_WRONLY)
            except OSError:  # a process without standard error
                return
            os.dup2(nowhere, 2)
            os.close(nowhere)

    def __exit__(self, *_) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._kept >= 0:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._kept = -1


_SILENCE = _Silence()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the warnings of ITK and of its decoders to itself; what matters in them is an error here, in one line."""
    import SimpleITK

    warns = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        with _SILENCE:
            yield
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(warns)
