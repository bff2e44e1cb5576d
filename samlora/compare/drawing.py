"""Lines and points as inline SVG, in the colours of the page: no script, no network."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 620, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 12, 46  # pixels around the axes
_LETTER = 6.3  # about a letter's width in a label


@dataclass(frozen=True)
class Line:
    """Points (x, y, deviation) of one system: its name, its colour as CSS, and whether it is marked as hollow, dashed.

    A deviation of 0 or NaN draws no bar.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float, float]]
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """What stands at an axis. log: powers of ten are equally far apart. scale: what values are multiplied with.

    whole: no tick between whole numbers.
    """

    title: str
    log: bool = False
    scale: float = 1.0
    whole: bool = False


def plot(title: str, hint: str, lines: Sequence[Line], x: Axis, y: Axis, *, joined: bool, marks: bool) -> str:
    """An HTML figure. joined: points of a line are joined; marks: every point is drawn, with its deviation as a bar.

    A single point is drawn in any case. Names are escaped.
    """
    across = _Scale([p[0] for line in lines for p in line.points], x, (_LEFT, _WIDTH - _RIGHT), marks)
    spread = [p[1] + sign * _bar(p) for line in lines for p in line.points for sign in (-1, 1)]
    up = _Scale(spread, y, (_HEIGHT - _BOTTOM, _TOP), marks)
    parts = []
    for value in across.ticks:
        at = f"{across(value):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        told = _shown(value * x.scale)
        parts.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{told}</text>')
    for value in up.ticks:
        at = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_shown(value * y.scale)}</text>')
    for line in lines:
        places = [(across(a), up(b)) for a, b, _ in line.points]
        if joined and len(places) > 1:
            dash = ' stroke-dasharray="6 4"' if line.hollow else ""
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2.2"{dash}>'
                f"<title>{escape(line.name)}</title></polyline>"
            )
        if marks or len(places) == 1:
            parts += [_mark(line, point, place, up, x, y) for point, place in zip(line.points, places)]
    if marks and not joined:
        parts += _labels(lines, across, up)
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y.title)}</text>'
    )
    swatches = [f"{'border:2px solid ' if line.hollow else 'background:'}{line.colour}" for line in lines]
    key = "".join(f'<li><i style="{style}"></i>{escape(line.name)}</li>' for style, line in zip(swatches, lines))
    return (
        f'<figure class="plot"><figcaption>{escape(title)} <small>{escape(hint)}</small></figcaption>'
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}'
        f'</svg><ul class="key">{key}</ul></figure>'
    )


class _Scale:
    """Values to pixels along one axis, with round ticks."""

    def __init__(self, values: Sequence[float], axis: Axis, pixels: tuple[float, float], margin: bool):
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)] or [1.0]
        self._of: Callable[[float], float] = math.log10 if axis.log else float
        low, high = self._of(min(finite)), self._of(max(finite))
        room = (high - low) * 0.08 if margin else 0.0
        if high - low < 1e-9:
            room = 0.15 if axis.log else max(abs(high), 1e-3) * 0.1
        self._low, self._high, self._pixels = low - room, high + room, pixels
        ends = (10**self._low, 10**self._high) if axis.log else (self._low, self._high)
        powers = self._log_ticks() if axis.log else []
        self.ticks = powers if len(powers) > 2 else _even_ticks(*ends, axis)

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._pixels[0] + min(max(share, 0.0), 1.0) * (self._pixels[1] - self._pixels[0])

    def _log_ticks(self) -> list[float]:
        steps = (1, 2, 5) if self._high - self._low < 2.5 else (1,)
        found = [n * 10.0**power for power in range(math.floor(self._low), math.ceil(self._high) + 1) for n in steps]
        return [v for v in found if self._low <= math.log10(v) <= self._high]


def _even_ticks(low: float, high: float, axis: Axis) -> list[float]:
    """Four to seven round numbers, as they are shown, from low to high."""
    rough = (high - low) / 6 * axis.scale
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * 0.999)
    step = (max(1, math.ceil(step)) if axis.whole else step) / axis.scale
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _bar(point: tuple[float, float, float]) -> float:
    return 0.0 if math.isnan(point[2]) else point[2]


def _mark(
    line: Line, point: tuple[float, float, float], place: tuple[float, float], up: _Scale, x: Axis, y: Axis
) -> str:
    told = f"{line.name}: {_shown(point[1] * y.scale)}"
    bar = ""
    if _bar(point):
        told += f" ± {_shown(point[2] * y.scale)}"
        top, bottom = up(point[1] + point[2]), up(point[1] - point[2])
        bar = (
            f'<line x1="{place[0]:.1f}" x2="{place[0]:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{line.colour}" '
            f'stroke-width="1.5"/>'
        )
    told += f" at {_shown(point[0] * x.scale)} {x.title}"
    fill = f'fill="var(--paper)" style="stroke:{line.colour};stroke-width:2.5;stroke-opacity:1"'
    fill = fill if line.hollow else f'fill="{line.colour}"'
    circle = f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="5" {fill}><title>{escape(told)}</title></circle>'
    return bar + circle


def _labels(lines: Sequence[Line], across: _Scale, up: _Scale) -> list[str]:
    """The names beside the points: moved down where they would lie on one another, to the left at the right edge."""
    taken: list[tuple[float, float, float]] = []
    parts = []
    places = [(across(a), up(b), line.name) for line in lines for a, b, _ in line.points]
    for left, top, name in sorted(places, key=lambda place: place[1]):
        width = _LETTER * len(name)
        start = left + 9 if left + 9 + width < _WIDTH else left - 9 - width
        y = top + 4
        while any(abs(y - other) < 13 and start < end and begin < start + width for begin, end, other in taken):
            y += 13
        taken.append((start, start + width, y))
        parts.append(f'<text class="label" x="{start:.1f}" y="{y:.1f}">{escape(name)}</text>')
    return parts


def _shown(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
