"""What a run shows of itself while it trains: Dice on the validation cases, a preview."""

from itertools import groupby

import numpy as np
import torch
from torch import nn

from samlora.data.dataset import read_geometry
from samlora.data.grid import Case, to_show
from samlora.evaluation.metrics import evaluate, summarise
from samlora.evaluation.report import contact_sheet
from samlora.inference.slices import predict_slices
from samlora.model.checkpoint import Spec
from samlora.training.config import TrainConfig
from samlora.training.reading import BadSamples
from samlora.training.run import Run
from samlora.training.setup import Data


def validate(
    model: nn.Module, data: Data, device: torch.device, dtype: torch.dtype, run: Run, bad: BadSamples
) -> float:
    """Mean Dice over the classes and cases of the validation slices, in their own pixels."""
    spec: Spec = model.spec
    labels = range(1, spec.num_classes + 1)
    found, cases = set(), {}
    for case, items in groupby(sorted(data.val, key=lambda s: s.name), key=lambda s: s.case):
        arrays = list(bad.readable(items))
        if not arrays:
            continue
        images, truths = zip(*arrays)
        truth = np.stack(truths)
        prediction = predict_slices(model, np.stack(images), spec.image_size, device=device, precision=dtype)
        found.update(np.unique(prediction).tolist())
        cases[case] = evaluate(prediction, truth, (1, 1, 1), labels, distances=False)
    summary = summarise(cases)
    for label in labels:
        if label not in found and summary["classes"][label]["dice"]["n"]:
            run.say(
                f"warning: {spec.class_names[label - 1]} (label {label}) is in the validation cases "
                f"but not predicted anywhere"
            )
    return float(summary["overall"]["dice"]["mean"])


def preview(
    run: Run,
    config: TrainConfig,
    model: nn.Module,
    data: Data,
    device: torch.device,
    dtype: torch.dtype,
    step: int,
    bad: BadSamples,
) -> None:
    """Draws predictions on a validation case, else on a training case, as preview.png and for TensorBoard."""
    if not run.writes:
        return
    slices = data.val or data.train
    arrays = list(bad.readable(s for s in slices if s.case == slices[0].case))
    if not arrays:
        return
    images, truths = map(np.stack, zip(*arrays))
    prediction = predict_slices(model, images, model.spec.image_size, device=device, precision=dtype)
    path, names = run.folder / "preview.png", dict(enumerate(model.spec.class_names, start=1))
    case = Case(images, truths, read_geometry(config.root_path, slices[0].case))
    contact_sheet(to_show(images), truths, prediction, path, names, **case.display)
    run.add_image(path, step)
