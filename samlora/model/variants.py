"""Sizes of SAM's parts."""

from dataclasses import dataclass

from samlora import pixels
from samlora.errors import InputError
from samlora.pixels import Pixels

WINDOW = 14
EMBED = 256  # channels of the image embedding and of every prompt token
STOCK_MASKS = 4  # one mask for a clear prompt and three for an ambiguous one


@dataclass(frozen=True)
class Variant:
    """Size of an image encoder, and how its usual weights want their input.

    width, depth, heads: channels, attention blocks and heads (of a TinyViT those of its last stage, and the attention
    blocks of all stages). global_blocks: blocks with global attention. image_size: usual side of the image, in pixels.
    stride: pixels of the image from one token of the embedding to the next, along each axis. tiny: a TinyViT
    (samlora.model.tiny_vit) instead of a plain ViT. patch: kernel of the TinyViT's two patch convolutions, in pixels.
    pixels: of the variant's usual base; files of `samlora.model.bases` may state others.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    image_size: int
    stride: int = 16
    tiny: bool = False
    patch: int = 16
    pixels: Pixels = pixels.SAM


VARIANTS = {
    "vit_ti": Variant(192, 12, 3, (2, 5, 8, 11), 256),
    "vit_b": Variant(768, 12, 12, (2, 5, 8, 11), 1024),
    "vit_l": Variant(1024, 24, 16, (5, 11, 17, 23), 1024),
    "vit_h": Variant(1280, 32, 16, (7, 15, 23, 31), 1024),
    "vit_t": Variant(320, 10, 10, (), 1024, tiny=True, patch=3),
    "lite_medsam": Variant(
        320, 10, 10, (), 256, stride=4, tiny=True, patch=1, pixels=pixels.LITE_MEDSAM
    ),
}


def check_size(variant: Variant, image_size: int) -> None:
    """Raises InputError for a side that the variant's stride does not divide."""
    if image_size < variant.stride or image_size % variant.stride:
        nearest = max(1, round(image_size / variant.stride)) * variant.stride
        raise InputError(f"image size {image_size} is not a multiple of {variant.stride}; try {nearest}")
