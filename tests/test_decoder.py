"""The mask decoder and its layer normalization against segment_anything's own, on grids of both ways to compute."""

import copy

import pytest
import torch
from segment_anything.modeling import MaskDecoder as StockMaskDecoder
from segment_anything.modeling.common import LayerNorm2d as StockLayerNorm2d
from torch import Tensor, nn
from weights import randomised

from samlora.model.decoder import MaskDecoder, build_decoder
from samlora.model.lora import inject_decoder
from samlora.model.norms import FEW_PIXELS, LayerNorm2d

GRIDS = [(16, 16), (32, 40)]  # fewer pixels than FEW_PIXELS, and more


def stock_copy(decoder: MaskDecoder) -> StockMaskDecoder:
    stock = StockMaskDecoder(
        num_multimask_outputs=decoder.num_multimask_outputs,
        transformer=copy.deepcopy(decoder.transformer),
        transformer_dim=decoder.transformer_dim,
    )
    stock.load_state_dict(decoder.state_dict())
    return stock


def gradients(module: nn.Module, *outputs: Tensor) -> dict[str, Tensor]:
    """Of a sum that gives every output element another weight."""
    loss = sum((out * torch.linspace(-1, 2, out.numel()).view(out.shape)).mean() for out in outputs)
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        # The bias of k moves all logits of a softmax alike: its gradient is nothing but rounding.
        near = 1e-4 * gradient.abs().max().item() + 1e-7 * largest
        torch.testing.assert_close(found[name], gradient, atol=near, rtol=0, msg=name)


def test_both_ways_are_tested():
    few, many = (height * width for height, width in GRIDS)
    assert few < FEW_PIXELS <= many


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lora", [False, True])
def test_prompts_of_many_images_equal_stock(grid, lora):
    torch.manual_seed(0)
    decoder = build_decoder(4)
    if lora:
        inject_decoder(decoder.transformer, 2)
    randomised(decoder)
    stock = stock_copy(decoder)
    embeddings, place = torch.randn(2, 256, *grid), torch.randn(1, 256, *grid)
    sparse, dense, index = torch.randn(3, 2, 256), torch.randn(3, 256, *grid), torch.tensor([1, 0, 1])
    inputs = [embeddings.clone().requires_grad_() for _ in range(2)]
    found = decoder(inputs[0], place, sparse, dense, index)
    expected = [
        stock.predict_masks(inputs[1][i : i + 1], place, sparse[n : n + 1], dense[n : n + 1])
        for n, i in enumerate(index.tolist())
    ]
    expected = [torch.cat(parts) for parts in zip(*expected)]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=1e-4)
    with torch.no_grad():
        again = decoder(embeddings, place, sparse, dense, index)
    torch.testing.assert_close(again[0], found[0], atol=2e-5 * found[0].abs().max().item(), rtol=1e-4)
    assert_equal_gradients(gradients(decoder, *found), gradients(stock, *expected))
    scale = inputs[1].grad.abs().max().item()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_automatic_masks_equal_stock(grid):
    decoder = randomised(build_decoder(9))
    embeddings, place = torch.randn(2, 256, *grid), torch.randn(1, 256, *grid)
    dense = torch.randn(1, 256, 1, 1).expand(2, -1, *grid)
    with torch.no_grad():
        found, _ = decoder(embeddings, place, torch.empty(2, 0, 256), dense)
        expected, _ = stock_copy(decoder).predict_masks(embeddings, place, torch.empty(1, 0, 256), dense[:1])
    assert found.shape == (2, 9, 4 * grid[0], 4 * grid[1])
    torch.testing.assert_close(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=1e-4)


def test_bfloat16_stays_near():
    decoder, grid = randomised(build_decoder(3)), GRIDS[1]
    inputs = torch.randn(2, 256, *grid), torch.randn(1, 256, *grid), torch.empty(2, 0, 256), torch.randn(2, 256, *grid)
    expected, _ = decoder(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = decoder(*inputs)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layer_norm_equals_stock(grid, layout):
    ours = randomised(LayerNorm2d(24))
    stock = StockLayerNorm2d(24)
    stock.load_state_dict(ours.state_dict())
    x = (3 * torch.randn(2, 24, *grid) + 1).contiguous(memory_format=layout)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, expected = ours(inputs[0]), stock(inputs[1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_equal_gradients(gradients(ours, found), gradients(stock, expected))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-7, rtol=1e-3)
