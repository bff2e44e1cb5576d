"""Laws of the networks to compare with."""

import pytest
import torch
from torch import nn

from samlora.errors import InputError
from samlora.inference.slices import predict_slices
from samlora.model import baselines
from samlora.model.baselines import BASELINES, Baseline, build_baseline, volume_logits
from samlora.model.lora import lora_names

SLICES = sorted(name for name, row in BASELINES.items() if not row.volumetric)


@pytest.fixture(scope="module")
def built() -> dict[str, Baseline]:
    pytest.importorskip("einops")
    torch.manual_seed(0)
    return {name: build_baseline(name, 64, 3) for name in BASELINES}


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_logits_have_the_size_of_the_image_and_every_parameter_learns(built, name):
    model = built[name].train()
    images = torch.rand(1 if model.volumetric else 2, *model.input_shape)
    logits = model(images)
    assert logits.shape == (len(images), 3, *images.shape[2:]) and model.logit_stride == 1
    logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert torch.equal(model.eval()(images, prompts=object()), model(images))


@pytest.mark.parametrize("name", SLICES)
def test_the_seed_decides_the_weights(built, name):
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_baseline(name, 64, 3).state_dict()

    one, same, other = state(1), state(1), state(2)
    assert one.keys() == built[name].state_dict().keys()
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", ["unet", "attention_unet", "segresnet", "swin_unetr"])
def test_weights_of_these_do_not_depend_on_the_image_size(built, name):
    larger = build_baseline(name, 128, 3)
    larger.load_state_dict(built[name].state_dict())
    assert larger.eval()(torch.rand(1, 3, 128, 128)).shape == (1, 3, 128, 128)


def test_the_unet_has_nnunets_widths():
    with torch.device("meta"):
        widths = {p.shape[0] for p in build_baseline("unet", 64, 3).parameters() if p.ndim == 4}
    assert max(widths) == 512 and min(widths - {3}) == 32


def test_they_predict_slices_as_sam_does(built):
    model = built["segresnet"].eval()
    stack = torch.rand(3, 64, 64)
    with torch.no_grad():
        expected = model(stack[:, None].expand(-1, 3, -1, -1)).argmax(dim=1)
    assert torch.equal(torch.from_numpy(predict_slices(model, stack.numpy(), 64, batch_size=2)).long(), expected)


def test_they_carry_no_lora(built):
    assert lora_names(built["segresnet"]) == {}


def test_a_volume_of_one_patch_is_one_forward_pass(built):
    model = built["vnet"].eval()
    volume = torch.rand(1, 1, *model.roi)
    with torch.no_grad():
        torch.testing.assert_close(volume_logits(model, volume), model(volume), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(20, 70, 33), (45, 64, 150)])
def test_patches_come_together_where_they_were(built, size):
    """What looks at single voxels gives the same by patches, at any size, padded or not."""
    model = build_baseline("vnet", 64, 3).eval()
    model.network = nn.Conv3d(1, 3, 1)
    volume = torch.rand(2, 1, *size)
    with torch.no_grad():
        torch.testing.assert_close(volume_logits(model, volume, batch_size=3), model.network(volume))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: build_baseline("resnet", 64, 3), "resnet"),
        (lambda: build_baseline("unet", 100, 3), "try 96"),
        (lambda: build_baseline("unet", 32, 3), "try 64"),
        (lambda: build_baseline("unet", 64, 3, 0), "0 channels"),
        (lambda: build_baseline("vnet", 64, 3, 3), "1, 2, 4, 8 or 16"),
        (lambda: build_baseline("segresnet", 64, 3)(torch.rand(1, 3, 32, 32)), "(batch, 3, 64, 64)"),
        (lambda: volume_logits(build_baseline("vnet", 64, 3), torch.rand(1, 2, 8, 8, 8)), "(batch, 1, depth"),
        (lambda: volume_logits(build_baseline("vnet", 64, 3), torch.rand(1, 1, 8, 8, 8), overlap=1), "overlap 1"),
    ],
)
def test_errors(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"einops.*samlora\[baselines\]"):
        build_baseline("unetr", 64, 3)
