"""Segment Anything of any image size and class count, batched, under Meta's key names.

Built on the modules of the `segment-anything` package. What differs from them: attention computes padded
window tokens from the bias instead of multiplying zeros, every image of a batch may have any number of
prompts in one decoder call, and all mask tokens are returned.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import PromptEncoder
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samlora.errors import InputError
from samlora.model.decoder import MaskDecoder, build_decoder
from samlora.model.norms import LayerNorm2d
from samlora.model.tiny_vit import TinyEncoder
from samlora.model.variants import EMBED, STOCK_MASKS, VARIANTS, WINDOW, Variant, check_size
from samlora.pixels import Pixels

# SAM's own pixel statistics, for images in 0..255 (segment_anything.build_sam).
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


_LOGITS_AT_ONCE = 2**20  # of attention: 2 to 4 MB, which stay in a CPU's caches between the passes over them


class Prompts:
    """Prompts for P masks, in pixels (x, y) of the model's input of side S.

    points: (P, N, 2) float with labels (P, N): 1 on the object, 0 on the background, -1 padding.
    boxes: (P, 4) float, XYXY; NaN for a prompt without one.
    masks: (P, 1, L, L) float logits of an earlier prediction.
    image_index: (P,) int64, the image of the batch each prompt belongs to; None when P equals the batch. With nothing
    else it asks P times without any prompt.

    No dataclass: Lightning Fabric turns the tensors of those to half precision, in which a place is off by pixels.
    """

    def __init__(
        self,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        image_index: Tensor | None = None,
    ):
        self.points, self.labels, self.boxes, self.masks, self.image_index = points, labels, boxes, masks, image_index


class Activations:
    """What an image encoder had computed at the entry of one of its steps, for images that were encoded before.

    values: (B, ...), the input of step `step` of `image_encoder.steps`; the embeddings where that is their number.

    No dataclass, for the reason that `Prompts` states.
    """

    def __init__(self, values: Tensor, step: int):
        self.values, self.step = values, step


class Answer(NamedTuple):
    """All that a forward pass can say; None for what was not asked or the system has not.

    classes: (B, C, L, L) logits of the automatic masks. masks: (P, M, L, L) logits of every mask token for each
    prompt; the first is SAM's single mask, the others its three for an ambiguous prompt. iou: (P, M), predicted.
    """

    classes: Tensor | None = None
    masks: Tensor | None = None
    iou: Tensor | None = None


class Attention(nn.Module):
    """Self-attention over a grid of tokens with decomposed relative positions (ViTDet, arXiv 2203.16527)."""

    def __init__(self, width: int, heads: int, grid: int):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))

    def forward(self, x: Tensor, window: int) -> Tensor:
        """Attends within windows of side `window`, or over the whole grid where that is 0.

        x: (B, H, W, C) -> (B, H, W, C).
        """
        batch, height, width, channels = x.shape
        # A zero token has q, k, v equal to the bias: multiply real tokens only and pad with the bias.
        qkv = self.qkv(x)
        if window:
            qkv = partition(qkv, window, self.qkv.bias)
        count, rows, cols, _ = qkv.shape
        q, k, v = qkv.view(count, rows * cols, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rel_h, rel_w = self._relative(q, rows, cols)
        # Measured on a CPU (benchmarks/attention.py): plain matrix products in parts that stay in its caches win
        # wherever no graph is kept, and in bfloat16 and in windows with one. On long float32 sequences with a graph the
        # widened form takes twice as long, but stores no logits: 50 MB an image and block at 512 px, 0.8 GB at 1024 px.
        # Only it runs on a GPU's flash kernels.
        long_float32 = q.dtype == torch.float32 and rows * cols >= 1024
        attend = _attend_widened if q.is_cuda or (rel_h.requires_grad and long_float32) else _attend_matmul
        out = attend(q, k, v, rel_h, rel_w).transpose(1, 2).reshape(count, rows, cols, channels)
        if window:
            out = unpartition(out, window, height, width)
        return self.proj(out)

    def _relative(self, q: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """Products of each query with the tables of its row and column: (n, heads, rows, cols, rows | cols)."""
        grid = q.unflatten(2, (rows, cols))
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, _table(self.rel_pos_h, rows).to(q.dtype))
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, _table(self.rel_pos_w, cols).to(q.dtype))
        return rel_h, rel_w


def _table(rel_pos: Tensor, size: int) -> Tensor:
    """(2 size - 1, d) offsets -> (size, size, d): entry [i, j] is the offset i - j."""
    index = torch.arange(size, device=rel_pos.device)
    return rel_pos[index[:, None] - index[None, :] + size - 1]


def _attend_matmul(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    shape, length = v.shape, q.shape[2]
    q, k, v = (q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    # einsum leaves these permuted, and their sum would take that layout; baddbmm copies what is not contiguous.
    rel_h, rel_w = (rel.flatten(2, 3).flatten(0, 1).contiguous() for rel in (rel_h, rel_w))
    if rel_h.requires_grad or torch.compiler.is_compiling():  # made of q: it is in a graph if any is kept
        return _attend_part(q, k, v, rel_h, rel_w).view(shape)
    out, together = torch.empty_like(v), max(1, _LOGITS_AT_ONCE // length**2)
    rows = max(1, min(length, _LOGITS_AT_ONCE // length))
    for start in range(0, len(q), together):
        part = slice(start, start + together)
        for row in range(0, length, rows):
            asked = part, slice(row, row + rows)
            out[asked] = _attend_part(q[asked], k[part], v[part], rel_h[asked], rel_w[asked])
    return out.view(shape)


def _attend_part(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """q: (n, L, d), scaled. k: (n, d, M). v: (n, M, d). rel_h, rel_w: (n, L, rows), (n, L, cols). M = rows cols."""
    bias = (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(2)
    return torch.baddbmm(bias, q, k).softmax(dim=-1).to(v.dtype) @ v


def _attend_widened(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """The same attention without a mask: [q s, rel_h, rel_w] . [k, onehot(row), onehot(col)]."""
    rows, cols, depth = rel_h.shape[-1], rel_w.shape[-1], q.shape[-1]
    index = torch.arange(rows * cols, device=q.device)
    place = torch.cat([F.one_hot(index // cols, rows), F.one_hot(index % cols, cols)], dim=1).to(q.dtype)
    wide_q = torch.cat([q * depth**-0.5, rel_h.flatten(2, 3), rel_w.flatten(2, 3)], dim=-1)
    wide_k = torch.cat([k, place.expand(*k.shape[:2], -1, -1)], dim=-1)
    wide_v = F.pad(v, (0, rows + cols))  # flash kernels want one head size for all three
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0)[..., :depth]


def partition(x: Tensor, window: int, fill: Tensor) -> Tensor:
    """Cuts (B, H, W, C) into (B * windows, window, window, C), padding right and bottom with `fill` (C,)."""
    batch, height, width, channels = x.shape
    rows, cols = -(-height // window), -(-width // window)
    if (height, width) != (rows * window, cols * window):
        padded = fill.to(x.dtype).expand(batch, rows * window, cols * window, channels).clone()
        padded[:, :height, :width] = x
        x = padded
    x = x.view(batch, rows, window, cols, window, channels)
    return x.transpose(2, 3).reshape(-1, window, window, channels)


def unpartition(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undoes `partition`: (B * windows, window, window, C) -> (B, height, width, C)."""
    rows, cols = -(-height // window), -(-width // window)
    x = x.view(-1, rows, cols, window, window, x.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, rows * window, cols * window, x.shape[-1])[:, :height, :width]
    # A Linear in bfloat16 copies its weight for every row of a grid that is not contiguous; in float32 it takes views.
    return x if x.dtype == torch.float32 else x.contiguous()


class Block(nn.Module):
    """Transformer block of the image encoder; `window_size` 0 means global attention."""

    def __init__(self, width: int, heads: int, window_size: int, grid: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, window_size or grid)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLPBlock(embedding_dim=width, mlp_dim=4 * width)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.window_size)
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """SAM's ViT: images (B, 3, S, S) -> embeddings (B, 256, S/16, S/16).

    checkpointing: keep only each block's input for the backward pass and compute the rest again there; the same
    gradients for about a third more time and a fraction of the memory.
    """

    def __init__(self, variant: Variant, image_size: int):
        super().__init__()
        self.checkpointing = False
        patch = variant.stride
        grid = image_size // patch
        self.img_size = image_size
        self.patch_embed = PatchEmbed((patch, patch), (patch, patch), embed_dim=variant.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, variant.width))
        self.blocks = nn.ModuleList(
            Block(variant.width, variant.heads, 0 if i in variant.global_blocks else WINDOW, grid)
            for i in range(variant.depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(variant.width, EMBED, 1, bias=False),
            LayerNorm2d(EMBED),
            nn.Conv2d(EMBED, EMBED, 3, padding=1, bias=False),
            LayerNorm2d(EMBED),
        )

    @property
    def steps(self) -> list[nn.Module]:
        """The modules between the patch embedding and the neck, in the order in which they run."""
        return list(self.blocks)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_from(self.forward_to(images, 0), 0)

    def forward_to(self, images: Tensor, step: int) -> Tensor:
        """The input of step `step`, (B, S/16, S/16, C); the embeddings where that is the number of steps."""
        if step == len(self.steps):
            return self(images)
        x = self.patch_embed(images) + self.pos_embed
        for module in self.steps[:step]:
            x = module(x)
        return x

    def forward_from(self, x: Tensor, step: int) -> Tensor:
        """The embeddings, from what `forward_to` gives for the same step."""
        if step == len(self.steps):
            return x
        for module in self.steps[step:]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(module, x, use_reentrant=False)
            else:
                x = module(x)
        return self.neck(x.permute(0, 3, 1, 2))


class Sam(nn.Module):
    """Segment Anything: `image_encoder`, `prompt_encoder`, `mask_decoder`, with Meta's key names.

    Two decoders make a model that answers with and without prompts: then `mask_decoder` draws the classes and
    `prompt_decoder` is the one for prompts. stride: pixels of the image for one token of the embedding. pixels: how
    images are prepared for the encoder; of it only SAM's pixel statistics are applied in here, the rest by
    `samlora.data.frame`. chunk: neighbouring slices of a volume that are encoded together, one after the other in the
    batch; 1 where each is encoded by itself.
    """

    def __init__(self, variant: str, image_size: int, num_masks: int):
        super().__init__()
        self.variant = variant
        self.image_size = image_size
        self.num_masks = num_masks
        self.pixels, self.chunk = Pixels(), 1
        # build.py sets these where a system has them.
        self.input_stem = None  # for images of other than three channels, see samlora.model.stem
        self.prompt_decoder = None
        size = VARIANTS[variant]
        self.stride = size.stride
        grid = image_size // self.stride
        encoder = TinyEncoder if size.tiny else ImageEncoder
        self.image_encoder = encoder(size, image_size)
        self.prompt_encoder = PromptEncoder(EMBED, (grid, grid), (image_size, image_size), mask_in_chans=16)
        self.mask_decoder = build_decoder(num_masks)

    @property
    def fill(self) -> tuple[float, ...]:
        """What images are padded with, one value a channel, in 0..1: where the pixel mean is taken away, that mean.

        SAM pads after it took the mean away, with 0.
        """
        if self.input_stem is not None:
            return (0.0,) * self.input_stem.in_channels
        return tuple(mean / 255 for mean in PIXEL_MEAN) if self.pixels.values == "sam" else (0.0,) * 3

    @property
    def logit_side(self) -> int:
        """Side L of the logits and of mask prompts, in pixels: 4 S/stride, or what the system has instead."""
        return self.prompt_encoder.mask_input_size[0]

    def encode(self, images: Tensor, step: int | None = None) -> Tensor:
        """Image embeddings (B, 256, S/stride, S/stride) of images (B, channels, S, S) in 0..1.

        step: return the input of this step of `image_encoder.steps` instead, as `Activations` holds it.
        Raises InputError for images of another size.
        """
        side, channels = self.image_size, 3 if self.input_stem is None else self.input_stem.in_channels
        if images.ndim != 4 or images.shape[1:] != (channels, side, side):
            raise InputError(
                f"images of shape {tuple(images.shape)} do not fit this model, which takes (batch, "
                f"{channels}, {side}, {side}); "
                f"resize them or build the model with another image_size or in_channels"
            )
        if self.input_stem is not None:
            images = self.input_stem(images)
        if self.pixels.values == "sam":
            mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
            images = (images * 255 - mean) / std
        return self.image_encoder(images) if step is None else self.image_encoder.forward_to(images, step)

    def decode(
        self,
        embeddings: Tensor,
        sparse: Tensor,
        dense: Tensor,
        image_index: Tensor | None = None,
        decoder: MaskDecoder | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masks (P, M, L, L) and predicted IoU (P, M) from embeddings and embedded prompts."""
        # Sines of large arguments: half precision would move every position.
        with torch.autocast(embeddings.device.type, enabled=False):
            image_pe = self.prompt_encoder.get_dense_pe()
        return (decoder or self.mask_decoder)(embeddings, image_pe, sparse, dense, image_index)

    def embed_prompts(self, prompts: Prompts | None, count: int) -> tuple[Tensor, Tensor]:
        """Sparse (P, N, 256) and dense (P, 256, h, w) embeddings; without prompts P = `count`, N = 0."""
        if prompts is None:
            sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
            return sparse.expand(count, -1, -1), dense.expand(count, -1, -1, -1)
        points = None if prompts.points is None else (prompts.points, prompts.labels)
        if points is None and prompts.boxes is None and prompts.masks is None:
            return self.embed_prompts(None, count if prompts.image_index is None else len(prompts.image_index))
        encoder, boxes = self.prompt_encoder, prompts.boxes
        with torch.autocast(encoder.no_mask_embed.weight.device.type, enabled=False):
            if boxes is None:
                return encoder(points=points, boxes=None, masks=prompts.masks)
            missing = boxes.isnan().any(dim=1)[:, None, None]
            sparse, dense = encoder(points=points, boxes=boxes.nan_to_num(), masks=prompts.masks)
            corners = torch.where(missing, encoder.not_a_point_embed.weight, sparse[:, -2:])
            return torch.cat([sparse[:, :-2], corners], dim=1), dense

    def answer(self, embeddings: Tensor, prompts: Prompts | None = None, classes: bool = True) -> Answer:
        """The masks of images that were encoded before: embeddings (B, 256, S/stride, S/stride).

        Prompts go to `prompt_decoder` where there is one, else to `mask_decoder`. classes: also the automatic masks,
        or, of a model with one decoder, every mask token's mask without prompts.
        """
        drawn = masks = iou = None
        if classes:
            drawn, _ = self.decode(embeddings, *self.embed_prompts(None, len(embeddings)))
        if prompts is not None:
            sparse, dense = self.embed_prompts(prompts, len(embeddings))
            masks, iou = self.decode(embeddings, sparse, dense, prompts.image_index, self.prompt_decoder)
        return Answer(drawn, masks, iou)

    def forward(
        self,
        images: Tensor | None,
        prompts: Prompts | None = None,
        embeddings: Tensor | Activations | None = None,
        details: bool = False,
    ) -> Tensor | Answer:
        """Low-resolution logits of a batch.

        images: (B, 3, S, S) in 0..1, or as many channels as the input stem takes; None where their `embeddings`, or
        what the encoder had computed on the way to them, are given. Without prompts every mask token's mask:
        (B, num_masks, L, L). With prompts one mask per prompt (mask token 0, SAM's single-mask output): (P, 1, L, L).
        details: an `Answer` instead, with everything a system that answers with and without prompts has.
        Raises InputError for images of another size.
        """
        if embeddings is None:
            embeddings = self.encode(images)
        elif isinstance(embeddings, Activations):
            embeddings = self.image_encoder.forward_from(embeddings.values, embeddings.step)
        if details:
            return self.answer(embeddings, prompts, classes=prompts is None or self.prompt_decoder is not None)
        answer = self.answer(embeddings, prompts, classes=prompts is None)
        return answer.classes if prompts is None else answer.masks[:, :1]


def usual_size(variant: str) -> int:
    """The image side adapters are trained at: 512 as SAMed's, or the variant's own where that is smaller."""
    return min(512, VARIANTS[variant].image_size)


def build_sam(variant: str, image_size: int | None = None, num_masks: int = STOCK_MASKS) -> Sam:
    """Builds a SAM with random weights.

    variant: a key of VARIANTS. image_size: side in pixels, a multiple of the variant's stride; None for the
    variant's own.
    num_masks: mask tokens of the decoder; 4 as in Meta's files, num_classes + 1 for semantic masks.
    Raises InputError for an unknown variant or an impossible size.
    """
    if variant not in VARIANTS:
        raise InputError(f"unknown SAM variant {variant!r}; known: {', '.join(VARIANTS)}")
    image_size = VARIANTS[variant].image_size if image_size is None else image_size
    check_size(VARIANTS[variant], image_size)
    return Sam(variant, image_size, num_masks)


@functools.cache
def state_shapes(variant: str, image_size: int | None = None, num_masks: int = STOCK_MASKS) -> dict[str, torch.Size]:
    """Name -> shape of every entry of the state dict, without allocating any weight."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_sam(variant, image_size, num_masks).state_dict().items()}
