"""What clicks and boxes were worth: figures per prompt, class and number of clicks; printed, as CSV, JSON and curve."""

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from samlora.colours import class_colour
from samlora.evaluation.bootstrap import mean_intervals, overall_interval
from samlora.files import whole

AUTOMATIC, CLICKS, BOX = "automatic", "clicks", "box"
_INK, _MUTED, _GRID = "#1b1f24", "#5b6470", "#e3e6ea"  # text, secondary text, grid lines


@dataclass(frozen=True)
class Asked:
    """How one object was asked for, and the Dice of the answer.

    label: its class. pixels: its size. kind: AUTOMATIC, CLICKS or BOX. amount: clicks so far; by how many pixels at
    most the sides of the box were moved; 0 without prompts.
    """

    case: str
    slice: int
    label: int
    pixels: int
    kind: str
    amount: int
    dice: float


def summarise(
    asked: Sequence[Asked], class_names: Mapping[int, str], clicks: Sequence[int], targets: Sequence[float]
) -> dict:
    """{"n_cases", "n_objects", "dice": [prompt by prompt], "clicks_to": [target by target]}.

    asked: for every object all clicks from 1 to the last of `clicks`. Each entry of the two lists says what it is about
    ("prompt" and "amount", or "dice") and has "classes", by name, and "overall": mean, low and high (95 % bootstrap
    interval over the cases, see `bootstrap`), median, n (cases). A case counts once for a class, by the mean of its
    objects; overall is the mean over classes, and its median that of the cases' means over their classes.
    clicks_to: clicks until an object reaches that Dice (Xu et al., arXiv 1603.04042); one that never does counts with
    the last of `clicks`, and in "never".
    """
    labels = sorted({one.label for one in asked})
    cases = sorted({one.case for one in asked})
    names = [class_names.get(label, f"class {label}") for label in labels]
    summary = {"n_cases": len(cases), "n_objects": len({(one.case, one.slice, one.label) for one in asked})}
    summary["dice"] = [
        {"prompt": kind, "amount": amount}
        | _figures([(one, one.dice) for one in asked if (one.kind, one.amount) == (kind, amount)], cases, labels, names)
        for kind, amount in dict.fromkeys((one.kind, one.amount) for one in asked)
        if kind != CLICKS or amount in clicks
    ]
    summary["clicks_to"] = [
        {"dice": target} | _effort(asked, target, max(clicks), cases, labels, names)
        for target in targets
        if any(one.kind == CLICKS for one in asked)
    ]
    return summary


def _effort(
    asked: Iterable[Asked], target: float, most: int, cases: Sequence[str], labels: Sequence[int], names: Sequence[str]
) -> dict:
    needed: dict[tuple[str, int, int], tuple[Asked, float]] = {}
    never = dict.fromkeys(names, 0)
    for one in sorted((one for one in asked if one.kind == CLICKS), key=lambda one: one.amount):
        key = one.case, one.slice, one.label
        if key not in needed and (one.dice >= target or one.amount == most):
            needed[key] = one, float(one.amount)
            never[names[labels.index(one.label)]] += one.dice < target
    figures = _figures(list(needed.values()), cases, labels, names)
    for name, count in never.items():
        figures["classes"][name]["never"] = count
    figures["overall"]["never"] = sum(never.values())
    return figures


def _figures(
    values: Sequence[tuple[Asked, float]], cases: Sequence[str], labels: Sequence[int], names: Sequence[str]
) -> dict:
    means = _case_means(values, cases, labels)
    low, high = mean_intervals(means)
    classes = {
        name: {"mean": _of(np.mean, column), "low": float(low[n]), "high": float(high[n])}
        | {"median": _of(np.median, column), "n": int(np.count_nonzero(~np.isnan(column)))}
        for n, (name, column) in enumerate(zip(names, means.T))
    }
    ends = overall_interval(means)
    of_cases = np.array([_of(np.mean, row) for row in means])
    overall = {"mean": _of(np.mean, np.array([figures["mean"] for figures in classes.values()]))}
    overall |= {"low": float(ends[0]), "high": float(ends[1]), "median": _of(np.median, of_cases)}
    return {"classes": classes, "overall": overall | {"n": int(np.count_nonzero(~np.isnan(of_cases)))}}


def _case_means(values: Sequence[tuple[Asked, float]], cases: Sequence[str], labels: Sequence[int]) -> np.ndarray:
    """(cases, classes): the mean over a case's objects of a class, NaN where it has none."""
    row, column = ({name: n for n, name in enumerate(found)} for found in (cases, labels))
    sums, counts = np.zeros((2, len(cases), len(labels)))
    for one, value in values:
        at = row[one.case], column[one.label]
        sums[at] += value
        counts[at] += 1
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _of(function: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    """Of the values that are defined; NaN without any."""
    defined = values[~np.isnan(values)]
    return float(function(defined)) if defined.size else math.nan


def table(summary: Mapping) -> str:
    """Means as aligned text: Dice in per cent for every prompt, then clicks per target; intervals for all classes."""
    entries, efforts = summary["dice"], summary["clicks_to"]
    groups = [[e for e in entries if e["prompt"] == kind] for kind in (AUTOMATIC, CLICKS, BOX)]
    groups = [group for group in groups if group]
    heads = [[_short(e) for e in group] for group in groups] + [[f"to {100 * e['dice']:g}"] for e in efforts]
    names = list(entries[0]["classes"]) if entries else []
    width = min(20, max([len("all classes"), *map(len, names)]))
    titles = {AUTOMATIC: "auto", CLICKS: "after clicks", BOX: "box + px"}
    shown = [titles[group[0]["prompt"]] for group in groups] + ["clicks"] * len(efforts)
    cells = [" ".join(f"{head:>5}" for head in group) for group in heads]
    widths = [max(len(cell), len(title)) for cell, title in zip(cells, shown)]
    first = "Dice [%]".ljust(width) + "".join(f" | {title:<{w}}" for title, w in zip(shown, widths))
    second = "class".ljust(width) + "".join(f" | {cell:>{w}}" for cell, w in zip(cells, widths))
    rule = "-" * len(second)

    def line(name: str, pick: Callable[[Mapping], Mapping]) -> str:
        parts = [" ".join(_cell(100 * pick(e)["mean"]) for e in group) for group in groups]
        parts += [_cell(pick(e)["mean"]) for e in efforts]
        return name[:width].ljust(width) + "".join(f" | {part:>{w}}" for part, w in zip(parts, widths))

    lines = [first.rstrip(), second, rule, *(line(n, lambda e, n=n: e["classes"][n]) for n in names)]
    lines += [rule, line("all classes", lambda e: e["overall"]), ""]
    lines.append(f"means and 95 % intervals over the cases ({summary['n_cases']}):")
    lines += [f"  {prompt_text(e):<14} Dice {_interval(e['overall'], 100)} %" for e in entries]
    for effort in efforts:
        never = f"; {effort['overall']['never']} of {summary['n_objects']} objects never"
        lines.append(f"  to Dice {100 * effort['dice']:g} %  clicks {_interval(effort['overall'], 1)}{never}")
    return "\n".join(lines)


def prompt_text(entry: Mapping) -> str:
    """How a prompt is called: "no prompt", "3 clicks", "box + 5 px"."""
    amount = entry["amount"]
    if entry["prompt"] == CLICKS:
        return f"{amount} click{'s' if amount > 1 else ''}"
    return "no prompt" if entry["prompt"] == AUTOMATIC else f"box + {amount} px"


def _short(entry: Mapping) -> str:
    return "" if entry["prompt"] == AUTOMATIC else str(entry["amount"])


def _cell(value: float) -> str:
    return f"{'-':>5}" if math.isnan(value) else f"{value:5.1f}"


def _interval(figures: Mapping, scale: float) -> str:
    mean, low, high, median = (_cell(scale * figures[name]).strip() for name in ("mean", "low", "high", "median"))
    return f"{mean} [{low}, {high}], median {median}"


def write_csv(path: str | os.PathLike, asked: Iterable[Asked], class_names: Mapping[int, str]) -> None:
    """One row per case, slice, class and prompt: case, slice, label, class, pixels, prompt, amount, dice."""
    with whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "slice", "label", "class", "pixels", "prompt", "amount", "dice"])
        for one in asked:
            name = class_names.get(one.label, f"class {one.label}")
            row = one.case, one.slice, one.label, name, one.pixels, one.kind, one.amount, f"{one.dice:.6g}"
            writer.writerow(row)


def write_json(path: str | os.PathLike, summary: Mapping, about: Mapping[str, object]) -> None:
    """Writes {"about": ..., and what `summarise` returned}. Undefined values become null."""
    content = json.loads(json.dumps({"about": about, **summary}), parse_constant=lambda _: None)
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw_curve(path: str | os.PathLike, asked: Sequence[Asked], class_names: Mapping[int, str]) -> None:
    """Draws mean Dice after every click as a PNG: a line per class; dashed what the class gets without prompts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels, cases = sorted({one.label for one in asked}), sorted({one.case for one in asked})
    most = max((one.amount for one in asked if one.kind == CLICKS), default=0)
    turns = [
        _case_means([(one, 100 * one.dice) for one in asked if (one.kind, one.amount) == at], cases, labels).T
        for at in [(AUTOMATIC, 0), *((CLICKS, turn) for turn in range(1, most + 1))]
    ]
    for n, label in enumerate(labels):
        without, *clicked = (_of(np.mean, of_turn[n]) for of_turn in turns)
        style = {"color": class_colour(label), "marker": "o", "markersize": 3.5}
        axes.plot(range(1, most + 1), clicked, label=class_names.get(label, f"class {label}"), **style)
        if not math.isnan(without):
            axes.axhline(without, color=class_colour(label), linestyle="--", linewidth=1.2)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(1, most + 1))
    axes.set_title("Dice after clicks [%]", fontsize=10, color=_INK, loc="left")
    axes.set_xlabel("clicks", fontsize=8.5, color=_MUTED)
    axes.tick_params(labelsize=8, colors=_MUTED)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    with whole(path) as part:
        figure.savefig(part, format="png")
