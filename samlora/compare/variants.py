"""What is compared: configurations, with lists of values spread out into variants, and overrides where they fit."""

import functools
import itertools
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from samlora.compare.config import COMMON_PROMPTS
from samlora.errors import InputError
from samlora.model.bases import find_base
from samlora.model.build import check_model, known_variant
from samlora.model.checkpoint import recognise_variant
from samlora.model.methods import System, named_system, system_row
from samlora.model.tensors import read_tensors
from samlora.model.variants import VARIANTS
from samlora.options import make, pairs, read_yaml
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.objectives import prompting_of

# What the comparison decides itself, so that all systems get the same and are measured on what they have not seen.
OWN = {
    "root_path": "--data names the data",
    "output": "--output names the folder of all runs",
    "list_dir": "the folds say who trains on what",
    "dataset": "--data names it",
    "val_cases": "the folds say who trains on what; give val_fraction",
    "seed": "--seed and --seeds give them",
    "resume": "interrupted runs go on by themselves",
    "lora_ckpt": "an adapter may have been trained on the cases that are held out here",
}
_OF_A_BASE = ("vit_name", "ckpt", "checkpointing", "cache_embeddings")
_OF_LORA = ("rank", "lora_layers", "lora_plus")
_OF_PROMPTS = ("prompt", "box_jitter", "sample_num", "negative_num", "point_strategy", "max_objects")


@dataclass(frozen=True)
class Variant:
    """One system as it is trained: its name in tables, and the options of training that were given.

    ways: how it answers, "automatic" and/or "prompted".
    """

    name: str
    system: str
    values: Mapping[str, Any]

    @property
    def ways(self) -> tuple[str, ...]:
        row = system_row(self.system)
        return ("automatic",) * row.automatic + ("prompted",) * row.promptable

    def prompting(self, protocol: str) -> Prompting | None:
        """How it is asked when it is measured; None where it has no prompts. protocol: as --prompts of the command."""
        if not system_row(self.system).promptable:
            return None
        return COMMON_PROMPTS.get(protocol) or prompting_of(make(TrainConfig, self.values), self.system)

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.=+-]+", "_", self.name)

    def find_base(self) -> Path | None:
        """The file of its base weights; None where it has none. Raises MissingFileError."""
        row, ckpt = system_row(self.system), self.values.get("ckpt")
        if row.network or ckpt == "random":
            return None
        path = Path(ckpt) if ckpt else find_base(self.values.get("vit_name") or row.variant)
        if not path.is_file():
            raise InputError(f"{self.name}: there are no base weights at {path}; give others with --set ckpt=FILE")
        return path


def find_variants(sources: Sequence[str], given: Mapping[str, Any]) -> tuple[list[Variant], list[str]]:
    """The variants of all configurations (YAML files or names of shipped ones), and notes about what was left out.

    given: options for all of them. Raises InputError for options that cannot be used, before anything is trained.
    """
    for name, value in given.items():
        if name in OWN:
            raise InputError(f"--set {name}={value}: is for samlora compare to decide ({OWN[name]}); leave it out")
    if "system" in given or "module" in given:
        raise InputError("--set system: name the systems as configurations, one YAML each")
    variants, notes = [], []
    for source in sources:
        found, remarks = _spread(source, given)
        variants, notes = variants + found, notes + remarks
    slugs = [variant.slug for variant in variants]
    twice = next((v.name for v in variants if slugs.count(v.slug) > 1), None)
    if twice:
        raise InputError(f"two systems are called {twice}; rename one of the YAML files, or give it once")
    for variant in variants:
        _check(variant)
    return variants, notes


def _spread(source: str, given: Mapping[str, Any]) -> tuple[list[Variant], list[str]]:
    """All variants of one configuration: every combination of the values in its lists."""
    values, stem, notes = read_yaml(source), Path(source).stem, []
    unset = {field.name: (None, [], field.default) for field in fields(TrainConfig)}
    for name, why in OWN.items():
        value = values.pop(name, None)
        if value not in unset[name] and name != "dataset":  # that is but a part of a folder's name
            raise InputError(f"{source}: {name} {value}: is for samlora compare to decide ({why}); leave it out")
    for name in ("system", "module"):
        if isinstance(values.get(name), list):
            raise InputError(f"{source}: {name} is a list; give one YAML for each system")
    system = named_system(values.get("system"), values.get("module")) or "samed"
    row = system_row(system)
    unfit = [name for name, value in given.items() if not fits(row, name, value)]
    asked = [] if "options" in unfit else _mappings(given.get("options"), "--set options")
    unfit += [f"options {key}" for key in dict.fromkeys(key for one in asked for key in one) if key not in row.options]
    if unfit:
        notes.append(f"{stem}: {', '.join(f'--set {name}' for name in unfit)} left out: {system} has no such option")
    values |= {name: value for name, value in given.items() if name not in (*unfit, "options")}
    asked = _once({key: of for key, of in one.items() if key in row.options} for one in asked)
    if any(asked):
        former = _mappings(values.get("options"), f"{source}: options") or [{}]
        values["options"] = [{**one, **more} for one in former for more in asked]
    choices = {name: _choices(name, value) for name, value in values.items()}
    several = [name for name, found in choices.items() if len(found) > 1]
    variants = []
    for chosen in itertools.product(*choices.values()):
        one = dict(zip(choices, chosen))
        told = "".join(f" {name}={_told(one[name])}" for name in several)
        variants.append(Variant(stem + told, system, one))
    return variants, notes


def _mappings(value: Any, where: str) -> list[dict[str, Any]]:
    """The values of `options` that are to be compared; none where there are no options."""
    if value is None:
        return []
    return [pairs(one, where) for one in (value if isinstance(value, list) else [value])]


def _once(mappings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of some mappings once, in order."""
    found: list[dict[str, Any]] = []
    for one in mappings:
        if one not in found:
            found.append(one)
    return found


def fits(row: System, name: str, value: Any) -> bool:
    """Whether an option of training, given for all systems, means anything to the system of a row."""
    if row.network and name in (*_OF_A_BASE, "options"):
        return False
    if name in _OF_LORA:
        return row.lora
    if name in _OF_PROMPTS:
        return row.promptable
    if name == "prompt_ratio":
        return row.objective == "joint"
    if name == "dice_param":
        return row.objective in ("classes", "joint", "patches")
    if name == "vit_name" and row.variant in VARIANTS:
        # A TinyViT is no size of the plain ViT: its system would become another one.
        named = value if isinstance(value, list) else [value]
        return all(v not in VARIANTS or VARIANTS[v].tiny == VARIANTS[row.variant].tiny for v in named)
    return True


def _choices(name: str, value: Any) -> list[Any]:
    """The values an option is to take: the items of a list where the option itself is none."""
    hints = typing.get_type_hints(TrainConfig)
    if not isinstance(value, list) or name not in hints:
        return [value]
    takes_list = typing.get_origin(hints[name]) is tuple
    if takes_list and not (value and all(isinstance(item, list) for item in value)):
        return [value]
    if not value:
        raise InputError(f"{name}: [] is an empty list; give a value, or values to compare")
    return value


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_told(of)}" for key, of in value.items()) or "default"
    if isinstance(value, list):
        return ",".join(map(_told, value)) or "all"
    return str(value)


def _check(variant: Variant) -> None:
    """Raises InputError, naming the variant, for options that its training would refuse."""
    row = system_row(variant.system)
    try:
        config = make(TrainConfig, variant.values)
        if not row.trains:
            raise InputError(f"nothing of the system {variant.system} trains; it cannot be compared by training")
        prompting_of(config, variant.system)
        usual = {field.name: field.default for field in fields(TrainConfig)}
        for name in ("n_gpu", "num_nodes"):
            if getattr(config, name) != usual[name]:
                raise InputError(f"{name} {getattr(config, name)}: every run trains on one device; see --devices")
        for name in ("lora_layers", "lora_plus", "checkpointing", "cache_embeddings"):
            value = getattr(config, name)
            if value != usual[name] and not fits(row, name, value):
                raise InputError(f"{name} {value}: {variant.system} has no such option; leave it out")
        _check_model(variant, config)
    except InputError as error:
        raise InputError(f"{variant.name}: {error}") from None


def _check_model(variant: Variant, config: TrainConfig) -> None:
    """Raises InputError where there are no base weights, or the options do not fit the model that is made of them."""
    size = config.vit_name and known_variant(config.vit_name)
    if config.ckpt == "random" and not size:
        raise InputError("ckpt random needs vit_name: " + ", ".join(VARIANTS))
    path = variant.find_base()
    if path is not None and config.ckpt and not size:
        size = _variant_in(path)
    check_model(variant.system, size, config.img_size, config.rank, config.lora_layers or None, config.options)


@functools.lru_cache(maxsize=16)
def _variant_in(path: Path) -> str:
    return recognise_variant(read_tensors(path)[0], path)
