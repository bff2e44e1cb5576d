"""Pictures (PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000) as volumes of one slice, or of one slice per page."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samlora.data.grid import Volume
from samlora.data.opening import reading
from samlora.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".j2k")
# A picture says nothing about the patient: right of the picture = patient's left, down = back, as a CT slice is shown.
PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")
_LOSSY = ("JPEG", "MPO", "JPEG2000")  # WebP may be either
# Types of TIFF that Pillow reads as they are. It takes int8 for uint8 and uint32 for int32, and knows none of 64 bits.
_PILLOWS = ("bool", "uint8", "uint16", "int16", "int32", "float32")
_GRAY = ("L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_NOISE = 64  # between the channels of a gray JPEG, which stores colour apart and coarsely


def is_lossy(path: Path) -> bool:
    """Whether a picture's format changes values, so that a mask needs a threshold; by its ending and first bytes."""
    ending = path.suffix.lower()
    if ending == ".webp":
        with open(path, "rb") as file:
            return b"VP8L" not in file.read(4096)
    return ending in (".jpg", ".jpeg", ".jp2", ".j2k")


def palette_colours(path: Path) -> dict[int, tuple[str, ...]]:
    """The values of a palette picture and their colours, as #rrggbb; empty for any other file."""
    from PIL import Image

    if not path.name.lower().endswith((".png", ".tif", ".tiff", ".bmp", ".gif")):
        return {}
    try:
        with open(path, "rb") as stream, Image.open(stream, formats=_FORMATS) as file:
            if file.mode != "P":
                return {}
            shown = [value for _, value in file.getcolors(256) if value]
            colours = np.asarray(file.getpalette("RGB"), np.uint8).reshape(-1, 3)
    except (OSError, ValueError, TypeError):
        return {}  # whoever reads it says what is wrong with it
    named = {value: colours[value].tolist() for value in shown if value < len(colours)}
    return {value: ("#{:02x}{:02x}{:02x}".format(*colour),) for value, colour in named.items()}


def read_picture(path: Path, labels: bool, threshold: float | None) -> Volume:
    """Reads a picture of H x W pixels as (W, H, pages), or (W, H, pages, 3) if it has colours.

    The turn that cameras note beside the pixels (EXIF) is carried out, for labels too: masks usually have no such
    note and must be drawn on the turned picture. Transparency is dropped. Labels are (W, H, pages): the numbers of
    palette pictures, 0 and 1 of 1-bit ones (0 and 255 where there is a threshold, as of any other mask); gray stored as
    three equal channels is taken as one.
    Raises InputError if it is no picture, is cut short or too large, or (labels) has colours, or is a JPEG without
    a threshold.
    """
    from PIL import Image, ImageOps, ImageSequence

    unusual = _read_tiff(path, labels)
    if unusual is not None:
        return unusual
    with reading(path, "picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # above twice that size it is an error
        # Not by name: Pillow would map uncompressed TIFFs into memory, and turned ones with their sides exchanged.
        with open(path, "rb") as stream, Image.open(stream, formats=_FORMATS) as file:
            lossy = file.format in _LOSSY or file.info.get("compression") == "jpeg"
            lossy = lossy or (file.format == "WEBP" and is_lossy(path))
            moving = getattr(file, "n_frames", 1) > 1 and file.format in ("GIF", "WEBP", "PNG")
            if moving and (labels or file.format != "GIF"):
                raise InputError(f"{path}: holds {file.n_frames} pictures; save each as a file of its own, or as TIFF")
            deep = ";16" in str(file.tile[0][3]) if file.tile else False
            if labels and lossy and threshold is None:
                advice = "set mask_threshold: 127 in the recipe, or save masks as PNG"
                raise InputError(f"{path}: {file.format} changes label values; {advice}")
            if labels and deep and file.mode not in _GRAY:
                raise InputError(f"{path}: a mask with 16 bits per colour; save it as gray, one number per class")
            pages = _frames(file) if moving else []
            still = (file,) if not moving else ()
            for page in ImageSequence.Iterator(file) if file.format == "TIFF" else still:
                turned = ImageOps.exif_transpose(page)
                pages.append(_labels(turned, path, lossy, threshold) if labels else _image(turned))
    if len({page.shape for page in pages}) > 1:
        sizes = " ".join(sorted({" x ".join(map(str, page.shape)) for page in pages}))
        raise InputError(f"{path}: its pages differ in size or colours ({sizes}); save them as files of their own")
    array = np.stack(pages)
    array = array.transpose((2, 1, 0, *range(3, array.ndim)))
    return Volume(array, PICTURE_AFFINE.copy(), path=str(path), has_spacing=False)


def _read_tiff(path: Path, labels: bool) -> Volume | None:
    """A TIFF that Pillow does not read, or reads with other values; None for those that it reads, and other files."""
    with open(path, "rb") as file:
        mark = file.read(4)
    if mark not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in file.pages if not getattr(page, "is_reduced", False)]
            kinds = {str(page.dtype) for page in pages}
            usual = pages[0].samplesperpixel in (1, 3, 4) and kinds <= {*_PILLOWS, "None"}
            if usual and not (file.is_bigtiff and file.byteorder == ">"):
                return None
            with reading(path, "TIFF"):
                arrays = [_tiff_page(page, path, labels) for page in pages]
    except InputError:
        raise
    except Exception:  # a broken file: Pillow says what is wrong with it
        return None
    if len({array.shape for array in arrays}) > 1:
        raise InputError(f"{path}: its pages differ in size or colours; save them as files of their own")
    array = np.stack(arrays)
    array = array.transpose((2, 1, 0, *range(3, array.ndim)))
    return Volume(array, PICTURE_AFFINE.copy(), path=str(path), has_spacing=False)


def _tiff_page(page, path: Path, labels: bool) -> np.ndarray:
    """(H, W), or (H, W, channels), of a page as tifffile reads it; transparency is dropped."""
    try:
        array = page.asarray()
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        kind = f"{page.dtype} with compression {page.compression.name}"
        raise InputError(f"{path}: {kind} is not read; save it without compression") from None
    if array.ndim == 3 and page.axes[0] == "S":
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] in (2, 4) and page.extrasamples:
        array = array[..., :-1]
    if array.ndim == 3 and (array.shape[2] == 1 or (labels and _equal_channels(array))):
        array = array[..., 0]
    return array


def write_picture(
    array: np.ndarray, temporary: Path, path: str, palette: Sequence[tuple[int, int, int]] | None
) -> None:
    """Writes (W, H, pages) or (W, H, 1, 3) to `temporary`, as the ending of `path` says; the inverse of `read_picture`.

    palette: the colours of labels 1, 2, ...; the numbers of the pixels stay the labels, 0 is black. Pages beyond the
    first need TIFF. Raises InputError for what the format cannot hold exactly.
    """
    from PIL import Image

    deep = array.dtype == np.uint16 and array.ndim == 3 and palette is None and not path.lower().endswith(".bmp")
    if not (array.dtype == np.uint8 or deep) or array.shape[3:] not in ((), (3,)):
        kind = f"{array.dtype} of shape {array.shape}"
        raise InputError(f"{path}: a picture cannot hold {kind}; scale gray or RGB to 0..255, or choose .nii.gz")
    if array.shape[2] > 1 and not path.lower().endswith((".tif", ".tiff")):
        raise InputError(f"{path}: {array.shape[2]} slices do not fit in one picture; choose .tif or .nii.gz")
    highest = int(array.max(initial=0))
    if palette is not None and highest > len(palette):
        raise InputError(f"{path}: label {highest}, but {len(palette)} colours; one colour per class is needed")
    pages = []
    for page in array.transpose((2, 1, 0, *range(3, array.ndim))):
        picture = Image.fromarray(np.ascontiguousarray(page))
        if palette is not None:
            picture = Image.frombytes("P", picture.size, picture.tobytes())
            picture.putpalette([0, 0, 0, *(value for colour in palette for value in colour)])
        pages.append(picture)
    if path.lower().endswith((".tif", ".tiff")):
        pages[0].save(temporary, save_all=True, append_images=pages[1:], compression="tiff_deflate")
    else:
        pages[0].save(temporary)


def _image(picture) -> np.ndarray:
    """(H, W), or (H, W, 3) for colours."""
    if picture.mode in _GRAY:
        return np.asarray(picture)
    if picture.mode in ("1", "LA", "La"):
        return np.asarray(picture.convert("L"))
    if picture.mode in ("P", "PA"):
        array = np.asarray(picture.convert("RGBA").convert("RGB"))
        return array[..., 0] if _equal_channels(array) else array
    return np.asarray(picture.convert("RGB"))


def _frames(file) -> list[np.ndarray]:
    """The pictures of a GIF, all gray or all in colours: each may have a palette of its own."""
    from PIL import ImageSequence

    pages = [np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(file)]
    return [page[..., 0] for page in pages] if all(map(_equal_channels, pages)) else pages


def _labels(picture, path: Path, lossy: bool, threshold: float | None) -> np.ndarray:
    """(H, W): the numbers that stand for the classes."""
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8) * np.uint8(1 if threshold is None else 255)
    if picture.mode in ("P", "PA"):
        array = np.asarray(picture)
        return array if array.ndim == 2 else array[..., 0]
    array = _image(picture)
    if array.ndim == 2:
        return array
    if _equal_channels(array, _NOISE if lossy else 0):
        return np.asarray(picture.convert("L")) if lossy else array[..., 0]
    shown = np.unique(array.reshape(-1, 3), axis=0)
    colours = " ".join(f"({r}, {g}, {b})" for r, g, b in shown[:4]) + (" ..." if len(shown) > 4 else "")
    raise InputError(
        f"{path}: a mask of {len(shown)} colours, {colours}; save masks with one number per class or one file per class"
    )


def _equal_channels(array: np.ndarray, apart: int = 0) -> bool:
    return int(np.ptp(array, axis=-1).max(initial=0)) <= apart
