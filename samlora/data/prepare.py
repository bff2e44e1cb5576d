"""Volumes with labels -> slices to train on (npz) and volumes to test on (h5), in SAMed's layout.

Below the destination:
    train_npz/CASE_slice000.npz   a training slice, `image` float32 and `label` uint8
    test_vol_h5/CASE.npy.h5       a test volume at its own size; attributes: affine, geometry, recipe
    lists/train.txt, test_vol.txt names of these slices and cases
    medsam_npz/SPLIT/CASE.npz     on request: the same case as MedSAM stores it
    recipe.yaml                   the recipe, with the classes, size and split that were used
    cases/CASE.json               per case: source files, recipe, geometry (affine), files made, voxels per
                                  class. Written last, so a case that has it is whole
"""

import dataclasses
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml

from samlora.data.dataset import check_patients
from samlora.data.grid import Case, neighbours
from samlora.data.ignored import with_ignored
from samlora.data.label_tables import contradictions
from samlora.data.layouts import Layout, Pair, find_pairs
from samlora.data.parts import drop_small_parts
from samlora.data.recipe import Recipe
from samlora.data.sources import label_values, read_image, read_label, resolve_classes
from samlora.data.volume import read_label_names, write_case, write_medsam, write_slice
from samlora.errors import InputError
from samlora.files import identity, same_name, whole
from samlora.processes import Team, each, team, worker_count


@dataclasses.dataclass
class Summary:
    """What was prepared: the recipe used, one record per case (as in cases/CASE.json), warnings.

    `str(summary)` is the table for people.
    """

    destination: Path
    recipe: Recipe
    records: list[dict]
    skipped: int
    warnings: list[str]

    def __str__(self) -> str:
        train = [r for r in self.records if r["split"] == "train"]
        slices = sum(len(_slices(r)) for r in train)
        width = max(len(r["name"]) for r in self.records)
        lines = [f"{'case':<{width}}  split   size         values after mapping"]
        for r in self.records:
            size = " x ".join(map(str, r["size"]))
            present = " ".join(str(n) for n, voxels in enumerate(r["voxels"]) if voxels)
            lines.append(f"{r['name']:<{width}}  {r['split']:<5}  {size:>13}  {present}")
        width = max(len(name) for name in ("class", *self.recipe.classes)) + 4
        lines += ["", f"{'class':<{width}}  cases        voxels  values in the files"]
        for n, (name, values) in enumerate(zip(self.recipe.classes, self.recipe.label_values), start=1):
            voxels = [r["voxels"][n] for r in self.records]
            row = f"{n:>3} {name:<{width - 4}}  {np.count_nonzero(voxels):>5}  {sum(voxels):>12}"
            lines.append(f"{row}  {' '.join(map(str, values))}")
        lines += ["", *(f"warning: {line}" for line in self.warnings)]
        counts = f"{len(train)} training cases ({slices} slices), {len(self.records) - len(train)} test cases"
        kept = f", {self.skipped} of them were there already" if self.skipped else ""
        return "\n".join([*lines, f"{self.destination}: {counts}{kept}"])


@dataclasses.dataclass(frozen=True)
class _Job:
    pair: Pair
    split: str
    recipe: Recipe
    destination: Path
    series: str | None
    medsam: bool

    @property
    def record(self) -> Path:
        return self.destination / "cases" / f"{self.pair.name}.json"

    def stamp(self) -> dict:
        """What the case is made from; while it is the same, the files need not be made again."""
        source = {"files": [identity(path) for path in self.pair.files], "series": self.series}
        made = {"split": self.split, "source": source, "recipe": self.recipe.to_dict(), "medsam": self.medsam}
        return {"format": 2, **made}


def prepare(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    recipe: Recipe | str | os.PathLike,
    *,
    size: int | None = None,
    test_cases: Sequence[str] | None = None,
    test_fraction: float | None = None,
    series: str | None = None,
    medsam: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Makes SAMed's layout in `destination` from the images and labels in `source` (see `layouts.find_pairs`).

    recipe: a Recipe, a name or a YAML file. size: training slices become (size, size), images by cubic
    spline, labels by nearest; test volumes keep their size. Test cases: `test_cases` by name, or
    `test_fraction` of the patients (by a hash of their names), or the recipe's, or those the layout keeps apart.
    A recipe without classes takes those of dataset.json, or else one class per value in the label files.
    series: which series of the DICOM folders. medsam: also writes each case as MedSAM stores it.
    workers: processes, by default one per core and 8 at most; a script that calls this with more than one needs
    `if __name__ == "__main__":`, as with all of multiprocessing. Cases that are there, made from the same files
    with the same recipe, are kept. overwrite: makes all of them again and removes cases that `source` does not
    have. Processes that torchrun started, on one or several machines, share the cases and return the same; the first
    writes what is about all. Raises InputError or MissingFileError naming the file that cannot be used.
    """
    with team() as processes:
        destination = Path(destination)
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        if size is not None:
            recipe = dataclasses.replace(recipe, size=size)
        if destination.exists() and not destination.is_dir():
            raise InputError(f"{destination}: is a file; give a folder for the prepared data")
        layout = find_pairs(source)
        pairs = wanted(layout.pairs, recipe)
        workers = worker_count(workers, len(processes.share(pairs)))
        test, warnings = _test_cases(pairs, recipe, test_cases, test_fraction)
        recipe = _with_classes(recipe, layout, pairs, workers, processes)
        # The split belongs to the data set as a whole: changing it must not make every case anew.
        part = dataclasses.replace(recipe, test_cases=())
        jobs = [_Job(p, "test" if p.name in test else "train", part, destination, series, medsam) for p in pairs]
        # One looks and clears: what the others find depends on when they come.
        processes.first(lambda: _claim(destination, {pair.name for pair in pairs}, overwrite))
        shares = processes.gather(lambda: _prepare_cases(processes.share(jobs), destination, workers, overwrite))
        records = {r["name"]: r for made, _ in shares for r in made}
        ordered, skipped = [records[job.pair.name] for job in jobs], sum(kept for _, kept in shares)
        used = dataclasses.replace(recipe, test_cases=tuple(sorted(test)))
        processes.first(lambda: _write_lists(destination, used, ordered))
        return Summary(destination, used, ordered, skipped, layout.notes + warnings + _remarks(used, ordered))


def _prepare_cases(jobs: Sequence[_Job], destination: Path, workers: int, overwrite: bool) -> tuple[list[dict], int]:
    """The records of cases that are there or made now, and how many were there."""
    records = [] if overwrite else [r for job in jobs if (r := _done(job)) is not None]
    kept = {r["name"] for r in records}
    pending = [job for job in jobs if job.pair.name not in kept]
    if pending:  # a run that stops half-way must not leave the recipe and lists of an earlier one
        for old in ("recipe.yaml", "lists/train.txt", "lists/test_vol.txt"):
            (destination / old).unlink(missing_ok=True)
    return records + each(_prepare_case, pending, workers, "preparing"), len(records)


def _write_lists(destination: Path, recipe: Recipe, records: Sequence[dict]) -> None:
    train = [name for r in records if r["split"] == "train" for name in _slices(r)]
    _write_text(destination / "lists" / "train.txt", train)
    _write_text(destination / "lists" / "test_vol.txt", [r["name"] for r in records if r["split"] == "test"])
    _write_text(destination / "recipe.yaml", [yaml.safe_dump(recipe.to_dict(), sort_keys=False).rstrip()])


def _prepare_case(job: _Job) -> dict:
    """Makes all files of one case and returns its record."""
    pair, recipe, name = job.pair, job.recipe, job.pair.name
    stamp = job.stamp()
    image = read_image(pair, job.series)
    label, remarks = read_label(pair, image, recipe)
    case = recipe.to_case(image, label, name)
    _remove(job.destination, name)
    if job.split == "test":
        files = [f"test_vol_h5/{name}.npy.h5"]
        write_case(case, job.destination / files[0])
    else:
        files = _write_slices(job, case)
    if job.medsam:
        files.append(f"medsam_npz/{job.split}/{name}.npz")
        write_medsam(job.destination / files[-1], case.image, case.label, case.spacing and case.spacing[::-1])
    voxels = np.bincount(label.array.ravel(), minlength=recipe.num_classes + 1)
    voxels = voxels[: recipe.num_classes + 1]  # without those that are ignored
    record = {"name": name, **stamp, "geometry": case.geometry.to_dict(), "size": list(case.image.shape[:3])}
    names = read_label_names(pair.label) if isinstance(pair.label, Path) else {}
    called = {str(value): list(found) for value, found in names.items()}
    record |= {"files": files, "voxels": voxels.tolist(), "remarks": remarks, "names": called}
    _write_text(job.record, [json.dumps(record, indent=1)])
    return record


def _slices(record: dict) -> list[str]:
    """Names of the training slices that a case gave."""
    return [Path(file).stem for file in record["files"] if file.startswith("train_npz/")]


def _write_slices(job: _Job, case: Case) -> list[str]:
    from samlora.data.augment import resize_image, resize_label

    files, recipe, size = [], job.recipe, job.recipe.size
    labels = case.label
    if recipe.min_voxels or recipe.min_pixels:
        labels = drop_small_parts(labels, recipe.min_voxels, recipe.min_pixels)
    for n in _kept(labels, recipe.keep):
        image = neighbours(case.image, [n])[0] if recipe.channels == "neighbours" else case.image[n]
        label = with_ignored(labels[n], None if case.ignored is None else case.ignored[n])
        if size is not None:
            channels_first = np.moveaxis(image, -1, 0) if image.ndim == 3 else image
            resized = resize_image(channels_first, (size, size))
            image = np.moveaxis(resized, 0, -1) if image.ndim == 3 else resized
            label = resize_label(label, (size, size))
        files.append(f"train_npz/{job.pair.name}_slice{n:03d}.npz")
        write_slice(job.destination / files[-1], image, label)
    return files


def _kept(labels: np.ndarray, keep: str | float) -> list[int]:
    """Which slices of a label map (D, H, W) are trained on; a share of the empty ones is spread evenly over them."""
    if keep == "all":
        return list(range(len(labels)))
    shown = labels.any(axis=(1, 2))
    full, empty = np.flatnonzero(shown), np.flatnonzero(~shown)
    share = 0.0 if keep == "foreground" else keep
    count = round(share * len(empty))
    chosen = empty[np.linspace(0, len(empty) - 1, count).round().astype(int)] if count else empty[:0]
    return sorted([*full.tolist(), *chosen.tolist()])


def _done(job: _Job) -> dict | None:
    """The record of a case whose files are all there and were made from the same things, else None."""
    try:
        record = json.loads(job.record.read_text(encoding="utf-8"))
        stamp = job.stamp()
        same = {key: record[key] for key in stamp} == stamp
        return record if same and all((job.destination / file).exists() for file in record["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _claim(destination: Path, names: set[str], overwrite: bool) -> None:
    """Refuses, or clears, cases in the destination that the source has not: training would use them too."""
    present = {path.stem for path in destination.glob("cases/[!.]*.json")}
    present |= {path.name.removesuffix(".npy.h5") for path in destination.glob("test_vol_h5/[!.]*.npy.h5")}
    present |= {path.stem.rsplit("_slice", 1)[0] for path in destination.glob("train_npz/[!.]*.npz")}
    present |= {path.stem for path in destination.glob("medsam_npz/*/[!.]*.npz")}
    strangers = sorted(present - names)
    if strangers and not overwrite:
        raise InputError(
            f"{destination}: holds {len(strangers)} cases that the source has not "
            f"({', '.join(strangers[:5])}); choose an empty folder, or --overwrite to remove them"
        )
    for name in strangers:
        _remove(destination, name)


def _remove(destination: Path, name: str) -> None:
    """Removes all files of a case, its record first: what stays after a crash is not taken for whole."""
    (destination / "cases" / f"{name}.json").unlink(missing_ok=True)
    (destination / "test_vol_h5" / f"{name}.npy.h5").unlink(missing_ok=True)
    for path in destination.glob(f"medsam_npz/*/{glob.escape(name)}.npz"):
        path.unlink()
    slices = re.compile(re.escape(name) + r"(_slice\d+)?\.npz")
    for path in (destination / "train_npz").glob("*.npz"):
        if slices.fullmatch(path.name):
            path.unlink()


def wanted(pairs: list[Pair], recipe: Recipe) -> list[Pair]:
    """The cases that the recipe takes. Raises InputError if there are none."""
    if recipe.cases is None:
        return pairs
    found = [pair for pair in pairs if re.fullmatch(recipe.cases, pair.name)]
    if not found:
        names = ", ".join(pair.name for pair in pairs[:5])
        raise InputError(f"recipe {recipe.name}: cases {recipe.cases!r} fits none of those found: {names}")
    return found


def _test_cases(
    pairs: Sequence[Pair], recipe: Recipe, test_cases: Sequence[str] | None, fraction: float | None
) -> tuple[set[str], list[str]]:
    """Names of the test cases, and warnings. Raises InputError where a patient would be on both sides."""
    names = [pair.name for pair in pairs]
    patients = {name: recipe.patient_of(name) for name in names}
    if test_cases is not None and fraction is not None:
        raise InputError("--test_cases and --test_fraction are both given; give one of them")
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise InputError(f"--test_fraction {fraction}: a share of the cases from 0 to 1 is needed")
        # By hash, so that a patient keeps its side when others are added.
        order = sorted(set(patients.values()), key=lambda name: hashlib.sha256(name.encode()).digest())
        chosen = set(order[: round(fraction * len(order))])
        return {name for name, patient in patients.items() if patient in chosen}, []
    warnings = []
    if test_cases is not None:
        test_cases = [same_name(name) for name in test_cases]
        flag, chosen = "--test_cases", set(test_cases)
        unknown = [name for name in test_cases if name not in names]
        if unknown:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise InputError(f"--test_cases {unknown[0]}: no such case; there are {known}")
    elif recipe.test_cases:
        flag, chosen = f"recipe {recipe.name}: test_cases", set(recipe.test_cases) & set(names)
        absent = [name for name in recipe.test_cases if name not in names]
        if absent:
            warnings = [f"test cases of recipe {recipe.name} that are not here: {', '.join(absent)}"]
    else:
        flag, chosen = "the folder for testing:", {pair.name for pair in pairs if pair.test}
    check_patients(chosen, patients, flag)
    return chosen, warnings


def _with_classes(recipe: Recipe, layout: Layout, pairs: list[Pair], workers: int, processes: Team) -> Recipe:
    """`recipe`, its classes taken from the data set where it has none."""

    def values(pairs: Sequence[Pair]) -> Iterable[dict[int | str, int]]:
        shares = processes.gather(lambda: each(label_values, processes.share(pairs), workers, "reading labels"))
        return [shares[n % processes.count][n // processes.count] for n in range(len(pairs))]

    return resolve_classes(recipe, dataclasses.replace(layout, pairs=pairs), values)


def _remarks(recipe: Recipe, records: list[dict]) -> list[str]:
    lines = []
    train = [r for r in records if r["split"] == "train"]
    for n, name in enumerate(recipe.classes, start=1):
        if not any(r["voxels"][n] for r in records):
            lines.append(f"class {n} {name} occurs in no case; are its values those of the label files?")
        elif train and not any(r["voxels"][n] for r in train):
            lines.append(f"class {n} {name} occurs in no training case")
    empty = [r["name"] for r in train if not _slices(r)]
    if empty:
        lines.append(f"no slice with foreground in {', '.join(empty)}")
    if any(isinstance(value, int) for values in recipe.label_values for value in values):
        tables = {r["name"]: {int(value): found for value, found in r.get("names", {}).items()} for r in records}
        advice = "list the classes by name in the recipe, not by number"
        lines += [f"label value {text}; {advice}" for text in contradictions(tables)]
    remarks: dict[str, dict[str, list[str]]] = {}
    for record in records:
        for remark in record["remarks"]:
            what, _, details = remark.partition(": ")
            remarks.setdefault(what, {}).setdefault(details, []).append(record["name"])
    for what, details in remarks.items():
        cases = list(dict.fromkeys(name for names in details.values() for name in names))
        shown = "; ".join(list(details)[:3]) + ("; ..." if len(details) > 3 else "")
        named = "" if len(cases) > 3 else f": {', '.join(cases)}"
        lines.append(f"{what}: {shown} (in {len(cases)} of {len(records)} cases{named})")
    return lines


def _write_text(path: Path, lines: Sequence[str]) -> None:
    with whole(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
