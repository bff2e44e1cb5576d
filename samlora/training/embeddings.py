"""Image embeddings of all training slices, computed once: for systems whose image encoder stays as it is."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samlora.data.batch import make_batch
from samlora.data.cache import building, read_index, write_index
from samlora.data.dataset import Sample, SliceDataset, fingerprint
from samlora.errors import InputError
from samlora.model.sam import Sam

_FORMAT = 1


class EmbeddingCache:
    """Embeddings (256, S/16, S/16) of a data set's slices, by index, in one flat file read through a memory map.

    The slices' contents, the base weights, the size, the framing, the number format and the batch size, on which
    rounding depends, decide the file's name, so that nothing out of date is ever read; what is damaged is made again
    (`samlora.data.cache.read_index`). Takes 1 MB a slice at 512 px and 4 MB at 1024 px. A slice that cannot be read has
    none; when it is mended, all are made again. Raises InputError where something before the embeddings trains or the
    folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, model: Sam, slices: SliceDataset, precision: torch.dtype, batch: int):
        spec = model.spec
        moving = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(("image_enc", "input_st"))]
        if moving:
            raise InputError(
                f"--cache_embeddings {folder}: the encoder of {spec.system} trains ({len(moving)} tensors, such as "
                f"{moving[0]}), so its embeddings change; leave the flag out, or use medsam_decoder"
            )
        base, contents = spec.base_sha256 or spec.base, fingerprint(slices.slices, skip=True)
        origin = [_FORMAT, contents, base, spec.variant, spec.image_size, asdict(spec.pixels), str(precision), batch]
        name = hashlib.sha256(repr(origin).encode()).hexdigest()[:16]
        data, index = (Path(folder) / f"{name}.{ending}" for ending in ("embeddings", "json"))
        facts = read_index(index, [data], slices.slices)
        if facts is None:
            facts = self._encode(data, model, slices, precision, batch)
            write_index(index, [data], facts)
        self._slices, self._dtype = slices.slices, getattr(torch, facts["dtype"])
        stored = np.float32 if self._dtype == torch.float32 else np.int16  # NumPy has no bfloat16
        self._map = np.memmap(data, stored, "r", shape=tuple(facts["shape"]))
        self._rows = np.full(len(slices), -1)
        self._rows[np.setdiff1d(np.arange(len(slices)), facts["holes"])] = np.arange(len(self._map))

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """(B, 256, S/16, S/16) of the slices `indices`. Raises InputError for one that could not be read."""
        rows = self._rows[list(indices)]
        for index in np.asarray(indices)[rows < 0]:
            raise InputError(
                f"{self._slices[index].path}: could not be read when embeddings were made; --resume makes them again"
            )
        part = torch.from_numpy(self._map[rows])
        return (part if self._dtype == torch.float32 else part.view(self._dtype)).to(device)

    @torch.no_grad()
    def _encode(self, data: Path, model: Sam, slices: SliceDataset, precision: torch.dtype, batch: int) -> dict:
        from tqdm import tqdm

        pixels, device = model.spec.pixels, next(model.parameters()).device
        count, shape, dtype, holes = 0, (), "float32", []
        samples = _readable(slices, holes)
        bar = tqdm(total=len(slices), desc="embedding slices once", unit="slice", disable=None)
        with bar, building(data) as file:
            while some := list(islice(samples, batch)):
                images, labels = ([torch.from_numpy(getattr(s, kind)) for s in some] for kind in ("image", "label"))
                transforms = [sample.transform for sample in some]
                square, _ = make_batch(images, labels, transforms, model.image_size, device, pixels, model.fill)
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    embeddings = model.encode(square).cpu()
                shape, dtype = embeddings.shape[1:], str(embeddings.dtype).removeprefix("torch.")
                file.write((embeddings if dtype == "float32" else embeddings.view(torch.int16)).numpy())
                count += len(some)
                bar.update(len(some))
        return {"shape": [count, *shape], "dtype": dtype, "holes": holes}


def _readable(slices: SliceDataset, holes: list[int]) -> Iterator[Sample]:
    """The slices as they are, by index; numbers of those that cannot be read are put into `holes`."""
    for index in range(len(slices)):
        try:
            yield slices[0, index]
        except InputError:
            holes.append(index)
