"""Volumes with labels -> slices to train on (npz) and volumes to test on (h5), in SAMed's layout.

Below the destination:
    train_npz/CASE_slice000.npz   a training slice, `image` float32 and `label` uint8
    test_vol_h5/CASE.npy.h5       a test volume at its own size; attributes: affine, geometry, recipe
    lists/train.txt, test_vol.txt names of these slices and cases
    recipe.yaml                   the recipe, with the classes, size and split that were used
    cases/CASE.json               per case: source files, recipe, geometry (affine), files made, voxels per
                                  class. Written last, so a case that has it is whole
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml

from samlora.data.grid import Case, match_grid
from samlora.data.layouts import Layout, Pair, find_pairs
from samlora.data.recipe import Recipe
from samlora.data.volume import read_volume, write_case, write_slice
from samlora.errors import InputError
from samlora.files import whole

_MOST_WORKERS = 8  # a case of 512 x 512 x 200 takes about 1 GB while it is prepared


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
        slices = sum(len(r["files"]) for r in train)
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

    @property
    def record(self) -> Path:
        return self.destination / "cases" / f"{self.pair.name}.json"

    def stamp(self) -> dict:
        """What the case is made from; while it is the same, the files need not be made again."""
        files = {"image": _fingerprint(self.pair.image), "label": _fingerprint(self.pair.label)}
        return {"format": 1, "split": self.split, "source": files, "recipe": self.recipe.to_dict()}


def prepare(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    recipe: Recipe | str | os.PathLike,
    *,
    size: int | None = None,
    test_cases: Sequence[str] | None = None,
    test_fraction: float | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Makes SAMed's layout in `destination` from the volumes in `source` (see `layouts.find_pairs`).

    recipe: a Recipe, a name or a YAML file. size: training slices become (size, size), images by cubic
    spline, labels by nearest; test volumes keep their size. Test cases: `test_cases` by name, or
    `test_fraction` of the cases (by a hash of their names), or the recipe's, or those the layout keeps apart.
    A recipe without classes takes those of dataset.json, or else one class per value in the label files.
    workers: processes, by default one per core and 8 at most; a script that calls this with more than one
    needs `if __name__ == "__main__":`, as with all of multiprocessing. Cases that are there, made from the
    same files with the same recipe, are kept. overwrite: makes all of them again and removes cases that
    `source` does not have. Raises InputError or MissingFileError naming the file that cannot be used.
    """
    destination = Path(destination)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if size is not None:
        recipe = dataclasses.replace(recipe, size=size)
    layout = find_pairs(source)
    workers = _workers(workers, len(layout.pairs))
    test, warnings = _test_cases(layout, recipe, test_cases, test_fraction)
    recipe = _with_classes(recipe, layout, workers)
    # The split belongs to the data set as a whole: changing it must not make every case anew.
    part = dataclasses.replace(recipe, test_cases=())
    jobs = [_Job(p, "test" if p.name in test else "train", part, destination) for p in layout.pairs]
    _claim(destination, {pair.name for pair in layout.pairs}, overwrite)
    records = {} if overwrite else {job.pair.name: r for job in jobs if (r := _done(job)) is not None}
    skipped = len(records)
    pending = [job for job in jobs if job.pair.name not in records]
    if pending:  # a run that stops half-way must not leave the recipe and lists of an earlier one
        for old in ("recipe.yaml", "lists/train.txt", "lists/test_vol.txt"):
            (destination / old).unlink(missing_ok=True)
    records |= {r["name"]: r for r in _parallel(_prepare_case, pending, workers, "preparing")}
    ordered = [records[job.pair.name] for job in jobs]

    train = [Path(file).stem for r in ordered if r["split"] == "train" for file in r["files"]]
    _write_text(destination / "lists" / "train.txt", train)
    _write_text(destination / "lists" / "test_vol.txt", [r["name"] for r in ordered if r["split"] == "test"])
    used = dataclasses.replace(recipe, test_cases=tuple(sorted(test)))
    _write_text(destination / "recipe.yaml", [yaml.safe_dump(used.to_dict(), sort_keys=False).rstrip()])
    return Summary(destination, used, ordered, skipped, layout.notes + warnings + _remarks(used, ordered))


def _prepare_case(job: _Job) -> dict:
    """Makes all files of one case and returns its record."""
    pair, recipe, name = job.pair, job.recipe, job.pair.name
    image = read_volume(pair.image)
    label = match_grid(read_volume(pair.label, labels=True), to=image)
    stamp = job.stamp()
    mapped = dataclasses.replace(label, array=recipe.map_labels(label.array))
    left_out = label.array[(mapped.array == 0) & (label.array != 0)]
    voxels = np.sum([np.bincount(x.ravel(), minlength=recipe.num_classes + 1) for x in mapped.array], axis=0)
    geometry = image.geometry(recipe.orientation, recipe.slice_axis)
    try:
        values = recipe.normalise(image.array)
    except InputError as error:
        raise InputError(f"{pair.image}: {error}") from None
    images = recipe.to_slices(dataclasses.replace(image, array=values))
    labels = recipe.to_slices(mapped)
    geometry = dataclasses.replace(geometry, box=recipe.crop_box(images))
    if geometry.box is not None:
        top, bottom, left, right = geometry.box
        images, labels = (np.ascontiguousarray(x[:, top:bottom, left:right]) for x in (images, labels))
    _remove(job.destination, name)
    if job.split == "test":
        files = [f"test_vol_h5/{name}.npy.h5"]
        write_case(Case(images, labels, geometry, recipe.to_dict(), name), job.destination / files[0])
    else:
        files = _write_slices(job, images, labels)
    record = {"name": name, **stamp, "geometry": geometry.to_dict(), "size": list(images.shape)}
    record |= {"files": files, "voxels": voxels.tolist(), "to_background": np.unique(left_out).tolist()}
    _write_text(job.record, [json.dumps(record, indent=1)])
    return record


def _write_slices(job: _Job, images: np.ndarray, labels: np.ndarray) -> list[str]:
    from samlora.data.augment import resize_image, resize_label

    files, size = [], job.recipe.size
    for n, (image, label) in enumerate(zip(images, labels)):
        if job.recipe.keep == "foreground" and not label.any():
            continue
        if size is not None:
            image, label = resize_image(image, (size, size)), resize_label(label, (size, size))
        files.append(f"train_npz/{job.pair.name}_slice{n:03d}.npz")
        write_slice(job.destination / files[-1], image, label)
    return files


def _done(job: _Job) -> dict | None:
    """The record of a case whose files are all there and were made from the same things, else None."""
    try:
        record = json.loads(job.record.read_text(encoding="utf-8"))
        stamp = job.stamp()
        same = {key: record[key] for key in stamp} == stamp
        return record if same and all((job.destination / file).exists() for file in record["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(path: Path) -> list:
    """Name, size and time of change of a file, or of the files of a DICOM folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    changed = max((s.st_mtime_ns for s in stats), default=0)
    return [path.name, len(files), sum(s.st_size for s in stats), changed]


def _claim(destination: Path, names: set[str], overwrite: bool) -> None:
    """Refuses, or clears, cases in the destination that the source has not: training would use them too."""
    present = {path.stem for path in destination.glob("cases/[!.]*.json")}
    present |= {path.name.removesuffix(".npy.h5") for path in destination.glob("test_vol_h5/[!.]*.npy.h5")}
    present |= {path.stem.rsplit("_slice", 1)[0] for path in destination.glob("train_npz/[!.]*.npz")}
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
    slices = re.compile(re.escape(name) + r"(_slice\d+)?\.npz")
    for path in (destination / "train_npz").glob("*.npz"):
        if slices.fullmatch(path.name):
            path.unlink()


def _test_cases(
    layout: Layout, recipe: Recipe, test_cases: Sequence[str] | None, fraction: float | None
) -> tuple[set[str], list[str]]:
    """Names of the test cases, and warnings."""
    names = [pair.name for pair in layout.pairs]
    if test_cases is not None and fraction is not None:
        raise InputError("--test_cases and --test_fraction are both given; give one of them")
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise InputError(f"--test_fraction {fraction}: a share of the cases from 0 to 1 is needed")
        # By hash, so that a case keeps its side when others are added.
        order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        return set(order[: round(fraction * len(names))]), []
    if test_cases is not None:
        unknown = [name for name in test_cases if name not in names]
        if unknown:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise InputError(f"--test_cases {unknown[0]}: no such case; there are {known}")
        return set(test_cases), []
    if recipe.test_cases:
        absent = [name for name in recipe.test_cases if name not in names]
        line = f"test cases of recipe {recipe.name} that are not here: {', '.join(absent)}"
        return set(recipe.test_cases) & set(names), [line] if absent else []
    return {pair.name for pair in layout.pairs if pair.test}, []


def _with_classes(recipe: Recipe, layout: Layout, workers: int) -> Recipe:
    """`recipe`, its classes taken from the data set where it has none."""
    if recipe.classes:
        return recipe
    classes = layout.classes
    if not classes:
        labels = [pair.label for pair in layout.pairs]
        found = set().union(*_parallel(_label_values, labels, workers, "reading labels"))
        classes = {f"label_{value}": [value] for value in sorted(found) if value > 0}
        if not 0 < len(classes) < 256:
            raise InputError(
                f"{labels[0].parent}: {len(classes)} different label values in its files, 1 to 255 can be "
                "used; list the classes in a recipe (--dataset FILE.yaml)"
            )
    label_values = tuple(tuple(values) for values in classes.values())
    return dataclasses.replace(recipe, classes=tuple(classes), label_values=label_values)


def _label_values(path: Path) -> set[int]:
    return set(np.unique(read_volume(path, labels=True).array).tolist())


def _remarks(recipe: Recipe, records: list[dict]) -> list[str]:
    lines = []
    train = [r for r in records if r["split"] == "train"]
    for n, name in enumerate(recipe.classes, start=1):
        if not any(r["voxels"][n] for r in records):
            lines.append(f"class {n} {name} occurs in no case; are its values those of the label files?")
        elif train and not any(r["voxels"][n] for r in train):
            lines.append(f"class {n} {name} occurs in no training case")
    empty = [r["name"] for r in train if not r["files"]]
    if empty:
        lines.append(f"no slice with foreground in {', '.join(empty)}")
    unlisted = sorted({value for r in records for value in r["to_background"]})
    if unlisted:
        shown = " ".join(map(str, unlisted[:20])) + (" ..." if len(unlisted) > 20 else "")
        lines.append(f"label values that no class lists became background: {shown}")
    return lines


def _workers(workers: int | None, cases: int) -> int:
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: a number of processes, at least 1, is needed")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(workers or min(cores, _MOST_WORKERS), cases)


def _parallel(function: Callable, items: Sequence, workers: int, title: str) -> Iterable:
    """The results of `function` on `items`, in order, with a progress bar; the first error ends it."""
    from tqdm import tqdm

    if not items:
        return []
    if workers == 1:
        return [function(item) for item in tqdm(items, title, unit="case", disable=None)]
    # spawn: safe on every system, and with libraries that hold threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(items)), context) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, title, len(futures), unit="case", disable=None):
                future.result()
        except concurrent.futures.process.BrokenProcessPool:
            advice = "a process died, perhaps of too little memory; use fewer"
            raise InputError(f"--workers {workers}: {advice}") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _write_text(path: Path, lines: Sequence[str]) -> None:
    with whole(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
