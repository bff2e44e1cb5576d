"""report.html: one page that needs nothing but itself. Tables, box plots, and the worst cases to scroll through.

The page asks for nothing from any network, and its Content-Security-Policy forbids it to. Every name on it was
chosen by somebody else and is escaped.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from samlora.evaluation.frames import DIFFERENCES, Frames, badness, case_mean
from samlora.evaluation.measures import FIRST, Shown, shown_measures
from samlora.evaluation.plots import Strip, box_plot
from samlora.evaluation.tables import Class, case_table, class_table, page_classes, summary_table, swatch
from samlora.files import whole

POLICIES = {
    "strict": "A class in neither map is undefined: left out of means and counted. A class in one map only has Dice 0 "
    "and the diagonal of the volume as distance.",
    "samed": "As the SAMed and TransUNet papers count: a class that is predicted but not in the reference has Dice 1 "
    "and HD95 0, one missing from the prediction 0 and 0; distances in voxels. For comparing tables with theirs.",
}
_READING = {
    "Dice": "Twice the common volume over the sum of both volumes: 100 % is agreement, 0 % no overlap.",
    "HD95": "95 % of the surface points of both maps are nearer than this to the other surface (both directions "
    "pooled).",
    "ASSD": "The mean distance of all surface points of both maps to the other surface.",
    "Surface Dice": "The share of both surfaces that lies within the tolerance of the other surface.",
    "Volume error": "Prediction minus reference, in per cent of the reference; undefined where that is empty.",
    "± and [ ]": "Standard deviation over cases, and the 95 % percentile bootstrap interval of the mean over cases "
    "(10 000 resamples, fixed seed). It says how much the mean depends on which cases were measured, not how other "
    "scanners or hospitals would fare.",
    "n, excluded": "Cases with a defined Dice, and cases without: neither map has the class.",
    "†": "The class is in one of the two maps only.",
}

_KEY = (
    '<ul class="key classes"><li><i class="line"></i>reference</li><li><i class="fill"></i>prediction</li></ul>'
    '<ul class="key kinds">'
    + "".join(f"<li>{swatch(colour)}{kind}</li>" for kind, colour in DIFFERENCES.items())
    + "</ul>"
)


def write_page(
    path: str | os.PathLike,
    results: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]],
    summaries: Mapping[str, Mapping],
    class_names: Mapping[int, str],
    frames: Mapping[str, Frames],
    facts: Mapping[str, str],
    *,
    title: str = "Evaluation",
    policy: str = "strict",
    unit: str = "mm",
    tolerances: Sequence[float] = (2.0,),
    notes: Sequence[str] = (),
) -> int:
    """Writes the page, whole or not at all, and returns its size in bytes.

    results: policy -> case -> what `metrics.evaluate` returned; "strict" is among the policies. summaries: policy ->
    what `metrics.summarise` returned. frames: case -> its pictures, for the cases to show, in that order
    (`frames.Worst` collects them). facts: what stands in the head, such as {"Prediction": "folder"}. policy: whose
    figures the page is about; the others get a table. unit: "mm" or "px". tolerances: of `nsd`, then of `nsd_1mm` ...
    notes: warnings to show. Raises InputError where nothing can be written.
    """
    measures = shown_measures(policy, unit, tolerances)
    first = _first(measures)
    order = sorted(results[policy], key=lambda name: badness(name, results[policy][name]))
    cases, strict = {name: results[policy][name] for name in order}, results["strict"]
    classes = page_classes(summaries[policy]["classes"], class_names)
    links = {name: f"case-{number}" for number, name in enumerate(frames)}
    files = {kind: _beside(f"page.{kind}") for kind in ("html", "css", "js")}
    data = {"frames": [vars(pictures) for pictures in frames.values()], "measures": _values(cases, classes, measures)}
    parts = {
        "title": escape(title),
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(files["js"].encode()).digest()).decode(),
        "style": files["css"],
        "facts": "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items()),
        "notes": f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else "",
        "tiles": _tiles(summaries[policy], first),
        "policy": f"<strong>{policy}</strong>: {POLICIES[policy]}",
        "summary": summary_table(summaries[policy], classes, first),
        "all_measures": _folded("All measures", "", summary_table(summaries[policy], classes, [*measures.values()]))
        if len(measures) > len(first)
        else "",
        "other_policies": "".join(
            _folded(
                f"The same under policy {other}",
                POLICIES[other],
                summary_table(summary, classes, _first(shown_measures(other, unit, tolerances))),
            )
            for other, summary in summaries.items()
            if other != policy
        ),
        "plots": "".join(_plot(cases, classes, measures[key]) for key in ("dice", "hd95")),
        "measures": "".join(f'<option value="{key}">{escape(shown.head)}</option>' for key, shown in measures.items()),
        "case_table": case_table(cases, strict, classes, measures["dice"], links),
        "viewers": _viewers(frames, len(cases), cases, strict, classes, measures),
        "reading": "".join(f"<dt>{key}</dt><dd>{text}</dd>" for key, text in _READING.items()),
        "data": _json(data),
        "script": files["js"],
    }
    content = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], files["html"])
    with whole(path) as part:
        part.write_text(content, encoding="utf-8")
    return len(content.encode())


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _first(measures: Mapping[str, Shown]) -> list[Shown]:
    """What a summary shows before all the rest."""
    return [shown for key, shown in measures.items() if key in FIRST or key.startswith("nsd")]


def _folded(title: str, hint: str, table: str) -> str:
    hint = f'<p class="hint">{hint}</p>' if hint else ""
    return f'<details><summary>{title}</summary>{hint}<div class="wide">{table}</div></details>'


def _values(cases: Mapping, classes: Sequence[Class], measures: Mapping[str, Shown]) -> dict:
    """Per measure what the page's table needs: per case the mean and every class, null where undefined."""

    def numbers(case: Mapping[int, Mapping[str, float]], key: str) -> list[float | None]:
        values = [case_mean(case, key), *(case.get(each.label, {}).get(key, math.nan) for each in classes)]
        return [None if math.isnan(value) else float(f"{value:.6g}") for value in values]

    return {
        key: {
            "scale": shown.scale,
            "digits": shown.digits,
            "better": shown.better,
            "values": [numbers(case, key) for case in cases.values()],
        }
        for key, shown in measures.items()
    }


def _tiles(summary: Mapping, measures: Sequence[Shown]) -> str:
    """The overall figures in large type."""
    count = summary["n_cases"]
    tiles = [f'<div class="tile"><b>{count}</b><span>{"case" if count == 1 else "cases"}</span></div>']
    for shown in measures:
        figures = summary["overall"].get(shown.key, {})
        mean, low, high = (figures.get(key, math.nan) for key in ("mean", "ci_low", "ci_high"))
        if shown.key not in ("dice", "hd95", "nsd") or math.isnan(mean):
            continue
        interval = "" if math.isnan(low) else f"<span>95 % interval {shown.text(low)} to {shown.text(high)}</span>"
        tiles.append(
            f'<div class="tile"><b>{shown.text(mean)} <small>{shown.unit}</small></b>'
            f"<span>{escape(shown.title)}, mean over classes</span>{interval}</div>"
        )
    return "".join(tiles)


def _plot(cases: Mapping, classes: Sequence[Class], shown: Shown) -> str:
    strips = []
    for each in classes:
        values = ((case, of.get(each.label, {}).get(shown.key, math.nan)) for case, of in cases.items())
        strips.append(Strip(each.name, each.colour, [(c, v) for c, v in values if not math.isnan(v)]))
    return box_plot(shown.title, strips, shown.scale, shown.unit, shown.better == "high")


def _viewers(
    frames: Mapping[str, Frames],
    total: int,
    cases: Mapping,
    strict: Mapping,
    classes: Sequence[Class],
    measures: Mapping[str, Shown],
) -> str:
    if not frames:
        return ""
    columns = [measures[key] for key in ("dice", "hd95", "nsd", "volume_error_percent") if key in measures]
    viewers = []
    for number, (case, pictures) in enumerate(frames.items()):
        means = ", ".join(
            f"{columns[n].title} {columns[n].text(case_mean(cases[case], columns[n].key))} {columns[n].unit}"
            for n in (0, 1)
        )
        viewers.append(
            f'<article class="viewer" id="case-{number}" data-frames="{number}"><header><h3>{escape(case)}</h3>'
            f'<span class="hint">{means}</span></header>{_stack(number, case, pictures)}'
            f'<div class="beside"><div class="wide">{class_table(cases[case], strict[case], classes, columns)}</div>'
            f"{_KEY}</div></article>"
        )
    head = f"The worst {len(frames)} of {total} cases" if len(frames) < total else "The cases, slice by slice"
    hint = "Line: reference. Fill: prediction. Move the slider, or use the arrow keys when it is selected."
    return f'<section><h2>{head}</h2><p class="hint">{hint}</p>{"".join(viewers)}</section>'


def _stack(number: int, case: str, pictures: Frames) -> str:
    """The layers of the first slice to show, the slider and the choice of layers."""
    layers = []
    for layer in ("background", "prediction", "reference", "difference"):
        if uris := getattr(pictures, layer):
            told = f"slices of {escape(case)}" if layer == "reference" else ""
            layers.append(f'<img class="{layer}" src="{uris[pictures.start]}" alt="{told}">')
    dark = "" if pictures.background else " dark"
    width, height = pictures.size
    modes = {"overlay": "Overlay", "difference": "Difference", "image": "Image"}
    if not pictures.background:
        modes.pop("image")
    radios = "".join(
        f'<label><input type="radio" name="mode-{number}" value="{mode}"{" checked" * (mode == "overlay")}> '
        f"{text}</label>"
        for mode, text in modes.items()
    )
    last, z = len(pictures.slices) - 1, pictures.slices[pictures.start] + 1
    slider = (
        f'<div class="slide"><input type="range" min="0" max="{last}" value="{pictures.start}" step="1" '
        f'aria-label="Slice of {escape(case)}"><output>slice {z} of {pictures.depth}</output></div>'
    )
    step = pictures.slices[1] - pictures.slices[0] if last else 1
    remarks = ["cropped to the surroundings of the labels"] * pictures.cropped
    remarks += [f"one slice in {step} is shown"] * (step > 1)
    remark = f"<small>{'; '.join(remarks)}</small>" if remarks else ""
    return (
        f'<div><div class="stack{dark}" data-mode="overlay" style="aspect-ratio:{width}/{height}">'
        f"{''.join(layers)}</div>"
        f"{slider if last else ''}<fieldset><legend>Show</legend>{radios}</fieldset>{remark}</div>"
    )
