"""What was changed in a label map, so that it can be undone and done again, voxel for voxel."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

_MOST_BYTES = 256 << 20  # of all edits together; the oldest are forgotten first
_MOST_EDITS = 200


@dataclass(frozen=True)
class Edit:
    """One change of the labels within `box` of a stack that was cut as `plane` says (orientation, slice axis).

    before, after: the labels there, compressed (label maps shrink a hundredfold). state_before, state_after: what else
    goes back with them.
    """

    what: str
    plane: tuple[str | None, int]
    box: tuple[slice, slice, slice]
    before: bytes
    after: bytes
    state_before: Any
    state_after: Any

    @property
    def slices(self) -> tuple[int, int] | None:
        """First and last slice + 1 where labels changed; None where none did."""
        part = self.box[0]
        return (part.start, part.stop) if part.stop > part.start else None

    def labels(self, which: str) -> np.ndarray:
        """The labels "before" or "after", as large as the box."""
        shape = [part.stop - part.start for part in self.box]
        return np.frombuffer(zlib.decompress(getattr(self, which)), np.uint8).reshape(shape)


def edit_of(
    what: str,
    plane: tuple[str | None, int],
    first: int,
    before: np.ndarray,
    after: np.ndarray,
    states: tuple[Any, Any] = (None, None),
) -> Edit:
    """What changed from `before` to `after`, uint8 (D, H, W) both, of which slice 0 is slice `first` of the stack.

    Where nothing changed the box is empty.
    """
    changed = before != after
    box = []
    for axis in range(3):
        found = np.flatnonzero(changed.any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0))
    packed = [zlib.compress(np.ascontiguousarray(array[tuple(box)]).tobytes(), 1) for array in (before, after)]
    box[0] = slice(box[0].start + first, box[0].stop + first)
    return Edit(what, plane, tuple(box), *packed, *states)


class History:
    """The edits in their order, and how many of them stand now."""

    def __init__(self) -> None:
        self._edits: list[Edit] = []
        self._standing = 0

    def push(self, edit: Edit) -> None:
        """Adds an edit that was just made; what had been undone is forgotten."""
        self._edits[self._standing :] = [edit]
        sizes = [len(e.before) + len(e.after) for e in self._edits]
        while len(self._edits) > 1 and (len(self._edits) > _MOST_EDITS or sum(sizes) > _MOST_BYTES):
            self._edits.pop(0)
            sizes.pop(0)
        self._standing = len(self._edits)

    @property
    def last(self) -> Edit | None:
        """The edit that `back` takes back."""
        return self._edits[self._standing - 1] if self._standing else None

    @property
    def next(self) -> Edit | None:
        """The edit that `forward` makes again."""
        return self._edits[self._standing] if self._standing < len(self._edits) else None

    def back(self) -> Edit | None:
        """Takes one edit as undone and returns it; None where there is none."""
        edit = self.last
        self._standing -= edit is not None
        return edit

    def forward(self) -> Edit | None:
        """Takes one edit as done again and returns it; None where there is none."""
        edit = self.next
        self._standing += edit is not None
        return edit
