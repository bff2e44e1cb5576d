"""Scaled dot-product attention by the kernel that is fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, as `F.scaled_dot_product_attention` computes it.

    On a CPU the backward pass of PyTorch's fused kernel is slow in half precision: 8 of the 10 seconds of a
    training step of LiteMedSAM's decoder, where plain matrix products take a fraction of a second. They are
    taken wherever a graph is kept there.

    Args:
        q: (..., L, d) queries.
        k: (..., M, d) keys.
        v: (..., M, d) values.
        bias: (..., L, M), added to the logits; None for 0.

    Returns:
        (..., L, d), in the number format of `q`.
    """
    keeps_graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not keeps_graph or q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, bias)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1).to(v.dtype) @ v
