"""`samlora plan`: looks at a folder of images and labels, says what is in it, and writes a recipe to edit."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from samlora.data.arrays import ARRAYS
from samlora.data.dicom import choose
from samlora.data.folders import Pair
from samlora.data.grid import body_axes
from samlora.data.label_tables import contradictions, plain
from samlora.data.layouts import Layout, find_pairs
from samlora.data.pictures import PICTURES
from samlora.data.plan_looks import AIR, SOFT, ImageLook, LabelLook, look_at_image, look_at_label
from samlora.data.plan_text import Found, Plan
from samlora.data.sources import ignored_values
from samlora.data.structures import folder_names
from samlora.errors import InputError
from samlora.files import whole

_IMAGES_READ = 12  # labels are all read; of the images as many, spread evenly
_THREADS = 4
_AIR_SHARE = 0.01  # of the voxels of a CT are air, at least
_WHITE = 250  # what masks call their object when they are pictures, give or take


def plan(source: str | os.PathLike) -> Plan:
    """Reads all labels and some images in `source` (see `layouts.find_pairs`) and chooses a recipe for them.

    Files that cannot be used are listed. Raises InputError or MissingFileError if no cases are found, or none of their
    labels or images can be read.
    """
    source = Path(source)
    layout = find_pairs(source)
    broken: list[str] = []
    labels = [look for look in _each(look_at_label, layout.pairs, "reading labels", broken) if look]
    step = max(1.0, len(layout.pairs) / _IMAGES_READ)
    some = [layout.pairs[int(n * step)] for n in range(min(_IMAGES_READ, len(layout.pairs)))]
    images = [look for look in _each(look_at_image, some, "reading images", broken) if look]
    if not labels or not images:
        raise InputError(broken[0])
    made = Plan(source, layout, labels, images, [], {}, {}, list(layout.notes), broken)
    _choose_classes(made)
    _choose_values(made)
    _choose_geometry(made)
    _choose_cases(made)
    return made


def write_plan(plan: Plan, path: str | os.PathLike) -> None:
    """Writes the recipe of `plan`. Raises InputError if the file is there already, or is no .yaml file."""
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"{path}: a recipe needs a name that ends in .yaml")
    if path.exists():
        raise InputError(f"{path}: is there already, perhaps with changes of yours; choose another name with -o")
    with whole(path) as temporary:
        temporary.write_text(plan.yaml(path), encoding="utf-8")


def _each(look: Callable, pairs: Sequence[Pair], title: str, broken: list[str]) -> list:
    """The results of `look`, in order; None and a line in `broken` where a case cannot be read."""
    from tqdm import tqdm

    def tried(pair: Pair):
        try:
            return look(pair)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            found = list(tqdm(pool.map(tried, pairs), title, len(pairs), unit="case", disable=None))
        except BaseException:  # such as Ctrl-C: nobody waits for the rest
            pool.shutdown(cancel_futures=True)
            raise
    broken += [str(one) for one in found if isinstance(one, InputError) and str(one) not in broken]
    return [None if isinstance(one, InputError) else one for one in found]


def _choose_classes(made: Plan) -> None:
    """Classes and mask_threshold, from the label files and what dataset.json says."""
    looks, layout = made.labels, made.layout
    softs = {look.soft for look in looks if look.soft is not None}
    totals: Counter[int] = Counter()
    for look in looks:
        for counts in look.values.values():
            totals.update({value: count for value, count in counts.items() if value and look.soft is None})
    threshold, reason = None, ""
    if softs:
        threshold = max(softs)
        _check_ranges(made, threshold)
        jpeg = any(look.lossy for look in looks)
        reason = f"masks {'are JPEG' if jpeg else 'have soft edges'}: what is above belongs to the object"
    elif _is_white(totals):
        threshold, reason = SOFT, f"masks hold {_listed(totals)} for one thing: what is above belongs to it"
    if threshold is not None:
        made.choices["mask_threshold"], made.reasons["mask_threshold"] = threshold, reason
    by_case = [_classes_of(look, threshold) for look in looks]
    own = threshold is None and any(look.names for look in looks)
    if own:  # what names no values itself goes by the folder's names then
        named = folder_names(layout)
        by_case = [{named.get(value, value): count for value, count in shown.items()} for shown in by_case]
    by_case = _one_spelling(by_case)
    found = {value for shown in by_case for value in shown}
    ignored = ignored_values(found, layout.ignored) if threshold is None else set()
    if ignored - set(layout.ignored):
        text = f"value {_listed(sorted(ignored - set(layout.ignored)))} beside small ones marks what is not labelled"
        made.notes.append(f"{text}, as in PASCAL VOC: it is ignored; list it if it is a class")
    if ignored:
        made.choices["ignore"] = sorted(ignored)
        made.reasons["ignore"] = "voxels that nobody has labelled: in no loss and in no measure"
    numbers = {value for value in found if isinstance(value, int) and value > 0}
    if threshold is None and numbers and min(numbers) < SOFT and max(numbers) == 255 and not ignored:
        text = "value 255 may mark what is not labelled, as in PASCAL VOC"
        made.notes.append(f"{text}; leave it out of the classes if so")
    values = sorted(found - ignored, key=lambda v: (isinstance(v, str), v))
    names = {value: value if isinstance(value, str) else _called(value, layout) for value in values}
    if threshold is not None and "" in looks[0].values:
        names = {1: "foreground"}
    elif layout.classes and not own:
        groups = {name: group for name, group in layout.classes.items() if any(group)}
        listed = [value for group in groups.values() for value in group]
        if len(set(listed)) == len(listed) and all(len(group) == 1 for group in groups.values()):
            names = {group[0]: name for name, group in groups.items()} | {
                v: names[v] for v in values if v not in listed
            }
            unnamed = [value for value in values if value not in listed and not isinstance(value, str)]
            if unnamed:
                made.notes.append(f"label values that dataset.json does not name: {_listed(unnamed)}")
        else:
            made.notes.append(
                f"dataset.json unites labels into regions ({', '.join(groups)}); here each value is a class"
            )
    negative = [value for value in names if not isinstance(value, str) and value < 0]
    if negative:
        made.notes.append(f"label values below 0 become background: {_listed(negative)}")
    for value, name in names.items():
        if value in negative:
            continue
        having = [(look, shown[value]) for look, shown in zip(looks, by_case) if shown.get(value)]
        if own and not having:  # a table of names inside label files may list structures that none of them shows
            continue
        ml = [count * look.voxel_ml for look, count in having if look.voxel_ml is not None]
        mean = sum(ml) / len(ml) if ml else None
        made.classes.append(Found(name, value, len(having), sum(count for _, count in having), mean))
    if not 0 < len(made.classes) < 256:
        text = f"{len(made.classes)} different values in the labels; 1 to 255 can be used. Are these labels?"
        raise InputError(f"{made.source}: {text}")
    if threshold is not None and not any(found.voxels for found in made.classes):
        text = f"no voxel of any mask is above {threshold:g}, the middle of the range of soft masks"
        raise InputError(f"{made.source}: {text}; save the masks as 0 and 1")
    tables = {look.case: look.names for look in looks if look.names}
    for text in contradictions(tables):
        made.notes.append(f"label values differ from file to file, so classes go by name: {text}")
    if tables and len(tables) < len(looks):
        known = folder_names(layout)
        silent = [look for look in looks if not look.names]
        without = [look.case for look in silent if any(v and v not in known for v in look.values.get("", {}))]
        if without:
            text = f"label files without names of their values beside others that have them: {_listed(without)}"
            made.notes.append(f"{text}; their values are classes of their own")
    empty = [look.case for look, shown in zip(looks, by_case) if not any(shown.values())]
    if empty:
        made.notes.append(f"{len(empty)} of {len(looks)} cases show no class: {_listed(empty)}")
    for what, names in (
        ("no case", [f.name for f in made.classes if not f.cases]),
        ("less than a tenth of the cases", [f.name for f in made.classes if 0 < f.cases < 0.1 * len(looks)]),
    ):
        if names:
            made.notes.append(f"in {what}: {_listed(names)}")


def _check_ranges(made: Plan, threshold: float) -> None:
    """Lists masks as broken whose values all lie below a threshold that others need."""
    for look in made.labels:
        highest = max((value for counts in look.values.values() for value in counts), default=0)
        low = look.soft is not None and look.soft < threshold
        if low or (look.soft is None and 0 < highest <= threshold):
            most = 2 * look.soft if low else highest
            text = f"{look.case}: its masks go up to {most:g}, those of other cases above {threshold:g}"
            made.broken.append(f"{text}; save all masks with the same range of values")


def _one_spelling(by_case: list[dict[int | str, int]]) -> list[dict[int | str, int]]:
    """The same, with names that differ in upper and lower case or in gaps only spelled as they are first."""
    spelled: dict[str, str] = {}
    result = []
    for shown in by_case:
        counts: dict[int | str, int] = {}
        for value, count in shown.items():
            key = spelled.setdefault(plain(value), value) if isinstance(value, str) else value
            counts[key] = counts.get(key, 0) + count
        result.append(counts)
    return result


def _called(value: int, layout: Layout) -> str:
    """What a class is called whose number the label files hold."""
    return layout.names.get(value, f"label_{value}")


def _classes_of(look: LabelLook, threshold: float | None) -> dict[int | str, int]:
    """Value or structure -> voxels, as a recipe with that threshold would find them."""
    least = 0 if threshold is None or look.soft is not None else threshold
    own = {name: counts for name, counts in look.values.items() if name}
    named = {name: sum(n for v, n in counts.items() if v > least) for name, counts in own.items()}
    if "" not in look.values:
        return named
    if threshold is None:
        return {value: count for value, count in look.values[""].items() if value} | named
    return {1: sum(count for value, count in look.values[""].items() if value > least)}


def _is_white(totals: Counter[int]) -> bool:
    """Whether masks are pictures of one thing in white: values about 255, perhaps with a few grays at its edges."""
    white = sum(count for value, count in totals.items() if _WHITE <= value <= 255)
    return len(totals) > 1 and max(totals) <= 255 and white > 0.95 * sum(totals.values())


def _choose_values(made: Plan) -> None:
    """Modality, range of values, channels."""
    choices, reasons, looks = made.choices, made.reasons, made.images
    modality, reasons["modality"] = _modality(made)
    choices["modality"] = modality
    low, high = min(look.low for look in looks), max(look.high for look in looks)
    like_ct = sum(look.air >= _AIR_SHARE for look in looks)
    if 0 < like_ct < len(looks):
        text = f"{like_ct} of {len(looks)} images look like CT, the others do not"
        made.notes.append(f"{text}; set cases in the recipe, so that each kind is prepared apart")
    if modality == "ct":
        choices["window"], reasons["window"] = _window([found.name for found in made.classes])
    elif modality == "mr":
        choices["percentiles"] = [0.5, 99.5]
        reasons["percentiles"] = "of the voxels that are not 0, in each volume: MR has no unit"
    elif not all(_has_range(look) for look in looks):
        choices["percentiles"] = [0.5, 99.5]
        reasons["percentiles"] = (
            f"values {low:g}..{high:g} fill the range of their type ({looks[0].dtype}) only in part"
        )
    channels = max(look.channels for look in looks)
    coloured = sum(look.colour > 0.005 for look in looks)
    drawn = channels == 3 and modality == "image"
    if drawn and coloured >= 0.1 * len(looks):
        choices["channels"], reasons["channels"] = "rgb", f"{coloured} of {len(looks)} pictures have colours"
    elif drawn or channels == 1:
        choices["channels"] = "repeat"
        reasons["channels"] = "stored as colours, but gray (or nearly)" if drawn else "one gray channel"
    else:
        choices["channels"] = list(range(channels))
        named = ", ".join(f"{n} {name}" for n, name in enumerate(made.layout.channels))
        reasons["channels"] = f"all of {channels} ({named})" if named else f"all of {channels}, counted from 0"


def _modality(made: Plan) -> tuple[str, str]:
    """ct, mr or image, and why."""
    looks = made.images
    first = next(pair.images[0] for pair in made.layout.pairs if pair.name == looks[0].case)
    air = median(look.air for look in looks)
    said = " ".join(made.layout.channels[:1]).lower()
    low, high = min(look.low for look in looks), max(look.high for look in looks)
    if first.name.lower().endswith(PICTURES):
        return "image", "pictures"
    if first.is_dir() or first.name.lower().endswith(".dcm"):
        kind = choose(first, None)[0].modality
        if kind in ("CT", "MR"):
            return kind.lower(), f"the DICOM files say {kind}"
        if kind:
            return "image", f"the DICOM files say {kind}"
    if re.match(r"ct\b|ct_", said) and low < 0:
        return "ct", f"dataset.json says {made.layout.channels[0]}"
    if air >= _AIR_SHARE:
        share = f"{100 * air:.0f} % of the voxels are {AIR} or less"
        return "ct", f"values from {low:g}, {share}, as air has in Hounsfield units"
    if re.match(r"ct\b|ct_", said):
        made.notes.append(f"dataset.json says CT, but values {low:g}..{high:g} are no Hounsfield units")
    if re.match(r"t1|t2|flair|dwi|adc|mr|pd|swi", said):
        return "mr", f"its channels are called {', '.join(made.layout.channels)}"
    unit = all(_has_range(look) for look in looks)
    if unit and (first.name.lower().endswith(ARRAYS) or all(look.shape[2] == 1 for look in looks)):
        return "image", f"values {low:g}..{high:g}, already scaled"
    if first.name.lower().endswith(ARRAYS) and made.labels[0].spacing is None:
        return "image", "arrays"
    return "mr", f"a volume with values {low:g}..{high:g}, not as in CT; if it is one, give modality and window"


def _has_range(look: ImageLook) -> bool:
    """Whether an "image" recipe knows its range: 8 bit, 16 bit that are used, or 0..1."""
    if look.dtype == np.uint8:
        return True
    if look.dtype == np.uint16:
        return look.high > np.iinfo(np.uint16).max / 2
    return look.low >= 0 and look.high <= 1


def _window(names: list[str]) -> tuple[list[int], str]:
    """A CT window for what is to be found."""
    kinds = {
        "lungs": (r"lung|nodule|airway|bronch|covid", [-1000, 400]),
        "bones": (r"bone|vertebra|rib|femur|hip|skull|sacrum|spine|scapula|clavicula|humerus", [-500, 1300]),
    }
    for what, (pattern, window) in kinds.items():
        if all(re.search(rf"(?:^|_|\b)(?:{pattern})", name.lower()) for name in names):
            return window, f"HU, for {what} as the names say. Soft tissue: [-160, 240]"
    return [-160, 240], "HU: soft tissue, width 400, level 40. Lung: [-1000, 400], bone: [-500, 1300], brain: [0, 80]"


def _choose_geometry(made: Plan) -> None:
    """Orientation, slice_axis, crop, size, keep."""
    choices, reasons, looks = made.choices, made.reasons, made.labels
    thin = [axis for axis in range(3) if all(look.shape[axis] == 1 for look in looks)]
    axes = sorted({look.axes for look in looks})
    turned = bool(looks[0].axes) and not thin and "" not in axes
    choices["orientation"] = "LPS" if turned else None
    if turned:
        codes = f"stored as {axes[0]}" if len(axes) == 1 else f"stored in {len(axes)} ways ({', '.join(axes)})"
        same = "" if axes == ["LPS"] else "; all are turned"
        reasons["orientation"] = f"{codes}{same}: front up, the patient's left on the right"
    else:
        reasons["orientation"] = "as stored"
    shapes = [_ordered(look.shape, look) if turned else look.shape for look in looks]
    filled = [_ordered(look.filled, look) if turned else look.filled for look in looks]
    spacings = [_ordered(look.spacing, look) if turned else look.spacing for look in looks if look.spacing]
    axis, reason = 2, "slices of the third axis"
    if thin:
        axis, reason = thin[-1], "one slice"
    elif spacings:
        usual = [median(spacing[n] for spacing in spacings) for n in range(3)]
        coarse = int(np.argmax(usual))
        within = max(size for n, size in enumerate(usual) if n != coarse)
        said = " x ".join(f"{size:.3g}" for size in usual)
        axis, reason = 2, f"voxels of {said} mm are nearly cubes, so any would do"
        if usual[coarse] >= 1.5 * within:
            axis, reason = coarse, f"slices are {usual[coarse]:.3g} mm apart, pixels {within:.3g} mm"
    views = ("sagittal", "coronal", "axial")
    choices["slice_axis"], reasons["slice_axis"] = axis, f"{views[axis]}: {reason}" if turned else reason
    choices["crop"] = "body" if choices["modality"] == "ct" else None
    reasons["crop"] = "body: the rectangle that holds it, as fields of view differ; null keeps all"
    planes = {tuple(size for n, size in enumerate(shape) if n != axis) for shape in shapes}
    side = median(max(size for n, size in enumerate(shape) if n != axis) for shape in shapes)
    alike = len(planes) == 1 and side <= 512 and choices["crop"] is None
    choices["size"] = None if alike or side < 192 else 256 if side < 384 else 512
    reasons["size"] = f"all slices are {side:g} wide or high" if alike else f"usually {side:.0f} is the longer side"
    slices, with_class = sum(s[axis] for s in shapes), sum(f[axis] for f in filled)
    empty = 100 * (1 - with_class / slices)
    choices["keep"] = 0.1 if empty > 80 else "all"
    reasons["keep"] = f"{empty:.0f} % of the slices show no class"
    ways = len(axes)
    if ways > 1 and not turned:
        made.notes.append(f"stored in {ways} ways ({', '.join(code or 'unknown' for code in axes)})")
    if len(planes) > 1:
        made.notes.append("slices differ in size; each is stretched to the square that a model sees")


def _choose_cases(made: Plan) -> None:
    """patient, where the names of the cases look as if several were of one."""
    names = [pair.name for pair in made.layout.pairs]
    pattern = r"(.*?\d)[_. -].+"
    groups = Counter(found[1] if (found := re.match(pattern, name)) else name for name in names)
    most, count = groups.most_common(1)[0]
    if count < 2 or len(groups) < 2:
        return
    alike = _listed(sorted(name for name in names if re.match(re.escape(most) + "[_. -]", name)), 2)
    made.choices["patient"] = pattern
    made.reasons["patient"] = f"{alike} look like one patient, who is then on one side of the split only"
    made.notes.append(f"{alike} may be the same patient, by their names; see patient in the recipe")


def _ordered(values: Sequence, look: LabelLook) -> tuple:
    """Values along the stored axes, in the order left-right, front-back, up-down, as LPS has them."""
    return tuple(values[axis] for axis in np.argsort(body_axes(look.axes)))


def _listed(values: Sequence, most: int = 8) -> str:
    values = list(values)
    return " ".join(map(str, values[:most])) + (f" ... ({len(values)})" if len(values) > most else "")
