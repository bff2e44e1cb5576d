"""Images of other than three channels: a learned 1x1 convolution before SAM."""

import torch
from torch import nn


class InputStem(nn.Conv2d):
    """(B, C, H, W) -> (B, 3, H, W): each of SAM's three inputs a learned sum of the image's channels.

    Begins as the mean of the channels c, c + 3, c + 6, ...: of four channels the first input shows 0 and 3, the second
    1, the third 2; of two, 0, 1 and 0 again. So values stay in the range the base was trained on.
    """

    def __init__(self, channels: int):
        super().__init__(channels, 3, kernel_size=1)
        share = torch.zeros(3, channels)
        for n in range(max(3, channels)):
            share[n % 3, n % channels] = 1
        with torch.no_grad():
            self.weight.copy_((share / share.sum(dim=1, keepdim=True))[:, :, None, None])
            self.bias.zero_()
