"""How a volume becomes slices: value range, orientation, slice axis, size, classes. Data, read from YAML.

A recipe is stored with the data it made and in every adapter trained on them, so that prediction can prepare
its volumes the same way and refuse those that were prepared otherwise.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samlora.data.grid import Volume, body_axes, integers, reorient, slice_order
from samlora.errors import InputError, MissingFileError
from samlora.files import shipped

MODALITIES = ("ct", "mr", "image")
KEEP = ("all", "foreground")
CROPS = (None, "body")
# What a model sees and what its outputs mean. The rest (name, label values, split, which slices were kept)
# may differ between the data of training and those of prediction.
_SEEN = ("modality", "window", "percentiles", "orientation", "slice_axis", "crop", "size", "classes")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to turn volumes into slices.

    window: (low, high), mapped to 0..1 and clipped; HU for CT. percentiles: the same with the (low, high)
    percentiles of a volume's non-zero voxels. An "image" needs neither: 8 or 16 bit, or 0..1 already.
    orientation: axis codes a volume is turned to, e.g. "LPS"; None leaves it as stored. slice_axis: the axis
    of that array which is cut. crop: "body" keeps the rectangle of the slices that holds the body, so that fields of
    view of different size look alike; None keeps all. size: training slices become (size, size); None keeps theirs.
    classes: foreground names, class 1 first; label_values: per class its values in the label files. Both
    empty: taken from the data when they are prepared. test_cases: names. keep: "all" slices for training, or
    those with "foreground". Raises InputError for values that contradict this.
    """

    name: str
    modality: str
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    orientation: str | None = None
    slice_axis: int = 2
    crop: str | None = None
    size: int | None = None
    classes: tuple[str, ...] = ()
    label_values: tuple[tuple[int, ...], ...] = ()
    test_cases: tuple[str, ...] = ()
    keep: str = "all"

    def __post_init__(self) -> None:
        for key in ("window", "percentiles"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, self._range(key))
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "label_values", tuple(tuple(values) for values in self.label_values))
        object.__setattr__(self, "test_cases", tuple(self.test_cases))
        self._check()

    @property
    def num_classes(self) -> int:
        """Number of foreground classes; 0 while they are still to be taken from the data."""
        return len(self.classes)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike) -> "Recipe":
        """The recipe of that name that ships with samlora, or the one in a YAML file.

        Raises MissingFileError if there is none, InputError (naming the file) if it cannot be used.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = shipped("datasets") / f"{name_or_path}.yaml"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in shipped("datasets").glob("*.yaml")))
            raise MissingFileError(f"{name_or_path}: no such recipe; give a .yaml file or one of: {names}")
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> "Recipe":
        """The recipe of a mapping as `to_dict` gives it and as the YAML files hold it.

        `classes` maps each class name to its value, or list of values, in the label files. Keys with a
        default may be left out. Raises InputError, naming `where`, for unknown, missing or unusable keys.
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
            if not isinstance(classes, Mapping):
                raise InputError(f"classes {classes!r}: give each class as `name: value in the label files`")
            label_values = [v if isinstance(v, list | tuple) else [v] for v in classes.values()]
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
        plain["classes"] = {n: v[0] if len(v) == 1 else list(v) for n, v in zip(self.classes, label_values)}
        return plain

    def differences(self, other: "Recipe") -> list[str]:
        """What a model trained with this recipe would see or mean otherwise under `other`.

        One entry per key, such as "window (-125.0, 275.0) here, (-160.0, 240.0) there". Label values, names
        and splits are not compared: they belong to the files of one place.
        """
        pairs = ((key, getattr(self, key), getattr(other, key)) for key in _SEEN)
        return [f"{key} {here} here, {there} there" for key, here, there in pairs if here != there]

    def normalise(self, array: np.ndarray) -> np.ndarray:
        """A volume's or image's values as float32 in 0..1, same shape.

        Percentiles are those of the array, so hand in the whole volume. Raises InputError for an "image"
        whose values are neither 8 or 16 bit integers nor in 0..1.
        """
        low, high = self._limits(array)
        if high <= low:  # a volume of one value
            return np.zeros(array.shape, np.float32)
        return (np.clip(array.astype(np.float32), low, high) - low) / (high - low)

    def map_labels(self, array: np.ndarray) -> np.ndarray:
        """Label values as classes: uint8 0..num_classes, same shape; values that no class lists become 0.

        Raises InputError if the recipe has no classes yet or the labels are no whole numbers.
        """
        if not self.classes:
            raise InputError(f"recipe {self.name}: it has no classes; list them or use `samlora prepare`")
        array = integers(array, f"recipe {self.name}: labels")
        low, high = int(array.min()), int(array.max())
        table = np.zeros(high - low + 1, np.uint8)
        for index, values in enumerate(self.label_values, start=1):
            table[[value - low for value in values if low <= value <= high]] = index
        return table[array.astype(np.int32) - low if low else array]

    def to_slices(self, volume: Volume) -> np.ndarray:
        """The volume's array (i, j, k) as slices (D, H, W): turned to `orientation`, cut along `slice_axis`.

        For slice_axis 2 an array (x, y, z) becomes (z, y, x). `grid.case_to_volume` is the way back.
        """
        turned = volume if self.orientation is None else reorient(volume, self.orientation)
        return np.ascontiguousarray(turned.array.transpose(slice_order(self.slice_axis)))

    def crop_box(self, stack: np.ndarray) -> tuple[int, int, int, int] | None:
        """What `crop` keeps of a normalised stack (D, H, W): (top, bottom, left, right), ends excluded; None for all.

        The body is the largest connected part, in 3D, of what is above a twentieth of the value range, after an
        opening that cuts off the table and what lies beside the body; found on a grid of about 128 pixels a side.
        """
        if self.crop is None:
            return None
        from scipy.ndimage import binary_opening, find_objects, label

        step = max(1, max(stack.shape[1:]) // 128)
        parts, count = label(binary_opening(stack[:, ::step, ::step] > 0.05, np.ones((1, 3, 3))))
        if not count:
            return None
        largest = int(np.bincount(parts.ravel())[1:].argmax()) + 1
        _, *kept = find_objects(parts)[largest - 1]
        ends = [(max(0, k.start * step - step), min(n, k.stop * step + step)) for k, n in zip(kept, stack.shape[1:])]
        return (*ends[0], *ends[1])

    def _limits(self, array: np.ndarray) -> tuple[float, float]:
        if self.window is not None:
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
        try:
            low, high = (float(value) for value in getattr(self, key))
        except (TypeError, ValueError):
            low = high = np.nan
        bounds = (0, 100) if key == "percentiles" else (-np.inf, np.inf)
        if not bounds[0] <= low < high <= bounds[1]:
            allowed = "0..100" if key == "percentiles" else "HU for CT"
            value = getattr(self, key)
            raise InputError(f"{key} {value!r}: [low, high] with low < high is needed ({allowed})")
        return low, high

    def _check(self) -> None:
        allowed = {"modality": MODALITIES, "keep": KEEP, "crop": CROPS, "slice_axis": (0, 1, 2)}
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
        if not all(isinstance(name, str) and name for name in (self.name, *self.classes, *self.test_cases)):
            raise InputError(f"name, classes {self.classes} and test_cases must be text; quote them in YAML")
        if "background" in self.classes:
            raise InputError("classes: background is class 0 always and is not listed")
        self._check_values()

    def _check_values(self) -> None:
        if len(self.classes) != len(self.label_values) or len(self.classes) > 255:
            counts = f"{len(self.classes)} classes, {len(self.label_values)} label_values"
            raise InputError(f"{counts}; as many of one as of the other are needed, 255 at most")
        used: dict[int, str] = {}
        for name, values in zip(self.classes, self.label_values):
            for value in values or (None,):
                if type(value) is not int or value == 0:
                    raise InputError(f"class {name}: value {value!r}; whole numbers other than 0 are needed")
                if used.setdefault(value, name) != name:
                    raise InputError(f"classes {used[value]} and {name} both have value {value}; choose one")
        if len(set(self.classes)) != len(self.classes):
            raise InputError(f"classes {self.classes}: a name occurs twice")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would drop the first organ of that name in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
