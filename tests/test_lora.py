"""Laws of the adapters."""

import pytest
import torch
from segment_anything import sam_model_registry
from torch import nn

import samlora
from samlora.errors import InputError
from samlora.model.checkpoint import adapter_tensors
from samlora.model.lora import LoRA_qkv, LoRA_sam, inject_encoder
from samlora.model.methods import SYSTEMS, trained_names
from samlora.model.sam import Prompts, build_sam
from samlora.model.tensors import read_tensors


def linear(i: int, o: int) -> nn.Linear:
    return nn.Linear(i, o, bias=False)


def tiny(system: str = "samed", **options):
    with pytest.warns(UserWarning, match="random weights"):
        return samlora.build_model(
            system, base=None, variant="vit_ti", **{"image_size": 64, "num_classes": 3, **options}
        )


def moved(model: nn.Module) -> nn.Module:
    """A model whose trained parts are not at their starting point."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_qkv_computes_what_it_says():
    qkv, parts = nn.Linear(8, 24), (linear(8, 2), linear(2, 8), linear(8, 2), linear(2, 8))
    x = torch.randn(2, 3, 3, 8)
    expected = qkv(x).clone()
    expected[..., :8] += parts[1](parts[0](x))
    expected[..., -8:] += parts[3](parts[2](x))
    torch.testing.assert_close(LoRA_qkv(qkv, *parts)(x), expected)


def test_birth_is_identity():
    sam = build_sam("vit_ti", 64)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = sam(x)
        # Not to the bit: on some CPUs matrix products depend on where the tensors lie in memory.
        torch.testing.assert_close(LoRA_sam(sam, 4)(x), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("system", ["samed", "samed_s"])
def test_merging_preserves_and_unmerging_restores(system):
    model = moved(tiny(system))
    x = torch.rand(2, 3, 64, 64)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(samlora.merge(model)(x), before, atol=1e-5, rtol=1e-5)
        assert any(not torch.equal(p, weights[n]) for n, p in model.state_dict().items())
        samlora.unmerge(model)
        assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("system", sorted(n for n, row in SYSTEMS.items() if not row.network and row.insert is None))
def test_exactly_what_the_row_names_receives_gradients(system):
    model = moved(tiny(system))
    prompts = Prompts(boxes=torch.tensor([[4.0, 4, 40, 40]])) if SYSTEMS[system].promptable else None
    answer = model(torch.rand(1, 3, 64, 64), prompts, details=True)
    used = [answer.classes, answer.masks, answer.iou if SYSTEMS[system].objective.endswith("_iou") else None]
    total = sum(tensor[:, :1].square().sum() if tensor is answer.masks else tensor.square().sum() for tensor in used if tensor is not None)
    if trained_names(model, system):
        total.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == trained_names(model, system)


def test_base_keys_stay():
    plain = build_sam("vit_ti", 64)
    keys = set(plain.state_dict())
    LoRA_sam(plain, 2)
    missing = plain.load_state_dict(build_sam("vit_ti", 64).state_dict(), strict=False)
    assert not missing.unexpected_keys and keys <= set(plain.state_dict())


def test_chosen_layers_only():
    model = tiny(lora_layers=[3, 10])
    adapted = [i for i, b in enumerate(model.image_encoder.blocks) if isinstance(b.attn.qkv, LoRA_qkv)]
    assert adapted == [3, 10] == list(model.spec.lora_layers)
    assert {n for n in adapter_tensors(model) if n.startswith("w_")} == {
        f"w_{f}_{i:03d}" for f in "ab" for i in range(4)
    }


def test_lora_sam_works_on_a_stock_model(tmp_path):
    """Other pipelines hand in the model of the segment_anything package."""
    with torch.device("meta"):
        stock = sam_model_registry["vit_b"]()
    lora = LoRA_sam(stock.to_empty(device="cpu"), 2)
    block = lora.sam.image_encoder.blocks[0]
    assert block.attn(torch.zeros(1, 14, 14, 768)).shape == (1, 14, 14, 768)
    lora.save_lora_parameters(tmp_path / "lora.safetensors")
    tensors, _ = read_tensors(tmp_path / "lora.safetensors")
    assert len(tensors) == 48 and tensors["w_a_000"].shape == (2, 768) and tensors["w_b_023"].shape == (768, 2)


@pytest.mark.real
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_real_adapters_load(real_data, tmp_path, rank):
    path = real_data / "lora_weights" / f"lora_rank{rank}.safetensors"
    tensors, _ = read_tensors(path)
    lora = LoRA_sam(build_sam("vit_b", 64), rank)
    lora.load_lora_parameters(path)
    assert torch.equal(lora.sam.image_encoder.blocks[11].attn.qkv.linear_b_v.weight, tensors["w_b_023"])
    lora.save_lora_parameters(tmp_path / "again.safetensors")
    again, _ = read_tensors(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], tensors[n]) for n in tensors)
    with pytest.raises(InputError, match="w_a_000.*shape"):
        LoRA_sam(build_sam("vit_b", 64), rank + 1).load_lora_parameters(path)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: inject_encoder(build_sam("vit_ti", 64).image_encoder, 0), "rank 0"),
        (lambda: inject_encoder(build_sam("vit_ti", 64).image_encoder, 4, [12]), "0 to 11"),
        (lambda: inject_encoder(build_sam("vit_ti", 64).image_encoder, 4, [3, 0, 3]), "[0, 3, 3] name block 3 more"),
        (lambda: LoRA_sam(LoRA_sam(build_sam("vit_ti", 64), 2).sam, 2), "already"),
        (lambda: LoRA_sam(build_sam("vit_ti", 64), 2).save_lora_parameters("lora.pth"), ".safetensors"),
        (lambda: samlora.build_model("samedx"), "samedx"),
        (lambda: samlora.build_model("samed", num_classes=0), "num_classes 0"),
        (lambda: samlora.build_model("samed", num_classes=2, class_names=["liver"]), "1 class names"),
    ],
)
def test_errors(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
