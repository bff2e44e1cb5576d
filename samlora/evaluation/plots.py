"""Box plots as inline SVG: one strip per class, every case a point that says its name."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_ROW = 30  # pixels of a class's strip
_BOX = 13
_RADIUS = 3.2
_ENOUGH = 5  # fewer points are shown without a box: quartiles of four values say nothing


@dataclass(frozen=True)
class Strip:
    """The values of one class: its name, its colour as CSS, and (case, value) where the value is defined."""

    name: str
    colour: str
    points: Sequence[tuple[str, float]]


def box_plot(title: str, strips: Sequence[Strip], scale: float, unit: str, fraction: bool) -> str:
    """A horizontal box plot as an HTML figure: box from quartile to quartile, whiskers after Tukey, all points.

    scale: what values are multiplied with for display (100 for per cent). fraction: the axis ends at 1 and starts at
    the round number below the values, else it starts at 0. Points far beyond all whiskers are drawn at the end of the
    axis as arrows, so that one missed organ does not press all boxes against the left. Positions are per cent of the
    width, so the plot needs no script to fit its column. Names are escaped.
    """
    values = [np.array([value for _, value in strip.points]) for strip in strips]
    low, high = _limits(values, fraction)
    ticks = _ticks(low, high)

    def place(value: float) -> str:
        return f"{100 * (min(value, high) - low) / (high - low):.2f}%"

    height = _ROW * len(strips)
    parts = [f'<line class="grid" x1="{place(t)}" x2="{place(t)}" y1="0" y2="{height}"/>' for t in ticks]
    for row, (strip, of_class) in enumerate(zip(strips, values)):
        middle = _ROW * row + _ROW / 2
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{_ROW * (row + 1)}" y2="{_ROW * (row + 1)}"/>')
        if len(of_class) >= _ENOUGH:
            parts.append(_box(of_class, middle, place, strip.colour))
        for number, (case, value) in enumerate(strip.points):
            y = middle + _jitter(number) * (_ROW / 2 - 6)
            told = f"<title>{escape(case)}: {_shown(value * scale)} {escape(unit)}</title>"
            if value > high:
                arrow = f'<path d="M-7,-4 L0,0 L-7,4 Z" fill="{strip.colour}">{told}</path>'
                parts.append(f'<svg class="beyond" x="100%" y="{y:.1f}">{arrow}</svg>')
            else:
                parts.append(
                    f'<circle cx="{place(value)}" cy="{y:.1f}" r="{_RADIUS}" fill="{strip.colour}">{told}</circle>'
                )
    numbers = "".join(f'<span style="left:{place(t)}">{_shown(t * scale)}</span>' for t in ticks)
    names = "".join(
        f'<li><i style="background:{s.colour}"></i><span title="{escape(s.name)}">{escape(s.name)}</span></li>'
        for s in strips
    )
    beyond = sum(int(np.count_nonzero(v > high)) for v in values)
    note = f"; {beyond} beyond {_shown(high * scale)} {escape(unit)} (arrows)" if beyond else ""
    caption = f"{escape(title)} <small>[{escape(unit)}] one point per case{note}</small>"
    return (
        f'<figure class="plot"><figcaption>{caption}</figcaption><div class="strips"><ul>{names}</ul>'
        f'<div class="area"><svg role="img" aria-label="{escape(title)} per class" height="{height}">'
        f"{''.join(parts)}</svg>"
        f'<div class="axis">{numbers}</div></div></div></figure>'
    )


def _box(values: np.ndarray, middle: float, place: Callable[[float], str], colour: str) -> str:
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75])
    start, end = whiskers(values)
    top = middle - _BOX / 2
    width = float(place(third)[:-1]) - float(place(first)[:-1])
    return (
        f'<line class="whisker" x1="{place(start)}" x2="{place(end)}" y1="{middle}" y2="{middle}"/>'
        f'<rect class="box" x="{place(first)}" y="{top}" width="{max(width, 0.15):.2f}%" height="{_BOX}" '
        f'style="--c:{colour}"/><line class="median" x1="{place(median)}" x2="{place(median)}" y1="{top}" '
        f'y2="{top + _BOX}"/>'
    )


def whiskers(values: np.ndarray) -> tuple[float, float]:
    """The outermost values within 1.5 interquartile ranges of the box (Tukey, Exploratory Data Analysis, 1977)."""
    first, third = np.quantile(values, [0.25, 0.75])
    reach = 1.5 * (third - first)
    near = values[(values >= first - reach) & (values <= third + reach)]
    return float(near.min()), float(near.max())


def _limits(values: Sequence[np.ndarray], fraction: bool) -> tuple[float, float]:
    every = np.concatenate([*values, [1.0 if fraction else 0.0]])
    if fraction:
        return max((low for low in (0.0, 0.5, 0.8, 0.9) if low <= every.min()), default=0.0), 1.0
    most = max([whiskers(v)[1] for v in values if v.size], default=0.0)
    high = float(every.max()) if every.max() <= 3 * most or most == 0 else 1.2 * most
    return 0.0, high * 1.02 or 1.0


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers from low to high."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * 0.999)
    return [low + n * step for n in range(int((high - low) / step * 1.0001) + 1)]


def _jitter(number: int) -> float:
    """-1..1, spread evenly and always the same, so that equal values do not hide each other."""
    return 2 * ((number * 0.618033988749895 + 0.5) % 1) - 1


def _shown(value: float) -> str:
    return f"{value:.4g}"
