"""TinyViT (arXiv 2207.10666) as SAM's image encoder: MobileSAM's (arXiv 2306.14289) and LiteMedSAM's.

The key names are MobileSAM's, so that the published files load untouched. What belongs to ImageNet's classes
(`norm_head`, `head`) is in MobileSAM's file and not in LiteMedSAM's; nothing uses it.

All features are kept as (B, H, W, C), contiguous. A convolution sees them as a channels-last image, so that no layer
has to copy them into another layout.
"""

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samlora.model.attention import scaled_attention
from samlora.model.lora import LoRAOptions, inject_blocks
from samlora.model.norms import LayerNorm2d
from samlora.model.variants import EMBED, Variant

IMAGENET_CLASSES = 1000
WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
EXPANSION = 4  # of the convolutions of the first stage and of the MLPs
_STRIDES = (2, 2, 1)  # of the steps from one stage to the next


class ConvNorm(nn.Sequential):
    """A convolution `c` without bias and the batch normalization `bn` behind it, computed as one convolution.

    The normalization always uses the statistics of the file: they are no parameters and in no adapter, so if they
    moved, a saved adapter would not give its model back. Folding it into the convolution is exact up to rounding.

    Under autocast it computes in float32, because most of the error of a bfloat16 pass comes from these convolutions:
    its embeddings are 5 % off with them and 3 % without, for a tenth of the time (`benchmarks/lite_medsam.py`). The
    three of `MBConv`, which are most of the work of the first stage, follow autocast.
    """

    follows_autocast = False

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(c=convolution, bn=nn.BatchNorm2d(outputs)))

    def train(self, mode: bool = True) -> "ConvNorm":
        """As any module's, but the batch normalization stays in evaluation mode."""
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, inputs) -> (B, H', W', outputs)."""
        bn, convolution = self.bn, self.c
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        weight = convolution.weight * scale[:, None, None, None]
        bias = bn.bias - bn.running_mean * scale
        stride, padding, groups = convolution.stride, convolution.padding, convolution.groups
        x = x.permute(0, 3, 1, 2)
        if self.follows_autocast:
            return F.conv2d(x, weight, bias, stride, padding, groups=groups).permute(0, 2, 3, 1)
        with torch.autocast(x.device.type, enabled=False):
            x = F.conv2d(x.to(weight.dtype), weight, bias, stride, padding, groups=groups)
        return x.permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Two convolutions with GELU between them: images (B, 3, S, S) -> (B, h, w, width)."""

    def __init__(self, kernel: int, width: int):
        super().__init__()
        stride = 2 if kernel > 1 else 1
        self.seq = nn.Sequential(
            ConvNorm(3, width // 2, kernel, stride), nn.GELU(), ConvNorm(width // 2, width, kernel, stride)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.seq(images.permute(0, 2, 3, 1).contiguous())


class MBConv(nn.Module):
    """Inverted bottleneck with a depthwise convolution in the middle, and a residual connection."""

    def __init__(self, width: int):
        super().__init__()
        hidden = EXPANSION * width
        self.conv1 = ConvNorm(width, hidden, 1)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width, 1)
        for convolution in (self.conv1, self.conv2, self.conv3):
            convolution.follows_autocast = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C) -> (B, H, W, C)."""
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(hidden))


class Downsample(nn.Module):
    """The step from one stage to the next: another width, and a grid of 1 / `stride` the side."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, 1)
        self.conv2 = ConvNorm(outputs, outputs, 3, stride, groups=outputs)
        self.conv3 = ConvNorm(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, inputs) -> (B, H / stride, W / stride, outputs)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Attention within windows of side `window`; a learned bias for every offset of two tokens, whatever its sign."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.num_heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        place = torch.arange(window)
        offset = (place[:, None] - place[None, :]).abs()
        index = offset[:, None, :, None] * window + offset[None, :, None, :]
        self.register_buffer("bias_index", index.reshape(window * window, window * window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C) -> (B, H, W, C). Windows that reach over the border are padded with zeros."""
        batch, height, width, channels = x.shape
        window = self.window
        rows, cols = -(-height // window), -(-width // window)
        # One copy puts the windows behind one another; q, k and v are then views that the kernels take as they are.
        padded = F.pad(x, (0, 0, 0, cols * window - width, 0, rows * window - height))
        windows = padded.view(batch, rows, window, cols, window, channels).transpose(2, 3)
        windows = windows.reshape(-1, window * window, channels)
        # Ordered by head: q, k and v of the first head, then of the second.
        qkv = self.qkv(self.norm(windows)).view(*windows.shape[:2], self.num_heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        # With a mask of less than four dimensions PyTorch computes the attention step by step on a CPU.
        bias = self.attention_biases.index_select(1, self.bias_index.flatten())
        bias = bias.view(1, self.num_heads, window * window, window * window).to(q.dtype)
        out = scaled_attention(q, k, v, bias)
        out = self.proj(out.transpose(1, 2).reshape(windows.shape))
        out = out.view(batch, rows, cols, window, window, channels).transpose(2, 3)
        return out.reshape(batch, rows * window, cols * window, channels)[:, :height, :width]


class Mlp(nn.Module):
    """Layer norm, then two Linears with GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, EXPANSION * width)
        self.fc2 = nn.Linear(EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class AttentionBlock(nn.Module):
    """Attention, a depthwise convolution between neighbours, and an MLP."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.attn = WindowAttention(width, heads, window)
        self.mlp = Mlp(width)
        self.local_conv = ConvNorm(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C) -> (B, H, W, C)."""
        x = self.local_conv(x + self.attn(x))
        return x + self.mlp(x)


class TinyStage(nn.Module):
    """Blocks of one width, then, except in the last stage, the step to the next width."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class TinyEncoder(nn.Module):
    """Images (B, 3, S, S) -> embeddings (B, 256, S/stride, S/stride), for any S that the stride divides.

    Nothing in it depends on S: attention is within windows, whose position biases are by offset.
    checkpointing: keep only each block's input for the backward pass, as `ImageEncoder` does.
    """

    def __init__(self, variant: Variant, image_size: int):
        super().__init__()
        self.img_size = image_size
        self.checkpointing = False
        self.patch_embed = PatchEmbed(variant.patch, WIDTHS[0])
        steps = [Downsample(*widths, stride) for *widths, stride in zip(WIDTHS, WIDTHS[1:], _STRIDES)]
        blocks = [[MBConv(WIDTHS[0]) for _ in range(DEPTHS[0])]]
        for width, depth, heads, window in list(zip(WIDTHS, DEPTHS, HEADS, WINDOWS))[1:]:
            blocks.append([AttentionBlock(width, heads, window) for _ in range(depth)])
        self.layers = nn.ModuleList(TinyStage(of_stage, step) for of_stage, step in zip(blocks, [*steps, None]))
        if variant.patch > 1:  # MobileSAM's file; see the module's docstring
            self.norm_head = nn.LayerNorm(WIDTHS[-1])
            self.head = nn.Linear(WIDTHS[-1], IMAGENET_CLASSES)
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], EMBED, 1, bias=False),
            LayerNorm2d(EMBED),
            nn.Conv2d(EMBED, EMBED, 3, padding=1, bias=False),
            LayerNorm2d(EMBED),
        )

    @property
    def attention_blocks(self) -> list[nn.Module]:
        """The ten blocks with attention, first to last."""
        return [block for layer in self.layers[1:] for block in layer.blocks]

    @property
    def steps(self) -> list[nn.Module]:
        """The modules between the patch embedding and the neck, in the order in which they run."""
        steps: list[nn.Module] = []
        for layer in self.layers:
            steps += layer.blocks
            if layer.downsample is not None:
                steps.append(layer.downsample)
        return steps

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_from(self.forward_to(images, 0), 0)

    def forward_to(self, images: Tensor, step: int) -> Tensor:
        """The input of step `step`, (B, h, w, C); the embeddings where that is the number of steps."""
        if step == len(self.steps):
            return self(images)
        x = self.patch_embed(images)
        for module in self.steps[:step]:
            x = module(x)
        return x

    def forward_from(self, x: Tensor, step: int) -> Tensor:
        """The embeddings, from what `forward_to` gives for the same step."""
        if step == len(self.steps):
            return x
        keep_inputs = self.checkpointing and torch.is_grad_enabled()
        for module in self.steps[step:]:
            x = checkpoint(module, x, use_reentrant=False) if keep_inputs else module(x)
        return self.neck(x.permute(0, 3, 1, 2))


def inject_tiny(encoder: TinyEncoder, rank: int | LoRAOptions, layers: Iterable[int] | None = None) -> list[int]:
    """Puts LoRA on the blocks `layers` of `attention_blocks` (all ten when None); returns the blocks.

    rank: of the pairs on q and v, or what else is wanted; lin1 and lin2 are the MLP's fc1 and fc2.
    Raises InputError as `lora.inject_encoder` does.
    """
    return inject_blocks(encoder.attention_blocks, rank, layers, mlp=("fc1", "fc2"), per_head=True)
