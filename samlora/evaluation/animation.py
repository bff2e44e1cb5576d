"""All slices of a volume one after the other, as an animated GIF."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from samlora.colours import class_colour
from samlora.files import whole

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_FRAMES = 240
_SIDE = 384  # pixels of a frame's longer side
_FRAME_MS = 100
_OPACITY = 0.45


def animation(
    image: np.ndarray,
    labels: np.ndarray,
    path: str | os.PathLike,
    class_names: Mapping[int, str],
    flip_ud: bool = False,
    flip_lr: bool = False,
    aspect: float = 1.0,
) -> None:
    """Writes a GIF that runs through the slices, each with its labels in colour and outlined, and a legend.

    image: (D, H, W), 0..1. labels: (D, H, W). flip_ud, flip_lr, aspect: as `samlora.data.grid.Case.display` says.
    Of volumes with more than MOST_FRAMES slices every second, third ... is shown. A single slice gives a single frame.
    """
    from PIL import Image, ImageDraw

    order = tuple(slice(None, None, -1) if flip else slice(None) for flip in (flip_ud, flip_lr))
    height, width = image.shape[1] * aspect, image.shape[2]
    size = tuple(max(1, round(n * _SIDE / max(height, width))) for n in (width, height))
    legend = _legend([n for n in class_names if (labels == n).any()], class_names, size[0])
    frames, shown = [], range(0, len(image), -(-len(image) // MOST_FRAMES))
    for z in shown:
        gray = Image.fromarray(np.rint(255 * np.clip(image[z][order], 0, 1)).astype(np.uint8))
        pixels = np.asarray(gray.resize(size, Image.Resampling.BILINEAR), np.float32)[..., None].repeat(3, axis=-1)
        classes = Image.fromarray(labels[z][order].astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        classes = np.asarray(classes)
        outline = _outline(classes)
        for label in np.unique(classes[classes > 0]):
            colour, inside = 255 * np.array(class_colour(int(label))), classes == label
            pixels[inside] += _OPACITY * (colour - pixels[inside])
            pixels[inside & outline] = colour
        frame = Image.fromarray(np.rint(pixels).astype(np.uint8))
        ImageDraw.Draw(frame).text((6, 4), f"slice {z}", fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0))
        framed = Image.new("RGB", (size[0], size[1] + legend.height))
        framed.paste(frame, (0, 0))
        framed.paste(legend, (0, size[1]))
        frames.append(framed)
    with whole(path) as part:
        # GIF has 256 colours: one palette for all frames, or colours would flicker. Made of frames that show most.
        busy = sorted(range(len(frames)), key=lambda n: -np.count_nonzero(labels[shown[n]]))
        strip = np.concatenate([np.asarray(frames[n]) for n in busy[:4]])
        palette = Image.fromarray(strip).quantize(256, dither=Image.Dither.NONE)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        frames[0].save(part, "gif", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0)


def _legend(present: list[int], class_names: Mapping[int, str], width: int) -> "Image":
    """A strip with a swatch and the name of each class."""
    from PIL import Image, ImageDraw, ImageFont

    font, places, x, y = ImageFont.load_default(12), [], 6, 4
    for label in present:
        needed = 16 + round(font.getlength(class_names[label]))
        if x > 6 and x + needed > width:
            x, y = 6, y + 18
        places.append((x, y, label))
        x += needed + 12
    strip = Image.new("RGB", (width, y + 20 if present else 0))
    draw = ImageDraw.Draw(strip)
    for x, y, label in places:
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=tuple(round(255 * c) for c in class_colour(label)))
        draw.text((x + 16, y), class_names[label], fill=(255, 255, 255), font=font)
    return strip


def _outline(labels: np.ndarray) -> np.ndarray:
    """Where a pixel's right or lower neighbour, or it, has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:, 1:] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    edge[1:] |= labels[:-1] != labels[1:]
    return edge
