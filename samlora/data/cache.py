"""Training slices decoded once: all images and labels of a data set in two flat files, read through memory maps.

`building`, `write_index` and `read_index` are for whatever is kept in flat files beside an index.
"""

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from samlora.data.dataset import SliceFile, fingerprint
from samlora.errors import InputError
from samlora.files import whole

_FORMAT = 1
_BLOCK = 2**24  # bytes that one check sum is taken of
_COMPARED = 256  # blocks of a file that are compared when it is opened
_SECONDS_TO_LOCK = 5  # a part that changed this recently may be one that its writer is about to lock


class SliceCache:
    """The slices of a data set by index: image (H, W) or (H, W, C) float32 and label (H, W) uint8.

    Their names and contents decide the names of the files in `folder`, so another or a changed data set makes another
    cache and nothing out of date is ever read; what is damaged is made again (`read_index`). Takes the size of the
    decoded arrays on disk; processes share its pages in memory. A slice that cannot be read has no place in it: it is
    read from its file, which raises InputError as it does without a cache, and when that is mended the cache is made
    again. Raises InputError where the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, slices: Sequence[SliceFile]):
        name = hashlib.sha256(f"{_FORMAT} {fingerprint(slices, skip=True)}".encode()).hexdigest()[:16]
        self._files = {kind: Path(folder) / f"{name}.{kind}" for kind in ("images", "labels")}
        index = Path(folder) / f"{name}.json"
        facts = read_index(index, self._files.values(), slices)
        if facts is None:
            facts = self._decode(slices)
            write_index(index, self._files.values(), facts)
        self._holes = {number: slices[number] for number in facts["holes"]}
        self._shapes = [tuple(shape) for shape in facts["shapes"]]
        sizes = np.array([(np.prod(shape), np.prod(shape[:2])) for shape in self._shapes], np.int64).reshape(-1, 2)
        self._starts = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(sizes, axis=0)])
        self._maps: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self._holes:
            return self._holes[index].read()
        if self._maps is None:
            kinds = ("images", np.float32), ("labels", np.uint8)
            self._maps = tuple(np.memmap(self._files[kind], dtype, "r") for kind, dtype in kinds)
        (image, label), (image_end, label_end) = self._starts[index], self._starts[index + 1]
        shape = self._shapes[index]
        # Copies: what is handed out may be written to, and the map may not.
        return (
            np.array(self._maps[0][image:image_end]).reshape(shape),
            np.array(self._maps[1][label:label_end]).reshape(shape[:2]),
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": None}  # a worker process opens the maps itself instead of being sent them

    def _decode(self, slices: Sequence[SliceFile]) -> dict[str, list]:
        from tqdm import tqdm

        shapes, holes = [], []
        with building(self._files["images"]) as images, building(self._files["labels"]) as labels:
            for number, item in enumerate(tqdm(slices, "decoding slices once", unit="slice", disable=None)):
                try:
                    image, label = item.read()
                except InputError:
                    holes.append(number)
                    shapes.append((0, 0))
                    continue
                images.write(np.ascontiguousarray(image, np.float32))
                labels.write(np.ascontiguousarray(label, np.uint8))
                shapes.append(image.shape)
        return {"shapes": shapes, "holes": holes}


@contextlib.contextmanager
def building(path: Path) -> Iterator[BinaryIO]:
    """An open file that becomes `path` if the block succeeds, and is gone if it does not; SIGTERM too ends in order.

    What killed processes have left of the same file is removed, as a lock tells that nobody writes it any more. Where
    there are no such locks (Windows, some network disks) it stays. Raises InputError as `whole` does.
    """
    _remove_left(path)
    with _ended_in_order(), contextlib.ExitStack() as last, whole(path) as part, open(part, "wb") as file:
        last.callback(os.close, os.dup(file.fileno()))  # keeps the lock until the part has got its name
        _lock(file)
        yield file
    _remove_left(path)


def write_index(index: Path, files: Iterable[Path], facts: Mapping) -> None:
    """Stores `facts` about `files`, with the files' check sums; "holes" names slices that could not be read."""
    facts = dict(facts, files=[[path.stat().st_size, _sums(path, range(_blocks(path)))] for path in files])
    with building(index) as file:
        file.write(json.dumps(facts | {"sum": _sum(facts)}).encode())


def read_index(index: Path, files: Iterable[Path], slices: Sequence[SliceFile]) -> dict | None:
    """The facts that were stored about `files`; None where the files are to be made: for the first time or again.

    That is so where any of them was damaged, or one of the slices that could not be read now can; a line says so. Of
    each file all is compared with its check sums up to 4 GB, of a larger one 4 GB in 256 parts over all its length.
    That takes two seconds and the time in which the disk gives 4 GB.
    """
    from tqdm import tqdm

    if not index.exists():
        return None
    try:
        facts = json.loads(index.read_bytes())
        intact = facts.pop("sum") == _sum(facts) and all(map(_is_intact, files, facts["files"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no JSON, or none of ours
        intact = False
    if not intact:
        tqdm.write(f"{index.with_suffix('')}: this cache is damaged or of another version; making it again")
    elif mended := [slices[number].name for number in facts["holes"] if _can_be_read(slices[number])]:
        tqdm.write(f"{index.with_suffix('')}: {mended[0]} can be read again; making this cache again")
    else:
        return facts
    return None


def _can_be_read(item: SliceFile) -> bool:
    try:
        item.read()
    except InputError:
        return False
    return True


def _is_intact(path: Path, stored: tuple[int, list[int]]) -> bool:
    size, sums = stored
    if path.stat().st_size != size:
        return False
    numbers = np.unique(np.linspace(0, len(sums) - 1, min(len(sums), _COMPARED), dtype=int)).tolist()
    return _sums(path, numbers) == [sums[number] for number in numbers]


def _blocks(path: Path) -> int:
    return -(-path.stat().st_size // _BLOCK)


def _sums(path: Path, numbers: Iterable[int]) -> list[int]:
    """Check sums of blocks of a file."""
    found = []
    with open(path, "rb") as file:
        for number in numbers:
            file.seek(number * _BLOCK)
            found.append(zlib.crc32(file.read(_BLOCK)))
    return found


def _sum(facts: Mapping) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _remove_left(path: Path) -> None:
    """Removes parts of `path` (of `samlora.files.whole`) that nobody writes any more."""
    for part in path.parent.glob(f".part-*-{path.name}"):
        with contextlib.suppress(OSError):  # another process was quicker, or it is another user's
            if time.time() - part.stat().st_mtime > _SECONDS_TO_LOCK:
                with open(part, "r+b") as file:
                    if _lock(file):
                        part.unlink()


def _lock(file: BinaryIO) -> bool:
    """Whether this process now holds the lock of an open file; False where another does, or there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Has SIGTERM, where nobody handles it, end the process as Ctrl-C does: what is to be removed then is removed."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
