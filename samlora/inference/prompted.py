"""Slices through a system with prompts, which are drawn from a reference as a person would give them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from samlora.data import prompts as from_masks
from samlora.data.chunks import slices_from
from samlora.data.frame import Frame
from samlora.data.grid import neighbours
from samlora.model.sam import Prompts, Sam
from samlora.prompting import Prompting


@dataclass(frozen=True)
class DrawnPrompt:
    """One prompt in pixels of the model's square: box (4,) and points (N, 2) with labels (N,)."""

    box: np.ndarray | None
    points: np.ndarray
    labels: np.ndarray


def choose(label: np.ndarray, prompting: Prompting, generator: np.random.Generator) -> list[np.ndarray]:
    """The masks (H, W) of the objects of a label map that are asked for, `max_objects` at most, drawn by chance."""
    found = [mask for _, mask in from_masks.objects(label, parts=prompting.parts)]
    if len(found) <= prompting.max_objects:
        return found
    return [found[n] for n in sorted(generator.choice(len(found), prompting.max_objects, replace=False))]


def draw_prompt(
    mask: np.ndarray, prompting: Prompting, frame: Frame, generator: np.random.Generator, jitter: bool = True
) -> DrawnPrompt:
    """One prompt for a mask (H, W), as `prompting` says, in pixels of the frame's square."""
    kind = prompting.prompt
    if kind == "any":
        kind = ("box", "pt", "pt_box")[generator.integers(3)]
    box, points, labels = None, np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    if kind in ("box", "pt_box"):
        most = round(prompting.box_jitter * max(mask.shape) / frame.side) if jitter else 0
        box = frame.boxes(from_masks.jittered_box(mask, most, generator))
    elif kind == "full_box":
        box = frame.boxes(from_masks.full_box(mask.shape))
    if kind in ("pt", "pt_box"):
        points, labels = from_masks.sample_points(
            mask, prompting.sample_num, prompting.negative_num, prompting.point_strategy, generator
        )
        points = frame.points(points)
    return DrawnPrompt(box, points, labels)


def in_turn(prompting: Prompting) -> tuple[Prompting, int]:
    """How prompts are drawn before a model was asked, and how many points follow from what it answers (`least_sure`).

    Only the strategy "entropy" has any, those on the object but the first, which is random: where a prompt has one
    point there is no answer to go by, and "entropy" is "random".
    """
    if prompting.point_strategy != "entropy":
        return prompting, 0
    later = max(0, prompting.sample_num - 1) if "pt" in prompting.prompt else 0
    return replace(prompting, sample_num=prompting.sample_num - later, point_strategy="random"), later


def least_sure(prompts: Prompts, logits: Tensor, targets: Tensor, inside: Tensor, count: int, side: int) -> Prompts:
    """The prompts with `count` more points each, where the answer to them, logits (P, L, L), is least sure.

    targets: (P, L, L), above 0 on the object: on which side of it a point lies, it says (the study of SAMUS, arXiv
    2309.06824). inside: (P, L, L) bool, false in the padding. side: S of the model's square.
    """
    probability = logits.float().sigmoid().masked_fill(~inside, 0).cpu().numpy()
    places, labels = [], []
    for one, target in zip(probability, targets.cpu().numpy() > 0):
        found = from_masks.uncertain_points(one, count, np.random.default_rng(0), apart=3)
        cols, rows = found.astype(int).T
        places.append((found + 0.5) * (side / logits.shape[-1]) - 0.5)
        labels.append(target[rows, cols])
    more = torch.from_numpy(np.stack(places).astype(np.float32)).to(prompts.points)
    marks = torch.from_numpy(np.stack(labels)).to(prompts.labels)
    points, marked = torch.cat([prompts.points, more], dim=1), torch.cat([prompts.labels, marks], dim=1)
    return Prompts(points, marked, prompts.boxes, prompts.masks, prompts.image_index)


def as_prompts(
    drawn: Sequence[DrawnPrompt], images: Sequence[int], prompting: Prompting, device: torch.device | str
) -> Prompts:
    """Prompts of one decoder call, all drawn as `prompting` says; images: which image of the batch each belongs to.

    Where one kind of several was drawn by chance, all have a place for each kind, and what is missing says nothing: an
    answer must not depend on what else is asked in the same call.
    """
    mixed = prompting.prompt == "any"
    count = prompting.sample_num + prompting.negative_num if mixed or "pt" in prompting.prompt else 0
    points = np.zeros((len(drawn), count, 2), np.float32)
    labels = np.full((len(drawn), count), -1, np.int64)
    boxes = np.full((len(drawn), 4), np.nan, np.float32)
    for n, one in enumerate(drawn):
        points[n, : len(one.points)], labels[n, : len(one.labels)] = one.points, one.labels
        if one.box is not None:
            boxes[n] = one.box
    return Prompts(
        points=torch.from_numpy(points).to(device) if count else None,
        labels=torch.from_numpy(labels).to(device) if count else None,
        boxes=torch.from_numpy(boxes).to(device) if mixed or "box" in prompting.prompt else None,
        image_index=torch.tensor(images, dtype=torch.int64, device=device),
    )


def encode_slices(
    model: Sam, image: np.ndarray, indices: Sequence[int], frame: Frame, with_neighbours: bool = False
) -> dict[int, Tensor]:
    """Embeddings (256, S/16, S/16) of slices of a stack, under their numbers.

    A model that encodes neighbouring slices together sees each in its chunk of the stack, and what else is in these
    chunks is returned too. image: (D, H, W) or (D, H, W, C) float32 in 0..1. with_neighbours: as in
    `slices.predict_slices`.
    """
    depth, count = model.chunk, len(image)
    numbers = sorted({index // depth for index in indices})
    chunks = [slices_from(number * depth, count, depth) for number in numbers]
    read = [index for chunk in chunks for index in chunk]
    shown = neighbours(image, read) if with_neighbours and image.ndim == 3 else image[read]
    squares = torch.from_numpy(np.stack([frame.image(one, model.fill) for one in shown]))
    embeddings = model.encode(squares.to(next(model.parameters()).device)).unflatten(0, (-1, depth))
    found: dict[int, Tensor] = {}
    for number, chunk, encoded in zip(numbers, chunks, embeddings):
        for index, embedding in zip(chunk, encoded):
            if index // depth == number:  # the last chunk of a volume reaches back into the one before
                found.setdefault(index, embedding)
    return found


@torch.inference_mode()
def predict_prompted(
    model: Sam,
    image: np.ndarray,
    reference: np.ndarray,
    prompting: Prompting,
    seed: int = 0,
    input_size: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    with_neighbours: bool = False,
) -> np.ndarray:
    """Labels (D, H, W) uint8 of a stack whose reference says what is asked for.

    Every class of the reference that a slice shows (with `prompting.parts` every connected part of it) is asked for by
    one prompt, without jitter; where masks overlap, the surest wins. What the reference does not show is not asked for,
    so figures are those of a user who knows what is there. The points of "entropy" are placed as in training: the
    first by chance, the model is asked, and the others lie where its answer is least sure; of one point alone, it is
    the random one. image: (D, H, W) or (D, H, W, C) float32 in 0..1.
    reference: (D, H, W) integer. input_size, with_neighbours: as in `slices.predict_slices`. Prompts depend on the seed
    and the slice alone.
    """
    height, width = image.shape[1:3]
    frame = Frame(height, width, model.image_size, model.pixels, input_size, model.logit_side)
    result = np.zeros(image.shape[:3], np.uint8)
    shown = [index for index in range(len(image)) if reference[index].any()]
    first, later = in_turn(prompting)
    for start in range(0, len(shown), batch_size):
        indices = shown[start : start + batch_size]
        drawn, where, labels, masks = [], [], [], []
        for number, index in enumerate(indices):
            generator = np.random.default_rng([seed, 5, index])
            for label, mask in from_masks.objects(reference[index], parts=prompting.parts):
                drawn.append(draw_prompt(mask, first, frame, generator, jitter=False))
                masks.append(mask)
                where.append(number)
                labels.append(label)
        with torch.autocast(torch.device(device).type, precision, enabled=precision != torch.float32):
            encoded = encode_slices(model, image, indices, frame, with_neighbours)
            embeddings = torch.stack([encoded[index] for index in indices])
            prompts = as_prompts(drawn, where, first, device)
            answer = model(None, prompts, embeddings)[:, 0]
            if later:
                targets = torch.from_numpy(frame.label(np.stack(masks))).to(device)
                inside = torch.from_numpy(frame.inside).to(device)
                prompts = least_sure(prompts, answer, targets, inside, later, model.image_size)
                answer = model(None, prompts, embeddings)[:, 0]
        logits = frame.logits(answer)
        for number, index in enumerate(indices):
            own = [n for n, image_number in enumerate(where) if image_number == number]
            result[index] = _painted(logits[own], np.array([labels[n] for n in own], np.uint8))
    return result


def _painted(logits: Tensor, labels: np.ndarray) -> np.ndarray:
    """(H, W) uint8: of masks (P, H, W) with logits above 0 the label of the highest."""
    best, which = logits.max(dim=0)
    return np.where((best > 0).cpu().numpy(), labels[which.cpu().numpy()], 0).astype(np.uint8)
