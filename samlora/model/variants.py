"""Sizes of SAM's parts."""

from dataclasses import dataclass

PATCH = 16
WINDOW = 14
EMBED = 256  # channels of the image embedding and of every prompt token
STOCK_MASKS = 4  # one mask for a clear prompt and three for an ambiguous one


@dataclass(frozen=True)
class Variant:
    """Size of an image encoder: channels, blocks, heads, blocks with global attention, usual image side.

    tiny: MobileSAM's, which is not a plain ViT (samlora.model.mobile): width and heads are those of its last stage.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    image_size: int
    tiny: bool = False


VARIANTS = {
    "vit_ti": Variant(192, 12, 3, (2, 5, 8, 11), 256),
    "vit_b": Variant(768, 12, 12, (2, 5, 8, 11), 1024),
    "vit_l": Variant(1024, 24, 16, (5, 11, 17, 23), 1024),
    "vit_h": Variant(1280, 32, 16, (7, 15, 23, 31), 1024),
    "vit_t": Variant(320, 10, 10, (), 1024, tiny=True),
}
