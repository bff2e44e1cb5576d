"""Resizing and augmentation: sampled once per sample, applied to a batch on any device.

Everything here gives what scipy.ndimage gives, bit for bit up to float32 rounding, as one matrix product or
one gather. That includes a habit of scipy: where rounding carries the last position of a zoom past the border
(512 -> 224 is such a size), scipy fills the last row and column with 0, in images and labels alike.
"""

import functools
from dataclasses import dataclass

import numpy as np


@functools.lru_cache(maxsize=64)
def zoom_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float64 matrix W with scipy.ndimage.zoom(x, order=3) == W @ x along one axis.

    Cubic spline zoom is linear and separable, so a whole image is W_rows @ image @ W_cols.T.
    """
    from scipy.ndimage import zoom

    matrix = np.eye(source) if source == target else zoom(np.eye(source), (target / source, 1), order=3)
    matrix.setflags(write=False)  # cached: shared by every caller
    return matrix


@functools.lru_cache(maxsize=64)
def nearest_index(source: int, target: int) -> np.ndarray:
    """(target,) int64 positions of scipy.ndimage.zoom(x, order=0) along one axis; -1 where it fills in 0."""
    from scipy.ndimage import zoom

    if source == target:
        positions = np.arange(source)
    else:
        positions = zoom(np.arange(1, source + 1), target / source, order=0) - 1
    positions.setflags(write=False)
    return positions


def resize_image(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Cubic spline zoom of (..., H, W) to (..., *shape), float32: scipy.ndimage.zoom(order=3) per image."""
    rows, cols = (zoom_matrix(n, m) for n, m in zip(image.shape[-2:], shape))
    return (rows @ image @ cols.T).astype(np.float32)


def resize_label(label: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Nearest zoom of (..., H, W) to (..., *shape); equals scipy.ndimage.zoom(order=0) per image."""
    rows, cols = (nearest_index(n, m) for n, m in zip(label.shape[-2:], shape))
    resized = label[..., rows[:, None], cols]
    resized[..., rows < 0, :] = 0
    resized[..., cols < 0] = 0
    return resized


@dataclass(frozen=True)
class Transform:
    """What happens to one sample: quarter turns and a flip, or a rotation by whole degrees, or nothing."""

    quarter_turns: int = 0
    flip_axis: int | None = None
    angle: int = 0


def sample_transform(generator: np.random.Generator) -> Transform:
    """SAMed's augmentation: 1/2 quarter turns and a flip, 1/4 a rotation by -20..19 degrees, 1/4 nothing."""
    if generator.random() > 0.5:
        return Transform(quarter_turns=int(generator.integers(4)), flip_axis=int(generator.integers(2)))
    if generator.random() > 0.5:
        return Transform(angle=int(generator.integers(-20, 20)))
    return Transform()


def sample_flips(generator: np.random.Generator) -> Transform:
    """LiteMedSAM's augmentation: a flip along each axis, each with probability 1/2."""
    rows, columns = generator.random(2) < 0.5
    if rows and columns:
        return Transform(quarter_turns=2)
    if rows:
        return Transform(flip_axis=0)
    return Transform(flip_axis=1) if columns else Transform()


def no_transform(generator: np.random.Generator) -> Transform:
    """No augmentation."""
    return Transform()


# The values of --augment, and what samples the transform of a sample.
SAMPLERS = {"samed": sample_transform, "flips": sample_flips, "none": no_transform}


@functools.lru_cache(maxsize=128)
def rotation(height: int, width: int, angle: int) -> tuple[np.ndarray, np.ndarray]:
    """Source of each pixel of scipy.ndimage.rotate(order=0, reshape=False), and where that fills in 0.

    Flat positions (H, W) int64 and a mask (H, W).
    """
    radians = np.deg2rad(angle)
    turn = np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]])
    centre = (np.array([height, width]) - 1) / 2
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    place = grid @ turn.T + (centre - turn @ centre)
    last = np.array([height, width]) - 1
    outside = ((place < 0) | (place > last)).any(axis=-1)
    row, col = np.moveaxis(np.clip(np.floor(place + 0.5).astype(np.int64), 0, last), -1, 0)
    return row * width + col, outside
