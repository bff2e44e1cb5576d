"""Boxes around objects, read from CSV and JSON files or taken from reference labels.

Boxes are in the frame of a `Case`: x is a column and y a row of a slice as the recipe turned and
cropped it, z the index of the slice, all from 0. Whole numbers are the middles of pixels, so that
x1 and y1 are the last column and row of the object, as in `samlora.data.prompts.tight_box`.
"""

import csv
import dataclasses
import difflib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samlora.data.folders import (
    Layout,
    Masks,
    Pair,
    few,
    folder_or_file,
    is_dicom_folder,
    label_entries,
    masks_in,
    match,
)
from samlora.data.grid import Case, Volume, case_to_volume
from samlora.data.label_tables import numbers_of
from samlora.data.layouts import with_names
from samlora.data.prompts import jittered_box
from samlora.data.recipe import Recipe
from samlora.data.sources import (
    ignored_values,
    on_grid,
    read_label,
    read_label_map,
)
from samlora.data.structures import folder_names, names_for_all
from samlora.data.volume import stem
from samlora.errors import InputError, MissingFileError
from samlora.files import identity, read_text, same_name

CORNERS = ("x0", "y0", "x1", "y1")
KEYS = ("image", "slice", "z0", "z1", *CORNERS, "label")
MOST_LABELS = 255  # numbers of a label map
_DEFAULT_LABEL = "object"


@dataclasses.dataclass(frozen=True)
class Box:
    """A box on the slices `first` to `last`, both included.

    first, last: None, both, for the only slice of a picture. corners: x0, y0, x1, y1. label: 1 to
    255. where: its place in a file, for messages.
    """

    first: int | None
    last: int | None
    corners: tuple[float, float, float, float]
    label: int
    where: str = ""


class BoxFile:
    """The boxes of a CSV or JSON file, by input.

    Attributes:
        names: label number -> name, of all inputs.
        origin: where the boxes come from, for people.
    """

    def __init__(self, path: Path, pairs: Sequence[Pair]):
        """Reads the boxes of a file, see `read_rows`, for the inputs `pairs`.

        Raises:
            MissingFileError, InputError: naming the file and the line, for what cannot be used.
        """
        rows = read_rows(path)
        numbers = label_numbers([row["label"] for _, row in rows])
        self.names = {number: _label_name(label) for label, number in numbers.items()}
        self.origin = str(path)
        self._boxes: dict[str, list[Box]] = {}
        for where, row in rows:
            first, last = _slices(row, where)
            corners = tuple(_number(row, key, where) for key in CORNERS)
            box = Box(first, last, corners, numbers[row["label"]], where)
            self._boxes.setdefault(_input_name(row, where, pairs), []).append(box)

    def __contains__(self, pair: Pair) -> bool:
        return pair.name in self._boxes

    def stamp(self, pair: Pair) -> list:
        """What the labels of an input are made of, as plain values: its boxes, and all labels."""
        boxes = self._boxes[pair.name]
        values = [[box.first, box.last, list(box.corners), box.label] for box in boxes]
        return [values, list(self.names.values())]

    def boxes(self, pair: Pair, case: Case) -> tuple[list[Box], dict[int, str]]:
        """The boxes of an input, on slices that it has, and the names of the labels.

        Raises:
            InputError: naming the file and the line, where a box lies outside of the case.
        """
        return [_within(box, case) for box in self._boxes[pair.name]], self.names


class ReferenceBoxes:
    """Tight boxes around what reference labels show, by input.

    What a label file calls its own values holds for that file, so that a structure has the same
    number in all results however the files number it.

    Attributes:
        origin: where the boxes come from, for people.
    """

    def __init__(self, source: Path, pairs: Sequence[Pair], jitter: int, seed: int, largest: bool):
        """Finds the reference labels of the inputs `pairs`, by the names of their files.

        Args:
            source: a label map, or a folder of label maps, or of folders of masks.
            jitter: each side is moved outwards by 0 to so many pixels of the slice.
            seed: of the jitter, which depends on seed, input, slice and label alone.
            largest: one box for each label, on the slice that shows most of it, instead of one on
                every slice that shows the label.

        Raises:
            MissingFileError, InputError: where there is nothing, or nothing that matches; where
                files number structures differently, and one among them names none.
        """
        self.origin = f"{source}, jitter {jitter} px" if jitter else str(source)
        self._labels = _match_labels(source, pairs)
        self._jitter = jitter
        self._seed = seed
        self._largest = largest
        masks = [label for label in self._labels.values() if isinstance(label, dict)]
        self._structures = tuple(sorted({name for of_case in masks for name in of_case}))
        maps = [Pair("", (), label) for label in self._labels.values() if isinstance(label, Path)]
        layout = with_names(Layout("", maps, {}, (), []), source.parent)
        self._folder_names = folder_names(layout)
        self._ignored = layout.ignored
        advice = "put a table of names beside it"
        files = [pair.label for pair in maps]
        self._names = names_for_all(self._folder_names, files, advice)

    def __contains__(self, pair: Pair) -> bool:
        return pair.name in self._labels

    def stamp(self, pair: Pair) -> list:
        """The label files of an input and how boxes are made of them, as plain values."""
        labelled = dataclasses.replace(pair, images=(), label=self._labels[pair.name])
        files = [identity(file) for file in labelled.files]
        names = list(self._structures) or [list(item) for item in self._names.items()]
        return [files, names, self._jitter, self._seed]

    def boxes(self, pair: Pair, case: Case) -> tuple[list[Box], dict[int, str]]:
        """The boxes of an input, and the names of its labels.

        Raises:
            InputError: naming the file, for labels on another grid or that are no labels.
        """
        label = self._labels[pair.name]
        labelled = dataclasses.replace(pair, label=label, names=self._folder_names)
        where = str(folder_or_file(label))
        if isinstance(label, dict):
            stack = self._of_masks(labelled, case)
            names = dict(enumerate(self._structures, start=1))
            values = {number: [number] for number in names}
        else:
            stack, values = self._of_map(labelled, case)
            names = {number: self._names.get(number, _label_name(number)) for number in values}
        found = []
        for number in names:
            masks = np.isin(stack, values[number])
            sizes = masks.sum(axis=(1, 2))
            shown = np.flatnonzero(sizes).tolist()
            if self._largest and shown:
                shown = [int(sizes.argmax())]
            for index in shown:
                key = [self._seed, zlib.crc32(pair.name.encode()), index, number]
                generator = np.random.default_rng(key)
                corners = jittered_box(masks[index], self._jitter, generator)
                found.append(Box(index, index, tuple(corners.tolist()), number, where))
        return found, names

    def _of_masks(self, pair: Pair, case: Case) -> np.ndarray:
        """The masks of a case on its slices, (D, H, W), numbered in the order of their names."""
        values = tuple((name,) for name in self._structures)
        recipe = Recipe("masks", "image", classes=self._structures, label_values=values)
        labels, _ = read_label(pair, _grid_of(case, pair), recipe)
        return _slices_of(labels, case)

    def _of_map(self, pair: Pair, case: Case) -> tuple[np.ndarray, dict[int, list[int]]]:
        """A label map on the slices of a case, (D, H, W), and the values that show each number.

        Structures with a name have the number of that name, other values are numbers themselves.
        """
        labels = on_grid(read_label_map(pair), _grid_of(case, pair))
        numbers = {name: number for number, name in self._names.items()}
        present = np.unique(labels.array[labels.array != 0]).tolist()
        ignored = ignored_values(present, self._ignored)
        shown: dict[int, list[int]] = {}
        for value in present:
            called = (labels.names or {}).get(value, ())
            if called or value not in ignored:
                for number in numbers_of(called, numbers) or {value}:
                    shown.setdefault(number, []).append(value)
        shown = dict(sorted(shown.items()))
        if shown and not (min(shown) > 0 and max(shown) <= MOST_LABELS):
            found = f"{min(shown)}..{max(shown)}"
            allowed = f"0 to {MOST_LABELS} can be used"
            raise InputError(f"{pair.label}: label values {found}; {allowed}")
        return _slices_of(labels, case), shown


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads the boxes of a file as rows.

    CSV: a line with the names of the columns, then a line for each box; separated by commas or
    semicolons. JSON (ending .json): a list of objects. Columns, or keys, are KEYS: `image` may be
    left out with a single input, `slice` (or z0 and z1, the first and the last slice of a 3D box)
    for pictures, and `label`, a name or a number.

    Returns:
        Pairs (where, row): `where` names file and line (JSON: entry) for messages; the row holds
        what is not empty, its label as a name or an int.

    Raises:
        MissingFileError, InputError: naming the file, and the line and value where one is wrong.
    """
    if not path.is_file():
        raise MissingFileError(f"--boxes {path}: no such file; give a CSV or JSON file of boxes")
    text = same_name(read_text(path))
    rows = _json_rows(path, text) if path.suffix.lower() == ".json" else _csv_rows(path, text)
    if not rows:
        raise InputError(f"{path}: holds no boxes; give at least one with {', '.join(CORNERS)}")
    return [(where, _checked_row(row, where)) for where, row in rows]


def label_numbers(labels: Sequence[int | str]) -> dict[int | str, int]:
    """Label -> its number in a label map, by number.

    Numbers stay as they are; names take the smallest free numbers in the order of their first
    occurrence.

    Raises:
        InputError: where there are more labels than numbers.
    """
    different = list(dict.fromkeys(labels))
    if len(different) > MOST_LABELS:
        raise InputError(f"{len(different)} different labels; a label map holds {MOST_LABELS}")
    numbers = {label: label for label in different if isinstance(label, int)}
    free = (number for number in range(1, MOST_LABELS + 1) if number not in different)
    for label in different:
        if isinstance(label, str):
            numbers[label] = next(free)
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def _within(box: Box, case: Case) -> Box:
    """The box, its slices filled in. Raises InputError where it lies outside of the case."""
    depth, height, width = case.image.shape[:3]
    if box.first is None:
        if depth > 1:
            there = f"the image has slices 0 to {depth - 1}"
            raise InputError(f"{box.where}: slice is missing; {there}")
        box = dataclasses.replace(box, first=0, last=0)
    if box.last >= depth:
        raise InputError(f"{box.where}: slice {box.last}: the image has slices 0 to {depth - 1}")
    x0, y0, x1, y1 = box.corners
    if not (0 <= x0 <= x1 < width and 0 <= y0 <= y1 < height):
        given = " ".join(f"{value:g}" for value in box.corners)
        raise InputError(
            f"{box.where}: box {given}: x0 y0 x1 y1 with 0 <= x0 <= x1 <= {width - 1} and "
            f"0 <= y0 <= y1 <= {height - 1} is needed"
        )
    return box


def _grid_of(case: Case, pair: Pair) -> Volume:
    """The grid of a case's file, empty."""
    grid = case_to_volume(case, np.zeros(case.image.shape[:3], np.uint8))
    return dataclasses.replace(grid, path=str(pair.images[0]))


def _slices_of(labels: Volume, case: Case) -> np.ndarray:
    """Labels on the grid of a case's file as slices of the case, (D, H, W)."""
    if case.geometry is None:
        return labels.array.transpose(2, 1, 0)
    stack = Recipe.from_dict(case.recipe).to_slices(labels)
    if case.geometry.box is None:
        return stack
    top, bottom, left, right = case.geometry.box
    return stack[:, top:bottom, left:right]


def _match_labels(source: Path, pairs: Sequence[Pair]) -> dict[str, Path | Masks]:
    """The labels of each input that has some, by its name."""
    flag = f"--boxes_from {source}"
    if not source.exists():
        raise MissingFileError(f"{flag}: no such file or folder; give label maps")
    if not source.is_dir() or is_dicom_folder(source):
        if len(pairs) > 1:
            count = len(pairs)
            raise InputError(f"{flag}: one label map for {count} inputs; give a folder of them")
        return {pairs[0].name: source}
    images = {pair.name: pair.images[0] for pair in pairs}
    found = match(images, label_entries(source), apart=True)
    by_image = {matched.images[0]: matched.label for matched in found.pairs}
    labels = {name: by_image[image] for name, image in images.items() if image in by_image}
    if not labels and len(pairs) == 1 and (masks := masks_in(source)):
        labels = {pairs[0].name: masks}
    if not labels:
        names = few(images)
        raise InputError(f"{flag}: no label map has the name of an input ({names}); rename them")
    return labels


def _json_rows(path: Path, text: str) -> list[tuple[str, dict]]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); correct it") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        keys = ", ".join(CORNERS)
        raise InputError(f"{path}: a list of boxes is needed, each an object with {keys}")
    return [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, start=1)]


def _csv_rows(path: Path, text: str) -> list[tuple[str, dict]]:
    lines = text.splitlines()
    header = lines[0] if lines else ""
    reader = csv.DictReader(lines, delimiter=";" if ";" in header else ",", skipinitialspace=True)
    rows = []
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                columns = len(reader.fieldnames)
                raise InputError(f"{where}: has more values than the {columns} columns of line 1")
            rows.append((where, {key.strip(): value for key, value in row.items()}))
    except csv.Error as error:
        line = reader.line_num
        raise InputError(f"{path}, line {line}: is not CSV ({error}); correct it") from None
    return rows


def _checked_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row without empty values, its label a name or an int; other keys raise InputError."""
    for key in row:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(KEYS)}"
            raise InputError(f"{where}: unknown column {key!r}; {hint}")
    filled = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
    filled = {key: value for key, value in filled.items() if value not in (None, "")}
    filled["label"] = _label(filled.get("label", _DEFAULT_LABEL), where)
    return filled


def _label(value: Any, where: str) -> int | str:
    """A label as an int, or as a name."""
    text = value if isinstance(value, str) else ""
    if text and not text.lstrip("+-").isdecimal():
        return text
    number = int(text) if text else value
    if type(number) is int and 1 <= number <= MOST_LABELS:
        return number
    allowed = f"give a name, or a number from 1 to {MOST_LABELS}"
    raise InputError(f"{where}: label {value!r} is not possible; {allowed}")


def _label_name(label: int | str) -> str:
    return f"label_{label}" if isinstance(label, int) else label


def _slices(row: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """First and last slice of a row; None where it names none."""
    ends = [key for key in ("z0", "z1") if key in row]
    if "slice" in row and ends:
        advice = "give slice for one slice, or z0 and z1 for several"
        raise InputError(f"{where}: has both slice and {ends[0]}; {advice}")
    if len(ends) == 1:
        advice = "give z0 and z1, the first and the last slice"
        raise InputError(f"{where}: has {ends[0]} only; {advice}")
    if not ends:
        index = _whole(row, "slice", where) if "slice" in row else None
        return index, index
    first, last = (_whole(row, key, where) for key in ends)
    if last < first:
        raise InputError(f"{where}: z0 {first} is above z1 {last}; z0 <= z1 is needed")
    return first, last


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    if key not in row:
        raise InputError(f"{where}: {key} is missing; a box needs {', '.join(CORNERS)}")
    value = row[key]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {key} {value!r} is not possible; a number of pixels is needed")
    return number


def _whole(row: Mapping[str, Any], key: str, where: str) -> int:
    number = _number(row, key, where)
    if number < 0 or number != int(number):
        value = row[key]
        advice = "give the index of a slice, from 0"
        raise InputError(f"{where}: {key} {value!r} is not possible; {advice}")
    return int(number)


def _input_name(row: Mapping[str, Any], where: str, pairs: Sequence[Pair]) -> str:
    """The name of the input that a row is about; rows hold this name, or the name of its file."""
    names = [pair.name for pair in pairs]
    if "image" not in row:
        if len(pairs) == 1:
            return names[0]
        advice = f"give one of the {len(pairs)} inputs: {few(names)}"
        raise InputError(f"{where}: image is missing; {advice}")
    given = str(row["image"])
    for name in (given, stem(given)):
        if name in names:
            return name
    close = difflib.get_close_matches(stem(given), names, 1)
    hint = f"did you mean {close[0]}?" if close else f"the inputs are: {few(names)}"
    raise InputError(f"{where}: image {given!r} is none of the inputs; {hint}")
