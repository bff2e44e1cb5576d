"""Arrays in npy, npz and h5: pictures and volumes as arrays, MedSAM's npz, SAMed's slices (npz) and cases (h5)."""

import contextlib
import io
import json
import os
import re
import sys
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samlora.data.grid import Case, Geometry, Volume, case_to_volume, integers
from samlora.data.ignored import split_ignored, with_ignored
from samlora.data.opening import check_finite, reading, writing
from samlora.data.pictures import PICTURE_AFFINE
from samlora.errors import InputError

ARRAYS = (".npy", ".npz", ".npy.h5", ".h5")

# numpy parses the header of an array with `ast`, which before Python 3.11.8 breaks off with a SystemError when several
# threads are in it at once (github.com/python/cpython/issues/106905); there, one thread reads at a time.
_parsing = threading.Lock() if sys.version_info < (3, 11, 8) else contextlib.nullcontext()


def read_array(path: Path, labels: bool) -> Volume:
    """Reads a bare array: (H, W) as (W, H, 1), colours (H, W, 3) as (W, H, 1, 3), a stack (D, H, W) as (W, H, D).

    .npy holds one array; .npz `image` and `label`, or MedSAM's `imgs` (N, H, W) or (N, H, W, 3), `gts` (N, H, W) and
    `spacing` (x, y, z in mm); .h5 `image` and `label` (D, H, W), as `grid.case_to_volume` places them. Of two, `labels`
    says which. A last axis of 3 or 4 is colours where both others are longer; transparency is dropped.
    Raises InputError if it is no such file, or an array in it is missing or holds no numbers.
    """
    name, spacing = path.name.lower(), None
    if name.endswith(".h5"):
        return read_h5(path, labels)
    with reading(path, "npz archive" if name.endswith(".npz") else "npy array"), _parsing:
        array = np.load(path, allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            with array as archive:
                found = archive.files
                key = next((k for k in (("gts", "label") if labels else ("imgs", "image")) if k in found), None)
                if key is None:
                    wanted = "gts or label" if labels else "imgs or image"
                    raise InputError(f"{path}: no array named {wanted} in it (found: {' '.join(found) or 'none'})")
                array = archive[key]
                if key == "image" and array.ndim == 3 and "label" in found and archive["label"].ndim == 2:
                    array = array[None]  # a slice of several channels, not a stack
                spacing = np.asarray(archive["spacing"], np.float64).ravel() if "spacing" in found else None
    _check_numbers(array, path, "the array")
    affine = PICTURE_AFFINE.copy()
    if spacing is not None:
        if len(spacing) != 3 or not (np.isfinite(spacing).all() and spacing.min() > 0):
            raise InputError(f"{path}: spacing {spacing.tolist()}; three sizes in mm, x y z, above 0 are needed")
        affine[:3, :3] *= spacing
    return Volume(_as_volume(array, path), affine, path=str(path), has_spacing=spacing is not None)


def write_array(array: np.ndarray, temporary: Path) -> None:
    """Writes (i, j, k) or (i, j, k, c) as .npy that `read_array` gives back: (H, W), (H, W, 3) or (D, H, W[, C])."""
    stack = array.transpose((2, 1, 0, *range(3, array.ndim)))
    if len(stack) == 1 and (stack.ndim == 3 or _is_colour(stack[0])) and stack.shape[3:] != (4,):
        stack = stack[0]
    if stack.ndim == 3 and array.ndim == 3 and _is_colour(stack):
        stack = stack[..., None]  # a narrow stack must not be taken for a colour picture
    with open(temporary, "wb") as file:
        np.save(file, np.ascontiguousarray(stack))


def write_medsam(
    path: str | os.PathLike, image: np.ndarray, label: np.ndarray | None, spacing: Sequence[float] | None
) -> None:
    """Writes an .npz as MedSAM's own preprocessing does, whole or not at all.

    image: (N, H, W) or (N, H, W, 3), uint8, or float 0..1, which becomes 0..255: `imgs`. label: (N, H, W), 0..255:
    `gts`; None leaves it out. spacing: voxel size in mm along x, y, z: `spacing`; None where it is not known.
    Raises InputError for other values or shapes.
    """
    if not str(path).lower().endswith(".npz"):
        raise InputError(f"{path}: MedSAM's format needs a name that ends in .npz")
    if image.ndim not in (3, 4) or image.shape[3:] not in ((), (3,)):
        raise InputError(f"{path}: an image of shape {image.shape}; slices (N, H, W), or (N, H, W, 3), are needed")
    if image.dtype != np.uint8:
        low, high = float(image.min(initial=0)), float(image.max(initial=0))
        if image.dtype.kind != "f" or not (low >= 0 and high <= 1):
            raise InputError(f"{path}: an image of {image.dtype}, {low:g}..{high:g}; uint8 or 0..1 is needed")
        image = np.rint(image * 255).astype(np.uint8)
    arrays = {"imgs": image}
    if label is not None:
        label = integers(label, path)
        if label.shape != image.shape[:3] or label.dtype != np.uint8:
            kind = f"{label.dtype} of shape {label.shape}"
            raise InputError(f"{path}: labels {kind}; 0..255 of shape {image.shape[:3]} are needed")
        arrays["gts"] = label
    if spacing is not None:
        arrays["spacing"] = np.asarray(spacing, np.float64).reshape(3)
    with writing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def read_slice(path: str | os.PathLike, index: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads a training slice (.npz with `image`, `label`): image (H, W) or (H, W, C) float32, label (H, W) integer.

    index: the slice of a stack in MedSAM's format (`imgs`, `gts`), whose 0..255 becomes 0..1. Raises
    MissingFileError, or InputError if it is no such archive or its arrays do not fit together.
    """
    path, names = Path(path), {"image": "image", "label": "label"}
    if index is not None:
        names = {"imgs": "image", "gts": "label"}
    with reading(path, "npz archive"), _parsing:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            arrays = {name: archive[key] for key, name in names.items() if key in archive}
            found = " ".join(archive.files)
    if index is not None and len(arrays) == 2:
        if min(map(len, arrays.values())) <= index:
            raise InputError(f"{path}: holds {min(map(len, arrays.values()))} slices, number {index} was asked for")
        arrays = {"image": arrays["image"][index].astype(np.float32) / 255, "label": arrays["label"][index]}
    return _checked(arrays, found, 2, path)


def stack_length(path: str | os.PathLike) -> int | None:
    """Slices of a file in MedSAM's format, from its header alone; None for any other file."""
    try:
        with _parsing, zipfile.ZipFile(path) as archive, archive.open("imgs.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, _ = read(member)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # whoever reads it says what is wrong with it
    return shape[0] if len(shape) >= 3 else None


def write_slice(path: str | os.PathLike, image: np.ndarray, label: np.ndarray) -> None:
    """Writes a training slice: image (H, W) or (H, W, C), stored as float32, and label (H, W) integer, compressed."""
    with writing(path) as temporary:
        np.savez_compressed(temporary, image=image.astype(np.float32, copy=False), label=label)


def read_case(path: str | os.PathLike) -> Case:
    """Reads a test volume (.npy.h5 with `image`, perhaps `label`, perhaps what `write_case` adds).

    image (D, H, W) or (D, H, W, C), label (D, H, W). Raises MissingFileError, or InputError if it is no such file or
    its arrays do not fit together.
    """
    path = Path(path)
    arrays, found, geometry, recipe = _h5_contents(path, ("image", "label"))
    name = re.sub(r"(\.npy)?\.h5$", "", path.name, flags=re.IGNORECASE)
    if "label" in arrays:
        image, label = _checked(arrays, found, 3, path)
        label, ignored = split_ignored(label, recipe)
        return Case(image, label, geometry, recipe, name, ignored)
    blank = np.zeros(np.shape(arrays.get("image"))[:3], np.uint8)
    image, _ = _checked(arrays | {"label": blank}, found, 3, path)
    return Case(image, None, geometry, recipe, name)


def write_case(case: Case, path: str | os.PathLike) -> None:
    """Writes `case` as SAMed's .npy.h5, whole or not at all.

    Datasets `image` (float32) and `label`, compressed slice by slice; attributes `affine` (4, 4), `geometry`
    and `recipe` (JSON) where known. SAMed's own test.py reads these files too.
    """
    import h5py

    content = io.BytesIO()  # HDF5 itself brings the process down when it closes a file on a full disk
    label = None if case.label is None else with_ignored(case.label, case.ignored)
    with h5py.File(content, "w") as file:
        for key, array in (("image", case.image.astype(np.float32, copy=False)), ("label", label)):
            if array is not None:
                pack = dict(chunks=(1, *array.shape[1:]), compression="gzip", compression_opts=1)
                file.create_dataset(key, data=array, **pack)
        if case.geometry is not None:
            file.attrs["affine"] = case.geometry.affine
            file.attrs["geometry"] = json.dumps(case.geometry.to_dict())
        if case.recipe is not None:
            file.attrs["recipe"] = json.dumps(case.recipe)
    with writing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_h5(path: Path, labels: bool) -> Volume:
    """Reads `image`, or `label`, of an HDF5 file, as `read_array` describes it."""
    key = "label" if labels else "image"
    arrays, found, geometry, _ = _h5_contents(path, (key,))
    if key not in arrays:
        raise InputError(f"{path}: no array named {key!r} in it (found: {found or 'none'})")
    _check_numbers(arrays[key], path, repr(key))
    stack = arrays[key][None] if arrays[key].ndim == 2 else arrays[key]
    if stack.ndim not in (3, 4):
        raise InputError(f"{path}: {key!r} has shape {stack.shape}; (H, W), (D, H, W) or (D, H, W, C) is needed")
    volume = case_to_volume(Case(stack, None, geometry, name=str(path)), stack)
    volume.path = str(path)
    return volume


def _h5_contents(path: Path, keys: Sequence[str]) -> tuple[dict, str, Geometry | None, dict | None]:
    """The arrays named `keys` that are there, the names of all, the geometry and the recipe."""
    import h5py

    with reading(path, "HDF5"), h5py.File(path, "r") as file:
        arrays = {key: file[key][()] for key in keys if key in file}
        recipe = json.loads(file.attrs["recipe"]) if "recipe" in file.attrs else None
        geometry = None
        if "geometry" in file.attrs:
            geometry = Geometry.from_dict(json.loads(file.attrs["geometry"]))
        return arrays, " ".join(file), geometry, recipe


def _as_volume(array: np.ndarray, path: Path) -> np.ndarray:
    """(H, W), (H, W, 3 or 4), (D, H, W) or (D, H, W, C) as (i, j, k) or (i, j, k, c)."""
    if array.ndim == 3 and _is_colour(array):
        array = array[..., :3]
        return array.transpose(1, 0, 2)[:, :, None]
    if array.ndim == 2:
        array = array[None]
    if array.ndim not in (3, 4):
        raise InputError(f"{path}: shape {array.shape}; (H, W), (H, W, 3), (D, H, W) or (D, H, W, C) is needed")
    return array.transpose((2, 1, 0, *range(3, array.ndim)))


def _is_colour(array: np.ndarray) -> bool:
    return array.shape[2] in (3, 4) and min(array.shape[:2]) > 4


def _check_numbers(array: np.ndarray, path: Path, name: str) -> None:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        kind = getattr(array, "dtype", type(array).__name__)
        raise InputError(f"{path}: {name} holds {kind}; an array of numbers is needed")


def _checked(arrays: dict, found: str, ndim: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """image float32 and label integer, after everything that can be wrong with them; ndim: the axes of the label."""
    for key, allowed in (("image", (ndim, ndim + 1)), ("label", (ndim,))):
        if key not in arrays:
            raise InputError(f"{path}: no array named {key!r} in it (found: {found or 'none'})")
        array = arrays[key]
        _check_numbers(array, path, repr(key))
        if array.ndim not in allowed or not array.size:
            raise InputError(f"{path}: {key!r} has shape {array.shape}; {ndim} axes, none empty, are needed")
    image, label = arrays["image"], arrays["label"]
    check_finite(image, path)
    check_finite(label, path)
    if image.shape[:ndim] != label.shape:
        raise InputError(f"{path}: image of shape {image.shape}, label of shape {label.shape}; must be equal")
    return image.astype(np.float32, copy=False), integers(label, path)
