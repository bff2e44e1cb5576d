"""The models that a page offers: adapters and their bases, each base file opened once and its tensors held once."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from samlora.data.recipe import Recipe
from samlora.device import DTYPES, device_name, exact_float32, pick_device, pick_precision
from samlora.errors import InputError
from samlora.model.bases import base_name, default_base, find_base, known_base
from samlora.model.build import build_model, load_model
from samlora.model.checkpoint import MODEL, Base, guess_spec, open_base, read_adapter
from samlora.model.methods import system_row
from samlora.model.sam import Sam
from samlora.model.variants import VARIANTS


@dataclass(frozen=True)
class Entry:
    """One model to choose. promptable: answers clicks and boxes; automatic: draws its classes by itself.

    recipe: how it wants its slices, None where it takes them as they are. note: what a user should know. boxes_first:
    it was trained with boxes, and points alone find little.
    """

    name: str
    detail: str
    promptable: bool
    automatic: bool
    class_names: tuple[str, ...]
    recipe: Recipe | None
    note: str
    model: Sam
    boxes_first: bool = False


class Models:
    """All models of a page, on one device. `lock` is to be held while one of them computes.

    adapters: adapter files, in the order in which they are offered. ckpt: the base of all of them; None for each
    adapter's usual one, and for `default_base` where there is no adapter. Every base that a file was opened for is
    offered itself too, untouched, for clicks. device, precision: as of `samlora predict`. image_size: side of the
    input of the untouched bases; None for the one they were trained at. recipe: for adapters that hold none.
    Raises InputError or MissingFileError where an adapter or a base cannot be used.
    """

    def __init__(
        self,
        adapters: Sequence[str | Path] = (),
        ckpt: str | Path | None = None,
        device: str = "auto",
        precision: str = "fp32",
        image_size: int | None = None,
        recipe: Recipe | None = None,
    ):
        self.lock = threading.Lock()
        self.device = pick_device(device)
        exact_float32()
        self.precision: torch.dtype = DTYPES[pick_precision(precision, self.device)]
        self._bases: dict[Path, Base] = {}
        loaded = [self._load(Path(adapter), ckpt, recipe) for adapter in adapters]
        if not adapters:
            self._base(default_base() if ckpt is None else Path(ckpt))
        bases = [self._untouched(base, image_size) for base in self._bases.values()]
        self.entries: tuple[Entry, ...] = tuple(_named_apart(loaded) + bases)

    @property
    def where(self) -> str:
        """The device, and the number format where it is not float32."""
        name = device_name(self.device)
        return name if self.precision == torch.float32 else f"{name}, {str(self.precision).removeprefix('torch.')}"

    def _base(self, path: Path) -> Base:
        key = path.resolve()
        if key not in self._bases:
            self._bases[key] = open_base(path, device=self.device)
        return self._bases[key]

    def _load(self, path: Path, ckpt: str | Path | None, recipe: Recipe | None) -> tuple[Path, Entry]:
        tensors, spec = read_adapter(path)
        if spec is None:
            usual = guess_spec(tensors, path)["variant"]
        else:
            usual = base_name(Path(spec.base)) or spec.variant
        if spec is not None and system_row(spec.system).network:
            raise InputError(f"--adapter {path}: {spec.system} is no SAM; the page has none of it, use samlora predict")
        merged = spec is not None and spec.holds == MODEL
        random = spec is not None and not spec.has_base_file and ckpt is None
        base = "default" if merged or random else self._base(find_base(usual) if ckpt is None else Path(ckpt))
        model = load_model(path, base)
        row, spec = system_row(model.spec.system), model.spec
        if spec.recipe is not None:
            recipe = Recipe.from_dict(spec.recipe, f"{path}: its recipe")
        note = "" if row.promptable else "It draws its classes by itself and takes no clicks."
        detail = f"{spec.system}, {spec.variant}, {spec.image_size} px"
        known = tuple(spec.class_names) if row.automatic or spec.recipe is not None else ()
        model = model.to(self.device)
        return path, Entry(path.stem, detail, row.promptable, row.automatic, known, recipe, note, model)

    def _untouched(self, base: Base, image_size: int | None) -> Entry:
        model = build_model("sam", base, image_size=image_size or VARIANTS[base.variant].image_size)
        model = model.eval().to(self.device)
        detail = f"base as published, {base.variant}, {model.spec.image_size} px"
        known = known_base(base.path.name)
        if known is None:
            return Entry(base.path.stem, detail, True, False, (), None, "", model)
        boxes_first = "points" not in known.prompts
        return Entry(base.path.stem, detail, True, False, (), None, known.note, model, boxes_first)

    def entry(self, number: int) -> Entry:
        """The model of that number, from 0. Raises InputError if there is none."""
        if not 0 <= number < len(self.entries):
            raise InputError(f"model {number}: there are {len(self.entries)}, counted from 0")
        return self.entries[number]


def _named_apart(loaded: Sequence[tuple[Path, Entry]]) -> list[Entry]:
    """The entries; those whose files have one name take their folder's in front."""
    names = [entry.name for _, entry in loaded]
    return [
        replace(entry, name=f"{path.resolve().parent.name}/{entry.name}") if names.count(entry.name) > 1 else entry
        for path, entry in loaded
    ]
