"""Testing on labelled volumes: `volume -> slices -> logits -> labels -> metrics, NIfTI`."""

import functools
import time
from pathlib import Path

import numpy as np
from torch import nn

from samlora.data.dataset import find_volumes
from samlora.data.grid import Case, case_to_volume, to_show
from samlora.data.ignored import with_ignored
from samlora.data.recipe import Recipe
from samlora.data.volume import read_case, write_volume
from samlora.device import DTYPES, device_name, exact_float32, pick_device, pick_precision
from samlora.errors import InputError
from samlora.evaluation.frames import Worst, case_mean, draw_frames
from samlora.evaluation.metrics import POLICIES, evaluate_case, summarise
from samlora.evaluation.page import write_page
from samlora.evaluation.report import (
    contact_sheet,
    table,
    write_metrics_csv,
    write_summary_json,
)
from samlora.inference.config import TestConfig
from samlora.inference.ensemble import Averaged, without_exchanges
from samlora.inference.postprocess import Postprocess
from samlora.inference.slices import check_automatic, predict_slices
from samlora.journal import Journal
from samlora.model.build import load_model
from samlora.model.checkpoint import Spec, guess_spec, read_adapter
from samlora.model.lora import merge
from samlora.model.methods import named_system, system_row

PUBLISHED_INPUT_SIZE = 224
CASES_SHOWN = 12  # in report.html, the worst


def test(config: TestConfig) -> dict[str, dict]:
    """Predicts and measures every volume; returns policy -> summary over cases.

    Writes report.html, metrics.csv (case x class), summary.json, log.txt, overlays/CASE.png and, if asked, NIfTI
    files into `output_dir`. Raises InputError for files and options that do not fit together; for a volume that does
    not fit the adapter when its turn comes, and what was written for earlier ones stays.
    """
    import torch

    if config.volume_path is None:
        raise InputError("--volume_path is missing; give the folder of prepared data (samlora prepare makes one)")
    if config.lora_ckpt is None:
        raise InputError("--lora_ckpt is missing; give the adapter that train.py printed at its end")
    device = pick_device(config.device)
    exact_float32()
    precision = pick_precision(config.precision, device)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = not config.deterministic
    paths = find_volumes(config.volume_path, config.list_dir)
    model = load_tested(config)
    spec: Spec = model.spec
    names = dict(enumerate(spec.class_names, start=1))
    input_size = wanted_input_size(config, spec)
    postprocess = Postprocess.parse(config.postprocess) if config.postprocess else None
    merge(model)
    model = (Averaged([model], flips=True).eval() if config.tta else model).to(device)
    with_neighbours = spec.recipe is not None and Recipe.from_dict(spec.recipe).channels == "neighbours"

    out = Path(config.output_dir)
    journal = Journal(out, f"--output_dir {out}")
    shrunk = f", slices shrunk to {input_size} px first" if input_size else ""
    heading = f"{spec.system} on {spec.variant}, base {spec.base}, {spec.image_size} px{shrunk}"
    journal.say(heading)
    if getattr(model, "note", ""):
        journal.say(model.note)
    journal.say(f"{len(paths)} volumes of {config.dataset}, device {device_name(device)}, {precision}")
    results: dict[str, dict] = {policy: {} for policy in POLICIES}
    worst, in_mm = Worst(CASES_SHOWN), True
    for path in _progress(paths):
        case = labelled_case(path, spec, config.lora_ckpt)
        began = time.perf_counter()
        predict = functools.partial(
            predict_slices,
            image=case.image,
            image_size=spec.image_size,
            input_size=input_size,
            batch_size=config.batch_size,
            device=device,
            precision=DTYPES[precision],
            with_neighbours=with_neighbours,
        )
        prediction, remark = without_exchanges(model, predict)
        if remark:
            journal.say(f"{case.name}: {remark}")
        if postprocess is not None:
            prediction = postprocess(prediction, case.spacing)
        seconds = time.perf_counter() - began
        counted = with_ignored(prediction, case.ignored, 0)
        measured = evaluate_case(
            counted,
            case.label,
            case.spacing,
            list(names),
            has_thickness=case.has_thickness,
        )
        for policy, measures in measured.items():
            results[policy][case.name] = measures
        measures, in_mm = results[config.metric_policy][case.name], in_mm and case.spacing is not None
        draw = functools.partial(draw_frames, to_show(case.image), case.label, counted, **case.display)
        worst.offer(case.name, measures, draw)
        dice, hd95 = (case_mean(measures, name) for name in ("dice", "hd95"))
        unit = "mm" if case.spacing and config.metric_policy == "strict" else "voxels"
        journal.say(
            f"{case.name}: {len(prediction)} slices in {seconds:.1f} s, Dice {dice:.4f}, HD95 {hd95:.2f} {unit}"
        )
        picture = out / "overlays" / f"{case.name}.png"
        contact_sheet(to_show(case.image), case.label, counted, picture, names, **case.display)
        if config.is_savenii:
            save_nifti(case, prediction, out / "predictions")
    summaries = {policy: summarise(cases) for policy, cases in results.items()}
    write_metrics_csv(out / "metrics.csv", results, names)
    about = {
        "adapter": str(config.lora_ckpt),
        "dataset": config.dataset,
        "system": spec.system,
        "variant": spec.variant,
        "image_size": spec.image_size,
        "input_size": input_size,
        "tta": config.tta,
        "postprocess": list(config.postprocess),
        "samlora": spec.samlora_version,
        "policy": config.metric_policy,
    }
    write_summary_json(out / "summary.json", summaries, names, about)
    summaries = {config.metric_policy: summaries[config.metric_policy]} | summaries
    unit = "mm" if in_mm else "px"
    for line in table(summaries, names, unit).splitlines():
        journal.say(line)
    facts = {"Adapter": str(config.lora_ckpt), "Data": f"{config.volume_path} ({config.dataset})", "Model": heading}
    write_page(
        out / "report.html", results, summaries, names, worst.frames, facts, policy=config.metric_policy, unit=unit
    )
    predictions = ", predictions/" if config.is_savenii else ""
    journal.say(f"written to {out}: report.html, metrics.csv, summary.json, overlays/, log.txt{predictions}")
    journal.close()
    return summaries


def load_tested(config: TestConfig) -> nn.Module:
    """The adapter's model. Raises InputError for a flag that says otherwise than the adapter."""
    tensors, spec = read_adapter(config.lora_ckpt)
    known = guess_spec(tensors, config.lora_ckpt) if spec is None else vars(spec)
    given = {
        "num_classes": config.num_classes,
        "rank": config.rank,
        "variant": config.vit_name,
        "system": named_system(config.system, config.module),
        "image_size": config.img_size,
    }
    flags = {"variant": "vit_name", "image_size": "img_size"}
    for name, value in given.items():
        if value is not None and known.get(name, value) != value:
            flag = flags.get(name, name)
            raise InputError(f"--{flag} {value}: the adapter {config.lora_ckpt} has {known[name]}; leave the flag out")
    model = load_model(config.lora_ckpt, config.ckpt or "default", image_size=config.img_size)
    check_automatic(model, config.lora_ckpt)
    return model


def wanted_input_size(config: TestConfig, spec: Spec) -> int | None:
    """The side slices are shrunk to before they are enlarged to the model's size, or None.

    Raises InputError where it has to be given: stretched slices of another size are blurred, volumes of another scale.
    """
    if config.input_size is not None:
        return config.input_size or None
    if spec.recipe is None and system_row(spec.system).volumetric:
        raise InputError(
            "--input_size is missing: the adapter holds no recipe, so the size of its training slices is not known; "
            "give their side, or 0 where these volumes are as they were"
        )
    return PUBLISHED_INPUT_SIZE if spec.recipe is None else Recipe.from_dict(spec.recipe).size


def labelled_case(path: Path, spec: Spec, adapter: str) -> Case:
    """A volume with labels that the adapter can be measured on; InputError otherwise."""
    case = read_case(path)
    if case.label is None:
        raise InputError(f"{path}: holds no label; test.py measures against labels")
    highest = int(case.label.max())
    if case.label.min() < 0 or highest > spec.num_classes:
        raise InputError(
            f"{path}: label values up to {highest}, but the adapter {adapter} has "
            f"{spec.num_classes} classes; prepare the data with the label map of its training"
        )
    if case.recipe is not None and spec.recipe is not None:
        differences = Recipe.from_dict(spec.recipe).differences(Recipe.from_dict(case.recipe))
        if differences:
            raise InputError(
                f"{path}: was prepared otherwise than the adapter's training data "
                f"({'; '.join(differences)}); prepare it with the same recipe"
            )
    return case


def save_nifti(case: Case, prediction: np.ndarray, folder: Path) -> None:
    """Writes <case>_pred, _img and _gt.nii.gz on the grid of the source file, masks as integers."""
    for kind, array in (("pred", prediction), ("img", case.image), ("gt", case.label)):
        write_volume(case_to_volume(case, array), folder / f"{case.name}_{kind}.nii.gz")


def _progress(paths: list[Path]):
    from tqdm import tqdm

    return tqdm(paths, desc="testing", unit="volume", dynamic_ncols=True, disable=None)
