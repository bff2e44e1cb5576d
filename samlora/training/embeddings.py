"""What the frozen part of an image encoder makes of all training slices, computed once and kept on disk."""

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
from samlora.model.methods import system_row
from samlora.model.sam import Activations, Sam

_FORMAT = 2


class EmbeddingCache:
    """Activations of a data set's slices at the entry of the first part of the encoder that trains, by index.

    Where nothing of the encoder trains these are the embeddings, (256, S/stride, S/stride). They lie in one flat file
    that is read through a memory map, in the number format in which they were computed.
    The slices' contents, the base weights, the step of the encoder, the size, the framing, the number format and the
    batch size, on which rounding depends, decide the file's name, so that nothing out of date is ever read; what is
    damaged is made again (`samlora.data.cache.read_index`). Embeddings of ViT-B take 1 MB a slice at 512 px and 4 MB
    at 1024 px. A slice that cannot be read has none; when it is mended, all are made again. Raises InputError where
    the encoder trains from its first step on or the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, model: Sam, slices: SliceDataset, precision: torch.dtype, batch: int):
        spec = model.spec
        self.step = frozen_steps(model, folder)
        base, contents = spec.base_sha256 or spec.base, fingerprint(slices.slices, skip=True)
        origin = [_FORMAT, contents, base, spec.variant, self.step, spec.image_size, asdict(spec.pixels)]
        origin += [str(precision), batch]
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

    def batch(self, indices: Sequence[int], device: torch.device) -> Activations:
        """Those of the slices `indices`, one after the other. Raises InputError for one that could not be read."""
        rows = self._rows[list(indices)]
        for index in np.asarray(indices)[rows < 0]:
            raise InputError(
                f"{self._slices[index].path}: could not be read when embeddings were made; --resume makes them again"
            )
        part = torch.from_numpy(self._map[rows])
        values: Tensor = part if self._dtype == torch.float32 else part.view(self._dtype)
        return Activations(values.to(device), self.step)

    @torch.no_grad()
    def _encode(self, data: Path, model: Sam, slices: SliceDataset, precision: torch.dtype, batch: int) -> dict:
        from tqdm import tqdm

        pixels, device = model.spec.pixels, next(model.parameters()).device
        count, shape, dtype, holes = 0, (), "float32", []
        samples = _readable(slices, holes)
        bar = tqdm(total=len(slices), desc="encoding slices once", unit="slice", disable=None)
        with bar, building(data) as file:
            while some := list(islice(samples, batch)):
                images, labels = ([torch.from_numpy(getattr(s, kind)) for s in some] for kind in ("image", "label"))
                transforms = [sample.transform for sample in some]
                square, _ = make_batch(images, labels, transforms, model.image_size, device, pixels, model.fill)
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    values = model.encode(square, self.step).cpu().contiguous()
                shape, dtype = values.shape[1:], str(values.dtype).removeprefix("torch.")
                file.write((values if dtype == "float32" else values.view(torch.int16)).numpy())
                count += len(some)
                bar.update(len(some))
        return {"shape": [count, *shape], "dtype": dtype, "holes": holes}


def frozen_steps(model: Sam, folder: str | os.PathLike) -> int:
    """How many of `image_encoder.steps` run before the first one that trains, or all of them.

    folder: as given with --cache_embeddings, for the message. Raises InputError where there are none.
    """
    encoder, row = model.image_encoder, system_row(model.spec.system)
    steps = getattr(encoder, "steps", ())  # SAMUS's encoder has none: its own parts run beside all blocks
    place = {id(p): index for index, step in enumerate(steps) for p in step.parameters()}
    if steps:  # a neck that trains needs what the last step makes
        place |= {id(p): len(steps) - 1 for p in encoder.neck.parameters()}
    frozen, first = len(steps), ""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(("image_encoder.", "input_stem.")):
            step = place.get(id(parameter), 0)
            if step < frozen:
                frozen, first = step, name
    if frozen == 0:
        instead = "adapt upper blocks alone (--lora_layers)" if row.lora else "use medsam_decoder"
        raise InputError(
            f"--cache_embeddings {folder}: the encoder of {model.spec.system} trains from its beginning on "
            f"({first}), so nothing of it can be kept; leave the flag out, or {instead}"
        )
    return frozen


def _readable(slices: SliceDataset, holes: list[int]) -> Iterator[Sample]:
    """The slices as they are, by index; numbers of those that cannot be read are put into `holes`."""
    for index in range(len(slices)):
        try:
            yield slices[0, index]
        except InputError:
            holes.append(index)
