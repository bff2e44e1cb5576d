"""Weights that several test files use."""

import torch
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    """Fills every parameter, also those that start at zero, so that nothing can hide."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale * 0.5
    return model.eval()
