"""Laws of the bottleneck adapters (Medical SAM Adapter)."""

import fnmatch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weights import randomised

from samlora.errors import InputError
from samlora.model.adapters import ADAPTERS, AdaptedBlock, attend_slices, insert_adapters
from samlora.model.bases import find_base
from samlora.model.checkpoint import load_base, resize_positions
from samlora.model.lora import LoRA_sam
from samlora.model.methods import train_only
from samlora.model.sam import Prompts, Sam, build_sam


def new_names(sam: Sam) -> set[str]:
    return {name for name, _ in sam.named_parameters() if fnmatch.fnmatchcase(name, ADAPTERS)}


def boxes(count: int) -> Prompts:
    return Prompts(boxes=torch.tensor([[8.0, 8, 40, 40]]).expand(count, -1))


def half_objects(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four images with two ellipses each, and the upper half of one of them, which no base draws by itself.

    Returns images (4, 3, S, S), masks (4, S, S) bool and boxes (4, 4) around the whole ellipse, in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    rows, cols = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    images, masks, around = [], [], []
    for index in range(4):
        image, shift = 0.3 + 0.05 * torch.randn(side, side, generator=generator), torch.rand(4, generator=generator)
        ellipses = torch.tensor([[0.26, 0.4, 0.2, 0.3], [0.74, 0.4, 0.21, 0.26]])
        ellipses[:, :2] += shift.view(2, 2) * torch.tensor([0.03, 0.2])
        inside = [((cols - x) / rx) ** 2 + ((rows - y) / ry) ** 2 < 1 for x, y, rx, ry in ellipses]
        images.append((image + 0.4 * inside[0] + 0.25 * inside[1]).expand(3, -1, -1))
        x, y, rx, ry = ellipses[index % 2]
        masks.append(inside[index % 2] & (rows < y))
        around.append(torch.stack([x - rx, y - ry, x + rx, y + ry]) * side)
    return torch.stack(images), torch.stack(masks), torch.stack(around)


def fit(sam: Sam, prompts: Prompts, images: Tensor, masks: Tensor, steps: int) -> list[float]:
    """Trains what trains until the worst Dice is above 0.95; the worst Dice before every step."""
    optimizer = torch.optim.AdamW([p for p in sam.parameters() if p.requires_grad], lr=3e-3)
    worst = []
    while len(worst) < steps:
        logits = sam(images, prompts)
        drawn = F.interpolate(logits.detach(), masks.shape[-2:], mode="bilinear")[:, 0] > 0
        overlap, total = (drawn & masks).sum((1, 2)), drawn.sum((1, 2)) + masks.sum((1, 2))
        worst.append((2 * overlap / total).min().item())
        if worst[-1] > 0.95:
            break
        target, share = F.interpolate(masks[:, None].float(), logits.shape[-2:], mode="area"), logits.sigmoid()
        dice = 1 - 2 * (share * target).sum((1, 2, 3)) / (share + target).sum((1, 2, 3))
        loss = dice.mean() + F.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return worst


@pytest.mark.parametrize("depth", [0, 2])
def test_birth_is_identity(depth):
    sam, images = randomised(build_sam("vit_ti", 64)), torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        before = sam(images, boxes(4))
        insert_adapters(sam, depth=depth)
        assert torch.equal(sam(images, boxes(4)), before)


@pytest.mark.parametrize("depth", [0, 2])
def test_base_keys_stay_and_load(depth):
    base, sam = randomised(build_sam("vit_ti", 64)), build_sam("vit_ti", 64)
    shapes = {name: tensor.shape for name, tensor in sam.state_dict().items()}
    insert_adapters(sam, depth=depth)
    now = {name: tensor.shape for name, tensor in sam.state_dict().items()}
    assert shapes.items() <= now.items()
    assert now.keys() - shapes.keys() == new_names(sam)
    kinds = ["attn", "mlp"] + ["depth"] * (depth > 0)
    assert new_names(sam) == {
        f"image_encoder.blocks.{i}.{kind}_adapter.{end}.{part}"
        for i in range(12) for kind in kinds for end in ("down", "up") for part in ("weight", "bias")
    }  # fmt: skip
    answer = sam.load_state_dict(base.state_dict(), strict=False)
    assert not answer.unexpected_keys and set(answer.missing_keys) == new_names(sam)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(sam(images), base(images))


def test_a_block_computes_the_published_formula():
    sam = build_sam("vit_ti", 64)
    insert_adapters(sam, scale=0.3)
    block = randomised(sam).image_encoder.blocks[0]
    x = torch.randn(2, 4, 4, 192)

    def adapter(part: nn.Module, y: Tensor) -> Tensor:
        return part.up(nn.GELU()(part.down(y)))

    attended = block.attn(block.norm1(x), 14)
    y = x + (attended + adapter(block.attn_adapter, attended))
    normed = block.norm2(y)
    expected = y + block.mlp(normed) + 0.3 * adapter(block.mlp_adapter, normed)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("variant, depth, count", [("vit_b", 0, 7_100_928), ("vit_b", 8, 10_651_392)])
def test_size_at_full_width(variant, depth, count):
    """Two or three adapters of d -> d/4 -> d per block, written out: 12 * n * (2 * 768 * 192 + 192 + 768)."""
    with torch.device("meta"):
        sam = build_sam(variant)
        insert_adapters(sam, depth=depth)
    assert sum(p.numel() for n, p in sam.named_parameters() if n in new_names(sam)) == count


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_exactly_the_adapters_receive_gradients(depth, checkpointing):
    sam = randomised(build_sam("vit_ti", 64))
    insert_adapters(sam, depth=depth)
    train_only(sam, new_names(sam))
    for name, parameter in sam.named_parameters():
        if name in new_names(sam):
            nn.init.normal_(parameter, std=0.1)
    sam.image_encoder.checkpointing = checkpointing
    sam(torch.rand(4, 3, 64, 64), boxes(4)).square().sum().backward()
    assert {n for n, p in sam.named_parameters() if p.grad is not None and p.grad.any()} == new_names(sam)


def test_adapters_take_the_place_of_the_weights():
    sam = build_sam("vit_ti", 64).to(torch.float64)
    insert_adapters(sam, depth=2)
    assert {p.dtype for p in sam.parameters()} == {torch.float64}


@pytest.mark.parametrize("depth", [2, 4, 5])
def test_slices_attend_as_a_row_of_tokens(depth):
    """What the image attention does with a row of `depth` tokens is what the depth branch does with slices."""
    block = randomised(build_sam("vit_ti", 16 * depth)).image_encoder.blocks[2]  # tables of 2 * depth - 1 offsets
    x = torch.randn(3 * depth, 2, 3, 192)
    out = attend_slices(block.attn, x, depth).unflatten(0, (3, depth))
    volumes = x.unflatten(0, (3, depth))
    for row in range(2):
        for col in range(3):
            expected = block.attn(volumes[:, None, :, row, col], 0)[:, 0]
            torch.testing.assert_close(out[:, :, row, col], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_any_number_of_slices_finds_its_relative_positions(depth):
    """Tables of another size are resized as those of a base are for another image size."""
    sam, other = randomised(build_sam("vit_ti", 64)), build_sam("vit_ti", 16 * depth)
    other.load_state_dict(resize_positions(sam.state_dict(), "vit_ti", 16 * depth))
    x = torch.randn(2 * depth, 2, 3, 192)
    ours, theirs = (attend_slices(model.image_encoder.blocks[2].attn, x, depth) for model in (sam, other))
    torch.testing.assert_close(ours, theirs)


def with_depth(depth: int) -> Sam:
    sam = build_sam("vit_ti", 64)
    insert_adapters(sam, depth=depth)
    return randomised(sam)


def test_volumes_are_apart_and_slices_together():
    """In float64, where what rounding does is far below what a slice sees of the others."""
    encoder, volumes = with_depth(3).image_encoder.double(), torch.randn(2, 3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = encoder(volumes.flatten(0, 1)).unflatten(0, (2, 3))
        swapped = encoder(volumes.flip(0).flatten(0, 1)).unflatten(0, (2, 3))
        turned = encoder(volumes[0, [1, 0, 2]])
        volumes[1, 2] = 0
        changed = encoder(volumes.flatten(0, 1)).unflatten(0, (2, 3))
    assert (swapped - before.flip(0)).abs().max() < 1e-10
    assert (changed[0] - before[0]).abs().max() < 1e-10
    assert ((changed[1] - before[1]).abs().amax((1, 2, 3)) > 1e-5).all()  # a slice sees the others of its volume
    assert (turned[2] - before[0, 2]).abs().max() > 1e-5  # and how far away they are


def test_four_slices_are_learned():
    sam, _ = load_base(find_base("vit_ti"), "vit_ti", 64, None)
    torch.manual_seed(0)
    insert_adapters(sam)
    train_only(sam, new_names(sam))
    images, masks, around = half_objects(64)
    worst = fit(sam, Prompts(boxes=around), images, masks, steps=100)
    assert worst[0] < 0.8 and worst[-1] > 0.95


def test_lora_and_adapters_live_together():
    sam = randomised(build_sam("vit_ti", 64))
    insert_adapters(sam, depth=2)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = sam(images)
        # Not to the bit: on some CPUs matrix products depend on where the tensors lie in memory.
        torch.testing.assert_close(LoRA_sam(sam, 2)(images), before, atol=1e-5, rtol=1e-5)
    assert all(isinstance(block, AdaptedBlock) for block in sam.image_encoder.blocks)


def inserted(**options) -> Sam:
    sam = build_sam("vit_ti", 64)
    insert_adapters(sam, **options)
    return sam


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: inserted(ratio=0.001), "ratio 0.001"),
        (lambda: inserted(depth=1), "depth 1"),
        (lambda: inserted(depth=-2), "depth -2"),
        (lambda: insert_adapters(inserted()), "already"),
        (lambda: inserted(depth=3)(torch.zeros(4, 3, 64, 64)), "4 slices are not whole chunks of 3"),
    ],
)
def test_errors(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
