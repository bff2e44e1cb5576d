"""What came of the runs: figures over folds and seeds, tests over patients, tables as CSV and Markdown."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samlora.compare.job import Job
from samlora.evaluation.frames import case_mean
from samlora.evaluation.measures import Shown
from samlora.evaluation.statistics import ALPHA, Paired, holm, paired, smallest_p, too_few
from samlora.files import whole

TASKS = {
    "automatic": "Automatic: all classes, without prompts",
    "prompted": "Prompted: told by the reference where each object is",
}
PROMPTED_NOTE = (
    "These answer prompts drawn from the reference: they are told which classes a slice shows and where, and only say "
    "how far each reaches. That is another and easier task than to find them; never compare these figures with those "
    "of automatic systems."
)


def measures(unit: str) -> list[Shown]:
    """What the tables show. F1 over voxels is Dice, so it has no column of its own."""
    return [
        Shown("dice", "Dice (= F1)", "%", 100, 2, "high"),
        Shown("iou", "IoU", "%", 100, 2, "high"),
        Shown("precision", "Precision", "%", 100, 2, "high"),
        Shown("recall", "Recall", "%", 100, 2, "high"),
        Shown("hd95", "HD95", unit, 1.0, 2, "low"),
    ]


@dataclass(frozen=True)
class Run:
    """One training and its result.json."""

    job: Job
    result: Mapping


def in_reference(values: Mapping[str, float]) -> bool:
    """Whether the reference shows the class of some measures: the error of its volume is in per cent of it."""
    return not math.isnan(values["volume_error_percent"])


@dataclass(frozen=True)
class Entry:
    """A line of a table: one system, doing one task, trained on `shots` cases (None: all), in several runs."""

    name: str
    task: str
    shots: int | None
    runs: tuple[Run, ...]

    def cases(self, run: Run) -> Mapping[str, Mapping[int, Mapping[str, float]]]:
        """case -> label -> measures of one of its runs, of the classes that the reference of the case shows.

        These are the same for all systems. One without the class in the reference would have Dice 0 where a voxel is
        found and none where it is not, so that every system would have a mean of its own choice of classes.
        """
        return {
            case: {label: values for label, values in labels.items() if in_reference(values)}
            for case, labels in self._measured(run).items()
        }

    def false_alarms(self, label: int | None = None) -> tuple[int, int]:
        """Of the pairs of case and class without the class in the reference: how many were drawn anyway, and all."""
        absent = [
            not math.isnan(values["dice"])  # undefined where neither shows the class
            for run in self.runs
            for labels in self._measured(run).values()
            for of, values in labels.items()
            if label in (None, of) and not in_reference(values)
        ]
        return sum(absent), len(absent)

    def _measured(self, run: Run) -> Mapping[str, Mapping[int, Mapping[str, float]]]:
        return run.result["ways"][self.task]["cases"]

    def means(self, measure: str, label: int | None = None) -> np.ndarray:
        """A value per run: the mean over its held-out cases of one class, or the mean of these over the classes."""
        found = []
        for run in self.runs:
            labels = self.class_names if label is None else (label,)
            cases = self.cases(run).values()
            found.append(_mean([_mean([case.get(n, {}).get(measure, math.nan) for case in cases]) for n in labels]))
        return np.array(found)

    def per_patient(self, patient_of: Callable[[str], str], measure: str = "dice") -> dict[str, float]:
        """patient -> mean over classes, its cases and the seeds."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for case, labels in self.cases(run).items():
                found.setdefault(patient_of(case), []).append(case_mean(labels, measure))
        return {patient: _mean(values) for patient, values in sorted(found.items())}

    def per_case(self, label: int, measure: str) -> dict[str, float]:
        """case -> mean over seeds of the measure of one class."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for case, labels in self.cases(run).items():
                found.setdefault(case, []).append(labels.get(label, {}).get(measure, math.nan))
        return {case: _mean(values) for case, values in sorted(found.items())}

    def fact(self, name: str) -> float:
        """The median over the runs of a number in their results: seconds, peak_memory_bytes ..."""
        values = np.array([run.result[name] for run in self.runs], float)
        return float(np.median(values[~np.isnan(values)])) if not np.isnan(values).all() else math.nan

    @property
    def seconds_per_case(self) -> float:
        """The median over all held-out cases: the first of a run takes longer."""
        return float(np.median([s for run in self.runs for s in run.result["ways"][self.task]["seconds"].values()]))

    @property
    def prompts(self) -> str:
        """What it was asked by, in words; "" where it answers without prompts."""
        return self.runs[0].result["ways"][self.task].get("prompts", "")

    @property
    def class_names(self) -> dict[int, str]:
        return dict(enumerate(self.runs[0].result["class_names"], start=1))


@dataclass(frozen=True)
class Group:
    """Entries that may be compared: one task, equal prompts, one number of training cases. The best first.

    The best is the one with the highest mean over patients of what is tested (`Entry.per_patient`). tests: for every
    entry but the best its test against the best, with p after Holm's correction. too_few: why no test could say
    anything, or "".
    """

    task: str
    prompts: str
    shots: int | None
    entries: tuple[Entry, ...]
    tests: Mapping[str, Paired]
    too_few: str

    @property
    def title(self) -> str:
        shots = "" if self.shots is None else f"; {self.shots} training case{'s' * (self.shots > 1)}"
        return TASKS[self.task] + (f" ({self.prompts})" if self.prompts else "") + shots

    def verdict(self, entry: Entry) -> str:
        """What the test says, in as few words as a table has room for."""
        if entry is self.entries[0]:
            return "best over patients" if len(self.entries) > 1 else ""
        if self.too_few:
            return "too few patients"
        p = self.tests[entry.name].p
        if math.isnan(p):
            return "-"
        told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        return told if p < ALPHA else f"{told}, not told apart"


def collect(runs: Sequence[Run]) -> list[Entry]:
    """The lines of all tables, in the order of the runs."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        for task in run.result["ways"]:
            found.setdefault((run.job.name, task, run.job.shots), []).append(run)
    return [Entry(name, task, shots, tuple(of)) for (name, task, shots), of in found.items()]


def grouped(entries: Sequence[Entry], patient_of: Callable[[str], str]) -> list[Group]:
    """Automatic and prompted apart, and each kind of prompt and number of training cases; all cases first."""

    def key(entry: Entry) -> tuple[str, float, str]:
        return entry.task, -math.inf if entry.shots is None else -entry.shots, entry.prompts

    found = {place: [entry for entry in entries if key(entry) == place] for place in sorted(set(map(key, entries)))}
    return [_group(of, patient_of) for of in found.values()]


def _group(entries: Sequence[Entry], patient_of: Callable[[str], str]) -> Group:
    dice = {entry.name: entry.per_patient(patient_of) for entry in entries}
    defined = [{patient for patient, value in of.items() if not math.isnan(value)} for of in dice.values()]
    # All are ranked by the patients whom all were measured on, where runs are missing: by what the test sees.
    shared = set.intersection(*defined)
    dice = {name: {patient: of[patient] for patient in of if patient in shared} for name, of in dice.items()}
    means = {name: _mean([*of.values()]) for name, of in dice.items()}
    ordered = sorted(entries, key=lambda entry: (math.isnan(means[entry.name]), -means[entry.name]))
    best, *others = ordered
    found = [paired(dice[entry.name], dice[best.name]) for entry in others]
    tests = {
        entry.name: Paired(test.count, test.difference, p)
        for entry, test, p in zip(others, found, holm([test.p for test in found]))
    }
    patients, why = len(shared), ""
    if others and too_few(patients, len(others)):
        least = min(1.0, smallest_p(patients) * len(others))
        counted = f"{len(others)} comparisons" if len(others) > 1 else "one comparison"
        few = "1 patient is" if patients == 1 else f"{patients} patients are"
        why = f"{few} too few to tell systems apart: with {counted} no result could have p below {least:.3g}"
    return Group(best.task, best.prompts, best.shots, tuple(ordered), tests, why)


def mean_sd(values: np.ndarray, shown: Shown) -> str:
    """Mean and sample standard deviation over runs as text."""
    defined = values[~np.isnan(values)]
    text = shown.text(_mean(defined))
    return text + (f" ± {shown.text(float(defined.std(ddof=1)))}" if defined.size > 1 else "")


def of_task(entry: Entry) -> dict[str, str]:
    """What only the tables of its task show: who is told what a slice shows raises no false alarm."""
    if entry.task == "prompted":
        return {"Prompts": entry.prompts}
    drawn, absent = entry.false_alarms()
    return {"False alarms": f"{drawn} of {absent}" if absent else "-"}


def costs(entry: Entry) -> dict[str, str]:
    """What a system costs, as the tables show it."""
    memory = entry.fact("peak_memory_bytes")
    return {
        "Trained": f"{entry.fact('trained_parameters') / 1e6:.2f} M",
        "Parameters": f"{entry.fact('total_parameters') / 1e6:.2f} M",
        "Adapter [MB]": f"{entry.fact('adapter_bytes') / 1e6:.1f}",
        "Steps": f"{entry.fact('steps'):.0f}",
        "Training [s]": f"{entry.fact('seconds'):.0f}",
        "Memory [GB]": "-" if math.isnan(memory) else f"{memory / 1e9:.2f}",
        "Per volume [s]": f"{entry.seconds_per_case:.2f}",
    }


def markdown(groups: Sequence[Group], facts: Mapping[str, str], notes: Sequence[str], unit: str) -> str:
    """All tables as Markdown."""
    lines = ["# Comparison", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [f"> {note}" for note in notes] + [""] * bool(notes)
    shown = measures(unit)
    for group in groups:
        lines += [f"## {group.title}", ""]
        if group.task == "prompted":
            lines += [PROMPTED_NOTE, ""]
        first = group.entries[0]
        heads = ["System", *(one.head for one in shown), *of_task(first), "against the best", *costs(first)]
        rows = [
            [entry.name, *(mean_sd(entry.means(one.key), one) for one in shown), *of_task(entry).values()]
            + [group.verdict(entry), *costs(entry).values()]
            for entry in group.entries
        ]
        lines += [*_table(heads, rows), ""]
        if group.too_few:
            lines += [f"{group.too_few}.", ""]
        names = group.entries[0].class_names
        for one in (shown[0], shown[-1]):
            rows = [[e.name, *(mean_sd(e.means(one.key, n), one) for n in names)] for e in group.entries]
            lines += [f"{one.head} per class", "", *_table(["System", *names.values()], rows), ""]
    lines += [*READING, ""]
    return "\n".join(lines)


READING = (
    "Mean ± sample standard deviation over the runs (folds x seeds) of the mean over a run's held-out cases. The runs "
    "of a cross-validation share training cases, so the deviation is no standard error.",
    "Against the best: two-sided Wilcoxon signed-rank test over patients of the mean Dice over classes, cases and "
    "seeds, against the system that is best in the same table by the mean over patients of just that; p after Holm's "
    "correction over the table. The best was chosen by the same figures. The mean ± deviation that is shown weighs "
    "classes and folds, not patients, alike, and may order close systems otherwise.",
    "All figures are over the pairs of case and class that the reference shows, the same for all systems. Strict "
    "policy: a class that was missed there has Dice 0 and the diagonal of the volume as HD95.",
    "Of the pairs of case and class without the class in the reference, over all runs: in how many the system drew it "
    "anyway, be it a voxel. They are in no other figure. '-': every held-out case shows every class.",
)


def write_cases(path: Path, runs: Sequence[Run]) -> None:
    """results.csv: every measure of every held-out case, class and run."""
    keys = [key for key in dict.fromkeys(_all_keys(runs))]
    with whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heads = [
            "system",
            "task",
            "prompts",
            "training_cases",
            "fold",
            "seed",
            "case",
            "label",
            "class",
            "in_reference",
        ]
        writer.writerow([*heads, *keys])
        for run in runs:
            names = dict(enumerate(run.result["class_names"], start=1))
            for task, way in run.result["ways"].items():
                head = [run.job.name, task, way.get("prompts", ""), len(run.job.train), run.job.fold, run.job.seed]
                for case, labels in way["cases"].items():
                    for label, values in labels.items():
                        numbers = [f"{values.get(key, math.nan):.10g}" for key in keys]
                        writer.writerow([*head, case, label, names[label], int(in_reference(values)), *numbers])


def _all_keys(runs: Sequence[Run]) -> Iterable[str]:
    for run in runs:
        for way in run.result["ways"].values():
            for labels in way["cases"].values():
                for values in labels.values():
                    yield from values


def write_summary(path: Path, groups: Sequence[Group], unit: str) -> None:
    """summary.csv: a row per system, task, number of training cases and class ("all classes" first).

    The tests are against the best of those with the same task, prompts and number of training cases.
    """
    shown = measures(unit)
    figures = [f"{one.key}_{of}" for one in shown for of in ("mean", "sd")]
    costs = ("trained_parameters", "total_parameters", "adapter_bytes", "steps", "seconds", "peak_memory_bytes")
    with whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        tested = ["false_alarms", "absent_in_reference", "difference_to_best", "p_holm"]
        heads = ["system", "task", "prompts", "shots", "runs", "class", *figures, *tested, *costs, "seconds_per_volume"]
        writer.writerow(heads)
        for group in groups:
            for entry in group.entries:
                test = group.tests.get(entry.name)
                for label, name in {None: "all classes", **entry.class_names}.items():
                    row = [entry.name, group.task, group.prompts, group.shots or "all", len(entry.runs), name]
                    for one in shown:
                        values = entry.means(one.key, label)
                        values = values[~np.isnan(values)]
                        sd = float(values.std(ddof=1)) if values.size > 1 else math.nan
                        row += [f"{_mean(values):.10g}", f"{sd:.10g}"]
                    row += map(str, entry.false_alarms(label))
                    told = test if label is None else None
                    row += [f"{told.difference:.10g}", f"{told.p:.10g}"] if told else ["", ""]
                    row += [f"{entry.fact(cost):.10g}" for cost in costs] + [f"{entry.seconds_per_case:.6g}"]
                    writer.writerow(row)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(heads), "|---|" + "---:|" * (len(heads) - 1), *map(line, rows)]


def _mean(values: Sequence[float] | np.ndarray) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
