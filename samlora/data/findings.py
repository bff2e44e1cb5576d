"""What `samlora check` concludes from what it has read: problems, warnings, and the table. Opens no files."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from samlora.data.augment import resize_image
from samlora.data.grid import count_values

_MOST_ROWS, _MOST_NAMES = 200, 5
_EMPTY_SHARE = 0.8  # of the training slices; above it a model learns to say background
_OUTSIDE = 0.5  # how far prepared values may leave 0..1: cubic splines overshoot by a tenth or two


@dataclass
class Look:
    """What one file of slices, one test volume or one source case holds.

    name: for messages. side: "train" or "test". shape: rows, columns and slices as in the file; empty where it cannot
    be read. voxels: label value, or name of a mask -> how many. marks: a digest per slice whose pixels are not all
    equal. trouble: why it cannot be used: the file, and the reason. spacing: with the axes, of source files.
    """

    name: str
    case: str
    side: str
    shape: tuple[int, ...] = ()
    channels: int = 1
    types: str = ""
    low: float = 0.0
    high: float = 0.0
    voxels: dict[int | str, int] = field(default_factory=dict)
    slices: int = 0
    empty: int = 0
    marks: tuple[bytes, ...] = ()
    trouble: list[tuple[str, str]] = field(default_factory=list)
    spacing: str = ""

    @property
    def foreground(self) -> dict[int | str, int]:
        return {value: count for value, count in self.voxels.items() if value != 0 and count}


@dataclass(frozen=True)
class Finding:
    """One thing to know about some files; a problem fails or spoils a result later, a warning need not."""

    problem: bool
    text: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        rank = "problem" if self.problem else "warning"
        return f"{rank}: {few(self.names)}: {self.text}" if self.names else f"{rank}: {self.text}"


@dataclass
class Row:
    """One case in the table; its slices are counted together."""

    case: str
    side: str
    slices: int
    empty: int
    size: str
    types: str
    low: float
    high: float
    voxels: Counter
    channels: int

    @property
    def range(self) -> str:
        return "..".join(f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" for value in (self.low, self.high))


@dataclass
class Report:
    """The result of `check`: a row per case, voxels per class, findings. `str(report)` is what people read."""

    path: Path
    kind: str
    rows: list[Row]
    class_names: dict[int | str, str]
    findings: list[Finding]

    @property
    def failed(self) -> bool:
        """Whether anything will fail or spoil a result."""
        return any(finding.problem for finding in self.findings)

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.problem]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.problem]

    def __str__(self) -> str:
        head = ("case", "side", "slices", "empty", "size", "type", "values", "labels")
        cells = [
            (r.case, r.side, str(r.slices), str(r.empty), r.size, r.types, r.range, runs(r.voxels))
            for r in self.rows[:_MOST_ROWS]
        ]
        lines = [f"{self.path}: {self.kind}", "", *columns([head, *cells], right=(2, 3))]
        if len(self.rows) > _MOST_ROWS:
            lines.append(f"... and {len(self.rows) - _MOST_ROWS} more cases")
        sides = sorted({row.side for row in self.rows}, reverse=True)
        head = ("class", "name", *(f"{what} ({side})" for side in sides for what in ("cases", "voxels")))
        cells = []
        for value, name in self.class_names.items():
            counts = [[row.voxels[value] for row in self.rows if row.side == side] for side in sides]
            numbers = [str(n) for side in counts for n in (np.count_nonzero(side), sum(side))]
            cells.append((str(value), name, *numbers))
        if cells:
            lines += ["", *columns([head, *cells], right=range(2, len(head)))]
        lines += ["", *map(str, self.problems), *map(str, self.warnings)]
        counts = f"{_number(self.problems, 'problem')}, {_number(self.warnings, 'warning')}"
        return "\n".join([*lines, f"{self.path}: {_number(self.rows, 'case')}, {counts}"])


def tabulate(looks: Sequence[Look]) -> list[Row]:
    """A row per case and side, training first, from the files that could be read."""
    rows = []
    readable = sorted((x for x in looks if x.shape), key=lambda x: (x.side != "train", x.case))
    for (_, case), group in groupby(readable, key=lambda x: (x.side != "train", x.case)):
        group = list(group)
        voxels = sum((Counter(x.voxels) for x in group), Counter())
        sizes = sorted({x.shape for x in group})
        size = " x ".join(map(str, sizes[0])) + (f" and {len(sizes) - 1} more" if len(sizes) > 1 else "")
        spacing = next((f", {x.spacing}" for x in group if x.spacing), "")
        rows.append(
            Row(
                case,
                group[0].side,
                sum(x.slices for x in group),
                sum(x.empty for x in group),
                size + spacing,
                " ".join(sorted({x.types for x in group})),
                min(x.low for x in group),
                max(x.high for x in group),
                voxels,
                group[0].channels,
            )
        )
    return rows


def judge(
    looks: Sequence[Look], rows: Sequence[Row], patient_of: Callable[[str], str], labelled: bool
) -> list[Finding]:
    """What holds for prepared data and sources alike. labelled: labels have been read."""
    train, test = ([r for r in rows if r.side == side] for side in ("train", "test"))
    return [
        *grouped([trouble for look in looks for trouble in look.trouble], problem=True),
        *_split(looks, patient_of),
        *(_foreground(train, test) if labelled else ()),
        *_values(rows),
        *_patients(train, patient_of),
    ]


def classes_without_cases(rows: Sequence[Row], names: dict[int, str]) -> list[Finding]:
    """Warnings about classes that no training case shows."""
    train, found = [r for r in rows if r.side == "train"], []
    for value, name in names.items():
        if train and not any(row.voxels[value] for row in train):
            tested = [row.case for row in rows if row.voxels[value]]
            where = f", though in {few(tested)}" if tested else ""
            found.append(Finding(False, f"class {value} {name} occurs in no training case{where}"))
    return found


def grouped(texts: Sequence[tuple[str, str]], problem: bool) -> list[Finding]:
    """One finding for all (name, text) of the same text, whatever numbers and paths are in it; the longest is shown."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, text in texts:
        key = re.sub(r"\S*[/\\]\S*", "#", text)
        groups[re.sub(r"(?:-?\d+(?:\.\d+)?(?:, | )?)+", "#", key)].append((name, text))
    found = []
    for group in groups.values():
        different = " (numbers differ from file to file)" if len({text for _, text in group}) > 1 else ""
        longest = max((text for _, text in group), key=len)
        found.append(Finding(problem, longest + different, tuple(name for name, _ in group)))
    return found


def mixed_channels(looks: Sequence[Look], alike: Sequence[int] = ()) -> list[Finding]:
    """A problem where images of one side have other channels than most. alike: numbers that may be mixed."""
    found = []
    for side in ("train", "test"):
        readable = [look for look in looks if look.side == side and look.shape]
        counts = Counter(look.channels for look in readable)
        if len(counts) > 1 and not counts.keys() <= set(alike):
            usual = counts.most_common(1)[0][0]
            odd = tuple(look.name for look in readable if look.channels != usual)
            have = " or ".join(str(n) for n in sorted(counts) if n != usual)
            found.append(Finding(True, f"{have} channels, the others have {usual}; prepare all with one recipe", odd))
    return found


def _split(looks: Sequence[Look], patient_of: Callable[[str], str]) -> list[Finding]:
    """The same patient, by name or by the pixels, where it must not be."""
    found = []
    cases = {side: sorted({x.case for x in looks if x.side == side}) for side in ("train", "test")}
    trained = {patient_of(case): case for case in cases["train"]}
    both = tuple(f"{case} and {trained[p]}" for case in cases["test"] if (p := patient_of(case)) in trained)
    if both:
        found.append(Finding(True, "the same patient is tested on and trained on; move one of them", both))
    shown: dict[bytes, dict[tuple[str, str], None]] = defaultdict(dict)  # which cases show a slice, in order
    for look in looks:
        for mark in look.marks:
            shown[mark].setdefault((look.side, look.case))
    shared: dict[tuple[tuple[str, str], tuple[str, str]], int] = Counter()
    for owners in shown.values():
        first, *others = sorted(owners, key=lambda owner: owner[0] != "train")
        for other in others:
            shared[other, first] += 1
    slices = Counter()
    for look in looks:
        slices[look.side, look.case] += look.slices
    leaks, doubles = [], []
    for (one, other), count in sorted(shared.items()):
        text = f"{one[1]} and {other[1]}" + (f" ({count} of {slices[one]} slices)" if slices[one] > 1 else "")
        (doubles if one[0] == other[0] else leaks).append(text)
    if leaks:
        text = "the same images, pixel for pixel, are tested on and trained on; remove them from one side"
        found.append(Finding(True, text, tuple(leaks)))
    if doubles:
        found.append(Finding(False, "the same images, pixel for pixel, under two names; keep one", tuple(doubles)))
    return found


def _foreground(train: Sequence[Row], test: Sequence[Row]) -> list[Finding]:
    found = []
    train, test = ([row for row in rows if row.voxels] for rows in (train, test))  # those with a label
    if train and not any(_has_foreground(row) for row in train):
        text = "no training case shows any class, so there is nothing to learn; are the labels those of these images?"
        return [Finding(True, text)]
    empty = tuple(row.case for row in (*train, *test) if not _has_foreground(row))
    if empty:
        found.append(Finding(False, "shows no class at all; is its label the right one?", empty))
    slices, without = sum(row.slices for row in train), sum(row.empty for row in train)
    if slices and without / slices > _EMPTY_SHARE:
        text = f"{100 * without / slices:.0f} % of the training slices show no class; set keep in the recipe to "
        found.append(Finding(False, text + "foreground, or to a share such as 0.1"))
    return found


def _values(rows: Sequence[Row]) -> list[Finding]:
    found = []
    flat = tuple(row.case for row in rows if row.low == row.high)
    if flat:
        found.append(Finding(False, "every pixel of the image has the same value", flat))
    widths = {row.case: row.high - row.low for row in rows if row.high > row.low}
    usual = float(np.median([*widths.values()])) if widths else 0.0
    odd = tuple(f"{r.case} ({r.range})" for r in rows if widths.get(r.case) and _far(widths[r.case], usual))
    if odd:
        found.append(Finding(False, f"a range of values far from that of the others (about {usual:.3g} wide)", odd))
    return found


def _patients(train: Sequence[Row], patient_of: Callable[[str], str]) -> list[Finding]:
    if len({patient_of(row.case) for row in train}) == 1:
        return [Finding(False, "there is one training patient only, so none can be kept apart for validation")]
    return []


def outside_unit_range(rows: Sequence[Row]) -> list[Finding]:
    """Warnings about prepared values that a model which expects 0..1 does not know."""
    far = tuple(f"{r.case} ({r.range})" for r in rows if r.low < -_OUTSIDE or r.high > 1 + _OUTSIDE)
    text = "values far outside 0..1, which the models expect; prepare the images again with a window or percentiles"
    return [Finding(False, text, far)] if far else []


def measure(look: Look, image: np.ndarray, label: np.ndarray | None) -> None:
    """Fills in what the slices `image` (D, H, W[, C]) and `label` (D, H, W) hold."""
    look.low, look.high = float(image.min()), float(image.max())
    look.slices = len(image)
    if label is not None:
        look.voxels = count_values(label)
        look.empty = int((~label.any(axis=(1, 2))).sum())


def slice_marks(image: np.ndarray, size: int | None) -> tuple[bytes, ...]:
    """A digest for each slice of (D, H, W[, C]) with more than one value, so that equal slices are found.

    size: of the slice as `prepare` resizes it for training.
    """
    marks = []
    for layer in image:
        if layer.min() == layer.max():
            continue  # air looks the same in every patient
        if size is not None and layer.shape[:2] != (size, size):
            layer = resize_image(np.moveaxis(layer, -1, 0) if layer.ndim == 3 else layer, (size, size))
            layer = np.moveaxis(layer, 0, -1) if layer.ndim == 3 else layer
        digest = hashlib.blake2b(repr(layer.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(layer, np.float32))  # the same values count, however they are stored
        marks.append(digest.digest())
    return tuple(marks)


def without_path(error: Exception | str, path: str | os.PathLike) -> str:
    """The error's message without the file at its beginning, so that equal troubles are equal texts."""
    return str(error).removeprefix(f"{path}: ")


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" (and {len(names) - _MOST_NAMES} more)" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def runs(values: Iterable[int | str], most: int = 6) -> str:
    """Label values in few characters: 0-4 6 8."""
    values = set(values)
    words = sorted(value for value in values if isinstance(value, str))
    numbers = sorted(values.difference(words))
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        run = [value for _, value in run]
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    parts += words
    return " ".join(parts[:most]) + (f" ... ({len(numbers) + len(words)})" if len(parts) > most else "")


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Lines with the cells below each other; the columns `right` end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = set(right)
    return [
        "  ".join(c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def _has_foreground(row: Row) -> bool:
    return any(count for value, count in row.voxels.items() if value != 0)


def _far(width: float, usual: float) -> bool:
    return not usual / 10 <= width <= usual * 10


def _number(things: Sequence, name: str) -> str:
    return f"{len(things) or 'no'} {name}{'s' * (len(things) != 1)}"
