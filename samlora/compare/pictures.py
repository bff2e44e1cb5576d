"""The same slices by all systems: the reference as an outline, what each found as a fill."""

import base64
import io

import numpy as np

from samlora.colours import class_colour
from samlora.compare.job import Held
from samlora.data.grid import to_show

_SIDE = 210  # pixels of a picture's longer side
_OPACITY = 0.5
_MARGIN = 0.15  # of what is labelled, around it


def picture(held: Held, fill: np.ndarray | None) -> str:
    """A data URI of the shown slice, cropped to the surroundings of the reference.

    fill: (H, W) labels to fill, None for the image and the reference alone.
    """
    from PIL import Image

    gray = to_show(held.images)[held.shown]
    truth = held.truth[held.shown]
    rows, columns = _box(truth)
    display = held.display
    order = tuple(slice(None, None, -1) if display[flip] else slice(None) for flip in ("flip_ud", "flip_lr"))
    height, width = (rows.stop - rows.start) * display["aspect"], columns.stop - columns.start
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def scaled(array: np.ndarray, how: int) -> np.ndarray:
        part = np.ascontiguousarray(array[rows, columns][order])
        return np.asarray(Image.fromarray(part).resize(size, how))

    values = scaled(np.rint(255 * np.clip(np.nan_to_num(gray), 0, 1)).astype(np.uint8), Image.Resampling.BILINEAR)
    pixels = np.repeat(values[..., None].astype(np.float32), 3, axis=2)
    nearest = Image.Resampling.NEAREST
    if fill is not None:
        found = scaled(fill.astype(np.uint8), nearest)
        for label in np.unique(found[found > 0]):
            colour = 255 * np.array(class_colour(int(label)), np.float32)
            pixels[found == label] = (1 - _OPACITY) * pixels[found == label] + _OPACITY * colour
    outlined = scaled(truth.astype(np.uint8), nearest)
    for label in np.unique(outlined[outlined > 0]):
        edge = _edge(outlined == label)
        pixels[edge] = 255 * np.array(class_colour(int(label)), np.float32)
    file = io.BytesIO()
    Image.fromarray(np.rint(pixels).astype(np.uint8)).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _edge(mask: np.ndarray) -> np.ndarray:
    """The inner edge of a mask, two pixels wide."""
    from scipy.ndimage import binary_erosion

    return mask & ~binary_erosion(mask, iterations=2)


def _box(labels: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns around what is labelled, with a margin; all of them where nothing is."""
    sides = []
    for axis, total in enumerate(labels.shape):
        found = np.flatnonzero(labels.any(axis=1 - axis))
        if not found.size:
            return slice(0, labels.shape[0]), slice(0, labels.shape[1])
        margin = max(round(_MARGIN * (found[-1] - found[0])), total // 12, 8)
        sides.append(slice(max(0, int(found[0]) - margin), min(total, int(found[-1]) + 1 + margin)))
    return tuple(sides)
