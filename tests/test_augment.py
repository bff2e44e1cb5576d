"""Resizing and augmentation against scipy.ndimage, which SAMed uses."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from samlora.data.augment import (
    SAMPLERS,
    Transform,
    nearest_index,
    resize_image,
    resize_label,
    sample_flips,
    sample_transform,
    zoom_matrix,
)
from samlora.data.batch import make_batch, transformed
from samlora.training.config import TrainConfig

SIZES = [
    (224, 512),
    (512, 224),
    (101, 256),
    (64, 64),
    (33, 20),
    (256, 56),
]  # 512 -> 224 ends in a row of zeros


@pytest.mark.parametrize("source, target", SIZES)
def test_resizing_is_scipys_zoom(source, target):
    rng = np.random.default_rng(0)
    other = source // 2 + 3
    image = rng.random((2, source, other), dtype=np.float32)
    label = rng.integers(0, 9, image.shape).astype(np.uint8)
    factors = (target / source, target / other)
    for i in range(2):
        expected = ndimage.zoom(image[i], factors, order=3)
        np.testing.assert_allclose(resize_image(image, (target, target))[i], expected, atol=1e-6)
        assert np.array_equal(
            resize_label(label, (target, target))[i], ndimage.zoom(label[i], factors, order=0)
        )


def test_cached_tables_cannot_be_changed():
    for table in (zoom_matrix(8, 4), nearest_index(8, 4)):
        with pytest.raises(ValueError):
            table[0] = 5


TRANSFORMS = [
    Transform(),
    *(Transform(k, axis) for k in range(4) for axis in (0, 1)),
    *(Transform(angle=a) for a in (-20, -7, 3, 19)),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("shape", [(40, 40), (51, 30)])
def test_a_batch_is_what_samed_makes_sample_by_sample(transform, shape):
    side = 64
    rng = np.random.default_rng(1)
    image, label = rng.random(shape, dtype=np.float32), rng.integers(0, 9, shape).astype(np.uint8)
    images, targets = make_batch(
        [torch.from_numpy(image)], [torch.from_numpy(label)], [transform], side, "cpu"
    )

    if transform.angle:
        image, label = (ndimage.rotate(x, transform.angle, order=0, reshape=False) for x in (image, label))
    else:
        image, label = (np.rot90(x, transform.quarter_turns) for x in (image, label))
        if transform.flip_axis is not None:
            image, label = (np.flip(x, transform.flip_axis) for x in (image, label))
    factors = side / image.shape[0], side / image.shape[1]
    expected = ndimage.zoom(image, factors, order=3)
    low = ndimage.zoom(ndimage.zoom(label, factors, order=0), 0.25, order=0)
    assert images.shape == (1, 3, side, side) and targets.dtype == torch.int64
    for channel in images[0]:
        np.testing.assert_allclose(channel.numpy(), expected, atol=2e-6)
    assert np.array_equal(targets[0].numpy(), low)


def test_samples_of_different_sizes_make_one_batch():
    shapes = [(20, 30), (64, 64), (41, 17)]
    images = [torch.rand(s) for s in shapes]
    labels = [torch.ones(s, dtype=torch.uint8) for s in shapes]
    batch, targets = make_batch(images, labels, [Transform()] * 3, 32, "cpu")
    assert batch.shape == (3, 3, 32, 32) and targets.shape == (3, 8, 8)


def test_flips_are_of_each_axis_by_itself():
    transforms = [sample_flips(np.random.default_rng(i)) for i in range(2000)]
    image = torch.arange(6.0).view(2, 3)
    flipped = [transformed(image, transform) for transform in transforms]
    for axes in ((), (0,), (1,), (0, 1)):
        share = np.mean([torch.equal(one, image.flip(axes)) for one in flipped])
        assert abs(share - 1 / 4) < 0.04, axes
    assert set(SAMPLERS) == set(TrainConfig.__dataclass_fields__["augment"].metadata["choices"])


def test_the_shares_are_samed():
    transforms = [sample_transform(np.random.default_rng(i)) for i in range(4000)]
    turned = sum(t.flip_axis is not None for t in transforms) / 4000
    plain = sum(t == Transform() for t in transforms) / 4000
    angles = [t.angle for t in transforms if t.angle]
    assert abs(turned - 1 / 2) < 0.03 and abs(plain - 1 / 4) < 0.03
    assert min(angles) == -20 and max(angles) == 19
    assert {t.quarter_turns for t in transforms} == {0, 1, 2, 3}
