"""A plan: what a folder holds and what follows from it; its report, and the commented recipe."""

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path
from statistics import median

import yaml

from samlora.data.findings import columns
from samlora.data.folders import Layout
from samlora.data.plan_looks import ImageLook, LabelLook
from samlora.data.recipe import Recipe

_MOST = 40  # rows of a table, notes


@dataclasses.dataclass(frozen=True)
class Found:
    """A class as the labels have it: name, what a recipe calls it there, in how many cases, voxels, ml (or None)."""

    name: str
    value: int | str
    cases: int
    voxels: int
    ml: float | None


@dataclasses.dataclass
class Plan:
    """What a folder holds, and the choices that follow. `str(plan)` is what people read, `yaml` the recipe to edit.

    reasons: recipe key -> why it was chosen so. choices: recipe key -> value. broken: files that cannot be used, each
    with the reason.
    """

    source: Path
    layout: Layout
    labels: list[LabelLook]
    images: list[ImageLook]
    classes: list[Found]
    choices: dict
    reasons: dict[str, str]
    notes: list[str]
    broken: list[str]

    @property
    def recipe(self) -> Recipe:
        """The recipe that `yaml` describes."""
        return Recipe.from_dict(yaml.safe_load(self.yaml()), f"plan for {self.source}")

    def yaml(self, path: str | os.PathLike = "FILE.yaml") -> str:
        """A commented recipe; path: where it will lie, for the command in its first lines."""
        return _recipe_text(self, path)

    def __str__(self) -> str:
        return _report_text(self)


def _report_text(plan: Plan) -> str:
    """The report for people: what is there, what it seems to be, and what to look at."""
    layout, looks = plan.layout, plan.images
    test = sum(pair.test for pair in layout.pairs)
    split = f" ({len(layout.pairs) - test} for training, {test} for testing)" if test else ""
    types = ", ".join(dict.fromkeys(str(look.dtype) for look in looks))
    low, high = min(look.low for look in looks), max(look.high for look in looks)
    read = "all read" if len(looks) == len(layout.pairs) else f"{len(looks)} of {len(layout.pairs)} read"
    rows = [("images", f"{_endings(plan)}; {read}: {types}, values {low:g}..{high:g}, {_channels(plan)}")]
    rows += [("size", _sizes(plan)), ("spacing", _spacings(plan))]
    axes = Counter(look.axes for look in plan.labels if look.axes)
    if axes:
        rows.append(("axes", ", ".join(f"{code} ({count})" if len(axes) > 1 else code for code, count in axes.items())))
    lines = [f"{plan.source}: {_cases(plan)}{split}; {layout.kind}", "", *columns(rows), "", *_class_table(plan)]
    keys = ["modality", "window", "percentiles", "channels", "mask_threshold", "ignore", "size"]
    keys += ["orientation", "slice_axis", "keep"] if max(look.shape[2] for look in plan.labels) > 1 else []
    chosen = [(key, _value(plan.choices[key]), plan.reasons[key]) for key in keys if key in plan.choices]
    lines += ["", "the recipe will say:", *columns(chosen), ""]
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"cannot be used: {line}" for line in plan.broken[:_MOST]]
    if len(plan.broken) > _MOST:
        lines.append(f"cannot be used: {len(plan.broken) - _MOST} more")
    if plan.broken:
        lines.append("repair these cases or move them away before you prepare the data")
    return "\n".join(lines).rstrip()


def _recipe_text(plan: Plan, path: str | os.PathLike) -> str:
    """The recipe as YAML, every choice with its reason; path: where it will lie."""
    name = re.sub(r"\W+", "_", plan.source.resolve().name).strip("_").lower() or "mine"
    test = any(pair.test for pair in plan.layout.pairs)
    share = "" if test else " --test_fraction 0.2"
    choices, reasons = plan.choices, plan.reasons
    lines = [
        f"# {_cases(plan)} in {plan.source} ({plan.layout.kind}), as `samlora plan` understands it.",
        "# Look through this, change what is wrong, then:",
        f"#   samlora prepare {plan.source} -o data/{name} --dataset {Path(path)}{share}",
        "",
        f"name: {_value(name)}",
        _line("modality", choices["modality"], reasons["modality"]),
    ]
    lines += [_line(key, choices[key], reasons[key]) for key in ("window", "percentiles") if key in choices]
    if choices["modality"] == "image" and "percentiles" not in choices:
        lines.append("# percentiles: [0.5, 99.5]  # for images that fill their range of values only in part")
    lines.append(_line("channels", choices["channels"], reasons["channels"]))
    if choices["channels"] == "repeat" and max(look.shape[2] for look in plan.labels) > 1:
        lines.append("# channels: neighbours      # each slice with those before and after it, as three channels")
    lines += ["", *(_line(key, choices[key], reasons[key]) for key in ("orientation", "slice_axis", "crop"))]
    lines.append(_line("size", choices["size"], f"training slices, in pixels; null keeps theirs; {reasons['size']}"))
    lines.append(_line("keep", choices["keep"], f"training slices: all, foreground, or a share; {reasons['keep']}"))
    lines += ["", *_classes(plan)]
    if test:
        lines += ["", "# The folder says which cases are for testing; --test_cases or --test_fraction choose others."]
    lines += [
        "",
        "# A regular expression whose group finds the patient in a case's name; null: each case is another patient.",
    ]
    if "patient" in choices:
        lines.append(f"# {reasons['patient']}.")
    lines.append(f"patient: {_value(choices.get('patient'))}")
    return "\n".join(lines) + "\n"


def _classes(plan: Plan) -> list[str]:
    lines = ["# Foreground classes 1, 2, 3 ... in this order. Rename them as you like; leave out what you do not need."]
    if "ignore" in plan.choices:
        lines.append(_line("ignore", plan.choices["ignore"], plan.reasons["ignore"]))
    if "mask_threshold" in plan.choices:
        lines.append(_line("mask_threshold", plan.choices["mask_threshold"], plan.reasons["mask_threshold"]))
    elif any(look.names for look in plan.labels):
        lines.append("# name: what the label files call it (or several, [a, b], united); each goes by its own numbers.")
    elif isinstance(plan.classes[0].value, str):
        lines.append(
            "# name: the mask it is drawn from (or several, [a, b], united). Where masks overlap, the later class wins."
        )
    else:
        lines.append("# name: its value in the label files (or several, [2, 3]). All other values become background.")
    rows = [f"  {_value(found.name)}: {_value(found.value)}" for found in plan.classes]
    width = max(map(len, rows))
    counts = [f"# in {found.cases} of {len(plan.labels)} cases" for found in plan.classes]
    return [*lines, "classes:", *(f"{row:<{width}}  {count}" for row, count in zip(rows, counts))]


def _class_table(plan: Plan) -> list[str]:
    known = any(found.ml is not None for found in plan.classes)
    unit = "voxels" if known or plan.labels[0].shape[2] > 1 else "pixels"
    head = ["class", "in the files", "cases", unit, "ml per case"]
    rows = [[f.name, str(f.value), str(f.cases), str(f.voxels), _ml(f.ml)] for f in plan.classes[:_MOST]]
    dropped = ["ml per case"] if not known else []
    dropped += ["in the files"] if all(found.name == found.value for found in plan.classes) else []
    kept = [n for n, name in enumerate(head) if name not in dropped]
    table = columns([[row[n] for n in kept] for row in (head, *rows)], right=range(1, len(kept)))
    more = len(plan.classes) - _MOST
    return [*table, *([f"... and {more} more classes"] if more > 0 else [])]


def _cases(plan: Plan) -> str:
    return f"{len(plan.layout.pairs)} case{'s' * (len(plan.layout.pairs) > 1)}"


def _line(key: str, value: object, comment: str) -> str:
    text = f"{key}: {_value(value)}"
    return f"{text:<27} # {comment}"


def _value(value) -> str:
    """A value as YAML in one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True).strip()[1:-1]


def _endings(plan: Plan) -> str:
    firsts = [path for pair in plan.layout.pairs for path in pair.images]
    kinds = Counter(
        "DICOM folder" if p.is_dir() else "".join(p.suffixes[-2:] if p.suffix == ".gz" else [p.suffix]) for p in firsts
    )
    return ", ".join(kinds)


def _channels(plan: Plan) -> str:
    gray = sum(look.channels == 1 for look in plan.images)
    most = max(look.channels for look in plan.images)
    if not gray or most == 1:
        return "one channel" if most == 1 else f"{most} channels"
    return f"{gray} with one channel, {len(plan.images) - gray} with {most}"


def _sizes(plan: Plan) -> str:
    thin = all(look.shape[2] == 1 for look in plan.labels)
    sizes = Counter(look.shape[: 2 if thin else 3] for look in plan.labels)
    if len(sizes) <= 3:
        return ", ".join(" x ".join(map(str, s)) + (f" ({n})" if len(sizes) > 1 else "") for s, n in sizes.items())
    return _range([look.shape[: 2 if thin else 3] for look in plan.labels])


def _spacings(plan: Plan) -> str:
    spacings = [look.spacing for look in plan.labels if look.spacing]
    unknown = len(plan.labels) - len(spacings)
    if not spacings:
        return "unknown"
    more = f"; unknown in {unknown}" if unknown else ""
    if not any(look.has_thickness for look in plan.labels):
        spacings = [spacing[:2] for spacing in spacings]
    rounded = [tuple(float(f"{size:.3g}") for size in spacing) for spacing in spacings]
    same = " x ".join(f"{size:g}" for size in rounded[0])
    return (same if len(set(rounded)) == 1 else _range(rounded)) + " mm" + more


def _range(triples: list[tuple]) -> str:
    """Smallest, median and largest along each axis."""
    parts = []
    for what, choose in (("least", min), ("median", median), ("most", max)):
        parts.append(f"{what} " + " x ".join(f"{choose(values):.4g}" for values in zip(*triples)))
    return ", ".join(parts)


def _ml(volume: float | None) -> str:
    return "" if volume is None else f"{volume:.3g}" if volume < 100 else f"{volume:.0f}"
