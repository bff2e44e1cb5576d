"""What callers of public functions hand in, checked before it is used: arrays, volumes, whole numbers."""

import numpy as np

from samlora.data.grid import Case, Volume
from samlora.errors import InputError


def check_array(array: object, what: str, axes: tuple[int, ...], shapes: str) -> np.ndarray:
    """`array`, if it is a NumPy array of numbers with one of these counts of axes that holds something.

    what: how messages call it. shapes: the shapes that are possible, for messages. Raises InputError for anything else:
    lists, PIL images and tensors of torch are not converted, as their order of axes and range of values differ.
    """
    if not isinstance(array, np.ndarray):
        raise InputError(f"{what}: is of type {kind_of(array)}; a NumPy array {shapes} is needed: numpy.asarray(...)")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what}: holds values of type {array.dtype}; an array of numbers is needed")
    if array.ndim not in axes or not array.size:
        raise InputError(f"{what}: has shape {array.shape}; {shapes} is needed")
    return array


def check_picture(image: object, what: str, channels: int | None = 3) -> np.ndarray:
    """A picture (H, W) or (H, W, C), uint8 or float in 0..1, as an array of `channels`; transparency is dropped.

    channels: those that are used, gray always being possible; None for any. Raises InputError for anything else.
    """
    shapes = "(H, W) or (H, W, C)" if channels is None else f"(H, W) or (H, W, {channels})"
    array = check_array(image, what, (2, 3), shapes)
    if array.ndim == 3 and channels is not None and array.shape[2] != channels:
        found = array.shape[2]
        if found == 1 or (channels == 3 and found == 2):  # gray, perhaps with transparency
            array = array[..., 0]
        elif channels == 3 and found == 4:
            array = array[..., :3]
        else:
            first = array.shape[0] in (1, 3, 4, channels)
            advice = "; move the channels to the end: numpy.moveaxis(image, 0, -1)" if first else ""
            raise InputError(f"{what}: has shape {array.shape}; {shapes} is needed{advice}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN too
            raise InputError(f"{what}: has values {low:g}..{high:g}; uint8, or float in 0..1, is needed")
    elif array.dtype != np.uint8:
        raise InputError(f"{what}: is of type {array.dtype}; uint8, or float in 0..1, is needed")
    return array


def check_mask(mask: object, what: str, shape: tuple[int, int]) -> np.ndarray:
    """A mask as bool (H, W) of `shape`, true where it is not 0. Raises InputError for anything else."""
    array = check_array(mask, what, (2,), "(H, W)")
    if array.shape != tuple(shape):
        raise InputError(f"{what}: has shape {array.shape}; {tuple(shape)}, as the image, is needed")
    return array != 0


def check_volume(volume: Volume) -> Volume:
    """A volume that somebody has put together. Raises InputError where its array or affine cannot be used."""
    name = volume.path or "the volume"
    check_array(volume.array, f"{name}: its array", (3, 4), "(i, j, k), or (i, j, k, c) with channels,")
    affine = np.asarray(volume.affine)
    if affine.shape != (4, 4) or affine.dtype.kind not in "iuf" or not np.isfinite(affine).all():
        raise InputError(f"{name}: its affine is no (4, 4) array of finite numbers; it maps voxels to mm")
    if abs(np.linalg.det(affine[:3, :3])) == 0:
        raise InputError(f"{name}: its affine places voxels on top of each other; repair it")
    return volume


def check_case(case: Case) -> Case:
    """A case that somebody has put together. Raises InputError where its image cannot be used."""
    name = f"case {case.name}" if case.name else "the case"
    image = check_array(case.image, f"{name}: its image", (3, 4), "(D, H, W) or (D, H, W, C)")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InputError(f"{name}: its image holds NaN or infinite values; replace them")
    return case


def whole_number(value: object, what: str, least: int) -> int:
    """`value` as an int of at least `least`. Raises InputError for anything else, such as 1.5, "2" or None."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{what} {value!r} is not possible; a whole number, {least} or more, is needed")
    return int(value)


def kind_of(value: object) -> str:
    """The type of something, as its users call it."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
