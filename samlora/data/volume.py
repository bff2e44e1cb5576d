"""The only readers and writers of image files: NIfTI, NRRD, MHA, DICOM folders, and SAMed's npz and h5.

What is read is a `Volume`, a `Case` or a slice (see `samlora.data.grid`); heavy libraries load when needed.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from samlora.data.grid import Case, Geometry, Volume, integers
from samlora.errors import InputError, MissingFileError
from samlora.files import whole

NIFTI = (".nii.gz", ".nii")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
VOLUMES = NIFTI + ITK  # the endings of files that hold a volume; a DICOM series is a folder
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def stem(path: str | os.PathLike) -> str:
    """The last part of `path` without the endings of image files: "a/case01.nii.gz" -> "case01"."""
    name = Path(path).name
    endings = (*VOLUMES, ".npy.h5", ".h5", ".npz")
    return next((name[: -len(e)] for e in endings if name.lower().endswith(e) and len(name) > len(e)), name)


def read_volume(path: str | os.PathLike, labels: bool = False) -> Volume:
    """Reads a 3D volume: NIfTI, NRRD, MHA, or a folder that holds one DICOM series.

    The array keeps the file's type and index order, DICOM and scaled NIfTI in their real units (HU). With
    `labels=True` it is an integer array. Raises MissingFileError, or InputError if the file is unreadable,
    not 3D, empty, holds NaN, has no usable affine, or (labels) holds fractions.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or folder")
    if path.is_dir():
        volume = _read_dicom(path)
    elif path.name.lower().endswith(NIFTI):
        volume = _read_nifti(path)
    elif path.name.lower().endswith(ITK):
        volume = _read_itk(path)
    else:
        raise InputError(f"{path}: unknown kind of volume; {' '.join(VOLUMES)} and DICOM folders can be read")
    array = volume.array
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path}: values of type {array.dtype}; one number per voxel is needed")
    if array.ndim != 3 or not array.size:
        raise InputError(f"{path}: shape {array.shape}; a volume with three axes, none empty, is needed")
    _check_finite(array, path)
    affine = volume.affine[:3, :3]
    sizes = np.linalg.norm(affine, axis=0)
    # Columns of unit length span no volume when two of them (nearly) coincide.
    if not np.isfinite(volume.affine).all() or not sizes.all() or abs(np.linalg.det(affine / sizes)) < 1e-4:
        rows = "; ".join(" ".join(f"{v:g}" for v in row) for row in volume.affine[:3])
        raise InputError(f"{path}: its affine ({rows}) places voxels on top of each other; repair the header")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    volume.array = integers(native, path) if labels else native
    return volume


def write_volume(volume: Volume, path: str | os.PathLike) -> None:
    """Writes `volume` as the ending of `path` says (NIfTI, NRRD, MHA), whole or not at all.

    Affine and q/sform codes are the volume's, units mm; integers stay integers, float64 becomes float32.
    Raises InputError if the ending is unknown, nothing can be written there, or the format cannot hold the
    grid.
    """
    array = volume.array
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    elif array.dtype.kind == "b" or array.dtype.itemsize > 4:
        array = integers(array, path)
    endings = str(path).lower()
    if not endings.endswith((*NIFTI, ".nrrd", ".mha")):
        raise InputError(f"{path}: cannot write this kind of volume; choose .nii.gz, .nii, .nrrd or .mha")
    with _writing(path) as temporary:
        if endings.endswith(NIFTI):
            _write_nifti(volume, array, temporary)
        else:
            _write_itk(volume, array, temporary, path)


def _read_nifti(path: Path) -> Volume:
    import nibabel

    with _reading(path, "NIfTI"):
        file = nibabel.load(path)
        array = np.asanyarray(file.dataobj)
        header = file.header
        scale = {"meter": 1e3, "micron": 1e-3}.get(header.get_xyzt_units()[0], 1.0)
        to_mm = np.diag([scale, scale, scale, 1.0])
        codes = int(header["qform_code"]), int(header["sform_code"])
        qform = header.get_qform() if all(codes) else None  # with one code only, that one is the affine
        if qform is not None and np.allclose(qform, file.affine, rtol=0, atol=1e-4):
            qform = None
        return Volume(array, to_mm @ file.affine, *codes, None if qform is None else to_mm @ qform, str(path))


def _write_nifti(volume: Volume, array: np.ndarray, path: Path) -> None:
    import nibabel

    file = nibabel.Nifti1Image(array, volume.affine)
    # With both codes 0 a reader makes the affine up from the voxel sizes; where that is not the volume's,
    # nibabel sets the sform code to 2 on saving.
    file.header.set_qform(volume.affine if volume.qform is None else volume.qform, volume.qform_code)
    file.header.set_sform(volume.affine, volume.sform_code)
    file.header.set_xyzt_units("mm")
    nibabel.save(file, path)


def _read_itk(path: Path) -> Volume:
    import SimpleITK

    with _reading(path, path.suffix[1:].upper()):
        return _from_itk(SimpleITK.ReadImage(str(path)), path)


def _read_dicom(path: Path) -> Volume:
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    with _reading(path, "DICOM series"):
        series = reader.GetGDCMSeriesIDs(str(path))  # an anonymised series may have an empty UID
        names = reader.GetGDCMSeriesFileNames(str(path), series[0]) if series else ()
    if not names:
        raise InputError(f"{path}: no DICOM series in this folder; give the folder that holds the slices")
    if len(series) > 1:
        raise InputError(f"{path}: {len(series)} DICOM series ({', '.join(series)}); keep one in a folder")
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    warns = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # uneven slices are an error below, in one line
    with _reading(path, "DICOM series"):
        try:
            image = reader.Execute()
        finally:
            SimpleITK.ProcessObject.SetGlobalWarningDisplay(warns)
        places = [reader.GetMetaData(n, "0020|0032").split("\\") for n in range(len(names))]
        along = np.diff(np.array(places, np.float64) @ np.array(image.GetDirection()).reshape(3, 3)[:, 2])
    # ITK would spread the slices evenly without a word, and every organ above a gap would be misplaced.
    if along.size and np.abs(along - np.median(along)).max() > 0.01 * abs(np.median(along)) + 1e-3:
        worst = int(np.abs(along - np.median(along)).argmax())
        raise InputError(
            f"{path}: {along[worst]:g} mm between {Path(names[worst]).name} and the next slice, but "
            f"{np.median(along):g} mm elsewhere; a slice is missing or doubled"
        )
    return _from_itk(image, path)


def _from_itk(image, path: Path) -> Volume:
    import SimpleITK

    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        kind = f"{image.GetDimension()} axes, {image.GetNumberOfComponentsPerPixel()} numbers per voxel"
        raise InputError(f"{path}: {kind}; a volume with three axes and one number per voxel is needed")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Volume(SimpleITK.GetArrayFromImage(image).T, _LPS_TO_RAS @ affine, 1, 1, None, str(path))


def _write_itk(volume: Volume, array: np.ndarray, temporary: Path, path: str | os.PathLike) -> None:
    import SimpleITK

    affine = _LPS_TO_RAS @ volume.affine
    direction = affine[:3, :3] / volume.spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-4):
        raise InputError(f"{path}: this format has no place for the volume's sheared grid; choose .nii.gz")
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(volume.spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(direction.ravel().tolist())
    SimpleITK.WriteImage(image, str(temporary), useCompression=True)


def read_slice(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads a training slice (.npz with `image` and `label`): image (H, W) float32, label (H, W) integer.

    Raises MissingFileError, or InputError if it is no such archive or its arrays do not fit together.
    """
    path = Path(path)
    with _reading(path, "npz archive"):
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            arrays = {key: archive[key] for key in ("image", "label") if key in archive}
            found = " ".join(archive.files)
    return _checked(arrays, found, 2, path)


def write_slice(path: str | os.PathLike, image: np.ndarray, label: np.ndarray) -> None:
    """Writes a training slice: image (H, W), stored as float32, and label (H, W) integer, compressed."""
    with _writing(path) as temporary:
        np.savez_compressed(temporary, image=image.astype(np.float32, copy=False), label=label)


def read_case(path: str | os.PathLike) -> Case:
    """Reads a test volume (.npy.h5 with `image`, perhaps `label`, perhaps what `write_case` adds).

    Raises MissingFileError, or InputError if it is no such file or its arrays do not fit together.
    """
    import h5py

    path = Path(path)
    with _reading(path, "HDF5"), h5py.File(path, "r") as file:
        arrays = {key: file[key][()] for key in ("image", "label") if key in file}
        found = " ".join(file)
        recipe = json.loads(file.attrs["recipe"]) if "recipe" in file.attrs else None
        geometry = None
        if "geometry" in file.attrs:
            geometry = Geometry.from_dict(json.loads(file.attrs["geometry"]))
    if "label" in arrays:
        return Case(*_checked(arrays, found, 3, path), geometry, recipe, stem(path))
    image, _ = _checked(arrays | {"label": np.zeros(np.shape(arrays.get("image")), np.uint8)}, found, 3, path)
    return Case(image, None, geometry, recipe, stem(path))


def write_case(case: Case, path: str | os.PathLike) -> None:
    """Writes `case` as SAMed's .npy.h5, whole or not at all.

    Datasets `image` (float32) and `label`, compressed slice by slice; attributes `affine` (4, 4), `geometry`
    and `recipe` (JSON) where known. SAMed's own test.py reads these files too.
    """
    import h5py

    with _writing(path) as temporary, h5py.File(temporary, "w") as file:
        for key, array in (("image", case.image.astype(np.float32, copy=False)), ("label", case.label)):
            if array is not None:
                pack = dict(chunks=(1, *array.shape[1:]), compression="gzip", compression_opts=1)
                file.create_dataset(key, data=array, **pack)
        if case.geometry is not None:
            file.attrs["affine"] = case.geometry.affine
            file.attrs["geometry"] = json.dumps(case.geometry.to_dict())
        if case.recipe is not None:
            file.attrs["recipe"] = json.dumps(case.recipe)


def _checked(arrays: dict, found: str, ndim: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """image float32 and label integer, after everything that can be wrong with them."""
    for key in ("image", "label"):
        if key not in arrays:
            raise InputError(f"{path}: no array named {key!r} in it (found: {found or 'none'})")
        array = arrays[key]
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            kind = getattr(array, "dtype", type(array).__name__)
            raise InputError(f"{path}: {key!r} holds {kind}; an array of numbers is needed")
        if array.ndim != ndim or not array.size:
            raise InputError(f"{path}: {key!r} has shape {array.shape}; {ndim} axes, none empty, are needed")
        _check_finite(array, path)
    image, label = arrays["image"], arrays["label"]
    if image.shape != label.shape:
        raise InputError(f"{path}: image of shape {image.shape}, label of shape {label.shape}; must be equal")
    return image.astype(np.float32, copy=False), integers(label, path)


def _check_finite(array: np.ndarray, path: Path) -> None:
    if array.dtype.kind == "f":
        count = array.size - int(np.isfinite(array).sum())
        if count:
            raise InputError(f"{path}: {count} of {array.size} values are NaN or infinite; replace them")


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever a library raises on a broken file into one line that names the file."""
    if not path.exists():
        raise MissingFileError(f"{path}: no such file")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zlib, zipfile, nibabel, ITK and h5py each have their own kinds
        reason = " ".join(str(error).split()).split("ERROR: ")[-1] or type(error).__name__
        raise InputError(f"{path}: cannot be read as {kind} ({reason[-200:]})") from None


@contextlib.contextmanager
def _writing(path: str | os.PathLike) -> Iterator[Path]:
    try:
        with whole(path) as temporary:
            yield temporary
    except InputError:
        raise
    except (OSError, RuntimeError) as error:  # ITK raises RuntimeError when the disk is full
        reason = " ".join(str(error).split())
        advice = "free some space or choose another place"
        raise InputError(f"{path}: cannot be written ({reason[-200:]}); {advice}") from None
