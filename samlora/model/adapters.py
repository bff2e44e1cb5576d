"""Bottleneck adapters in the blocks of SAM's image encoder (Medical SAM Adapter, arXiv 2304.12620).

A block that carries adapters takes over the modules of the block it replaces, so that a base checkpoint's keys load
untouched before or after. For tokens x a block computes

    n = norm1(x)    y = x + a + A1(a) + A3(depth_attn(n)),  a = attn(n)    y + mlp(norm2(y)) + scale A2(norm2(y))

with three adapters A(x) = up(gelu(down(x))). The depth branch, for volumes, runs the block's own attention along the
slices. Two things differ from the published code. `up` begins at zero, there at random: a new model answers as its
base does. And slices lie in one row, there folded into a grid that is as square as possible, which makes neighbours
of slices that lie far apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlora.errors import InputError
from samlora.model.sam import Attention, Block, Sam

# Where the parameters that `insert_adapters` adds are, as a pattern of names.
ADAPTERS = "image_encoder.blocks.*_adapter.*"


class Adapter(nn.Module):
    """Bottleneck `width` -> `ratio` * `width` -> `width` with GELU and biases; (..., width) in and out, zero at birth.

    like: the new weights get its device and dtype. Raises InputError when nothing is left of the width.
    """

    def __init__(self, width: int, ratio: float, like: Tensor):
        super().__init__()
        hidden = int(width * ratio)
        if hidden < 1:
            raise InputError(f"adapter ratio {ratio} leaves none of {width} channels; give a ratio such as 0.25")
        place = {"device": like.device, "dtype": like.dtype}
        self.down = nn.Linear(width, hidden, **place)
        self.up = nn.Linear(hidden, width, **place)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class AdaptedBlock(nn.Module):
    """A block of the image encoder with adapters after attention, beside the MLP and, with `depth`, along slices.

    Takes over the modules of `block`. ratio: of the bottlenecks. scale: of the adapter beside the MLP. depth: slices
    of a volume chunk; 0 without a depth branch.
    """

    def __init__(self, block: Block, ratio: float, scale: float, depth: int):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window_size = block.window_size
        self.scale, self.depth = scale, depth
        like = block.norm1.weight
        self.attn_adapter = Adapter(len(like), ratio, like)
        self.mlp_adapter = Adapter(len(like), ratio, like)
        self.depth_adapter = Adapter(len(like), ratio, like) if depth else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, H, W, C) -> (B, H, W, C); with `depth` B counts slices, those of a chunk one after the other.

        Raises InputError when B is not a multiple of `depth`.
        """
        normed = self.norm1(x)
        attended = self.attn(normed, self.window_size)
        y = x + attended + self.attn_adapter(attended)
        if self.depth_adapter is not None:
            y = y + self.depth_adapter(attend_slices(self.attn, normed, self.depth))
        normed = self.norm2(y)
        return y + self.mlp(normed) + self.scale * self.mlp_adapter(normed)


def attend_slices(attention: Attention, x: Tensor, depth: int) -> Tensor:
    """An image attention's own weights along the slices: each token sees its place in the `depth` slices of its chunk.

    x: (B * depth, H, W, C) -> the same shape. Relative positions are those of the columns, resized to 2 depth - 1
    offsets as SAM does it for other sizes; those of the rows add the same to every slice and drop out.
    Raises InputError when the slices are not whole chunks.
    """
    slices, height, width, channels = x.shape
    if slices % depth:
        raise InputError(
            f"{slices} slices are not whole chunks of {depth}; give a multiple of {depth} slices, chunk after chunk"
        )
    x = x.unflatten(0, (-1, depth)).permute(0, 2, 3, 1, 4).reshape(-1, depth, channels)
    qkv = attention.qkv(x).view(len(x), depth, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    table = attention.rel_pos_w
    if len(table) != 2 * depth - 1:
        table = F.interpolate(table.T[None], size=2 * depth - 1, mode="linear")[0].T
    index = torch.arange(depth, device=x.device)
    offsets = table[index[:, None] - index[None, :] + depth - 1].to(q.dtype)
    # Plain products: thousands of sequences of a few slices, more than fused kernels take at once.
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + torch.einsum("nhqc,qkc->nhqk", q, offsets)
    out = (logits.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).reshape(-1, depth, channels)
    out = attention.proj(out).unflatten(0, (-1, height, width))
    return out.permute(0, 3, 1, 2, 4).reshape(slices, height, width, channels)


def insert_adapters(sam: Sam, ratio: float = 0.25, scale: float = 0.5, depth: int = 0) -> None:
    """Puts adapters into every block of a SAM's image encoder, in place; it answers as before until they train.

    ratio: width of the bottlenecks over that of the encoder. scale: of the adapters beside the MLPs. depth: number of
    neighbouring slices that form a chunk; a batch is then whole chunks, slice after slice. 0: 2D.
    Raises InputError for an impossible ratio or depth, or an encoder whose blocks are not SAM's own.
    """
    if depth < 0 or depth == 1:
        raise InputError(f"adapter depth {depth} is not possible; give 0 for 2D, or 2 or more slices")
    blocks = sam.image_encoder.blocks
    if not all(isinstance(block, Block) for block in blocks):
        raise InputError("this encoder carries adapters already; build a fresh model instead of inserting twice")
    sam.image_encoder.blocks = nn.ModuleList(AdaptedBlock(block, ratio, scale, depth) for block in blocks)
    sam.chunk = depth or 1
