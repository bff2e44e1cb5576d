"""Several systems on the same data and the same splits: `variants x folds x seeds -> runs -> one table`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from samlora.compare.config import COMMON_PROMPTS, CompareConfig
from samlora.compare.folds import Fold, make_folds
from samlora.compare.job import Job, knows_spacing, prompts_told, read_held
from samlora.compare.page import write_page
from samlora.compare.results import (
    Entry,
    Group,
    Run,
    collect,
    grouped,
    markdown,
    mean_sd,
    measures,
    of_task,
    write_cases,
    write_summary,
)
from samlora.compare.running import run_all
from samlora.compare.variants import Variant, find_variants
from samlora.data.dataset import SliceFile, data_folder, find_slices, fingerprint
from samlora.data.recipe import Recipe
from samlora.errors import InputError
from samlora.files import identity, whole
from samlora.journal import Journal
from samlora.options import make
from samlora.training.config import TrainConfig


def compare(sources: Sequence[str], config: CompareConfig) -> list[Group]:
    """Trains every system on every fold with every seed and writes the tables; returns them, the main one first.

    sources: YAML files or names of shipped configurations; a list where an option takes one value makes variants. Runs
    that are done are kept, interrupted ones go on. Writes results.csv, summary.csv, comparison.md and report.html into
    `config.output`. Raises InputError for systems, data and options that cannot be used, before anything is trained,
    and at the end where runs failed: the others are in the tables by then.
    """
    given = dict(config.set)
    if config.max_seconds:
        given["max_seconds"] = config.max_seconds
    variants, notes = find_variants(sources, given)
    if config.prompts != "own" and not any(variant.prompting(config.prompts) for variant in variants):
        raise InputError(f"--prompts {config.prompts}: none of the systems takes prompts; leave it out")
    slices: dict[str, list[SliceFile]] = {}
    for item in find_slices(data_folder(config.data, "train_npz", "--data")):
        slices.setdefault(item.case, []).append(item)
    patient_of = _patient_of(config.data)
    folds = make_folds({case: patient_of(case) for case in slices}, config.folds, config.seed)
    shots, remarks = _possible(config.wanted_shots, folds)
    in_mm = all(knows_spacing(config.data, case) for case in slices)
    print_of = fingerprint([item for of in slices.values() for item in of])
    jobs = _jobs(config, variants, folds, shots, in_mm, print_of)
    notes += _renamed(jobs, Path(config.output).resolve() / "runs")
    _refuse_others(jobs, config.overwrite)

    out = Path(config.output)
    journal = Journal(out, f"--output {out}")
    notes += remarks
    for note in notes:
        journal.say(note)
    patients = len({patient_of(case) for case in slices})
    done = [job for job in jobs if job.result() is not None]
    sizes = f" x {len(shots)} numbers of training cases" if len(shots) > 1 else ""
    journal.say(
        f"{len(variants)} systems x {len(folds)} folds x {config.seeds} seeds{sizes}: {len(jobs)} runs, {len(done)} of "
        f"them done already; {len(slices)} cases of {patients} patients"
    )
    waiting = [job for job in jobs if job not in done]
    for job in waiting:
        job.write()
    told: list[tuple[Job, str]] = []
    slots = (len(config.gpus) or 1) if config.jobs is None else config.jobs
    run_all(waiting, slots, config.gpus, _teller(journal, len(jobs), len(done), told))
    runs = [Run(job, result) for job in jobs if (result := job.result()) is not None]
    finished = [run.job.folder for run in runs]
    failed = [problem for job, problem in told if job.folder not in finished]  # another process may have done it since
    if not runs:
        raise InputError(f"no run succeeded; the first: {failed[0]}")
    if failed:
        notes.insert(0, f"{len(failed)} of {len(jobs)} runs failed and are missing here; the first: {failed[0]}")
    groups = grouped(collect(runs), patient_of)
    unit = "mm" if in_mm else "px"
    facts = _facts(config, variants, folds, len(slices), patients, runs, unit)
    notes += _remarks(groups)
    write_cases(out / "results.csv", runs)
    write_summary(out / "summary.csv", groups, unit)
    with whole(out / "comparison.md") as part:
        part.write_text(markdown(groups, facts, notes, unit), encoding="utf-8")
    shown = _shown(groups, slices, config)
    write_page(out / "report.html", groups, facts, notes, unit, shown)
    for line in _told(groups, unit):
        journal.say(line)
    journal.say(f"written to {out}: report.html, comparison.md, summary.csv, results.csv, runs/")
    journal.close()
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them again: {failed[0]}")
    return groups


def _patient_of(root: str) -> Callable[[str], str]:
    """The patient of a case, as the recipe beside the data says; without one every case is another."""
    folder = data_folder(root, "train_npz", "--data")
    for place in (folder, folder.parent):
        if (place / "recipe.yaml").is_file():
            return Recipe.load(place / "recipe.yaml").patient_of
    return str


def _possible(shots: Sequence[int | None], folds: Sequence[Fold]) -> tuple[list[int | None], list[str]]:
    """The numbers of training cases that every fold has, and a note about the others."""
    least = min(len(fold.train) for fold in folds)
    kept = [n for n in shots if n is None or n <= least]
    if not kept:
        raise InputError(f"--shots {shots[0]}: a fold has {least} training cases; give {least} or fewer, or all")
    larger = ", ".join(str(n) for n in shots if n not in kept)
    return kept, [f"--shots {larger} left out: a fold has {least} training cases"] if larger else []


def _jobs(
    config: CompareConfig,
    variants: Sequence[Variant],
    folds: Sequence[Fold],
    shots: Sequence[int | None],
    in_mm: bool,
    data: str,
) -> list[Job]:
    """All runs, ordered so that every system has its first folds early."""
    root, jobs = Path(config.data).resolve(), []
    files = {variant.name: variant.find_base() for variant in variants}
    bases = {name: None if path is None else identity(path)[:3] for name, path in files.items()}
    for seed in range(config.seed, config.seed + config.seeds):
        for fold in folds:
            for count in shots:
                for variant in variants:
                    part = f"fold{fold.number}_seed{seed}" + ("" if count is None else f"_shots{count}")
                    folder = Path(config.output).resolve() / "runs" / variant.slug / part
                    own = {"root_path": str(root), "output": str(folder), "list_dir": str(folder), "seed": seed}
                    options = make(TrainConfig, {**variant.values, **own, "dataset": root.name})
                    if options.ckpt not in (None, "random"):
                        options = dataclasses.replace(options, ckpt=str(Path(options.ckpt).resolve()))
                    ways, train = variant.ways, fold.shots(count)
                    values = dataclasses.asdict(options)
                    jobs.append(
                        Job(variant.name, folder, fold.number, seed, count, values, ways, train, fold.held, in_mm, data,
                            bases[variant.name], variant.prompting(config.prompts))
                    )  # fmt: skip
    return jobs


def _renamed(jobs: Sequence[Job], runs: Path) -> list[str]:
    """Moves runs made from just this, whose system was called otherwise, to where they belong; notes about them.

    A list of values that is added to the options of a system changes its name, and nothing about the runs that it has.
    """
    taken, notes = {job.folder for job in jobs}, {}
    for job in jobs:
        if job.folder.exists():
            continue
        for other in sorted(runs.glob(f"*/{job.folder.name}")):
            if other not in taken and (former := dataclasses.replace(job, folder=other)).begun():
                job.folder.parent.mkdir(parents=True, exist_ok=True)
                other.rename(job.folder)
                notes[f"{job.name}: takes over the runs in {former.folder.parent.name}, made from the same"] = None
                break
    return list(notes)


def _refuse_others(jobs: Sequence[Job], overwrite: bool) -> None:
    """Refuses, or removes, runs in the same folders that were made from other things."""
    import shutil

    for job in jobs:
        changed = job.changed()
        if changed is None:
            continue
        if not overwrite:
            raise InputError(
                f"{job.folder}: was made with {changed}; choose another --output, or --overwrite to train it again"
            )
        shutil.rmtree(job.folder)


def _teller(journal: Journal, total: int, begun: int, failed: list[tuple[Job, str]]) -> Callable[[Job, str], None]:
    """What is said when a run has ended; failures are collected."""
    ended = begun

    def tell(job: Job, problem: str) -> None:
        nonlocal ended
        ended += 1
        size = "" if job.shots is None else f", {job.shots} cases"
        title = f"{ended}/{total} {job.name}, fold {job.fold}, seed {job.seed}{size}"
        result = job.result()
        if result is None:  # one that is there was written last, and whole, whatever was said after it or by whom
            problem = problem or "it left no result"
            failed.append((job, f"{job.name}, fold {job.fold}, seed {job.seed}{size}: {problem}"))
            journal.say(f"{title}: failed: {problem}")
            return
        entries, shown = collect([Run(job, result)]), measures("mm")[0]
        told = ", ".join(f"{entry.task} Dice {mean_sd(entry.means('dice'), shown)} %" for entry in entries)
        journal.say(f"{title}: {result['steps']} steps in {result['seconds']:.0f} s, {told}")

    return tell


def _facts(
    config: CompareConfig,
    variants: Sequence[Variant],
    folds: Sequence[Fold],
    cases: int,
    patients: int,
    runs: Sequence[Run],
    unit: str,
) -> dict[str, str]:
    """The head of the page."""
    seeds = ", ".join(str(config.seed + n) for n in range(config.seeds))
    held = sorted({len(fold.held) for fold in folds})
    devices = sorted({f"{run.result['device']}, {run.result['precision']}" for run in runs})
    facts = {
        "Data": f"{config.data}: {cases} cases of {patients} patients",
        "Splits": f"{len(folds)}-fold cross-validation by patient, {' or '.join(map(str, held))} cases held out; "
        f"seeds {seeds}",
        "Systems": ", ".join(variant.name for variant in variants),
        "Measured": "the training slices of held-out cases, which no training has seen"
        + ("; distances in mm" if unit == "mm" else "; distances in pixels: the size of the voxels is not known"),
        "Devices": "; ".join(devices),
    }
    if config.prompts != "own":
        told = prompts_told(COMMON_PROMPTS[config.prompts])
        facts["Prompts"] = f"all systems with prompts were measured with the same: {told}, whatever they trained with"
    if config.set:
        facts["For all"] = ", ".join(f"{name} {value}" for name, value in config.set.items())
    if config.max_seconds:
        facts["Time"] = f"every run was given {config.max_seconds:g} s of training"
    try:
        facts["Made by"] = f"samlora {metadata.version('samlora')}"
    except metadata.PackageNotFoundError:
        facts["Made by"] = "samlora, from source"
    return facts


def _remarks(groups: Sequence[Group]) -> list[str]:
    """What a reader must know before the tables."""
    notes = []
    tasks = {group.task for group in groups}
    if len(tasks) > 1:
        notes.append(
            "two tasks, tables apart: systems that are given prompts from the reference do not compete with others"
        )
    asked = dict.fromkeys(group.prompts for group in groups if group.prompts)
    if len(asked) > 1:
        notes.append(
            f"the systems with prompts were given different ones ({' | '.join(asked)}): each kind has a table of its "
            "own and no test goes across; --prompts box or --prompts point measures all with the same"
        )
    counts = {len(entry.runs) for group in groups for entry in group.entries}
    if len(counts) > 1:
        notes.append(f"{min(counts)} to {max(counts)} runs went into a system: the means are not all of the same cases")
    notes += dict.fromkeys(group.too_few for group in groups if group.too_few)
    devices = {run.result["device"] for group in groups for entry in group.entries for run in entry.runs}
    if len(devices) > 1:
        notes.append("the runs were made on different devices: their times cannot be compared")
    return notes


def _shown(groups: Sequence[Group], slices: Mapping[str, Sequence[SliceFile]], config: CompareConfig) -> list[tuple]:
    """Held-out cases, the hardest first, evenly spread, with the predictions of all systems on one slice of each."""
    entries = [entry for group in groups if group.shots == groups[0].shots for entry in group.entries]
    scores: dict[str, list[float]] = {}
    for entry in entries:
        for case, dice in entry.per_patient(str).items():
            scores.setdefault(case, []).append(dice)
    ranked = sorted((case for case in scores if not np.isnan(scores[case]).all()), key=lambda c: np.nanmean(scores[c]))
    count = min(config.pictures, len(ranked))
    places = dict.fromkeys(np.linspace(0, len(ranked) - 1, count).round().astype(int)) if count else ()
    chosen = []
    for case in (ranked[n] for n in places):
        found = {(e.name, e.task): shown for e in entries if (shown := _prediction(e, case)) is not None}
        chosen.append((read_held(config.data, case, slices[case]), found))
    return chosen


def _prediction(entry: Entry, case: str) -> np.ndarray | None:
    """The prediction of the first seed on the slice of a case that is shown."""
    runs = [run for run in entry.runs if case in run.job.held]
    if not runs:
        return None
    job = min(runs, key=lambda run: run.job.seed).job
    with np.load(job.folder / "predictions.npz", allow_pickle=False) as stored:
        return stored[f"{entry.task}_{job.held.index(case)}"]


def _told(groups: Sequence[Group], unit: str) -> list[str]:
    """The tables for a terminal."""
    dice, *_, hd95 = measures(unit)
    lines = []
    for group in groups:
        rows = [["system", "Dice [%]", hd95.head, "trained", *of_task(group.entries[0]), "against the best"]]
        for entry in group.entries:
            figures = mean_sd(entry.means("dice"), dice), mean_sd(entry.means("hd95"), hd95)
            trained = f"{entry.fact('trained_parameters') / 1e6:.2f} M"
            rows.append([entry.name, *figures, trained, *of_task(entry).values(), group.verdict(entry)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["", group.title]
        for name, *others, verdict in rows:
            cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(others, widths[1:]))
            lines.append(f"{name:<{widths[0]}}  {cells}  {verdict}".rstrip())
        lines += [group.too_few] * bool(group.too_few)
    return [*lines, ""]
