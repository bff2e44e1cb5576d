"""Patches of volumes, cut from training slices: what networks of volumes are trained on.

A case's slices, in order, are its volume. Voxels are taken as they are stored; nothing is resampled to one spacing.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from samlora.data.augment import SAMPLERS, Transform
from samlora.data.batch import transformed
from samlora.data.dataset import Sample, SliceFile
from samlora.data.ignored import split_ignored
from samlora.errors import InputError


def place(item: SliceFile) -> tuple[str, int, str]:
    """What orders slices by their cases, and within a case by the number in their names, -1 where these hold none."""
    number = item.name.rpartition("_slice")[2]
    return item.case, int(number) if number.isdecimal() else -1, item.name


def stacks(slices: Sequence[SliceFile]) -> dict[str, list[int]]:
    """Case -> where in `slices` its slices are, from its first to its last.

    Raises InputError, naming the slice after it, for a gap: what is stored side by side must be so in space.
    """
    found: dict[str, list[int]] = {}
    for position in sorted(range(len(slices)), key=lambda n: place(slices[n])):
        found.setdefault(slices[position].case, []).append(position)
    for positions in found.values():
        for before, after in zip(positions, positions[1:]):
            if place(slices[before])[1] + 1 != place(slices[after])[1]:
                raise InputError(
                    f"{slices[after].path}: does not follow {slices[before].name} by its number, but this system needs "
                    "all slices of a volume between its first and its last; prepare the data with keep: all"
                )
    return found


class PatchDataset:
    """Samples by (epoch, index): a patch of the volume that slice `index` is of; seed, epoch and index decide it.

    There are as many an epoch as slices, so that volumes count by their length. About half have a voxel of a class at
    their centre, each class of the volume as often as the others; the rest lie anywhere. At a border a patch is moved
    inwards; a volume smaller than a patch is padded with 0, half of it on each side, as in prediction.

    roi: (D, S, S), size of a patch in voxels. augment: as of SliceDataset, but "samed" is quarter turns and flips in
    the plane: turns by less would bring in corners that no image has. decoded: as of SliceDataset; without it a patch
    takes the reading of D slices. Samples have an image (D, S, S), or (C, D, S, S) where slices hold channels, and a
    label (D, S, S). recipe: what made the slices, as plain values; what it ignores is no class.
    Reads every slice once. Raises InputError for a slice that cannot be read, a gap (`stacks`), or
    slices of several sizes in a volume.
    """

    def __init__(
        self,
        slices: Sequence[SliceFile],
        seed: int,
        roi: tuple[int, int, int],
        augment: str = "samed",
        decoded: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
        threads: int = 4,
        recipe: Mapping | None = None,
    ):
        self._recipe = recipe
        self.slices, self.seed, self.roi, self.augment, self.decoded = list(slices), seed, roi, augment, decoded
        self._stacks = stacks(self.slices)
        with ThreadPoolExecutor(threads) as pool:
            labels = pool.map(self._label_to_draw, range(len(self.slices)))
            self._sizes, self._pixels = zip(*((label.shape, np.bincount(label.ravel())) for label in labels))
        for case, members in self._stacks.items():
            other = next((n for n in members if self._sizes[n] != self._sizes[members[0]]), None)
            if other is not None:
                first, size = (" x ".join(map(str, self._sizes[n])) for n in (members[0], other))
                raise InputError(
                    f"{self.slices[other].path}: is {size} pixels, the first slice of {case} {first}; prepare it again"
                )

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        case, random = self.slices[index].case, np.random.default_rng([self.seed, 2, epoch, index])
        members, size = self._stacks[case], (len(self._stacks[case]), *self._sizes[index])
        centre = self._voxel_of_class(members, random) if random.random() < 0.5 else None
        last = [max(n - r, 0) for n, r in zip(size, self.roi)]
        if centre is None:
            start = [int(random.integers(most + 1)) for most in last]
        else:
            start = [min(max(c - r // 2, 0), most) for c, r, most in zip(centre, self.roi, last)]
        depth, rows, cols = (slice(s, min(s + r, n)) for s, r, n in zip(start, self.roi, size))
        planes = [self._read(n) for n in members[depth]]
        image, label = (np.stack([plane[which][rows, cols] for plane in planes]) for which in (0, 1))
        margins = [((r - n) // 2, (r - n) - (r - n) // 2) for r, n in zip(self.roi, label.shape)]
        image, label = np.pad(image, margins + [(0, 0)] * (image.ndim - 3)), np.pad(label, margins)
        if image.ndim == 4:  # files hold channels last, as pictures do
            image = np.ascontiguousarray(np.moveaxis(image, -1, 0))
        if self.augment == "samed":
            transform = Transform(int(random.integers(4)), (None, 0)[random.integers(2)])
        else:
            transform = SAMPLERS[self.augment](random)
        where = ", ".join(f"{part.start}:{part.stop}" for part in (depth, rows, cols))
        return Sample(f"{case}[{where}]", image, label, transform, key)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self.slices[index].read() if self.decoded is None else self.decoded[index]
        return image, label.astype(np.uint8)

    def _label_to_draw(self, index: int) -> np.ndarray:
        """The label of a slice by which patches are chosen: what is ignored is no class."""
        return split_ignored(self._read(index)[1], self._recipe)[0]

    def _voxel_of_class(self, members: Sequence[int], random: np.random.Generator) -> tuple[int, int, int] | None:
        """A voxel (slice, row, column) of a class of the volume; None where it shows none."""
        classes = sorted({int(c) for n in members for c in np.flatnonzero(self._pixels[n]) if c})
        if not classes:
            return None
        chosen = random.choice(classes)
        counts = np.array([self._pixels[n][chosen] if chosen < len(self._pixels[n]) else 0 for n in members])
        depth = int(random.choice(len(members), p=counts / counts.sum()))
        places = np.argwhere(self._read(members[depth])[1] == chosen)
        row, col = places[random.integers(len(places))]
        return depth, int(row), int(col)


def patch_batch(samples: Sequence[Sample], device):
    """Patches, turned and flipped, as images (B, C, D, S, S) float32 and labels (B, D, S, S) int64 on `device`."""
    import torch

    images, labels = (
        torch.stack([transformed(torch.from_numpy(getattr(s, kind)).to(device), s.transform) for s in samples])
        for kind in ("image", "label")
    )
    return (images[:, None] if images.ndim == 4 else images), labels.long()
