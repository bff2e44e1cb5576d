"""The one door to image files: NIfTI, NRRD, MHA, DICOM, pictures, npy, MedSAM's npz, SAMed's npz and h5.

What is read is a `Volume`, a `Case` or a slice (see `samlora.data.grid`); heavy libraries load when needed.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from samlora.data import contents, label_tables
from samlora.data.arrays import (
    ARRAYS,
    read_array,
    read_case,
    read_h5,
    read_slice,
    stack_length,
    write_array,
    write_case,
    write_medsam,
    write_slice,
)
from samlora.data.dicom import Series, list_series, read_dicom, segmentation_file
from samlora.data.dicom_seg import read_dicom_seg, write_dicom_seg
from samlora.data.grid import Volume, integers
from samlora.data.opening import check_finite, reading, writing
from samlora.data.pictures import PICTURES, read_picture, write_picture
from samlora.errors import InputError, MissingFileError
from samlora.files import find_file, foreign_content, same_name

__all__ = [
    "VOLUMES",
    "Series",
    "list_series",
    "read_case",
    "read_slice",
    "stack_length",
    "read_label_names",
    "read_volume",
    "stem",
    "write_case",
    "write_dicom_seg",
    "write_medsam",
    "write_slice",
    "write_volume",
]

NIFTI = (".nii.gz", ".nii")
PAIRS = (".hdr",)  # a header whose voxels lie beside it, in .img
FREESURFER = (".mgz", ".mgh")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
# The endings of all files that can be read; a DICOM series is a folder, and its files need no ending.
VOLUMES = (*NIFTI, *PAIRS, *FREESURFER, *ITK, ".dcm", *PICTURES, *ARRAYS)
_WRITABLE = (*NIFTI, ".nrrd", ".mha", ".npy", ".png", ".tif", ".tiff", ".bmp")
# Written into headers, which have no other way to say that sizes of 1 mm are no measurement.
_UNKNOWN = {"has_spacing": "samlora: spacing unknown", "has_thickness": "samlora: thickness unknown"}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def stem(path: str | os.PathLike) -> str:
    """The last part of `path` without the endings of image files: "a/case01.nii.gz" -> "case01".

    In Unicode's composed form (NFC): some systems store names decomposed, and names are compared.
    """
    name = same_name(Path(path).name)
    return next((name[: -len(e)] for e in (*VOLUMES, ".img") if name.lower().endswith(e) and len(name) > len(e)), name)


def read_volume(
    path: str | os.PathLike,
    labels: bool = False,
    *,
    series: str | int | None = None,
    threshold: float | None = None,
) -> Volume:
    """Reads a volume or picture: (i, j, k), or (i, j, k, c) with several channels (colours, MR weightings).

    Files: NIfTI (.nii, .hdr + .img), FreeSurfer's .mgz, NRRD, MHA (2D to 4D), DICOM (one file, or a folder), PNG, JPEG,
    TIFF, BMP, GIF, WebP, JPEG 2000, npy, npz, h5; see `pictures.read_picture`, `arrays.read_array`, `dicom.read_dicom`
    for what they become. What a file is, is read off its first bytes, else its ending. The array keeps the file's
    type and index order, DICOM and scaled NIfTI in their real units (HU).
    labels: a label map instead, (i, j, k) integer, with the `names` that the file gives its values; structures that
    overlap have values for their combinations. threshold: 1 where the file's value is above it, else 0.
    series: which DICOM series of a folder: its number in `list_series` (from 1), its UID, or a part of its UID or
    description that no other has.
    Raises MissingFileError, or InputError if the file is unreadable, has other axes, is empty, holds NaN, has no
    usable affine, holds several series of which none is chosen, or (labels) holds fractions, colours or channels.
    """
    path = find_file(path)
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or folder")
    volume = _read(path, labels, series, threshold)
    array = volume.array
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 5 and array.shape[3] == 1:  # NIfTI stores vectors behind an axis of time
        array = array[:, :, :, 0]
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path}: values of type {array.dtype}; numbers are needed")
    if array.ndim not in ((3,) if labels else (3, 4)) or not array.size:
        wanted = "three axes" if labels else "three axes, or four with channels,"
        raise InputError(f"{path}: shape {array.shape}; {'labels' if labels else 'a volume'} with {wanted} is needed")
    check_finite(array, path)
    _check_affine(volume.affine, path)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if labels:
        native = integers(native, path) if threshold is None else (native > threshold).astype(np.uint8)
        volume.names = volume.names if threshold is None else None
    volume.array = native
    return volume


def read_label_names(path: str | os.PathLike) -> label_tables.Names:
    """What a label map calls its values, in the file or in a table beside it that has its name; empty where neither.

    Reads headers only. Structures in several layers are numbered, as overlaps are known from the voxels alone. Raises
    what `read_volume` raises.
    """
    path = find_file(path)
    name = path.name.lower()
    kind = contents.DICOM if path.is_dir() else contents.content(path) or _kind_by_ending(name)
    names: label_tables.Names = {}
    with reading(path, "label map"), contextlib.ExitStack() as stack:
        if kind == contents.NRRD:
            segments = label_tables.nrrd_segments(path)
            layered = any(one.layer for one in segments)
            names = {n if layered else one.value: (one.name,) for n, one in enumerate(segments, start=1)}
        elif kind == contents.NIFTI:
            names = label_tables.nifti_names(getattr(_open_nifti(path, kind, stack).header, "extensions", ()))
        elif kind == contents.DICOM and (file := segmentation_file(path)) is not None:
            names = label_tables.dicom_names(file)
    return names or label_tables.names_beside(path, stem(path))


def write_volume(
    volume: Volume, path: str | os.PathLike, *, palette: Sequence[tuple[int, int, int]] | None = None
) -> None:
    """Writes `volume` as the ending of `path` says, whole or not at all; `read_volume` gives the same array back.

    NIfTI, NRRD, MHA: affine (and NIfTI's q/sform codes) are the volume's, units mm; integers stay integers, float64
    becomes float32. .npy: (H, W) for one slice, else (D, H, W). PNG, TIFF, BMP: uint8 gray or RGB, or labels, of one
    slice (TIFF: any number); columns are i, rows j. `palette` makes a palette picture of a label map: colours (0..255)
    of labels 1, 2, ... Neither arrays nor pictures keep the place in space.
    Raises InputError if the ending is unknown, nothing can be written there, or the format cannot hold the values
    or the grid.
    """
    array, ending = volume.array, str(path).lower()
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    elif array.dtype.kind == "b" or array.dtype.itemsize > 4:
        array = integers(array, path)
    if not ending.endswith(_WRITABLE):
        raise InputError(f"{path}: cannot write this kind of file; choose {', '.join(_WRITABLE)}")
    with writing(path) as temporary:
        if ending.endswith(NIFTI):
            _write_nifti(volume, array, temporary)
        elif ending.endswith(ITK):
            _write_itk(volume, array, temporary, path)
        elif ending.endswith(".npy"):
            write_array(array, temporary)
        else:
            write_picture(array, temporary, str(path), palette)


def _read(path: Path, labels: bool, series: str | int | None, threshold: float | None) -> Volume:
    kind = contents.DICOM if path.is_dir() else _kind_by_ending(path.name.lower())
    if path.is_file() and not path.name.lower().endswith(".img"):  # of voxels alone the first bytes say nothing
        foreign = foreign_content(path)
        if foreign is not None and kind is not None:
            raise InputError(f"{path}: cannot be read as {kind}: it {foreign}")
        kind = contents.content(path) or kind
    if kind == contents.DICOM:
        # Beside the slices of an image, a segmentation is what is meant by labels.
        file = segmentation_file(path) if (labels and series is None) or not path.is_dir() else None
        if file is None:
            return read_dicom(path, series)
        volume = read_dicom_seg(file)
        if volume.names is None:
            volume.names = label_tables.dicom_names(file) or None
        return volume
    if kind in (contents.NIFTI, contents.ANALYZE, contents.MGH):
        return _read_nifti(path, kind, labels)
    if kind in (contents.NRRD, contents.META):
        return _read_itk(path, kind, labels)
    if kind == contents.PICTURE:
        return read_picture(path, labels, threshold)
    if kind == contents.HDF5:
        return read_h5(path, labels)
    if kind in (contents.NPY, contents.NPZ):
        return read_array(path, labels)
    raise InputError(f"{path}: unknown kind of file; {' '.join(VOLUMES)} and DICOM folders can be read")


def _kind_by_ending(name: str) -> str | None:
    kinds = {
        contents.DICOM: (".dcm",),
        contents.NIFTI: NIFTI,
        contents.ANALYZE: (*PAIRS, ".img"),
        contents.MGH: FREESURFER,
        contents.NRRD: (".nrrd", ".nhdr"),
        contents.META: (".mha", ".mhd"),
        contents.PICTURE: PICTURES,
        contents.NPY: (".npy",),
        contents.NPZ: (".npz",),
        contents.HDF5: (".h5",),
    }
    return next((kind for kind, endings in kinds.items() if name.endswith(endings)), None)


def _check_affine(affine: np.ndarray, path: Path) -> None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # Columns of unit length span no volume when two of them (nearly) coincide.
    if not np.isfinite(affine).all() or not sizes.all() or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-4:
        rows = "; ".join(" ".join(f"{v:g}" for v in row) for row in affine[:3])
        raise InputError(f"{path}: its affine ({rows}) places voxels on top of each other; repair the header")


def _read_nifti(path: Path, kind: str, labels: bool) -> Volume:
    """NIfTI, Analyze and FreeSurfer's MGH, which nibabel reads, whatever the ending says."""
    import nibabel

    with reading(path, kind), contextlib.ExitStack() as stack:
        file = _open_nifti(path, kind, stack)
        array = np.asanyarray(file.dataobj)
        if array.dtype.names:  # NIfTI's own RGB and RGBA
            array = np.stack([array[name] for name in array.dtype.names[:3]], axis=-1)
        elif labels and file.get_data_dtype().kind in "iu":
            array = _unscaled_labels(array, file, path)
        header = file.header
        thick = array.ndim > 2
        if not isinstance(header, nibabel.Nifti1Header):
            affine = file.affine.astype(np.float64)
            return Volume(array, affine, 0, 1, None, str(path), has_thickness=thick)
        scale = {"meter": 1e3, "micron": 1e-3}.get(header.get_xyzt_units()[0], 1.0)
        to_mm = np.diag([scale, scale, scale, 1.0])
        codes = int(header["qform_code"]), int(header["sform_code"])
        qform = header.get_qform() if all(codes) else None  # with one code only, that one is the affine
        if qform is not None and np.allclose(qform, file.affine, rtol=0, atol=1e-4):
            qform = None
        names = label_tables.nifti_names(header.extensions) if labels else {}
        turned = None if qform is None else to_mm @ qform
        # 1 x 1 x 1 without a unit and without a place is what a header holds that nobody has filled in.
        bare = not any(codes) and header.get_xyzt_units()[0] == "unknown"
        known = not (bare and all(size == 1 for size in header.get_zooms()[:3]))
        said = header["descrip"].item().decode("latin-1")
        volume = Volume(array, to_mm @ file.affine, *codes, turned, str(path), names=names or None)
        volume.has_spacing = known and said != _UNKNOWN["has_spacing"]
        volume.has_thickness = thick and said != _UNKNOWN["has_thickness"]
        return volume


def _open_nifti(path: Path, kind: str, stack: contextlib.ExitStack):
    """The image as nibabel opens it; what is read through a stream stays open until `stack` is closed."""
    import nibabel

    name = path.name.lower()
    if name.endswith((*PAIRS, ".img")) or (kind == contents.ANALYZE and not name.endswith((*NIFTI, *FREESURFER))):
        header, voxels = (find_file(path.with_suffix(ending)) for ending in (".hdr", ".img"))
        missing = next((file for file in (header, voxels) if not file.is_file()), None)
        if missing is not None:
            raise InputError(f"{path}: the file {missing.name} that belongs to it is missing; copy both")
        usual = {path.suffix.lower(), path.suffix.upper()}
        if path.suffix in usual and header.suffix.islower() == voxels.suffix.islower():
            return nibabel.load(path)
        files = {"header": nibabel.FileHolder(str(header)), "image": nibabel.FileHolder(str(voxels))}
        return nibabel.Nifti1Pair.from_file_map(files)
    packed = contents.compression(path)
    if path.name.endswith({"gzip": (".nii.gz", ".mgz"), None: (".nii", ".mgh")}.get(packed, ())):
        return nibabel.load(path)
    # nibabel goes by the ending, which is wrong here or written in mixed case.
    stream = stack.enter_context(contents.opened(path))
    if kind == contents.MGH:
        return nibabel.MGHImage.from_stream(stream)
    head = stream.read(540)
    stream.seek(0)
    second = nibabel.Nifti2Header.may_contain_header(head)
    return (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_stream(stream)


def _unscaled_labels(array: np.ndarray, file, path: Path) -> np.ndarray:
    """Labels that were stored as integers with a scale: the whole numbers that the scale has rounded away.

    A stored value is at most half a step from what was meant; with steps below 1 that is one whole number.
    """
    step = abs(float(getattr(file.dataobj, "slope", 1.0)))
    if array.dtype.kind != "f" or step in (0.0, 1.0):
        return array
    nearest = np.rint(array)
    apart = float(np.abs(array - nearest).max(initial=0))
    if step < 1 and apart <= step / 2 * (1 + 1e-3):
        return nearest
    if step > 1 and (apart > 1e-3 or abs(step - round(step)) > 1e-3):
        raise InputError(
            f"{path}: its header scales the labels by {step:.4g} (scl_slope), so that neighbouring values have become "
            "one; save the labels again as integers without a scale"
        )
    return array


def _write_nifti(volume: Volume, array: np.ndarray, path: Path) -> None:
    import nibabel

    file = nibabel.Nifti1Image(array, volume.affine)
    # With both codes 0 a reader makes the affine up from the voxel sizes; where that is not the volume's,
    # nibabel sets the sform code to 2 on saving.
    file.header.set_qform(volume.affine if volume.qform is None else volume.qform, volume.qform_code)
    file.header.set_sform(volume.affine, volume.sform_code)
    file.header.set_xyzt_units("mm" if volume.has_spacing else "unknown")
    file.header["descrip"] = _what_is_unknown(volume)
    with _lower_case(path) as lower:  # nibabel knows endings in lower case
        nibabel.save(file, lower)


def _what_is_unknown(volume: Volume) -> str:
    """The remark that a header of `volume` gets; "" where its voxels have a size."""
    return next((text for name, text in _UNKNOWN.items() if not getattr(volume, name)), "")


@contextlib.contextmanager
def _lower_case(path: Path) -> Iterator[Path]:
    """A path whose ending is in lower case; what is written there lies at `path` afterwards."""
    lower = path.with_name(path.name.lower())
    try:
        yield lower
        if lower != path:
            lower.replace(path)
    finally:
        if lower != path:
            lower.unlink(missing_ok=True)


def _read_itk(path: Path, kind: str, labels: bool) -> Volume:
    import SimpleITK

    with reading(path, kind):
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO({contents.NRRD: "NrrdImageIO", contents.META: "MetaImageIO"}[kind])
        reader.SetFileName(str(path))
        image = reader.Execute()
        array = SimpleITK.GetArrayFromImage(image)  # (k, j, i), then the channels
    axes = image.GetDimension()
    if axes > 4:
        raise InputError(f"{path}: {axes} axes; a volume with three axes, or four with channels, is needed")
    array = array.transpose((*range(axes)[::-1], *range(axes, array.ndim)))
    if axes == 2:
        array = array[:, :, None]
    affine, direction = np.eye(4), np.array(image.GetDirection()).reshape(axes, axes)
    size = min(axes, 3)  # a fourth axis is time or channels
    affine[:size, :size] = direction[:size, :size] * image.GetSpacing()[:size]
    affine[:size, 3] = image.GetOrigin()[:size]
    names: label_tables.Names = {}
    segments = label_tables.nrrd_segments(path) if labels and kind == contents.NRRD else []
    if segments and array.ndim == 4:
        if array.shape[3] <= max(one.layer for one in segments):
            raise InputError(f"{path}: names a layer that it does not hold; save the segmentation again")
        array, names = label_tables.merge_layers(array, segments)
    elif segments:
        names = {one.value: (one.name,) for one in segments}
    volume = Volume(array, _LPS_TO_RAS @ affine, 1, 1, None, str(path), names=names or None)
    with open(path, "rb") as file:
        head = file.read(2**16)
    volume.has_spacing = _states_spacing(head) and _UNKNOWN["has_spacing"].encode() not in head
    volume.has_thickness = axes > 2 and _UNKNOWN["has_thickness"].encode() not in head
    return volume


def _states_spacing(head: bytes) -> bool:
    """Whether the head of an NRRD or MHA file says how large its voxels are; ITK takes 1 mm where it does not."""
    if head.startswith(b"NRRD"):
        lines = head.replace(b"\r", b"").split(b"\n\n")[0].lower().splitlines()
        said = [line for line in lines if line.startswith((b"spacings:", b"space directions:"))]
    else:
        lines = head.split(b"ElementDataFile")[0].splitlines()
        said = [line for line in lines if line.startswith((b"ElementSpacing", b"ElementSize"))]
    return any(b"nan" not in line.lower() for line in said)


def _write_itk(volume: Volume, array: np.ndarray, temporary: Path, path: str | os.PathLike) -> None:
    import SimpleITK

    affine = _LPS_TO_RAS @ volume.affine
    direction = affine[:3, :3] / volume.spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-4):
        raise InputError(f"{path}: this format has no place for the volume's sheared grid; choose .nii.gz")
    array = np.ascontiguousarray(array.transpose((2, 1, 0, *range(3, array.ndim))))
    image = SimpleITK.GetImageFromArray(array, isVector=array.ndim == 4)
    image.SetSpacing(volume.spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(direction.ravel().tolist())
    if unknown := _what_is_unknown(volume):
        image.SetMetaData("comment", unknown)
    with _lower_case(temporary) as lower:
        SimpleITK.WriteImage(image, str(lower), useCompression=True)
