"""A volume through a network of volumes: patches slid over it, labels on the input's own pixels."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from samlora.data.augment import resize_image, resize_label
from samlora.errors import InputError
from samlora.model.baselines import volume_logits

NOT_FINITE = (
    "the model's answer is not finite (NaN or infinite): the weights or the image hold values that no model was "
    "trained with, or a number does not fit half precision (then choose --precision bf16 or 32)"
)
OVERLAP = 0.5  # of neighbouring patches, as nnU-Net has it


@torch.inference_mode()
def predict_patches(
    model: nn.Module,
    image: np.ndarray,
    input_size: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Labels of a stack by patches that overlap by half, their logits blended with Gaussian weights.

    model: a VolumeBaseline, or an average of some, on `device`, in evaluation mode. image: (D, H, W) or
    (D, H, W, channels) float32, as the recipe makes it. input_size: side that training slices were resized to, and so
    are these; None to take them as they are. batch_size: slices per forward pass, at least one patch. precision: of
    the forward pass (autocast unless float32). progress: called with the number of slices done, after each pass.
    Returns labels (D, H, W), uint8, or uint16 for more than 255 classes: cubic spline zoom in the plane, argmax of the
    logits, nearest zoom back. Raises InputError for other channels than the model's.
    """
    shape, depth = image.shape[1:3], len(image)
    resized = input_size is not None and shape != (input_size, input_size)
    stack = image[None] if image.ndim == 3 else np.moveaxis(image, -1, 0)
    stack = resize_image(stack, (input_size, input_size)) if resized else stack
    volume = torch.from_numpy(np.ascontiguousarray(stack, dtype=np.float32))[None].to(device)
    total, done = patch_count(volume.shape[2:], model.roi, OVERLAP), 0

    def count(patches: int) -> None:
        nonlocal done
        before, done = done, done + patches
        if progress:
            progress(depth * done // total - depth * before // total)

    with torch.autocast(torch.device(device).type, precision, enabled=precision != torch.float32):
        # Put together on the CPU: the logits of a whole volume need not fit on a GPU.
        logits = volume_logits(model, volume, OVERLAP, max(1, batch_size // model.roi[0]), "cpu", count)
    if not bool(torch.isfinite(logits).all()):
        raise InputError(NOT_FINITE)
    labels = logits[0].argmax(dim=0).numpy().astype(np.uint8 if logits.shape[1] <= 256 else np.uint16)
    return resize_label(labels, shape) if resized else labels


def patch_count(size: tuple[int, ...], roi: tuple[int, ...], overlap: float) -> int:
    """How many patches `volume_logits` takes of a volume of `size`: MONAI's dense grid."""
    return math.prod(math.ceil(max(n - r, 0) / max(1, int(r * (1 - overlap)))) + 1 for n, r in zip(size, roi))
