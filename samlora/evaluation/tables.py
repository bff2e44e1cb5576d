"""The tables of the report page as HTML. Every name is escaped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from samlora.colours import class_colour
from samlora.evaluation.frames import case_mean
from samlora.evaluation.measures import Shown, state

Case = Mapping[int, Mapping[str, float]]
_STATES = {
    "absent": "in neither map: undefined",
    "missed": "in the reference, but not in the prediction",
    "added": "in the prediction, but not in the reference",
}


@dataclass(frozen=True)
class Class:
    """A class on the page: its label value, its name, its colour for style sheets."""

    label: int
    name: str
    colour: str

    @property
    def html(self) -> str:
        return swatch(self.colour) + named(self.name)


def page_classes(labels: Sequence[int], names: Mapping[int, str]) -> list[Class]:
    """The classes in order of their labels. They take the first colours in turn, whatever their values."""
    classes = []
    for number, label in enumerate(sorted(labels), start=1):
        colour = "#" + "".join(f"{round(255 * value):02x}" for value in class_colour(number))
        classes.append(Class(label, names.get(label, f"class {label}"), colour))
    return classes


def swatch(colour: str) -> str:
    """A little square of a colour."""
    return f'<i style="background:{colour}"></i>'


def named(name: str) -> str:
    """A name that is cut where there is no room, and whole when pointed at."""
    text = escape(name)
    return f'<span class="name" title="{text}">{text}</span>'


def summary_table(summary: Mapping, classes: Sequence[Class], measures: Sequence[Shown]) -> str:
    """Per class and over all: mean, standard deviation and interval of each measure, cases counted and excluded."""
    heads = "".join(f'<th scope="col">{escape(shown.head)}</th>' for shown in measures)
    rows = [_summary_row(each.html, summary["classes"].get(each.label, {}), measures) for each in classes]
    overall = _summary_row("all classes", summary["overall"], measures, "overall")
    return (
        f'<table><thead><tr><th scope="col">Class</th>{heads}<th scope="col">n</th><th scope="col">excluded</th></tr>'
        f"</thead><tbody>{''.join(rows)}{overall}</tbody></table>"
    )


def _summary_row(head: str, figures: Mapping, measures: Sequence[Shown], kind: str = "") -> str:
    cells = []
    for shown in measures:
        of = figures.get(shown.key, {})
        mean, sd = of.get("mean", math.nan), of.get("sd", math.nan)
        if math.isnan(mean):
            cells.append('<td class="undefined">–</td>')
            continue
        text = shown.text(mean, signed=True) + ("" if math.isnan(sd) else f" ± {shown.text(sd)}")
        if not math.isnan(of["ci_low"]):
            ends = shown.text(of["ci_low"], signed=True), shown.text(of["ci_high"], signed=True)
            text += f"<small>[{ends[0]}, {ends[1]}]</small>"
        cells.append(f"<td>{text}</td>")
    counts = figures.get("dice", {})
    cells += [f"<td>{counts.get(key, 0)}</td>" for key in ("n", "n_excluded")]
    return f'<tr class="{kind}"><th scope="row">{head}</th>{"".join(cells)}</tr>'


def case_table(
    cases: Mapping[str, Case],
    strict: Mapping[str, Case],
    classes: Sequence[Class],
    first: Shown,
    links: Mapping[str, str],
) -> str:
    """A row per case, in the order given: the mean over classes and each class, of the measure `first`.

    strict: the results that say whether a class was missed. links: case -> where on the page its pictures are.
    """
    heads = [("", named("case")), ("", '<span class="name" title="mean over classes">mean</span>')]
    heads += [(' class="class"', each.html) for each in classes]
    head = "".join(f'<th scope="col"{kind}><button type="button">{text}</button></th>' for kind, text in heads)
    rows = []
    for number, (name, case) in enumerate(cases.items()):
        title = f'<a href="#{links[name]}">{named(name)}</a>' if name in links else named(name)
        cells = [_cell(first, case_mean(case, first.key), "")]
        for each in classes:
            value = case.get(each.label, {}).get(first.key, math.nan)
            cells.append(_cell(first, value, state(strict[name].get(each.label, {}))))
        rows.append(f'<tr data-case="{number}"><th scope="row">{title}</th>{"".join(cells)}</tr>')
    return (
        f'<table id="cases"><caption hidden>One row per case, the worst first</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def class_table(case: Case, strict: Case, classes: Sequence[Class], measures: Sequence[Shown]) -> str:
    """The measures of one case: a row per class that is in one of its maps."""
    heads = "".join(f'<th scope="col">{escape(shown.head)}</th>' for shown in measures)
    rows = []
    for each in classes:
        kind = state(strict.get(each.label, {}))
        if kind == "absent":
            continue
        values = case.get(each.label, {})
        cells = "".join(_cell(shown, values.get(shown.key, math.nan), "", signed=True) for shown in measures)
        note = f' <small title="{_STATES[kind]}">{kind}</small>' if kind else ""
        rows.append(f'<tr><th scope="row">{each.html}{note}</th>{cells}</tr>')
    if not rows:
        return "<p>No class is in either map.</p>"
    return f'<table><thead><tr><th scope="col">Class</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(shown: Shown, value: float, kind: str, signed: bool = False) -> str:
    told = f' data-state="{kind}" title="{_STATES[kind]}"' if kind else ""
    if math.isnan(value):
        return f'<td class="undefined"{told}>–</td>'
    mark = "†" if kind in ("missed", "added") else ""
    return f"<td{told}>{shown.text(value, signed)}{mark}</td>"
