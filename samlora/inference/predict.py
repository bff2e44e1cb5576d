"""Prediction without labels: `files -> volume -> slices -> labels -> files on the input's own grid`."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from samlora.colours import class_colour
from samlora.data.folders import Pair, few, not_read_note
from samlora.data.given import check_case, check_volume, kind_of, whole_number
from samlora.data.grid import Case, Volume, case_to_volume, to_show
from samlora.data.recipe import Recipe
from samlora.data.sources import find_images, left_out, read_image
from samlora.data.volume import read_case, read_volume, write_dicom_seg, write_volume
from samlora.device import DTYPES, device_name
from samlora.engine import launch
from samlora.errors import InputError, NoSegmentationError
from samlora.evaluation.animation import animation
from samlora.evaluation.report import contact_sheet
from samlora.files import identity, whole
from samlora.inference.config import PredictConfig
from samlora.inference.ensemble import Averaged, without_exchanges
from samlora.inference.postprocess import Postprocess
from samlora.inference.slices import check_automatic, predict_slices
from samlora.journal import Journal
from samlora.model.bases import BASES, default_base
from samlora.model.build import load_model
from samlora.model.checkpoint import Spec
from samlora.model.lora import merge

# What a label map is written as, by what its image came as; everything else becomes NIfTI.
_ENDINGS = {
    ".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha", ".nii": ".nii", ".npy": ".npy",
    ".png": ".png", ".jpg": ".png", ".jpeg": ".png", ".bmp": ".png", ".webp": ".png", ".jp2": ".png", ".j2k": ".png",
    ".tif": ".tif", ".tiff": ".tif", ".gif": ".tif",
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
    if not isinstance(getattr(model, "spec", None), Spec):
        raise InputError(f"{kind_of(model)} is no model of samlora; load one with samlora.load_model")
    batch_size = whole_number(batch_size, "batch_size", 1)
    check_automatic(model, "the model")
    recipe = fitting_recipe(model.spec, recipe)
    case = check_case(volume) if isinstance(volume, Case) else as_case(volume, recipe)
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
    if recipe is not None and not isinstance(recipe, Recipe):
        raise InputError(f"recipe: is of type {kind_of(recipe)}; a Recipe is needed: Recipe.load(NAME_OR_FILE)")
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
    """A volume, or what lies at a path, as the slices `recipe` makes of it. Raises InputError for anything else."""
    if isinstance(volume, Volume):
        check_volume(volume)
    elif not isinstance(volume, str | os.PathLike):
        raise InputError(
            f"a volume is of type {kind_of(volume)}; give a path, or samlora.data.grid.Volume(array, affine): an array "
            "alone does not say how large its voxels are and which way they lie"
        )
    else:
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

    By the classes that an adapter draws by itself, or by boxes (`samlora.inference.boxes`). Per input one label map on
    the input's own grid (of DICOM also dicom_seg/NAME.dcm), cases/NAME.json with the volume of each class, and
    overlays/ if asked for. What is there already, made from the same file in the same way, is kept. With several
    devices each process takes its share of the inputs. An input that cannot be used is named, and the others go on;
    then, or where nothing can start at all, InputError is raised.
    """
    out = Path(config.output)
    postprocess = Postprocess.parse(config.postprocess) if config.postprocess else None
    pairs = find_images(inputs)
    fabric, precision = launch(config.device, config.precision, config.n_gpu, config.num_nodes, _strategy(config))
    segmenter: Segmenter
    if config.by_boxes:
        segmenter, pairs, notes = _by_boxes(config, pairs, fabric.device, DTYPES[precision])
    else:
        segmenter = _Automatic(config, fabric.device, DTYPES[precision])
        notes = segmenter.notes
    options = _options(config)
    jobs = [_Job(pair, out, config, options | segmenter.made_by(pair)) for pair in pairs]
    mine = jobs[fabric.global_rank :: fabric.world_size]
    for job in mine:
        job.claim()
    journal = Journal(out, f"--output {out}")
    if fabric.is_global_zero:
        device = device_name(fabric.device)
        journal.say(f"{segmenter.heading}; {len(pairs)} inputs, device {device}, {precision}")
        for note in [*notes, *not_read_note(left_out(inputs))]:
            journal.say(note)
    failed = []
    for number, job in enumerate(mine):
        if job.done():
            journal.say(f"{job.pair.name}: is there already")
            continue
        try:
            journal.say(_predict_one(job, segmenter, postprocess, number, len(mine)))
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


class Segmenter(Protocol):
    """What makes the label map of an input: a system by itself, or boxes."""

    heading: str
    remark: str  # on the case whose labels were made last, for people; "" if there is none

    def made_by(self, pair: Pair) -> dict:
        """What decides the result of an input beside its file and `_options`, as plain data."""

    def read(self, pair: Pair, series: str | None) -> Case:
        """The slices of an input."""

    def steps(self, case: Case) -> int:
        """The sum of what `labels` reports as progress."""

    def labels(
        self, pair: Pair, case: Case, progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """The labels (D, H, W) of a case, and their names."""


class _Automatic:
    """The classes that one system, or the mean of several, draws by itself."""

    def __init__(self, config: PredictConfig, device: torch.device, precision: torch.dtype):
        self._model = _load(config).to(device)
        self._recipe = fitting_recipe(self._model.spec, None if config.recipe is None else Recipe.load(config.recipe))
        self._batch_size, self._precision = config.batch_size, precision
        self._names = dict(enumerate(self._model.spec.class_names, start=1))
        note = getattr(self._model, "note", "")
        flips = config.tta and not note
        self.heading = _heading(config, self._model.spec, self._recipe, flips)
        self.notes = [note] if note else []
        self.remark = ""

    def made_by(self, pair: Pair) -> dict:
        return {"recipe": self._recipe.to_dict()}

    def read(self, pair: Pair, series: str | None) -> Case:
        path = pair.images[0]
        return as_case(path if str(path).endswith(".npy.h5") else read_image(pair, series), self._recipe)

    def steps(self, case: Case) -> int:
        return len(case.image)

    def labels(
        self, pair: Pair, case: Case, progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        def predict(model: nn.Module) -> np.ndarray:
            return predict_case(model, case, self._recipe, self._batch_size, self._precision, progress)

        found, self.remark = without_exchanges(self._model, predict)
        return found, self._names


def _by_boxes(
    config: PredictConfig, pairs: Sequence[Pair], device: torch.device, precision: torch.dtype
) -> tuple[Segmenter, list[Pair], list[str]]:
    """What segments by boxes, the inputs that have boxes, and notes for people."""
    # The Predictor reads its images with this module.
    from samlora.inference.boxes import BoxFile, BoxSegmenter, ReferenceBoxes
    from samlora.inference.predictor import Predictor

    if config.boxes is not None:
        boxes = BoxFile(Path(config.boxes), pairs)
    else:
        boxes = ReferenceBoxes(Path(config.boxes_from), pairs, config.box_jitter, config.seed, config.propagate)
    adapter, base, notes = None, config.ckpt or "default", []
    if config.adapter:
        adapter = config.adapter[0]
    elif config.ckpt is None:
        base = default_base()
        if base.name == BASES["vit_ti"].file:
            notes.append(BASES["vit_ti"].note)
    recipe = None if config.recipe is None else Recipe.load(config.recipe)
    predictor = Predictor.load(adapter, base, recipe, device, precision)
    if not predictor.row.promptable:
        raise InputError(f"{adapter}: its system, {predictor.model.spec.system}, takes no prompts; leave the boxes out")
    without = [pair.name for pair in pairs if pair not in boxes]
    if without:
        notes.append(f"no boxes, so left out: {few(without)}")
    return BoxSegmenter(predictor, boxes, config.propagate), [pair for pair in pairs if pair in boxes], notes


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
        """Whether the result is there, complete, and made from the same input in the same way.

        What cannot be written of this input, and was said to be so, is not waited for.
        """
        record = self._record()
        if "found" not in record:  # begun, and not finished
            return False
        there = [self.out / file for file in record["files"]]
        impossible = [self.out / file for file in record.get("not_written", {})]
        return all(path.is_file() for path in there) and set(self.files()) <= {*there, *impossible}

    def claim(self) -> None:
        """Raises InputError where a file that is not of this job stands in the way."""
        blocked = [path for path in self.files() if path.exists()]
        if blocked and not self._record() and not self.config.overwrite:
            raise InputError(
                f"{blocked[0]}: is there already, from another input, adapter or set of options; "
                "give --overwrite or another --output"
            )

    def begin(self) -> None:
        """Marks what is written from now on as of this job, so that the next run finishes it."""
        self.finish({"files": []})

    def finish(self, values: dict) -> None:
        """Records what has become of the job."""
        with whole(self.record) as part:
            part.write_text(json.dumps(self.stamp() | values, indent=1) + "\n", encoding="utf-8")

    def _record(self) -> dict:
        """What is recorded of the same input, made in the same way; empty without it."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            same = {key: record[key] for key in self.stamp()} == self.stamp()
            return record if same and isinstance(record["files"], list) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def _predict_one(job: _Job, segmenter: Segmenter, postprocess: Postprocess | None, number: int, count: int) -> str:
    """Segments one input, writes everything, and says in one line what was found."""
    from tqdm import tqdm

    began = time.perf_counter()
    case = segmenter.read(job.pair, job.config.series)
    title = f"{number + 1}/{count} {job.pair.name}"
    total = segmenter.steps(case)
    with tqdm(total=total, desc=title, unit="slice", leave=False, dynamic_ncols=True, disable=None) as bar:
        stack, names = segmenter.labels(job.pair, case, bar.update)
    if postprocess is not None:
        stack = postprocess(stack, case.spacing)
    labels = case_to_volume(case, stack)
    job.begin()
    written, not_written = _write(job, labels, names)
    _draw(job, case, stack, names)
    seconds = time.perf_counter() - began
    has_volume = labels.has_spacing and labels.has_thickness
    unit, size = ("ml", np.prod(labels.spacing) / 1000) if has_volume else ("pixels", 1)
    counts = np.bincount(labels.array.ravel(), minlength=max(names, default=0) + 1)
    found = {name: float(counts[label] * size) for label, name in names.items()}
    record = {
        "files": written,
        "labels": {str(label): name for label, name in names.items()},
        "unit": unit,
        "found": found,
    }
    if not_written:
        record["not_written"] = not_written
    job.finish(record | {"seconds": seconds})
    listed = ", ".join(f"{name} {value:.4g} {unit}" for name, value in found.items() if value)
    without = "".join(f"; without {file}: {why}" for file, why in not_written.items())
    remark = f" ({segmenter.remark})" if segmenter.remark else ""
    found_text = listed or "nothing found"
    return f"{job.pair.name}: {len(case.image)} slices in {seconds:.1f} s: {found_text}{remark}{without}"


def _write(job: _Job, labels: Volume, names: dict[int, str]) -> tuple[list[str], dict[str, str]]:
    """Writes the label map in every format that is wanted.

    Returns:
        The files that were written, and those that cannot be of this input, with the reason. Raises InputError where
        that is all that was wanted.
    """
    colours = [class_colour(label) for label in range(1, max(names, default=0) + 1)]
    palette = [tuple(round(255 * part) for part in colour) for colour in colours]
    written, not_written = [], {}
    for file in job.files():
        name = str(file.relative_to(job.out))
        if file.suffix != ".dcm":
            write_volume(labels, file, palette=palette)
            written.append(name)
            continue
        # The segments of a DICOM SEG are numbered without gaps; a label map may have some.
        segments = np.zeros(max(names, default=0) + 1, np.uint16)
        segments[list(names)] = range(1, len(names) + 1)
        numbered = dataclasses.replace(labels, array=segments[labels.array])
        try:
            write_dicom_seg(numbered, job.pair.images[0], file, list(names.values()), series=job.config.series)
            written.append(name)
        except NoSegmentationError as error:
            if not written:
                raise
            file.unlink(missing_ok=True)  # that of another adapter or set of options
            not_written[name] = str(error)
    return written, not_written


def _draw(job: _Job, case: Case, labels: np.ndarray, names: dict[int, str]) -> None:
    if job.config.overlay == "none":
        return
    image = to_show(case.image)
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


def _options(config: PredictConfig) -> dict:
    """What decides all results beside their inputs and what `Segmenter.made_by` gives. A change makes results anew."""
    adapters = [hashlib.sha256(Path(adapter).read_bytes()).hexdigest() for adapter in config.adapter]
    options = {name: getattr(config, name) for name in ("tta", "series", "precision", "format", "overlay")}
    options["postprocess"] = list(config.postprocess)
    return {"adapters": adapters, "options": options}


def _heading(config: PredictConfig, spec: Spec, recipe: Recipe, with_flips: bool) -> str:
    models = "" if len(config.adapter) == 1 else f", mean of {len(config.adapter)} adapters"
    flips = ", mean of 4 flips" if with_flips else ""
    base = f"{spec.system} on {spec.variant}, base {spec.base}, {spec.image_size} px{models}{flips}"
    return f"{base}; recipe {recipe.name}, {len(spec.class_names)} classes"


def _strategy(config: PredictConfig) -> str:
    return "ddp" if config.n_gpu * config.num_nodes > 1 else "auto"


def _has_highdicom() -> bool:
    import importlib.util

    return importlib.util.find_spec("highdicom") is not None
