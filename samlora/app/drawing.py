"""Drawing on the labels of one slice."""

from collections.abc import Sequence

import numpy as np

from samlora.errors import InputError

_MOST_RADIUS = 512


def painted(ground: np.ndarray, mask: np.ndarray, label: int, keep: bool) -> np.ndarray:
    """A copy of the labels `ground` with `mask` drawn as `label`; with `keep` not over other labels."""
    drawn = ground.copy()
    drawn[mask & ((ground == 0) | (not keep))] = label
    return drawn


def box_within(box: Sequence[float], shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box of two corners as x0, y0, x1, y1 within a slice of `shape` (H, W).

    Raises InputError if it is none, or nothing of it lies there.
    """
    if len(box) != 4 or not np.isfinite(box).all():
        raise InputError(f"box {list(box)}: four numbers x0, y0, x1, y1 are needed")
    x0, x1 = sorted(np.clip((box[0], box[2]), 0, shape[1] - 1))
    y0, y1 = sorted(np.clip((box[1], box[3]), 0, shape[0] - 1))
    if x1 - x0 < 1 or y1 - y0 < 1:
        raise InputError(f"box {[round(float(v), 1) for v in box]}: smaller than a pixel within the slice")
    return float(x0), float(y0), float(x1), float(y1)


def stroke(
    shape: tuple[int, int], path: Sequence[Sequence[float]] | np.ndarray, radius: float, aspect: float
) -> np.ndarray:
    """The pixels, bool (H, W), whose centres lie within `radius` columns of a path of points (x, y).

    aspect: height of a pixel over its width; distances are those that are seen. Raises InputError for a radius that
    cannot be, or no path.
    """
    if not 0 < radius <= _MOST_RADIUS:
        raise InputError(f"brush of radius {radius:g}: more than 0, at most {_MOST_RADIUS} pixels are possible")
    path = np.asarray(path, np.float64)
    if path.ndim != 2 or path.shape[1] != 2 or not len(path) or not (np.abs(path) < 1e6).all():
        raise InputError("brush: a path of points (x, y) is needed")
    mask = np.zeros(shape, bool)
    stretch, size = np.array((1.0, aspect)), np.array(shape[::-1])
    for start, end in zip(path, path[1:] if len(path) > 1 else path):
        low = np.floor(np.minimum(start, end) - radius / stretch).astype(int).clip(0, size)
        high = (np.ceil(np.maximum(start, end) + radius / stretch).astype(int) + 1).clip(0, size)
        box = slice(low[1], high[1]), slice(low[0], high[0])
        y, x = np.mgrid[box]
        way = (end - start) * stretch
        off = np.stack([x - start[0], (y - start[1]) * aspect], axis=-1)
        share = (off @ way / max(way @ way, 1e-12)).clip(0, 1)
        mask[box] |= np.hypot(*np.moveaxis(off - share[..., None] * way, -1, 0)) <= radius
    return mask
