"""Cases as they come: their images as volumes, their labels as classes, and images that have no labels."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from samlora.data.dicom import list_series
from samlora.data.dicom_header import DIRECTORY, holds_image, storage
from samlora.data.folders import (
    IMAGE_WORDS,
    Layout,
    Pair,
    channel_of,
    few,
    image_entries,
    is_dicom_folder,
    may_be_label,
    not_read,
    visible,
)
from samlora.data.grid import Volume, count_values, match_grid
from samlora.data.label_tables import names_beside, plain
from samlora.data.layouts import IMAGE_FOLDERS, LABEL_FOLDERS, named_apart
from samlora.data.pictures import PICTURES, is_lossy
from samlora.data.recipe import Recipe
from samlora.data.structures import folder_names, own_structures
from samlora.data.volume import VOLUMES, read_volume, stem
from samlora.errors import InputError, MissingFileError
from samlora.files import find_file, same_name

_MOST_CHANNELS = 8  # files numbered higher are slices or frames
_NO_DICOM = tuple(ending for ending in VOLUMES if ending != ".dcm")
_DISC_DEPTH = 4  # DICOM/PATIENT/STUDY/SERIES below a DICOMDIR
_MANY = 20  # label values in a message
VOIDS = (255, 65535)  # the highest value of a type marks what nobody has labelled, where classes count from 1
_MOST_COUNTED = 64  # classes that count from 1 are below it


def read_image(pair: Pair, series: str | None = None) -> Volume:
    """The image of a case: (i, j, k), or (i, j, k, c) for several channels or colours.

    series: which one of DICOM folders, see `read_volume`. Several files are stacked in their order. Raises what
    `read_volume` raises, and InputError if the files lie on different grids or have several channels themselves.
    """
    volumes = [read_volume(path, series=series) for path in pair.images]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    arrays = []
    for volume in volumes:
        if volume.array.ndim != 3:
            raise InputError(f"{volume.path}: has {volume.array.shape[3]} channels, but is one channel of {pair.name}")
        try:
            arrays.append(match_grid(volume, first).array)
        except InputError as error:
            advice = "resample the channels of a case onto one grid"
            raise InputError(f"{str(error).split('; resample')[0]}; {advice}") from None
    return dataclasses.replace(first, array=np.stack(arrays, axis=-1))


def read_label(pair: Pair, image: Volume, recipe: Recipe) -> tuple[Volume, list[str]]:
    """The label map of a case on the grid of `image`, uint8 0..num_classes, and remarks on what was lost.

    A label map goes through `recipe.map_labels`; masks are painted in the order of the classes, later ones over earlier
    ones, and what is above 0 (or `mask_threshold`) belongs to them. A structure without a file is not in the case.
    Raises what `read_volume` raises, and InputError if the grids differ or the recipe does not fit (`resolve_classes`).
    """
    if pair.label is None:
        raise InputError(f"{pair.images[0]}: has no label")
    if isinstance(pair.label, Path):
        label = on_grid(read_label_map(pair, recipe.mask_threshold), image)
        try:
            mapped = recipe.map_labels(label.array, label.names)
        except InputError as error:
            raise InputError(f"{pair.label}: {error}") from None
        lost = np.unique(label.array[(mapped == 0) & (label.array != 0)]).tolist()
        called = [" + ".join(label.names.get(value, [str(value)])) if label.names else str(value) for value in lost]
        shown = " ".join(called[:_MANY]) + (" ..." if len(lost) > _MANY else "")
        remarks = [f"label values that no class lists became background: {shown}"] if lost else []
        remarks += _overlaps(label, recipe) + _otherwise_named(label, recipe)
        return dataclasses.replace(label, array=mapped, names=None), remarks
    array = np.zeros(image.array.shape[:3], np.uint8)
    remarks = []
    for index, names in enumerate(recipe.label_values, start=1):
        mask = np.zeros(array.shape, bool)
        for path in (path for name in names for path in pair.label.get(name, ())):
            mask |= on_grid(_read_mask(path, recipe.mask_threshold), image).array != 0
        for earlier, count in count_values(array[mask][None]).items():
            if earlier:
                one, other = recipe.classes[earlier - 1], recipe.classes[index - 1]
                remarks.append(_overlap(one, other, count / mask.sum()))
        array[mask] = index
    return dataclasses.replace(image, array=array), remarks


def read_label_map(pair: Pair, threshold: float | None = None) -> Volume:
    """The label map of a case as it is stored, with the names of its values where they are known.

    The names are those in the file, else in a table beside it that has its name, else those of the whole folder.
    threshold: the recipe's mask_threshold, which leaves one class without a name. Raises what `read_volume` raises.
    """
    volume = read_volume(pair.label, labels=True, threshold=threshold)
    if threshold is None and volume.names is None:
        beside = names_beside(pair.label, stem(pair.label))
        volume.names = beside or {value: (name,) for value, name in pair.names.items()} or None
    return volume


def ignored_values(values: Iterable[int | str], ignored: Sequence[int] = ()) -> set[int]:
    """Which of the values in label maps mark voxels to be ignored, and so are no classes.

    ignored: those that the data set says. Beside them, as in PASCAL VOC, the highest value of the type where all others
    are small, such as 1 2 255; alone, beside one other value, or beside levels of gray, it may well be a class.
    """
    numbers = {value for value in values if isinstance(value, int) and value > 0}
    found = numbers & set(ignored)
    for void in VOIDS:
        others = numbers - {void} - found
        if void in numbers and len(others) > 1 and max(others) < _MOST_COUNTED:
            found.add(void)
    return found


def _overlap(one: str, other: str, share: float) -> str:
    # In steps, so that the remarks of many cases can be told together.
    size = "less than 1 %" if share < 0.01 else "1 to 10 %" if share < 0.1 else "more than 10 %"
    return f"{one} and {other} overlap; the voxels became {other}, {size} of it"


def _overlaps(label: Volume, recipe: Recipe) -> list[str]:
    """Remarks on values of a label map that show several classes."""
    if not label.names or all(len(names) == 1 for names in label.names.values()):
        return []
    groups = recipe.values_in(label.names)
    counts = count_values(label.array)
    remarks = []
    for index, group in enumerate(groups, start=1):
        total = sum(counts.get(value, 0) for value in group)
        for earlier, other in enumerate(groups[: index - 1], start=1):
            shared = sum(counts.get(value, 0) for value in set(group) & set(other))
            if shared:
                names = recipe.classes[earlier - 1], recipe.classes[index - 1]
                remarks.append(_overlap(*names, shared / total))
    return remarks


def _otherwise_named(label: Volume, recipe: Recipe) -> list[str]:
    """Remarks on classes whose numbers the label map gives to other structures."""
    names = label.names or {}
    known = {plain(name) for found in names.values() for name in found}
    remarks = []
    for name, values in zip(recipe.classes, recipe.label_values):
        for value in values:
            called = names.get(value, ()) if isinstance(value, int) else ()
            if called and plain(name) in known and plain(name) not in map(plain, called):
                text = f"class {name} takes value {value}, which the label file calls {called[0]}"
                remarks.append(f"{text}; name the class in the recipe ({name}: {name}) instead of its number")
    return remarks


def on_grid(label: Volume, image: Volume) -> Volume:
    """`label` on the grid of `image`; of pictures, and DICOM with masks as pictures, the sizes decide.

    A label that covers a part of the image's grid is empty in the rest.
    """
    size, wanted = label.array.shape, image.array.shape[:3]
    path = Path(image.path)
    indexed_alike = not image.has_spacing or path.is_dir() or path.suffix.lower() == ".dcm"
    if label.has_spacing or not indexed_alike:
        return match_grid(label, image, part=True)
    if size != wanted:
        one, other = (" x ".join(map(str, shape[: 2 if shape[2] == 1 else 3])) for shape in (size, wanted))
        raise InputError(
            f"{label.path}: {one} pixels (width x height), but its image {image.path} has {other}; "
            "save the mask at the image's size, by nearest neighbour"
        )
    return dataclasses.replace(image, array=label.array, path=label.path, names=label.names)


def label_values(pair: Pair, threshold: float | None = None) -> dict[int | str, int]:
    """What the label of a case shows, without the background: value -> voxels, or structure -> voxels, perhaps 0.

    Values that the label file itself names count as structures. threshold: the recipe's mask_threshold.
    Raises what `read_volume` raises.
    """
    if pair.label is None:
        return {}
    if isinstance(pair.label, Path):
        label = read_label_map(dataclasses.replace(pair, names={}), threshold)
        return named_values(count_values(label.array), label.names)
    found = {}
    for name, paths in pair.label.items():
        masks = [_read_mask(path, threshold).array for path in paths]
        # Parts on different grids are an error where they are read to be used.
        same = all(mask.shape == masks[0].shape for mask in masks)
        found[name] = int(np.count_nonzero(np.any(masks, axis=0) if same else masks[0]))
    return found


def named_values(counts: Mapping[int, int], names: Mapping[int, Sequence[str]] | None) -> dict[int | str, int]:
    """Voxels of each value, background left out, those with a name under their name; overlaps count for each."""
    found: dict[int | str, int] = {}
    for value, count in counts.items():
        for key in (names or {}).get(value, (value,)) if value else ():
            found[key] = found.get(key, 0) + count
    return found


def resolve_classes(
    recipe: Recipe,
    layout: Layout,
    values: Callable[[Sequence[Pair]], Iterable[Iterable[int | str]]] | None = None,
) -> Recipe:
    """`recipe` with classes that fit the labels of `layout`: numbers for label maps, names for masks.

    Names become the values that dataset.json, or a table for all label maps, gives them; names that label maps give
    their own values stay, as every map may number them otherwise (`Recipe.map_labels`). A recipe without classes takes
    those of dataset.json, else the names of the masks, else what `values` finds in the label maps (by default
    `label_values` of one after the other): their own names, and one class for each value above 0 without one, named
    label_VALUE; with a mask_threshold, the one class `foreground`. Values to be ignored are no classes: those that the
    recipe lists, that dataset.json calls so, and of a recipe without classes 255 beside small ones.
    Raises InputError: a name or a structure that is not there, numbers for masks, no or too many values.
    """
    recipe, voids = _with_classes(recipe, layout, values or (lambda pairs: map(label_values, pairs)))
    if recipe.mask_threshold is not None or any(isinstance(pair.label, dict) for pair in layout.pairs):
        return recipe  # masks mark nothing but what they show
    listed = {value for group in recipe.label_values for value in group}
    ignored = {*layout.ignored, *voids} - listed
    return dataclasses.replace(recipe, ignore=recipe.ignore or tuple(sorted(ignored)))


def _with_classes(
    recipe: Recipe,
    layout: Layout,
    values: Callable[[Sequence[Pair]], Iterable[Iterable[int | str]]],
) -> tuple[Recipe, set[int]]:
    """The recipe with classes, as of `resolve_classes`, and the values found that mark voids."""
    voids: set[int] = set()
    structures = sorted({name for pair in layout.pairs if isinstance(pair.label, dict) for name in pair.label})
    if recipe.classes and recipe.mask_threshold is not None and not structures:
        if recipe.num_classes > 1:
            known = f"{recipe.num_classes} classes ({few(recipe.classes)})"
            raise InputError(f"mask_threshold {recipe.mask_threshold:g}: makes one class of label maps, not {known}")
        return dataclasses.replace(recipe, label_values=((1,),)), voids
    if recipe.classes and structures:
        known = {name: (name,) for name in structures}
        return _with_values(recipe, known, "masks", numbers=False), voids
    if recipe.classes:
        known = {name: tuple(values) for name, values in layout.classes.items()}
        known = known or {name: (value,) for value, name in layout.names.items()}
        wanted = [value for values in recipe.label_values for value in values if isinstance(value, str)]
        if wanted:
            own = own_structures(layout.pairs)
            # Where label maps have names of their own, the folder's serve those that have none (`read_label_map`).
            known = {name: values for name, values in known.items() if plain(name) not in own}
            known |= {name: (name,) for name in own.values()}
        return _with_values(recipe, known, "labels", numbers=True), voids
    if structures:
        classes = {name: (name,) for name in structures}
    elif recipe.mask_threshold is not None:
        classes = {"foreground": (1,)}
    elif layout.classes and not own_structures(layout.pairs):
        classes = {name: tuple(group) for name, group in layout.classes.items()}
        listed = [value for group in classes.values() for value in group]
        if len(set(listed)) != len(listed):
            raise InputError("dataset.json: its regions overlap; list the classes in a recipe (--dataset FILE.yaml)")
    else:
        found = {value for one in values(layout.pairs) for value in one}
        numbers = {value for value in found if isinstance(value, int) and value > 0}
        voids = ignored_values(numbers, layout.ignored)
        numbers -= {*voids, *recipe.ignore}
        own = {}
        for name in sorted(value for value in found if isinstance(value, str)):
            own.setdefault(plain(name), name)
        if own:  # label maps without names of their own go by the folder's
            named = folder_names(layout)
            for name in (named[value] for value in sorted(numbers & named.keys())):
                own.setdefault(plain(name), name)
            numbers -= named.keys()
        classes = {layout.names.get(value, f"label_{value}"): (value,) for value in sorted(numbers)}
        classes |= {name: (name,) for key, name in own.items() if key != "background"}
    if not 0 < len(classes) < 256:
        label = layout.pairs[0].label
        where = label.parent if isinstance(label, Path) else "masks"
        raise InputError(
            f"{where}: {len(classes)} different label values in its files, 1 to 255 can be used; list the classes in a "
            "recipe (--dataset FILE.yaml)"
        )
    labels = tuple(classes.values())
    return dataclasses.replace(recipe, classes=tuple(classes), label_values=labels), voids


def find_images(sources: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Pair]:
    """The images in files and folders, sorted by name, as pairs without labels; what is named as labels is left out.

    A folder of DICOM slices is one image (or one for each file, if each is a series of its own); of a data set its
    imagesTs/ or images/ is taken; folders are looked into two levels deep, below a DICOMDIR four. nnU-Net's numbered
    channels (X_0000, X_0001) and weightings (X_t1, X_t2) that all cases have become the channels of one image. Images
    of the same name take their folder's in front. Raises MissingFileError or InputError: nothing there, nothing that
    can be read.
    """
    sources = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    sources = [find_file(source) for source in sources]
    groups: dict[Path, dict[str, Path]] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise MissingFileError(f"{source}: no such file or folder; give images, or folders of images")
        if source.is_dir():
            found = _images_in(source, depth=2)
            if not found:
                inside = few([path.name for path in visible(source)]) or "nothing"
                raise InputError(f"{source}: no images in it (labels are left out); found {inside}")
        else:
            found = [source]
        for path in found:
            groups.setdefault(path.parent, {}).setdefault(_name(path), path)
    listed, far_apart = [], []
    top = Path(os.path.commonpath([folder.absolute() for folder in groups]))
    for folder, images in groups.items():
        in_front = folder.absolute().parent if folder.name in images else folder.absolute()
        grouped = _grouped(folder, images)
        listed.append((in_front.name, grouped))
        parts = in_front.relative_to(top).parts if in_front.is_relative_to(top) else ()
        far_apart.append(("_".join(parts), grouped))
    try:
        pairs, _ = named_apart(listed, Path(sources[0]))
    except InputError:  # PATIENT/STUDY/SERIES, where studies and series are named alike
        pairs, _ = named_apart(far_apart, Path(sources[0]))
    return sorted(pairs, key=lambda pair: pair.name)


def left_out(sources: Sequence[str | os.PathLike]) -> list[Path]:
    """What `find_images` passes over in the folders that it looks into because it is of no kind that is read."""
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir() and not is_dicom_folder(source):
            found += _not_read_below(source, depth=2)
    return found


def _not_read_below(folder: Path, depth: int) -> list[Path]:
    inside = [path for path in visible(folder) if path.is_dir()]
    found = not_read(folder, taken=inside)
    for path in inside if depth else ():
        if path.name.lower() not in LABEL_FOLDERS and not is_dicom_folder(path):
            found += _not_read_below(path, depth - 1)
    return found


def _images_in(folder: Path, depth: int) -> list[Path]:
    inside = {path.name.lower(): path for path in visible(folder) if path.is_dir()}
    if any(path.is_file() and storage(path) == DIRECTORY for path in visible(folder)):
        depth = max(depth, _DISC_DEPTH)
    if is_dicom_folder(folder):
        below = [path for name, path in inside.items() if depth and name not in LABEL_FOLDERS]
        return [*_dicom_in(folder), *(path for one in below for path in _images_in(one, depth - 1))]
    data_set = next((inside[name] for name in ("imagests", *IMAGE_FOLDERS) if name in inside), None)
    files = image_entries(folder)
    if data_set is not None and not files:
        return _images_in(data_set, depth)
    beside = _dicom_beside(folder, files)
    files = {name: path for name, path in files.items() if path not in beside}
    found = {name: path for name, path in files.items() if not may_be_label(name)}
    whole = [path for name, path in found.items() if name.lower() in IMAGE_WORDS]
    if len(whole) == 1 and not whole[0].is_dir() and not beside:
        return whole  # what lies beside it, such as scribbles, is no image of its own
    deeper = [path for name, path in inside.items() if depth and name not in LABEL_FOLDERS and path.name not in files]
    slices = [path for one in found.values() for path in (_images_in(one, 0) if one.is_dir() else [one])]
    series = _dicom_in(folder) if beside else []
    return [*series, *slices, *(path for folder in deeper for path in _images_in(folder, depth - 1))]


def _dicom_beside(folder: Path, files: Mapping[str, Path]) -> set[Path]:
    """The DICOM images among and beside other images, such as pictures of them; empty without either."""
    if all(path.is_dir() or path.name.lower().endswith(".dcm") for path in files.values()):
        return set()
    others = {path for path in files.values() if not path.name.lower().endswith(".dcm")}
    inside = {path for path in visible(folder) if path.is_file() and not path.name.lower().endswith(_NO_DICOM)}
    return {path for path in inside - others if holds_image(path)}


def _dicom_in(folder: Path) -> list[Path]:
    """The images that the DICOM files in a folder are: the folder, or one for each file."""
    try:
        series = list_series(folder)
    except InputError:  # said of this image when it is read, so that the others are not kept back
        return [folder]
    alone = len(series) > 1 and all(len(one.files) == 1 for one in series)
    return sorted(one.files[0] for one in series) if alone else [folder]


def _name(path: Path) -> str:
    name = same_name(path.name) if path.is_dir() else stem(path)
    return path.absolute().parent.name if name.lower() in IMAGE_WORDS else name


def _grouped(folder: Path, images: dict[str, Path]) -> list[Pair]:
    """The images of one folder, channels together where every case has the same ones."""
    tagged = {name: channel_of(name) for name in images}
    cases: dict[str, dict[str, Path]] = {}
    for name, found in tagged.items():
        if found:
            cases.setdefault(found[0], {})[found[1]] = images[name]
    sets = {tuple(sorted(channels)) for channels in cases.values()}
    tags = sets.pop() if len(sets) == 1 and all(tagged.values()) else ()
    if tags and tags[0].isdigit():
        numbered = tags == tuple(f"{n:04d}" for n in range(len(tags))) and len(tags) <= _MOST_CHANNELS
        drawn = any(path.name.lower().endswith(PICTURES) for path in images.values())
        named = folder.name.lower() in ("imagestr", "imagesva", "imagests")
        tags = tags if numbered and (named or len(tags) == 1 or not drawn) else ()
    elif len(tags) == 1:
        tags = ()  # the weighting is part of the name
    if not tags:
        return [Pair(name, (path,), None) for name, path in images.items()]
    return [Pair(case, tuple(channels[tag] for tag in tags), None) for case, channels in cases.items()]


def _read_mask(path: Path, threshold: float | None) -> Volume:
    """A mask: above 0 where nothing else is said; a JPEG needs a threshold, its background is not 0."""
    lossy = is_lossy(path)
    return read_volume(path, labels=True, threshold=0 if threshold is None and not lossy else threshold)


def _with_values(recipe: Recipe, known: dict[str, tuple], what: str, numbers: bool) -> Recipe:
    """The recipe with every label value replaced by what `known` says of it; numbers: they may stay as they are."""
    alike = {plain(name): values for name, values in known.items()}
    resolved = []
    for name, values in zip(recipe.classes, recipe.label_values):
        group: list[int | str] = []
        for value in values:
            if isinstance(value, int) and not numbers:
                have = f"here every structure has masks of its own; give their names: {few(known, 8)}"
                raise InputError(f"class {name}: value {value}, but {have}")
            if isinstance(value, int):
                group.append(value)
            elif value in known or plain(value) in alike:
                group += known.get(value, alike.get(plain(value), ()))
            elif not known:
                why = f"no dataset.json says which value {value!r} has, nor do the label files"
                raise InputError(f"class {name}: {why}; give its number")
            else:
                close = difflib.get_close_matches(plain(value), alike, n=1, cutoff=0)
                nearest = next(name for name in known if plain(name) == close[0])
                there = f"did you mean {nearest!r}? There are {few(known, 8)}"
                raise InputError(f"class {name}: there are no {what} named {value!r}; {there}")
        resolved.append(tuple(dict.fromkeys(group)))
    return dataclasses.replace(recipe, label_values=tuple(resolved))
