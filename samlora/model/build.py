"""From a row of samlora.model.methods to a model: built on a base to be trained, or loaded with its adapter."""

import numbers
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from samlora.errors import InputError
from samlora.files import as_path
from samlora.model import checkpoint
from samlora.model.baselines import build_baseline, check_baseline
from samlora.model.bases import base_name, find_base
from samlora.model.checkpoint import Base, Spec
from samlora.model.decoder import build_decoder
from samlora.model.lora import (
    LoRAOptions,
    check_layers,
    decoder_names,
    fold,
    inject_decoder,
    inject_encoder,
    translate_adapter,
)
from samlora.model.methods import System, system_options, system_row, train_only, trained_names
from samlora.model.sam import Sam, build_sam, usual_size
from samlora.model.stem import InputStem
from samlora.model.tiny_vit import TinyEncoder, inject_tiny
from samlora.model.variants import STOCK_MASKS, VARIANTS
from samlora.pixels import SAM, SAMED, Pixels

NETWORK_SIZE = 512  # usual side of images for networks without a base
PATCH_SIZE = 128  # and of patches


def build_model(
    system: str = "samed",
    base: str | os.PathLike | Base | None = "default",
    variant: str | None = None,
    image_size: int | None = None,
    num_classes: int = 8,
    rank: int = 4,
    lora_layers: Iterable[int] | None = None,
    class_names: Iterable[str] | None = None,
    recipe: dict | None = None,
    in_channels: int | None = None,
    options: Mapping[str, Any] | None = None,
    pixels: Pixels | None = None,
) -> Sam:
    """Builds a system on a base, ready to train: `model(images (B, 3, S, S)) -> logits`, on the CPU, float32.

    base: a base checkpoint; "default" for the variant's file in ./checkpoints (vit_ti: the demo base that
    ships); a `checkpoint.Base` to share its tensors with other models; None for random weights, with a warning.
    variant: a key of samlora.model.variants.VARIANTS; None to read it from the base.
    image_size: S, a multiple of the variant's stride; None for 512 (vit_ti, lite_medsam: 256; patches: 128).
    num_classes: foreground classes; logits are (B, num_classes + 1, L, L) with background 0, L = `model.logit_side`.
    rank, lora_layers: of the LoRA pairs; all encoder blocks when None.
    class_names, recipe: kept in the adapter file; recipe is plain data (samlora.data.recipe).
    in_channels: channels of the images; None for 3 (patches: 1). In a SAM others than 3 go through a learned 1x1
    convolution (samlora.model.stem).
    options: what the system's row offers beyond these, such as `freeze` of sam_prompt.
    pixels: how images are prepared for the encoder; None for what the base and the system state.
    Images are in 0..1 for every system. Systems with prompts take them as `model(images, prompts)`.
    The result's `.spec` says what it is. Raises InputError or MissingFileError when something does not fit.
    """
    row = system_row(system)
    _check_base(base)
    if num_classes is None:
        raise InputError("num_classes None is not possible; it counts foreground classes: give 1 or more")
    _check_counts(num_classes=num_classes, rank=rank, image_size=image_size, in_channels=in_channels)
    if num_classes < 1:
        raise InputError(f"num_classes {num_classes} is not possible; it counts foreground classes: give 1 or more")
    if class_names is not None and (isinstance(class_names, str) or not isinstance(class_names, Iterable)):
        raise InputError(f"class_names {class_names!r}: a list of names, one per foreground class, is needed")
    names = tuple(class_names) if class_names is not None else tuple(f"class_{i}" for i in range(1, num_classes + 1))
    if len(names) != num_classes:
        raise InputError(f"{len(names)} class names for num_classes {num_classes}; give one name per foreground class")
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"options {options!r}: a mapping of names to values is needed")
    if lora_layers is not None:
        lora_layers = list(lora_layers) if isinstance(lora_layers, Iterable) else lora_layers
        check_layers(lora_layers)
    chosen = system_options(system, options)
    in_channels = (1 if row.volumetric else 3) if in_channels is None else in_channels
    if in_channels < 1:
        raise InputError(f"in_channels {in_channels} is not possible; give the number of channels of the images")
    if lora_layers is not None and not row.lora:
        raise InputError(f"lora layers {list(lora_layers)}: the system {system} has no LoRA; leave them out")
    if row.network:
        sam = build_baseline(system, image_size or _network_size(row), num_classes + 1, in_channels)
        sam.variant, base_name, digest = system, "none", None
        layers: Iterable[int] = ()
        base_pixels = None
    else:
        num_masks = num_classes + 1 if row.prompts == "none" else None
        side = image_size if row.base_size is None else row.base_size(image_size)
        sam, base_name, digest, base_pixels = _base(base, variant, row, side, num_masks)
        sam.pixels = pixels or used_pixels(row, base_pixels)
        layers = _equip(sam, system, row, num_classes, rank, lora_layers, in_channels, chosen)
    names_trained = trained_names(sam, system, chosen)
    train_only(sam, names_trained)
    if isinstance(base, Base):
        checkpoint.unshare(sam, names_trained)
    sam.spec = Spec(
        system=system,
        variant=sam.variant,
        rank=rank if row.lora else 0,
        lora_layers=tuple(layers),
        image_size=sam.image_size,
        num_classes=num_classes,
        class_names=names,
        base=base_name,
        base_sha256=digest,
        recipe=recipe,
        samlora_version=_version(),
        in_channels=in_channels,
        options=chosen,
        pixels=SAMED if row.network else sam.pixels,
        base_pixels=base_pixels,
    )
    return sam


def _check_base(base: object) -> None:
    """Raises InputError for what is neither a path, a word nor a Base."""
    if base is not None and not isinstance(base, Base):
        as_path(base)


def _check_counts(**given: object) -> None:
    """Raises InputError, naming it, for what is no whole number; None stands for a default."""
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise InputError(f"{name} {value!r} is not possible; give a whole number")


def used_pixels(row: System, base_pixels: Pixels) -> Pixels:
    """How a system prepares images on a base: systems that depart from SAM's way do so on SAM's bases alone."""
    return base_pixels if row.pixels is None or base_pixels != SAM else row.pixels


def check_model(
    system: str,
    variant: str | None = None,
    image_size: int | None = None,
    rank: int = 4,
    lora_layers: Iterable[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Raises InputError for what `build_model` would refuse, whatever the weights; needs none of them, nor memory.

    variant: None for the system's own.
    """
    row = system_row(system)
    if row.network:
        system_options(system, options)
        check_baseline(system, image_size or _network_size(row), STOCK_MASKS)
        return
    with torch.device("meta"):
        build_model(system, "random:0", variant, image_size, 1, rank, lora_layers, options=options)


def _network_size(row: System) -> int:
    return PATCH_SIZE if row.volumetric else NETWORK_SIZE


def _equip(
    sam: Sam,
    system: str,
    row: System,
    num_classes: int,
    rank: int,
    lora_layers: Iterable[int] | None,
    in_channels: int,
    options: Mapping[str, Any],
) -> Iterable[int]:
    """Puts into a SAM what its system has beyond it; returns the blocks that got LoRA."""
    if in_channels != 3:
        sam.input_stem = InputStem(in_channels)
    if row.prompts == "both":
        _add_class_decoder(sam, num_classes + 1)
    if row.insert is not None:
        if isinstance(sam.image_encoder, TinyEncoder):
            plain = ", ".join(name for name, variant in VARIANTS.items() if not variant.tiny)
            raise InputError(
                f"variant {sam.variant}: the system {system} changes the blocks of a plain ViT, and this is a TinyViT; "
                f"give one of {plain}"
            )
        row.insert(sam, **options)
    if not row.lora:
        return ()
    inject = inject_tiny if isinstance(sam.image_encoder, TinyEncoder) else inject_encoder
    layers = inject(sam.image_encoder, LoRAOptions(rank, **options), lora_layers)
    if row.lora_decoder:
        inject_decoder(sam.mask_decoder.transformer, rank)
    return layers


def _add_class_decoder(sam: Sam, num_masks: int) -> None:
    """The base's decoder becomes the one for prompts; a copy of it, with mask tokens of its own, draws the classes."""
    sam.prompt_decoder, sam.mask_decoder, sam.num_masks = sam.mask_decoder, build_decoder(num_masks), num_masks
    shared = checkpoint.fitting(sam.prompt_decoder.state_dict(), sam.mask_decoder.state_dict())
    sam.mask_decoder.load_state_dict(shared, strict=False)


def _base(
    base: str | os.PathLike | Base | None,
    variant: str | None,
    row: System,
    image_size: int | None,
    num_masks: int | None,
) -> tuple[Sam, str, str | None, Pixels]:
    """The SAM, the name of its base, the SHA-256 of the base's file, and how the base wants its pixels."""
    if base == "default":
        base = find_base(known_variant(variant or row.variant))
    if base is not None and not str(base).startswith("random:"):
        sam, opened = checkpoint.load_base(base, variant, image_size, num_masks)
        return sam, opened.path.name, opened.sha256, opened.pixels
    variant = known_variant(variant or row.variant)
    if base is None:
        # The seed is drawn from torch's generator and kept in the adapter, so that it can be rebuilt.
        seed = int(torch.randint(2**31 - 1, ()))
        warnings.warn(
            f"base=None: {variant} starts from random weights (seed {seed}), not from a trained SAM",
            stacklevel=3,
        )
    else:
        seed = int(str(base).removeprefix("random:"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = build_sam(variant, image_size or usual_size(variant), num_masks or STOCK_MASKS)
    return sam, f"random:{seed}", None, VARIANTS[variant].pixels


def known_variant(variant: str) -> str:
    """The variant. Raises InputError for one that is unknown."""
    if variant not in VARIANTS:
        raise InputError(f"unknown SAM variant {variant!r}; known: {', '.join(VARIANTS)}")
    return variant


def _version() -> str:
    try:
        return metadata.version("samlora")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "source"


def load_model(
    adapter: str | os.PathLike, base: str | os.PathLike | Base | None = "default", image_size: int | None = None
) -> Sam:
    """Rebuilds a trained model: `model(images) -> logits`, on the CPU, in evaluation mode.

    adapter: a file of samlora, of SAMed (`.pth`), or plain LoRA safetensors; rank and class count are read
    from it. base: the base it was trained on, its file or a `checkpoint.Base` of it; "default" or None for that
    base's usual place (or, for a model that began from random weights, those weights again). image_size: None for the
    adapter's own; SAMed's files do not know theirs and get 512.
    Raises InputError when the adapter and the base do not belong together, or a tensor is missing,
    unexpected or of another shape.
    """
    tensors, spec = checkpoint.read_adapter(adapter)
    _check_base(base)
    base = "default" if base is None else base
    # Nothing below may depend on, or move, the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if spec is None:
            return load_described(tensors, checkpoint.guess_spec(tensors, adapter), adapter, base, image_size).eval()
        if spec.holds == checkpoint.MODEL:
            return _load_whole(tensors, spec, adapter, base, image_size).eval()
        if base == "default" and spec.has_base_file:
            base = find_base(base_name(Path(spec.base)) or spec.variant)
        if base != "default" and not spec.has_base_file:
            raise InputError(f"{adapter}: began with random weights ({spec.base}), not with {base}; leave the base out")
        model = _build_described(spec, base if spec.has_base_file else spec.base, image_size)
    if model.spec.base_sha256 != spec.base_sha256:
        raise InputError(
            f"{adapter}: was trained on the base {spec.base} (SHA-256 {spec.base_sha256[:12]}...), "
            f"but {model.spec.base} "
            f"has {model.spec.base_sha256[:12]}...; give that base with --ckpt"
        )
    model.spec = replace(model.spec, holds=spec.holds)
    if isinstance(base, Base):
        checkpoint.unshare(model, checkpoint.adapter_tensors(model))
    checkpoint.load_trained(model, tensors, adapter)
    return model.eval()


def _build_described(spec: Spec, base: str | os.PathLike | Base, image_size: int | None) -> Sam:
    """The model that a description is of, on a base, with nothing of its adapter file in it yet."""
    return build_model(
        system=spec.system,
        base=base,
        variant=None if spec.base == "none" else spec.variant,
        image_size=image_size or spec.image_size,
        num_classes=spec.num_classes,
        rank=spec.rank,
        lora_layers=spec.lora_layers or None,
        class_names=spec.class_names,
        recipe=spec.recipe,
        in_channels=spec.in_channels,
        options=spec.options,
        pixels=spec.pixels,
    )


def outline(spec: Spec) -> Sam:
    """The model of a description without weights: only names and shapes (PyTorch's device "meta")."""
    with torch.device("meta"):
        model = _build_described(spec, spec.base if spec.base == "none" else "random:0", None)
    if spec.holds == checkpoint.MODEL:
        fold(model)
    model.spec = spec
    return model


def _load_whole(
    tensors: dict, spec: Spec, path: str | os.PathLike, base: str | os.PathLike | Base, image_size: int | None
) -> Sam:
    """A model from a file that holds all of it (`samlora merge`)."""
    if base != "default":
        raise InputError(f"{path}: holds the whole model and takes no base; leave {base} out")
    model = fold(_build_described(spec, "random:0", image_size))
    model.spec = replace(spec, image_size=model.image_size)
    if model.image_size != spec.image_size:
        tensors = checkpoint.resize_positions(tensors, spec.variant, model.image_size)
    checkpoint.load_trained(model, tensors, path)
    return model


def load_described(
    tensors: dict,
    description: Mapping[str, Any],
    path: str | os.PathLike,
    base: str | os.PathLike | Base = "default",
    image_size: int | None = None,
    fill: bool = False,
) -> Sam:
    """Loads the tensors of an adapter that is not samlora's onto a base.

    Args:
        tensors: LoRA factors under SAMed's names and, of some files, the prompt encoder and the mask decoder.
        description: arguments of `build_model`, as `checkpoint.guess_spec` gives them.
        path: the file they are from, for messages.
        base: the base, as `load_model` takes it.
        image_size: side of the images in pixels; None for the usual one.
        fill: whether tensors of the prompt encoder and the mask decoder that are missing are those of the base.

    Returns:
        The model, in training mode; its `spec.holds` says what the file had.

    Raises:
        InputError: the tensors do not fit the model exactly.
    """
    known = {**description, "num_classes": description["num_classes"] or STOCK_MASKS - 1}
    model = build_model(base=base, image_size=image_size, **known)
    if fill:
        state = model.state_dict()
        tensors = {name: state[name] for name in decoder_names(model)} | tensors
    translated = translate_adapter(model, tensors, path)
    if isinstance(base, Base):
        checkpoint.unshare(model, translated)
    model.load_state_dict(translated, strict=False)
    if any(name.startswith("mask_decoder.") for name in tensors):
        model.spec = replace(model.spec, holds=checkpoint.DECODERS)
    return model
