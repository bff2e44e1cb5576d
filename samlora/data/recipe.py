"""How a volume becomes slices: value range, orientation, slice axis, channels, size, classes. Data, read from YAML.

A recipe is stored with the data it made and in every adapter trained on them, so that prediction can prepare
its volumes the same way and refuse those that were prepared otherwise.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samlora.data.grid import Case, Volume, body_axes, integers, reorient, slice_order, transposed
from samlora.data.ignored import IGNORE, split_ignored
from samlora.data.label_tables import values_named
from samlora.data.opening import check_finite
from samlora.errors import InputError, MissingFileError
from samlora.files import read_text, same_name, shipped

MODALITIES = ("ct", "mr", "image")
KEEP = ("all", "foreground")
CHANNELS = ("repeat", "rgb", "neighbours")
CROPS = (None, "body")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # gray of red, green, blue: ITU-R BT.601
# What a model sees and what its outputs mean. The rest (name, label values, split, which slices were kept)
# may differ between the data of training and those of prediction.
_SEEN = ("modality", "window", "percentiles", "orientation", "slice_axis", "crop", "size", "channels", "classes")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to turn volumes into slices.

    window: (low, high), mapped to 0..1 and clipped; HU for CT; {"level": 40, "width": 400} means the same. percentiles:
    the same with the (low, high) percentiles of a volume's non-zero voxels, each channel for itself. An "image" needs
    neither: 8 or 16 bit, or 0..1 already.
    orientation: axis codes a volume is turned to, e.g. "LPS"; None leaves it as stored. slice_axis: the axis
    of that array which is cut. crop: "body" keeps the rectangle of the slices that holds the body, so that fields of
    view of different size look alike; None keeps all. size: training slices become (size, size); None keeps theirs.
    channels: what the model's inputs show. "repeat": one gray channel in all three (colours become gray). "rgb": the
    colours. "neighbours": the slices z-1, z and z+1. Or numbers of channels of the volume, from 0: one is repeated,
    three are taken as they are, other counts go through a learned 1x1 convolution that belongs to the adapter.
    classes: foreground names, class 1 first; label_values: per class its values in the label files, or the names that
    the data set gives them. Both empty: taken from the data when they are prepared. mask_threshold: label files are
    soft, JPEG or otherwise inexact masks of one class; what is above belongs to it. ignore: values in the label files,
    or names, of voxels that nobody has labelled; they are in no loss and in no measure. cases: a regular expression for
    the names of the cases to take; None for all. patient: a regular expression whose group finds the patient in the
    name of a case; None where each case is another patient. test_cases: names.
    keep: "all" slices for training, those with "foreground", or those and this share (0 to 1) of the others, evenly
    spread. min_voxels, min_pixels: smaller parts of a class, in 3D and within a slice, are dropped from the labels of
    training slices. Raises InputError for values that contradict this.
    """

    name: str
    modality: str
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    orientation: str | None = None
    slice_axis: int = 2
    crop: str | None = None
    size: int | None = None
    channels: str | tuple[int, ...] = "repeat"
    classes: tuple[str, ...] = ()
    label_values: tuple[tuple[int | str, ...], ...] = ()
    mask_threshold: float | None = None
    ignore: tuple[int | str, ...] = ()
    cases: str | None = None
    patient: str | None = None
    test_cases: tuple[str, ...] = ()
    keep: str | float = "all"
    min_voxels: int = 0
    min_pixels: int = 0

    def __post_init__(self) -> None:
        for key in ("window", "percentiles"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, self._range(key))
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "label_values", tuple(tuple(values) for values in self.label_values))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        names = [same_name(name) if isinstance(name, str) else name for name in self.test_cases]
        object.__setattr__(self, "test_cases", tuple(names))
        if isinstance(self.channels, list | tuple):
            object.__setattr__(self, "channels", tuple(self.channels))
        self._check()

    @property
    def num_classes(self) -> int:
        """Number of foreground classes; 0 while they are still to be taken from the data."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """Channels that a model for this recipe takes: 3, or as many as are chosen where these are not 1 or 3."""
        chosen = len(self.channels) if isinstance(self.channels, tuple) else 3
        return 3 if chosen == 1 else chosen

    def patient_of(self, case: str) -> str:
        """The patient that a case shows: what the group of `patient` finds in its name, else the case itself."""
        found = re.match(self.patient, case) if self.patient else None
        return found[1] if found else case

    @classmethod
    def load(cls, name_or_path: str | os.PathLike) -> "Recipe":
        """The recipe of that name that ships with samlora, or the one in a YAML file.

        Raises MissingFileError if there is none, InputError (naming the file) if it cannot be used.
        """
        path = Path(name_or_path)
        if path.suffix.lower() not in (".yaml", ".yml"):
            path = shipped("datasets") / f"{name_or_path}.yaml"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in shipped("datasets").glob("*.yaml")))
            raise MissingFileError(f"{name_or_path}: no such recipe; give a .yaml file or one of: {names}")
        try:
            values = yaml.load(read_text(path), _Loader)
        except InputError:
            raise
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
            raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> "Recipe":
        """The recipe of a mapping as `to_dict` gives it and as the YAML files hold it.

        `classes` maps each class name to its value, or list of values, in the label files; values are numbers, or
        the names that the data set gives them. A plain list of classes: those names. Keys with a default may be left
        out. Raises InputError, naming `where`, for unknown, missing or unusable keys.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: a mapping of keys to values is needed, found {type(values).__name__}")
        fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        fields.pop("label_values")  # they stand beside the class names
        unknown = [str(key) for key in values if key not in fields]
        missing = [key for key, needed in fields.items() if needed and values.get(key) is None]
        if unknown or missing:
            wrong = [f"unknown key {key}" for key in unknown] + [f"missing key {key}" for key in missing]
            raise InputError(f"{where}: {', '.join(wrong)}; the keys are {', '.join(fields)}")
        given = {key: value for key, value in values.items() if value is not None}
        classes = given.pop("classes", {})
        try:
            if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
                classes = {name: name for name in classes}
            if not isinstance(classes, Mapping):
                raise InputError(f"classes {classes!r}: give each class as `name: value in the label files`")
            label_values = [v if isinstance(v, list | tuple) else [v] for v in classes.values()]
            if not isinstance(given.get("ignore", ()), list | tuple):
                given["ignore"] = (given["ignore"],)
            if not isinstance(given.get("test_cases", []), list | tuple):
                raise InputError(f"test_cases {given['test_cases']!r}: a list of case names is needed")
            return cls(**given, classes=tuple(classes), label_values=tuple(map(tuple, label_values)))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values for YAML and JSON; `from_dict` gives an equal recipe back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        label_values = values.pop("label_values")
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        if not self.ignore:  # as in records and adapters that were written before there was such a key
            del plain["ignore"]
        plain["classes"] = {n: v[0] if len(v) == 1 else list(v) for n, v in zip(self.classes, label_values)}
        return plain

    def differences(self, other: "Recipe") -> list[str]:
        """What a model trained with this recipe would see or mean otherwise under `other`.

        One entry per key, such as "window (-125.0, 275.0) here, (-160.0, 240.0) there". Label values, names
        and splits are not compared: they belong to the files of one place.
        """
        pairs = ((key, getattr(self, key), getattr(other, key)) for key in _SEEN)
        return [f"{key} {here} here, {there} there" for key, here, there in pairs if here != there]

    def to_case(self, image: Volume, label: Volume | None = None, name: str = "") -> Case:
        """A volume, and its label map of classes on the same grid, as slices: in range, turned, cropped.

        Raises InputError, naming the volume, if its values or channels do not fit.
        """
        images, labels = self.image_stack(image), None if label is None else self.to_slices(label)
        geometry = image.geometry(self.orientation, self.slice_axis)
        box = self.crop_box(images)
        if box is not None:
            top, bottom, left, right = box
            images = np.ascontiguousarray(images[:, top:bottom, left:right])
            labels = None if labels is None else np.ascontiguousarray(labels[:, top:bottom, left:right])
        values, ignored = self.to_dict(), None
        if labels is not None:
            labels, ignored = split_ignored(labels, values)
        geometry = dataclasses.replace(geometry, box=box)
        return Case(images, labels, geometry, values, name, ignored)

    def image_stack(self, volume: Volume) -> np.ndarray:
        """A volume as the slices a model for this recipe sees: float32 in 0..1, turned, not cropped.

        (D, H, W) for one gray channel (also for "neighbours": `samlora.data.grid.neighbours` makes three of them),
        else (D, H, W, C). Raises InputError, naming the volume, if its values or channels do not fit.
        """
        try:
            check_finite(volume.array, "its array")
            array = self._in_range(self._chosen(volume.array))
        except InputError as error:
            raise InputError(f"{volume.path or 'the volume'}: {error}") from None
        if array.ndim == 4 and self.channels in ("repeat", "neighbours"):
            array = array @ _LUMA
        elif array.ndim == 3 and self.channels == "rgb":
            array = np.repeat(array[..., None], 3, axis=-1)
        return self.to_slices(dataclasses.replace(volume, array=array))

    def normalise(self, array: np.ndarray) -> np.ndarray:
        """One channel's values, of a whole volume or image, as float32 in 0..1, same shape.

        Raises InputError for CT values that are no HU, and for an "image" whose values are neither 8 or 16 bit integers
        nor in 0..1.
        """
        low, high = self._limits(array)
        if high <= low:  # a volume of one value
            return np.zeros(array.shape, np.float32)
        values = (np.clip(array.astype(np.float32), low, high) - low) / (high - low)
        return np.minimum(values, 1, out=values)  # rounding may end just above

    def map_labels(self, array: np.ndarray, names: Mapping[int, Sequence[str]] | None = None) -> np.ndarray:
        """Label values as classes: uint8 0..num_classes, same shape; values that no class lists become 0, ignored ones
        `samlora.data.ignored.IGNORE`.

        names: what the label map calls its values (`Volume.names`); a class that is given by its name has the values of
        that name, none where the map does not show it. Of structures that overlap the later class gets the voxels.
        Raises InputError if the recipe has no classes yet, names some and the map none, or the labels are no whole
        numbers.
        """
        if not self.classes:
            raise InputError(f"recipe {self.name}: it has no classes; list them or use `samlora prepare`")
        groups = self.values_in(names)
        ignored = self._values_of(self.ignore, names)
        array = integers(array, f"recipe {self.name}: labels")
        low, high = int(array.min()), int(array.max())
        table = np.zeros(high - low + 1, np.uint8)
        for index, values in [(IGNORE, ignored), *enumerate(groups, start=1)]:
            table[[value - low for value in values if low <= value <= high]] = index
        return table[array.astype(np.int32) - low if low else array]

    def values_in(self, names: Mapping[int, Sequence[str]] | None) -> list[list[int]]:
        """The values of each class in a label map that has these names. Raises InputError, as `map_labels`."""
        return [self._values_of(values, names) for values in self.label_values]

    def _values_of(
        self, values: Sequence[int | str], names: Mapping[int, Sequence[str]] | None
    ) -> list[int]:
        """Values, and names, as values in a label map that has these names."""
        group: list[int] = []
        for value in values:
            if isinstance(value, int):
                group.append(value)
            elif names:
                group += values_named(names, value)
            else:
                advice = "the label map does not name its values; give numbers"
                raise InputError(
                    f"recipe {self.name}: the value of {value!r} is not known here: {advice}"
                )
        return group

    def to_slices(self, volume: Volume) -> np.ndarray:
        """The volume's array (i, j, k) as slices (D, H, W): turned to `orientation`, cut along `slice_axis`.

        For slice_axis 2 an array (x, y, z) becomes (z, y, x); channels stay the last axis. `grid.case_to_volume` is the
        way back.
        """
        turned = volume if self.orientation is None else reorient(volume, self.orientation)
        return np.ascontiguousarray(transposed(turned.array, slice_order(self.slice_axis)))

    def crop_box(self, stack: np.ndarray) -> tuple[int, int, int, int] | None:
        """What `crop` keeps of a stack (D, H, W[, C]): (top, bottom, left, right), ends excluded; None for all.

        The body is what is above a twentieth of the value range, holes such as the lungs filled, after an opening of
        each slice with a disc of half the radius of the largest disc that fits into it. The table and arms beside the
        trunk do not survive that, even where they touch it. Found on a grid of about 128 pixels a side.
        """
        if self.crop is None:
            return None
        from scipy.ndimage import binary_fill_holes, distance_transform_edt

        if stack.ndim == 4:
            stack = stack.max(axis=3)
        step = max(1, max(stack.shape[1:]) // 128)
        # A border of background: the body may reach beyond the field of view.
        inside = np.pad(stack[:, ::step, ::step] > 0.05, ((0, 0), (1, 1), (1, 1)))
        depth = np.zeros(inside.shape[1:])  # of each pixel in the body, on the slice where it is largest
        for plane in inside:
            np.maximum(depth, distance_transform_edt(binary_fill_holes(plane)), out=depth)
        radius = depth.max() / 2
        if not radius:
            return None
        # The opening is the dilation of these pixels by the same disc: their bounding box, wider by its radius.
        centres = depth > radius
        margin = int(np.ceil(radius)) + 1  # one more, for what lies between the points of the grid
        box: list[int] = []
        for axis, size in enumerate(stack.shape[1:]):
            places = np.flatnonzero(centres.any(axis=1 - axis)) - 1
            first, last = int(places[0]) - margin, int(places[-1]) + margin
            box += [max(0, first * step), min(size, (last + 1) * step)]
        return box[0], box[1], box[2], box[3]

    def _chosen(self, array: np.ndarray) -> np.ndarray:
        """The channels that count: (i, j, k), or (i, j, k, C) for more than one."""
        if isinstance(self.channels, tuple):
            array = array if array.ndim == 4 else array[..., None]
            if max(self.channels) >= array.shape[3]:
                raise InputError(
                    f"it has {array.shape[3]} channels, the recipe takes {list(self.channels)}, counted from 0"
                )
            array = array[..., self.channels]
        colours = array.ndim == 4 and array.shape[3] == 3 and (self.modality == "image" or self.channels == "rgb")
        if array.ndim == 4 and array.shape[3] == 1:
            return array[..., 0]
        if array.ndim == 4 and not colours and not isinstance(self.channels, tuple):
            every = list(range(array.shape[3]))
            raise InputError(
                f"it has {array.shape[3]} channels; say in the recipe which to take, such as channels: {every}"
            )
        return array

    def _in_range(self, array: np.ndarray) -> np.ndarray:
        if array.ndim == 3 or self.percentiles is None:
            return self.normalise(array)
        return np.stack([self.normalise(array[..., c]) for c in range(array.shape[3])], axis=-1)

    def _limits(self, array: np.ndarray) -> tuple[float, float]:
        if self.window is not None:
            if self.modality == "ct" and array.size and 0 <= array.min() and array.max() <= 255:
                found = f"{array.min():g}..{array.max():g}"
                raise InputError(f"its values {found} are no Hounsfield units, which the recipe {self.name} needs (CT)")
            return self.window
        if self.percentiles is not None:
            values = array[array != 0]
            return tuple(np.percentile(values, self.percentiles).tolist()) if values.size else (0.0, 0.0)
        if array.dtype in (np.uint8, np.uint16):
            return 0.0, float(np.iinfo(array.dtype).max)
        low, high = (float(f(initial=0)) for f in (array.min, array.max))
        if low < 0 or high > 1:
            raise InputError(
                f"recipe {self.name}: values {low:g}..{high:g} of type {array.dtype} have no known range; "
                "set window or percentiles in the recipe"
            )
        return 0.0, 1.0

    def _range(self, key: str) -> tuple[float, float]:
        given = getattr(self, key)
        try:
            if isinstance(given, Mapping) and given.keys() == {"level", "width"} and key == "window":
                level, width = float(given["level"]), float(given["width"])
                given = level - width / 2, level + width / 2
            low, high = (float(value) for value in given)
        except (TypeError, ValueError):
            low = high = np.nan
        bounds = (0, 100) if key == "percentiles" else (-np.inf, np.inf)
        if not bounds[0] <= low < high <= bounds[1]:
            allowed = "0..100" if key == "percentiles" else "HU for CT; or {level: 40, width: 400}"
            value = getattr(self, key)
            raise InputError(f"{key} {value!r}: [low, high] with low < high is needed ({allowed})")
        return low, high

    def _check(self) -> None:
        allowed = {"modality": MODALITIES, "crop": CROPS, "slice_axis": (0, 1, 2)}
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise InputError(f"{key} {getattr(self, key)!r}: allowed is {', '.join(map(str, values))}")
        if self.window is not None and self.percentiles is not None:
            raise InputError("window and percentiles are both set; set one, leave the other out")
        if self.window is None and self.percentiles is None and self.modality != "image":
            raise InputError(f"modality {self.modality} needs window or percentiles, each as [low, high]")
        if self.orientation is not None:
            body_axes(str(self.orientation))
        if self.size is not None and (type(self.size) is not int or self.size < 16):
            raise InputError(f"size {self.size!r}: a whole number of pixels, at least 16, is needed")
        self._check_choices()
        if not all(isinstance(name, str) and name for name in (self.name, *self.classes, *self.test_cases)):
            raise InputError(f"name, classes {self.classes} and test_cases must be text; quote them in YAML")
        if "background" in self.classes:
            raise InputError("classes: background is class 0 always and is not listed")
        self._check_values()

    def _check_choices(self) -> None:
        share = type(self.keep) in (int, float) and 0 < self.keep < 1
        if self.keep not in KEEP and not share:
            raise InputError(f"keep {self.keep!r}: all, foreground, or a share of the empty slices between 0 and 1")
        numbers = isinstance(self.channels, tuple) and self.channels and all(type(n) is int for n in self.channels)
        if not (numbers and min(self.channels) >= 0) and self.channels not in CHANNELS:
            raise InputError(f"channels {self.channels!r}: {', '.join(CHANNELS)}, or numbers such as [0, 2] are needed")
        if self.mask_threshold is not None and type(self.mask_threshold) not in (int, float):
            raise InputError(f"mask_threshold {self.mask_threshold!r}: a number, in the label files' values, is needed")
        for key in ("min_voxels", "min_pixels"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 0:
                raise InputError(f"{key} {getattr(self, key)!r}: a whole number, 0 or more, is needed")
        for key, groups in (("cases", 0), ("patient", 1)):
            pattern = getattr(self, key)
            try:
                if pattern is not None and re.compile(pattern).groups < groups:
                    raise InputError(f"{key} {pattern!r}: it needs a group, (...), that finds the patient")
            except (re.error, TypeError) as error:
                raise InputError(f"{key} {pattern!r}: is no regular expression ({error})") from None

    def _check_values(self) -> None:
        if len(self.classes) != len(self.label_values) or len(self.classes) > 255:
            counts = f"{len(self.classes)} classes, {len(self.label_values)} label_values"
            raise InputError(f"{counts}; as many of one as of the other are needed, 255 at most")
        used: dict[int | str, str] = {}
        for name, values in zip(self.classes, self.label_values):
            for value in values or (None,):
                if type(value) not in (int, str) or value in (0, ""):
                    raise InputError(f"class {name}: value {value!r}; whole numbers other than 0, or names, are needed")
                if used.setdefault(value, name) != name:
                    raise InputError(f"classes {used[value]} and {name} both have value {value}; choose one")
        if len(set(self.classes)) != len(self.classes):
            raise InputError(f"classes {self.classes}: a name occurs twice")
        for value in self.ignore:
            if type(value) not in (int, str) or value in (0, ""):
                raise InputError(f"ignore {value!r}: whole numbers other than 0, or names, are needed")
            if value in used:
                raise InputError(f"ignore {value!r}: is a value of class {used[value]}; choose one")
        if self.ignore and len(self.classes) >= IGNORE:
            count = len(self.classes)
            raise InputError(f"ignore: with {count} classes no value is left to store; {IGNORE - 1} fit")
        if self.ignore and self.mask_threshold is not None:
            raise InputError("ignore and mask_threshold are both set; soft masks have no such value")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would drop the first organ of that name in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
