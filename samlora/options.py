"""Options stated once, as a dataclass: read from flags and YAML, written back with their types."""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from samlora.errors import InputError, MissingFileError
from samlora.files import read_text, shipped, whole

Options = TypeVar("Options")
_NAMED = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)


def option(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    """A field of an options class: its default, its help text and, if it is one of a few, the choices."""
    meta = {"help": help, "choices": tuple(choices) if choices else None}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds a `--flag` for every field. Flags that were not given leave no trace in the parsed result."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, is_list, _ = _kind(hints[field.name])
        plain = field.default is None or field.default == () or kind is dict
        shown = "" if plain else f" (default: {field.default})"
        settings: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": (field.metadata["help"] + shown).replace("%", "%%"),
        }
        if hints[field.name] == bool | str:  # a switch that may name what it is about
            settings |= {"nargs": "?", "const": True, "metavar": "FOLDER"}
        elif kind is dict:
            settings |= {"nargs": "+", "metavar": "NAME=VALUE"}
        elif kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kind, "choices": field.metadata["choices"], "metavar": kind.__name__.upper()}
            if settings["choices"]:
                settings.pop("metavar")
            if is_list:
                settings["nargs"] = "+"
        parser.add_argument(f"--{field.name}", **settings)


def make(options: type[Options], given: Mapping[str, Any], source: str = "") -> Options:
    """An instance from names and values, each checked against its field's type and choices.

    source: where the values stand, for messages. Raises InputError for an unknown name or a wrong value.
    """
    hints = typing.get_type_hints(options)
    fields = {field.name: field for field in dataclasses.fields(options)}
    values = {}
    for name, value in given.items():
        where = f"{source}: {name}" if source else f"--{name}"
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            raise InputError(
                f"{where} is no option" + (f"; did you mean {close[0]}?" if close else f"; known: {', '.join(fields)}")
            )
        values[name] = _checked(value, hints[name], where)
        choices = fields[name].metadata["choices"]
        if choices and value is not None and value not in choices:
            raise InputError(f"{where} {value} is not possible; allowed: {', '.join(choices)}")
    return options(**values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; a bare name means a file of configs/ that ships with samlora.

    Raises MissingFileError or InputError.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        known = sorted(p.stem for p in shipped("configs").glob("*.yaml"))
        if str(path) not in known:
            raise MissingFileError(
                f"--config {path}: there is no such file; give a YAML file or one of: {', '.join(known)}"
            )
        path = shipped("configs") / f"{path}.yaml"
    try:
        values = yaml.safe_load(read_text(path))
    except InputError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: is not YAML ({reason}); correct it") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold lines of the form `name: value`")
    return values


def write_yaml(path: str | Path, options: Any) -> None:
    """Writes an instance so that `make(type, read_yaml(path))` equals it."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}
    with whole(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def pairs(value: Any, where: str) -> dict[str, Any]:
    """A mapping, or texts NAME=VALUE as flags give them; one text may hold several, NAME=VALUE,NAME=VALUE.

    A VALUE is read as YAML reads it, and a,b is a list, as [a,b] is. One that is NAME=VALUE itself stays the text it
    is: whose option it is knows whether that is a mapping. where: for messages. Raises InputError for anything else.
    """
    if isinstance(value, Mapping):
        return dict(value)
    found = {}
    for text in value if isinstance(value, list | tuple) else _pair_texts(str(value)):
        named = _NAMED.match(str(text))
        if not named:
            raise InputError(f"{where} {text}: is not of the form NAME=VALUE")
        content = named["value"]
        if _NAMED.match(content):
            found[named["name"]] = content
            continue
        read = [_read(part, f"{where} {text}") for part in _parts(content)]
        found[named["name"]] = read if len(read) > 1 else read[0]
    return found


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """(element type, is a tuple, may be None) of a field's annotation."""
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    if typing.get_origin(hint) is dict:
        return dict, False, optional
    return hint, False, optional


def _checked(value: Any, hint: Any, where: str) -> Any:
    if hint == bool | str and type(value) in (bool, str):
        return value
    kind, is_list, optional = _kind(hint)
    if value is None and optional:
        return None
    if kind is dict:
        return pairs(value, where)
    if is_list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_scalar(item, kind, where) for item in items)
    return _scalar(value, kind, where)


def _pair_texts(text: str) -> list[str]:
    """One text for each NAME=VALUE; a part between commas without a name belongs to the list before it."""
    texts: list[str] = []
    for part in _parts(text):
        if texts and not _NAMED.match(part):
            texts[-1] += f",{part}"
        else:
            texts.append(part)
    return texts


def _parts(text: str) -> list[str]:
    """What stands between the commas of a text that are in no brackets or braces."""
    parts, depth = [""], 0
    for letter in text:
        depth = max(0, depth + (letter in "[{") - (letter in "]}"))
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _read(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}: {text} is no value of YAML ({reason}); close its brackets, or quote it") from None


def _scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind:
        return value
    if kind is str and type(value) in (int, float):  # case names such as 0005 in YAML
        return str(value)
    if kind is float and type(value) is str:  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    raise InputError(f"{where} {value!r} is not possible; it must be of type {kind.__name__}")
