"""Prediction without labels: `files -> volume -> slices -> labels -> files on the input's own grid`."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from samlora.colours import class_colour
from samlora.data.folders import Pair, few
from samlora.data.grid import Case, Volume, case_to_volume, to_show
from samlora.data.recipe import Recipe
from samlora.data.sources import find_images, read_image
from samlora.data.volume import read_case, read_volume, write_dicom_seg, write_volume
from samlora.device import DTYPES, device_name
from samlora.engine import launch
from samlora.errors import InputError
from samlora.evaluation.animation import animation
from samlora.evaluation.report import contact_sheet
from samlora.files import identity, whole
from samlora.inference.config import PredictConfig
from samlora.inference.ensemble import Averaged
from samlora.inference.postprocess import Postprocess
from samlora.inference.slices import check_automatic, predict_slices
from samlora.journal import Journal
from samlora.model.build import load_model
from samlora.model.checkpoint import Spec
from samlora.model.lora import merge

# What a label map is written as, by what its image came as; everything else becomes NIfTI.
_ENDINGS = {
    ".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha", ".nii": ".nii", ".npy": ".npy",
    ".png": ".png", ".jpg": ".png", ".jpeg": ".png", ".bmp": ".png", ".tif": ".tif", ".tiff": ".tif",
}  # fmt: skip


def predict_volume(
    model: nn.Module,
    volume: Volume | Case | str | os.PathLike,
    recipe: Recipe | None = None,
    *,
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
    postprocess: Callable[[np.ndarray, Sequence[float] | None], np.ndarray] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Volume:
    """The label map of a volume, uint8 on the volume's own grid.

    model: from `samlora.load_model`, on any device; `samlora.merge` makes it faster. volume: as read by
    `samlora.data.volume.read_volume`, or a path it reads, or a prepared .npy.h5 or Case. recipe: only for models
    whose adapter holds none. postprocess: labels (D, H, W) and spacing in mm, or None -> labels. progress: called
    with the number of slices done. Raises InputError when the recipe is not the adapter's, or volume and recipe do
    not fit.
    """
    recipe = fitting_recipe(model.spec, recipe)
    case = volume if isinstance(volume, Case) else as_case(volume, recipe)
    labels = predict_case(model, case, recipe, batch_size, precision, progress)
    if postprocess is not None:
        labels = postprocess(labels, case.spacing)
    return case_to_volume(case, labels)


def predict_case(
    model: nn.Module,
    case: Case,
    recipe: Recipe,
    batch_size: int,
    precision: torch.dtype,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """The labels (D, H, W) of a prepared case, by the way its recipe says."""
    return predict_slices(
        model,
        case.image,
        model.spec.image_size,
        recipe.size,
        batch_size,
        next(model.parameters()).device,
        precision,
        progress,
        with_neighbours=recipe.channels == "neighbours",
    )


def fitting_recipe(spec: Spec, recipe: Recipe | None) -> Recipe:
    """The recipe of the adapter, or the one given where it has none. Raises InputError where they differ."""
    if spec.recipe is None:
        if recipe is None:
            raise InputError(
                "the adapter holds no recipe (how its slices were made); give it: --recipe NAME or FILE.yaml"
            )
        return recipe
    own = Recipe.from_dict(spec.recipe, "the adapter's recipe")
    differences = [] if recipe is None else own.differences(recipe)
    if differences:
        raise InputError(f"--recipe {recipe.name}: is not the adapter's ({'; '.join(differences)}); leave it out")
    return own


def as_case(volume: Volume | str | os.PathLike, recipe: Recipe) -> Case:
    """A volume, or what lies at a path, as the slices `recipe` makes of it."""
    if not isinstance(volume, Volume):
        if str(volume).endswith(".npy.h5"):
            case = read_case(volume)
            if case.recipe is not None:
                differences = recipe.differences(Recipe.from_dict(case.recipe))
                if differences:
                    raise InputError(f"{volume}: was prepared otherwise ({'; '.join(differences)}); prepare it again")
            return case
        volume = read_volume(volume)
    return recipe.to_case(volume)


def predict(inputs: Sequence[str | os.PathLike], config: PredictConfig) -> Path:
    """Segments files and folders and returns the folder of results.

    Per input one label map on the input's own grid (of DICOM also dicom_seg/NAME.dcm), cases/NAME.json with the
    volume of each class, and overlays/ if asked for. What is there already, made from the same file in the same way,
    is kept. With several devices each process takes its share of the inputs. An input that cannot be used is named,
    and the others go on; then, or where nothing can start at all, InputError is raised.
    """
    out = Path(config.output)
    postprocess = Postprocess.parse(config.postprocess) if config.postprocess else None
    pairs = find_images(inputs)
    fabric, precision = launch(config.device, config.precision, config.n_gpu, config.num_nodes, _strategy(config))
    model = _load(config).to(fabric.device)
    recipe = fitting_recipe(model.spec, None if config.recipe is None else Recipe.load(config.recipe))
    made_by = _made_by(config, recipe)
    jobs = [_Job(pair, out, config, made_by) for pair in pairs]
    mine = jobs[fabric.global_rank :: fabric.world_size]
    for job in mine:
        job.claim()
    journal = Journal(out, f"--output {out}")
    names = dict(enumerate(model.spec.class_names, start=1))
    if fabric.is_global_zero:
        journal.say(_heading(config, model.spec, recipe, len(pairs), device_name(fabric.device), precision))
    failed = []
    for number, job in enumerate(mine):
        if job.done():
            journal.say(f"{job.pair.name}: is there already")
            continue
        try:
            journal.say(_predict_one(job, model, recipe, postprocess, DTYPES[precision], names, number, len(mine)))
        except InputError as error:
            journal.say(f"{job.pair.name}: failed: {error}")
            failed.append(error)
    fabric.barrier()
    if failed and len(pairs) == 1:
        raise failed[0]
    missing = [job.pair.name for job in jobs if not job.done()] if fabric.is_global_zero else failed
    if missing:
        listed = few(map(str, missing))
        raise InputError(f"{len(missing)} of {len(pairs)} inputs failed: {listed}; {out}/log.txt says why")
    if fabric.is_global_zero:
        journal.say(f"{len(pairs)} label maps in {out}")
    journal.close()
    return out


@dataclasses.dataclass
class _Job:
    """One input and what becomes of it."""

    pair: Pair
    out: Path
    config: PredictConfig
    made_by: dict

    @property
    def record(self) -> Path:
        return self.out / "cases" / f"{self.pair.name}.json"

    @property
    def is_dicom(self) -> bool:
        return self.pair.images[0].is_dir()

    def files(self) -> list[Path]:
        """The label maps to write."""
        if self.config.format == "same":
            ending = _ENDINGS.get(self.pair.images[0].suffix.lower(), ".nii.gz")
            seg = [self.out / "dicom_seg" / f"{self.pair.name}.dcm"] if self.is_dicom and _has_highdicom() else []
            return [self.out / f"{self.pair.name}{ending}", *seg]
        ending = ".dcm" if self.config.format == "dicom-seg" else f".{self.config.format}"
        if ending == ".dcm" and not self.is_dicom:
            raise InputError(f"{self.pair.images[0]}: is no DICOM folder, so no --format dicom-seg; choose nii.gz")
        return [self.out / f"{self.pair.name}{ending}"]

    def stamp(self) -> dict:
        return {"source": [identity(path) for path in self.pair.images], **self.made_by}

    def done(self) -> bool:
        """Whether the result is there, whole, and made from the same input in the same way."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            same = {key: record[key] for key in self.stamp()} == self.stamp()
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return same and all(path.is_file() for path in self.files())

    def claim(self) -> None:
        """Raises InputError where a file that is not of this job stands in the way."""
        blocked = [path for path in self.files() if path.exists()]
        if blocked and not self.done() and not self.config.overwrite:
            raise InputError(
                f"{blocked[0]}: is there already, from another input, adapter or set of options; "
                "give --overwrite or another --output"
            )


def _predict_one(
    job: _Job,
    model: nn.Module,
    recipe: Recipe,
    postprocess: Postprocess | None,
    precision: torch.dtype,
    names: dict[int, str],
    number: int,
    count: int,
) -> str:
    """Segments one input, writes everything, and says in one line what was found."""
    from tqdm import tqdm

    began = time.perf_counter()
    path = job.pair.images[0]
    case = as_case(path if str(path).endswith(".npy.h5") else read_image(job.pair, job.config.series), recipe)
    title = f"{number + 1}/{count} {job.pair.name}"
    with tqdm(total=len(case.image), desc=title, unit="slice", leave=False, dynamic_ncols=True, disable=None) as bar:
        labels = predict_volume(
            model,
            case,
            recipe,
            batch_size=job.config.batch_size,
            precision=precision,
            postprocess=postprocess,
            progress=bar.update,
        )
    job.record.unlink(missing_ok=True)
    palette = [tuple(round(255 * c) for c in class_colour(label)) for label in names]
    for file in job.files():
        if file.suffix == ".dcm":
            write_dicom_seg(labels, path, file, list(names.values()), series=job.config.series)
        else:
            write_volume(labels, file, palette=palette)
    _draw(job, case, recipe.to_slices(labels) if case.geometry else labels.array.transpose(2, 1, 0), names)
    seconds = time.perf_counter() - began
    unit, size = ("ml", np.prod(labels.spacing) / 1000) if labels.has_spacing else ("pixels", 1)
    counts = np.bincount(labels.array.ravel(), minlength=len(names) + 1)
    found = {name: float(counts[label] * size) for label, name in names.items()}
    record = {
        **job.stamp(),
        "files": [str(file.relative_to(job.out)) for file in job.files()],
        "unit": unit,
        "found": found,
    }
    with whole(job.record) as part:
        part.write_text(json.dumps(record | {"seconds": seconds}, indent=1) + "\n", encoding="utf-8")
    listed = ", ".join(f"{name} {value:.4g} {unit}" for name, value in found.items() if value)
    return f"{job.pair.name}: {len(case.image)} slices in {seconds:.1f} s: {listed or 'nothing found'}"


def _draw(job: _Job, case: Case, labels: np.ndarray, names: dict[int, str]) -> None:
    if job.config.overlay == "none":
        return
    image, box = to_show(case.image), case.geometry.box if case.geometry else None
    if box is not None:
        labels = labels[:, box[0] : box[1], box[2] : box[3]]
    picture = job.out / "overlays" / f"{job.pair.name}.{job.config.overlay}"
    if job.config.overlay == "gif":
        animation(image, labels, picture, names, **case.display)
    else:
        contact_sheet(image, None, labels, picture, names, **case.display)


def _load(config: PredictConfig) -> nn.Module:
    models = [load_model(adapter, config.ckpt or "default") for adapter in config.adapter]
    for adapter, model in zip(config.adapter, models):
        check_automatic(model, adapter)
        merge(model)
    return Averaged(models, config.tta).eval() if config.tta or len(models) > 1 else models[0]


def _made_by(config: PredictConfig, recipe: Recipe) -> dict:
    """What decides a result beside its input. A change of it makes results anew."""
    adapters = [hashlib.sha256(Path(adapter).read_bytes()).hexdigest() for adapter in config.adapter]
    options = {name: getattr(config, name) for name in ("tta", "series", "precision", "format", "overlay")}
    options["postprocess"] = list(config.postprocess)
    return {"adapters": adapters, "recipe": recipe.to_dict(), "options": options}


def _heading(config: PredictConfig, spec: Spec, recipe: Recipe, count: int, device: str, precision: str) -> str:
    models = "" if len(config.adapter) == 1 else f", mean of {len(config.adapter)} adapters"
    flips = ", mean of 4 flips" if config.tta else ""
    base = f"{spec.system} on {spec.variant}, base {spec.base}, {spec.image_size} px{models}{flips}"
    return (
        f"{base}; recipe {recipe.name}, {len(spec.class_names)} classes; {count} inputs, device {device}, {precision}"
    )


def _strategy(config: PredictConfig) -> str:
    return "ddp" if config.n_gpu * config.num_nodes > 1 else "auto"


def _has_highdicom() -> bool:
    import importlib.util

    return importlib.util.find_spec("highdicom") is not None
