"""Tables of names that label maps come with: inside the file, beside it, or one for a whole folder.

Programs number structures in the order in which a person made them, so the same number may mean another structure in
the next file. A table that belongs to one file is therefore used for that file alone.
"""

import csv
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samlora.errors import InputError
from samlora.files import find_file, read_text, same_name

# Value of a label map -> the structures that it shows; several where structures overlap.
Names = dict[int, tuple[str, ...]]

_BESIDE = (".txt", ".label", ".ctbl", ".lut", ".json", ".csv", ".tsv")
_ONLY_TABLES = (".label", ".ctbl", ".lut")
_TABLE_WORDS = re.compile(r"label|class|lut|colou?r|names|dseg|structure|segment|dictionary", re.IGNORECASE)
_NO_TABLE = ("dataset.json", "plans.json", "splits_final.json", "dataset_fingerprint.json")
_LARGEST_TABLE = 2**20  # bytes
_VALUE_COLUMNS = ("index", "value", "id", "labelvalue", "label_value", "key", "idx", "no", "number", "label", "class")
_NAME_COLUMNS = ("name", "structure", "organ", "label_name", "labelname", "segment", "class_name", "label", "roi")
_SNAP = re.compile(r'\s*(\d+)\s+\d+\s+\d+\s+\d+\s+[\d.]+\s+\d\s+\d\s+"(.*)"\s*')  # ITK-SNAP: a quoted name at the end
_FREESURFER = re.compile(r"\s*(\d+)\s+(\S+)\s+\d+\s+\d+\s+\d+(?:\s+\d+)?\s*")  # FreeSurfer, 3D Slicer
_LISTED = re.compile(r"\s*(\d+)\s*[:=,;\t ]\s*([^\W\d].*?)\s*")
_CARET = re.compile(r'<Label\b[^>]*?\bKey="(\d+)"[^>]*>(.*?)</Label>', re.DOTALL)
_UNNAMED = re.compile(r"segment[_ ]?\d*|", re.IGNORECASE)  # what 3D Slicer calls a segment that nobody named
_BACKGROUND = ("background", "clear label", "unknown", "exterior")
IGNORED = ("ignore", "ignored", "ignore_label", "void", "unlabeled", "unlabelled", "do_not_care", "dont_care")


@dataclass(frozen=True)
class Segment:
    """One structure of a file that holds several: its name, and the value that it has in layer `layer` of the array."""

    name: str
    value: int
    layer: int = 0


def plain(name: str) -> str:
    """A name in the form in which names of structures are compared: "Left Kidney" and "left_kidney" are one."""
    return re.sub(r"[\W_]+", "_", same_name(name)).strip("_").casefold()


def values_named(names: Mapping[int, Sequence[str]], wanted: str) -> list[int]:
    """The values that show the structure `wanted`."""
    return [value for value, found in names.items() if plain(wanted) in map(plain, found)]


def numbers_of(found: Sequence[str], numbers: Mapping[str, int]) -> set[int]:
    """The numbers of the structures `found` that are among `numbers`, name -> number."""
    wanted = set(map(plain, found))
    return {number for name, number in numbers.items() if plain(name) in wanted}


# --- tables inside label files ------------------------------------------------------------------------------------


def nrrd_segments(path: Path) -> list[Segment]:
    """The structures that the header of an NRRD file names, as 3D Slicer and MITK do; empty where it names none."""
    fields = _nrrd_fields(path)
    groups = fields.get("org.mitk.multilabel.segmentation.labelgroups")
    if groups is not None:
        try:
            found = [(label, n) for n, group in enumerate(json.loads(groups)) for label in group["labels"]]
            return [Segment(str(label["name"]), int(label["value"]), n) for label, n in found]
        except (ValueError, KeyError, TypeError):
            return []
    segments = []
    numbers = sorted({int(found[1]) for key in fields if (found := re.match(r"Segment(\d+)_", key))})
    for number in numbers:
        of = {key.split("_", 1)[1]: value for key, value in fields.items() if key.startswith(f"Segment{number}_")}
        value, layer = of.get("LabelValue", ""), of.get("Layer", "0")
        if value.isdigit() and layer.isdigit():
            segments.append(Segment(_slicer_name(of, number), int(value), int(layer)))
    return segments


def nifti_names(extensions: Iterable) -> Names:
    """The structures in the extensions of a NIfTI header: a LabelTable as Connectome Workbench writes it.

    TotalSegmentator writes one too. extensions: as of nibabel's headers.
    """
    names: Names = {}
    for extension in extensions:
        content = extension.get_content()
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        if "<LabelTable" not in text:
            continue
        for key, name in _CARET.findall(text):
            name = html.unescape(re.sub(r"<!\[CDATA\[(.*?)\]\]>", r"\1", name, flags=re.DOTALL)).strip()
            if int(key) and name:
                names[int(key)] = (name,)
    return names


def dicom_names(path: Path) -> Names:
    """The structures of a DICOM segmentation: segment number -> its label; needs pydicom."""
    import pydicom

    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SegmentSequence", "SpecificCharacterSet"])
    segments = header.get("SegmentSequence") or ()
    labelled = {int(one.SegmentNumber): str(one.get("SegmentLabel") or "") for one in segments}
    return {number: (label.strip(),) for number, label in labelled.items() if number and label.strip()}


def merge_layers(array: np.ndarray, segments: Sequence[Segment]) -> tuple[np.ndarray, Names]:
    """One label map of layers (i, j, k, layer) whose structures may overlap, and the names of its values.

    Structure n of `segments` has value n + 1, and each combination that occurs a value after these.
    """
    places = np.flatnonzero(array.any(axis=-1))
    layers = array.reshape(-1, array.shape[-1])[places]
    shown: dict[tuple[int, ...], np.ndarray] = {}
    # One number for each combination of values; far fewer occur than are possible.
    inverse = np.zeros(len(places), np.int64)
    for layer in layers.T:
        _, inverse = np.unique(inverse * (int(layer.max(initial=0)) + 1) + layer, return_inverse=True)
    _, firsts = np.unique(inverse, return_index=True)
    for n, row in enumerate(layers[firsts]):
        members = tuple(number for number, one in enumerate(segments, start=1) if row[one.layer] == one.value)
        if members:
            shown[members] = shown.get(members, False) | (inverse == n)
    names: Names = {number: (one.name,) for number, one in enumerate(segments, start=1)}
    merged = np.zeros(array.shape[:-1], np.uint16)
    for members, where in shown.items():
        value = members[0] if len(members) == 1 else len(names) + 1
        names[value] = tuple(name for number in members for name in names[number])
        merged.ravel()[places[where]] = value
    return merged, names


def _nrrd_fields(path: Path) -> dict[str, str]:
    """The key := value pairs of an NRRD header."""
    with open(path, "rb") as file:
        lines = []
        for line in file:
            if not line.strip():
                break
            lines.append(line)
    try:
        text = b"".join(lines).decode("utf-8")
    except UnicodeDecodeError:
        text = b"".join(lines).decode("latin-1")
    pairs = (line.split(":=", 1) for line in text.splitlines() if ":=" in line)
    return {key.strip(): value.strip().replace("\\n", "\n").replace("\\\\", "\\") for key, value in pairs}


def _slicer_name(fields: Mapping[str, str], number: int) -> str:
    """The name of a segment of 3D Slicer: as given, else its type out of a terminology."""
    name = fields.get("Name", "").strip()
    if _UNNAMED.fullmatch(name):
        # TerminologyEntry:CONTEXT~SCT^CODE^Category~SCT^CODE^Type~...
        entry = re.search(r"TerminologyEntry:([^|]*)", fields.get("Tags", ""))
        parts = [part.split("^")[-1] for part in entry[1].split("~")] if entry else []
        kind = parts[2].strip() if len(parts) > 2 else ""
        if kind and kind.lower() != "tissue":
            return kind
    return name or fields.get("ID", "").strip() or f"Segment_{number + 1}"


# --- tables beside label files ------------------------------------------------------------------------------------


def table_beside(path: Path, stem: str) -> Path | None:
    """The table of names that lies beside a label map and has its name, or None."""
    if path.is_dir():
        return None
    candidates = (find_file(path.with_name(stem + ending)) for ending in _BESIDE)
    return next((file for file in candidates if file.is_file() and file != path and _small(file)), None)


def names_beside(path: Path, stem: str) -> Names:
    """The names in the table that lies beside a label map and has its name; empty without one."""
    table = table_beside(path, stem)
    found = {} if table is None else read_table(table)
    return {value: (name,) for value, name in found.items()}


def folder_table(folders: Iterable[Path]) -> tuple[dict[int, str], Path | None]:
    """Value -> name, of the first table of names in `folders` that belongs to no single file, and where it stands."""
    for folder in dict.fromkeys(folders):
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            ending = file.suffix.lower()
            known = ending in _ONLY_TABLES or (ending in _BESIDE and _TABLE_WORDS.search(file.stem))
            if not known or file.name.lower() in _NO_TABLE or file.name.startswith(".") or not _small(file):
                continue
            names = read_table(file)
            if names:
                return names, file
    return {}, None


def read_table(path: Path) -> dict[int, str]:
    """Value -> name, of a file in any of the known forms, background left out; empty where it is none of them.

    ITK-SNAP's label descriptions, FreeSurfer's and 3D Slicer's colour tables, JSON ({"1": "liver"}, {"liver": 1}, also
    as "labels"), CSV or TSV with columns such as index and name, and lines such as "1: liver".
    """
    try:
        text = read_text(path)
    except InputError:
        return {}
    if path.suffix.lower() == ".json":
        found = _of_json(text)
    else:
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "//"))]
        found = _of_columns(lines) or _of_lines(lines)
    return {value: name for value, name in found.items() if value > 0 and name.lower() not in _BACKGROUND}


def _small(path: Path) -> bool:
    return path.stat().st_size <= _LARGEST_TABLE


def _of_json(text: str) -> dict[int, str]:
    try:
        values = json.loads(text)
        values = values.get("labels", values)
        if all(str(key).isdigit() for key in values):
            return {int(value): name for value, name in values.items() if isinstance(name, str)}
        return {value: name for name, value in values.items() if type(value) is int}
    except (ValueError, AttributeError, TypeError):
        return {}


def _of_columns(lines: Sequence[str]) -> dict[int, str]:
    """A table with a head, between whose columns stand commas, semicolons or tabs."""
    if not lines:
        return {}
    delimiter = next((sign for sign in "\t;," if sign in lines[0]), None)
    if delimiter is None:
        return {}
    rows = list(csv.DictReader(lines, delimiter=delimiter))
    heads = {str(head).strip().lower(): head for head in (rows[0] if rows else ())}
    value = next((heads[name] for name in _VALUE_COLUMNS if name in heads), None)
    name = next((heads[one] for one in _NAME_COLUMNS if one in heads and heads[one] != value), None)
    if value is None or name is None:
        return {}
    found = {str(row[value]).strip(): str(row[name] or "").strip() for row in rows}
    return {int(number): text for number, text in found.items() if number.isdigit() and text}


def _of_lines(lines: Sequence[str]) -> dict[int, str]:
    """A table in which every line is a value and its name, in one of the known forms."""
    for pattern in (_SNAP, _FREESURFER, _LISTED):
        found = [pattern.fullmatch(line) for line in lines]
        # Tables may have a head or a remark; what is mostly something else is none.
        named = [match for match in found if match]
        if named and len(named) >= len(lines) - 2:
            return {int(match[1]): match[2].strip() for match in named}
    return {}


# --- several files ------------------------------------------------------------------------------------------------


def contradictions(tables: Mapping[str, Mapping[int, Sequence[str]]]) -> list[str]:
    """Values that mean different structures in different files, each as a text; tables: file -> its names."""
    meaning: dict[int, dict[str, tuple[str, str]]] = {}
    for file, names in tables.items():
        for value, found in names.items():
            if len(found) == 1:
                meaning.setdefault(value, {}).setdefault(plain(found[0]), (found[0], file))
    several = {value: list(of.values()) for value, of in sorted(meaning.items()) if len(of) > 1}
    return [
        f"{value} is " + ", ".join(f"{name} in {file}" for name, file in found[:3]) for value, found in several.items()
    ]
