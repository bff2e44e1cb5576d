"""How an image lies in the square that a model takes, and the way back: pixels, points, boxes, labels, logits.

Two ways in (`samlora.pixels.Pixels`). Stretched to the square, as SAMed does it. Or scaled by the longer side and
padded right and bottom, as SAM does it (segment_anything.utils.transforms.ResizeLongestSide). Points are (x, y):
column, row.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from samlora.data.augment import nearest_index, zoom_matrix
from samlora.pixels import SAMED, Pixels


@functools.lru_cache(maxsize=64)
def bilinear_matrix(source: int, target: int, antialias: bool = False) -> np.ndarray:
    """(target, source) float64 matrix W with torch's bilinear interpolation (align_corners=False) == W @ x.

    Separable and linear, as the cubic zoom is: see `augment.zoom_matrix`. antialias: where it shrinks, every source
    pixel counts, as in Pillow.
    """
    import torch
    import torch.nn.functional as F

    identity = torch.eye(source, dtype=torch.float64)[None, None]
    matrix = F.interpolate(identity, (target, source), mode="bilinear", align_corners=False, antialias=antialias)
    matrix = matrix[0, 0].numpy()
    matrix.setflags(write=False)  # cached: shared by every caller
    return matrix


_LEAST_RANGE = np.float32(1e-4)  # of the values of an image: a flat one becomes 0, up to rounding


@functools.lru_cache(maxsize=64)
def area_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float64 matrix W with OpenCV's resize(x, INTER_AREA) == W @ x along one axis.

    Where it shrinks, a new pixel is the mean over its area. Where it enlarges, OpenCV interpolates linearly, and a
    source pixel keeps its value over all new pixels that lie in it wholly.
    """
    matrix = np.zeros((target, source))
    scale = source / target
    new = np.arange(target)
    if scale >= 1:
        edges = np.arange(source)
        low, high = new[:, None] * scale, (new[:, None] + 1) * scale
        overlap = np.minimum(high, edges + 1) - np.maximum(low, edges)
        matrix = np.clip(overlap, 0, None) / scale
    else:
        first = np.floor(new * scale).astype(np.int64)
        share = (new + 1) - (first + 1) / scale
        share = np.where(share <= 0, 0.0, share - np.floor(share))
        matrix[new, first] += 1 - share
        matrix[new, np.minimum(first + 1, source - 1)] += share
    matrix.setflags(write=False)  # cached: shared by every caller
    return matrix


_MATRICES = {
    "cubic": zoom_matrix,
    "bilinear": functools.partial(bilinear_matrix, antialias=True),
    "area": area_matrix,
}


@dataclasses.dataclass(frozen=True)
class Frame:
    """An image of `height` x `width` pixels in a square of side `side`, S, a multiple of 4.

    pixels: how it is resized and what its values become. through: side to which it is zoomed first, as the slices of a
    recipe with a `size` are; they are square then, and nothing is left to pad. low: side L of the model's logits and
    targets; None for SAM's S/4.
    """

    height: int
    width: int
    side: int
    pixels: Pixels = SAMED
    through: int | None = None
    low: int | None = None

    @property
    def pad(self) -> bool:
        """Whether the image is scaled by its longer side and padded; otherwise it is stretched."""
        return self.pixels.pad

    @property
    def low_side(self) -> int:
        """L, the side of logits and targets."""
        return self.low or self.side // 4

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the square that the image fills, from the upper left corner."""
        if not self.pad or self.through is not None:
            return self.side, self.side
        scale = self.side / max(self.height, self.width)
        rows, cols = (max(1, int(n * scale + 0.5)) for n in (self.height, self.width))  # SAM's rounding
        return rows, cols

    @functools.cached_property
    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """(S, H) and (S, W) float32: rows @ image @ cols.T lies in the square, 0 where it is padded."""
        return tuple(self._into(n, m) for n, m in zip(self._shape, self.size))

    @functools.cached_property
    def matrices_back(self) -> tuple[np.ndarray, np.ndarray]:
        """(H, L) and (W, L) float32: rows @ logits @ cols.T lies on the image's pixels.

        Bilinear to the square, cropped, bilinear to the image (Sam.postprocess_masks), collapsed to one matrix.
        """
        to_side = bilinear_matrix(self.low_side, self.side)
        return tuple((bilinear_matrix(m, n) @ to_side[:m]).astype(np.float32) for n, m in zip(self._shape, self.size))

    @functools.cached_property
    def label_index(self) -> tuple[np.ndarray, np.ndarray]:
        """For the L rows and columns of a target the row and column of the image, int64; -1 outside of it.

        Stretched as `batch.make_batch` does it, nearest zoom after nearest zoom; padded at the pixels' centres.
        """
        return tuple(self._nearest(n, m) for n, m in zip(self._shape, self.size))

    @functools.cached_property
    def _placed(self) -> dict:
        return {}

    def on(self, name: str, device) -> tuple:
        """The two arrays of the property `name` as tensors on a device.

        They are copied there once: each copy from pageable memory makes a GPU wait. Nothing may change them.
        """
        import torch

        if (name, device) not in self._placed:
            self._placed[name, device] = tuple(torch.from_numpy(array).to(device) for array in getattr(self, name))
        return self._placed[name, device]

    @property
    def inside(self) -> np.ndarray:
        """(L, L) bool: where a target shows the image, not the padding."""
        rows, cols = (index >= 0 for index in self.label_index)
        return rows[:, None] & cols

    def image(self, image: np.ndarray, fill: float | Sequence[float] = 0.0) -> np.ndarray:
        """(H, W) or (H, W, C), uint8 or float in 0..1, as the model takes it: (C, S, S) float32; gray has C = 3.

        fill: value of the padding, or one for each channel. SAM pads with 0 after it subtracted its pixel mean: a
        model that does so inside wants that mean here, in 0..1. Padded uint8 is scaled by Pillow, as SAM does, or, with
        resampling "area", as OpenCV does, and rounded to whole numbers on the way.
        """
        planes = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
        eight_bit = image.dtype == np.uint8 and self.through is None
        if eight_bit and self.pad and self.pixels.resampling == "bilinear":
            from PIL import Image

            shape = self.size[::-1]
            scaled = [Image.fromarray(np.ascontiguousarray(plane)).resize(shape, Image.BILINEAR) for plane in planes]
            square = np.zeros((len(planes), self.side, self.side), np.float32)
            square[:, : self.size[0], : self.size[1]] = np.stack(scaled) / np.float32(255)
        else:
            rows, cols = self.matrices
            square = rows @ planes.astype(np.float32) @ cols.T
            if eight_bit and self.pixels.resampling == "area":
                square = np.floor(square + np.float32(0.5))  # OpenCV rounds a half upwards
            if image.dtype == np.uint8:
                square /= np.float32(255)
        if self.pixels.values == "minmax":
            inside = square[:, : self.size[0], : self.size[1]]
            low, high = inside.min(), inside.max()
            inside[...] = (inside - low) / max(high - low, _LEAST_RANGE)
        if len(square) == 1:
            square = np.repeat(square, 3, axis=0)
        fill = np.broadcast_to(np.asarray(fill, np.float32), len(square))[:, None, None]
        square[:, self.size[0] :] = fill
        square[:, :, self.size[1] :] = fill
        return square

    def squares(self, images, fill: Sequence[float]):
        """Images (..., C, H, W) float in 0..1, a torch tensor on any device, as the model takes them: (..., C, S, S).

        As `image` does it, for many images of one size at once; gray ones keep their one channel, unless they are
        padded. fill: one value for each channel.
        """
        import torch

        rows, cols = self.on("matrices", images.device)
        square = images if self._fits else rows @ images.float() @ cols.T
        height, width = self.size
        if self.pixels.values == "minmax":
            inside = square[..., :height, :width]
            low, high = (getattr(inside, way)((-3, -2, -1), keepdim=True) for way in ("amin", "amax"))
            square = (square - low) / (high - low).clamp(min=float(_LEAST_RANGE))
        if self.size == (self.side, self.side):
            return square
        if square.shape[-3] == 1:
            square = square.expand(*square.shape[:-3], len(fill), -1, -1)
        within = torch.zeros(self.side, self.side, dtype=torch.bool, device=square.device)
        within[:height, :width] = True
        values = torch.tensor(fill, device=square.device)[:, None, None]
        return torch.where(within, square, values)

    def points(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) x, y in pixels of the image -> pixels of the square, float32."""
        return (np.asarray(points, np.float64) * self._scale).astype(np.float32)

    def points_back(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) x, y in pixels of the square -> pixels of the image, float32."""
        return (np.asarray(points, np.float64) / self._scale).astype(np.float32)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """(..., 4) XYXY in pixels of the image -> pixels of the square, float32."""
        boxes = np.asarray(boxes)
        return self.points(boxes.reshape(*boxes.shape[:-1], 2, 2)).reshape(boxes.shape)

    def whole_pixels(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (..., 4) XYXY of pixels of the image, wide enough to hold their last column and row completely.

        An enlarged image shows each of its pixels as several of the square; the coordinate of the last pixel is that
        of the first of them. MedSAM and LiteMedSAM take the box of the enlarged mask, which ends on the last of them.
        Nothing changes where the image is not enlarged.
        """
        more = np.maximum(0.0, 1 - 1 / self._scale)
        return (np.asarray(boxes, np.float64) + (0.0, 0.0, *more)).astype(np.float32)

    def boxes_back(self, boxes: np.ndarray) -> np.ndarray:
        """(..., 4) XYXY in pixels of the square -> pixels of the image, float32."""
        boxes = np.asarray(boxes)
        return self.points_back(boxes.reshape(*boxes.shape[:-1], 2, 2)).reshape(boxes.shape)

    def label(self, label: np.ndarray, fill: int = 0) -> np.ndarray:
        """A mask or label map (..., H, W) as a target (..., L, L) of the same type; `fill` outside the image."""
        rows, cols = self.label_index
        target = label[..., rows[:, None], cols]
        target[..., ~self.inside] = fill
        return target

    def logits(self, logits):
        """Logits (..., L, L), a torch tensor on any device, on the image's pixels: (..., H, W), float32."""
        rows, cols = self.on("matrices_back", logits.device)
        return rows @ logits.float() @ cols.T

    def classes(self, logits):
        """Logits (..., C, L, L), a torch tensor, as classes on the image's pixels: (..., H, W) int64.

        Stretched as SAMed does it: bilinear to the square, argmax, nearest zoom back; padded as `logits` goes.
        """
        import torch

        if self.pad:
            return self.logits(logits).argmax(dim=-3)
        matrix = torch.from_numpy(bilinear_matrix(self.low_side, self.side).astype(np.float32)).to(logits.device)
        classes = (matrix @ logits.float() @ matrix.T).argmax(dim=-3)
        back = [torch.from_numpy(nearest_index(self.side, n).copy()).to(logits.device) for n in self._shape]
        classes = classes[..., back[0].clamp(min=0)[:, None], back[1].clamp(min=0)]
        return classes.masked_fill((back[0] < 0)[:, None] | (back[1] < 0), 0)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def _fits(self) -> bool:
        """Whether the image is the square already."""
        return self._shape == (self.side, self.side) and self.through in (None, self.side)

    @property
    def _scale(self) -> np.ndarray:
        """Square over image along x and y, as SAM takes it from the rounded sizes."""
        return np.array([self.size[1] / self.width, self.size[0] / self.height])

    def _into(self, source: int, target: int) -> np.ndarray:
        middle = source if self.through is None else self.through
        matrix = _MATRICES[self.pixels.resampling](middle, target)
        if middle != source:
            matrix = matrix @ zoom_matrix(source, middle)
        return np.pad(matrix, ((0, self.side - target), (0, 0))).astype(np.float32)

    def _nearest(self, source: int, target: int) -> np.ndarray:
        middle, low = source if self.through is None else self.through, self.low_side
        if self.pad:
            centres = (np.arange(low) + 0.5) * self.side / low  # in pixels of the square
            index = np.where(centres < target, (centres * middle / target).astype(np.int64), -1)
        else:
            index = _after(nearest_index(middle, self.side), nearest_index(self.side, low))
        return index if middle == source else _after(nearest_index(source, middle), index)


def _after(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Positions `then` of what lies at positions `first`; -1 stays -1."""
    return np.where(then < 0, -1, first[then])
