"""Prompts as a person would give them, drawn from masks: boxes, points, and the clicks that correct a prediction.

Points are (x, y), boxes (x0, y0, x1, y1), float32, in pixels of the mask: whole numbers are the middles of pixels, so a
box ends on the last column and row of its mask. Whatever is random comes from the generator that is given. Where a mask
has no pixel, what is asked of it does not exist: InputError.
"""

from collections.abc import Sequence

import numpy as np

from samlora.errors import InputError

STRATEGIES = ("random", "distance", "entropy", "centre")


def objects(label_map: np.ndarray, min_pixels: int = 1, parts: bool = True) -> list[tuple[int, np.ndarray]]:
    """The objects of a label map (H, W), background 0: class and mask (H, W) bool of each, by class, largest first.

    parts: each connected part of a class (pixels share an edge) is an object of its own; else each class is one.
    min_pixels: smaller objects are left out. An empty map gives an empty list.
    """
    from scipy.ndimage import label

    found = []
    for value in np.unique(label_map[label_map != 0]).tolist():
        mask = label_map == value
        numbered, count = label(mask) if parts else (mask.astype(np.uint8), 1)
        sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
        order = np.argsort(-sizes, kind="stable")
        found += [(value, numbered == n + 1) for n in order if sizes[n] >= min_pixels]
    return found


def tight_box(mask: np.ndarray) -> np.ndarray:
    """The box (4,) of a mask (H, W): its first and last column and row. Raises InputError for an empty mask."""
    rows, cols = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise InputError(f"an empty mask of {mask.shape[0]} x {mask.shape[1]} pixels has no box; leave it out")
    return np.array([cols[0], rows[0], cols[-1], rows[-1]], np.float32)


def jittered_box(mask: np.ndarray, pixels: int, generator: np.random.Generator) -> np.ndarray:
    """The box (4,) of a mask, each side moved outwards by 0 to `pixels`, as far as the image goes.

    So MedSAM trains (arXiv 2304.12306): people draw boxes around things. Raises InputError for an empty mask.
    """
    height, width = mask.shape
    moved = tight_box(mask) + generator.integers(0, pixels, 4, endpoint=True) * (-1, -1, 1, 1)
    return np.clip(moved, 0, (width - 1, height - 1) * 2).astype(np.float32)


def full_box(shape: tuple[int, int]) -> np.ndarray:
    """The box (4,) of a whole image of `shape` (H, W)."""
    return np.array([0, 0, shape[1] - 1, shape[0] - 1], np.float32)


def random_points(mask: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` points (count, 2) of a mask, all pixels alike; none twice while there are enough.

    Raises InputError for an empty mask.
    """
    places = _places(mask)
    return places[generator.choice(len(places), count, replace=count > len(places))]


def central_point(mask: np.ndarray) -> np.ndarray:
    """The point (2,) of a mask farthest from all that is outside of it; what is beyond the image is outside.

    Of equals, the first in memory order. Raises InputError for an empty mask.
    """
    _places(mask)
    return _deepest(mask)


def distant_points(
    mask: np.ndarray, count: int, generator: np.random.Generator, given: np.ndarray | None = None
) -> np.ndarray:
    """`count` points (count, 2) of a mask, each the pixel farthest from its nearest point so far.

    given: (K, 2) points to keep away from; None to begin with a random one. Raises InputError for an empty mask.
    """
    places, chosen = _places(mask), []
    nearest = np.full(len(places), np.inf)
    for point in [] if given is None else np.asarray(given, np.float32).reshape(-1, 2):
        nearest = np.minimum(nearest, ((places - point) ** 2).sum(axis=1))
    for _ in range(count):
        first = np.isinf(nearest[0])
        chosen.append(places[generator.integers(len(places)) if first else nearest.argmax()])
        nearest = np.minimum(nearest, ((places - chosen[-1]) ** 2).sum(axis=1))
    return np.array(chosen, np.float32).reshape(-1, 2)


def uncertain_points(
    probability: np.ndarray, count: int, generator: np.random.Generator, apart: float = 0.0
) -> np.ndarray:
    """`count` points (count, 2) of an image where a prediction is least sure: maximum entropy, p closest to 0.5.

    probability: (H, W) in 0..1. apart: pixels that the points keep from each other while there is room. Equals are
    drawn by chance.
    """
    places = _places(np.ones(probability.shape, bool))
    doubt = np.abs(probability.astype(np.float64).ravel() - 0.5)
    order = np.lexsort((generator.random(len(doubt)), doubt))
    if not apart:
        return places[order[:count]]
    chosen: list[np.ndarray] = []
    free = np.ones(len(places), bool)
    while len(chosen) < count:
        if not free.any():
            free[:] = True
        chosen.append(places[order[free[order].argmax()]])
        free &= ((places - chosen[-1]) ** 2).sum(axis=1) > apart**2
    return np.array(chosen, np.float32)


def sample_points(
    mask: np.ndarray,
    positive: int,
    negative: int,
    strategy: str,
    generator: np.random.Generator,
    probability: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Points (positive + negative, 2) and labels int64, 1 on the mask and 0 beside it, by one of STRATEGIES.

    "random"; "distance": each the farthest from those before; "centre": the centre-most pixel first, then as
    "distance"; "entropy": all where `probability`, (H, W), is least sure, and the mask says which label. Of a mask that
    fills the image the negative points are (0, 0) with label -1: no point.
    Raises InputError for an empty mask, an unknown strategy, or "entropy" without a probability.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"point strategy {strategy!r} is unknown; allowed: {', '.join(STRATEGIES)}")
    _places(mask)
    if strategy == "entropy":
        if probability is None:
            raise InputError(
                "point strategy 'entropy' goes by the probabilities that a model answered, and there are none; give "
                f"them, or one of: {', '.join(name for name in STRATEGIES if name != 'entropy')}"
            )
        points = uncertain_points(probability, positive + negative, generator)
        return points, _at(mask, points).astype(np.int64)
    parts, labels = [], []
    for area, count, label in ((mask, positive, 1), (~mask, negative, 0)):
        exists = area.any()
        parts.append(_chosen(area, count, strategy, generator) if exists else np.zeros((count, 2), np.float32))
        labels += [label if exists else -1] * count
    return np.concatenate(parts), np.array(labels, np.int64)


def next_click(
    truth: np.ndarray, prediction: np.ndarray, clicked: Sequence | np.ndarray | None = None
) -> tuple[np.ndarray, int] | None:
    """Where a person would click next, (2,), and 1 (missing, so positive) or 0 (too much, so negative).

    The centre-most pixel of the largest connected region of error, pixels clicked before (K, 2) left out, as in Xu et
    al. (arXiv 1603.04042) and the evaluation of interactive segmentation since. truth, prediction: (H, W) bool. None
    where nothing is left to correct.
    """
    from scipy.ndimage import label

    largest, best, kind = 0, None, 0
    for positive, errors in ((1, truth & ~prediction), (0, prediction & ~truth)):
        numbered, count = label(errors)
        if count:
            sizes = np.bincount(numbered.ravel())[1:]
            if sizes.max() > largest:
                largest, best, kind = int(sizes.max()), numbered == sizes.argmax() + 1, positive
    if best is None:
        return None
    if clicked is not None and len(clicked):
        cols, rows = np.rint(np.asarray(clicked, np.float64)).astype(int).reshape(-1, 2).T
        spared = best.copy()
        spared[rows, cols] = False
        best = spared if spared.any() else best
    return _deepest(best), kind


def _chosen(area: np.ndarray, count: int, strategy: str, generator: np.random.Generator) -> np.ndarray:
    if strategy == "distance":
        return distant_points(area, count, generator)
    if strategy == "centre" and count:
        first = central_point(area)[None]
        return np.concatenate([first, distant_points(area, count - 1, generator, first)])
    return random_points(area, count, generator)


def _places(mask: np.ndarray) -> np.ndarray:
    """(n, 2) float32 x, y of the pixels of a mask, in memory order."""
    places = np.argwhere(mask)[:, ::-1]
    if not len(places):
        raise InputError(f"an empty mask of {mask.shape[0]} x {mask.shape[1]} pixels has no points; leave it out")
    return places.astype(np.float32)


def _at(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    cols, rows = points.astype(int).T
    return mask[rows, cols]


def _deepest(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, col = np.unravel_index(depth.argmax(), depth.shape)
    return np.array([col, row], np.float32)
