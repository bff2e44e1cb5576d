"""Images of two, four or more channels: the stem belongs to the adapter."""

import numpy as np
import pytest
import torch

import samlora
from samlora.errors import InputError
from samlora.model.checkpoint import adapter_tensors, read_adapter
from samlora.model.stem import InputStem


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_the_stem_begins_as_means_of_channels(channels):
    stem = InputStem(channels)
    images = torch.rand(2, channels, 5, 6)
    shown = [[n % channels for n in range(max(3, channels)) if n % 3 == out] for out in range(3)]
    expected = torch.stack([images[:, chosen].mean(dim=1) for chosen in shown], dim=1)
    torch.testing.assert_close(stem(images), expected)


@pytest.fixture(scope="module")
def model():
    return samlora.build_model(variant="vit_ti", image_size=64, num_classes=2, in_channels=4)


def test_it_trains_is_saved_and_comes_back(model, tmp_path):
    assert {"input_stem.weight", "input_stem.bias"} <= adapter_tensors(model).keys()
    with torch.no_grad():
        model.input_stem.weight.add_(0.1 * torch.randn(3, 4, 1, 1))
    path = tmp_path / "adapter.safetensors"
    samlora.save_adapter(model, path)
    images = torch.rand(1, 4, 64, 64)
    with torch.no_grad():
        assert torch.equal(samlora.load_model(path)(images), model.eval()(images))
    assert read_adapter(path)[1].in_channels == 4


def test_images_of_other_channels_are_named(model):
    with pytest.raises(InputError, match=r"batch, 4, 64, 64"):
        model(torch.rand(1, 3, 64, 64))
    with pytest.raises(InputError, match="in_channels 0"):
        samlora.build_model(variant="vit_ti", image_size=64, in_channels=0)


def test_adapters_of_the_first_format_have_three_channels(model, tmp_path):
    import json
    from dataclasses import asdict

    from safetensors.torch import load_file, save_file

    three = samlora.build_model(variant="vit_ti", image_size=64, num_classes=2)
    samlora.save_adapter(three, tmp_path / "new.safetensors")
    description = asdict(read_adapter(tmp_path / "new.safetensors")[1])
    for later in ("in_channels", "pixels", "base_pixels"):
        del description[later]
    metadata = {"samlora": json.dumps(description | {"format_version": 1})}
    save_file(load_file(tmp_path / "new.safetensors"), tmp_path / "old.safetensors", metadata)
    assert read_adapter(tmp_path / "old.safetensors")[1].in_channels == 3
    images = torch.from_numpy(np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32))
    with torch.no_grad():
        assert torch.equal(samlora.load_model(tmp_path / "old.safetensors")(images), three.eval()(images))
