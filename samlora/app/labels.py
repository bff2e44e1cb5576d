"""The labels that can be drawn: their values, names and colours."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from samlora.colours import class_colour
from samlora.errors import InputError

MOST_LABELS = 255  # a label map is uint8


@dataclass
class Label:
    """A label value, what it is called, and its colour (#rrggbb), the same as in reports."""

    value: int
    name: str
    colour: str = field(init=False)

    def __post_init__(self) -> None:
        self.colour = "#" + "".join(f"{round(255 * part):02x}" for part in class_colour(self.value))


class Labels:
    """The labels in order, beginning with `names` as 1, 2, ...; `active` is the value that is drawn."""

    def __init__(self, names: Sequence[str] = ("object",)):
        self._labels = [Label(value, name) for value, name in enumerate(names, start=1)]
        self.active = 1

    def __iter__(self) -> Iterator[Label]:
        return iter(self._labels)

    def with_names(self, names: Sequence[str]) -> "Labels":
        """A copy in which each of `names` has a label. Raises InputError where they are too many."""
        labels = copy.deepcopy(self)
        for name in names:
            labels.named(name)
        return labels

    def of(self, value: int) -> Label:
        """The label of a value. Raises InputError if there is none."""
        found = next((label for label in self._labels if label.value == value), None)
        if found is None:
            raise InputError(f"label {value}: there is none of that value; choose one from the list, or add one")
        return found

    def named(self, name: str) -> Label:
        """The label of that name, added if there is none."""
        return next((label for label in self._labels if label.name == name), None) or self.add(name)

    def add(self, name: str) -> Label:
        """A new label under the first free value. Raises InputError for a name that cannot be, or too many labels."""
        name = self._free(name)
        used = {label.value for label in self._labels}
        value = next((n for n in range(1, MOST_LABELS + 1) if n not in used), None)
        if value is None:
            raise InputError(f"label {name!r}: {MOST_LABELS} labels are there already, and more do not fit")
        self._labels.append(Label(value, name))
        return self._labels[-1]

    def rename(self, value: int, name: str) -> None:
        """Calls a label otherwise. Raises InputError for a name that cannot be."""
        label = self.of(value)
        if name.strip() != label.name:
            label.name = self._free(name)

    def _free(self, name: str) -> str:
        name = " ".join(name.split())
        if not 0 < len(name) <= 64:
            raise InputError(f"label name {name[:70]!r}: 1 to 64 characters are needed")
        if not name.isprintable():  # half of a surrogate pair cannot even be sent to the page
            raise InputError(f"label name {name!r}: holds characters that cannot be shown; leave them out")
        if any(label.name == name for label in self._labels):
            raise InputError(f"label name {name!r}: is there already; choose another")
        return name
