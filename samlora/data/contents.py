"""What kind of image a file holds, by its first bytes: endings are wrong, or written otherwise, often enough."""

import bz2
import gzip
import zlib
from pathlib import Path

NIFTI, ANALYZE, MGH, NRRD, META = "NIfTI", "Analyze", "MGH", "NRRD", "MHA"
PICTURE, NPY, NPZ, HDF5, DICOM = "picture", "npy", "npz", "HDF5", "DICOM"
_MARKS = {
    b"NRRD000": NRRD,
    b"\x89PNG\r\n": PICTURE,
    b"\xff\xd8\xff": PICTURE,  # JPEG
    b"II*\x00": PICTURE,  # TIFF, little endian
    b"MM\x00*": PICTURE,
    b"II+\x00": PICTURE,  # BigTIFF
    b"MM\x00+": PICTURE,
    b"GIF8": PICTURE,
    b"\x00\x00\x00\x0cjP  ": PICTURE,  # JPEG 2000
    b"\xff\x4f\xff\x51": PICTURE,  # its codestream without the box around it
    b"\x93NUMPY": NPY,
    b"PK\x03\x04": NPZ,
    b"\x89HDF\r\n": HDF5,
}
_HEAD = 352  # bytes of a NIfTI-1 header with its magic


def compression(path: Path) -> str | None:
    """"gzip" or "bz2" where the whole file is compressed so, else None."""
    with open(path, "rb") as file:
        start = file.read(3)
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    return "bz2" if start == b"BZh" else None


def opened(path: Path):
    """The file for reading, decompressed where it is compressed."""
    openers = {"gzip": gzip.open, "bz2": bz2.open, None: open}
    return openers[compression(path)](path, "rb")


def content(path: Path) -> str | None:
    """The kind of image that a file holds; None where its first bytes do not say it."""
    try:
        with opened(path) as file:
            head = file.read(_HEAD)
    except (OSError, EOFError, zlib.error):
        return None  # its reader says what is wrong with it
    # The 128 bytes before DICOM's mark may be anything, such as the head of a TIFF file.
    if head[128:132] == b"DICM" and not path.name.lower().endswith((".tif", ".tiff")):
        return DICOM
    for mark, kind in _MARKS.items():
        if head.startswith(mark):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" or (head[:2] == b"BM" and head[6:10] == bytes(4)):
        return PICTURE
    if head[128:132] == b"DICM":
        return DICOM
    if head.lstrip()[:10].startswith((b"ObjectType", b"NDims")):
        return META
    length = head[:4]
    if length in (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c"):  # 348, in either order of bytes
        return NIFTI if head[344:347] in (b"n+1", b"ni1") else ANALYZE
    if length in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") and head[4:7] in (b"n+2", b"ni2"):
        return NIFTI
    # Version 1, then three sizes and the frames, each of a believable size.
    if length == b"\x00\x00\x00\x01" and all(head[n : n + 2] == b"\x00\x00" for n in (4, 8, 12)):
        return MGH
    return None
