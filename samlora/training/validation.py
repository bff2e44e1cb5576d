"""What a run shows of itself while it trains: Dice on the validation cases, a preview."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import nn

from samlora.data.dataset import SliceFile, read_geometry
from samlora.data.grid import Case, to_show
from samlora.data.ignored import split_ignored, with_ignored
from samlora.data.patches import place
from samlora.engine import gathered, together
from samlora.errors import InputError
from samlora.evaluation.metrics import evaluate, summarise
from samlora.evaluation.report import SHOWN, contact_sheet, informative_slices
from samlora.inference.prompted import predict_prompted
from samlora.inference.slices import predict_slices
from samlora.model.checkpoint import Spec
from samlora.model.methods import system_row
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.reading import BadSamples
from samlora.training.run import Run
from samlora.training.setup import Data


def validate(
    model: nn.Module, data: Data, fabric, dtype: torch.dtype, run: Run, bad: BadSamples, prompting: Prompting
) -> dict[str, float]:
    """Mean Dice over the classes and cases of the validation slices, in their own pixels: val_dice.

    Of a system that only answers prompts the Dice with prompts drawn from the reference; of one that does both also
    val_dice_prompted, and val_dice is the mean of the two. Processes share the cases, and all return the same figures,
    those of one process. Raises InputError as `stacked` does.
    """
    spec: Spec = model.spec
    labels = range(1, spec.num_classes + 1)
    cases = [list(items) for _, items in groupby(sorted(data.val, key=place), key=lambda s: s.case)]
    mine = {}
    with together(fabric):
        for number in range(fabric.global_rank, len(cases), fabric.world_size):
            parts = stacked(model, cases[number], bad)
            if not parts:
                continue
            found, truths = [], []
            for images, stored in parts:
                truth, ignored = split_ignored(stored, spec.recipe)
                of_part = answers(model, images, truth, prompting, fabric.device, dtype)
                found.append({way: with_ignored(of_part[way], ignored, 0) for way in of_part})
                truths.append(truth)
            truth, mine[number] = _joined(truths), {}
            for way in found[0]:
                labelled = _joined([of_part[way] for of_part in found])
                measures = evaluate(labelled, truth, (1, 1, 1), labels, distances=False)
                mine[number][way] = measures, np.unique(labelled).tolist()
    measured = {number: of_case for part in gathered(fabric, mine) for number, of_case in part.items()}
    figures = {}
    for way in next(iter(measured.values()), ()):
        # Summed up in the order of the cases, so that rounding does not depend on who measured which.
        summary = summarise({cases[number][0].case: measured[number][way][0] for number in sorted(measured)})
        there = {label for of_case in measured.values() for label in of_case[way][1]}
        for label in labels:
            if label not in there and summary["classes"][label]["dice"]["n"]:
                run.say(
                    f"warning: {spec.class_names[label - 1]} (label {label}) is in the validation cases "
                    f"but not predicted anywhere"
                )
        figures[way] = float(summary["overall"]["dice"]["mean"])
    if len(figures) < 2:
        return {"val_dice": next(iter(figures.values()), float("nan"))}
    return {"val_dice": float(np.mean(list(figures.values()))), "val_dice_prompted": figures["prompted"]}


def stacked(model: nn.Module, slices: Sequence[SliceFile], bad: BadSamples) -> list[tuple[np.ndarray, np.ndarray]]:
    """The slices of a case that can be read, as images (D, H, W) or (D, H, W, C) and labels (D, H, W), one pair a size.

    Of a case as `samlora prepare` makes it that is one pair. Raises InputError where there are several sizes and the
    model sees neighbouring slices together.
    """
    of_size: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
    for image, label in bad.readable(slices):
        of_size.setdefault(label.shape, []).append((image, label))
    if len(of_size) > 1 and (system_row(model.spec.system).volumetric or model.chunk > 1):
        sizes = ", ".join(" x ".join(map(str, size)) for size in of_size)
        raise InputError(
            f"{slices[0].path.parent}: the slices of {slices[0].case} have several sizes ({sizes}), but this system "
            "sees neighbouring slices together; prepare the data again, or choose another --system"
        )
    return [tuple(map(np.stack, zip(*pairs))) for pairs in of_size.values()]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One label map of all pixels of several; where they lie in it does not matter to Dice."""
    return parts[0] if len(parts) == 1 else np.concatenate([part.ravel() for part in parts])[None, None]


def answers(
    model: nn.Module,
    images: np.ndarray,
    truth: np.ndarray,
    prompting: Prompting,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, np.ndarray]:
    """Labels (D, H, W) of a stack, by each way a system answers: "automatic", and "prompted" by the reference.

    The model answers as it will when it is loaded: without dropout, and with the statistics it has learned, which stay.
    """
    row, found, training = system_row(model.spec.system), {}, model.training
    model.eval()
    if row.automatic:
        found["automatic"] = predict_slices(model, images, model.spec.image_size, device=device, precision=dtype)
    if row.promptable:
        found["prompted"] = predict_prompted(model, images, truth, prompting, device=device, precision=dtype)
    model.train(training)
    return found


def preview(
    run: Run,
    config: TrainConfig,
    model: nn.Module,
    data: Data,
    fabric,
    dtype: torch.dtype,
    step: int,
    bad: BadSamples,
    prompting: Prompting,
) -> None:
    """Draws predictions on a validation case, else on a training case, as preview.png and for TensorBoard."""
    if not run.writes:
        return
    slices = sorted(data.val or data.train, key=place)
    parts = stacked(model, [s for s in slices if s.case == slices[0].case], bad)
    if not parts:
        return
    images, truths = max(parts, key=lambda part: np.count_nonzero(part[1]))  # of several sizes the one that shows most
    truths, _ = split_ignored(truths, model.spec.recipe)
    # Of a case of many slices only those that are drawn are predicted, unless the model sees slices together.
    shown: Sequence[int] = range(len(truths))
    if model.chunk == 1 and not system_row(model.spec.system).volumetric:
        shown = informative_slices(truths, SHOWN, len(truths))
    found = answers(model, images[shown], truths[shown], prompting, fabric.device, dtype)
    prediction = np.zeros_like(truths)
    prediction[shown] = next(iter(found.values()))
    path, names = run.folder / "preview.png", dict(enumerate(model.spec.class_names, start=1))
    case = Case(images, truths, read_geometry(config.root_path, slices[0].case))
    contact_sheet(to_show(images), truths, prediction, path, names, **case.display)
    run.add_image(path, step)
