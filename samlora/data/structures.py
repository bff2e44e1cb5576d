"""What the label maps of a data set call their structures, and the number of each for all of them."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from samlora.data.folders import Layout, Pair
from samlora.data.label_tables import Names, contradictions, plain
from samlora.data.volume import read_label_names
from samlora.errors import InputError


def names_for_all(known: Mapping[int, str], files: Iterable[Path], advice: str) -> dict[int, str]:
    """What the values of several label maps are called, each structure with one number for all.

    Args:
        known: value -> name, as given for all files; they keep their numbers.
        files: the label maps; they may call their own values something, each for itself.
        advice: what to do where a file without names cannot be understood.

    Returns:
        `known` and the names in the files. Where nothing is known and the files agree, their
        numbers stay; otherwise a structure takes the smallest number that is free.

    Raises:
        InputError: files number structures differently, and one among them names none.
    """
    own = _own_tables(files)
    tables = {path: table for path, table in own.items() if table}
    if not tables:
        return dict(known)
    found = {
        path: {value: names[0] for value, names in table.items()} for path, table in tables.items()
    }
    numbers: dict[str, set[int]] = {}
    for table in found.values():
        for value, name in table.items():
            numbers.setdefault(plain(name), set()).add(value)
    texts = contradictions({path.name: table for path, table in tables.items()})
    alike = not texts and all(len(values) == 1 for values in numbers.values())
    called = {
        plain(name): name for table in reversed(found.values()) for name in table.values()
    }
    if not known and alike:
        return {next(iter(values)): called[key] for key, values in numbers.items()}
    if not known and len(tables) < len(own):
        silent = next(path for path in own if path not in tables)
        why = texts[0] if texts else f"{next(n for n in called.values())} has several numbers"
        raise InputError(
            f"{silent}: does not name its values, and the other files number theirs differently "
            f"({why}); {advice}"
        )
    listed = set(map(plain, known.values()))
    if listed and not listed & numbers.keys():
        return dict(known)  # other words, perhaps of another language: only numbers compare
    free = (n for n in range(1, 65536) if n not in known)
    return dict(known) | {next(free): called[key] for key in sorted(called) if key not in listed}


def folder_names(layout: Layout) -> dict[int, str]:
    """What a folder calls the values of label maps that do not name them themselves."""
    return dict(layout.names) or {group[0]: name for name, group in layout.classes.items() if len(group) == 1}


def own_structures(pairs: Sequence[Pair]) -> dict[str, str]:
    """What the label maps themselves call their structures: the name as it is compared -> as it is written first."""
    found: dict[str, str] = {}
    tables = _own_tables(pair.label for pair in pairs if isinstance(pair.label, Path))
    for names in tables.values():
        for name in (name for group in names.values() for name in group):
            found.setdefault(plain(name), name)
    return found


def _own_tables(files: Iterable[Path]) -> dict[Path, Names]:
    """What label maps call their own values, perhaps nothing; without files that cannot be read."""
    found = {}
    for path in dict.fromkeys(files):
        # A broken file is named where it is read to be used.
        with contextlib.suppress(InputError):
            found[path] = read_label_names(path)
    return found
