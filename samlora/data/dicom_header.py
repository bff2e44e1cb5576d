"""What one DICOM file says of itself: kind, series, size, place; and its pixels. Read by SimpleITK (GDCM)."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from samlora.data.opening import reading
from samlora.errors import InputError

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
# Classes of DICOM objects that are images; others (reports, plans, DICOMDIR) may lie beside the slices.
_IMAGES = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(1|2|3|4|5|6|7|12|13|14|20|77|128|130|481\.1)(\.\d+)*")
# Those whose frames have places of their own (enhanced CT, MR, PET and their kin).
_ENHANCED = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2\.[12]|4\.[134]|6\.2|13\.1\.\d|128\.1|130)")
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
}
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
    """What one file says of itself. size: (columns, rows, frames). spacing: mm along columns, rows; None if unknown.

    thickness: SliceThickness, mm. position (3), orientation (6): ImagePositionPatient, ImageOrientationPatient. None
    where the file does not tell them. affine (4, 4): as GDCM understands the file on its own, LPS.
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
    affine: np.ndarray

    @property
    def has_spacing(self) -> bool:
        """Whether the file tells millimetres (enhanced files tell them with their frames)."""
        return self.spacing is not None or self.enhanced

    @property
    def enhanced(self) -> bool:
        """Whether the frames of the file have places of their own."""
        return _ENHANCED.fullmatch(self.kind) is not None


def is_dicom(path: Path) -> bool:
    """Whether the file calls itself DICOM, whatever its name is."""
    return path.is_file() and storage(path) is not None


def read_header(path: Path) -> Header | None:
    """The header of an image; None for anything else. Raises InputError if it is one, but broken."""
    kind = storage(path)
    if kind in SEGMENTATIONS:
        return None
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        if kind is not None and (not kind or _IMAGES.fullmatch(kind)):
            advice = "copy it again, or convert it with dcm2niix"
            raise InputError(
                f"{path}: cannot be read as DICOM (cut short, damaged or of an unknown compression); {advice}"
            ) from None
        return None
    tags = {name: reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else "" for name, tag in _TAGS.items()}
    codec = _CODECS.get(tags["characters"].strip().split("\\")[-1], "latin-1")
    raw = {name: text.encode("utf-8", "surrogateescape") for name, text in tags.items()}
    tags = {name: " ".join(text.decode(codec, "replace").replace("\0", " ").split()) for name, text in raw.items()}
    with reading(path, "DICOM"):
        spacing = _numbers(tags["spacing"] or tags["imager_spacing"], 2)
        orientation, position = _numbers(tags["orientation"], 6), _numbers(tags["position"], 3)
        thickness = _numbers(tags["thickness"], 1)
        size = (*reader.GetSize(), 1)[:3]
        affine = np.eye(4)
        affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * reader.GetSpacing()
        affine[:3, 3] = reader.GetOrigin()
    if orientation is None or position is None or size[2] > 1:
        orientation = position = None
    elif not np.allclose(_products(orientation), (1, 1, 0), atol=0.01):
        shown = " ".join(f"{v:g}" for v in orientation)
        raise InputError(f"{path}: ImageOrientationPatient {shown} is no pair of directions at right angles")
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
        spacing=None if spacing is None else (float(spacing[1]), float(spacing[0])),
        thickness=float(thickness[0]) if thickness is not None and thickness[0] > 0 else None,
        position=position,
        orientation=orientation,
        affine=affine,
    )


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


def storage(path: Path) -> str | None:
    """The class of DICOM object, a UID ("" if the file does not say); None if the file does not call itself DICOM."""
    with reading(path, "DICOM"), open(path, "rb") as file:
        head = file.read(1024)
    if head[128:132] != b"DICM":
        return None
    at = head.find(b"\x02\x00\x02\x00UI", 132)  # the element Media Storage SOP Class UID, in any transfer syntax
    if at < 0:
        return ""
    end = at + 8 + int.from_bytes(head[at + 6 : at + 8], "little")
    return head[at + 8 : end].rstrip(b"\0 ").decode("ascii", "replace")


def read_pixels(path: Path) -> np.ndarray:
    """(frames, rows, columns), or with 3 colours as the last axis."""
    import SimpleITK

    with reading(path, "DICOM"):
        return SimpleITK.GetArrayFromImage(_reader(path).Execute())


def _reader(path: Path):
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps ITK's warnings to itself; what matters in them is an error here, in one line."""
    import SimpleITK

    warns = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(warns)


def check_frames(header: Header) -> None:
    """Raises InputError if the frames of an enhanced file do not follow each other in even steps along a line."""
    # Where they do not, GDCM gives voxels of 1 x 1 x 1 mm without a word; where it gives others, it has looked itself.
    if not np.array_equal(np.linalg.norm(header.affine[:3, :3], axis=0), (1, 1, 1)):
        return
    try:
        import pydicom
    except ImportError:
        advice = "pip install 'samlora[dicom]' to find out"
        raise InputError(f"{header.path}: its frames may not follow each other in even steps; {advice}") from None
    with reading(header.path, "enhanced DICOM"):
        frames = pydicom.dcmread(header.path, stop_before_pixels=True).PerFrameFunctionalGroupsSequence
        places = np.array([frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames], np.float64)
    steps = np.diff(places, axis=0)
    if np.abs(steps - steps[0]).max() > 0.01 or abs(np.linalg.norm(steps[0]) - 1) > 0.01:
        advice = "make volumes of it with dcm2niix"
        raise InputError(f"{header.path}: its frames do not follow each other in even steps; {advice}")
