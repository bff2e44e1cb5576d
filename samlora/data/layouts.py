"""The cases in a folder: nnU-Net, Decathlon, BTCV, images + masks, train + test, a folder per case, and others."""

import csv
import dataclasses
import json
import os
import zipfile
from pathlib import Path

from samlora.data.folders import (
    LABEL_WORDS,
    Layout,
    Matched,
    Pair,
    case_of_label,
    entries,
    few,
    folder_or_file,
    image_entries,
    is_dicom_folder,
    is_label,
    label_entries,
    masks_in,
    match,
    match_by_words,
    match_last,
    not_read,
    not_read_note,
    uniform,
    visible,
)
from samlora.data.label_tables import IGNORED, folder_table, plain
from samlora.data.volume import VOLUMES, stem
from samlora.errors import InputError, MissingFileError
from samlora.files import find_file, read_text, same_name

IMAGE_FOLDERS = ("imagestr", "img", "images", "imgs", "image", "jpegimages", "inputs", "scans", "volumes")
LABEL_FOLDERS = ("labelstr", "label", "labels", "masks", "mask", *LABEL_WORDS, "segmentationclass", "targets")
_TRAIN = ("train", "training", "tr")
_VALID = ("val", "valid", "validation")
_TEST = ("test", "testing", "ts")
_DEPTH = 2  # folders in folders in which cases are looked for


class _Nothing(InputError):
    """There is no known layout, as opposed to one with something wrong in it."""


def find_pairs(source: str | os.PathLike) -> Layout:
    """The cases in `source`, sorted by name.

    Known are, in this order: imagesTr/ + labelsTr/ (+ dataset.json; imagesTs/ + labelsTs/ and imagesVa/ + labelsVa/ are
    test cases); images/ + labels/ (or img, masks, ...; cases of img/imgNNNN are called caseNNNN); train/ + test/ (or
    val/), each with one of the others; a dataset.json that lists files; and, in folders up to two levels deep, npz and
    h5 files with image and label, an image beside a folder of masks, one for each structure, and images beside their
    labels. See `folders.match` for names that fit each other.
    Raises MissingFileError or InputError: no such folder, no known layout, nothing in it, in two folders an image
    without a label, two images for one label, cases with different channels.
    """
    source = Path(source)
    if not source.is_dir():
        raise MissingFileError(f"{source}: no such folder; give the folder that holds images and labels")
    layout = _unwrapped(source, _DEPTH)
    layout.pairs = sorted(uniform(layout.pairs, source), key=lambda pair: pair.name)
    return with_names(layout, source)


def with_names(layout: Layout, source: Path) -> Layout:
    """`layout` with the names of label values in a dataset.json or a table near its label maps.

    source: the folder above which nothing is looked for.
    """
    maps = [pair.label for pair in layout.pairs if isinstance(pair.label, Path)]
    if not maps:
        return layout
    if not layout.classes:
        places = dict.fromkeys(path.parent for path in maps)
        folders = [folder for place in places for folder in (place, *place.parents) if _within(folder, source)]
        described = next((file for folder in folders if (file := folder / "dataset.json").is_file()), None)
        try:
            if described is not None:
                values = _json(described)
                layout.classes, layout.ignored = _classes(described, values), _ignored(values)
        except InputError:
            layout.notes.append(f"{described}: names no labels")
        if not layout.classes:
            layout.names, table = folder_table(folders)
            if table is not None:
                layout.notes.append(f"{table.name} names the label values")
    if layout.ignored:
        values = " ".join(map(str, layout.ignored))
        text = f"label value {values} is to be ignored (dataset.json)"
        layout.notes.append(f"{text}: such voxels are in no loss and in no measure")
    names = layout.names or {group[0]: name for name, group in layout.classes.items() if len(group) == 1}
    layout.pairs = [dataclasses.replace(pair, names=names) for pair in layout.pairs]
    return layout


def _within(folder: Path, source: Path) -> bool:
    return folder == source or source in folder.parents


def named_apart(groups: list[tuple[str, list[Pair]]], source: Path) -> tuple[list[Pair], list[str]]:
    """The pairs of several folders, and notes; where folders share a name, all take their folder's in front.

    Raises InputError if a name still occurs twice.
    """
    pairs = [pair for _, group in groups for pair in group]
    twice = _twice(pairs)
    if not twice:
        return pairs, []
    named = [(f"{name}_{pair.name}" if name else pair.name, pair) for name, group in groups for pair in group]
    pairs = [dataclasses.replace(pair, name=name) for name, pair in named]
    again = _twice(pairs)
    if again:
        raise InputError(f"{source}: case {again} occurs twice; rename one of them")
    return pairs, [f"several folders have a case {twice}, so all cases are named FOLDER_NAME, as {pairs[0].name}"]


def _twice(pairs: list[Pair]) -> str | None:
    names = sorted(pair.name for pair in pairs)
    return next((a for a, b in zip(names, names[1:]) if a == b), None)


def _unwrapped(source: Path, depth: int) -> Layout:
    """The layout of `source`, or of the only folder in it, as archives leave them."""
    inside = [path for path in visible(source) if path.is_dir()]
    known = (*IMAGE_FOLDERS, *LABEL_FOLDERS)
    if depth and len(inside) == 1 and not entries(source) and inside[0].name.lower() not in known:
        return _unwrapped(inside[0], depth - 1)
    parts = _parts(source)
    if not parts:
        return _layout(source)
    groups, layouts, notes = [], [], []
    for folder, test in parts:
        try:
            layout = _layout(folder)
        except _Nothing:
            if not test:
                raise
            notes.append(f"{folder.name}/ has no labels and is left out")
            continue
        layouts.append(layout)
        groups.append((folder.name, [dataclasses.replace(pair, test=test) for pair in layout.pairs]))
    names = [name for name, _ in groups]
    if len(parts) == 3 and len(groups) == 3:
        notes.append(f"{names[1]}/ is trained on too: there is a {names[2]}/ for testing")
    elif len(parts) == 3:
        groups[1] = (names[1], [dataclasses.replace(pair, test=True) for pair in groups[1][1]])
    pairs, remarks = named_apart(groups, source)
    first = layouts[0]
    kind = f"{' + '.join(names)}, each {first.kind}" if len(names) > 1 else f"{names[0]}, {first.kind}"
    notes += remarks + [f"{name}/: {note}" for name, layout in zip(names, layouts) for note in layout.notes]
    return Layout(kind, pairs, first.classes, first.channels, notes, first.ignored)


def _parts(source: Path) -> list[tuple[Path, bool]]:
    """Folders for training and testing, in this order; empty if there are none."""
    folders = {path.name.lower(): path for path in visible(source) if path.is_dir()}
    train, valid, test = (next((folders[n] for n in names if n in folders), None) for names in (_TRAIN, _VALID, _TEST))
    if train is None or (valid or test) is None:
        return []
    middle = [(valid, test is None)] if valid else []
    return [(train, False), *middle, *([(test, True)] if test else [])]


def _layout(source: Path) -> Layout:
    folders = {path.name.lower(): path for path in visible(source) if path.is_dir()}
    if "imagestr" in folders and "labelstr" in folders:
        return _nnunet(source, folders)
    if _has_two_folders(source):
        return _two_folders(source)
    if (source / "dataset.json").is_file():
        listed = _listed(source / "dataset.json")
        if listed is not None:
            return listed
    return _searched(source)


def _folders_of(source: Path) -> tuple[list[Path], list[Path]]:
    """The folders of images and those of labels in `source`, the likeliest first."""
    folders = {path.name.lower(): path for path in visible(source) if path.is_dir()}
    both = (dict.fromkeys(names) for names in (IMAGE_FOLDERS, LABEL_FOLDERS))
    return tuple([folders[name] for name in names if name in folders] for names in both)


def _has_two_folders(source: Path) -> bool:
    return all(_folders_of(source))


def _two_folders(source: Path) -> Layout:
    """images/ and a folder of labels; or images/train/, images/test/ and the same of labels."""
    (images, *_), choices = _folders_of(source)
    labels, kind = choices[0], f"{images.name} + {choices[0].name}"
    notes = [f"{path.name}/ is not used: the labels are taken from {labels.name}/" for path in choices[1:]]
    parts = [] if entries(images) else _parts(images)
    if parts and all((labels / folder.name).is_dir() for folder, _ in parts):
        groups = []
        for folder, test in parts:
            matched = _matched(folder, labels / folder.name)
            notes += not_read_note(matched.unread)
            groups.append((folder.name, [dataclasses.replace(pair, test=test) for pair in matched.pairs]))
        pairs, remarks = named_apart(groups, images.parent)
        return Layout(
            f"{kind}, each with {' + '.join(name for name, _ in groups)}", pairs, {}, matched.tags, notes + remarks
        )
    matched = _matched(images, labels)
    btcv = (images.name, labels.name) == ("img", "label") and all(p.name.startswith("case") for p in matched.pairs)
    pairs, _ = named_apart([("", matched.pairs)], images.parent)
    return Layout("BTCV (img + label)" if btcv else kind, pairs, {}, matched.tags, notes + _lonely(matched))


def _matched(images: Path, labels: Path) -> Matched:
    """The pairs of two folders; every image needs a label."""
    image_files, label_files = image_entries(images), label_entries(labels)
    for folder, found in ((images, image_files), (labels, label_files)):
        if not found:
            raise _Nothing(f"{folder}: no volumes in it; {' '.join(VOLUMES)} and folders of DICOM slices are read")
    matched = match(image_files, label_files, apart=True)
    masks = [folder_or_file(label) for label in label_files.values()]
    matched.unread = [*not_read(images), *not_read(labels, taken=masks)]
    if matched.alone:
        image = matched.alone[0]
        ending = "".join(image.suffixes[-2:] if image.suffix == ".gz" else image.suffixes[-1:]) or ".nii.gz"
        advice = f"add {stem(image)}{ending} there or move the image"
        raise InputError(f"{image}: has no label in {labels}; {advice}")
    return matched


def _lonely(matched: Matched) -> list[str]:
    names = [path.name for path in matched.lonely]
    lonely = [f"{len(names)} labels without an image are left out: {few(names)}"] if names else []
    return lonely + not_read_note(matched.unread)


def _nnunet(source: Path, folders: dict[str, Path]) -> Layout:
    description = source / "dataset.json"
    classes, channels, ignored, kind = {}, (), (), "nnU-Net"
    if description.is_file():
        values = _json(description)
        classes, channels, ignored = _classes(description, values), _channels(values), _ignored(values)
        numbered = any(name.endswith("_0000") for name in entries(folders["imagestr"]))
        kind = kind if numbered or "training" not in values else "Decathlon"
    matched = _matched(folders["imagestr"], folders["labelstr"])
    pairs, notes = matched.pairs, _lonely(matched)
    for ending in ("va", "ts"):
        images, labels = (folders.get(name + ending) for name in ("images", "labels"))
        if images is not None and labels is not None and label_entries(labels):
            more = _matched(images, labels)
            pairs, notes = pairs + [dataclasses.replace(p, test=True) for p in more.pairs], notes + _lonely(more)
        elif images is not None:
            notes.append(f"{images.name} has no labels and is left out")
    pairs, _ = named_apart([("", pairs)], source)
    return Layout(kind, pairs, classes, channels or matched.tags, notes, ignored)


def _listed(description: Path) -> Layout | None:
    """The files that a dataset.json names: Decathlon's lists of image and label, or nnU-Net's "dataset"."""
    values, folder = _json(description), description.parent
    listed: list[tuple[str, dict, bool]] = []
    if isinstance(values.get("dataset"), dict):
        listed = [(name, item, False) for name, item in values["dataset"].items()]
    for part in ("training", "validation"):
        listed += [("", item, part != "training") for item in values.get(part) or [] if isinstance(item, dict)]
    pairs = []
    for name, item, test in listed:
        try:
            files = item.get("images", item.get("image"))
            files = tuple(_listed_file(folder, file) for file in ([files] if isinstance(files, str) else files))
            label = _listed_file(folder, item["label"])
        except (KeyError, TypeError):
            raise InputError(f"{description}: {json.dumps(item)[:80]} names no image and label; correct it") from None
        gone = next((path for path in (*files, label) if not path.exists()), None)
        if gone is not None:
            raise MissingFileError(f"{gone}: no such file, but {description} names it; correct the list")
        pairs.append(Pair(name or stem(label), files, label, test))
    if not pairs:
        return None
    pairs, _ = named_apart([("", pairs)], folder)
    classes, ignored = _classes(description, values), _ignored(values)
    return Layout("Decathlon (dataset.json)", pairs, classes, _channels(values), [], ignored)


def _listed_file(folder: Path, name: str) -> Path:
    """A file that a list names, which may have been made on Windows."""
    path = find_file(folder / name)
    return find_file(folder / name.replace("\\", "/")) if not path.exists() and "\\" in name else path


def _json(path: Path) -> dict:
    try:
        values = json.loads(read_text(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); correct or remove it") from None
    if not isinstance(values, dict):
        raise InputError(f'{path}: no usable "labels" in it; correct or remove it')
    return values


def _channels(values: dict) -> tuple[str, ...]:
    """Names of the channels: nnU-Net v2 calls them channel_names, the older ones and Decathlon modality."""
    names = values.get("channel_names", values.get("modality"))
    if isinstance(names, dict) and all(str(key).isdigit() for key in names):
        return tuple(str(names[key]) for key in sorted(names, key=int))
    return (names,) if isinstance(names, str) else ()


def _classes(path: Path, values: dict) -> dict[str, list[int]]:
    """Its classes, either way round: {"liver": 1} (nnU-Net v2) or {"1": "liver"}; regions may overlap."""
    try:
        turned = {str(k): v for k, v in values["labels"].items()}
        if all(key.isdigit() for key in turned):
            turned = {str(name): int(value) for value, name in turned.items()}
        classes = {k: [int(n) for n in v] if isinstance(v, list) else [int(v)] for k, v in turned.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path}: no usable "labels" in it ({type(error).__name__}: {error})') from None
    classes = {k: v for k, v in classes.items() if v != [0] and plain(k) not in IGNORED}
    return dict(sorted(classes.items(), key=lambda item: item[1]))


def _ignored(values: dict) -> tuple[int, ...]:
    """The values that a dataset.json calls "ignore": voxels that nobody has labelled. `_classes` has checked it."""
    pairs = [(str(key), value) for key, value in values["labels"].items()]
    named = [(value, key) if key.isdigit() else (key, value) for key, value in pairs]
    found = [int(value) for name, value in named if plain(str(name)) in IGNORED and not isinstance(value, list)]
    return tuple(value for value in found if value)


def _searched(source: Path) -> Layout:
    """The cases in the folders of `source`, wherever images and labels lie side by side."""
    groups: list[tuple[str, list[Pair]]] = []
    kinds, notes, total = [], [], Matched()
    for folder in _folders(source, _DEPTH):
        name = "_".join(folder.relative_to(source).parts)
        if _has_two_folders(folder):
            layout = _two_folders(folder)
            found = [(layout.kind, Matched(layout.pairs, tags=layout.channels))]
            notes += [f"{name}/: {note}" for note in layout.notes]
        else:
            found = _in_folder(folder, entries(folder))
            inside = [path for path in visible(folder) if path.is_dir()]
            total.unread += not_read(folder, taken=inside)
        for kind, matched in found:
            if matched.pairs:
                kinds.append(kind)
                groups.append((name, matched.pairs))
            total.add(matched)
    if not total.pairs:
        raise _Nothing(_not_found(source, total))
    pairs, remarks = named_apart(groups, source)
    notes += remarks
    kind = " and ".join(dict.fromkeys(kinds))
    if any(group for group, _ in groups):
        kind = f"folders of cases, {kind}"
    if total.alone:
        names = dict.fromkeys(path.name for path in total.alone)
        notes.append(f"{len(total.alone)} files without a label are left out: {few(names)}")
    notes += _lonely(total)
    split = _split(source / "meta.csv")
    if split:
        pairs = [dataclasses.replace(pair, test=split.get(pair.name) == "test") for pair in pairs]
        notes.append(f"meta.csv keeps {sum(pair.test for pair in pairs)} of the cases for testing")
    return Layout(kind, pairs, {}, total.tags, notes)


def _folders(folder: Path, depth: int) -> list[Path]:
    """`folder` and the folders in it, but not those of DICOM slices or of labels."""
    found = [folder]
    if depth and not _has_two_folders(folder):
        for path in visible(folder):
            if path.is_dir() and path.name.lower() not in LABEL_FOLDERS and not is_dicom_folder(path):
                found += _folders(path, depth - 1)
    return found


def _in_folder(folder: Path, files: dict[str, Path]) -> list[tuple[str, Matched]]:
    """What one folder holds itself, by the ways in which image and label can lie side by side."""
    both = {name: path for name, path in files.items() if _holds_both(path)}
    files = {name: path for name, path in files.items() if name not in both}
    found = [("files with image and label", Matched([Pair(name, (path,), path) for name, path in both.items()]))]
    masks = next((p for p in visible(folder) if p.is_dir() and p.name.lower() in LABEL_FOLDERS and masks_in(p)), None)
    if masks is not None and files:
        images = match_by_words(folder, files | {"mask": masks})
        if images.pairs:
            pair = dataclasses.replace(images.pairs[0], label=masks_in(masks))
            return [*found, (f"an image beside its masks in {masks.name}", dataclasses.replace(images, pairs=[pair]))]
    labels = {name: path for name, path in files.items() if is_label(name)}
    rest = {name: path for name, path in files.items() if name not in labels}
    matched = match_by_words(folder, files)
    matched = matched if matched.pairs else match(rest, labels, apart=False)
    if not matched.pairs and masks is None:
        last = match_last(folder, files)
        matched = last if last.pairs else matched
    if masks is not None and files and not matched.pairs:
        return [*found, (f"images beside {masks.name}/", match(files, label_entries(masks), apart=True))]
    return [*found, ("images beside their labels", matched)]


def _holds_both(path: Path) -> bool:
    """Whether an npz or h5 file holds an image and its label; only the list of its arrays is read."""
    ending = path.suffix.lower()
    try:
        if ending == ".npz":
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
        elif ending == ".h5":
            import h5py

            with h5py.File(path, "r") as file:
                names = set(file)
        else:
            return False
    except (OSError, zipfile.BadZipFile):
        return True  # its reader says what is wrong with it
    return {"imgs", "gts"} <= names or {"image", "label"} <= names


def _split(table: Path) -> dict[str, str]:
    """Case -> train, val or test, of a table with the columns image_id and split; empty without one."""
    if not table.is_file():
        return {}
    lines = read_text(table).splitlines()
    head = lines[0] if lines else ""
    delimiter = next((sign for sign in ";\t" if sign in head), ",")
    rows = list(csv.DictReader(lines, delimiter=delimiter))
    return {same_name(row["image_id"]): row["split"] for row in rows if row.get("image_id") and row.get("split")}


def _not_found(source: Path, total: Matched) -> str:
    example = "images/CASE.nii.gz + labels/CASE.nii.gz, or CASE.nii.gz + CASE_label.nii.gz"
    if total.lonely:
        label = total.lonely[0]
        beside = few(path.name for path in total.alone if path.parent == label.parent)
        wanted = f"none is named {case_of_label(stem(label))}{f' (there are {beside})' if beside else ''}"
        return f"{label}: which image it belongs to is not clear: {wanted}; name both alike, as in {example}"
    found = few([path.name for path in visible(source)], 8) or "nothing"
    known = "images + labels (or masks), or imagesTr + labelsTr, or images beside their labels"
    return f"{source}: two folders such as {known} ({example}; also in a folder per case), are needed; found {found}"
