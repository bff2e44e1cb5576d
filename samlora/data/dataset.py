"""Training slices and test volumes on disk: found, checked, split by case, drawn in a reproducible order."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samlora.data.augment import SAMPLERS, Transform
from samlora.data.grid import Geometry
from samlora.data.ignored import split_ignored
from samlora.data.opening import reading
from samlora.data.recipe import Recipe
from samlora.data.volume import read_slice, stack_length
from samlora.errors import InputError, MissingFileError
from samlora.files import find_file, read_text, same_name


@dataclass(frozen=True)
class SliceFile:
    """One training slice: its path, the case it was cut from, and, in a stack of MedSAM's format, its number."""

    path: Path
    case: str
    index: int | None = None

    @property
    def name(self) -> str:
        return self.path.stem if self.index is None else f"{self.path.stem}_slice{self.index:03d}"

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W) or (H, W, C) float32 and label (H, W) integer; InputError where it cannot be read."""
        return read_slice(self.path, self.index)


@dataclass(frozen=True)
class Sample:
    """A slice from disk, and what is to be done to it.

    image (H, W) or (C, H, W) float32, label (H, W) uint8; or a patch of a volume, (D, S, S) or
    (C, D, S, S). The label holds `samlora.data.ignored.IGNORE` where the recipe ignores values.

    key: (epoch, index), on which all that is random about it depends.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    transform: Transform
    key: tuple[int, int] = (0, 0)


def data_folder(root: str | Path, inner: str, flag: str) -> Path:
    """`root/inner` where that exists, else `root`. Raises MissingFileError naming the flag."""
    root = Path(root)
    if not root.is_dir():
        raise MissingFileError(
            f"{flag} {root}: there is no such folder; make it with: samlora prepare SRC -o {root} --dataset NAME"
        )
    return root / inner if (root / inner).is_dir() else root


def _listed(folder: Path, list_dir: str | Path | None, list_name: str, ending: str, what: str) -> list[Path]:
    """The files of a list file where a folder of lists is given, else all files of `folder`, sorted."""
    if list_dir is None:
        found = sorted(p for p in folder.glob(f"*{ending}") if not p.name.startswith("."))
        if not found:
            raise InputError(
                f"{folder}: holds no {what} (*{ending}); make some with: samlora prepare SRC -o DST --dataset NAME"
            )
        return found
    listing = Path(list_dir) / list_name
    if not listing.is_file():
        raise MissingFileError(
            f"--list_dir {list_dir}: there is no {list_name} in it; leave --list_dir out to use the whole folder"
        )
    names = [line.strip() for line in read_text(listing).splitlines() if line.strip()]
    paths = [find_file(folder / f"{name}{ending}") for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise MissingFileError(
            f"{listing}: names {missing[0].name}{more}, which is not in {folder}; correct the list or the folder"
        )
    if not paths:
        raise InputError(f"{listing}: is empty; put one name a line into it or leave --list_dir out")
    return paths


def find_slices(root: str | Path, list_dir: str | Path | None = None) -> list[SliceFile]:
    """The training slices below `root` (in train_npz/ or itself), or those that list_dir/train.txt names.

    The case of `case0005_slice000.npz` is case0005; a name without `_slice` is its own case, and so is a file in
    MedSAM's format (`imgs`, `gts`), of which every slice is taken. Raises MissingFileError or InputError when there are
    none.
    """
    paths = _listed(data_folder(root, "train_npz", "--root_path"), list_dir, "train.txt", ".npz", "training slices")
    found = []
    for path in paths:
        length = stack_length(path)
        if length is None:
            found.append(SliceFile(path, same_name(path.stem).rsplit("_slice", 1)[0]))
        else:
            found += [SliceFile(path, same_name(path.stem), index) for index in range(length)]
    return found


def read_recipe(root: str | Path) -> Recipe | None:
    """The recipe beside training slices, if any: published data have none."""
    folder = data_folder(root, "train_npz", "--root_path")
    for place in (folder, folder.parent):
        if (place / "recipe.yaml").is_file():
            return Recipe.load(place / "recipe.yaml")
    return None


def read_geometry(root: str | Path, case: str) -> Geometry | None:
    """The grid a training case was cut from, as `samlora prepare` recorded it; None for published data."""
    record = data_folder(root, "train_npz", "--root_path").parent / "cases" / f"{case}.json"
    if not record.is_file():
        return None
    return Geometry.from_dict(json.loads(record.read_text(encoding="utf-8"))["geometry"])


def find_volumes(root: str | Path, list_dir: str | Path | None = None) -> list[Path]:
    """The test volumes below `root` (in test_vol_h5/ or itself), or those that list_dir/test_vol.txt names.

    Raises MissingFileError or InputError when there are none.
    """
    return _listed(
        data_folder(root, "test_vol_h5", "--volume_path"), list_dir, "test_vol.txt", ".npy.h5", "test volumes"
    )


@dataclass(frozen=True)
class Contents:
    """What a set of slices holds: pixels of each class, background first, range of image values, channels."""

    pixels: np.ndarray
    low: float
    high: float
    channels: int = 1


def check_slices(
    slices: Sequence[SliceFile], num_classes: int, threads: int = 4, recipe: Mapping | None = None
) -> Contents:
    """Reads every slice once and says what they hold. recipe: what made them, as plain values; None if not known.

    Raises InputError naming the first file with a label outside 0..num_classes, one that cannot be read, or one with
    more or fewer channels than the first.
    """

    def read(item: SliceFile) -> tuple[np.ndarray, float, float, int]:
        image, label = item.read()
        label, _ = split_ignored(label, recipe)
        low, high = int(label.min()), int(label.max())
        if low < 0 or high > num_classes:
            outside = [int(v) for v in np.unique(label) if v < 0 or v > num_classes]
            shown = ", ".join(map(str, outside[:8])) + (", ..." if len(outside) > 8 else "")
            raise InputError(
                f"{item.path}: label values {shown} are outside 0..{num_classes}; set --num_classes "
                f"to the number "
                f"of foreground classes, or prepare the data with a label map"
            )
        pixels = np.bincount(label.ravel().astype(np.int64), minlength=num_classes + 1)
        return pixels, float(image.min()), float(image.max()), 1 if image.ndim == 2 else image.shape[2]

    with ThreadPoolExecutor(threads) as pool:
        pixels, lows, highs, channels = zip(*pool.map(read, slices))
    for item, count in zip(slices, channels):
        if count != channels[0]:
            raise InputError(
                f"{item.path}: has {count} channels, {slices[0].path.name} {channels[0]}; prepare all with one recipe"
            )
    return Contents(sum(pixels), min(lows), max(highs), channels[0])


def split_cases(
    slices: Sequence[SliceFile],
    val_cases: Sequence[str] = (),
    val_fraction: float = 0.0,
    seed: int = 0,
    patient_of: Callable[[str], str] = str,
) -> tuple[list[SliceFile], list[SliceFile]]:
    """Splits slices into training and validation, whole patients at a time.

    val_cases: names of cases. val_fraction: share of the patients, drawn with `seed`, at least one. patient_of: the
    patient of a case (`Recipe.patient_of`); by default every case is another one.
    Raises InputError for a case that is not there, a patient on both sides, or when nothing is left to train on.
    """
    val_cases = [same_name(case) for case in val_cases]
    patients = {case: patient_of(case) for case in sorted({item.case for item in slices})}
    cases = sorted(set(patients.values()))
    unknown = [case for case in val_cases if case not in patients]
    if unknown:
        raise InputError(
            f"--val_cases {unknown[0]}: there is no such case; there are "
            f"{', '.join([*patients][:8])}{', ...' * (len(patients) > 8)}"
        )
    check_patients(val_cases, patients, "--val_cases")
    if not 0 <= val_fraction < 1:
        raise InputError(
            f"--val_fraction {val_fraction} is not possible; give a share of the cases from 0 up to, not including, 1"
        )
    chosen = {patients[case] for case in val_cases}
    if not chosen and val_fraction:
        count = max(1, round(val_fraction * len(cases)))
        chosen = set(np.random.default_rng([seed, 1]).permutation(cases)[:count].tolist())
    if chosen == set(cases):
        raise InputError(f"validation takes all {len(patients)} cases and leaves none to train on; name fewer cases")
    held = {case for case, patient in patients.items() if patient in chosen}
    return [s for s in slices if s.case not in held], [s for s in slices if s.case in held]


def check_patients(chosen: Iterable[str], patients: Mapping[str, str], flag: str) -> None:
    """Raises InputError, naming `flag`, when `chosen` cases leave out others of their patients.

    patients: case -> patient, of all cases.
    """
    chosen = set(chosen)
    for case in sorted(chosen):
        for other, patient in patients.items():
            if patient == patients[case] and other not in chosen:
                raise InputError(
                    f"{flag} {case}: {other} shows the same patient ({patient}) and would be trained on; name both"
                )


def fingerprint(slices: Sequence[SliceFile], skip: bool = False) -> str:
    """SHA-256 over the names and contents (the archives' own check sums) of training slices.

    skip: one that is no archive counts by its name alone, where it otherwise raises InputError.
    """
    digest = hashlib.sha256()
    for item in slices:
        sums = None
        try:
            with reading(item.path, "npz archive"), zipfile.ZipFile(item.path) as archive:
                sums = [(member.filename, member.CRC, member.file_size) for member in archive.infolist()]
        except InputError:
            if not skip:
                raise
        digest.update(repr((item.name, sums)).encode())
    return digest.hexdigest()


class SliceDataset:
    """Samples by (epoch, index): a slice, and a transform that depends on seed, epoch and index alone.

    augment: a key of `samlora.data.augment.SAMPLERS`.
    decoded: the same slices as `samlora.data.cache.SliceCache` keeps them, read instead of the files.
    """

    def __init__(
        self,
        slices: Sequence[SliceFile],
        seed: int,
        augment: str = "samed",
        decoded: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    ):
        self.slices, self.seed, self.augment, self.decoded = list(slices), seed, augment, decoded

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.sample(key, self.transform(key))

    def transform(self, key: tuple[int, int]) -> Transform:
        """What is done to the sample of this (epoch, index)."""
        return SAMPLERS[self.augment](np.random.default_rng([self.seed, 2, *key]))

    def sample(self, key: tuple[int, int], transform: Transform) -> Sample:
        """The sample of this (epoch, index), in a transform of the caller's."""
        item = self.slices[key[1]]
        image, label = item.read() if self.decoded is None else self.decoded[key[1]]
        if image.ndim == 3:  # files hold channels last, as pictures do
            image = np.ascontiguousarray(np.moveaxis(image, -1, 0))
        return Sample(item.name, image, label.astype(np.uint8), transform, key)


class Batches:
    """The order of samples of a whole training run, as lists of (epoch, index), from any position on.

    Every epoch is a permutation that depends on seed and epoch alone, cut into batches of
    `batch_size * ranks`; the last batch is kept. A rank takes every `ranks`-th sample of a batch; a last
    batch smaller than the number of ranks is filled up from its own beginning, so that none goes empty.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.count, self.batch_size, self.epochs, self.seed = count, batch_size, epochs, seed
        self.start, self.rank, self.ranks = start, rank, ranks
        self.per_epoch = -(-count // (batch_size * ranks))

    def __len__(self) -> int:
        return self.epochs * self.per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size * self.ranks
        for epoch in range(self.start // self.per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, 3, epoch]).permutation(self.count)
            skip = self.start - epoch * self.per_epoch if epoch == self.start // self.per_epoch else 0
            for position in range(skip, self.per_epoch):
                chosen = order[position * size : (position + 1) * size]
                if len(chosen) < self.ranks:
                    chosen = np.resize(chosen, self.ranks)
                yield [(epoch, int(index)) for index in chosen[self.rank :: self.ranks]]
