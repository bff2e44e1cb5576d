"""What a file or folder of weights is, and which systems there are (`samlora info`)."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from samlora.errors import InputError, MissingFileError
from samlora.files import find_file
from samlora.model.baselines import BASELINES
from samlora.model.bases import MEGABYTE, advice, base_name, find_base, known_base
from samlora.model.build import used_pixels
from samlora.model.checkpoint import DECODERS, MODEL, TRAINED, check_base, open_base, own_side
from samlora.model.config import InfoConfig
from samlora.model.convert import Adapter, open_adapter
from samlora.model.huggingface import is_peft, meta_state
from samlora.model.methods import SYSTEMS, system_row
from samlora.model.tensors import read_tensors
from samlora.model.variants import VARIANTS
from samlora.options import read_yaml
from samlora.training.run import LAST, NEXT, PREVIOUS, facts_of, has_state

_KINDS = {
    "samlora": "adapter of samlora",
    "samed": "adapter of SAMed",
    "sam_lora": "adapter of Sam_LoRA",
    "peft": "adapter of peft, for transformers' SamModel",
}
_PROMPTS = {
    "none": "takes none: draws all classes by itself",
    "only": "draws one mask for each prompt",
    "both": "draws all classes by itself, and one mask for each prompt",
}
_HOLDS = {
    TRAINED: "what was trained",
    DECODERS: "what was trained, and all of the prompt encoder and the mask decoder",
    MODEL: "the whole model",
}


def info(path: str | os.PathLike | None, config: InfoConfig) -> str:
    """Describes a file or folder, or the systems, as text or JSON.

    Args:
        path: an adapter or base of any format, or a run folder; None with `config.systems`.
        config: what is shown, and how.

    Raises:
        MissingFileError: there is no such file or folder.
        InputError: it is none of these, or is damaged; or both or neither of path and systems are
            given.
    """
    if (path is None) != config.systems:
        raise InputError("samlora info: give either a file or folder, or --systems")
    if config.systems:
        rows = systems()
        return json.dumps(rows, indent=2) if config.json else "\n".join(map(_system_text, rows))
    found = describe(path)
    return json.dumps(found, indent=2) if config.json else _text(found)


def systems() -> list[dict[str, Any]]:
    """Every system as plain data: name, summary, variant, prompts, options with their defaults."""
    return [
        {
            "name": name,
            "summary": row.summary,
            "variant": None if row.network else row.variant,
            "prompts": row.prompts,
            "lora": row.lora,
            "options": {option: _plain(value) for option, value in row.options.items()},
            "needs": _extras(name),
        }
        for name, row in SYSTEMS.items()
    ]


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """What a file or folder is, as plain data; "kind" says it in words. Raises as `info` does."""
    path = find_file(path)
    if not path.exists():
        raise MissingFileError(f"{path}: there is no such file or folder; check the path")
    if path.is_dir() and not is_peft(path):
        return _run(path)
    if path.name in (LAST, NEXT, PREVIOUS):
        raise InputError(
            f"{path}: is the saved state of a training run; give its folder: {path.parent}"
        )
    if is_peft(path) or is_peft(path.parent):
        return _adapter(open_adapter(path))
    tensors, metadata = read_tensors(path)
    if "samlora" in metadata or "w_a_000" in tensors:
        return _adapter(open_adapter(path))
    if any(name.startswith("image_encoder.") for name in meta_state(tensors)):
        return _base(path, tensors)
    first = min(tensors) if tensors else "nothing"
    raise InputError(
        f"{path}: holds weights ({len(tensors)} tensors, such as {first}), but neither an adapter "
        f"nor a SAM; "
        "give one of these, or the folder of a training run"
    )


def _adapter(adapter: Adapter) -> dict[str, Any]:
    known, spec = adapter.known, adapter.spec
    row, variant = system_row(known["system"]), known["variant"]
    blocks = list(known["lora_layers"])
    whole = known["holds"] == MODEL
    kind = "model file of samlora, LoRA merged" if whole else _KINDS[adapter.kind]
    found = {
        "kind": kind,
        "path": str(adapter.path),
        "system": known["system"],
        "summary": row.summary,
        "prompts": row.prompts,
        "variant": variant,
        "rank": known["rank"] if row.lora else None,
        "lora_layers": blocks if row.lora else None,
        "options": _plain({**row.options, **known["options"]}),
        "holds": known["holds"],
        "image_size": known["image_size"],
        "in_channels": known["in_channels"],
        "num_classes": known["num_classes"],
        "class_names": None if spec is None else list(spec.class_names),
        "recipe": None if spec is None else spec.recipe,
        "base": None if spec is None else spec.base,
        "base_sha256": None if spec is None else spec.base_sha256,
        "pixels": _pixels(adapter),
        "format_version": None if spec is None else spec.format_version,
        "samlora_version": None if spec is None else spec.samlora_version,
    }
    needs = []
    if not whole and (spec is None or spec.has_base_file):
        needs = _base_needs(variant, None if spec is None else spec.base)
    return (
        found | _sizes(adapter.path, adapter.tensors) | {"needs": needs + _extras(known["system"])}
    )


def _pixels(adapter: Adapter) -> dict[str, Any]:
    if adapter.spec is not None:
        return asdict(adapter.spec.pixels)
    base = VARIANTS[adapter.known["variant"]].pixels
    return asdict(used_pixels(system_row(adapter.known["system"]), base))


def _base(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    opened = open_base(path)
    check_base(opened.state, opened.variant, fresh_heads=False, path=path)
    known = known_base(path.name)
    masks = len(opened.state["mask_decoder.mask_tokens.weight"])
    return {
        "kind": "base: a whole SAM"
        if known is None
        else f"base: a whole SAM, the published {base_name(path)}",
        "path": str(path),
        "variant": opened.variant,
        "names": "Meta's" if "vision_encoder.pos_embed" not in tensors else "Hugging Face's",
        "image_size": own_side(opened.state, opened.variant, path),
        "masks": masks,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "sha256": opened.sha256,
        "pixels": asdict(opened.pixels),
        "licence": None if known is None else known.licence,
        "purpose": None if known is None else known.purpose,
        "trained_prompts": None if known is None else list(known.prompts),
        **_sizes(path, tensors),
        "needs": [],
    }


def _run(folder: Path) -> dict[str, Any]:
    config = folder / "config.yaml"
    values = read_yaml(config) if config.is_file() else {}
    if "max_epochs" not in values:
        raise InputError(
            f"{folder}: is no folder of a training run (it has no config.yaml of one) and none of "
            f"peft; "
            "give a file of weights, or such a folder"
        )
    facts = facts_of(folder)
    adapters = sorted(
        path.name for path in folder.glob("*.safetensors") if not path.name.startswith(".")
    )
    best = next(
        (
            name
            for name in ("adapter_best.safetensors", "adapter_last.safetensors")
            if name in adapters
        ),
        None,
    )
    return {
        "kind": "folder of a training run",
        "path": str(folder),
        "dataset": values.get("dataset"),
        "data": values.get("root_path"),
        "steps": facts.get("steps"),
        "seconds": facts.get("seconds"),
        "device": facts.get("device"),
        "commit": facts.get("commit"),
        "can_resume": has_state(folder),
        "adapters": adapters,
        "adapter": None if best is None else _adapter(open_adapter(folder / best)),
    }


def _sizes(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _base_needs(variant: str, base: str | None) -> list[str]:
    """Which base file an adapter needs, and where it is or how to get it. base: its name."""
    name = (base_name(Path(base)) if base is not None else None) or variant
    if base is not None and base_name(Path(base)) is None:
        return [f"base weights {base}, of the SHA-256 above: give them with --ckpt"]
    called = base or f"of the variant {variant}"
    try:
        return [f"base weights {called}; here: {find_base(name)}"]
    except MissingFileError:
        return [f"base weights {called}; {advice(name)}"]


def _extras(system: str) -> list[str]:
    """The extras of samlora that a system needs."""
    if system in BASELINES and BASELINES[system].einops:
        return ["the package einops: pip install 'samlora[baselines]'"]
    return []


def _plain(value: Any) -> Any:
    """Options as JSON would give them back."""
    return json.loads(json.dumps(value))


def _system_text(row: Mapping[str, Any]) -> str:
    lines = [f"{row['name']:<16} {row['summary']}"]
    variant = f"variant {row['variant']}, " if row["variant"] else ""
    lines.append(f"{'':<16} {variant}prompts: {_PROMPTS[row['prompts']]}")
    if row["options"]:
        lines.append(f"{'':<16} options: {_options_text(row['options'])}")
    lines += [f"{'':<16} needs: {need}" for need in row["needs"]]
    return "\n".join(lines)


def _options_text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in options.items())


def _text(found: Mapping[str, Any]) -> str:
    """A description for the terminal: one line for each thing that is known."""
    lines = [f"{found['path']}: {found['kind']}"]
    for name, value in found.items():
        if name in ("kind", "path", "adapter") or value in (None, [], {}):
            continue
        if name == "options" and value == _plain(system_row(found["system"]).options):
            continue
        lines.append(f"  {name.replace('_', ' '):<16} {_value_text(name, value, found)}")
    if found.get("adapter") is not None:
        lines.append(_text(found["adapter"]))
    return "\n".join(lines)


def _value_text(name: str, value: Any, found: Mapping[str, Any]) -> str:
    if name == "lora_layers":
        every = value == list(range(VARIANTS[found["variant"]].depth))
        return f"all {len(value)} blocks" if every else f"blocks {_listed(value)}"
    if name == "recipe":
        return f"{value.get('name')}, {value.get('modality')}"
    if name == "pixels":
        framing = "padded to the square" if value["pad"] else "stretched to the square"
        return f"values {value['values']}, {framing}, {value['resampling']}"
    if name == "options":
        usual = _plain(system_row(found["system"]).options)
        return _options_text(
            {option: own for option, own in value.items() if own != usual.get(option)}
        )
    if name == "prompts":
        return _PROMPTS[value]
    if name == "holds":
        return _HOLDS[value]
    if name == "bytes":
        return f"{value:,} ({value / MEGABYTE:,.1f} MB)"
    if name == "parameters":
        return f"{value:,}"
    if name == "image_size":
        return f"{value} px"
    if name == "needs":
        return "; ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _listed(value) if isinstance(value, list) else str(value)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
