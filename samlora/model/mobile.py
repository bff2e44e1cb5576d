"""MobileSAM's image encoder (arXiv 2306.14289): a TinyViT (arXiv 2207.10666) of 6 million parameters.

Its blocks are timm's. They are put together as MobileSAM does it, with its key names, so that its published file loads
untouched: a neck to 256 channels behind the last stage, which does not halve the grid. What belongs to ImageNet's
classes (`norm_head`, `head`) is in that file and therefore here; nothing uses it.
"""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samlora.errors import InputError
from samlora.model.lora import LoRAOptions, inject_blocks
from samlora.model.variants import EMBED, PATCH

IMAGENET_CLASSES = 1000


class TinyStage(nn.Module):
    """Blocks of one width, then, except in the last stage, the way to the next width.

    images: the stage's blocks are convolutions, (B, C, h, w) -> (B, C, h, w); otherwise attention, over (B, h, w, C).
    """

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None, images: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.images = images

    def forward(self, x: Tensor, checkpointing: bool) -> Tensor:
        """x: (B, C, h, w) -> (B, C', h', w')."""
        x = x if self.images else x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        x = x if self.images else x.permute(0, 3, 1, 2)
        return x if self.downsample is None else self.downsample(x)


class TinyEncoder(nn.Module):
    """MobileSAM's encoder: images (B, 3, S, S) -> embeddings (B, 256, S/16, S/16), for any S that 16 divides.

    Nothing in it depends on S: attention is within windows, whose position biases are by offset.
    checkpointing: keep only each block's input for the backward pass, as `ImageEncoder` does.
    """

    def __init__(self, image_size: int):
        super().__init__()
        self.img_size = image_size
        self.checkpointing = False
        trunk = _trunk()
        self.patch_embed = nn.Module()
        self.patch_embed.seq = nn.Sequential(trunk.patch_embed.conv1, trunk.patch_embed.act, trunk.patch_embed.conv2)
        # timm's stages begin with the step from the width before, MobileSAM's end with the step to the next.
        steps = [stage.downsample for stage in trunk.stages[1:]]
        steps[-1].conv2.conv.stride = (1, 1)
        self.layers = nn.ModuleList(
            TinyStage(stage.blocks, step, images=i == 0)
            for i, (stage, step) in enumerate(zip(trunk.stages, [*steps, None]))
        )
        self.norm_head = nn.LayerNorm(trunk.num_features)
        self.head = nn.Linear(trunk.num_features, IMAGENET_CLASSES)
        self.neck = nn.Sequential(
            nn.Conv2d(trunk.num_features, EMBED, 1, bias=False),
            LayerNorm2d(EMBED),
            nn.Conv2d(EMBED, EMBED, 3, padding=1, bias=False),
            LayerNorm2d(EMBED),
        )
        _rename_convolutions(self)
        self.train()

    @property
    def attention_blocks(self) -> list[nn.Module]:
        """The ten blocks with attention, first to last."""
        return [block for layer in self.layers for block in layer.blocks if not layer.images]

    def train(self, mode: bool = True) -> "TinyEncoder":
        """As any module's, but batch normalization always uses the statistics of the file.

        They are no parameters and in no adapter: if they moved, a saved adapter would not give its model back.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for block in self.attention_blocks:
            # timm's attention keeps its gathered biases when evaluating: gone stale once weights are loaded, and of no
            # use to autograd after inference mode. The flag does nothing else.
            block.attn.training = True
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.seq(images)
        for layer in self.layers:
            x = layer(x, self.checkpointing and torch.is_grad_enabled())
        return self.neck(x)


def _trunk() -> nn.Module:
    """timm's TinyViT of 5 million parameters with random weights. Raises InputError without timm."""
    try:
        import timm
    except ImportError:
        raise InputError("mobile_sam needs the package timm; install it with: pip install samlora[mobile]") from None
    # Without timm's own head, which is not MobileSAM's.
    return timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=0)


def _rename_convolutions(module: nn.Module) -> None:
    """Gives a convolution and its normalization MobileSAM's names, c and bn, instead of timm's, everywhere below."""
    from timm.models.tiny_vit import ConvNorm

    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            setattr(module, name, nn.Sequential(OrderedDict(c=child.conv, bn=child.bn)))
        else:
            _rename_convolutions(child)


def build_tiny_encoder(image_size: int) -> TinyEncoder:
    """MobileSAM's encoder with random weights, for images of `image_size` pixels a side.

    Raises InputError for a size that 16 does not divide, and without the package timm.
    """
    if image_size < PATCH or image_size % PATCH:
        raise InputError(
            f"image size {image_size} is not a multiple of {PATCH}; try {max(1, round(image_size / PATCH)) * PATCH}"
        )
    return TinyEncoder(image_size)


def inject_tiny(encoder: TinyEncoder, rank: int | LoRAOptions, layers: Iterable[int] | None = None) -> list[int]:
    """Puts LoRA on the blocks `layers` of `attention_blocks` (all ten when None); returns the blocks.

    rank: of the pairs on q and v, or what else is wanted; lin1 and lin2 are the MLP's fc1 and fc2.
    Raises InputError as `lora.inject_encoder` does.
    """
    return inject_blocks(encoder.attention_blocks, rank, layers, mlp=("fc1", "fc2"), per_head=True)
