"""Chunks of volumes: neighbouring slices that an image encoder with a depth branch sees together."""

from collections.abc import Collection, Sequence

import numpy as np

from samlora.data.dataset import Sample, SliceDataset, SliceFile
from samlora.data.patches import stacks


def slices_from(first: int, count: int, depth: int) -> list[int]:
    """`depth` neighbouring slices of a volume of `count`, from `first` on, moved inwards where they reach beyond it.

    A volume of fewer slices gives its last one again.
    """
    start = max(min(first, count - depth), 0)
    return [min(index, count - 1) for index in range(start, start + depth)]


class ChunkDataset:
    """Chunks by (epoch, index): lists of `depth` samples, neighbouring slices of one volume and in one transform.

    There are as many as slices in `shown`, those that show a class, and each of these is in its own; where in it, and
    the transform, depend on seed, epoch and index alone. slices: whole volumes. augment, decoded: as of SliceDataset.
    Raises InputError for a gap in a volume (`samlora.data.patches.stacks`).
    """

    def __init__(
        self,
        slices: Sequence[SliceFile],
        shown: Collection[SliceFile],
        seed: int,
        depth: int,
        augment: str = "samed",
        decoded: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    ):
        self._all, self._stacks = SliceDataset(slices, seed, augment, decoded), stacks(slices)
        self._depth, self._seed, shown = depth, seed, set(shown)
        self._shown = [n for n, item in enumerate(slices) if item in shown]
        self._place = {index: n for members in self._stacks.values() for n, index in enumerate(members)}
        self.slices = [slices[index] for index in self._shown]

    def __len__(self) -> int:
        return len(self._shown)

    def __getitem__(self, key: tuple[int, int]) -> list[Sample]:
        epoch, index = key[0], self._shown[key[1]]
        members = self._stacks[self._all.slices[index].case]
        before = int(np.random.default_rng([self._seed, 7, epoch, index]).integers(self._depth))
        chosen = [members[n] for n in slices_from(self._place[index] - before, len(members), self._depth)]
        turned = self._all.transform((epoch, index))
        return [self._all.sample((epoch, one), turned) for one in chosen]
