"""Low-rank adapters (LoRA, arXiv 2106.09685) on SAM's attention: inject, merge, name, save.

A layer that carries LoRA keeps the key names of the Linear it replaces (`weight`, `bias`), so a base
checkpoint loads untouched before or after injection (with DoRA: before, its magnitudes begin as the base's).
In files the factors carry SAMed's names: `w_a_000` is A of q in the first adapted block, `w_a_001` A of v in
the same block, `w_b_...` their B; A has shape (rank, in), B (out, rank), and the layer computes W x + B A x
without any scale. What SAMed does not have (`LoRAOptions`) carries its name in the model's state dict.
"""

import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlora.errors import InputError
from samlora.model.tensors import compare_shapes, read_tensors, write_tensors

TARGETS = ("q", "k", "v", "proj", "lin1", "lin2")


@dataclass(frozen=True)
class LoRAOptions:
    """How an image encoder is adapted; the defaults are SAMed's: B A x on q and v, without any scale.

    rank: of every pair; ranks: {block: rank} where it is another (kept as sorted pairs).
    alpha: B A x is scaled by alpha / rank; None for no scale. rslora: by alpha / sqrt(rank) instead (rsLoRA, arXiv
    2312.03732). dropout: share of A's inputs set to 0 while training. dora: the product turns the weight's rows, their
    lengths are trained apart (DoRA, arXiv 2402.09353). targets: one or some of TARGETS; lin1 and lin2 are the MLP.
    Raises InputError for what is not possible.
    """

    rank: int = 4
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    targets: str | Iterable[str] = ("q", "v")
    ranks: Mapping[int, int] | Iterable[Sequence[int]] = ()

    def __post_init__(self) -> None:
        pairs = self.ranks.items() if isinstance(self.ranks, Mapping) else self.ranks
        ranks = tuple(sorted((int(block), int(rank)) for block, rank in pairs))
        targets = {self.targets} if isinstance(self.targets, str) else set(self.targets)
        wrong = sorted(targets - set(TARGETS))
        if wrong or not targets:
            raise InputError(f"lora targets {wrong} are not possible; give some of {', '.join(TARGETS)}")
        for rank, place in ((self.rank, ""), *((rank, f" of block {block}") for block, rank in ranks)):
            if rank < 1:
                raise InputError(f"rank {rank}{place} is not possible; give a rank of 1 or more")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"lora alpha {self.alpha} is not possible; give a number above 0, or leave it out")
        if self.rslora and self.alpha is None:
            raise InputError("rslora without alpha scales nothing; give alpha too, or leave rslora out")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora dropout {self.dropout} is not possible; give a share from 0 to below 1")
        # One order and one form: random numbers, files and comparisons then do not depend on how it was written.
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in targets))
        object.__setattr__(self, "ranks", ranks)

    def scale(self, rank: int) -> float:
        """The factor of B A x in a block of this rank."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


PLAIN = LoRAOptions()


class _Adapted(nn.Module):
    """A Linear's own weight and bias plus low-rank pairs, each on some of its outputs, that can be merged.

    pairs: suffix of the names -> (A, B); the outputs of each are what `part` takes out. options: scale, dropout and
    dora are taken from them. With dora a row w of the weight, with the row d of scale B A, acts as
    m (w + d) / |w + d|; m begins as |w|, so that birth is identity.
    """

    def __init__(self, linear: nn.Linear, pairs: Mapping[str, tuple[nn.Linear, nn.Linear]], options: LoRAOptions):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scales = {suffix: options.scale(a.out_features) for suffix, (a, _) in pairs.items()}
        self.dropout, self.dora = options.dropout, options.dora
        self._unmerged: Tensor | None = None
        for suffix, (a, b) in pairs.items():
            setattr(self, f"linear_a{suffix}", a)
            setattr(self, f"linear_b{suffix}", b)
            if self.dora:
                with torch.no_grad():
                    lengths = self._lengths(suffix).to(self.weight.dtype)
                setattr(self, f"magnitude{suffix}", nn.Parameter(lengths))

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def part(self, x: Tensor, suffix: str, dim: int) -> Tensor:
        """A view of the outputs that a pair adds to, of a tensor with the layer's outputs along `dim`."""
        raise NotImplementedError

    def _turned(self, suffix: str) -> Tensor:
        """The weight's rows of a part plus the scaled low-rank product: (..., in), float32."""
        a, b = getattr(self, f"linear_a{suffix}").weight, getattr(self, f"linear_b{suffix}").weight
        rows = self.part(self.weight.float(), suffix, 0)
        return rows + (self.scales[suffix] * (b.float() @ a.float())).view(rows.shape)

    def _lengths(self, suffix: str) -> Tensor:
        """Length of each row of `_turned`, flat; never 0, so that rows of zeros stay rows of zeros."""
        return self._turned(suffix).norm(dim=-1).flatten().clamp_min(torch.finfo(torch.float32).tiny)

    def _gain(self, suffix: str) -> Tensor:
        """m / |w + d| - 1 for each row of a part, flat, float32. Gradients see |w + d| as a constant (section 4.3)."""
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            lengths = self._lengths(suffix)
        return getattr(self, f"magnitude{suffix}").float() / lengths - 1

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        seen = F.dropout(x, self.dropout, self.training) if self.dropout else x
        for suffix, scale in self.scales.items():
            part = self.part(y, suffix, -1)
            hidden = getattr(self, f"linear_a{suffix}")(seen)
            hidden = hidden if scale == 1 else scale * hidden
            update = getattr(self, f"linear_b{suffix}")(hidden).view(part.shape)
            if self.dora:
                gain = self._gain(suffix).to(y.dtype).view(part.shape[x.ndim - 1 :])
                # The bias has no part in it; `part` itself is about to change, so backward needs a copy.
                product = part.clone() if self.bias is None else part - self.part(self.bias, suffix, 0)
                update = update + gain * (product + update)
            part += update
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Puts what LoRA does into the weight; the former weight is kept for `unmerge`."""
        if self.merged:
            return
        weight = self.weight.float().clone()
        for suffix in self.scales:
            rows = self._turned(suffix)
            if self.dora:
                rows = rows * (1 + self._gain(suffix)).view(*rows.shape[:-1], 1)
            self.part(weight, suffix, 0).copy_(rows)
        self._unmerged, self.weight.data = self.weight.data, weight.to(self.weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the former weight back, bit for bit."""
        if self.merged:
            self.weight.data, self._unmerged = self._unmerged, None


class LoRA_qkv(_Adapted):
    """The fused qkv Linear of an attention block with LoRA on q and v, and on k where that is asked for.

    qkv: Linear d -> 3 d. linear_a_*: Linear d -> rank, linear_b_*: Linear rank -> d, both without bias; None for a
    projection without LoRA. options: scale, dropout and dora of them. heads: of an attention whose outputs are q, k, v
    of the first head, then of the second (TinyViT); None where they are all of q, all of k, all of v (SAM).
    """

    def __init__(
        self,
        qkv: nn.Linear,
        linear_a_q: nn.Linear | None,
        linear_b_q: nn.Linear | None,
        linear_a_v: nn.Linear | None,
        linear_b_v: nn.Linear | None,
        linear_a_k: nn.Linear | None = None,
        linear_b_k: nn.Linear | None = None,
        options: LoRAOptions = PLAIN,
        heads: int | None = None,
    ):
        given = {"_q": (linear_a_q, linear_b_q), "_k": (linear_a_k, linear_b_k), "_v": (linear_a_v, linear_b_v)}
        self.dim, self.heads = qkv.in_features, heads  # `part` needs them while magnitudes are measured
        super().__init__(qkv, {n: pair for n, pair in given.items() if pair[0] is not None}, options)

    def part(self, x: Tensor, suffix: str, dim: int) -> Tensor:
        which, dim = ("_q", "_k", "_v").index(suffix), dim % x.ndim
        if self.heads is None:
            return x.narrow(dim, which * self.dim, self.dim)
        return x.unflatten(dim, (self.heads, 3, self.dim // self.heads)).select(dim + 1, which)


class LoRA_linear(_Adapted):
    """A Linear with LoRA: y = W x + b + scale B A x. options: scale, dropout and dora of them."""

    def __init__(self, linear: nn.Linear, linear_a: nn.Linear, linear_b: nn.Linear, options: LoRAOptions = PLAIN):
        super().__init__(linear, {"": (linear_a, linear_b)}, options)

    def part(self, x: Tensor, suffix: str, dim: int) -> Tensor:
        return x


def _factors(linear: nn.Linear, out_features: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """A pair (A, B) as SAMed starts it: A Kaiming-uniform, B zero, so that birth is identity."""
    place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    a = nn.Linear(linear.in_features, rank, bias=False, **place)
    b = nn.Linear(rank, out_features, bias=False, **place)
    nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    return a, b


def inject_encoder(encoder: nn.Module, rank: int | LoRAOptions, layers: Iterable[int] | None = None) -> list[int]:
    """Puts LoRA on the blocks `layers` (all when None) of an image encoder; returns the blocks.

    rank: of SAMed's pairs on q and v, or what else is wanted. Raises InputError for a rank below 1, a block that is
    not there or named twice, or an encoder that carries LoRA already.
    """
    return inject_blocks(encoder.blocks, rank, layers)


def inject_blocks(
    blocks: Sequence[nn.Module],
    rank: int | LoRAOptions,
    layers: Iterable[int] | None = None,
    mlp: tuple[str, str] = ("lin1", "lin2"),
    per_head: bool = False,
) -> list[int]:
    """`inject_encoder` on blocks with `attn.qkv`, `attn.proj` and an `mlp` whose Linears have the names `mlp`.

    per_head: whether the outputs of qkv are ordered by head (see LoRA_qkv).
    """
    options = rank if isinstance(rank, LoRAOptions) else LoRAOptions(rank)
    depth, ranks = len(blocks), dict(options.ranks)
    chosen = list(range(depth)) if layers is None else sorted(layers)
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise InputError(
            f"lora layers {chosen} do not exist in an encoder of {depth} blocks; allowed: 0 to {depth - 1}"
        )
    twice = [index for index, following in zip(chosen, chosen[1:]) if index == following]
    if twice:
        raise InputError(f"lora layers {chosen} name block {twice[0]} more than once; name each block once")
    if left := ranks.keys() - set(chosen):
        raise InputError(f"lora ranks name block {min(left)}, which gets no LoRA; the lora layers are {chosen}")
    if any(isinstance(module, _Adapted) for index in chosen for module in blocks[index].modules()):
        raise InputError("this encoder carries LoRA already; build a fresh model instead of injecting twice")
    for index in chosen:
        attention, own_rank = blocks[index].attn, ranks.get(index, options.rank)
        qkv = attention.qkv
        pairs = {n: _factors(qkv, qkv.in_features, own_rank) for n in "qkv" if n in options.targets}
        if pairs:
            q, k, v = (pairs.get(n, (None, None)) for n in "qkv")
            attention.qkv = LoRA_qkv(qkv, *q, *v, *k, options, heads=attention.num_heads if per_head else None)
        places = {"proj": (attention, "proj"), "lin1": (blocks[index].mlp, mlp[0]), "lin2": (blocks[index].mlp, mlp[1])}
        for owner, name in (place for target, place in places.items() if target in options.targets):
            linear = getattr(owner, name)
            setattr(owner, name, LoRA_linear(linear, *_factors(linear, linear.out_features, own_rank), options))
    return chosen


def check_layers(layers: object) -> None:
    """Raises InputError for what is no list of blocks, such as 3, "all" or ["a"]."""
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        if all(isinstance(index, numbers.Integral) for index in layers):
            return
    raise InputError(f"lora layers {layers!r} are not possible; give a list of block numbers, or None for all blocks")


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
    """Name in files of all that LoRA adds to a model -> its name in the model's state dict.

    SAMed's names of the factors of q and v and of the decoder; of what SAMed does not have, the latter name.
    """
    names, adapted = {}, 0
    for prefix, module in sam.named_modules():
        if not (prefix.startswith("image_encoder.") and isinstance(module, _Adapted)):
            continue
        first = 2 * adapted
        samed = {"linear_a_q": f"w_a_{first:03d}", "linear_a_v": f"w_a_{first + 1:03d}"}
        samed |= {"linear_b_q": f"w_b_{first:03d}", "linear_b_v": f"w_b_{first + 1:03d}"}
        for name, _ in module.named_parameters():
            if name not in ("weight", "bias"):
                full = f"{prefix}.{name}"
                names[samed.get(name.removesuffix(".weight"), full)] = full
        adapted += isinstance(module, LoRA_qkv)
    if not hasattr(sam, "mask_decoder"):  # a model that is no SAM
        return names
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


def decoder_names(sam: nn.Module) -> list[str]:
    """Names in a SAM's state dict of what SAMed's files hold beside LoRA.

    The whole prompt encoder and mask decoder; of a decoder that carries LoRA (SAMed_s) all but its transformer.
    """
    partial = isinstance(sam.mask_decoder.transformer.final_attn_token_to_image.q_proj, LoRA_linear)
    carried = [name for name in sam.state_dict() if name.startswith(("prompt_encoder.", "mask_decoder."))]
    return [name for name in carried if not (partial and ".transformer." in name)]


def translate_adapter(sam: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a SAMed or plain LoRA file under the names of `sam`'s state dict, checked strictly.

    The file must hold all LoRA factors of `sam`; beyond them either nothing, or what SAMed saves (`decoder_names`).
    """
    names, state = lora_names(sam), sam.state_dict()
    expected = dict(names)
    if len(tensors) > len(names) or "mask_decoder.mask_tokens.weight" in tensors:
        expected |= {name: name for name in decoder_names(sam)}
    compare_shapes(
        {n: t.shape for n, t in tensors.items()},
        {n: state[full].shape for n, full in expected.items()},
        f"{path}: does not fit this model",
        "give the rank, variant and class count it was trained with",
    )
    return {full: tensors[name].float() for name, full in expected.items()}


def merge(model: nn.Module) -> nn.Module:
    """Puts every LoRA into its weight: a forward pass then costs what the base costs; returns the model."""
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


def fold(model: nn.Module) -> nn.Module:
    """Replaces every layer with LoRA by a plain Linear of its merged weight; returns the model.

    The state dict then has the key names of a SAM without LoRA. Unlike `merge` it cannot be undone.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, _Adapted):
                continue
            layer.merge()
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            setattr(parent, name, linear)
    return model


def lora_plus_groups(model: nn.Module, lr: float, ratio: float) -> list[dict]:
    """Parameter groups for an optimizer: every B learns `ratio` times as fast as all else (LoRA+, arXiv 2402.12354).

    Each group keeps its own factor as "lr_ratio", for schedules that set "lr". DoRA's magnitudes get a group without
    weight decay: it would pull them to 0, not to the base's. Raises InputError without LoRA or for a ratio below 0.
    """
    if not 0 < ratio < math.inf:
        raise InputError(f"LoRA+ ratio {ratio} is not possible; give a number above 0, 16 as its authors do")
    parts: dict[str, list[nn.Parameter]] = {"b": [], "magnitude": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "b" if ".linear_b" in name else "magnitude" if ".magnitude" in name else "rest"
            parts[kind].append(parameter)
    if not parts["b"]:
        raise InputError("LoRA+ is for models that train LoRA; this one trains none: leave the ratio out")
    groups = [
        {"params": parts["rest"], "lr": lr, "lr_ratio": 1.0},
        {"params": parts["b"], "lr": lr * ratio, "lr_ratio": ratio},
        {"params": parts["magnitude"], "lr": lr, "lr_ratio": 1.0, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class LoRA_sam(nn.Module):
    """A SAM whose image encoder is frozen and carries LoRA on q and v.

    sam_model: a Sam of this package or of `segment_anything`; changed in place and kept as `.sam`.
    rank: rank of every pair, or LoRAOptions for more than that. lora_layer: the blocks that get LoRA, all when None.
    Raises InputError as `inject_encoder` does.
    """

    def __init__(self, sam_model: nn.Module, rank: int | LoRAOptions, lora_layer: Iterable[int] | None = None):
        super().__init__()
        if not isinstance(getattr(sam_model, "image_encoder", None), nn.Module):
            raise InputError(f"{type(sam_model).__name__} is no SAM: it has no image_encoder; build one first")
        if not isinstance(rank, numbers.Integral | LoRAOptions) or isinstance(rank, bool):
            raise InputError(f"rank {rank!r} is not possible; give a whole number of 1 or more, or LoRAOptions")
        if lora_layer is not None:
            lora_layer = list(lora_layer) if isinstance(lora_layer, Iterable) else lora_layer
            check_layers(lora_layer)
        for parameter in sam_model.image_encoder.parameters():
            parameter.requires_grad_(False)
        self.rank = rank.rank if isinstance(rank, LoRAOptions) else rank
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
