"""Weights under Hugging Face's names: `transformers`' SAM, and `peft`'s LoRA folders for it.

Neither library is needed here: a folder of peft is a JSON file and a safetensors file.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samlora.errors import InputError, MissingFileError
from samlora.model.tensors import read_tensors
from samlora.model.variants import VARIANTS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A part of a name of Meta's, and the same part of transformers' name; at its start, or anywhere
# after a dot.
_ENCODER = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
    ("blocks.", "layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
_PROMPTS = (
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    ("point_embeddings.", "point_embed."),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
)
_DECODER = (
    *((f".norm{n}.", f".layer_norm{n}.") for n in range(1, 5)),
    (".norm_final_attn.", ".layer_norm_final_attn."),
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
)
_PARTS = (
    ("image_encoder.", "vision_encoder.", _ENCODER),
    ("prompt_encoder.", "prompt_encoder.", _PROMPTS),
    ("mask_decoder.", "mask_decoder.", _DECODER),
)
# Layers of the small networks of the decoder's heads, in the order in which they run.
_HEAD = re.compile(
    r"(.*(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)"
    r"(layers\.\d+|proj_in|proj_out)(\..*)"
)
_HEAD_LAYERS = (("layers.0", "proj_in"), ("layers.1", "layers.0"), ("layers.2", "proj_out"))
# The image-wide positions of transformers are the same tensor as those of its prompt encoder.
_SHARED = "shared_image_embedding.positional_embedding"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"vision_encoder\.layers\.(\d+)\.attn\.qkv\.lora_([AB])\.weight")
# What of a configuration of peft changes the product, and the values that are read.
_READ_AS = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
}


def meta_name(name: str) -> str:
    """Meta's name of a tensor of transformers' `SamModel`."""
    return _renamed(name, 1, 0)


def hugging_face_name(name: str) -> str:
    """The name in transformers' `SamModel` of a tensor that has this name in Meta's files."""
    return _renamed(name, 0, 1)


def _renamed(name: str, source: int, target: int) -> str:
    for part in _PARTS:
        if not name.startswith(part[source]):
            continue
        head = _HEAD.fullmatch(name)
        if head is not None:
            layers = {layer[source]: layer[target] for layer in _HEAD_LAYERS}
            return head[1] + layers.get(head[2], head[2]) + head[3]
        rest = name.removeprefix(part[source])
        for names in part[2]:
            if names[source].startswith(".") or rest.startswith(names[source]):
                rest = rest.replace(names[source], names[target], 1)
        return part[target] + rest
    return name


def meta_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of transformers' `SamModel` under Meta's names; one that has them stays as it is."""
    if "vision_encoder.pos_embed" not in state:
        return dict(state)
    renamed = {meta_name(name): tensor for name, tensor in state.items() if name != _SHARED}
    if _SHARED in state:
        renamed["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = state[_SHARED]
    return renamed


@dataclass(frozen=True)
class PeftFolder:
    """What a LoRA folder of peft for transformers' `SamModel` holds, in samlora's terms.

    tensors: the factors of q, v and, of a LoRA that changes k too, of k, under the names of adapter
    files; what else was trained under Meta's names. rank: of each pair. layers: the adapted blocks.
    alpha: B A is scaled by alpha / rank; None for no scale. variant: a key of VARIANTS. metadata:
    of its safetensors file.
    """

    tensors: dict[str, Tensor]
    rank: int
    layers: tuple[int, ...]
    targets: tuple[str, ...]
    alpha: float | None
    dropout: float
    variant: str
    metadata: dict[str, str]


def is_peft(path: str | os.PathLike) -> bool:
    """Whether a folder holds what peft writes."""
    return (Path(path) / CONFIG).is_file()


def read_peft(folder: str | os.PathLike) -> PeftFolder:
    """Reads a folder that peft's `save_pretrained`, or `samlora convert`, wrote.

    One LoRA of rank R on the fused qkv becomes a pair for each of q and v, or of q, k and v, where
    its B is in blocks as `fuse` makes them; otherwise a pair of rank R for each of q, k and v,
    which all have the same A. Both are exact.

    Raises:
        MissingFileError: there is no such folder, or one of its two files is missing.
        InputError: a file is damaged, or it is not a LoRA on qkv of SAM's image encoder.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise MissingFileError(
            f"{folder}: has no {WEIGHTS}; save it again with peft's save_pretrained"
        )
    stored, metadata = read_tensors(folder / WEIGHTS)
    stored = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    factors: dict[int, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        found = _FACTOR.fullmatch(name)
        if found is not None:
            factors.setdefault(int(found[1]), {})[found[2]] = tensor
            continue
        tensors[meta_name(name)] = tensor
        if "lora_" in name or not meta_name(name).startswith(("prompt_encoder.", "mask_decoder.")):
            raise InputError(
                f"{folder}: trains {name}; samlora reads LoRA on qkv of SAM's image encoder, and "
                f"the whole mask "
                "decoder and prompt encoder (modules_to_save)"
            )
    rank, variant = _check_factors(factors, folder)
    declared = config.get("r")
    if declared != rank:
        raise InputError(
            f"{folder / CONFIG}: says r {declared}, but the factors have rank {rank}; save it again"
        )
    targets, own = ("q", "k", "v"), rank
    for several in (("q", "v"), ("q", "k", "v")):
        if all(_in_blocks(pair["B"], several) for pair in factors.values()):
            targets, own = several, rank // len(several)
            break
    for order, layer in enumerate(sorted(factors)):
        tensors |= _split(factors[layer], layer, order, own, targets)
    alpha = float(config.get("lora_alpha", 8))
    if config.get("use_rslora"):
        alpha *= rank**0.5
    own_alpha = None if alpha == rank else alpha * own / rank
    dropout = float(config.get("lora_dropout") or 0)
    return PeftFolder(
        tensors, own, tuple(sorted(factors)), targets, own_alpha, dropout, variant, metadata
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(f"{path.parent}: is no folder of peft: it has no {CONFIG}")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"{path}: is no JSON object; save it again with peft's save_pretrained"
        ) from None
    for key, values in _READ_AS.items():
        if config.get(key, values[0]) not in values:
            raise InputError(
                f"{path}: {key} is {config[key]}; samlora reads only {json.dumps(values[0])}"
            )
    return config


def _check_factors(factors: Mapping[int, Mapping[str, Tensor]], folder: Path) -> tuple[int, str]:
    """The rank of all pairs, and the variant whose width and depth they fit."""
    if not factors:
        raise InputError(
            f"{folder}: has no LoRA on qkv of SAM's image encoder "
            f"(vision_encoder.layers.0.attn.qkv)"
        )
    lone = sorted(layer for layer, pair in factors.items() if len(pair) < 2)
    if lone:
        raise InputError(
            f"{folder}: block {lone[0]} has only one of lora_A and lora_B; save it again"
        )
    first = next(iter(factors.values()))["A"]
    rank, width = first.shape if first.ndim == 2 else (0, 0)
    for layer, pair in factors.items():
        shapes = tuple(pair["A"].shape), tuple(pair["B"].shape)
        if shapes != ((rank, width), (3 * width, rank)):
            raise InputError(
                f"{folder}: block {layer} has factors {shapes}, others have rank {rank}, width "
                f"{width}"
            )
    for name, variant in VARIANTS.items():
        if variant.width == width and max(factors) < variant.depth and not variant.tiny:
            return rank, name
    raise InputError(f"{folder}: LoRA of width {width} on block {max(factors)} fits no SAM variant")


def _in_blocks(b: Tensor, targets: tuple[str, ...]) -> bool:
    """Whether a fused factor B, (3 d, R), is 0 except in one block for each of `targets`."""
    width, rank = len(b) // 3, b.shape[1]
    if rank % len(targets):
        return False
    outside = b.clone()
    for place, target in enumerate(targets):
        _block(outside, place, target, rank // len(targets), width).zero_()
    return not outside.any()


def _block(b: Tensor, place: int, target: str, rank: int, width: int) -> Tensor:
    """A view of a fused factor B: the rows of q, k or v, the columns of the pair number `place`."""
    row, column = "qkv".index(target) * width, place * rank
    return b[row : row + width, column : column + rank]


def _split(
    pair: Mapping[str, Tensor], layer: int, order: int, rank: int, targets: tuple[str, ...]
) -> dict[str, Tensor]:
    """The pairs of one block under the names of adapter files.

    order: of the block among the adapted ones. rank: of each pair; where it is that of the fused
    pair, all have its A.
    """
    shared = rank == pair["A"].shape[0]
    tensors = {}
    for place, target in enumerate(targets):
        column = 0 if shared else place
        a_name, b_name = factor_names(target, layer, order)
        tensors[a_name] = pair["A"][column * rank : (column + 1) * rank].clone()
        tensors[b_name] = _block(pair["B"], column, target, rank, len(pair["B"]) // 3).clone()
    return tensors


def factor_names(target: str, layer: int, order: int) -> tuple[str, str]:
    """Names in adapter files of A and B of q, k or v of a block; order: among the adapted ones."""
    if target == "k":  # SAMed has no name for it
        prefix = f"image_encoder.blocks.{layer}.attn.qkv.linear"
        return f"{prefix}_a_k.weight", f"{prefix}_b_k.weight"
    number = 2 * order + (target == "v")
    return f"w_a_{number:03d}", f"w_b_{number:03d}"


def fuse(
    tensors: Mapping[str, Tensor], layers: tuple[int, ...], targets: tuple[str, ...]
) -> dict[str, Tensor]:
    """An adapter's pairs as one LoRA on each fused qkv, as in peft: A stacked, B in blocks.

    The rank is that of a pair times the number of targets, and the product is the same: what is
    added are products with 0. Rows of projections without LoRA are 0.
    """
    fused = {}
    for order, layer in enumerate(layers):
        pairs = [
            [tensors[name] for name in factor_names(target, layer, order)] for target in targets
        ]
        width, rank = pairs[0][1].shape
        b = pairs[0][1].new_zeros(3 * width, rank * len(targets))
        for place, (target, (_, own)) in enumerate(zip(targets, pairs)):
            _block(b, place, target, rank, width).copy_(own)
        prefix = f"{_PREFIX}vision_encoder.layers.{layer}.attn.qkv"
        fused[f"{prefix}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        fused[f"{prefix}.lora_B.weight"] = b
    return fused


def saved_modules(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompt encoder and the mask decoder under peft's names of `modules_to_save`."""
    return {_PREFIX + hugging_face_name(name): tensor for name, tensor in tensors.items()}


def peft_config(
    rank: int,
    alpha: float,
    dropout: float,
    layers: tuple[int, ...],
    variant: str,
    saved: tuple[str, ...],
    base: str | None,
) -> dict[str, Any]:
    """The contents of adapter_config.json of a LoRA on qkv.

    Args:
        rank: of the fused pairs.
        alpha: the product B A is scaled by alpha / rank.
        dropout: on the input of A, while training.
        layers: the adapted blocks.
        variant: a key of VARIANTS.
        saved: the modules that are stored whole.
        base: the base's name on the Hugging Face Hub, None where it has none.
    """
    every = layers == tuple(range(VARIANTS[variant].depth))
    return {
        "auto_mapping": {
            "base_model_class": "SamModel",
            "parent_library": "transformers.models.sam.modeling_sam",
        },
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["qkv"] if every else [f"layers.{layer}.attn.qkv" for layer in layers],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
