"""Low-rank adapters (LoRA, arXiv 2106.09685) on SAM's attention: inject, merge, name, save.

A layer that carries LoRA keeps the key names of the Linear it replaces (`weight`, `bias`), so a base
checkpoint loads untouched before or after injection. In files the factors carry SAMed's names: `w_a_000`
is A of q in the first adapted block, `w_a_001` A of v in the same block, `w_b_...` their B; A has shape
(rank, in), B (out, rank), and the layer computes W x + B A x without any scale.
"""

import math
import os
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlora.errors import InputError
from samlora.model.tensors import compare_shapes, read_tensors, write_tensors


class _Adapted(nn.Module):
    """A Linear's own weight and bias plus something low-rank that can be merged into the weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._unmerged: Tensor | None = None

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def delta(self) -> Tensor:
        """What LoRA adds to the weight: (out, in), in float32."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the low-rank product to the weight; the former weight is kept for `unmerge`."""
        if not self.merged:
            self._unmerged = self.weight.data
            self.weight.data = (self.weight.float() + self.delta()).to(self.weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the former weight back, bit for bit."""
        if self.merged:
            self.weight.data, self._unmerged = self._unmerged, None


class LoRA_qkv(_Adapted):
    """The fused qkv Linear of an attention block with LoRA on q and v.

    qkv: Linear d -> 3 d. linear_a_*: Linear d -> rank, linear_b_*: Linear rank -> d, both without bias.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        linear_a_q: nn.Linear,
        linear_b_q: nn.Linear,
        linear_a_v: nn.Linear,
        linear_b_v: nn.Linear,
    ):
        super().__init__(qkv)
        self.linear_a_q, self.linear_b_q = linear_a_q, linear_b_q
        self.linear_a_v, self.linear_b_v = linear_a_v, linear_b_v
        self.dim = qkv.in_features

    def delta(self) -> Tensor:
        q = self.linear_b_q.weight.float() @ self.linear_a_q.weight.float()
        v = self.linear_b_v.weight.float() @ self.linear_a_v.weight.float()
        return torch.cat([q, torch.zeros_like(q), v])

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., 3 d), q, k, v in this order."""
        qkv = F.linear(x, self.weight, self.bias)
        if self.merged:
            return qkv
        qkv[..., : self.dim] += self.linear_b_q(self.linear_a_q(x))
        qkv[..., -self.dim :] += self.linear_b_v(self.linear_a_v(x))
        return qkv


class LoRA_linear(_Adapted):
    """A Linear with LoRA: y = W x + b + B A x."""

    def __init__(self, linear: nn.Linear, linear_a: nn.Linear, linear_b: nn.Linear):
        super().__init__(linear)
        self.linear_a, self.linear_b = linear_a, linear_b

    def delta(self) -> Tensor:
        return self.linear_b.weight.float() @ self.linear_a.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + self.linear_b(self.linear_a(x))


def _factors(linear: nn.Linear, out_features: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """A pair (A, B) as SAMed starts it: A Kaiming-uniform, B zero, so that birth is identity."""
    place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    a = nn.Linear(linear.in_features, rank, bias=False, **place)
    b = nn.Linear(rank, out_features, bias=False, **place)
    nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    return a, b


def inject_encoder(encoder: nn.Module, rank: int, layers: Iterable[int] | None = None) -> list[int]:
    """Puts LoRA on q and v of the blocks `layers` (all when None) of an image encoder; returns the blocks.

    Raises InputError for a rank below 1, a block that is not there, or an encoder that carries LoRA already.
    """
    depth = len(encoder.blocks)
    chosen = list(range(depth)) if layers is None else sorted(set(layers))
    if rank < 1:
        raise InputError(f"rank {rank} is not possible; give a rank of 1 or more")
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise InputError(
            f"lora layers {chosen} do not exist in an encoder of {depth} blocks; allowed: 0 to {depth - 1}"
        )
    for index in chosen:
        attention = encoder.blocks[index].attn
        if isinstance(attention.qkv, LoRA_qkv):
            raise InputError("this encoder carries LoRA already; build a fresh model instead of injecting twice")
        q, v = (_factors(attention.qkv, attention.qkv.in_features, rank) for _ in "qv")
        attention.qkv = LoRA_qkv(attention.qkv, *q, *v)
    return chosen


def inject_decoder(transformer: nn.Module, rank: int) -> None:
    """Puts LoRA on q and v of every attention of SAM's two-way transformer (SAMed_s)."""
    for attention in _decoder_attentions(transformer):
        for name in ("q_proj", "v_proj"):
            linear = getattr(attention, name)
            setattr(attention, name, LoRA_linear(linear, *_factors(linear, linear.out_features, rank)))


def _decoder_attentions(transformer: nn.Module) -> Iterator[nn.Module]:
    for layer in transformer.layers:
        yield from (layer.self_attn, layer.cross_attn_token_to_image, layer.cross_attn_image_to_token)
    yield transformer.final_attn_token_to_image


def lora_names(sam: nn.Module) -> dict[str, str]:
    """SAMed's name of every LoRA factor of a model -> its name in the model's state dict."""
    names = {}
    adapted = [
        f"image_encoder.blocks.{index}.attn.qkv"
        for index, block in enumerate(sam.image_encoder.blocks)
        if isinstance(block.attn.qkv, LoRA_qkv)
    ]
    for position, prefix in enumerate(adapted):
        for factor in "ab":
            names[f"w_{factor}_{2 * position:03d}"] = f"{prefix}.linear_{factor}_q.weight"
            names[f"w_{factor}_{2 * position + 1:03d}"] = f"{prefix}.linear_{factor}_v.weight"
    transformer = sam.mask_decoder.transformer
    if not isinstance(transformer.final_attn_token_to_image.q_proj, LoRA_linear):
        return names
    short = {"sa": "self_attn", "cti": "cross_attn_token_to_image", "cit": "cross_attn_image_to_token"}
    for index in range(len(transformer.layers)):
        for abbreviation, attention in short.items():
            prefix = f"mask_decoder.transformer.layers.{index}.{attention}"
            for factor in "ab":
                names[f"{abbreviation}_{factor}_{2 * index:03d}"] = f"{prefix}.q_proj.linear_{factor}.weight"
                names[f"{abbreviation}_{factor}_{2 * index + 1:03d}"] = f"{prefix}.v_proj.linear_{factor}.weight"
    final = "mask_decoder.transformer.final_attn_token_to_image"
    for projection in "qv":
        for factor in "ab":
            names[f"fati_{projection}{factor}"] = f"{final}.{projection}_proj.linear_{factor}.weight"
    return names


def translate_adapter(sam: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a SAMed or plain LoRA file under the names of `sam`'s state dict, checked strictly.

    The file must hold all LoRA factors of `sam`; beyond them either nothing, or what SAMed saves: the whole
    prompt encoder and the mask decoder (SAMed_s: without its transformer).
    """
    names, state = lora_names(sam), sam.state_dict()
    expected = dict(names)
    if len(tensors) > len(names) or "mask_decoder.mask_tokens.weight" in tensors:
        carried = [name for name in state if name.startswith(("prompt_encoder.", "mask_decoder."))]
        partial = "sa_a_000" in names
        expected |= {name: name for name in carried if not (partial and ".transformer." in name)}
    compare_shapes(
        {n: t.shape for n, t in tensors.items()},
        {n: state[full].shape for n, full in expected.items()},
        f"{path}: does not fit this model",
        "give the rank, variant and class count it was trained with",
    )
    return {full: tensors[name].float() for name, full in expected.items()}


def merge(model: nn.Module) -> nn.Module:
    """Adds every LoRA product to its weight: a forward pass then costs what the base costs; returns the model."""
    for module in model.modules():
        if isinstance(module, _Adapted):
            module.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undoes `merge` bit for bit; returns the model."""
    for module in model.modules():
        if isinstance(module, _Adapted):
            module.unmerge()
    return model


class LoRA_sam(nn.Module):
    """A SAM whose image encoder is frozen and carries LoRA on q and v.

    sam_model: a Sam of this package or of `segment_anything`; changed in place and kept as `.sam`.
    rank: rank of every pair. lora_layer: the blocks that get LoRA, all when None.
    Raises InputError as `inject_encoder` does.
    """

    def __init__(self, sam_model: nn.Module, rank: int, lora_layer: Iterable[int] | None = None):
        super().__init__()
        for parameter in sam_model.image_encoder.parameters():
            parameter.requires_grad_(False)
        self.rank = rank
        self.lora_layer = inject_encoder(sam_model.image_encoder, rank, lora_layer)
        self.sam = sam_model

    def forward(self, *args, **kwargs):
        return self.sam(*args, **kwargs)

    def save_lora_parameters(self, filename: str | os.PathLike) -> None:
        """Writes the LoRA factors alone, under SAMed's names, as a safetensors file without metadata.

        `samlora.save_adapter` writes everything that was trained, with its description.
        """
        state = self.sam.state_dict()
        write_tensors(filename, {short: state[name] for short, name in lora_names(self.sam).items()})

    def load_lora_parameters(self, filename: str | os.PathLike) -> None:
        """Reads LoRA factors, and the prompt encoder and mask decoder where the file holds them.

        Accepts plain LoRA safetensors and SAMed's `.pth` files. Raises InputError, before anything is
        changed, when a factor is missing, unexpected or of another shape.
        """
        tensors, _ = read_tensors(filename)
        self.sam.load_state_dict(translate_adapter(self.sam, tensors, filename), strict=False)
