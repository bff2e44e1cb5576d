"""A volume through a semantic model: slices in batches, labels on the input's own pixels."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from samlora.data.frame import Frame
from samlora.data.grid import neighbours
from samlora.errors import InputError
from samlora.inference.volumes import NOT_FINITE, predict_patches
from samlora.model.methods import system_row


def check_automatic(model: nn.Module, adapter: object) -> None:
    """Raises InputError for a model that draws nothing without prompts. adapter: its file, for the message."""
    if not system_row(model.spec.system).automatic:
        raise InputError(
            f"{adapter}: its system, {model.spec.system}, answers prompts and draws nothing without them; "
            "use samlora predict --boxes, samlora app, samlora evaluate-prompts or samlora.Predictor"
        )


def check_answer(logits: Tensor) -> None:
    """Raises InputError for logits that are not finite: the highest of them would be background, or anything."""
    if not bool(torch.isfinite(logits).all()):
        raise InputError(NOT_FINITE)


@torch.inference_mode()
def predict_slices(
    model: nn.Module,
    image: np.ndarray,
    image_size: int,
    input_size: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
    with_neighbours: bool = False,
) -> np.ndarray:
    """Labels of every slice of a stack; a model of volumes is slid over all of it (samlora.inference.volumes).

    model: on `device`; logits (B, C, L, L) from images (B, 3, S, S). image: (D, H, W) or (D, H, W, channels)
    float32, as the recipe makes it. image_size: S. precision: of the forward pass (autocast unless float32).
    progress: called with the number of slices done, after each batch. with_neighbours: of a gray stack, the slices
    before and after are the first and third channel (the recipe's channels are "neighbours").
    input_size: side to which slices are shrunk first, as SAMed's test does so that they look like its training slices;
    None to go straight to the model's size.
    Returns labels (D, H, W), uint8, or uint16 for more than 255 classes, by `Frame.squares` and `Frame.classes`.
    """
    if getattr(model, "volumetric", False):
        return predict_patches(model, image, input_size, batch_size, device, precision, progress)
    depth, height, width = image.shape[:3]
    frame = Frame(height, width, image_size, model.pixels, input_size, model.logit_side)
    labels: list[Tensor] = []
    for start in range(0, depth, batch_size):
        part = image[start : start + batch_size]
        if with_neighbours and image.ndim == 3:
            part = neighbours(image, range(start, start + len(part)))
        channels = part[:, None] if part.ndim == 3 else np.moveaxis(part, -1, 1)
        batch = torch.from_numpy(np.ascontiguousarray(channels, dtype=np.float32)).to(device)
        squares = frame.squares(batch, model.fill)
        with torch.autocast(torch.device(device).type, precision, enabled=precision != torch.float32):
            logits = model(squares.expand(-1, 3, -1, -1) if squares.shape[1] == 1 else squares)
        check_answer(logits)
        labels.append(frame.classes(logits).to(torch.int32).cpu())
        if progress:
            progress(len(part))
    dtype = np.uint8 if logits.shape[1] <= 256 else np.uint16
    return torch.cat(labels).numpy().astype(dtype)
