"""report.html of a comparison: tables, plots and the same slices by all systems. It loads nothing from anywhere."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from samlora.colours import PALETTE
from samlora.compare.drawing import Axis, Line, plot
from samlora.compare.job import Held
from samlora.compare.pictures import picture
from samlora.compare.results import PROMPTED_NOTE, READING, Entry, Group, costs, mean_sd, measures, of_task
from samlora.evaluation.measures import Shown
from samlora.evaluation.plots import Strip, box_plot
from samlora.evaluation.tables import named, page_classes, swatch
from samlora.files import whole

_BINS = 60  # points of a learning curve
_TAG = '<span class="mark">prompted</span>'
Shots = Sequence[tuple[Held, Mapping[tuple[str, str], np.ndarray]]]


def write_page(
    path: Path, groups: Sequence[Group], facts: Mapping[str, str], notes: Sequence[str], unit: str, shown: Shots
) -> None:
    """Writes the page, whole or not at all.

    groups: as `results.grouped` made them. shown: held-out cases with, by (system, task), the prediction (H, W) on the
    slice that is shown.
    """
    names = list(dict.fromkeys(entry.name for group in groups for entry in group.entries))
    colours = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(sorted(names))}
    full = [group for group in groups if group.shots == groups[0].shots]
    parts = {
        "style": resources.files("samlora.evaluation").joinpath("page.css").read_text(encoding="utf-8"),
        "facts": "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items()),
        "notes": f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else "",
        "groups": "".join(_group(group, unit, colours) for group in groups),
        "plots": _plots(groups, full, colours),
        "boxes": "".join(_boxes(group, unit, colours) for group in full),
        "pictures": _pictures(shown, full) if shown else "",
        "reading": "".join(f"<dt>{key}</dt><dd>{escape(text)}</dd>" for key, text in _reading().items()),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    content = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    with whole(path) as part:
        part.write_text(content, encoding="utf-8")


def _reading() -> dict[str, str]:
    return {
        "±": READING[0],
        "Against the best": READING[1],
        "Strict": READING[2],
        "False alarms": READING[3],
        "Prompted": PROMPTED_NOTE,
        "Dice (= F1)": "Over voxels the F1 score, the harmonic mean of precision and recall, is the Dice coefficient.",
        "HD95": "95 % of the surface points of both maps are nearer than this to the other surface.",
        "Memory": "The most that a training took: of the GPU where there is one, else of the whole process.",
        "Per volume": "Median over held-out cases of the time from slices in memory to labels; reading not counted.",
    }


def _group(group: Group, unit: str, colours: Mapping[str, str]) -> str:
    shown = measures(unit)
    heads = ["System", *(one.head for one in shown), *of_task(group.entries[0]), "against the best"]
    rows = [
        [*(mean_sd(entry.means(one.key), one) for one in shown), *of_task(entry).values(), group.verdict(entry)]
        for entry in group.entries
    ]
    spent = [costs(entry) for entry in group.entries]
    prompted = f'<p class="prompted">{escape(PROMPTED_NOTE)}</p>' if group.task == "prompted" else ""
    why = f'<p class="hint">{escape(group.too_few)}.</p>' if group.too_few else ""
    tables = [_table(heads, group, rows, colours, best=True)]
    tables.append(_table(["System", *spent[0]], group, [[*one.values()] for one in spent], colours))
    names = group.entries[0].class_names
    per_class = "".join(
        f'<p class="hint">{escape(one.head)}</p><div class="wide">'
        + _table(
            ["System", *names.values()],
            group,
            [[mean_sd(entry.means(one.key, label), one) for label in names] for entry in group.entries],
            colours,
        )
        + "</div>"
        for one in (shown[0], shown[-1])
    )
    return (
        f'<h3 class="group">{escape(group.title)}</h3>{prompted}<div class="wide">{tables[0]}</div>{why}'
        f'<div class="wide costs">{tables[1]}</div><details><summary>Per class</summary>{per_class}</details>'
    )


def _table(
    heads: Sequence[str],
    group: Group,
    rows: Sequence[Sequence[str]],
    colours: Mapping[str, str],
    best: bool = False,
) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = []
    for number, (entry, cells) in enumerate(zip(group.entries, rows)):
        kind = ' class="best"' if best and number == 0 and len(rows) > 1 else ""
        title = swatch(colours[entry.name]) + named(entry.name) + (_TAG if entry.task == "prompted" else "")
        values = "".join(f"<td>{escape(text)}</td>" for text in cells)
        body.append(f'<tr{kind}><th scope="row">{title}</th>{values}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _label(entry: Entry) -> str:
    return entry.name + (f" (prompted: {entry.prompts})" if entry.task == "prompted" else "")


def _plots(groups: Sequence[Group], full: Sequence[Group], colours: Mapping[str, str]) -> str:
    dice = measures("mm")[0]
    entries = [entry for group in full for entry in group.entries]
    hollow = "hollow and dashed: prompted, another task" if any(e.task == "prompted" for e in entries) else ""

    def line(entry: Entry, points: Sequence[tuple[float, float, float]]) -> Line:
        return Line(_label(entry), colours[entry.name], points, entry.task == "prompted")

    scatter = [line(e, [(e.fact("trained_parameters"), *_spread(e.means("dice")))]) for e in entries]
    parts = [
        plot(
            "Dice against trained parameters", hollow, scatter, Axis("million trained parameters", True, 1e-6),
            Axis(dice.head, scale=100), joined=False, marks=True,
        )
    ]  # fmt: skip
    several = sorted({(e.task, e.name): e for group in groups for e in group.entries})
    curve = []
    if len({group.shots for group in groups}) > 1:
        every = [entry for group in groups for entry in group.entries]
        for key in several:
            of = [entry for entry in every if (entry.task, entry.name) == key]
            points = [(_training_cases(e), *_spread(e.means("dice"))) for e in of]
            curve.append(line(of[0], sorted(points)))
        parts.append(
            plot("Dice against training cases", hollow, curve, Axis("training cases", True), Axis(dice.head, scale=100),
                 joined=True, marks=True)
        )  # fmt: skip
    for column, title, hint, axis in (
        ("val_dice", "Validation Dice", "mean over the runs that got so far", Axis("Dice [%]", scale=100)),
        (
            "loss",
            "Training loss",
            "mean over the runs that got so far; losses differ: compare shapes",
            Axis("loss", True),
        ),
    ):
        unique = {entry.name: entry for entry in reversed(entries)}
        found = [line(e, points) for _, e in sorted(unique.items()) if (points := _learning(e, column))]
        if found:
            x = Axis("optimizer steps", whole=True)
            parts.append(plot(title, hint, found, x, axis, joined=True, marks=column == "val_dice"))
    return "".join(parts)


def _training_cases(entry: Entry) -> float:
    """How many cases an entry trained on: folds may differ by one where all are taken."""
    return float(np.mean([len(run.job.train) for run in entry.runs]))


def _spread(values: np.ndarray) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if values.size else math.nan
    return mean, float(values.std(ddof=1)) if values.size > 1 else math.nan


def _learning(entry: Entry, column: str) -> list[tuple[float, float, float]]:
    """A column of metrics.csv over the steps, mean over the runs; a loss in bins, each its mean."""
    curves = []
    for run in entry.runs:
        with open(run.job.folder / run.result["run"] / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [(float(r["step"]), float(r[column])) for r in csv.DictReader(file) if r.get(column)]
        if rows:
            curves.append(np.array(rows))
    if not curves:
        return []
    last = max(curve[-1, 0] for curve in curves)
    bins = _BINS if column == "loss" else 12
    edges = np.linspace(0, last + 1, min(bins, int(last) + 1) + 1)
    points = []
    for low, high in zip(edges, edges[1:]):
        means = [of[(of[:, 0] >= low) & (of[:, 0] < high)] for of in curves]
        means = [of.mean(axis=0) for of in means if len(of)]
        if means:
            step, value = np.mean(means, axis=0)
            points.append((float(step) + 1, float(value), math.nan))
    return points


def _boxes(group: Group, unit: str, colours: Mapping[str, str]) -> str:
    titles = {"dice": "Dice", "hd95": "HD95"}
    shown: list[Shown] = [one for one in measures(unit) if one.key in titles]
    figures = []
    for label, name in group.entries[0].class_names.items():
        for one in shown:
            strips = []
            for entry in sorted(group.entries, key=lambda e: e.name):
                values = entry.per_case(label, one.key)
                points = [(case, value) for case, value in values.items() if not math.isnan(value)]
                strips.append(Strip(entry.name, colours[entry.name], points))
            if any(strip.points for strip in strips):
                figures.append(
                    box_plot(f"{name}: {titles[one.key]}", strips, one.scale, one.unit, one.better == "high")
                )
    return f'<h3 class="group">{escape(group.title)}</h3><div class="plots">{"".join(figures)}</div>'


def _pictures(shown: Shots, full: Sequence[Group]) -> str:
    """A row per case: the image with the reference, then every system."""
    entries = [entry for group in full for entry in group.entries]
    seed = min(run.job.seed for entry in entries for run in entry.runs)
    heads = "".join(
        f'<th scope="col">{named(entry.name)}'
        + (f"{_TAG}<small>{escape(entry.prompts)}</small></th>" if entry.task == "prompted" else "</th>")
        for entry in entries
    )
    rows = []
    for held, predictions in shown:
        cells = [f'<td><img src="{picture(held, None)}" alt="reference of {escape(held.name)}"></td>']
        for entry in entries:
            found = predictions.get((entry.name, entry.task))
            if found is None:
                cells.append('<td class="undefined">–</td>')
                continue
            dice = _mean_dice(entry, held.name, seed)
            told = "-" if math.isnan(dice) else f"{100 * dice:.1f} %"
            uri = picture(held, found)
            cells.append(
                f'<td><img src="{uri}" alt="{escape(held.name)} by {escape(entry.name)}"><small>{told}</small></td>'
            )
        rows.append(f'<tr><th scope="row">{escape(held.name)}</th>{"".join(cells)}</tr>')
    names = entries[0].class_names
    key = "".join(f"<li>{each.html}</li>" for each in page_classes(list(names), names))
    return (
        "<section><h2>The same slices by all systems</h2>"
        '<p class="hint">Line: reference. Fill: what the system found. Held-out cases from the hardest to the easiest '
        "by the mean Dice of all systems, evenly spread; of each the slice that shows most of the classes. Below: mean "
        f'Dice of the whole case, with seed {seed}.</p><div class="wide"><table class="sheet"><thead><tr>'
        f'<th scope="col">Case</th><th scope="col">reference</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'</table></div><ul class="key">{key}</ul></section>'
    )


def _mean_dice(entry: Entry, case: str, seed: int) -> float:
    for run in entry.runs:
        if run.job.seed == seed and case in entry.cases(run):
            values = [of["dice"] for of in entry.cases(run)[case].values() if not math.isnan(of["dice"])]
            return float(np.mean(values)) if values else math.nan
    return math.nan
