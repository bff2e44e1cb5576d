"""The part of `samlora check` that looks at images and labels before they are prepared."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from samlora.data.findings import (
    Finding,
    Look,
    Report,
    Row,
    classes_without_cases,
    few,
    grouped,
    judge,
    measure,
    mixed_channels,
    runs,
    slice_marks,
    tabulate,
    without_path,
)
from samlora.data.folders import Layout, Pair
from samlora.data.ignored import split_ignored
from samlora.data.label_tables import contradictions
from samlora.data.layouts import find_pairs
from samlora.data.pictures import palette_colours
from samlora.data.prepare import wanted
from samlora.data.recipe import Recipe
from samlora.data.sources import ignored_values, label_values, read_image, read_label, resolve_classes
from samlora.data.volume import read_label_names
from samlora.errors import InputError

_AS_FOUND = Recipe("as found", "image")  # what stands in for a recipe: nothing is turned, every value is a class
_AIR, _METAL = -900, 5000  # HU; other images have no such range of values


def check_source(
    path: Path, num_classes: int | None, recipe: Recipe | None, each: Callable[[Callable, Sequence], list]
) -> Report:
    """Looks at the cases that `samlora prepare` would find in `path`.

    each: `each(function, items)` gives the results of `function` on the items, in order. Raises InputError or
    MissingFileError where `find_pairs` finds no cases, or an image without a label.
    """
    layout = find_pairs(path)
    layout = dataclasses.replace(layout, pairs=layout.pairs if recipe is None else wanted(layout.pairs, recipe))
    findings = [Finding(False, note) for note in layout.notes]
    used, broken = _used_recipe(layout, recipe, each, findings)
    given = recipe is not None

    def look(pair: Pair) -> tuple[Look, list[str], str]:
        return _look(pair, used, given, broken.get(pair.name), _side(pair, recipe), path)

    results = each(look, layout.pairs)
    looks = [result[0] for result in results]
    rows = tabulate(looks)
    patient_of = str if recipe is None else recipe.patient_of
    findings += judge(looks, rows, patient_of, labelled=bool(used.classes))
    findings += mixed_channels(looks, alike=(1, 3))  # colours become gray, or gray becomes colours
    findings += grouped([(one.name, remark) for one, remarks, _ in results for remark in remarks], problem=False)
    findings += _orientations([(one.name, axes) for one, _, axes in results if axes], recipe)
    findings += [] if given else _gray_levels(rows)
    findings += _tables(layout.pairs, used)
    if not given and (void := ignored_values({value for row in rows for value in row.voxels})):
        text = f"label value {runs(void)} beside small ones looks like PASCAL VOC's mark for what is not labelled"
        findings.append(Finding(False, f"{text}; leave it out of the classes"))
    if recipe is not None:
        findings += _modality(rows, recipe) + _test_cases(layout.pairs, recipe)
    if num_classes is not None and used.classes and num_classes != used.num_classes:
        have = f"there are {used.num_classes} classes ({few(used.classes)})"
        findings.append(Finding(True, f"--num_classes {num_classes}: {have}; leave the flag out"))
    names = dict(zip(_keys(used, given), _names(used, given)))
    findings += classes_without_cases(rows, names)
    return Report(path, layout.kind, rows, names, findings)


def _look(
    pair: Pair, recipe: Recipe, given: bool, broken: InputError | None, side: str, root: Path
) -> tuple[Look, list[str], str]:
    """What a case holds, remarks on its label, and the axes that its image is stored along ("" for a picture)."""
    look = Look(pair.name, pair.name, side)
    try:
        image = read_image(pair)
    except InputError as error:
        look.trouble.append(_placed(error, pair, root))
        return look, [], ""
    size = image.array.shape[:3]
    look.shape = size[:2] if size[2] == 1 and not image.has_spacing else size
    look.channels = 1 if image.array.ndim == 3 else image.array.shape[3]
    look.types = str(image.array.dtype)
    axes = image.axes if image.has_spacing else ""
    if axes:
        sizes = image.spacing if image.has_thickness else image.spacing[:2]
        look.spacing = f"{' x '.join(f'{s:.3g}' for s in sizes)} mm {axes}"
    label, remarks = None, []
    try:
        if given:
            recipe.image_stack(image)  # raises what would stop `prepare`
        if broken is not None:
            raise broken
        if recipe.classes:
            label, remarks = read_label(pair, image, recipe)
    except InputError as error:
        look.trouble.append(_placed(error, pair, root))
    slices = recipe.to_slices(image)
    stack = None
    if label is not None:
        stack, _ = split_ignored(recipe.to_slices(label), recipe.to_dict())
    measure(look, slices, stack)
    look.marks = slice_marks(slices, None)
    keys = [0, *_keys(recipe, given)]
    look.voxels = {keys[value]: count for value, count in look.voxels.items()}
    if isinstance(pair.label, dict):
        look.types += f" / {len(pair.label)} mask{'s' * (len(pair.label) > 1)}"
    return look, remarks, axes


def _placed(error: InputError, pair: Pair, root: Path) -> tuple[str, str]:
    """The file that an error names, below `root`, and the rest of its message; the case if it names none."""
    text, named = str(error), pair.name
    for file in pair.files:
        short = os.path.relpath(file, root)
        if text.startswith(f"{file}: "):
            named, text = short, without_path(text, file)
        text = text.replace(str(file), short)
    return named, text


def _used_recipe(
    layout: Layout, recipe: Recipe | None, each: Callable, findings: list[Finding]
) -> tuple[Recipe, dict[str, InputError]]:
    """The recipe with classes that fit the labels, none where there are none; and labels that cannot be read.

    What keeps `samlora prepare` from finding classes is added to `findings`.
    """
    broken: dict[str, InputError] = {}
    base = recipe or _AS_FOUND

    def values(pairs: Sequence[Pair]) -> list[Iterable[int | str]]:
        def read(pair: Pair) -> Iterable[int | str]:
            try:
                return label_values(pair, base.mask_threshold)
            except InputError as error:
                broken[pair.name] = error
                return ()

        return each(read, pairs)

    try:
        return resolve_classes(base, layout, values), broken
    except InputError as error:
        if not broken:
            findings.append(Finding(True, str(error)))
    # Whatever the recipe or dataset.json says: every value is a class, so that the labels can be looked at.
    plain = dataclasses.replace(base, classes=(), label_values=())
    try:
        return resolve_classes(plain, dataclasses.replace(layout, classes={}), values), broken
    except InputError:
        return plain, broken


def _side(pair: Pair, recipe: Recipe | None) -> str:
    """The side that `prepare` puts a case on: the recipe goes before the layout."""
    test = pair.name in recipe.test_cases if recipe is not None and recipe.test_cases else pair.test
    return "test" if test else "train"


def _keys(recipe: Recipe, given: bool) -> list[int | str]:
    """What to call each class: its number with a recipe, else its value in the files if it has one only."""
    single = all(len(values) == 1 for values in recipe.label_values)
    if given or not single:
        return list(range(1, recipe.num_classes + 1))
    return [values[0] for values in recipe.label_values]


def _names(recipe: Recipe, given: bool) -> list[str]:
    if not given:
        return ["" if name in (f"label_{values[0]}", values[0]) else name for name, values in _items(recipe)]
    return [f"{name} ({' '.join(map(str, values))})" for name, values in _items(recipe)]


def _items(recipe: Recipe) -> list[tuple[str, tuple[int | str, ...]]]:
    return list(zip(recipe.classes, recipe.label_values))


def _gray_levels(rows: Sequence[Row]) -> list[Finding]:
    """A mask that was saved as a picture, with white that is not quite white, would become several classes."""
    values = {value for row in rows for value in row.voxels if value != 0}
    if len(values) < 2 or not all(isinstance(value, int) and 127 < value < 256 for value in values):
        return []
    text = f"label values {runs(values)} look like one mask in levels of gray; mask_threshold: 127 in a recipe makes"
    return [Finding(False, f"{text} one class of them")]


def _tables(pairs: Sequence[Pair], recipe: Recipe) -> list[Finding]:
    """Label files that give the same number to different structures, or the same colour to different numbers."""
    tables: dict[str, dict[int, tuple[str, ...]]] = {}
    colours: dict[str, dict[int, tuple[str, ...]]] = {}
    silent = []
    for pair in pairs:
        if not isinstance(pair.label, Path):
            continue
        try:
            names = read_label_names(pair.label)
        except InputError:
            continue  # it is named where it is read
        colours[pair.name] = palette_colours(pair.label)
        if names:
            tables[pair.name] = names
        else:
            silent.append(pair.name)
    found = []
    numbered = any(isinstance(value, int) for values in recipe.label_values for value in values)
    for text in contradictions(tables):
        advice = "list the classes by name in the recipe, not by number" if numbered else "the names are used, per file"
        found.append(Finding(numbered, f"label value {text}; {advice}"))
    if tables and silent and not numbered:
        text = "label files that do not name their values, beside others that do; they cannot be read by names"
        found.append(Finding(True, text, tuple(silent)))
    elif tables and silent:
        text = "label files that do not name their values, beside others that do; are they numbered alike?"
        found.append(Finding(False, text, tuple(silent)))
    for text in contradictions(colours):
        found.append(Finding(False, f"palettes differ: label value {text}; are the numbers the same classes?"))
    return found


def _orientations(stored: Sequence[tuple[str, str]], recipe: Recipe | None) -> list[Finding]:
    """A model should not see some patients upside down."""
    axes = sorted({code for _, code in stored})
    if len(axes) < 2 or (recipe is not None and recipe.orientation is not None):
        return []
    examples = tuple(f"{next(name for name, code in stored if code == one)} ({one})" for one in axes)
    text = f"images are stored along {len(axes)} different axes; set orientation in the recipe, such as LPS"
    return [Finding(False, text, examples)]


def _modality(rows: Sequence[Row], recipe: Recipe) -> list[Finding]:
    if recipe.modality == "ct":
        odd = tuple(f"{row.case} ({row.range})" for row in rows if row.low >= 0 and row.high > 255)
        text = "no value below 0, but in HU air is -1000; is the rescale intercept lost?"
    else:
        odd = tuple(f"{row.case} ({row.range})" for row in rows if row.low < _AIR and row.high < _METAL)
        text = f"values like those of CT, but the recipe {recipe.name} is for {recipe.modality}"
    return [Finding(False, text, odd)] if odd else []


def _test_cases(pairs: Sequence[Pair], recipe: Recipe) -> list[Finding]:
    absent = sorted(set(recipe.test_cases) - {pair.name for pair in pairs})
    text = f"test cases of recipe {recipe.name} that are not here"
    return [Finding(False, text, tuple(absent))] if absent else []
