"""Training slices decoded once: all images and labels of a data set in two flat files, read through memory maps."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samlora.data.dataset import SliceFile, fingerprint
from samlora.files import whole

_FORMAT = 1


class SliceCache:
    """The slices of a data set by index: image (H, W) or (H, W, C) float32 and label (H, W) uint8.

    Their names and contents decide the names of the files in `folder`, so another or a changed data set makes another
    cache and nothing out of date is ever read. Takes the size of the decoded arrays on disk; processes share its pages
    in memory. Raises InputError where a slice cannot be read or the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, slices: Sequence[SliceFile]):
        name = hashlib.sha256(f"{_FORMAT} {fingerprint(slices)}".encode()).hexdigest()[:16]
        self._stem = Path(folder) / name
        index = self._path("json")
        if not (index.is_file() and self._is_whole(json.loads(index.read_text(encoding="utf-8")))):
            self._build(slices)
        self._shapes = [tuple(shape) for shape in json.loads(index.read_text(encoding="utf-8"))["shapes"]]
        sizes = np.array([(np.prod(shape), np.prod(shape[:2])) for shape in self._shapes], np.int64).reshape(-1, 2)
        self._starts = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(sizes, axis=0)])
        self._maps: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self._maps is None:
            kinds = ("images", np.float32), ("labels", np.uint8)
            self._maps = tuple(np.memmap(self._path(kind), dtype, "r") for kind, dtype in kinds)
        (image, label), (image_end, label_end) = self._starts[index], self._starts[index + 1]
        shape = self._shapes[index]
        # Copies: what is handed out may be written to, and the map may not.
        return (
            np.array(self._maps[0][image:image_end]).reshape(shape),
            np.array(self._maps[1][label:label_end]).reshape(shape[:2]),
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": None}  # a worker process opens the maps itself instead of being sent them

    def _path(self, kind: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{kind}")

    def _is_whole(self, index: dict) -> bool:
        sizes = {kind: self._path(kind).stat().st_size for kind in ("images", "labels") if self._path(kind).is_file()}
        return sizes == index["bytes"]

    def _build(self, slices: Sequence[SliceFile]) -> None:
        from tqdm import tqdm

        shapes = []
        with whole(self._path("images")) as images, whole(self._path("labels")) as labels:
            with open(images, "wb") as image_file, open(labels, "wb") as label_file:
                for item in tqdm(slices, "decoding slices once", unit="slice", disable=None):
                    image, label = item.read()
                    image_file.write(np.ascontiguousarray(image, np.float32))
                    label_file.write(np.ascontiguousarray(label, np.uint8))
                    shapes.append(image.shape)
        sizes = {kind: self._path(kind).stat().st_size for kind in ("images", "labels")}
        with whole(self._path("json")) as part:
            part.write_text(json.dumps({"shapes": shapes, "bytes": sizes}), encoding="utf-8")
