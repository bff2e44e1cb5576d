"""Measuring label maps that lie in files, ours or not: `files -> pairs on one grid -> measures -> tables, page`.

Below the output: metrics.csv (case x class), summary.json and report.html.
"""

import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from samlora.data.findings import columns, few
from samlora.data.folders import folder_or_file, not_read, not_read_note
from samlora.data.recipe import Recipe
from samlora.errors import InputError
from samlora.evaluation.cases import Job, Measured, draw, measure
from samlora.evaluation.frames import badness
from samlora.evaluation.matching import Matched, match_files
from samlora.evaluation.measures import Shown, shown_measures, state
from samlora.evaluation.metrics import POLICIES, evaluate_case, summarise
from samlora.evaluation.names import find_names, named_labels
from samlora.evaluation.page import write_page
from samlora.evaluation.report import write_metrics_csv, write_summary_json
from samlora.processes import each, worker_count

FILES = ("metrics.csv", "summary.json", "report.html")
_COMMAND = "samlora evaluate"
_PRINTED = ("dice", "hd95", "nsd", "volume_error_percent")


@dataclasses.dataclass
class Evaluation:
    """What was measured. `str(evaluation)` is the table for people.

    results: policy -> case -> label -> measures, as `metrics.evaluate` returns them. summaries: policy -> what
    `metrics.summarise` returned, the one asked for first. names: label -> class. unit: of distances, "mm" or "px".
    tolerances: of `nsd`, then of `nsd_1mm` ... notes: what to know about the figures. page_bytes: size of report.html.
    """

    output: Path
    results: dict[str, dict[str, dict[int, dict[str, float]]]]
    summaries: dict[str, dict]
    names: dict[int, str]
    policy: str
    unit: str
    tolerances: tuple[float, ...]
    notes: list[str]
    page_bytes: int = 0

    def __str__(self) -> str:
        summary = self.summaries[self.policy]
        dice, *others = self._first(self.policy)
        rows = [["class", "Dice [%]", "sd", "95 % interval", *(m.brief for m in others), "n", "excl."]]
        entries = [(self.names.get(label, f"class {label}"), of) for label, of in summary["classes"].items()]
        for name, figures in [*entries, ("all classes", summary["overall"])]:
            of = figures["dice"]
            cells = [dice.text(of[key]) for key in ("mean", "sd", "ci_low", "ci_high")]
            cells[2:] = ["-" if cells[2] == "-" else " .. ".join(cells[2:])]
            cells += [m.text(figures[m.key]["mean"], signed=True) for m in others]
            rows.append([name[:20], *cells, str(of["n"]), str(of["n_excluded"])])
        lines = columns(rows, right=range(1, len(rows[0])))
        lines.insert(1, "-" * max(map(len, lines)))
        for policy in self.summaries.keys() - {self.policy}:
            overall = self.summaries[policy]["overall"]
            means = (f"{m.title} {m.text(overall[m.key]['mean'])} {m.unit}" for m in self._first(policy))
            lines.append(f"policy {policy}: {', '.join(means)}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"written to {self.output}: {', '.join(FILES)} ({self.page_bytes / 1e6:.1f} MB)")
        return "\n".join([f"policy {self.policy}, {_counted(summary['n_cases'], 'case')}", *lines])

    def _first(self, policy: str) -> list[Shown]:
        measures = shown_measures(policy, self.unit, self.tolerances)
        return [measures[key] for key in _PRINTED if key in measures]


def evaluate_folders(
    prediction: str | os.PathLike,
    reference: str | os.PathLike,
    output: str | os.PathLike,
    *,
    labels: Sequence[str | int] | None = None,
    names: str | os.PathLike | Mapping[int, str] | None = None,
    policy: str = "strict",
    tolerances: Sequence[float] = (2.0, 1.0, 3.0),
    recipe: Recipe | str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    threshold: float | None = None,
    cases_shown: int = 12,
    workers: int | None = None,
    allow_missing: bool = False,
    overwrite: bool = False,
) -> Evaluation:
    """Measures label maps against their references and writes metrics.csv, summary.json and report.html.

    prediction, reference: two files or two folders, matched by name (`matching.match_files`) and in space: files that
    only order their axes otherwise are measured, other grids are an error. A case may be a folder of masks, one per
    structure, where structures do not overlap. Files that say nothing about millimetres
    (pictures, npy) are measured in pixels; with one such file of the two, its voxels are taken to be the other's.
    labels: values, names, or "NAME=VALUE"; default: the values found. names: a file (`matching.read_names`) or a
    mapping; default: a dataset.json in or above the references, or beside the predictions. policy: whose figures are
    printed and shown first; both are written. tolerances: mm (or pixels) for surface Dice; the first is `nsd`, the
    others are `nsd_1mm` ... recipe: the references hold the values of a data set, the predictions the classes of this
    recipe, from 1 on. images: a folder of images to show the worst `cases_shown` on; default: CASE_img beside the
    prediction. threshold: all files are soft masks; what is above belongs to class 1. allow_missing: a reference
    without prediction counts as an empty prediction instead of an error. workers: processes, by default one per core
    and 8 at most; a script that calls this with more than one needs `if __name__ == "__main__":`. overwrite: writes
    into a folder that holds other things. Raises InputError or MissingFileError naming the file or flag.
    """
    output, tolerances = Path(output), _checked(policy, tolerances, cases_shown)
    recipe = recipe if recipe is None or isinstance(recipe, Recipe) else Recipe.load(recipe)
    matched = match_files(prediction, reference, images)
    called = find_names(matched, names, recipe, Path(prediction), Path(reference))
    wanted, names = named_labels(labels, called.names)
    if matched.missing and not allow_missing:
        raise InputError(
            f"{prediction}: no prediction for {len(matched.missing)} of {len(matched.trios)} references: "
            f"{few(trio.path.name for trio in matched.missing)}; add them, or count them as empty: --allow_missing"
        )
    if not overwrite:
        _claim(output)
    jobs = [
        Job(trio, called.recipe, called.values, threshold, wanted, tolerances, called.ignored)
        for trio in matched.trios
    ]
    workers = worker_count(workers, len(jobs))
    measured = each(measure, jobs, workers, "measuring")
    unit = _unit(measured)
    results = _completed(measured, unit, tolerances)
    summaries = {name: summarise(results[name]) for name in sorted(POLICIES, key=lambda name: name != policy)}
    found = tuple(summaries[policy]["classes"])
    if not found:
        raise InputError(f"{reference}: no label in any of the {len(jobs)} pairs; there is nothing to measure")
    by_name = {job.trio.name: job for job in jobs}
    worst = sorted(by_name, key=lambda name: badness(name, results[policy][name]))[:cases_shown]
    drawn = each(functools.partial(draw, labels=found), [by_name[name] for name in worst], workers, "drawing")
    unread = [path for folder in (Path(prediction), Path(reference)) if folder.is_dir() for path in _unread(folder)]
    notes = not_read_note(unread) + _notes(matched, measured)
    notes += _one_sided(results["strict"], names) + [note for _, note in drawn if note]
    ignored = sorted(set().union(*(one.ignored for one in measured)))
    if ignored:
        notes.append(f"voxels with value {' '.join(map(str, ignored))} in a reference are not measured (ignore)")
    result = Evaluation(output, results, summaries, names, policy, unit, tolerances, notes)
    about = {
        "command": _COMMAND,
        "prediction": str(prediction),
        "reference": str(reference),
        "names": called.source,
        "policy": policy,
        "unit": unit,
        "tolerances": list(tolerances),
        "missing": [trio.name for trio in matched.missing],
        "notes": notes,
        "samlora": _version(),
        "made": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }
    write_metrics_csv(output / "metrics.csv", results, names)
    result.page_bytes = write_page(
        output / "report.html",
        results,
        summaries,
        names,
        {name: pictures for name, (pictures, _) in zip(worst, drawn)},
        _facts(about, len(jobs), len(found)),
        title=f"Evaluation of {Path(prediction).name or prediction}",
        policy=policy,
        unit=unit,
        tolerances=tolerances,
        notes=notes,
    )
    write_summary_json(output / "summary.json", summaries, names, about)
    return result


def _checked(policy: str, tolerances: Sequence[float], cases_shown: int) -> tuple[float, ...]:
    if policy not in POLICIES:
        raise InputError(f"--policy {policy}: unknown; choose one of {', '.join(POLICIES)}")
    if cases_shown < 0:
        raise InputError(f"--cases_shown {cases_shown}: a number of cases, 0 or more, is needed")
    tolerances = tuple(dict.fromkeys(map(float, tolerances)))
    if not tolerances or not all(0 <= t < float("inf") for t in tolerances):
        raise InputError(f"--tolerance {' '.join(map(str, tolerances))}: numbers of mm, 0 or more, are needed")
    return tolerances


def _unread(folder: Path) -> list[Path]:
    return not_read(folder, taken=[path for path in folder.iterdir() if path.is_dir()])


def _unit(measured: Sequence[Measured]) -> str:
    """The unit of all distances. Raises InputError where it is not the same for all."""
    placed = [one.path for one in measured if one.has_spacing]
    bare = [one.path for one in measured if not one.has_spacing]
    if placed and bare:
        raise InputError(f"{bare[0]}: says nothing about millimetres, but {placed[0].name} does; measure them apart")
    return "mm" if placed else "px"


def _completed(measured: Sequence[Measured], unit: str, tolerances: Sequence[float]) -> dict[str, dict]:
    """policy -> case -> label -> measures, with every label that occurs anywhere in every case."""
    labels = sorted({label for one in measured for label in one.results["strict"]})
    nothing = np.zeros((2, 2, 1), np.uint8)
    spacing = (1, 1, 1) if unit == "mm" else None
    absent = {
        thick: evaluate_case(nothing, nothing, spacing, labels, tolerances, thick)
        for thick in (True, False)
    }
    results: dict[str, dict] = {}
    for policy in POLICIES:
        results[policy] = {}
        for one in measured:
            without = absent[one.has_thickness][policy]
            results[policy][one.name] = {n: one.results[policy].get(n, without[n]) for n in labels}
    return results


def _notes(matched: Matched, measured: Sequence[Measured]) -> list[str]:
    missing, extra = (trio.name for trio in matched.missing), (folder_or_file(side).name for side in matched.extra)
    bare = [one.bare for one in measured if one.bare]
    notes = {
        f"{_counted(len(matched.missing), 'prediction')} missing, counted as empty: {few(missing)}": matched.missing,
        f"{_counted(len(matched.extra), 'prediction')} without a reference, left out: {few(extra)}": matched.extra,
        f"without millimetres, laid voxel by voxel on the other map: {few(bare)}": bare,
    }
    return [note for note, holds in notes.items() if holds]


def _one_sided(strict: Mapping[str, Mapping[int, Mapping]], names: Mapping[int, str]) -> list[str]:
    """Warns of labels that one side never has: often the two sides number their classes differently."""
    notes = []
    for kind, text in (("missed", "never in a prediction"), ("added", "never in a reference")):
        labels = sorted({n for case in strict.values() for n, values in case.items() if state(values) == kind})
        never = [n for n in labels if all(state(case[n]) in (kind, "absent") for case in strict.values())]
        if never:
            notes.append(f"{text}: {few(names.get(n, f'class {n}') for n in never)}; do both number classes alike?")
    return notes


def _facts(about: Mapping, cases: int, classes: int) -> dict[str, str]:
    """The head of the page."""
    named = f", named by {about['names']}" if about["names"] else ""
    unit = "millimetres" if about["unit"] == "mm" else "pixels: the files say nothing about millimetres"
    surface = ", ".join(f"{t:g}" for t in sorted(about["tolerances"]))
    return {
        "Prediction": about["prediction"],
        "Reference": about["reference"],
        "Measured": f"{_counted(cases, 'case')}, {_counted(classes, 'class')}{named}",
        "Distances": f"{unit}; surface Dice within {surface} {about['unit']}",
        "Made": f"{about['made'][:16].replace('T', ' ')} by samlora {about['samlora']}",
    }


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun if count == 1 else noun + ('es' if noun.endswith('s') else 's')}"


def _claim(output: Path) -> None:
    """Refuses a folder that holds something else than an earlier evaluation."""
    if output.exists() and not output.is_dir():
        raise InputError(f"-o {output}: is a file; give a folder")
    held = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    strange = [name for name in held if name not in FILES and not name.startswith(".part-")]
    if "summary.json" in held and not strange:
        try:
            about = json.loads((output / "summary.json").read_text(encoding="utf-8"))["about"]
            strange = [] if about["command"] == _COMMAND else ["summary.json"]
        except (OSError, ValueError, TypeError, KeyError):
            strange = ["summary.json"]
    if strange:
        raise InputError(f"-o {output}: holds {few(strange)}, no earlier evaluation; choose another folder")


def _version() -> str:
    try:
        return metadata.version("samlora")
    except metadata.PackageNotFoundError:
        return "from source"
