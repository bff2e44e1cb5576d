"""Prompts as a caller gives them, checked: one or several, within the image, in shapes that fit together."""

from typing import NamedTuple

import numpy as np

from samlora.errors import InputError


class Asked(NamedTuple):
    """P prompts, in pixels of the image.

    points: (P, N, 2) float64 with labels (P, N) int64. boxes: (P, 4) float64. masks: (P, 1, L, L) float32. None for
    what was not given. many: whether P was given, or one prompt by itself.
    """

    points: np.ndarray | None
    labels: np.ndarray | None
    boxes: np.ndarray | None
    masks: np.ndarray | None
    count: int
    many: bool


def check_prompts(points, labels, box, mask, shape: tuple[int, int], low_side: int) -> Asked:
    """The prompts of `Predictor.predict` for an image of `shape` (H, W) and logits of side `low_side`, L.

    Raises InputError for nothing at all, what lies outside of the image, and shapes that do not fit.
    """
    height, width = shape
    points, labels = _checked_points(points, labels, width, height)
    given = [(points, 3), (_checked_boxes(box, width, height), 2), (_checked_logits(mask, low_side), 4)]
    there = [(array, axes) for array, axes in given if array is not None]
    if not there:
        raise InputError("nothing to predict from: give points, a box or a mask")
    points, boxes, masks = (x if x is None or x.ndim == axes else x[None] for x, axes in given)
    labels = labels if labels is None or labels.ndim == 2 else labels[None]
    counts = {len(x) for x in (points, boxes, masks) if x is not None}
    if len(counts) > 1:
        shapes = ", ".join(str(array.shape) for array, _ in there)
        raise InputError(f"prompts of shapes {shapes}: as many of each kind are needed")
    return Asked(points, labels, boxes, masks, counts.pop(), any(array.ndim == axes for array, axes in there))


def _numbers(given, what: str, dtype: type | None) -> np.ndarray:
    """What a caller gives, an array, a list or a tensor, as an array. Raises InputError where it holds no numbers."""
    try:
        return np.asarray(given, dtype)
    except (TypeError, ValueError):
        shown = str(given)[:60]
        raise InputError(f"{what}: {shown!r} is no array of numbers; lists of one length are needed") from None


def _checked_points(points, labels, width: int, height: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(N, 2) or (P, N, 2) float64 and labels (N,) or (P, N) int64."""
    if points is None:
        if labels is not None:
            raise InputError("labels without points; give both, or neither")
        return None, None
    points = _numbers(points, "points", np.float64)
    if points.ndim not in (2, 3) or points.shape[-1] != 2 or not points.size:
        raise InputError(f"points of shape {points.shape}: (N, 2), or (P, N, 2) for P prompts, is needed")
    labels = np.ones(points.shape[:-1], np.int64) if labels is None else _numbers(labels, "labels", None)
    if labels.shape != points.shape[:-1]:
        raise InputError(
            f"labels of shape {labels.shape} for points of shape {points.shape}; one label a point is needed"
        )
    if not np.isin(labels, (-1, 0, 1)).all():
        raise InputError(
            f"labels {np.unique(labels)[:5].tolist()}: 1 (object), 0 (beside it) or -1 (no point) are allowed"
        )
    outside = ~((points >= 0) & (points < (width, height))).all(axis=-1) & (labels >= 0)
    if outside.any():
        x, y = points[outside][0]
        raise InputError(f"point ({x:g}, {y:g}): lies outside the image of {width} x {height} pixels (x, y from 0)")
    return points, labels.astype(np.int64)


def _checked_boxes(boxes, width: int, height: int) -> np.ndarray | None:
    if boxes is None:
        return None
    boxes = _numbers(boxes, "a box", np.float64)
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4 or not boxes.size:
        raise InputError(f"a box of shape {boxes.shape}: (4,), or (P, 4) for P prompts, is needed")
    rows = boxes.reshape(-1, 4)
    good = (rows >= 0) & (rows <= (width, height) * 2)
    good = good.all(axis=1) & (rows[:, :2] <= rows[:, 2:]).all(axis=1)
    if not good.all():
        box = " ".join(f"{value:g}" for value in rows[~good][0])
        raise InputError(
            f"box {box}: x0 y0 x1 y1 with x0 <= x1 and y0 <= y1 within the image of {width} x {height} pixels is needed"
        )
    return boxes


def _checked_logits(mask, side: int) -> np.ndarray | None:
    """(1, L, L) or (P, 1, L, L) float32."""
    if mask is None:
        return None
    mask = _numbers(mask, "a mask", np.float32)
    if mask.shape[-2:] != (side, side) or mask.ndim > 4 or (mask.ndim == 4 and mask.shape[1] != 1):
        raise InputError(
            f"a mask of shape {mask.shape}: logits ({side}, {side}) of an earlier answer are needed; "
            "as_prompt() makes them of a mask on the image's pixels"
        )
    if not np.isfinite(mask).all():
        raise InputError("a mask that holds NaN or infinite values: logits of an earlier answer are needed")
    if mask.ndim == 2:
        return mask[None]
    return mask[:, None] if mask.ndim == 3 and len(mask) > 1 else mask
