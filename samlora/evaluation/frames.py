"""A case as small pictures for a page: slices with the prediction, the reference and the difference on top.

Every layer is a picture of its own, so that a page can stack, hide and replace them. Label layers have a palette and
a transparent ground: they compress to about a kilobyte.
"""

import base64
import bisect
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from samlora.colours import class_colour

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_SLICES = 60
_SIDE = 320  # pixels of a slice's longer side; outlines have twice as many
_MOST_BYTES = 1_100_000  # of one case, encoded: twelve of them stay below 15 MB
_QUALITY = 60
_MARGIN = 1 / 10  # of the slice, at least, around what is labelled
# Missed, added, confused with another class, agreed: apart from each other for every common kind of colour vision.
DIFFERENCES = {
    "only in the reference": "#4ea1ff",
    "only in the prediction": "#ff9f1c",
    "another class": "#ff5fa2",
    "agreement": "#ffffff",
}
_OPACITY = (235, 235, 235, 85)


@dataclass(frozen=True)
class Frames:
    """The pictures of one case, as data URIs, one per shown slice and layer.

    slices: indices into the case's `depth` slices. size: (width, height) in proportion. start: which of the slices
    to show first, the one with most disagreement. background is empty where there is no image. cropped: the pictures
    show the surroundings of the labels, not the whole slices.
    """

    slices: tuple[int, ...]
    depth: int
    size: tuple[int, int]
    start: int
    cropped: bool
    background: tuple[str, ...]
    prediction: tuple[str, ...]
    reference: tuple[str, ...]
    difference: tuple[str, ...]


def draw_frames(
    image: np.ndarray | None,
    reference: np.ndarray,
    prediction: np.ndarray,
    flip_ud: bool = False,
    flip_lr: bool = False,
    aspect: float = 1.0,
) -> Frames:
    """Draws the slices on which anything is labelled, with one more at both ends; at most `MOST_SLICES` of them.

    image: (D, H, W) or, for colours, (D, H, W, 3), 0..1, or None. reference, prediction: (D, H, W) label maps.
    flip_ud, flip_lr, aspect: as `samlora.data.grid.Case.display` says. Where they would be too many or too large
    together, every second, third ... slice is drawn.
    """
    shown = np.flatnonzero([r.any() or p.any() for r, p in zip(reference, prediction)])
    shown = range(max(0, shown[0] - 1), min(len(reference), shown[-1] + 2)) if shown.size else [len(reference) // 2]
    rows, columns = _box(reference[shown[0] : shown[-1] + 1] | prediction[shown[0] : shown[-1] + 1])
    box = (rows, columns)
    order = tuple(slice(None, None, -1) if flip else slice(None) for flip in (flip_ud, flip_lr))
    height, width = (rows.stop - rows.start) * aspect, columns.stop - columns.start
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    every = math.ceil(len(shown) / MOST_SLICES)
    while True:
        slices = shown[::every]
        layers: dict[str, list[str]] = {"background": [], "prediction": [], "reference": [], "difference": []}
        for z in slices:
            truth, found = (_scaled(labels[z][box][order], size) for labels in (reference, prediction))
            if image is not None:
                layers["background"].append(_photograph(image[z][box][order], size))
            layers["prediction"].append(_palette_png(found, _class_palette(found)))
            outline = _outline(truth)
            layers["reference"].append(_palette_png(outline, _class_palette(outline)))
            layers["difference"].append(_palette_png(_difference(truth, found), _difference_palette()))
        if sum(len(uri) for uris in layers.values() for uri in uris) <= _MOST_BYTES or len(slices) == 1:
            break
        every += 1
    wrong = [np.count_nonzero(reference[z] != prediction[z]) for z in slices]
    start = int(np.argmax(wrong)) if any(wrong) else len(slices) // 2
    cropped = (rows.stop - rows.start, columns.stop - columns.start) != reference.shape[1:]
    uris = {name: tuple(layer) for name, layer in layers.items()}
    return Frames(tuple(map(int, slices)), len(reference), size, start, cropped, **uris)


class Worst:
    """The worst cases of those offered, drawn when they are among them, so that no other is kept or drawn.

    `frames` has their pictures, the worst first.
    """

    def __init__(self, count: int):
        self._count = count
        self._kept: list[tuple[tuple, Frames]] = []

    def offer(self, name: str, measures: Mapping[int, Mapping[str, float]], draw: Callable[[], Frames]) -> None:
        """Takes a case into account. measures: what `metrics.evaluate` returned. draw: makes its pictures."""
        key = badness(name, measures)
        if len(self._kept) < self._count or (self._kept and key < self._kept[-1][0]):
            bisect.insort(self._kept, (key, draw()), key=lambda entry: entry[0])
            del self._kept[self._count :]

    @property
    def frames(self) -> dict[str, Frames]:
        return {key[-1]: frames for key, frames in self._kept}


def badness(name: str, measures: Mapping[int, Mapping[str, float]]) -> tuple[float, float, str]:
    """Sorts cases, the worst first: by their mean Dice over classes, then HD95, then name; undefined comes last."""
    dice, hd95 = (case_mean(measures, metric) for metric in ("dice", "hd95"))
    return (math.inf if math.isnan(dice) else dice, 0.0 if math.isnan(hd95) else -hd95, name)


def case_mean(measures: Mapping[int, Mapping[str, float]], metric: str) -> float:
    """The mean of a case's defined values over its classes; NaN where there is none."""
    values = [v for entry in measures.values() if not math.isnan(v := entry.get(metric, math.nan))]
    return sum(values) / len(values) if values else math.nan


def _box(labels: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns around what is labelled, with a margin; all of them where nothing is."""
    flat, sides = labels.any(axis=0), []
    for axis, total in enumerate(flat.shape):
        found = np.flatnonzero(flat.any(axis=1 - axis))
        if not found.size:
            return tuple(slice(0, n) for n in flat.shape)
        margin = max(round(_MARGIN * total), (found[-1] - found[0]) // 4, 12)
        sides.append(slice(max(0, int(found[0]) - margin), min(total, int(found[-1]) + 1 + margin)))
    return tuple(sides)


def _scaled(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width) of the nearest labels; one that is too small to be met still gets its pixel."""
    width, height = size
    ratios = height / labels.shape[0], width / labels.shape[1]
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) / ratio).astype(int), old - 1)
        for n, ratio, old in zip((height, width), ratios, labels.shape)
    )
    scaled = labels[np.ix_(rows, columns)]
    for label in np.setdiff1d(np.unique(labels), scaled):
        places = np.argwhere(labels == label)
        scaled[tuple((places * ratios).astype(int).T)] = label
    return scaled


def _outline(labels: np.ndarray) -> np.ndarray:
    """The inner edge of every label, two pixels wide, on twice the grid."""
    labels = np.pad(labels.repeat(2, axis=0).repeat(2, axis=1), 2)
    inner = np.ones(labels.shape, bool)
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            inner &= np.roll(labels, step, axis) == labels
    return np.where(inner, 0, labels)[2:-2, 2:-2]


def _difference(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """1..4 for the entries of `DIFFERENCES`, 0 for background in both."""
    kinds = [(found == 0) & (truth > 0), (truth == 0) & (found > 0), truth != found, truth > 0]
    return np.select(kinds, [1, 2, 3, 4], 0)


def _difference_palette() -> Mapping[int, tuple[int, int, int, int]]:
    codes = [bytes.fromhex(code[1:]) for code in DIFFERENCES.values()]
    return {n: (*code, opacity) for n, (code, opacity) in enumerate(zip(codes, _OPACITY), start=1)}


def _class_palette(labels: np.ndarray) -> Mapping[int, tuple[int, int, int, int]]:
    found = (int(label) for label in np.unique(labels) if label > 0)
    return {label: (*(round(255 * c) for c in class_colour(label)), 255) for label in found}


def _palette_png(labels: np.ndarray, palette: Mapping[int, tuple[int, int, int, int]]) -> str:
    from PIL import Image

    # Classes of one colour share an entry, so that any number of classes fits a palette.
    colours = [(0, 0, 0, 0), *dict.fromkeys(palette.values())]
    entry = np.zeros(int(labels.max()) + 1, np.uint8)
    for label, colour in palette.items():
        if label < len(entry):
            entry[label] = colours.index(colour)
    picture = Image.fromarray(entry[labels])
    picture.putpalette([value for colour in colours for value in colour[:3]])
    opacity = bytes(colour[3] for colour in colours)
    return _uri(picture, "png", transparency=opacity, optimize=True, bits=_bits(len(colours)))


def _bits(colours: int) -> int:
    return next(bits for bits in (1, 2, 4, 8) if colours <= 2**bits)


def _photograph(image: np.ndarray, size: tuple[int, int]) -> str:
    """A slice, gray or coloured, at most of `size`: WebP, or JPEG where Pillow was built without."""
    from PIL import Image, features

    values = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0, 1)
    picture = Image.fromarray(np.rint(255 * values).astype(np.uint8))
    smaller = tuple(min(pair) for pair in zip(picture.size, size))  # the page stretches what is smaller
    if picture.size != smaller:
        picture = picture.resize(smaller, Image.Resampling.LANCZOS)
    return _uri(picture, "webp" if features.check("webp") else "jpeg", quality=_QUALITY)


def _uri(picture: "Image", kind: str, **options: object) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
