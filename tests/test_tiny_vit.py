"""MobileSAM's encoder: the published names, any size, and LoRA that finds q, k and v of every head."""

import pytest
import torch
from torch import nn

import samlora
from samlora.errors import InputError
from samlora.model.lora import LoRA_qkv, LoRAOptions, lora_names, merge, unmerge
from samlora.model.methods import train_only
from samlora.model.sam import Sam, build_sam
from samlora.model.tiny_vit import TinyEncoder, inject_tiny
from samlora.model.variants import VARIANTS

WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the encoder in MobileSAM's file, from its architecture alone."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, side: int) -> None:
        shapes[f"{name}.c.weight"] = (out, into, side, side)
        shapes.update({f"{name}.bn.{n}": (out,) for n in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    def affine(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    convolution("patch_embed.seq.0", 32, 3, 3)
    convolution("patch_embed.seq.2", 64, 32, 3)
    for stage, (width, depth, heads, window) in enumerate(zip(WIDTHS, DEPTHS, HEADS, WINDOWS)):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            if stage == 0:
                convolution(f"{name}.conv1", 4 * width, width, 1)
                convolution(f"{name}.conv2", 4 * width, 1, 3)
                convolution(f"{name}.conv3", width, 4 * width, 1)
                continue
            affine(f"{name}.attn.norm", width)
            affine(f"{name}.attn.qkv", 3 * width, width)
            affine(f"{name}.attn.proj", width, width)
            shapes[f"{name}.attn.attention_biases"] = (heads, window * window)
            affine(f"{name}.mlp.norm", width)
            affine(f"{name}.mlp.fc1", 4 * width, width)
            affine(f"{name}.mlp.fc2", width, 4 * width)
            convolution(f"{name}.local_conv", width, 1, 3)
        if stage < 3:
            after = WIDTHS[stage + 1]
            convolution(f"layers.{stage}.downsample.conv1", after, width, 1)
            convolution(f"layers.{stage}.downsample.conv2", after, 1, 3)
            convolution(f"layers.{stage}.downsample.conv3", after, after, 1)
    affine("norm_head", 320)
    affine("head", 1000, 320)
    shapes |= {"neck.0.weight": (256, 320, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    affine("neck.1", 256)
    affine("neck.3", 256)
    return shapes


def published_state() -> dict[str, torch.Tensor]:
    """A whole MobileSAM file with random contents."""
    generator = torch.Generator().manual_seed(3)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(100)
        if name.endswith("running_var"):
            return torch.rand(shape, generator=generator) + 0.5
        drawn = torch.randn(shape, generator=generator)
        if name.endswith(".weight"):  # so that no part drowns another
            return drawn / drawn[0].numel() ** 0.5 if len(shape) > 1 else 1 + 0.1 * drawn
        return drawn if "attention_biases" in name else 0.1 * drawn

    shapes = {f"image_encoder.{name}": shape for name, shape in published_shapes().items()}
    rest = build_sam("vit_b", 1024).state_dict()
    shapes |= {n: tuple(t.shape) for n, t in rest.items() if not n.startswith("image_encoder.")}
    return {name: values(name, shape) for name, shape in shapes.items()}


def mobile_sam(image_size: int) -> Sam:
    sam = build_sam("vit_ti", image_size)
    sam.image_encoder = TinyEncoder(VARIANTS["vit_t"], image_size)
    return sam


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return published_state()


@pytest.fixture
def encoder(state):
    encoder = TinyEncoder(VARIANTS["vit_t"], 64)
    prefix = "image_encoder."
    encoder.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    return encoder.requires_grad_(False)


def moved(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if ".linear_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_the_published_file_loads_strictly_and_comes_out_as_it_was(state):
    sam = mobile_sam(64)
    sam.load_state_dict(state, strict=True)
    again = sam.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)


@pytest.mark.parametrize("size", [32, 112, 208])
def test_any_multiple_of_16(state, size):
    sam = mobile_sam(size).eval()
    sam.load_state_dict(state)
    with torch.no_grad():
        assert sam.image_encoder(torch.rand(2, 3, size, size)).shape == (2, 256, size // 16, size // 16)
        assert sam(torch.rand(2, 3, size, size)).shape == (2, 4, size // 4, size // 4)
    assert sam.image_encoder.img_size == size


def by_hand(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """TinyViT written out, from its published weights, one window after the other."""
    weights = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    functional = nn.functional
    stride = 2 if encoder.patch_embed.seq[0].c.kernel_size == (3, 3) else 1

    def convolution(x, name, stride=1):
        kernel = weights[f"{name}.c.weight"]
        groups = x.shape[1] // kernel.shape[1]
        x = functional.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, groups=groups)
        mean, var, scale, shift = (weights[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, scale, shift)

    def linear(x, name):
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attention(x, name, heads, window):
        height, width = x.shape[1:3]
        x = functional.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows = [
            torch.cat([of_window(part, name, heads, window) for part in row.split(window, dim=2)], dim=2)
            for row in x.split(window, dim=1)
        ]
        return torch.cat(rows, dim=1)[:, :height, :width]

    def of_window(x, name, heads, window):
        # Zeros where there is no image; the offsets of a bias are numbered as they are met.
        batch, _, _, channels = x.shape
        x = x.flatten(1, 2)
        qkv = linear(norm(x, f"{name}.norm"), f"{name}.qkv").view(batch, window**2, heads, 3, channels // heads)
        q, k, v = (qkv[:, :, :, i].transpose(1, 2) for i in range(3))
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = (place[:, None] - place[None]).abs()
        bias = weights[f"{name}.attention_biases"][:, offset[..., 0] * window + offset[..., 1]]
        shares = (q @ k.transpose(-2, -1) / (channels // heads) ** 0.5 + bias).softmax(dim=-1)
        out = linear((shares @ v).transpose(1, 2).flatten(2), f"{name}.proj")
        return out.view(batch, window, window, channels)

    def pixel_norm(x, name):
        mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, correction=0)
        scale, shift = (weights[f"{name}.{n}"][:, None, None] for n in ("weight", "bias"))
        return (x - mean) / (variance + 1e-6).sqrt() * scale + shift

    gelu = functional.gelu
    x = convolution(gelu(convolution(images, "patch_embed.seq.0", stride)), "patch_embed.seq.2", stride)
    for stage, (depth, heads, window) in enumerate(zip(DEPTHS, HEADS, WINDOWS)):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            if stage == 0:
                inner = gelu(convolution(gelu(convolution(x, f"{name}.conv1")), f"{name}.conv2"))
                x = gelu(x + convolution(inner, f"{name}.conv3"))
                continue
            x = x + attention(x.permute(0, 2, 3, 1), f"{name}.attn", heads, window).permute(0, 3, 1, 2)
            x = convolution(x, f"{name}.local_conv").permute(0, 2, 3, 1)
            hidden = gelu(linear(norm(x, f"{name}.mlp.norm"), f"{name}.mlp.fc1"))
            x = (x + linear(hidden, f"{name}.mlp.fc2")).permute(0, 3, 1, 2)
        if stage < 3:
            name = f"layers.{stage}.downsample"
            x = gelu(convolution(x, f"{name}.conv1"))
            x = gelu(convolution(x, f"{name}.conv2", 1 if stage == 2 else 2))
            x = convolution(x, f"{name}.conv3")
    x = pixel_norm(functional.conv2d(x, weights["neck.0.weight"]), "neck.1")
    return pixel_norm(functional.conv2d(x, weights["neck.2.weight"], padding=1), "neck.3")


@pytest.fixture
def lite(state):
    """LiteMedSAM's encoder, whose patch embedding alone has other shapes than MobileSAM's."""
    encoder, own = TinyEncoder(VARIANTS["lite_medsam"], 64), {}
    for name, tensor in encoder.state_dict().items():
        given = state[f"image_encoder.{name}"]
        own[name] = given if given.shape == tensor.shape else given[:, :, 1:2, 1:2]
    encoder.load_state_dict(own)
    return encoder


def assert_computes_tinyvit(encoder, images):
    """With and without a graph, and every gradient."""
    encoder.eval()
    with torch.inference_mode():
        without_graph = encoder(images)
    results = []
    for network in (encoder, lambda x: by_hand(encoder, x)):
        encoder.zero_grad()
        shown = images.clone().requires_grad_()
        out = network(shown)
        (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
        gradients = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
        results.append((out.detach(), gradients | {"images": shown.grad}))
    (found, gradients), (expected, wanted) = results
    torch.testing.assert_close(without_graph, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        near = 1e-3 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, atol=near, rtol=0, msg=name)


@pytest.mark.parametrize("size", [32, 48, 128])
def test_it_computes_tinyvit(encoder, size):
    assert_computes_tinyvit(encoder.requires_grad_(True), torch.rand(2, 3, size, size))


@pytest.mark.parametrize("size", [36, 128])
def test_it_computes_litemedsam(lite, size):
    images = torch.rand(1, 3, size, size)
    assert_computes_tinyvit(lite, images)
    with torch.no_grad():  # nothing of the weights before may be remembered
        for tensor in lite.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    assert_computes_tinyvit(lite, images)
    lite.requires_grad_(False)
    lite.load_state_dict({n: t / 1.1 if t.is_floating_point() else t for n, t in lite.state_dict().items()})
    with torch.inference_mode():
        torch.testing.assert_close(lite(images), by_hand(lite, images), atol=1e-5, rtol=1e-4)


def test_evaluating_leaves_nothing_behind(encoder, state):
    """Neither batch statistics nor remembered biases: training is as evaluating, and new weights count at once."""
    images = torch.rand(2, 3, 64, 64)
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    with torch.inference_mode():
        evaluated = encoder.eval()(images)
    trained = encoder.train()(images.requires_grad_())
    torch.testing.assert_close(trained, evaluated, atol=0, rtol=0)
    trained.sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in encoder.state_dict().items())
    encoder.eval().load_state_dict({n: t + 0.1 if "attention_biases" in n else t for n, t in before.items()})
    with torch.no_grad():
        # The same number on every bias changes no softmax; on one of them it does.
        torch.testing.assert_close(encoder(images), evaluated, atol=1e-5, rtol=1e-4)
        encoder.layers[1].blocks[0].attn.attention_biases[:, 1] += 1
        assert not torch.allclose(encoder(images), evaluated, atol=1e-3)


def test_checkpointing_gives_the_same_gradients(encoder):
    inject_tiny(encoder, LoRAOptions(2, dropout=0.5))
    moved(encoder)
    images, gradients = torch.rand(1, 3, 64, 64), []
    for encoder.checkpointing in (False, True):
        encoder.zero_grad()
        torch.manual_seed(0)
        encoder.train()(images).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("target, index", [("q", 0), ("k", 1), ("v", 2)])
def test_lora_reaches_its_own_rows_of_every_head(encoder, target, index):
    inject_tiny(encoder, LoRAOptions(3, targets=(target,)))
    qkv = moved(encoder).attention_blocks[4].attn.qkv
    heads, x = HEADS[2], torch.rand(2, 5, WIDTHS[2])
    with torch.no_grad():
        change = (qkv(x) - nn.functional.linear(x, qkv.weight, qkv.bias)).view(2, 5, heads, 3, -1)
        pair = getattr(qkv, f"linear_b_{target}")(getattr(qkv, f"linear_a_{target}")(x)).view(2, 5, heads, -1)
    torch.testing.assert_close(change[..., index, :], pair, atol=1e-5, rtol=1e-5)
    assert not change[..., [i for i in range(3) if i != index], :].any()


@pytest.mark.parametrize(
    "options",
    [4, LoRAOptions(2, alpha=8, dora=True, targets=("q", "k", "v", "proj", "lin1", "lin2"), ranks={9: 5})],
    ids=["plain", "everything"],
)
def test_lora_begins_as_nothing_and_merges(encoder, options):
    images = torch.rand(1, 3, 64, 64)
    encoder.eval()
    with torch.no_grad():
        before = encoder(images)
        assert inject_tiny(encoder, options) == list(range(10))
        assert torch.equal(encoder.eval()(images), before)
        weights = {n: t.clone() for n, t in moved(encoder).state_dict().items()}
        after = encoder(images)
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(merge(encoder)(images), after, atol=1e-5, rtol=1e-4)
        unmerge(encoder)
    assert all(torch.equal(t, weights[n]) for n, t in encoder.state_dict().items())


def test_chosen_blocks_and_their_names(state):
    sam = mobile_sam(64)
    assert inject_tiny(sam.image_encoder, 4, [1, 9]) == [1, 9]
    names = lora_names(sam)
    assert names["w_a_000"] == "image_encoder.layers.1.blocks.1.attn.qkv.linear_a_q.weight"
    assert names["w_b_003"] == "image_encoder.layers.3.blocks.1.attn.qkv.linear_b_v.weight"
    assert len(names) == 8 and sum(isinstance(m, LoRA_qkv) for m in sam.modules()) == 2
    missing = sam.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == set(names.values()) and not missing.unexpected_keys
    moved(sam)
    train_only(sam, names.values())
    sam(torch.rand(1, 3, 64, 64)).square().sum().backward()
    assert {n for n, p in sam.named_parameters() if p.grad is not None} == set(names.values())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: build_sam("vit_t", 100), "try 96"),
        (lambda: inject_tiny(TinyEncoder(VARIANTS["vit_t"], 64), 4, [10]), "0 to 9"),
        (lambda: inject_tiny(TinyEncoder(VARIANTS["vit_t"], 64), 0), "rank 0"),
        (lambda: samlora.build_model("msa", "random:0", "lite_medsam"), "plain ViT, and this is a TinyViT; give one of vit_ti, vit_b"),
        (lambda: samlora.build_model("samus", "random:0", "vit_t", 256), "plain ViT, and this is a TinyViT; give one of vit_ti, vit_b"),
    ],
)
def test_errors(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
