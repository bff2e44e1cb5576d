"""What people look at: the printed table, metrics.csv, summary.json, overlays and training curves.

Drawing uses matplotlib's Agg canvas through its object interface: no display, no global state.
"""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samlora.colours import PALETTE, class_colour
from samlora.errors import InputError, MissingFileError
from samlora.files import read_text, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOSSES = {  # how the parts of a loss are called
    "loss_ce": "cross-entropy", "loss_dice": "Dice loss", "loss_bce": "cross-entropy", "loss_focal": "focal loss",
    "loss_iou": "IoU error", "loss_prompted": "masks by prompts",
}  # fmt: skip
_INK, _MUTED, _GRID = "#1b1f24", "#5b6470", "#e3e6ea"  # text, secondary text, grid lines
_FILL_OPACITY = 0.45
COLUMNS, SHOWN = 4, 8  # panels in a row and altogether of a contact sheet


def table(summaries: Mapping[str, Mapping], class_names: Mapping[int, str], unit: str = "mm") -> str:
    """The figures per class and over all classes as aligned text, at most 100 columns for two policies.

    summaries: policy -> what `metrics.summarise` returned. Dice in per cent with its standard deviation,
    HD95 in `unit` ("samed": in voxels), n the cases measured, excl. those left out because undefined.
    """
    labels = sorted({label for summary in summaries.values() for label in summary["classes"]})
    names = {label: class_names.get(label, f"class {label}") for label in labels}
    width = min(20, max([len("all classes"), *map(len, names.values())]))
    titles, heads = " " * width, "class".ljust(width)
    for policy in summaries:
        of = "vox" if policy == "samed" else unit
        head = f" | {'Dice [%]':>8}  {'sd':>4}  {f'HD95 [{of}]':>10}  {'n':>3} {'excl.':>5}"
        titles, heads = titles + f" | {policy:<{len(head) - 3}}", heads + head
    rule = "-" * len(heads)
    lines = [titles.rstrip(), heads, rule]
    for label in labels:
        figures = [summary["classes"].get(label, {}) for summary in summaries.values()]
        lines.append(names[label][:width].ljust(width) + "".join(map(_row, figures)))
    overall = [summary["overall"] for summary in summaries.values()]
    lines += [rule, "all classes".ljust(width) + "".join(map(_row, overall))]
    return "\n".join(lines)


def _row(figures: Mapping[str, Mapping[str, float]]) -> str:
    dice, hd95 = figures.get("dice", {}), figures.get("hd95", {})
    cells = _number(dice.get("mean"), 8, 2, 100), _number(dice.get("sd"), 4, 1, 100)
    counts = f"{dice.get('n', 0):3d} {dice.get('n_excluded', 0):5d}"
    return f" | {cells[0]}  {cells[1]}  {_number(hd95.get('mean'), 10, 2)}  {counts}"


def _number(value: float | None, width: int, digits: int, scale: float = 1) -> str:
    if value is None or math.isnan(value):
        return "-".rjust(width)
    return f"{value * scale:{width}.{digits}f}"


def write_metrics_csv(
    path: str | os.PathLike,
    cases: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]],
    class_names: Mapping[int, str],
) -> None:
    """Writes one row per case and class: case, label, class, then the measures.

    cases: policy -> case -> what `metrics.evaluate` returned. Columns of "strict" bear the measures' names,
    those of other policies have the policy in front (`samed_dice`). Undefined values are written as nan.
    """
    merged: dict[tuple[str, int], dict[str, float]] = {}
    columns: dict[str, None] = {}
    for policy, of_policy in cases.items():
        prefix = "" if policy == "strict" else f"{policy}_"
        for case, per_label in of_policy.items():
            for label, values in per_label.items():
                named = {prefix + name: value for name, value in values.items()}
                merged.setdefault((case, label), {}).update(named)
                columns.update(dict.fromkeys(named))
    with whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "label", "class", *columns])
        for (case, label), values in merged.items():
            numbers = [f"{values.get(name, math.nan):.10g}" for name in columns]
            writer.writerow([case, label, class_names.get(label, f"class {label}"), *numbers])


def write_summary_json(
    path: str | os.PathLike,
    summaries: Mapping[str, Mapping],
    class_names: Mapping[int, str],
    about: Mapping[str, object] | None = None,
) -> None:
    """Writes {"about", "policies": {policy: {"n_cases", "classes": {name: ...}, "overall"}}} as JSON.

    summaries: policy -> what `metrics.summarise` returned. about: where the figures come from (adapter,
    data, version), whatever JSON can hold. Each class also gets its "label". Undefined values become null.
    """
    policies = {policy: {**summary, "classes": {}} for policy, summary in summaries.items()}
    for policy, summary in summaries.items():
        for label, figures in summary["classes"].items():
            name = class_names.get(label, f"class {label}")
            policies[policy]["classes"][name] = {"label": label, **figures}
    content = _without_nan({"about": about or {}, "policies": policies})
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def overlay(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray | None = None,
    class_names: Mapping[int, str] | None = None,
    path: str | os.PathLike | None = None,
    flip_ud: bool = False,
    flip_lr: bool = False,
    aspect: float = 1.0,
) -> np.ndarray:
    """Draws one slice with the reference as outlines and the prediction as fills, and a legend.

    image: (H, W), 0..1. truth, prediction: (H, W) label maps; either may be None. Returns the picture as
    uint8 (rows, columns, 3) and writes it as PNG where `path` is given. flip_ud, flip_lr: see
    `samlora.data.grid.Case.display`. aspect: row spacing over column spacing.
    Raises InputError for shapes that differ.
    """
    sheet = [None if array is None else np.asarray(array)[None] for array in (image, truth, prediction)]
    figure = _panels(*sheet, [0], class_names, 1, (flip_ud, flip_lr), aspect, titles=False)
    return _render(figure, path)


def contact_sheet(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray | None,
    path: str | os.PathLike | None,
    class_names: Mapping[int, str] | None = None,
    columns: int = COLUMNS,
    rows: int = SHOWN // COLUMNS,
    flip_ud: bool = False,
    flip_lr: bool = False,
    aspect: float = 1.0,
) -> np.ndarray:
    """Draws the most informative slices of a volume, `columns` x `rows` of them, as `overlay` draws one.

    image: (D, H, W), 0..1. truth, prediction: (D, H, W) label maps; either may be None. The slices are
    spread over the labelled range; of each part, the one where the classes fill most of their largest
    cross-section. Returns and writes the picture as `overlay` does. Raises InputError for shapes that differ.
    """
    shown = informative_slices(truth if truth is not None else prediction, columns * rows, len(image))
    figure = _panels(image, truth, prediction, shown, class_names, columns, (flip_ud, flip_lr), aspect)
    return _render(figure, path)


def informative_slices(labels: np.ndarray | None, count: int, depth: int) -> list[int]:
    """At most `count` slice indices of a (D, H, W) label map that show its classes best, in order.

    Without labels, or where nothing is labelled: evenly spread over `depth` slices.
    """
    areas = np.zeros((depth, 0))
    if labels is not None and np.any(labels):
        present = [label for label in np.unique(labels) if label > 0]
        areas = np.stack([np.count_nonzero(labels == label, axis=(1, 2)) for label in present], axis=1)
        areas = areas / areas.max(axis=0)
    score = areas.sum(axis=1)
    candidates = np.flatnonzero(score) if score.any() else np.arange(depth)
    parts = np.array_split(candidates, min(count, len(candidates)))
    if not score.any():
        return [int(part[len(part) // 2]) for part in parts]
    return [int(part[score[part].argmax()]) for part in parts]


def _panels(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray | None,
    shown: Sequence[int],
    class_names: Mapping[int, str] | None,
    columns: int,
    flips: tuple[bool, bool],
    aspect: float,
    titles: bool = True,
) -> "Figure":
    """A figure with one panel per slice in `shown` and a legend of the classes that occur in them."""
    from matplotlib.figure import Figure

    image = np.asarray(image)
    for name, labels in (("reference", truth), ("prediction", prediction)):
        if labels is not None and np.shape(labels) != image.shape:
            raise InputError(f"{name} has shape {np.shape(labels)}, the image {image.shape}; both must agree")
    order = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    # Inches at 100 dots each: panels keep the slice's proportions, a small slice is enlarged to be seen.
    height, width = image.shape[1] * aspect, image.shape[2]
    side = 4.6 if len(shown) == 1 else 2.9
    panel_width, panel_height = side * min(1, width / height), side * min(1, height / width)
    gap, head, foot = 0.06, 0.24 if titles else 0.06, 0.12
    total_width = max(columns * (panel_width + gap) + gap, 4.2)
    drawn = [np.unique(np.asarray(labels)[shown]) for labels in (truth, prediction) if labels is not None]
    present = [int(label) for label in np.unique(np.concatenate([[0], *drawn])) if label > 0]
    entries = _legend_entries(present, class_names or {}, truth is not None, prediction is not None)
    longest = max([len(entry.get_label()) for entry in entries], default=1)
    legend_columns = max(1, min(len(entries), int(total_width / (0.5 + 0.085 * longest))))
    legend_height = 0.22 * math.ceil(len(entries) / legend_columns) + foot if entries else 0
    total_height = rows * (panel_height + head) + legend_height + gap
    figure = Figure(figsize=(total_width, total_height), dpi=100, facecolor="white")
    left = (total_width - columns * (panel_width + gap) - gap) / 2 + gap
    for place, z in enumerate(shown):
        row, column = divmod(place, columns)
        x = left + column * (panel_width + gap)
        y = total_height - (row + 1) * (panel_height + head)
        box = (x / total_width, y / total_height, panel_width / total_width, panel_height / total_height)
        axes = figure.add_axes(box)
        layers = [None if labels is None else np.asarray(labels)[z][order] for labels in (truth, prediction)]
        _draw_slice(axes, image[z][order], *layers, aspect)
        if titles:
            axes.set_title(f"slice {z}", fontsize=8, color=_MUTED, pad=3)
    if entries:
        figure.legend(
            handles=entries, loc="lower center", ncols=legend_columns, frameon=False, fontsize=8.5,
            labelcolor=_INK, handlelength=1.3, handleheight=1.0, columnspacing=1.4, borderaxespad=0.3,
        )  # fmt: skip
    return figure


def _draw_slice(
    axes: "Axes", image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray | None, aspect: float
) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="bilinear")
    axes.set_axis_off()
    if prediction is not None:
        colours = np.zeros((*prediction.shape, 4))
        for label in np.unique(prediction[prediction > 0]):
            colours[prediction == label] = (*class_colour(int(label)), _FILL_OPACITY)
        axes.imshow(colours, aspect=aspect, interpolation="nearest")
    if truth is not None:
        from matplotlib.patheffects import withStroke

        # Padded by one, so that outlines close where a structure leaves the picture.
        x, y = (np.arange(-1, size + 1) for size in image.shape[::-1])
        for label in np.unique(truth[truth > 0]):
            mask, colour = np.pad(truth == label, 1), class_colour(int(label))
            lines = axes.contour(x, y, mask, levels=[0.5], colors=[colour], linewidths=1.2)
            lines.set_path_effects([withStroke(linewidth=2.2, foreground=(0, 0, 0, 0.55))])
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)


def _legend_entries(
    labels: Sequence[int], class_names: Mapping[int, str], with_truth: bool, with_prediction: bool
) -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries = [Patch(facecolor=class_colour(label), label=class_names.get(label, f"class {label}")) for label in labels]
    if labels and with_truth:
        entries.append(Line2D([], [], color=_INK, linewidth=1.4, label="line: reference"))
    if labels and with_prediction:
        entries.append(Patch(facecolor=_MUTED, alpha=_FILL_OPACITY, label="fill: prediction"))
    return entries


def _render(figure: "Figure", path: str | os.PathLike | None) -> np.ndarray:
    """Draws a figure; returns its pixels and writes just these as PNG where a path is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.image import imsave

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    if path is not None:
        with whole(path) as part:
            imsave(part, pixels, format="png", dpi=figure.dpi)
    return pixels


def curves(metrics_csv: str | os.PathLike, png: str | os.PathLike) -> None:
    """Draws a run's metrics.csv: loss (raw and smoothed), learning rate and validation Dice over the steps.

    metrics_csv: columns step, epoch, lr, loss, its parts loss_*, val_dice; blanks where not measured. The
    loss axis is logarithmic where the smoothed loss spans more than a factor of ten. Writes a PNG; raises
    MissingFileError or InputError where the file is absent, not such a table, or without a row.
    """
    from matplotlib.figure import Figure

    columns = _read_columns(Path(metrics_csv))
    step = columns["step"]
    figure = Figure(figsize=(11, 3.4), dpi=110, facecolor="white", layout="constrained")
    losses, rate, dice = figure.subplots(1, 3, width_ratios=(1.5, 1, 1.2))

    lowest, highest = math.inf, 0.0
    parts = [name for name in columns if name.startswith("loss")]
    for name, index in zip(parts, (4, 0, 2, 6)):
        title = _LOSSES.get(name, name)
        x, y = _measured(step, columns.get(name))
        if not y.size:
            continue
        smooth = _smoothed(y)
        lowest, highest = min(lowest, smooth.min()), max(highest, smooth.max())
        losses.plot(x, y, color=PALETTE[index], alpha=0.22, linewidth=0.8)
        losses.plot(x, smooth, color=PALETTE[index], linewidth=1.8, label=title)
    if 0 < lowest < highest / 10:
        losses.set_yscale("log")
    if losses.lines:
        losses.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    _styled(losses, "training loss", step)

    rate.plot(*_measured(step, columns.get("lr")), color=PALETTE[5], linewidth=1.8)
    rate.yaxis.set_major_formatter("{x:g}")
    rate.set_ylim(bottom=0)
    _styled(rate, "learning rate", step)

    x, y = _measured(step, columns.get("val_dice"))
    if y.size:
        best = int(y.argmax())
        dice.plot(x, 100 * y, color=PALETTE[2], linewidth=1.8, marker="o", markersize=3.5)
        dice.plot(x[best], 100 * y[best], marker="o", markersize=8, fillstyle="none", color=PALETTE[5])
        dice.text(0.97, 0.05, f"best {100 * y[best]:.1f} % at step {x[best]:.0f}", transform=dice.transAxes,
                  ha="right", fontsize=8.5, color=_INK)  # fmt: skip
        dice.set_ylim(0, 100)
    else:
        dice.text(0.5, 0.5, "not measured", transform=dice.transAxes, ha="center", color=_MUTED)
        dice.set_yticks([])
    _styled(dice, "validation Dice [%]", step)
    _render(figure, png)


def _styled(axes: "Axes", title: str, step: np.ndarray) -> None:
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.set_xlabel("step", fontsize=8.5, color=_MUTED)
    axes.tick_params(labelsize=8, colors=_MUTED)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    if step.min() < step.max():
        axes.set_xlim(step.min(), step.max() + 0.02 * (step.max() - step.min()))


def _measured(step: np.ndarray, values: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if values is None:
        return step[:0], step[:0]
    there = np.isfinite(values)
    return step[there], values[there]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """An exponential mean over about a fiftieth of the run, without the bias of its start."""
    keep = 1 - 1 / max(1, len(values) / 50)
    smooth, mean, weight = np.empty(len(values)), 0.0, 0.0
    for index, value in enumerate(values):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        smooth[index] = mean / weight
    return smooth


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; the folder of a training run holds a metrics.csv")
    try:
        rows = [row for row in csv.DictReader(read_text(path).splitlines()) if row.get("step")]
        names = rows[0] if rows else ()
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a table of numbers ({error}); give a run's metrics.csv") from None
    if not columns:
        raise InputError(f"{path}: no row with a value in the column step; give a run's metrics.csv")
    return columns
