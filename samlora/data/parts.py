"""Connected parts of masks: parts touch where voxels share a face (in 2D: an edge)."""

import numpy as np


def drop_small(mask: np.ndarray, least: float) -> np.ndarray:
    """A bool mask of any number of axes without its parts of fewer than `least` voxels."""
    from scipy.ndimage import label

    parts, count = label(mask)
    if not count:
        return mask
    large = np.bincount(parts.ravel()) >= least
    large[0] = False
    return large[parts]


def keep_largest(mask: np.ndarray) -> np.ndarray:
    """A bool mask reduced to its largest part; of equals, the one that comes first in memory order."""
    from scipy.ndimage import label

    parts, count = label(mask)
    return mask if count < 2 else parts == np.bincount(parts.ravel())[1:].argmax() + 1


def drop_small_parts(labels: np.ndarray, min_voxels: int, min_pixels: int) -> np.ndarray:
    """A label map (D, H, W) without the parts of a class that are too small; they become background.

    min_voxels: least size of a part in 3D. min_pixels: least size, after that, of a part within one slice.
    """
    from scipy.ndimage import find_objects

    kept = labels.copy()
    for value, box in enumerate(find_objects(labels), start=1):
        if box is None:
            continue
        mask = labels[box] == value
        large = drop_small(mask, min_voxels)
        large = np.stack([drop_small(layer, min_pixels) for layer in large])
        kept[box][mask & ~large] = 0
    return kept
