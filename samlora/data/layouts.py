"""Finding images and their labels in a folder: BTCV, pairs of folders, nnU-Net and Decathlon."""

import dataclasses
import json
import os
import re
from pathlib import Path

from samlora.data.volume import VOLUMES, stem
from samlora.errors import InputError, MissingFileError

# Folders of images and of labels; the first pair that is there is taken.
_FOLDERS = (
    ("imagesTr", "labelsTr"),
    *((i, l) for i in ("img", "images", "imgs", "image") for l in ("label", "labels", "masks", "mask")),
)
_CHANNEL = re.compile(r"(.+)_\d{4}")  # nnU-Net numbers the channels of a case
_LABEL = re.compile(r"(.+)_(?:seg|segmentation|label|labels|mask|gt)")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One case: its name, its image and its label (files, or a folder of DICOM slices)."""

    name: str
    image: Path
    label: Path
    test: bool = False  # the layout keeps it apart for testing


@dataclasses.dataclass
class Layout:
    """What a folder holds. classes: name -> values in the label files, where the folder says so (nnU-Net)."""

    pairs: list[Pair]
    classes: dict[str, list[int]]
    notes: list[str]


def find_pairs(source: str | os.PathLike) -> Layout:
    """The cases in `source`, sorted by name.

    Known are `img/imgNNNN` + `label/labelNNNN` (cases caseNNNN), images/ + labels/ or masks/ matched by the
    names of their files (an image may end in _0000, a label in _seg, _label, _mask or _gt), and nnU-Net's
    imagesTr/ + labelsTr/ + dataset.json, with imagesTs/ + labelsTs/ as test cases.
    Raises MissingFileError or InputError: no such folder, no known layout, nothing in it, an image without a
    label, two images for one label.
    """
    source = Path(source)
    if not source.is_dir():
        raise MissingFileError(f"{source}: no such folder; give the folder that holds images and labels")
    folders = next(((i, l) for i, l in _FOLDERS if (source / i).is_dir() and (source / l).is_dir()), None)
    if folders is None:
        found = " ".join(sorted(entry.name for entry in source.iterdir())[:8]) or "nothing"
        known = "img + label, images + labels (or masks), imagesTr + labelsTr"
        raise InputError(f"{source}: two folders are needed in it, {known}; found {found}")
    pairs, notes = _matched(source / folders[0], source / folders[1], test=False)
    classes: dict[str, list[int]] = {}
    if folders[0] == "imagesTr":
        if (source / "dataset.json").exists():
            classes = _nnunet_classes(source / "dataset.json")
        if (source / "imagesTs").is_dir() and (source / "labelsTs").is_dir():
            more, remarks = _matched(source / "imagesTs", source / "labelsTs", test=True)
            pairs, notes = pairs + more, notes + remarks
        elif (source / "imagesTs").is_dir():
            notes.append("imagesTs has no labels and is left out")
    names = sorted(pair.name for pair in pairs)
    twice = [a for a, b in zip(names, names[1:]) if a == b]
    if twice:
        raise InputError(f"{source}: case {twice[0]} occurs twice; rename one of them")
    return Layout(sorted(pairs, key=lambda pair: pair.name), classes, notes)


def _matched(images: Path, labels: Path, test: bool) -> tuple[list[Pair], list[str]]:
    image_files, label_files = _entries(images), _entries(labels)
    # A label is found by its own name, and by that name without its ending where no other label has it.
    by_name = {m[1]: path for key, path in label_files.items() if (m := _LABEL.fullmatch(key))} | label_files
    taken: dict[Path, Path] = {}
    pairs = []
    for key, image in image_files.items():
        channel = _CHANNEL.fullmatch(key)
        name = next((n for n in (key, channel and channel[1]) if n in by_name), None)
        if name is None:
            raise InputError(f"{image}: has no label in {labels}; add {key}.nii.gz there or move the image")
        label = by_name[name]
        if label in taken:
            both = f"{taken[label].name} and {image.name}"
            raise InputError(f"{label}: {both} belong to it, but a case has one image; keep one channel")
        taken[label] = image
        pairs.append(Pair(name, image, label, test))
    lonely = [path.name for path in label_files.values() if path not in taken]
    return pairs, [f"{len(lonely)} labels without an image are left out: {_few(lonely)}"] if lonely else []


def _entries(folder: Path) -> dict[str, Path]:
    """Case name -> volume in `folder`, in order of the names."""
    entries: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.name.lower().endswith(VOLUMES)):
            continue  # such as the ._ files that macOS leaves in archives
        numbered = re.fullmatch(r"(?:img|label)(\d{4,})", stem(path))
        name = f"case{numbered[1]}" if numbered else stem(path)
        if name in entries:
            raise InputError(f"{path}: {entries[name].name} has the same name; keep one of them")
        entries[name] = path
    if not entries:
        kinds = " ".join(VOLUMES)
        raise InputError(f"{folder}: no volumes in it; {kinds} and folders of DICOM slices are read")
    return entries


def _nnunet_classes(path: Path) -> dict[str, list[int]]:
    """The classes of a dataset.json, either way round: {"liver": 1} (nnU-Net v2) or {"1": "liver"}."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        turned = {str(k): v for k, v in labels.items()}
        if all(key.isdigit() for key in turned):
            turned = {str(name): int(value) for value, name in turned.items()}
        classes = {k: [int(n) for n in v] if isinstance(v, list) else [int(v)] for k, v in turned.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no usable \"labels\" in it ({type(error).__name__}: {error})") from None
    classes = {k: v for k, v in classes.items() if v != [0] and k != "ignore"}
    values = [value for group in classes.values() for value in group]
    if len(set(values)) != len(values):
        raise InputError(f"{path}: regions overlap; list the classes in a recipe (--dataset FILE.yaml)")
    return dict(sorted(classes.items(), key=lambda item: item[1]))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
