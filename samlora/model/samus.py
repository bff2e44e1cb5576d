"""SAMUS (arXiv 2309.06824): a SAM of small images and small patches, with a CNN beside its image encoder.

An image of side S (256) gives S/8 x S/8 tokens: it is resized to S + 8 and SAM's own 16 px patch embedding reads it
with a stride of 8 px. SAM's position table of S/4 x S/4 entries, which is what a base of side 4 S holds, is halved by
the position adapter. Blocks with global attention get cross-branch attention, with tokens as queries and the CNN's
features as keys and values, and a feature adapter beside the MLP; half of the CNN's last features are added to the
tokens in front of the neck. Windowed blocks, neck, prompt encoder and decoder are SAM's.

What begins at random in the published code begins here so that it adds nothing: a new SAMUS answers as a SAM on the
same tokens would, and the frozen decoder starts with features it knows. For the same reason the position adapter is
what the paper describes, pooling and convolution; the published code adds a norm and GELU behind it.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samlora.errors import InputError
from samlora.model.adapters import Adapter
from samlora.model.sam import Block, ImageEncoder, Sam, build_sam
from samlora.model.variants import STOCK_MASKS

PATCH = 16  # pixels along a side of SAM's patches
STRIDE = 8  # pixels of the image from one token to the next
BASE = 4  # the base is a SAM of this many times the image's side; its position table is then twice the token grid
IMAGE_SIZE = 256
RATIO = 0.25  # of the feature adapters' bottlenecks
SCALE = 0.5  # of what is added beside: the feature adapters, and the CNN's features in front of the neck


def base_size(image_size: int | None = None) -> int:
    """The side that a base is loaded at for a SAMUS on images of side `image_size` (256 when None).

    Raises InputError for a side that is not a multiple of 8.
    """
    image_size = IMAGE_SIZE if image_size is None else image_size
    if image_size < STRIDE or image_size % STRIDE:
        raise InputError(
            f"image size {image_size} is not a multiple of {STRIDE}, SAMUS's patches; "
            f"try {max(1, round(image_size / STRIDE)) * STRIDE}"
        )
    return BASE * image_size


class ConvBlock(nn.Sequential):
    """3x3 convolution, layer norm over channels, GELU; (B, inputs, h, w) -> (B, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), LayerNorm2d(outputs), nn.GELU())


class CnnBranch(nn.Sequential):
    """One convolution block and three that pool first: images (B, 3, S, S) -> features (B, width, S/8, S/8)."""

    def __init__(self, width: int):
        super().__init__(
            ConvBlock(3, 64),
            nn.Sequential(nn.MaxPool2d(2), ConvBlock(64, 128)),
            nn.Sequential(nn.MaxPool2d(2), ConvBlock(128, 256)),
            nn.Sequential(nn.MaxPool2d(2), ConvBlock(256, width)),
        )


class CrossAttention(nn.Module):
    """Attention of tokens (queries) to the features of the CNN (keys and values), zero at birth."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in "qkv")
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """tokens: (B, h, w, C). features: (B, C, h, w). Returns (B, h, w, C)."""
        source = features.flatten(2).transpose(1, 2)
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, x in ((self.q, tokens.flatten(1, 2)), (self.k, source), (self.v, source))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(out.reshape(tokens.shape))


class GlobalBlock(nn.Module):
    """A block with global attention, cross-branch attention in front of it and a feature adapter beside the MLP.

    Takes over the modules of `block`. cnn, adapters: as `insert_samus` has them.
    """

    def __init__(self, block: Block, cnn: bool, adapters: bool):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window_size = 0
        like = block.norm1.weight
        self.cross_attn = CrossAttention(len(like), block.attn.num_heads) if cnn else None
        self.refine = ConvBlock(len(like), len(like)) if cnn else None
        self.mlp_adapter = Adapter(len(like), RATIO, like) if adapters else None

    def forward(self, x: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """tokens: (B, h, w, C). features: (B, C, h, w), None without a CNN. Returns both, one block on."""
        normed = self.norm1(x)
        if self.cross_attn is not None:
            normed = normed + self.cross_attn(normed, features)
            features = self.refine(features)
        x = x + self.attn(normed, 0)
        normed = self.norm2(x)
        x = x + self.mlp(normed)
        if self.mlp_adapter is not None:
            x = x + SCALE * self.mlp_adapter(normed)
        return x, features


class PositionAdapter(nn.Sequential):
    """Halves a position table, (1, C, 2h, 2w) -> (1, C, h, w): pooling, then a convolution that begins as identity."""

    def __init__(self, width: int):
        convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        nn.init.dirac_(convolution.weight)
        super().__init__(nn.MaxPool2d(2), convolution)


class SamusEncoder(nn.Module):
    """SAMUS's image encoder: images (B, 3, S, S) -> embeddings (B, 256, S/8, S/8).

    Takes over the modules of `encoder`, which is that of a SAM of side 4 S, under their names. cnn, adapters: as
    `insert_samus` has them. checkpointing: as in `ImageEncoder`.
    """

    def __init__(self, encoder: ImageEncoder, cnn: bool, adapters: bool):
        super().__init__()
        self.checkpointing = encoder.checkpointing
        self.img_size = encoder.img_size // BASE
        self.patch_embed, self.pos_embed, self.neck = encoder.patch_embed, encoder.pos_embed, encoder.neck
        self.patch_embed.proj.stride = (STRIDE, STRIDE)
        grid, width = self.img_size // STRIDE, self.pos_embed.shape[-1]
        if not adapters:
            table = F.interpolate(self.pos_embed.data.permute(0, 3, 1, 2), (grid, grid), mode="bilinear")
            self.pos_embed.data = table.permute(0, 2, 3, 1).contiguous()
        for block in encoder.blocks:
            if not block.window_size:
                for table in (block.attn.rel_pos_h, block.attn.rel_pos_w):
                    size = (2 * grid - 1, table.shape[1])
                    table.data = F.interpolate(table.data[None, None], size, mode="bilinear")[0, 0]
        self.blocks = nn.ModuleList(
            block if block.window_size else GlobalBlock(block, cnn, adapters) for block in encoder.blocks
        )
        self.cnn_branch = CnnBranch(width) if cnn else None
        self.pos_adapter = PositionAdapter(width) if adapters else None
        self.patch_adapter = Adapter(width, RATIO, self.pos_embed) if adapters else None
        if cnn:  # what is added in front of the neck begins at zero
            last = [block for block in self.blocks if not block.window_size][-1]
            nn.init.zeros_(last.refine[1].weight)
        self.to(self.pos_embed)

    def forward(self, images: Tensor) -> Tensor:
        features = None if self.cnn_branch is None else self.cnn_branch(images)
        # With PATCH - STRIDE more pixels there are as many tokens as there are steps in the image.
        wider = F.interpolate(images, self.img_size + PATCH - STRIDE, mode="bilinear")
        x = self.patch_embed(wider)
        if self.patch_adapter is not None:
            x = x + self.patch_adapter(x)
        x = x + self._positions()
        for block in self.blocks:
            given = (x,) if block.window_size else (x, features)
            if self.checkpointing and torch.is_grad_enabled():
                out = checkpoint(block, *given, use_reentrant=False)
            else:
                out = block(*given)
            x, features = (out, features) if block.window_size else out
        x = x.permute(0, 3, 1, 2)
        return self.neck(x if features is None else x + SCALE * features)

    def _positions(self) -> Tensor:
        """The position table on the grid of tokens: (1, S/8, S/8, C)."""
        if self.pos_adapter is None:
            return self.pos_embed
        return self.pos_adapter(self.pos_embed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def insert_samus(sam: Sam, cnn: bool = True, adapters: bool = True) -> None:
    """Makes a SAM of side 4 S, with its weights, a SAMUS of side S, in place.

    Images are then (B, 3, S, S), embeddings (B, 256, S/8, S/8) and logits S/2, not S/4: `(.., S/2, S/2)`. Prompts are
    in pixels of the S x S image, masks as prompts S/2 x S/2.
    cnn: the CNN branch with its cross-branch attention. adapters: the five feature adapters and the position adapter;
    without them the position table is resized. Both False: SAM on small patches.
    Raises InputError when 4 S is not a multiple of 32, or the encoder is not SAM's own and unchanged.
    """
    encoder = sam.image_encoder
    if not isinstance(encoder, ImageEncoder) or not all(isinstance(block, Block) for block in encoder.blocks):
        raise InputError("this encoder is adapted already; build a fresh model instead of making SAMUS of it")
    if sam.image_size % (BASE * STRIDE):
        raise InputError(
            f"SAMUS begins with a SAM of {BASE} times its own image size, a multiple of {BASE * STRIDE}, "
            f"not of {sam.image_size}; build that with an image size such as {base_size()}"
        )
    sam.image_encoder = SamusEncoder(encoder, cnn, adapters)
    sam.image_size = side = sam.image_encoder.img_size
    grid, prompts = side // STRIDE, sam.prompt_encoder
    prompts.input_image_size, prompts.image_embedding_size = (side, side), (grid, grid)
    prompts.mask_input_size = (4 * grid, 4 * grid)


def build_samus(
    variant: str,
    image_size: int = IMAGE_SIZE,
    num_masks: int = STOCK_MASKS,
    cnn: bool = True,
    adapters: bool = True,
) -> Sam:
    """Builds a SAMUS with random weights; arguments as in `build_sam` and `insert_samus`, which say what is raised."""
    sam = build_sam(variant, base_size(image_size), num_masks)
    insert_samus(sam, cnn, adapters)
    return sam


def samus_names(sam: Sam) -> set[str]:
    """Names of the parameters that SAMUS trains: its own parts and the relative positions of the global blocks.

    The base's part of the encoder, the prompt encoder and the decoder stay frozen.
    """
    own = ("cnn_branch", "pos_adapter", "patch_adapter", "cross_attn", "refine", "mlp_adapter")
    names = {n for n, _ in sam.image_encoder.named_parameters() if any(part in n.split(".") for part in own)}
    for index, block in enumerate(sam.image_encoder.blocks):
        if not block.window_size:
            names |= {f"blocks.{index}.attn.rel_pos_h", f"blocks.{index}.attn.rel_pos_w"}
    return {f"image_encoder.{name}" for name in names}
