"""The colour of a class, the same in pictures, on pages, in label files and in DICOM segmentations."""

import functools

import numpy as np

# The first eight keep apart on gray images, for the common kinds of colour blindness too: Okabe and Ito's without
# black, both blues lighter so that thin lines show on dark tissue, and a pale rose. Each of the others is the colour
# farthest from those before it by CIEDE2000, among those neither dark nor gray nor glaring.
PALETTE = (
    "#E69F00", "#7FD8F7", "#009E73", "#F0E442", "#3B82F6", "#D55E00", "#CC79A7", "#FFC8DD",
    "#777700", "#22FF77", "#9933DD", "#CC2244", "#BBAAFF", "#FFAA88", "#00FFEE", "#66AA11",
    "#CC0088", "#FF6666", "#996600", "#EE55FF", "#8877BB", "#337733", "#BBDD99", "#00BBBB",
)  # fmt: skip

_MOST = 255  # classes of a label map
_STEPS = range(0, 256, 17)  # of red, green and blue in the colours beyond the palette
_LIGHT, _LEAST_CHROMA = (45, 90), 25  # of L*: thin lines show on dark tissue; and no grays, which images are made of


def class_colour(label: int) -> tuple[float, float, float]:
    """The colour of a class: RGB in 0..1. `label` counts from 1; the colours of 1 to 255 differ, then they repeat."""
    return _colours()[(label - 1) % _MOST]


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..1 as CIE L*a*b* under D65 (IEC 61966-2-1, CIE 15), both (..., 3)."""
    rgb = np.asarray(rgb, np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T  # by the white point, whose sums these are
    x, y, z = np.moveaxis(np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@functools.cache
def _colours() -> tuple[tuple[float, float, float], ...]:
    """The palette, and after it always the colour that lies farthest from all before it in L*a*b*."""
    found = [tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)) for code in PALETTE]
    colours = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS, indexing="ij"), axis=-1).reshape(-1, 3) / 255
    places = lab(colours)
    shown = (places[:, 0] >= _LIGHT[0]) & (places[:, 0] <= _LIGHT[1])
    shown &= np.hypot(places[:, 1], places[:, 2]) >= _LEAST_CHROMA
    colours, places = colours[shown], places[shown]
    nearest = np.linalg.norm(places[:, None] - lab(found), axis=-1).min(axis=1)
    while len(found) < _MOST:
        farthest = int(nearest.round(3).argmax())  # rounded, so that every machine finds the same
        found.append(tuple(colours[farthest].tolist()))
        nearest = np.minimum(nearest, np.linalg.norm(places - places[farthest], axis=-1))
    return tuple(found)
