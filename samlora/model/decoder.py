"""SAM's mask decoder for prompts of many images at once, in one memory layout.

The parameters are those of the `segment-anything` package, and the results are equal up to rounding. All
features of an image are kept as tokens, (P, h w, C): a transposed convolution whose kernel is its stride is a
product with each token, and the sub-pixels of a token stay beside it until the masks, which have few channels,
are put together.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder as StockMaskDecoder
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor, nn

from samlora.model.attention import scaled_attention
from samlora.model.norms import FEW_PIXELS
from samlora.model.variants import EMBED


class MaskDecoder(StockMaskDecoder):
    """SAM's mask decoder for prompts of many images at once; returns every mask token's mask."""

    def forward(
        self,
        embeddings: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts one mask per mask token for each of P prompts.

        embeddings: (B, 256, h, w). image_pe: (1, 256, h, w). sparse: (P, N, 256). dense: (P, 256, h, w).
        image_index: (P,) int64, the image of each prompt; None when prompt i belongs to image i.
        Returns masks (P, M, 4h, 4w) and predicted IoU (P, M).
        """
        source = embeddings if image_index is None else embeddings[image_index]
        height, width = source.shape[2:]
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        if height * width < FEW_PIXELS:
            return self._stock_order(source + dense, image_pe, tokens)
        tokens, pixels = two_way(self.transformer, _tokens(source + dense), _tokens(image_pe), tokens)
        pixels = upscale(self.output_upscaling, pixels)
        masks = self._mask_weights(tokens) @ pixels.flatten(1, 3).transpose(1, 2)
        # Each token has 2 x 2 sub-pixels, and each of them 2 x 2 of its own.
        masks = masks.view(*masks.shape[:2], height, width, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        masks = masks.reshape(*masks.shape[:2], 4 * height, 4 * width)
        return masks, self.iou_prediction_head(tokens[:, 0])

    def _stock_order(self, source: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The same with `segment_anything`'s own modules; see `FEW_PIXELS`."""
        tokens, pixels = self.transformer(source, image_pe.expand(len(source), -1, -1, -1), tokens)
        pixels = self.output_upscaling(pixels.transpose(1, 2).reshape(source.shape))
        masks = (self._mask_weights(tokens) @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
        return masks, self.iou_prediction_head(tokens[:, 0])

    def _mask_weights(self, tokens: Tensor) -> Tensor:
        """One weight for each channel of the pixels, of every mask: (P, T, 256) -> (P, M, 32)."""
        mask_tokens = tokens[:, 1 : 1 + self.num_mask_tokens].unbind(1)
        weights = [mlp(token) for mlp, token in zip(self.output_hypernetworks_mlps, mask_tokens)]
        return torch.stack(weights, dim=1)


def _tokens(image: Tensor) -> Tensor:
    """(P, C, h, w) -> (P, h w, C)."""
    return image.flatten(2).transpose(1, 2).contiguous()


def two_way(transformer: TwoWayTransformer, source: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SAM's two-way transformer.

    source: (P, h w, C), the images' tokens. image_pe: (1, h w, C), their places. tokens: (P, T, C), of prompts and
    masks. Returns (P, T, C) and (P, h w, C).
    """
    queries, keys = tokens, source
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = attend(layer.self_attn, queries, queries, queries)
        else:
            placed = queries + tokens
            queries = queries + attend(layer.self_attn, placed, placed, queries)
        queries = layer.norm1(queries)
        placed_keys = keys + image_pe
        queries = layer.norm2(queries + attend(layer.cross_attn_token_to_image, queries + tokens, placed_keys, keys))
        queries = layer.norm3(queries + layer.mlp(queries))
        update = attend(layer.cross_attn_image_to_token, placed_keys, queries + tokens, queries)
        keys = layer.norm4(keys + update)
    update = attend(transformer.final_attn_token_to_image, queries + tokens, keys + image_pe, keys)
    return transformer.norm_final_attn(queries + update), keys


def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What an attention of the transformer computes. q: (P, L, C). k, v: (P, M, C). Returns (P, L, C)."""
    projected = attention.q_proj(q), attention.k_proj(k), attention.v_proj(v)
    q, k, v = (x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in projected)
    out = scaled_attention(q, k, v)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def upscale(upscaling: nn.Sequential, x: Tensor) -> Tensor:
    """What the decoder's `output_upscaling` computes, with its sub-pixels unsorted.

    x: (P, h w, C) -> (P, h w, 4, 4, C / 8): of each token 2 x 2 sub-pixels (row by row), of each of these 2 x 2.
    """
    first, norm, activation, second, last_activation = upscaling
    x = F.layer_norm(_spread(x, first), norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return last_activation(_spread(activation(x), second))


def _spread(x: Tensor, convolution: nn.ConvTranspose2d) -> Tensor:
    """A transposed convolution with kernel 2 and stride 2 of single pixels: (..., inputs) -> (..., 4, outputs)."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return F.linear(x, weight, convolution.bias.repeat(4)).unflatten(-1, (4, -1))


def build_decoder(num_masks: int) -> MaskDecoder:
    """A mask decoder with random weights and `num_masks` mask tokens."""
    return MaskDecoder(
        num_multimask_outputs=num_masks - 1,
        transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED, mlp_dim=2048, num_heads=8),
        transformer_dim=EMBED,
    )
