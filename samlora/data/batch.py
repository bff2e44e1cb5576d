"""Samples of any size become one batch on any device: turned, resized, padded."""

import functools
from collections.abc import Sequence

from samlora.data.augment import Transform, rotation
from samlora.data.frame import Frame
from samlora.pixels import SAMED, Pixels


@functools.lru_cache(maxsize=64)
def frame_of(height: int, width: int, side: int, pixels: Pixels, low: int | None = None) -> Frame:
    """The frame of samples of this size; one for all, as its matrices are worth keeping."""
    return Frame(height, width, side, pixels, low=low)


def make_batch(
    images: Sequence,
    labels: Sequence,
    transforms: Sequence[Transform],
    side: int,
    device,
    pixels: Pixels = SAMED,
    fill: Sequence[float] = (0.0, 0.0, 0.0),
    low: int | None = None,
):
    """Augments and resizes samples of any size to one batch.

    images: tensors (H, W) or (C, H, W) float32, all with as many channels. labels: tensors (H, W) uint8. side: S, the
    model's image size. pixels: how images are resized and what their values become (samlora.data.frame); padding is
    `fill`, one value a channel. low: L, side of the model's logits; None for S/4. Returns images (B, C, S, S)
    float32, one gray channel as three equal ones, and labels (B, L, L) int64 on `device`, 0 in the padding; stretched
    labels are zoomed to S and then to L, as SAMed does.
    """
    import torch

    batch = []
    for image, transform in zip(images, transforms):
        image = transformed(image.to(device, non_blocking=True), transform)
        frame = frame_of(*image.shape[-2:], side, pixels, low)
        batch.append(frame.squares(image[None] if image.ndim == 2 else image, fill))
    targets = make_targets(labels, transforms, side, device, pixels, low)
    # Of stretched gray images some fit the square as they are: all have one channel then, and padded ones have three.
    squares = torch.stack([square.expand(max(map(len, batch)), -1, -1) for square in batch])
    return squares if squares.shape[1] > 1 else squares.expand(-1, 3, -1, -1), targets


def make_targets(
    labels: Sequence, transforms: Sequence[Transform], side: int, device, pixels: Pixels = SAMED, low: int | None = None
):
    """The labels of `make_batch` without the images: (B, L, L) int64 on `device`. Arguments as there."""
    import torch

    low = side // 4 if low is None else low
    targets = torch.empty(len(labels), low, low, dtype=torch.int64, device=device)
    for i, (label, transform) in enumerate(zip(labels, transforms)):
        label = transformed(label.to(device, non_blocking=True), transform)
        frame = frame_of(*label.shape, side, pixels, low)
        positions = frame.on("label_index", label.device)
        target = label[positions[0][:, None], positions[1]].long()
        target[positions[0] < 0, :] = 0
        target[:, positions[1] < 0] = 0
        targets[i] = target
    return targets


def transformed(x, transform: Transform):
    """One tensor (..., H, W) after its transform."""
    import torch

    if transform.angle:
        source, outside = rotation(*x.shape[-2:], transform.angle)
        turned = x.flatten(-2)[..., torch.from_numpy(source).to(x.device)]
        return turned.masked_fill(torch.from_numpy(outside).to(x.device), 0)
    x = torch.rot90(x, transform.quarter_turns, (-2, -1))
    return x if transform.flip_axis is None else x.flip(transform.flip_axis - 2)
