"""One run of a comparison: trained on its cases, measured on those held out.

`python -m samlora.compare.job FOLDER PID` does it while the process PID lives. In its folder: job.json (what it is
made from, written first), train.txt (the slices), the run folder of training, what it printed, predictions.npz, and
result.json, written last, so that a job that has it is done.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samlora.allocator import keep_freed_memory
from samlora.data.dataset import SliceFile, data_folder, find_slices, read_geometry, read_recipe
from samlora.data.grid import Case, Geometry
from samlora.data.ignored import split_ignored, with_ignored
from samlora.errors import InputError
from samlora.evaluation.metrics import evaluate_case
from samlora.evaluation.report import informative_slices
from samlora.files import whole
from samlora.options import make
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig

# What may differ between a result and what is asked for: it changes no figure.
PLACE = (
    "root_path", "output", "list_dir", "ckpt", "resume", "device", "num_workers", "save_seconds",
    "save_steps", "save_interval", "checkpointing", "cache_samples", "cache_embeddings",
)  # fmt: skip
MEASURED_WITH = "measured_with"  # the prompts, among what a result depends on
_FORMAT = 1
_WATCH = 0.5  # seconds between looks at whether the command still lives


@dataclasses.dataclass(frozen=True)
class Job:
    """One system, trained once. values: options of training, complete. shots: training cases, None for all.

    in_mm: whether the size of the voxels is known for all cases. data, base: what tells apart slices and base weights.
    prompting: how it is asked when it is measured; None where it has no prompts.
    """

    name: str
    folder: Path
    fold: int
    seed: int
    shots: int | None
    values: Mapping[str, Any]
    ways: tuple[str, ...]
    train: tuple[str, ...]
    held: tuple[str, ...]
    in_mm: bool
    data: str
    base: Sequence[Any] | None
    prompting: Prompting | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """What the result depends on, as JSON holds it: of the options those that are not at their defaults.

        So an option that a later version adds makes no result a stranger.
        """
        usual, config = _usual(), dataclasses.asdict(make(TrainConfig, self.values))
        made = {name: value for name, value in config.items() if name not in PLACE and value != usual[name]}
        cases = {"train": self.train, "held": self.held, "ways": self.ways, "in_mm": self.in_mm}
        inputs = {"format": _FORMAT, **made, **cases, "data": self.data, "base": self.base}
        if self.prompting is not None:
            inputs[MEASURED_WITH] = prompts_told(self.prompting)
        return json.loads(json.dumps(inputs))

    def write(self) -> None:
        """Writes job.json."""
        values = dataclasses.asdict(self) | {"folder": str(self.folder), "inputs": self.inputs}
        with whole(self.folder / "job.json") as part:
            part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """The job that `write` described."""
        values = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        values = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        lists = {name: tuple(values[name]) for name in ("ways", "train", "held")}
        asked = values["prompting"] and Prompting(**values["prompting"])
        return cls(**values | lists | {"folder": folder, "prompting": asked})

    def result(self) -> dict | None:
        """What the job gave, if it is done and was made from the same inputs."""
        return self._stored(lambda inputs: inputs)

    def measured_otherwise(self) -> dict | None:
        """What the same training gave, with whatever prompts it was measured; None where it is not done."""
        return self._stored(lambda inputs: {name: of for name, of in inputs.items() if name != MEASURED_WITH})

    def _stored(self, told_by: Callable[[dict], dict]) -> dict | None:
        """result.json, where what tells results apart is the same."""
        try:
            result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
            return _with_nan(result) if told_by(result["inputs"]) == told_by(self.inputs) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begun(self) -> bool:
        """Whether a job was begun in this folder, and made from just the same."""
        return (self.folder / "job.json").is_file() and self.changed() is None

    def changed(self) -> str | None:
        """What a job begun in this folder was made from otherwise, in words; None where it agrees or there is none.

        What it was measured with does not count: it is measured again, without being trained again.
        """
        try:
            former = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))["inputs"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        usual, inputs = _usual(), self.inputs
        for name in sorted((former.keys() | inputs.keys()) - {MEASURED_WITH}):
            theirs, ours = (values.get(name, usual.get(name)) for values in (former, inputs))
            if theirs != ours:
                brief = not isinstance(ours, list | dict) and len(str(ours)) < 30
                return f"{name} {theirs}, not {ours}" if brief else f"other {name}"
        return None


def prompts_told(prompting: Prompting) -> str:
    """The prompts of a measurement in short words; equal words are equal prompts.

    What `predict_prompted` makes no use of (jitter, the number of objects) makes no difference.
    """
    one = prompting
    # Where an answer is least sure is known from the second point on.
    chosen = "random" if one.point_strategy == "entropy" and one.sample_num < 2 else one.point_strategy
    points = f"{one.sample_num} point{'s' * (one.sample_num != 1)}"
    points += f" + {one.negative_num} beside" * (one.negative_num > 0)
    words = {
        "no": "none",
        "box": "box",
        "full_box": "box of the whole image",
        "pt": f"{points}, {chosen}",
        "pt_box": f"box + {points}, {chosen}",
        "any": f"box or {points} or both by chance, {chosen}",
    }
    return words[one.prompt] + "; each part of a class" * one.parts


def _usual() -> dict[str, Any]:
    """The defaults of all options of training, as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(TrainConfig())))


def run_job(job: Job, own_process: bool = True) -> None:
    """Trains (or goes on training) and measures; writes result.json.

    own_process: whether the memory of this process is that of the job alone. Raises what training raises.
    """
    from samlora.training.loop import train

    slices: dict[str, list[SliceFile]] = {}
    for item in find_slices(job.values["root_path"]):
        slices.setdefault(item.case, []).append(item)
    listed = dict.fromkeys(item.path.stem for case in job.train for item in slices[case])
    with whole(job.folder / "train.txt") as part:
        part.write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")
    former = job.measured_otherwise()
    run = train(make(TrainConfig, {**job.values, "resume": True}))
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    adapter = next(p for p in (run / "adapter_best.safetensors", run / "adapter_last.safetensors") if p.is_file())
    ways, pictures = _measure(job, adapter, slices)
    with whole(job.folder / "predictions.npz") as part:
        np.savez_compressed(part, **pictures)
    # Where nothing was left to train, what this process took is not what training takes.
    memory = former["peak_memory_bytes"] if former else facts["peak_memory_bytes"] if own_process else math.nan
    kept = ("steps", "seconds", "trained_parameters", "total_parameters", "device", "precision", "effective_batch")
    result = {
        "inputs": job.inputs,
        "run": str(run.relative_to(job.folder)),
        "adapter": adapter.name,
        "adapter_bytes": adapter.stat().st_size,
        "peak_memory_bytes": memory,
        **{name: facts[name] for name in kept},
        **{name: facts["model"][name] for name in ("variant", "base", "image_size", "class_names")},
        "ways": ways,
    }
    with whole(job.folder / "result.json") as part:
        part.write_text(json.dumps(_without_nan(result), allow_nan=False) + "\n", encoding="utf-8")


def _measure(
    job: Job, adapter: Path, slices: Mapping[str, Sequence[SliceFile]]
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """way -> {"seconds", "cases", "prompts" if it was asked by any}, and what it found on each case's shown slice."""
    from samlora.device import DTYPES, pick_device, pick_precision
    from samlora.inference.prompted import predict_prompted
    from samlora.inference.slices import predict_slices
    from samlora.model.build import load_model
    from samlora.model.lora import merge

    config = make(TrainConfig, job.values)
    device = pick_device(config.device)
    model = load_model(adapter, "default" if config.ckpt in (None, "random") else config.ckpt)
    merge(model)
    model.to(device)
    side, dtype = model.spec.image_size, DTYPES[pick_precision(config.precision, device)]
    ways: dict[str, dict] = {way: {"seconds": {}, "cases": {}} for way in job.ways}
    if job.prompting is not None:
        ways["prompted"]["prompts"] = prompts_told(job.prompting)
    pictures = {}
    for number, case in enumerate(job.held):
        held = read_held(job.values["root_path"], case, slices[case])
        images, truth = held.images, held.truth
        for way, found in ways.items():
            began = time.perf_counter()
            if way == "automatic":
                labels = predict_slices(model, images, side, device=device, precision=dtype)
            else:
                labels = predict_prompted(model, images, truth, job.prompting, device=device, precision=dtype)
            found["seconds"][case] = time.perf_counter() - began
            labels = with_ignored(labels, held.ignored, 0)
            spacing = held.spacing if job.in_mm else None
            classes = range(1, model.spec.num_classes + 1)
            thick = Case(held.images, geometry=held.geometry).has_thickness
            measured = evaluate_case(
                held.placed(labels), held.placed(truth), spacing, classes, has_thickness=thick
            )
            found["cases"][case] = measured["strict"]
            pictures[f"{way}_{number}"] = labels[held.shown]
    return ways, pictures


@dataclasses.dataclass(frozen=True)
class Held:
    """A held-out case as its training slices show it: images (n, H, W) or (n, H, W, C), truth (n, H, W).

    places: which slice of the volume each is, of `depth`. spacing: mm along (slice, row, column), None where unknown.
    ignored: as of a `samlora.data.grid.Case`.
    """

    name: str
    images: np.ndarray
    truth: np.ndarray
    places: tuple[int, ...]
    depth: int
    spacing: tuple[float, float, float] | None
    geometry: Geometry | None
    ignored: np.ndarray | None = None

    @property
    def shown(self) -> int:
        """The slice that shows most of its classes."""
        return informative_slices(self.truth, 1, len(self.truth))[0]

    @property
    def display(self) -> dict[str, bool | float]:
        """As `samlora.data.grid.Case.display`, with the proportions of the slices as they are stored."""
        shown = Case(self.images, geometry=self.geometry).display
        return shown | {"aspect": self.spacing[1] / self.spacing[2]} if self.spacing else shown

    def placed(self, labels: np.ndarray) -> np.ndarray:
        """A stack (n, H, W) of labels in the volume (depth, H, W); slices that were not prepared are background."""
        volume = np.zeros((self.depth, *labels.shape[1:]), labels.dtype)
        volume[list(self.places)] = labels
        return volume


def read_held(root: str | Path, case: str, slices: Sequence[SliceFile]) -> Held:
    """Reads the slices of a case and, as far as `samlora prepare` recorded it, where they lie."""
    arrays = [item.read() for item in slices]
    if len({label.shape for _, label in arrays}) > 1:
        raise InputError(f"{slices[0].path}: the slices of {case} have several sizes; prepare the data again")
    images, truth = (np.stack(kind) for kind in zip(*arrays))
    recipe = read_recipe(root)
    truth, ignored = split_ignored(truth, None if recipe is None else recipe.to_dict())
    geometry, size = read_geometry(root, case), None
    if geometry is not None:
        record = data_folder(root, "train_npz", "--root_path").parent / "cases" / f"{case}.json"
        size = json.loads(record.read_text(encoding="utf-8"))["size"]
    places = [item.index if item.index is not None else _number(item.path.stem) for item in slices]
    if size is None:
        return Held(case, images, truth, tuple(range(len(truth))), len(truth), None, None, ignored)
    if None in places or max(places) >= size[0]:
        raise InputError(f"{slices[0].path}: is no slice of {record.name}; prepare the data again")
    spacing = Case(images, geometry=geometry).spacing
    if spacing is not None:  # training slices may have been resized
        ratios = (old / new for old, new in zip(size[1:3], truth.shape[1:]))
        spacing = (spacing[0], *(s * ratio for s, ratio in zip(spacing[1:], ratios)))
    return Held(case, images, truth, tuple(places), size[0], spacing, geometry, ignored)


def knows_spacing(root: str | Path, case: str) -> bool:
    """Whether the size of a case's voxels was recorded."""
    geometry = read_geometry(root, case)
    return geometry is not None and geometry.has_spacing


def _number(stem: str) -> int | None:
    """Which slice of its volume a file is: case0005_slice012 is number 12."""
    _, _, number = stem.rpartition("_slice")
    return int(number) if number.isdigit() else None


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(result: dict) -> dict:
    """The measures as `evaluate_case` gave them: labels are numbers, what is undefined is NaN."""
    for found in result["ways"].values():
        found["cases"] = {
            case: {int(n): {key: math.nan if v is None else v for key, v in of.items()} for n, of in labels.items()}
            for case, labels in found["cases"].items()
        }
    if result["peak_memory_bytes"] is None:
        result["peak_memory_bytes"] = math.nan
    return result


def end_with(parent: int) -> None:
    """Sends this process SIGTERM once the process that started it is gone, so that training does not go on unseen.

    A command that is killed cannot tell its runs; that they have another parent then tells them, on Linux and macOS.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Runs the job of the folder that is named, as long as the process lives that is named after it.

    2 after one line about input that cannot be used.
    """
    keep_freed_memory()
    if len(sys.argv) > 2:
        end_with(int(sys.argv[2]))
    try:
        run_job(Job.read(Path(sys.argv[1])))
    except InputError as error:
        print(f"samlora: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
