"""Laws of SAMUS: SAM on small patches, with a CNN beside it."""

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import PromptEncoder
from test_adapters import fit, half_objects
from torch import nn
from weights import randomised

from samlora.errors import InputError
from samlora.model.adapters import insert_adapters
from samlora.model.bases import find_base
from samlora.model.checkpoint import load_base, resize_positions
from samlora.model.methods import train_only
from samlora.model.sam import Prompts, Sam, build_sam
from samlora.model.samus import CrossAttention, base_size, build_samus, insert_samus, samus_names

SWITCHES = [(True, True), (False, True), (True, False), (False, False)]
CNN, ADAPTERS = {"cnn_branch", "cross_attn", "refine"}, {"pos_adapter", "patch_adapter", "mlp_adapter"}
POINTS = Prompts(points=torch.tensor([[[20.0, 30]], [[50, 10]]]), labels=torch.ones(2, 1))


@pytest.mark.parametrize("cnn, adapters", SWITCHES)
def test_birth_is_sam_on_small_patches(cnn, adapters):
    """A SAM with as many tokens, fed the same tokens and the halved positions, gives the same embeddings."""
    base = randomised(build_sam("vit_ti", 256))
    positions = base.image_encoder.pos_embed.detach().clone().permute(0, 3, 1, 2)
    halved = F.max_pool2d(positions, 2) if adapters else F.avg_pool2d(positions, 2)  # bilinear by 2 is the mean of four
    plain = build_sam("vit_ti", 128)  # 8 x 8 tokens, as SAMUS has of 64 px
    state = resize_positions(base.state_dict(), "vit_ti", 128)
    plain.load_state_dict(state | {"image_encoder.pos_embed": halved.permute(0, 2, 3, 1)})
    insert_samus(base, cnn, adapters)
    plain.image_encoder.patch_embed = nn.Sequential(nn.Upsample(72, mode="bilinear"), base.image_encoder.patch_embed)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(base.image_encoder(images), plain.image_encoder(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cnn, adapters", SWITCHES)
def test_base_keys_stay_and_the_rest_is_new(cnn, adapters):
    sam = build_sam("vit_ti", 256)
    before = {name: tensor.shape for name, tensor in sam.state_dict().items()}
    insert_samus(sam, cnn, adapters)
    after = {name: tensor.shape for name, tensor in sam.state_dict().items()}
    resized = {f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (2, 5, 8, 11) for axis in "hw"}
    assert {name for name in before if after[name] != before[name]} == resized | (
        set() if adapters else {"image_encoder.pos_embed"}
    )
    assert {after[name] for name in resized} == {(15, 64)}
    assert samus_names(sam) == (after.keys() - before.keys()) | resized
    own = {part for name in after.keys() - before.keys() for part in name.split(".") if part in CNN | ADAPTERS}
    assert own == (CNN if cnn else set()) | (ADAPTERS if adapters else set())


@pytest.mark.parametrize("cnn, adapters", SWITCHES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_exactly_the_new_parts_receive_gradients(cnn, adapters, checkpointing):
    sam = randomised(build_samus("vit_ti", 64, cnn=cnn, adapters=adapters))
    train_only(sam, samus_names(sam))
    sam.image_encoder.checkpointing = checkpointing
    sam(torch.rand(2, 3, 64, 64), POINTS).square().sum().backward()
    assert {n for n, p in sam.named_parameters() if p.grad is not None and p.grad.any()} == samus_names(sam)


def test_logits_are_half_the_image_and_prompts_are_in_its_pixels():
    sam = randomised(build_samus("vit_ti", 64))
    own = PromptEncoder(256, (8, 8), (64, 64), mask_in_chans=16)
    own.load_state_dict(sam.prompt_encoder.state_dict())
    box, mask = torch.tensor([[3.0, 5, 60, 44]]), torch.randn(1, 1, 32, 32)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert sam(images).shape == (1, 4, 32, 32)
        logits = sam(images, Prompts(boxes=box, masks=mask))
        sparse, dense = own(None, box, mask)
        expected, _ = sam.mask_decoder(sam.image_encoder(images), own.get_dense_pe(), sparse, dense)
    assert sam.prompt_encoder.mask_input_size == own.mask_input_size
    torch.testing.assert_close(logits, expected[:, :1])


def test_images_of_a_batch_are_apart():
    sam, images = randomised(build_samus("vit_ti", 64)), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        together, alone = sam(images), torch.cat([sam(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_each_token_reads_its_own_patch():
    """Of an image with one bright 8 px patch the token at that place sees most; all places, one image each."""
    embed = build_samus("vit_ti", 64).image_encoder.patch_embed
    nn.init.ones_(embed.proj.weight)
    images = torch.eye(64).view(64, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    wider = F.interpolate(images, 72, mode="bilinear")
    assert torch.equal(embed(wider).sum(dim=3).flatten(1).argmax(dim=1), torch.arange(64))


def test_cross_attention_is_multi_head_attention():
    ours, stock = randomised(CrossAttention(24, 3)), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        stock.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        stock.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        stock.out_proj.load_state_dict(ours.proj.state_dict())
    tokens, features = torch.randn(2, 4, 5, 24), torch.randn(2, 24, 4, 5)
    source = features.permute(0, 2, 3, 1).reshape(2, 20, 24)
    expected, _ = stock(tokens.reshape(2, 20, 24), source, source)
    torch.testing.assert_close(ours(tokens, features), expected.view(2, 4, 5, 24))


def test_the_encoder_computes_the_published_formula():
    """Written out once more, block by block, from the paper and its code."""
    encoder = randomised(build_samus("vit_ti", 64)).image_encoder
    images = torch.rand(2, 3, 64, 64)

    def adapter(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return part.up(nn.GELU()(part.down(x)))

    with torch.no_grad():
        features = encoder.cnn_branch(images)
        assert features.shape == (2, 192, 8, 8)
        x = encoder.patch_embed(F.interpolate(images, 72, mode="bilinear"))
        table = encoder.pos_adapter[1](F.max_pool2d(encoder.pos_embed.permute(0, 3, 1, 2), 2))
        x = x + adapter(encoder.patch_adapter, x) + table.permute(0, 2, 3, 1)
        for index, block in enumerate(encoder.blocks):
            if index not in (2, 5, 8, 11):
                x = block(x)
                continue
            normed = block.norm1(x)
            x = x + block.attn(normed + block.cross_attn(normed, features), 0)
            features = block.refine(features)
            normed = block.norm2(x)
            x = x + block.mlp(normed) + 0.5 * adapter(block.mlp_adapter, normed)
        expected = encoder.neck(x.permute(0, 3, 1, 2) + 0.5 * features)
        torch.testing.assert_close(encoder(images), expected)


def test_size_at_full_width():
    """ViT-B, 256 px: 130.1 M, as is said of SAMUS, and the position tables, which counters of layers leave out."""
    with torch.device("meta"):
        sam = build_samus("vit_b")
    sizes = {name: parameter.numel() for name, parameter in sam.named_parameters()}
    assert sum(sizes.values()) == 133_322_032
    assert sum(sizes[name] for name in samus_names(sam)) == 39_651_584
    tables = sum(size for name, size in sizes.items() if "pos_embed" in name or "rel_pos" in name)
    assert round((sum(sizes.values()) - tables) / 1e6, 1) == 130.1


def test_new_parts_take_the_place_of_the_weights():
    sam = build_sam("vit_ti", 256).to(torch.float64)
    insert_samus(sam)
    assert {p.dtype for p in sam.parameters()} == {torch.float64}


@pytest.mark.soak
def test_four_slices_are_learned():
    """With the decoder and all of SAM's encoder frozen, as published."""
    sam, _ = load_base(find_base("vit_ti"), "vit_ti", base_size(64), None)
    torch.manual_seed(0)
    insert_samus(sam)
    train_only(sam, samus_names(sam))
    images, masks, around = half_objects(64)
    centres = (around[:, None, :2] + around[:, None, 2:]) / 2
    worst = fit(sam, Prompts(points=centres, labels=torch.ones(4, 1)), images, masks, steps=100)
    assert worst[0] < 0.8 and worst[-1] > 0.95


def with_adapters() -> Sam:
    sam = build_sam("vit_ti", 64)
    insert_adapters(sam)
    return sam


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: base_size(100), "try 96"),
        (lambda: build_samus("vit_x"), "vit_x"),
        (lambda: insert_samus(build_sam("vit_ti", 48)), "not of 48"),
        (lambda: insert_samus(build_samus("vit_ti", 64)), "already"),
        (lambda: insert_samus(with_adapters()), "already"),
        (lambda: insert_adapters(build_samus("vit_ti", 64)), "already"),
        (lambda: build_samus("vit_ti", 64)(torch.zeros(1, 3, 256, 256)), "(1, 3, 256, 256)"),
    ],
)
def test_errors(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
