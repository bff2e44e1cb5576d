"""Image embeddings of all training slices, computed once: for systems whose image encoder stays as it is."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samlora.data.batch import make_batch
from samlora.data.dataset import SliceDataset, fingerprint
from samlora.errors import InputError
from samlora.files import whole
from samlora.model.methods import system_row
from samlora.model.sam import Sam

_FORMAT = 1


class EmbeddingCache:
    """Embeddings (256, S/16, S/16) of a data set's slices, by index, in one flat file read through a memory map.

    The slices' contents, the base weights, the size, the framing and the number format decide the file's name, so that
    nothing out of date is ever read. Takes 1 MB a slice at 512 px and 4 MB at 1024 px. Raises InputError where
    something before the embeddings trains, a slice cannot be read or the folder not be written.
    """

    def __init__(self, folder: str | os.PathLike, model: Sam, slices: SliceDataset, precision: torch.dtype, batch: int):
        spec, row = model.spec, system_row(model.spec.system)
        moving = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(("image_enc", "input_st"))]
        if moving:
            raise InputError(
                f"--cache_embeddings {folder}: the encoder of {spec.system} trains ({len(moving)} tensors, such as "
                f"{moving[0]}), so its embeddings change; leave the flag out, or use medsam_decoder"
            )
        base = spec.base_sha256 or spec.base
        origin = [_FORMAT, fingerprint(slices.slices), base, spec.variant, spec.image_size, row.pad, row.normalise]
        name = hashlib.sha256(repr([*origin, str(precision)]).encode()).hexdigest()[:16]
        self._data, self._index = (Path(folder) / f"{name}.{ending}" for ending in ("embeddings", "json"))
        if not self._is_whole():
            self._build(model, slices, precision, batch)
        index = json.loads(self._index.read_text(encoding="utf-8"))
        self._dtype = getattr(torch, index["dtype"])
        stored = np.float32 if self._dtype == torch.float32 else np.int16  # NumPy has no bfloat16
        self._map = np.memmap(self._data, stored, "r", shape=tuple(index["shape"]))

    def __len__(self) -> int:
        return len(self._map)

    def batch(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """(B, 256, S/16, S/16) of the slices `indices`."""
        part = torch.from_numpy(self._map[list(indices)])
        return (part if self._dtype == torch.float32 else part.view(self._dtype)).to(device)

    def _is_whole(self) -> bool:
        if not (self._index.is_file() and self._data.is_file()):
            return False
        return json.loads(self._index.read_text(encoding="utf-8"))["bytes"] == self._data.stat().st_size

    @torch.no_grad()
    def _build(self, model: Sam, slices: SliceDataset, precision: torch.dtype, batch: int) -> None:
        from tqdm import tqdm

        row, device = system_row(model.spec.system), next(model.parameters()).device
        shape, dtype = (), "float32"
        with whole(self._data) as part, open(part, "wb") as file:
            bar = tqdm(range(0, len(slices), batch), "embedding slices once", unit="batch", disable=None)
            for start in bar:
                samples = [slices[0, index] for index in range(start, min(start + batch, len(slices)))]
                images, labels = ([torch.from_numpy(getattr(s, kind)) for s in samples] for kind in ("image", "label"))
                transforms = [sample.transform for sample in samples]
                square, _ = make_batch(images, labels, transforms, model.image_size, device, row.pad, model.fill)
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    embeddings = model.encode(square).cpu()
                shape, dtype = embeddings.shape[1:], str(embeddings.dtype).removeprefix("torch.")
                file.write((embeddings if dtype == "float32" else embeddings.view(torch.int16)).numpy())
        facts = {"shape": [len(slices), *shape], "dtype": dtype, "bytes": self._data.stat().st_size}
        with whole(self._index) as part:
            part.write_text(json.dumps(facts), encoding="utf-8")
