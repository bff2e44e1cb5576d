"""`samlora check`: reads all of a data set once, before any hour of training, and says what will go wrong."""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from samlora.data.check_source import check_source
from samlora.data.findings import (
    Finding,
    Look,
    Report,
    Row,
    classes_without_cases,
    few,
    judge,
    measure,
    mixed_channels,
    outside_unit_range,
    runs,
    slice_marks,
    tabulate,
    without_path,
)
from samlora.data.grid import Case, case_to_volume
from samlora.data.ignored import split_ignored
from samlora.data.recipe import Recipe
from samlora.data.volume import read_case, read_slice, stem
from samlora.errors import InputError, MissingFileError
from samlora.files import read_text, same_name

_ENDINGS = {"train": ".npz", "test": ".npy.h5"}
_INNER = {"train": "train_npz", "test": "test_vol_h5"}
_DEFAULT_CLASSES = 8  # what train.py assumes where neither a flag nor a recipe says it


def check(
    path: str | os.PathLike,
    *,
    num_classes: int | None = None,
    recipe: Recipe | str | os.PathLike | None = None,
    threads: int = 4,
) -> Report:
    """Looks at everything in `path`: data that `samlora prepare` has made or that SAMed publishes, or a source for it.

    path: the folder of train_npz/ and test_vol_h5/, one of these two, or a folder of images and labels. num_classes:
    foreground classes, where no recipe says it. recipe: a Recipe, a name or a YAML file; for prepared data the
    recipe.yaml beside them goes first. threads: files read at the same time.
    A file that cannot be used is a finding. Raises InputError or MissingFileError when there is nothing to look at.
    """
    path = Path(path)
    if not path.is_dir():
        raise MissingFileError(f"{path}: there is no such folder; give prepared data, or a folder of images and labels")
    if num_classes is not None and not 1 <= num_classes <= 255:
        raise InputError(f"--num_classes {num_classes}: 1 to 255 foreground classes are possible")
    if recipe is not None and not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    folders = _prepared_folders(path)
    if not folders:
        return check_source(path, num_classes, recipe, lambda function, items: _parallel(function, items, threads))
    return _check_prepared(path, folders, num_classes, recipe, threads)


def _check_prepared(
    path: Path, folders: dict[str, Path], num_classes: int | None, recipe: Recipe | None, threads: int
) -> Report:
    # An inner folder is looked at alone, but what stands beside it is known.
    root = path.parent if path.name in _INNER.values() else path
    stored, findings = _stored_recipe(root)
    recipe = stored or recipe
    files = [
        (side, file)
        for side, folder in folders.items()
        for file in sorted(folder.glob(f"*{_ENDINGS[side]}"))
        if not file.name.startswith(".")
    ]
    if not files:
        raise InputError(f"{path}: holds neither training slices (*.npz) nor test volumes (*.npy.h5); prepare some")
    looks = _parallel(lambda item: _look(*item, root, recipe, stored), files, threads)
    rows = tabulate(looks)
    patient_of = str if recipe is None else recipe.patient_of
    findings += judge(looks, rows, patient_of, labelled=True) + mixed_channels(looks)
    findings += _labels(looks, rows, num_classes, recipe) + outside_unit_range(rows)
    findings += _sizes(looks, recipe) + _lists(root, folders, files) + _records(root, folders, looks, stored)
    if path == root:
        findings += _sides(folders, files)
    known = _known(num_classes, recipe)
    names = dict(enumerate(recipe.classes, start=1)) if recipe is not None and recipe.classes else {}
    present = {value for row in rows for value in row.voxels if value != 0}
    shown = sorted({*names, *range(1, (known or 0) + 1), *present})
    names = {value: names.get(value, "") for value in shown}
    findings += classes_without_cases(rows, {v: n for v, n in names.items() if known and v <= known})
    return Report(path, "prepared data", rows, names, findings)


def _prepared_folders(path: Path) -> dict[str, Path]:
    """Side -> folder of prepared files; empty where `path` holds none."""
    folders = {side: path / inner for side, inner in _INNER.items() if (path / inner).is_dir()}
    if folders:
        return folders
    for side, ending in _ENDINGS.items():
        files = [file for file in sorted(path.glob(f"*{ending}")) if not file.name.startswith(".")]
        if files and (side == "test" or path.name == _INNER[side] or any(map(_is_slice, files[:5]))):
            folders[side] = path
    return folders


def _is_slice(file: Path) -> bool:
    """Whether an archive is one of SAMed's slices: other data sets keep images, or whole volumes, in npz too."""
    headers = _npz_headers(file)
    return "image" in headers and len(headers.get("label", ((),))[0]) == 2


def _look(side: str, file: Path, root: Path, recipe: Recipe | None, stored: Recipe | None) -> Look:
    """What one npz or h5 file holds; whatever is wrong with it stands in `trouble`."""
    name = str(file.relative_to(root))
    look = Look(name, stem(file).rsplit("_slice", 1)[0] if side == "train" else stem(file), side)
    try:
        if side == "train":
            image, label = read_slice(file)
            image, label, case = image[None], label[None], None
        else:
            case = read_case(file)
            image, label = case.image, case.label
    except InputError as error:
        look.trouble.append((name, without_path(error, file)))
        return look
    if case is None and stored is not None:
        label, _ = split_ignored(label, stored.to_dict())
    look.types = _types(file, side)
    look.shape = image.shape[1:3] if side == "train" else image.shape[:3]
    look.channels = 1 if image.ndim == 3 else image.shape[3]
    measure(look, image, label)
    size = None if recipe is None or side == "train" else recipe.size
    middle = recipe is not None and recipe.channels == "neighbours" and side == "train" and look.channels == 3
    look.marks = slice_marks(image[..., 1] if middle else image, size)
    if case is not None:
        look.trouble += [(name, text) for text in _case_trouble(case, stored)]
    return look


def _case_trouble(case: Case, stored: Recipe | None) -> Iterator[str]:
    if case.label is None:
        yield "holds no label; test.py measures against labels"
    if case.geometry is not None:
        try:
            case_to_volume(case, case.image)
        except InputError as error:
            yield without_path(error, case.name)
    if case.recipe is not None:
        yield from _differences(case.recipe, stored)


def _differences(values: dict, stored: Recipe | None) -> Iterator[str]:
    """What is wrong with the recipe that a case was made with."""
    try:
        made = Recipe.from_dict(values, "its recipe")
    except InputError as error:
        yield f"{error}; prepare it again"
        return
    differences = [] if stored is None else stored.differences(made)
    if differences:
        yield f"another recipe than recipe.yaml ({'; '.join(differences)}); prepare all with one recipe"


def _parallel(function: Callable, items: Sequence, threads: int) -> list:
    """The results of `function`, in order, with a progress bar; decompressing runs beside Python."""
    from tqdm import tqdm

    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            return list(tqdm(pool.map(function, items), "checking", len(items), unit="file", disable=None))
        except BaseException:  # such as Ctrl-C: nobody waits for the rest
            pool.shutdown(cancel_futures=True)
            raise


def _types(file: Path, side: str) -> str:
    """Number formats as stored, image / label; only headers are read."""
    if side == "test":
        import h5py

        with h5py.File(file, "r") as stored:
            return " / ".join(str(stored[key].dtype) for key in ("image", "label") if key in stored)
    headers = _npz_headers(file)
    return " / ".join(str(headers[key][1]) for key in ("image", "label"))


def _npz_headers(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> shape and type of the arrays in an archive; empty if it is none."""
    headers = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    major, _ = np.lib.format.read_magic(member)
                    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(member)
                    headers[name.removesuffix(".npy")] = (shape, dtype)
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
    return headers


def _stored_recipe(root: Path) -> tuple[Recipe | None, list[Finding]]:
    file = root / "recipe.yaml"
    if not file.is_file():
        return None, []
    try:
        return Recipe.load(file), []
    except InputError as error:
        return None, [Finding(True, f"{without_path(error, file)}; prepare the data again", (file.name,))]


def _known(num_classes: int | None, recipe: Recipe | None) -> int | None:
    return num_classes or (None if recipe is None else recipe.num_classes or None)


def _labels(
    looks: Sequence[Look], rows: Sequence[Row], num_classes: int | None, recipe: Recipe | None
) -> list[Finding]:
    """Labels against the number of classes."""
    found, known = [], _known(num_classes, recipe)
    if num_classes and recipe is not None and recipe.classes and num_classes != recipe.num_classes:
        have = f"the recipe of the data has {recipe.num_classes} classes ({few(recipe.classes)}); leave the flag out"
        found.append(Finding(True, f"--num_classes {num_classes}: {have}"))
    highest = max((value for row in rows for value in row.voxels), default=0)
    limit = known or 255
    outside = [x for x in looks if any(not 0 <= value <= limit for value in x.voxels)]
    if outside:
        values = {value for x in outside for value in x.voxels if not 0 <= value <= limit}
        advice = "set --num_classes to the number of foreground classes, or prepare the data with a label map"
        text = f"label values {runs(values)} are outside 0..{limit}; {advice}"
        found.append(Finding(True, text, tuple(x.name for x in outside)))
    elif known is None and highest > 2 * len({v for row in rows for v in row.voxels if v > 0}):
        text = (
            f"label values {runs(v for row in rows for v in row.voxels if v > 0)} are far from 1, 2, 3, ..., as which"
        )
        found.append(Finding(False, f"{text} models count classes; prepare the data with a label map"))
    elif known is None and highest > _DEFAULT_CLASSES:
        text = f"labels go up to {highest} and no recipe says how many classes there are; give --num_classes"
        found.append(Finding(False, f"{text} {highest} here and to train.py"))
    return found


def _sizes(looks: Sequence[Look], recipe: Recipe | None) -> list[Finding]:
    """Sizes of training slices: of all, where no recipe explains that they differ, and within a case."""
    found, of_case = [], {}
    for look in looks:
        if look.side == "train" and look.shape:
            of_case.setdefault(look.case, set()).add(look.shape)
    sizes = sorted(set().union(*of_case.values()))
    if len(sizes) > 1 and (recipe is None or recipe.crop is None):
        low, high = (" x ".join(map(str, size)) for size in (sizes[0], sizes[-1]))
        text = f"training slices have {len(sizes)} sizes, {low} to {high}; each is stretched to the square a model sees"
        found.append(Finding(False, text))
    if mixed := sorted(case for case, own in of_case.items() if len(own) > 1):
        text = "slices of several sizes in one case: systems that see volumes, and samlora compare, refuse them"
        found.append(Finding(False, text, tuple(mixed)))
    return found


def _lists(root: Path, folders: dict[str, Path], files: Sequence[tuple[str, Path]]) -> list[Finding]:
    """lists/ against the files; train.py and test.py can be told to go by either."""
    found = []
    for side, name in (("train", "train.txt"), ("test", "test_vol.txt")):
        listing = root / "lists" / name
        if side not in folders or not listing.is_file():
            continue
        try:
            names = {same_name(line.strip()) for line in read_text(listing).splitlines()} - {""}
        except InputError as error:
            found.append(Finding(True, without_path(error, listing), (f"lists/{name}",)))
            continue
        present = {same_name(file.name.removesuffix(_ENDINGS[side])) for kind, file in files if kind == side}
        if names - present:
            text = f"lists/{name} names them, but they are not in {folders[side].name}; prepare the data again"
            found.append(Finding(True, text, tuple(sorted(names - present))))
        if present - names:
            text = f"lists/{name} does not name them, but without --list_dir they are used; remove them or name them"
            found.append(Finding(False, text, tuple(sorted(present - names))))
    return found


def _records(root: Path, folders: dict[str, Path], looks: Sequence[Look], stored: Recipe | None) -> list[Finding]:
    """cases/CASE.json against the files: `samlora prepare` writes a record last, when a case is whole."""
    if not (root / "cases").is_dir():
        return []
    found: list[Finding] = []
    if not (root / "recipe.yaml").is_file():
        found.append(Finding(True, "recipe.yaml is missing: samlora prepare has not finished; run it again"))
    recorded, other = set(), []
    for file in sorted((root / "cases").glob("[!.]*.json")):
        name = str(file.relative_to(root))
        recorded.add(file.stem)
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            side, files, recipe = record["split"], record["files"], record["recipe"]
            missing = [item for item in files if not (root / item).is_file()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.append(Finding(True, f"is no record of a case ({type(error).__name__}); prepare it again", (name,)))
            continue
        if side in folders and missing:
            text = f"{len(missing)} of its files are not there ({few(missing)}); run samlora prepare again"
            found.append(Finding(True, text, (name,)))
        other += [(text, name) for text in _differences(recipe, stored) if side == "train"]
    for text in dict.fromkeys(text for text, _ in other):
        found.append(Finding(True, text, tuple(name for t, name in other if t == text)))
    lonely = sorted({look.case for look in looks} - recorded)
    if lonely:
        text = "no record in cases/: half-prepared, or put there by hand; run samlora prepare again"
        found.append(Finding(True, text, tuple(lonely)))
    return found


def _sides(folders: dict[str, Path], files: Sequence[tuple[str, Path]]) -> list[Finding]:
    found = []
    present = {side for side, _ in files}
    if "train" not in present:
        found.append(Finding(False, "there are no training slices (train_npz)"))
    if "test" not in present:
        found.append(
            Finding(False, "there are no test cases (test_vol_h5); --test_cases or --test_fraction makes some")
        )
    return found
