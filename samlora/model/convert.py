"""Adapters of every format: opened, and written in another format (`samlora convert`)."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from samlora.errors import InputError, MissingFileError
from samlora.files import as_path, find_file, whole_folder
from samlora.model import huggingface
from samlora.model.bases import base_name
from samlora.model.build import load_described, load_model, outline
from samlora.model.checkpoint import (
    DECODERS,
    FORMAT_VERSION,
    MODEL,
    TRAINED,
    Spec,
    adapter_tensors,
    guess_spec,
    parse_spec,
    read_adapter,
    save_adapter,
)
from samlora.model.config import FORMATS, ConvertConfig
from samlora.model.lora import LoRAOptions, decoder_names, translate_adapter
from samlora.model.methods import LORA_ALONE, system_options, system_row
from samlora.model.sam import Sam
from samlora.model.tensors import compare_shapes, write_pth, write_tensors
from samlora.model.variants import STOCK_MASKS, VARIANTS
from samlora.pixels import Pixels

HUGGING_FACE_SIDE = 1024  # of the images of every SAM that transformers loads, in pixels
_ON_HUB = {
    "vit_b": "facebook/sam-vit-base",
    "vit_l": "facebook/sam-vit-large",
    "vit_h": "facebook/sam-vit-huge",
}
_FACTOR = re.compile(r"w_[ab]_\d{3}")
_ENDINGS = {"samlora": (".safetensors",), "samed": (".pth", ".pt"), "sam_lora": (".safetensors",)}


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of any format, opened but not yet put into a model.

    kind: one of FORMATS. tensors: under the names that samlora's adapter files use; of a folder of
    peft that has a decoder, the whole of it, whatever `spec.holds` says. spec: None where the file
    does not describe itself. known: what is known of the model, by the names of Spec's fields;
    image_size and num_classes None where they are not. model: its names and shapes, without
    weights.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    spec: Spec | None
    known: Mapping[str, Any]
    model: Sam

    @property
    def has_decoder(self) -> bool:
        """Whether it holds a mask decoder, or a part of one."""
        return any(name.startswith("mask_decoder.") for name in self.tensors)


def open_adapter(path: str | os.PathLike) -> Adapter:
    """Opens an adapter of samlora, SAMed, Sam_LoRA or peft; nothing is unpickled.

    Raises:
        MissingFileError: there is no such file or folder.
        InputError: it is no adapter, is damaged, or its tensors do not belong together.
    """
    path = find_file(path)
    if path.name == huggingface.WEIGHTS and huggingface.is_peft(path.parent):
        path = path.parent
    if huggingface.is_peft(path):
        return _open_peft(path)
    tensors, spec = read_adapter(path)
    if spec is not None:
        model = outline(spec)
        _check_described(path, tensors, adapter_tensors(model))
        return Adapter(path, "samlora", tensors, spec, vars(spec), model)
    plain = all(_FACTOR.fullmatch(name) for name in tensors) and path.suffix == ".safetensors"
    known = _foreign(guess_spec(tensors, path), tensors)
    model = _foreign_outline(known)
    translate_adapter(model, tensors, path)
    return Adapter(path, "sam_lora" if plain else "samed", tensors, None, known, model)


def _open_peft(path: Path) -> Adapter:
    folder = huggingface.read_peft(path)
    tensors = folder.tensors
    if "samlora" in folder.metadata:
        spec = parse_spec(folder.metadata["samlora"], path)
        model = outline(spec)
        expected = adapter_tensors(model)
        if any(name.startswith("mask_decoder.") for name in expected):
            state = model.state_dict()
            expected |= {name: state[name] for name in decoder_names(model)}
        _check_described(path, tensors, expected)
        return Adapter(path, "peft", tensors, spec, vars(spec), model)
    # With a decoder of SAM's form: it answers prompts, unless a description says that its masks are
    # classes.
    guess = {
        "system": LORA_ALONE,
        "variant": folder.variant,
        "rank": folder.rank,
        "lora_layers": folder.layers,
        "num_classes": None,
        "options": {
            "alpha": folder.alpha,
            "dropout": folder.dropout,
            "targets": list(folder.targets),
        },
        "image_size": HUGGING_FACE_SIDE,
    }
    known = _foreign(guess, tensors)
    model = _foreign_outline(known)
    state = model.state_dict()
    saved = known["holds"] == DECODERS
    missing = {name: state[name] for name in decoder_names(model)} if saved else {}
    translate_adapter(model, missing | tensors, path)
    return Adapter(path, "peft", tensors, None, known, model)


def _foreign(guess: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is known of an adapter without a description, with what all of those have in common."""
    has_decoder = any(name.startswith("mask_decoder.") for name in tensors)
    holds = DECODERS if has_decoder else TRAINED
    return {"image_size": None, "in_channels": 3, "options": {}, "holds": holds, **guess}


def _arguments(known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load_described` among what is known of an adapter without a description."""
    names = ("system", "variant", "rank", "lora_layers", "num_classes", "options")
    return {name: known[name] for name in names}


def _foreign_outline(known: Mapping[str, Any]) -> Sam:
    """The model of an adapter without a description: only names and shapes."""
    arguments = _arguments(known)
    classes = arguments.pop("num_classes") or STOCK_MASKS - 1
    spec = Spec(
        image_size=known["image_size"] or VARIANTS[known["variant"]].image_size,
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        base="random:0",
        **arguments,
    )
    return outline(spec)


def _check_described(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Raises InputError unless an adapter has the tensors that its description promises."""
    compare_shapes(
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: tensor.shape for name, tensor in expected.items()},
        f"{path}: does not fit its own description",
        "the file is damaged: fetch or save it again",
    )


def convert(source: str | os.PathLike, target: str | os.PathLike, config: ConvertConfig) -> str:
    """Writes an adapter in another format, whole or not at all.

    Args:
        source: a file of samlora, SAMed or Sam_LoRA, or a folder of peft.
        target: the file, or of peft the folder, to write.
        config: the format, and what the adapter itself does not know.

    Returns:
        Lines for people: what was written, and how the images are prepared where a program must
        know it.

    Raises:
        MissingFileError: the adapter, or a base that is needed, is not there.
        InputError: the target is there already, or cannot hold this adapter.
    """
    if config.to is None:
        raise InputError(f"--to is missing; give one of {', '.join(FORMATS)}")
    target = as_path(target)
    adapter = open_adapter(source)
    check_output(target, _ENDINGS.get(config.to), config.overwrite, "OUT")
    said = adapter.known["image_size"]
    if None not in (said, config.img_size) and said != config.img_size:
        raise InputError(
            f"--img_size {config.img_size}: {adapter.path} is for images of {said} px; leave it out"
        )
    write = {
        "samlora": _to_samlora,
        "samed": _to_samed,
        "sam_lora": _to_sam_lora,
        "peft": _to_peft,
    }[config.to]
    return "\n".join([f"{target}: written as {config.to}", *write(adapter, target, config)])


def check_output(target: Path, endings: tuple[str, ...] | None, overwrite: bool, flag: str) -> None:
    """Raises InputError for an output of another ending, or one that must not be replaced.

    endings: those that are possible; None for a folder of peft.
    """
    if endings is None:
        if target.suffix in (".safetensors", ".pth", ".pt"):
            raise InputError(
                f"{flag} {target}: peft reads a folder; give a name without {target.suffix}"
            )
        foreign = target.is_dir() and any(target.iterdir()) and not huggingface.is_peft(target)
        if foreign or (target.exists() and not target.is_dir()):
            raise InputError(
                f"{flag} {target}: holds other things than an adapter of peft; give another name"
            )
    elif target.suffix not in endings or target.is_dir():
        raise InputError(
            f"{flag} {target}: give the name of a file that ends in {' or '.join(endings)}"
        )
    if target.exists() and not overwrite:
        raise InputError(
            f"{flag} {target}: is there already; give --overwrite to replace it, or another name"
        )


def _load(adapter: Adapter, config: ConvertConfig) -> Sam:
    """The model of an adapter on its base."""
    base = "default" if config.ckpt is None else config.ckpt
    try:
        if adapter.spec is not None:
            return load_model(adapter.path, base)
        size = config.img_size or adapter.known["image_size"]
        arguments = _arguments(adapter.known)
        fill = adapter.kind == "peft" and adapter.has_decoder
        return load_described(adapter.tensors, arguments, adapter.path, base, size, fill)
    except MissingFileError as error:
        if config.ckpt is not None:
            raise
        raise MissingFileError(
            f"--to {config.to} needs the base of {adapter.path}: {error}, or give --ckpt"
        ) from None


def _to_samlora(adapter: Adapter, target: Path, config: ConvertConfig) -> list[str]:
    spec = adapter.spec
    if spec is None:
        model = _load(adapter, config)
        save_adapter(model, target)
        size = model.spec.image_size
        guess = ""
        if not (config.img_size or adapter.known["image_size"]):
            guess = f" (taken for {size} px, which the file does not say; --img_size gives another)"
        return [
            f"{model.spec.system}, {model.spec.variant}, base {model.spec.base}, {size} px{guess}"
        ]
    tensors = {name: adapter.tensors[name] for name in adapter_tensors(adapter.model)}
    current = replace(spec, format_version=FORMAT_VERSION)
    write_tensors(target, tensors, {"samlora": json.dumps(asdict(current))})
    return []


def _to_sam_lora(adapter: Adapter, target: Path, config: ConvertConfig) -> list[str]:
    _check_samed_lora(adapter, "Sam_LoRA's files")
    others = sorted(name for name in adapter.tensors if not _FACTOR.fullmatch(name))
    if others:
        raise InputError(
            f"{adapter.path}: trains more than LoRA on the image encoder ({others[0]} and "
            f"{len(others) - 1} more "
            "tensors), which Sam_LoRA's files cannot hold; --to samlora holds all of it"
        )
    write_tensors(target, adapter.tensors)
    return []


def _to_samed(adapter: Adapter, target: Path, config: ConvertConfig) -> list[str]:
    _check_samed_lora(adapter, "SAMed's files")
    tensors = _with_decoder(adapter, config)
    factors = sorted(name for name in tensors if "." not in name)
    modules = [name for name in adapter.model.state_dict() if name in tensors]
    write_pth(target, {name: tensors[name] for name in (*factors, *modules)})
    if adapter.has_decoder:
        return []
    return [
        "it holds only LoRA factors: SAMed's own loader wants a mask decoder too, samlora's does "
        "not"
    ]


def _with_decoder(adapter: Adapter, config: ConvertConfig) -> dict[str, Tensor]:
    """An adapter's tensors; of a part of a decoder all of it and the prompt encoder, by the base."""
    names = decoder_names(adapter.model)
    if not adapter.has_decoder or adapter.tensors.keys() >= set(names):
        return adapter.tensors
    state = _load(adapter, config).state_dict()
    return {name: state[name] for name in names} | adapter.tensors


def _to_peft(adapter: Adapter, target: Path, config: ConvertConfig) -> list[str]:
    known = adapter.known
    options = LoRAOptions(known["rank"], **_check_peft(adapter, config))
    tensors = _with_decoder(adapter, config)
    layers, targets = tuple(known["lora_layers"]), options.targets
    content = huggingface.fuse(tensors, layers, targets)
    saved: tuple[str, ...] = ()
    if adapter.has_decoder:
        saved = ("mask_decoder", "prompt_encoder")
        content |= huggingface.saved_modules(
            {name: tensors[name] for name in decoder_names(adapter.model)}
        )
    described = huggingface.peft_config(
        options.rank * len(targets),
        _fused_alpha(options, len(targets)),
        options.dropout,
        layers,
        known["variant"],
        saved,
        _hub_name(adapter),
    )
    metadata = None
    if adapter.spec is not None:
        metadata = {"samlora": json.dumps(asdict(adapter.spec))}
    with whole_folder(target) as folder:
        write_tensors(folder / huggingface.WEIGHTS, content, metadata)
        (folder / huggingface.CONFIG).write_text(
            json.dumps(described, indent=2) + "\n", encoding="utf-8"
        )
    return _peft_notes(adapter)


def _fused_alpha(options: LoRAOptions, count: int) -> float:
    """lora_alpha of `count` pairs as one, so that alpha / rank stays what it was."""
    if options.alpha is None:
        return options.rank * count
    return options.alpha * count * (options.rank**0.5 if options.rslora else 1)


def _peft_notes(adapter: Adapter) -> list[str]:
    system = adapter.known["system"]
    pixels = system_row(system).pixels if adapter.spec is None else adapter.spec.pixels
    opened = f"PeftModel.from_pretrained(SamModel of {HUGGING_FACE_SIDE} px, folder)"
    return [
        f"it opens in transformers with peft 0.20 or later: {opened}",
        *preparation(pixels, system),
    ]


def preparation(pixels: Pixels | None, system: str) -> list[str]:
    """Lines for people who use SAM's own programs: what differs from SAM in input and output.

    pixels: how images are prepared for it; None for SAM's own way.
    """
    lines = []
    if pixels is not None and pixels.values != "sam":
        values = {
            "unit": "0..1 as they are",
            "minmax": "0..1 from each image's minimum to its maximum",
        }[pixels.values]
        lines.append(
            f"images: values {values}, {'padded' if pixels.pad else 'stretched'} to the square; "
            "SAM's own pixel mean and standard deviation must not be applied"
        )
    if system_row(system).automatic:
        lines.append(
            "masks: without prompts, mask 0 is the background and the others are the classes"
        )
    return lines


def _hub_name(adapter: Adapter) -> str | None:
    """The name on the Hugging Face Hub of an adapter's base, None where it is none of Meta's."""
    if adapter.spec is None:
        return _ON_HUB.get(adapter.known["variant"])
    return _ON_HUB.get(base_name(Path(adapter.spec.base)) or "")


def _check_lora(adapter: Adapter, target: str) -> dict[str, Any]:
    """The options of an adapter's LoRA. Raises InputError without a plain ViT and one decoder."""
    known = adapter.known
    row = system_row(known["system"])
    reason = None
    if known["holds"] == MODEL:
        reason = "has its LoRA merged (samlora merge)"
    elif not row.lora:
        reason = f"is of the system {known['system']}, which has no LoRA"
    elif VARIANTS[known["variant"]].tiny:
        reason = f"is for {known['variant']}, a TinyViT"
    elif row.prompts == "both":
        reason = f"is of the system {known['system']}, which has two mask decoders"
    elif known["in_channels"] != 3:
        reason = f"is for images of {known['in_channels']} channels"
    if reason is not None:
        raise InputError(
            f"{adapter.path}: {reason}, and {target} cannot hold that; --to samlora holds it"
        )
    return system_options(known["system"], known["options"])


def _check_samed_lora(adapter: Adapter, target: str) -> None:
    """Raises InputError unless LoRA is SAMed's: q and v of all blocks, one rank, no scale."""
    options = _check_lora(adapter, target)
    usual = system_row(adapter.known["system"]).options
    changed = [
        f"{name} {options[name]}"
        for name in options
        if name != "dropout" and options[name] != usual[name]
    ]
    depth = VARIANTS[adapter.known["variant"]].depth
    if tuple(adapter.known["lora_layers"]) != tuple(range(depth)):
        changed.append(f"lora_layers {list(adapter.known['lora_layers'])}")
    if changed:
        raise InputError(
            f"{adapter.path}: its LoRA has {', '.join(changed)}, and {target} hold B A on q and v "
            f"of all blocks "
            "without a scale; --to samlora holds it"
        )


def _check_peft(adapter: Adapter, config: ConvertConfig) -> dict[str, Any]:
    """The options of a LoRA that peft and transformers can hold. Raises InputError for others."""
    target = "a folder of peft for transformers' SamModel"
    options, known = _check_lora(adapter, target), adapter.known
    reason = None
    if options["dora"]:
        reason = "its LoRA is DoRA on q and v"
    elif options["ranks"]:
        reason = f"its blocks have ranks of their own ({options['ranks']})"
    elif set(options["targets"]) - set("qkv"):
        reason = f"its LoRA is on {', '.join(options['targets'])}, not only on q, k and v"
    elif system_row(known["system"]).lora_decoder:
        reason = "it has LoRA in the mask decoder, whose other weights are the base's"
    elif adapter.has_decoder and known["num_classes"] not in (None, STOCK_MASKS - 1):
        reason = (
            f"it has {known['num_classes']} classes, and transformers' SAM has {STOCK_MASKS} "
            f"masks: a background and "
            f"{STOCK_MASKS - 1} classes"
        )
    if reason is not None:
        raise InputError(f"{adapter.path}: {reason}; {target} cannot hold that, --to samlora does")
    size = config.img_size or known["image_size"]
    if size is None and adapter.has_decoder:
        raise InputError(
            f"{adapter.path}: does not say the side of its images, and transformers' SAM takes "
            f"only {HUGGING_FACE_SIDE} px; if it was trained so, give --img_size {HUGGING_FACE_SIDE}"
        )
    if size not in (None, HUGGING_FACE_SIDE):
        raise InputError(
            f"{adapter.path}: is for images of {size} px, and transformers' SAM takes "
            f"only {HUGGING_FACE_SIDE} px; train at {HUGGING_FACE_SIDE} px for it"
        )
    return options
