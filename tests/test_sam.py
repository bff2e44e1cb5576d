"""Our SAM against Meta's: same keys, same numbers, any size, any batch."""

from functools import partial

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from weights import randomised

import samlora
from samlora.errors import InputError
from samlora.model.checkpoint import resize_positions
from samlora.model.sam import (
    Attention,
    Prompts,
    _attend_matmul,
    _attend_widened,
    build_sam,
    partition,
    state_shapes,
    unpartition,
)
from samlora.model.variants import VARIANTS


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_keys_and_shapes_are_metas(name):
    with torch.device("meta"):
        stock = sam_model_registry[name]()
    assert {n: t.shape for n, t in stock.state_dict().items()} == dict(state_shapes(name))


@pytest.mark.parametrize("size", [64, 224, 256])
def test_encoder_equals_stock(size):
    ours = randomised(build_sam("vit_ti", size)).image_encoder
    variant = VARIANTS["vit_ti"]
    stock = ImageEncoderViT(
        img_size=size, embed_dim=variant.width, depth=variant.depth, num_heads=variant.heads, use_rel_pos=True,
        window_size=14, global_attn_indexes=variant.global_blocks, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    stock.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, size, size)
    ours_images, stock_images = images.clone().requires_grad_(), images.clone().requires_grad_()
    a, b = ours(ours_images), stock(stock_images)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(ours_images.grad, stock_images.grad, atol=1e-3, rtol=1e-3)
    for (name, p), (_, q) in zip(ours.named_parameters(), stock.named_parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-2 * q.grad.abs().max().item(), rtol=0, msg=name)


def test_both_attention_forms_agree():
    q, k, v = (torch.randn(3, 2, 15, 8) for _ in range(3))
    rel_h, rel_w = torch.randn(3, 2, 3, 5, 3), torch.randn(3, 2, 3, 5, 5)
    torch.testing.assert_close(_attend_widened(q, k, v, rel_h, rel_w), _attend_matmul(q, k, v, rel_h, rel_w))


def test_padded_tokens_carry_the_bias():
    attention = randomised(Attention(16, 2, 4))
    x = torch.randn(1, 5, 6, 16)
    padded = nn.functional.pad(x, (0, 0, 0, 2, 0, 3))
    torch.testing.assert_close(attention.qkv(padded)[:, :, :6][:, :5], attention.qkv(x))
    cut = partition(attention.qkv(x), 4, attention.qkv.bias)
    torch.testing.assert_close(cut, partition(attention.qkv(padded), 4, torch.zeros(48)))
    assert torch.equal(unpartition(cut, 4, 5, 6), attention.qkv(x))


@pytest.mark.parametrize("size, masks", [(32, 2), (256, 9), (304, 21)])
def test_any_size_and_class_count(size, masks):
    model = randomised(build_sam("vit_ti", size, masks))
    with torch.no_grad():
        together = model(images := torch.rand(3, 3, size, size))
        alone = torch.cat([model(image[None]) for image in images])
    assert together.shape == (3, masks, size // 4, size // 4)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_prompts_of_many_images_equal_stock_one_by_one():
    """B images with P_i prompts each in one decoder call, against Meta's Sam on the same weights."""
    ours = randomised(build_sam("vit_b", 64))
    with torch.device("meta"):
        stock = sam_model_registry["vit_b"]()
    stock = stock.to_empty(device="cpu")
    # Meta's model is 1024 px; give its parts our size instead of running it at 1024.
    stock.prompt_encoder, stock.image_encoder.img_size = ours.prompt_encoder, 64
    stock.mask_decoder.load_state_dict(ours.mask_decoder.state_dict())
    images = torch.rand(2, 3, 64, 64)
    points, labels = torch.rand(5, 2, 2) * 64, torch.tensor([[1, 0]] * 5)
    boxes = torch.tensor([[4.0, 5, 40, 50]] * 5) + torch.arange(5)[:, None]
    index = torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        together = ours(images, Prompts(points=points, labels=labels, boxes=boxes, image_index=index))
        embeddings = ours.image_encoder(images)
        for i, image in enumerate(index):
            sparse, dense = stock.prompt_encoder(
                (points[i : i + 1], labels[i : i + 1]), boxes[i : i + 1], None
            )
            alone, _ = stock.mask_decoder(
                embeddings[image][None],
                stock.prompt_encoder.get_dense_pe(),
                sparse,
                dense,
                multimask_output=False,
            )
            torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_no_gradient_and_keeps_less():
    torch.manual_seed(0)
    model = samlora.build_model(variant="vit_ti", image_size=64, num_classes=2)
    images, gradients, kept = torch.rand(2, 3, 64, 64), [], []
    for model.image_encoder.checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model(images).square().mean()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        kept.append(sum(sizes))
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("name", ["vit_ti", "vit_b", "vit_l", "vit_h"])
@pytest.mark.parametrize("size", [224, 256, 512, 1024])
def test_position_tables_resize_to_every_size(name, size):
    """Official shapes to every size, the global blocks chosen by index (on the meta device: no weights)."""
    variant = VARIANTS[name]
    wanted = state_shapes(name, size)
    tables = {n: torch.zeros(s) for n, s in state_shapes(name).items() if "pos_embed" in n or "rel_pos" in n}
    resized = resize_positions(tables, name, size)
    assert {n: t.shape for n, t in resized.items()} == {n: wanted[n] for n in tables}
    rows = resized[f"image_encoder.blocks.{variant.global_blocks[0]}.attn.rel_pos_h"].shape[0]
    assert rows == 2 * (size // 16) - 1
    assert resized["image_encoder.blocks.0.attn.rel_pos_h"].shape[0] == 27


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: build_sam("vit_x"), "vit_x"),
        (lambda: build_sam("vit_ti", 250), "256"),
        (lambda: build_sam("vit_ti", 64)(torch.zeros(1, 3, 32, 32)), "(1, 3, 32, 32)"),
    ],
)
def test_errors(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
