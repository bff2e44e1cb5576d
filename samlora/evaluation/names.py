"""What the values in label maps are called, and which of them are measured."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samlora.data.findings import few
from samlora.data.folders import Layout, Pair
from samlora.data.label_tables import IGNORED, plain
from samlora.data.recipe import Recipe
from samlora.data.sources import VOIDS, ignored_values, resolve_classes
from samlora.data.structures import names_for_all
from samlora.errors import InputError, MissingFileError
from samlora.evaluation.matching import Matched
from samlora.files import read_text


@dataclass(frozen=True)
class Called:
    """What labels are called. names: label -> class; values: structure, of masks or named by its file -> label.

    recipe: as given, with the values that the references hold. source: where the names are from, for people. ignored:
    values in the references of voxels that are not measured.
    """

    names: dict[int, str]
    values: dict[str, int]
    recipe: Recipe | None
    source: str
    ignored: tuple[int, ...] = ()


def find_names(
    matched: Matched,
    names: str | os.PathLike | Mapping[int, str] | None,
    recipe: Recipe | None,
    prediction: Path,
    reference: Path,
) -> Called:
    """The names of all labels of the cases `matched`; arguments as of `folders.evaluate_folders`.

    Structures that are masks of their own are numbered in the order of their names, unless the recipe or the names
    say otherwise. Raises InputError where masks meet label maps and nothing says which value is which, or a mask is
    not among the names; and what `resolve_classes` raises.
    """
    beside = [folder / "dataset.json" for folder in (reference, reference.parent, prediction)]
    beside = [path for path in beside if path.is_file()]
    ignored = ignored_labels(beside[0]) if beside else ()
    if recipe is not None:
        known = {name: [value] for value, name in read_names(beside[0]).items()} if beside else {}
        pairs = [Pair(trio.name, (), trio.reference) for trio in matched.trios]
        recipe = resolve_classes(recipe, Layout("", pairs, known, (), []))
        listed = [value for group in recipe.label_values for value in group]
        ignored = tuple(sorted({*ignored, *_voids(listed), *_numbers(recipe.ignore)}))
        classes = dict(enumerate(recipe.classes, start=1))
        values = {str(value): n for n, group in enumerate(recipe.label_values, start=1) for value in group}
        values |= {name: n for n, name in classes.items()}
        return Called(classes, values, recipe, f"recipe {recipe.name}", ignored)
    source = ""
    if isinstance(names, Mapping):
        known = dict(names)
    elif names is not None or beside:
        source = str(beside[0] if names is None else names)
        known = read_names(source)
    else:
        known = {}
    ignored = tuple(sorted({*ignored, *_voids(known)}))
    known = {value: name for value, name in known.items() if value not in ignored}
    structures = sorted({name for trio in matched.trios for name in trio.structures})
    sides = [side for trio in matched.trios for side in (trio.prediction, trio.reference)]
    if structures and not known:
        if any(isinstance(side, Path) for side in sides):
            raise InputError(f"--names: is needed to know which value in the label maps is {few(structures)}")
        known = dict(enumerate(structures, start=1))
    if not structures:
        files = [side for side in sides if isinstance(side, Path)]
        known = names_for_all(known, files, "give --names")
    values = {name: value for value, name in known.items()}
    unknown = [name for name in structures if name not in values]
    if unknown:
        raise InputError(f"--names: says nothing about {few(unknown)}, of which there are masks; add them")
    return Called(known, values, None, source, ignored)


def _voids(listed: Iterable[int | str]) -> set[int]:
    """Values that mark what nobody has labelled, beside the values that are known to be classes."""
    classes = set(_numbers(listed))
    return {void for void in VOIDS if void in ignored_values({*classes, void}) - classes}


def _numbers(values: Iterable[int | str]) -> list[int]:
    return [value for value in values if isinstance(value, int)]


def ignored_labels(path: Path) -> tuple[int, ...]:
    """The values that a dataset.json calls "ignore"; none where it is not to be read so."""
    try:
        values = json.loads(read_text(path))["labels"]
        pairs = [(value, key) if str(key).isdigit() else (key, value) for key, value in values.items()]
        return tuple(int(value) for name, value in pairs if plain(str(name)) in IGNORED and int(value))
    except (ValueError, TypeError, KeyError, AttributeError):
        return ()


def read_names(path: str | os.PathLike) -> dict[int, str]:
    """Label value -> class name, from a file.

    JSON: {"1": "spleen"} or {"spleen": 1}, by itself or as the "labels" of a dataset.json. A recipe (.yaml, or the
    name of a shipped one): its classes, numbered from 1 as samlora's label maps are. An adapter (.safetensors): its
    classes, likewise. Raises MissingFileError or InputError naming the file.
    """
    path = Path(path)
    if path.suffix.lower() not in (".json", ".safetensors"):
        return dict(enumerate(Recipe.load(path).classes, start=1))
    if not path.is_file():
        raise MissingFileError(f"--names {path}: no such file")
    if path.suffix.lower() == ".safetensors":
        return dict(enumerate(_adapter_classes(path), start=1))
    try:
        values = json.loads(read_text(path))
        values = values.get("labels", values)
        if not all(str(key).isdigit() for key in values):
            values = {n: name for name, value in values.items() for n in ([value] if type(value) is int else value)}
        names = {int(value): str(name) for value, name in values.items() if int(value) > 0}
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f'--names {path}: no names of labels in it ({type(error).__name__}); {{"1": "liver"}} is needed'
        ) from None
    return names


def _adapter_classes(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return list(json.loads((file.metadata() or {})["samlora"])["class_names"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        raise InputError(f"--names {path}: is no adapter that says its classes; give a JSON file of names") from None


def named_labels(
    given: Sequence[str | int] | None, names: Mapping[int, str]
) -> tuple[tuple[int, ...] | None, dict[int, str]]:
    """The labels to measure, None for those found, and the names of all.

    given: each a value, a name out of `names`, or "NAME=VALUE". Raises InputError, naming --labels, for anything else.
    """
    names = dict(names)
    if given is None:
        return None, names
    values = []
    by_name = {name: value for value, name in names.items()}
    for item in map(str, given):
        name, _, value = item.rpartition("=")
        if value in by_name and not name:
            values.append(by_name[value])
        elif value.isdigit() and int(value) > 0:
            values.append(int(value))
            if name:
                names[values[-1]] = name
        else:
            known = f"; known names: {few(by_name)}" if by_name else ""
            raise InputError(f"--labels {item}: NAME=VALUE, or a value from 1 on, is needed{known}")
    twice = [value for n, value in enumerate(values) if value in values[:n]]
    if twice or not values:
        raise InputError(f"--labels: {f'value {twice[0]} is given twice' if twice else 'no label is given'}")
    return tuple(values), names
