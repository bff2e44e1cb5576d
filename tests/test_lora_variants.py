"""Laws of LoRA beyond SAMed's: scales, dropout, DoRA, other targets and ranks, LoRA+."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samlora.errors import InputError
from samlora.model.build import build_model, load_model
from samlora.model.checkpoint import save_adapter
from samlora.model.lora import (
    TARGETS,
    LoRA_linear,
    LoRA_qkv,
    LoRA_sam,
    LoRAOptions,
    inject_encoder,
    lora_names,
    lora_plus_groups,
    merge,
    unmerge,
)
from samlora.model.methods import system_options, train_only
from samlora.model.sam import Sam, build_sam
from samlora.model.tensors import read_tensors
from samlora.training.setup import start_from

VARIANTS = {
    "plain": LoRAOptions(4),
    "alpha": LoRAOptions(4, alpha=16),
    "rslora": LoRAOptions(4, alpha=16, rslora=True),
    "dropout": LoRAOptions(4, dropout=0.5),
    "dora": LoRAOptions(4, dora=True),
    "k": LoRAOptions(2, targets=("q", "k", "v")),
    "v": LoRAOptions(2, targets=("v",)),
    "projection": LoRAOptions(2, targets=("proj",)),
    "mlp": LoRAOptions(2, targets=("q", "v", "lin1", "lin2")),
    "ranks": LoRAOptions(2, ranks={3: 7, 11: 1}),
    "all": LoRAOptions(3, alpha=6, rslora=True, dropout=0.1, dora=True, targets=TARGETS, ranks={0: 5}),
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture
def sam() -> Sam:
    torch.manual_seed(0)
    return build_sam("vit_ti", 64).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def moved(sam: Sam) -> Sam:
    """The same SAM with its LoRA not at the starting point."""
    state, generator = dict(sam.named_parameters()), torch.Generator().manual_seed(2)
    for name in lora_names(sam).values():
        with torch.no_grad():
            state[name].add_(torch.randn(state[name].shape, generator=generator), alpha=0.05)
    return sam


def test_defaults_are_samed(sam):
    """The same random numbers, factors, names and products as a rank alone, and as SAMed draws and adds them."""
    assert LoRAOptions() == LoRAOptions(4, None, False, 0.0, False, ("q", "v"), ())
    plain = build_sam("vit_ti", 64)
    plain.load_state_dict(sam.state_dict())
    torch.manual_seed(5)
    inject_encoder(sam.image_encoder, LoRAOptions(3))
    torch.manual_seed(5)
    inject_encoder(plain.image_encoder, 3)
    torch.manual_seed(5)
    samed = []
    for _ in plain.image_encoder.blocks:
        for _ in "qv":
            a, b = nn.Linear(192, 3, bias=False), nn.Linear(3, 192, bias=False)
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            samed.append((a.weight, torch.zeros_like(b.weight)))
    ours, theirs = sam.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    names = lora_names(sam)
    assert len(names) == 48
    for i, (a, b) in enumerate(samed):
        assert torch.equal(ours[names[f"w_a_{i:03d}"]], a) and torch.equal(ours[names[f"w_b_{i:03d}"]], b)

    qkv, x = moved(sam).image_encoder.blocks[7].attn.qkv, torch.randn(2, 4, 4, 192)
    with torch.no_grad():
        expected = F.linear(x, qkv.weight, qkv.bias)
        expected[..., :192] += qkv.linear_b_q(qkv.linear_a_q(x))
        expected[..., -192:] += qkv.linear_b_v(qkv.linear_a_v(x))
        assert torch.equal(qkv(x), expected)


@every_variant
def test_birth_is_identity(sam, images, options):
    with torch.no_grad():
        before = sam(images)
        inject_encoder(sam.image_encoder, options)
        assert torch.equal(sam.eval()(images), before)


@every_variant
def test_merging_preserves_and_unmerging_restores(sam, images, options):
    with torch.no_grad():
        before = sam(images)
        inject_encoder(sam.image_encoder, options)
        weights = {n: p.clone() for n, p in moved(sam).eval().state_dict().items()}
        after = sam(images)
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(merge(sam)(images), after, atol=1e-5, rtol=1e-5)
        assert any(not torch.equal(p, weights[n]) for n, p in sam.state_dict().items())
        unmerge(sam)
        assert all(torch.equal(p, weights[n]) for n, p in sam.state_dict().items())
        assert torch.equal(sam(images), after)


@every_variant
def test_exactly_the_named_parameters_learn(sam, images, options):
    own = set(dict(sam.named_parameters()))
    inject_encoder(sam.image_encoder, options)
    added = set(dict(sam.named_parameters())) - own
    assert added == set(lora_names(sam).values())
    train_only(moved(sam).train(), added)
    sam(images).square().sum().backward()
    touched = {n for n, p in sam.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == added


@every_variant
def test_files_hold_it_all_and_nothing_else(sam, images, tmp_path, options):
    base = {n: t.clone() for n, t in sam.state_dict().items()}
    first = LoRA_sam(sam, options)
    expected = moved(first.sam).eval()(images)
    first.save_lora_parameters(tmp_path / "lora.safetensors")
    assert read_tensors(tmp_path / "lora.safetensors")[0].keys() == lora_names(sam).keys()
    fresh = build_sam("vit_ti", 64)
    fresh.load_state_dict(base)
    second = LoRA_sam(fresh, options)
    second.load_lora_parameters(tmp_path / "lora.safetensors")
    assert torch.equal(second.eval()(images), expected)
    if options != VARIANTS["plain"]:
        other = LoRA_sam(build_sam("vit_ti", 64), 6)
        with pytest.raises(InputError, match="does not fit"):
            other.load_lora_parameters(tmp_path / "lora.safetensors")


def test_names_say_what_they_are(sam):
    inject_encoder(sam.image_encoder, LoRAOptions(2, dora=True, targets=TARGETS), [4, 9])
    names, prefix = lora_names(sam), "image_encoder.blocks.9"
    assert names["w_a_002"] == f"{prefix}.attn.qkv.linear_a_q.weight"
    assert names["w_b_003"] == f"{prefix}.attn.qkv.linear_b_v.weight"
    others = {n for n in names if not n.startswith("w_")}
    assert all(names[n] == n for n in others)
    own = {n.removeprefix(f"{prefix}.") for n in others if n.startswith(prefix)}
    assert own == {
        *(f"attn.qkv.{n}" for n in ("linear_a_k.weight", "linear_b_k.weight")),
        *(f"attn.qkv.magnitude_{n}" for n in "qkv"),
        *(
            f"{place}.{n}"
            for place in ("attn.proj", "mlp.lin1", "mlp.lin2")
            for n in ("linear_a.weight", "linear_b.weight", "magnitude")
        ),
    }


def test_scales():
    assert LoRAOptions(4).scale(4) == 1
    assert LoRAOptions(4, alpha=16).scale(4) == 4
    assert LoRAOptions(4, alpha=16).scale(8) == 2
    assert LoRAOptions(4, alpha=16, rslora=True).scale(4) == 8


def test_alpha_equal_to_rank_is_the_plain_one(sam, images):
    base = {n: t.clone() for n, t in sam.state_dict().items()}
    outputs = []
    for options in (LoRAOptions(8), LoRAOptions(8, alpha=8), LoRAOptions(8, alpha=math.sqrt(8), rslora=True)):
        model = build_sam("vit_ti", 64).eval()
        model.load_state_dict(base)
        torch.manual_seed(3)
        inject_encoder(model.image_encoder, options)
        with torch.no_grad():
            outputs.append(moved(model)(images))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_the_scale_multiplies_the_product():
    linear, a, b, x = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False), torch.randn(3, 6)
    layer = LoRA_linear(linear, a, b, LoRAOptions(2, alpha=6))
    torch.testing.assert_close(layer(x), linear(x) + 3 * b(a(x)))


def test_each_block_has_its_rank(sam):
    inject_encoder(sam.image_encoder, LoRAOptions(2, alpha=4, ranks={3: 8}), [1, 3])
    ranks = {i: sam.image_encoder.blocks[i].attn.qkv for i in (1, 3)}
    assert [(m.linear_a_q.out_features, m.linear_b_v.in_features) for m in ranks.values()] == [(2, 2), (8, 8)]
    assert [m.scales for m in ranks.values()] == [{"_q": 2.0, "_v": 2.0}, {"_q": 0.5, "_v": 0.5}]


def test_options_have_one_form():
    """However they come, from YAML or from a file's description, equal options compare equal."""
    assert LoRAOptions(targets=["v", "q", "v"], ranks=[[9, 2], [3, 4]]) == LoRAOptions(ranks={3: 4, 9: 2})
    assert hash(LoRAOptions(targets=["v", "q"])) == hash(LoRAOptions())


def test_dropout_is_of_the_input_while_training_only():
    torch.manual_seed(0)
    linear, a, b = nn.Linear(64, 5), nn.Linear(64, 64, bias=False), nn.Linear(64, 5, bias=False)
    nn.init.eye_(a.weight)
    layer, x = LoRA_linear(linear, a, b, LoRAOptions(64, dropout=0.25)), torch.randn(1000, 64)
    hidden = []
    a.register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), linear(x) + b(x))
        torch.testing.assert_close(hidden.pop(), x)
        layer.train()(x)
    kept = hidden[0] != 0
    assert 0.72 < kept.float().mean() < 0.78
    torch.testing.assert_close(hidden[0][kept], x[kept] / 0.75)


class TestDoRA:
    @pytest.fixture
    def layer(self) -> LoRA_linear:
        torch.manual_seed(0)
        pair = nn.Linear(12, 3, bias=False), nn.Linear(3, 8, bias=False)
        layer = LoRA_linear(nn.Linear(12, 8), *pair, LoRAOptions(3, alpha=6, dora=True))
        nn.init.uniform_(layer.magnitude, 0.5, 2)
        return layer

    def test_it_computes_what_the_paper_says(self, layer):
        """Equation 5: W' = m (W + B A) / |W + B A|, lengths taken per output."""
        x = torch.randn(4, 12)
        turned = layer.weight + 2 * layer.linear_b.weight @ layer.linear_a.weight
        weight = layer.magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))

    def test_gradients_see_the_length_as_a_constant(self, layer):
        """Section 4.3. With the length detached, everything else is differentiated in full."""
        x, ours = torch.randn(4, 12), (layer.linear_a.weight, layer.linear_b.weight, layer.magnitude)
        found = torch.autograd.grad(layer(x).square().sum(), ours)
        turned = layer.weight + 2 * layer.linear_b.weight @ layer.linear_a.weight
        weight = layer.magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True).detach()
        expected = torch.autograd.grad(F.linear(x, weight, layer.bias).square().sum(), ours)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other)

    def test_magnitudes_begin_as_the_lengths_of_the_base(self, sam):
        rows = sam.image_encoder.blocks[2].attn.qkv.weight.detach().clone().norm(dim=1)
        inject_encoder(sam.image_encoder, LoRAOptions(2, dora=True))
        qkv = sam.image_encoder.blocks[2].attn.qkv
        torch.testing.assert_close(torch.cat([qkv.magnitude_q, qkv.magnitude_v]), torch.cat([rows[:192], rows[384:]]))
        assert not hasattr(qkv, "magnitude_k")

    def test_without_bias_and_with_rows_of_zeros(self):
        linear = nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            linear.weight[1] = 0
        x, pair = torch.randn(3, 6), (nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False))
        nn.init.zeros_(pair[1].weight)
        layer = LoRA_linear(linear, *pair, LoRAOptions(2, dora=True))
        assert torch.equal(layer(x), linear(x))
        layer(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())

    def test_padding_stays_the_bias(self):
        """The encoder fills padded windows with the bias: it must be what a zero token gives."""
        torch.manual_seed(0)
        pairs = [m for _ in range(3) for m in (nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))]
        layer = LoRA_qkv(nn.Linear(8, 24), *pairs, LoRAOptions(2, dora=True))
        for name in "qkv":
            nn.init.uniform_(getattr(layer, f"magnitude_{name}"), 0.5, 2)
        torch.testing.assert_close(layer(torch.zeros(1, 8))[0], layer.bias)

    def test_half_precision_stays_near(self, sam, images):
        inject_encoder(sam.image_encoder, LoRAOptions(4, dora=True, targets=TARGETS))
        moved(sam)
        with torch.no_grad():
            exact = sam.image_encoder(images)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = sam.image_encoder(images).float()
        assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_lora_plus_gives_every_b_its_own_rate(sam):
    inject_encoder(sam.image_encoder, LoRAOptions(2, dora=True, targets=("q", "proj")))
    names = set(lora_names(sam).values()) | {"mask_decoder.mask_tokens.weight"}
    train_only(sam, names)
    groups = lora_plus_groups(sam, 0.01, 16)
    by_id = {id(p): n for n, p in sam.named_parameters()}
    found = [{by_id[id(p)] for p in group["params"]} for group in groups]
    assert sum(map(len, found)) == len(names) and set.union(*found) == names
    for group, members in zip(groups, found):
        assert {"linear_b" in n for n in members} == {group["lr_ratio"] == 16}
        assert group["lr"] == 0.01 * group["lr_ratio"]
        assert {"magnitude" in n for n in members} == {group.get("weight_decay") == 0}
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert [g["lr_ratio"] for g in optimizer.state_dict()["param_groups"]] == [1, 16, 1]


@pytest.mark.parametrize(
    "given, plain",
    [
        ({"ranks": {0: 8}}, {"ranks": [[0, 8]]}),
        ({"ranks": {"3": 4, "0": 8}}, {"ranks": [[0, 8], [3, 4]]}),
        ({"ranks": ((1, 2),)}, {"ranks": [[1, 2]]}),
        ({"targets": "proj"}, {"targets": ["proj"]}),
        ({"targets": ("v", "q")}, {"targets": ["q", "v"]}),
        ({"alpha": "1e1", "dropout": 0}, {"alpha": 10.0, "dropout": 0}),
    ],
)
def test_options_of_a_system_have_one_plain_form(given, plain):
    """What JSON gives back is what went in, so that an adapter's options equal those of its YAML."""
    options = system_options("samed", given)
    assert {name: options[name] for name in plain} == plain
    assert json.loads(json.dumps(options)) == options and system_options("samed", options) == options


def test_an_adapter_can_be_continued_with_the_yaml_that_made_it(tmp_path):
    models = [build_model("samed", "random:1", "vit_ti", 64, 2, options={"ranks": {0: 8}}) for _ in range(2)]
    save_adapter(models[0], tmp_path / "a.safetensors")
    start_from(models[1], str(tmp_path / "a.safetensors"))
    assert load_model(tmp_path / "a.safetensors").spec == models[0].spec


@pytest.mark.parametrize(
    "system, given",
    [
        *(("samed", {"alpha": value}) for value in ("abc", "8", 0, -1, math.inf, math.nan, True, [4])),
        *(("samed", {name: value}) for name in ("dora", "rslora") for value in ("false", "true", 1, None)),
        *(("samed", {"dropout": value}) for value in (1, -0.1, "0.5", None, True)),
        *(("samed", {"targets": value}) for value in (None, [], "o", ["q", "o"], 3, {"q": 1}, [["q"]])),
        *(
            ("samed", {"ranks": value})
            for value in (None, 8, [3, 8], [[3]], [[3, 0]], [[-1, 4]], [[3, 4.0]], [["3", 4]])
        ),
        *(("samed", {"ranks": value}) for value in ([[3, 4], [3, 8]], {"a": 8}, {0: "8"}, {1.5: 2}, "3: 8")),
        *(("msa", {"depth": value}) for value in ("2", 2.5, 1, -2, None, True)),
        *(("msa", {"ratio": value}) for value in (0, "0.25", None, math.inf)),
        *(("msa", {"scale": value}) for value in ("x", None, math.nan, True)),
        *(("samus", {name: value}) for name in ("cnn", "adapters") for value in ("false", 0, None)),
        *(("sam_prompt", {"freeze": value}) for value in (None, "encoder", 3, ["image_encoder", 3])),
    ],
)
def test_options_of_another_type_or_out_of_range_are_one_line(system, given):
    ((name, value),) = given.items()
    with pytest.raises(InputError) as error:
        system_options(system, given)
    said = str(error.value)
    assert said.startswith(f"the option {name}=") and ": give " in said and "\n" not in said


def test_one_part_can_be_named_to_freeze():
    assert system_options("sam_prompt", {"freeze": "prompt_encoder"}) == {"freeze": ["prompt_encoder"]}
    assert LoRAOptions(targets="proj").targets == ("proj",)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda sam: LoRAOptions(0), "rank 0"),
        (lambda sam: LoRAOptions(4, ranks={2: 0}), "rank 0 of block 2"),
        (lambda sam: LoRAOptions(4, targets=("q", "o")), "['o']"),
        (lambda sam: LoRAOptions(4, targets=()), "q, k, v, proj, lin1, lin2"),
        (lambda sam: LoRAOptions(4, alpha=0), "alpha 0"),
        (lambda sam: LoRAOptions(4, rslora=True), "give alpha"),
        (lambda sam: LoRAOptions(4, dropout=1), "dropout 1"),
        (lambda sam: inject_encoder(sam.image_encoder, LoRAOptions(4, ranks={5: 2}), [1, 2]), "block 5"),
        (lambda sam: lora_plus_groups(sam, 0.1, 16), "trains none"),
        (lambda sam: lora_plus_groups(sam, 0.1, 0), "ratio 0"),
    ],
)
def test_errors(sam, call, words):
    with pytest.raises(InputError) as error:
        call(sam)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_not_twice_whatever_the_targets(sam):
    inject_encoder(sam.image_encoder, LoRAOptions(2, targets=("proj",)), [0])
    with pytest.raises(InputError, match="already"):
        inject_encoder(sam.image_encoder, 4)
    assert inject_encoder(sam.image_encoder, 4, [1]) == [1]
