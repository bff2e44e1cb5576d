"""Volumes to labels, against the published way: one slice at a time with scipy.ndimage.zoom."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from torch import nn

from samlora.errors import InputError
from samlora.inference.ensemble import FLIPS, Averaged
from samlora.inference.slices import predict_slices
from samlora.model.sam import build_sam
from samlora.pixels import SAMED


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_sam("vit_ti", 64, 4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    return model.eval()


def published(model, image, side, input_size):
    labels = np.zeros(image.shape, np.uint8)
    for i, plane in enumerate(image):
        height, width = plane.shape
        if input_size is not None:
            plane = zoom(plane, (input_size / height, input_size / width), order=3)
        plane = zoom(plane, (side / plane.shape[0], side / plane.shape[1]), order=3)
        with torch.no_grad():
            logits = model(torch.from_numpy(plane).expand(1, 3, -1, -1))
        masks = nn.functional.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
        found = masks.softmax(dim=1).argmax(dim=1)[0].numpy()
        labels[i] = zoom(found, (height / side, width / side), order=0)
    return labels


@pytest.mark.parametrize("shape", [(3, 64, 64), (5, 40, 57), (2, 101, 122)])
@pytest.mark.parametrize("input_size", [None, 28])
def test_equals_the_published_way(model, shape, input_size):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    expected = published(model, image, 64, input_size)
    found = predict_slices(model, image, 64, input_size, batch_size=2)
    assert found.shape == shape and found.dtype == np.uint8 and len(np.unique(expected)) > 1
    assert (found == expected).mean() >= 0.999


def test_batches_do_not_matter_and_progress_is_told(model):
    image = np.random.default_rng(1).random((5, 30, 30), dtype=np.float32)
    done = []
    whole = predict_slices(model, image, 64, batch_size=5)
    assert np.array_equal(whole, predict_slices(model, image, 64, batch_size=2, progress=done.append))
    assert done == [2, 2, 1]


class Constant(nn.Module):
    """Always the last class."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.pixels, self.fill, self.logit_side = SAMED, (0, 0, 0), 16

    def forward(self, images):
        logits = torch.zeros(len(images), self.classes, 16, 16)
        logits[:, -1] = 1
        return logits


@pytest.mark.parametrize("classes, dtype", [(2, np.uint8), (256, np.uint8), (300, np.uint16)])
def test_labels_fit_their_type(classes, dtype):
    found = predict_slices(Constant(classes), np.zeros((1, 32, 32), np.float32), 64)
    assert found.dtype == dtype and (found == classes - 1).all()


def test_autocast_is_really_on(model):
    seen = []
    hook = model.image_encoder.blocks[0].mlp.lin1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    predict_slices(model, np.zeros((1, 8, 8), np.float32), 64, precision=torch.bfloat16)
    predict_slices(model, np.zeros((1, 8, 8), np.float32), 64)
    hook.remove()
    assert seen == [torch.bfloat16, torch.float32]


def test_neighbours_become_the_channels(model):
    image = np.random.default_rng(2).random((4, 30, 30), dtype=np.float32)
    stacked = np.stack([image[[0, 0, 1, 2]], image, image[[1, 2, 3, 3]]], axis=-1)
    found = predict_slices(model, image, 64, batch_size=3, with_neighbours=True)
    assert np.array_equal(found, predict_slices(model, stacked, 64, batch_size=2))
    assert not np.array_equal(found, predict_slices(model, image, 64))


SAID = {"system": "samed", "class_names": ("a", "b"), "image_size": 64, "in_channels": 3, "recipe": None}


class Said(nn.Module):
    """A model that answers with its images; its spec is that of an adapter."""

    pixels, fill, logit_side = SAMED, (0, 0, 0), 64

    def __init__(self, **changes):
        super().__init__()
        self.spec = SimpleNamespace(**(SAID | changes))

    def forward(self, images):
        return images * torch.tensor([1.0, 2.0, -1.0])[:, None, None]


def test_the_mean_of_flips_turns_with_the_slice(model):
    model.spec = Said().spec
    averaged = Averaged([model], flips=True).eval()
    images = torch.rand(2, 3, 64, 64)
    for axes in FLIPS:
        torch.testing.assert_close(averaged(images.flip(axes)), averaged(images).flip(axes), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(averaged(images), model(images).log_softmax(1), atol=1e-3)


def test_the_mean_of_one_model_with_itself_is_that_model():
    images = torch.rand(2, 3, 8, 8)
    mean = Averaged([Said(), Said()], flips=False)(images)
    torch.testing.assert_close(mean, Said()(images).log_softmax(dim=1))


class Coarse(Said):
    """The same in pixels four times as wide, as SAM's logits are beside a U-Net's."""

    def forward(self, images):
        return nn.functional.avg_pool2d(super().forward(images), 4)


@pytest.mark.parametrize("turned", [False, True])
def test_systems_with_logits_of_other_sizes_are_averaged_at_the_finer(turned):
    images = torch.rand(2, 3, 64, 64)
    models = [Coarse(), Said()][:: -1 if turned else 1]
    mean = Averaged(models, flips=True)(images)
    wide = nn.functional.interpolate(Coarse()(images), 64, mode="bilinear")
    expected = (wide.softmax(1) + Said()(images).softmax(1)) / 2
    torch.testing.assert_close(mean.exp(), expected)


def test_volumes_and_slices_are_not_averaged():
    volumes = Said(system="vnet")
    volumes.volumetric = True
    for models in ([volumes, Said()], [Said(), volumes]):
        with pytest.raises(InputError, match="vnet, which takes patches of volumes, of another samed") as refused:
            Averaged(models, flips=False)
        assert "\n" not in str(refused.value)


def test_adapters_that_were_trained_otherwise_are_not_averaged():
    with pytest.raises(InputError, match="class_names"):
        Averaged([Said(), Said(class_names=("b", "a"))], flips=False)
