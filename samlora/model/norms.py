"""Layer normalization over the channels of an image."""

import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d as StockLayerNorm2d
from torch import Tensor

# Smaller images have little to gain, and keep the order of sums of `segment_anything`: AdamW at the rates of SAMed's
# reference run (tests/test_golden.py) turns a difference in the last bit into one of 1e-4 of the loss.
FEW_PIXELS = 1024


class LayerNorm2d(StockLayerNorm2d):
    """SAM's layer normalization of (B, C, H, W) over C, as one kernel on channels-last memory.

    The formula is `segment_anything`'s, which computes it in seven passes over the image.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        if x.shape[2] * x.shape[3] < FEW_PIXELS:
            return super().forward(x)
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)
