"""An image in the model's square: SAM's way against segment_anything, SAMed's against make_batch and predict_slices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn

from samlora.data.augment import Transform, resize_image, resize_label
from samlora.data.batch import make_batch
from samlora.data.frame import Frame, bilinear_matrix
from samlora.data.prompts import tight_box
from samlora.inference.slices import predict_slices
from samlora.pixels import LITE_MEDSAM, SAM, SAMED

SHAPES = [(37, 90), (90, 37), (64, 64), (200, 131), (150, 260)]


@pytest.mark.parametrize("shape", SHAPES)
def test_padded_pictures_points_and_boxes_are_sams(shape):
    rng, frame, sam = np.random.default_rng(0), Frame(*shape, 128, pixels=SAM), ResizeLongestSide(128)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    wanted = sam.apply_image(image)
    assert frame.size == wanted.shape[:2]
    square = frame.image(image, fill=(0.25, 0.5, 0.75))
    assert square.shape == (3, 128, 128) and square.dtype == np.float32
    assert np.array_equal(np.rint(square[:, : frame.size[0], : frame.size[1]] * 255), np.moveaxis(wanted, -1, 0))
    for channel, value in zip(square, (0.25, 0.5, 0.75)):
        assert (channel[frame.size[0] :] == value).all() and (channel[:, frame.size[1] :] == value).all()
    points, boxes = rng.random((7, 2)) * shape[::-1], rng.random((3, 4)) * (*shape[::-1], *shape[::-1])
    np.testing.assert_allclose(frame.points(points), sam.apply_coords(points, shape), rtol=1e-6)
    np.testing.assert_allclose(frame.boxes(boxes), sam.apply_boxes(boxes, shape), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_padded_floats_are_scaled_with_antialiasing(shape):
    image, frame = np.random.default_rng(1).random(shape).astype(np.float32), Frame(*shape, 128, pixels=SAM)
    wanted = F.interpolate(torch.from_numpy(image)[None, None], frame.size, mode="bilinear", antialias=True)[0, 0]
    square = frame.image(image, fill=0.5)
    np.testing.assert_allclose(square[1, : frame.size[0], : frame.size[1]], wanted, atol=1e-5)
    assert np.array_equal(square[0], square[2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("through", [None, 48])
def test_stretched_images_and_labels_are_those_of_training(shape, through):
    rng, frame = np.random.default_rng(2), Frame(*shape, 64, through=through)
    image, label = rng.random(shape).astype(np.float32), rng.integers(0, 9, shape).astype(np.uint8)
    stored = (image, label) if through is None else (
        resize_image(image, (through, through)), resize_label(label, (through, through))
    )  # fmt: skip
    images, labels = make_batch(*([torch.from_numpy(x)] for x in stored), [Transform()], 64, "cpu")
    np.testing.assert_allclose(frame.image(image), images[0], atol=1e-5)
    assert np.array_equal(frame.label(label), labels[0])


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape, pad):
    rng, frame = np.random.default_rng(3), Frame(*shape, 128, pixels=SAM if pad else SAMED)
    points, boxes = rng.random((9, 2)) * shape[::-1], rng.random((2, 5, 4)) * (*shape[::-1], *shape[::-1])
    np.testing.assert_allclose(frame.points_back(frame.points(points)), points, rtol=1e-5)
    np.testing.assert_allclose(frame.boxes_back(frame.boxes(boxes)), boxes, rtol=1e-5)
    assert (frame.points(points) <= frame.size[::-1]).all()


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_come_back_as_sams_do(shape, pad):
    """Against two interpolations one after the other, as Sam.postprocess_masks does it."""
    frame, low = Frame(*shape, 128, pixels=SAM if pad else SAMED), torch.randn(2, 3, 32, 32) * 5
    wanted = F.interpolate(low, (128, 128), mode="bilinear", align_corners=False)
    wanted = wanted[..., : frame.size[0], : frame.size[1]]
    wanted = F.interpolate(wanted, shape, mode="bilinear", align_corners=False)
    torch.testing.assert_close(frame.logits(low), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_blob_lies_where_it_was(shape, pad):
    """Label -> target -> logits -> label: the same ellipse, up to a rim of about a target's pixel."""
    rows, cols = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    mask = ((rows - 0.45) / 0.25) ** 2 + ((cols - 0.55) / 0.3) ** 2 < 1
    frame = Frame(*shape, 256, pixels=SAM if pad else SAMED)
    target = torch.from_numpy(frame.label(mask)).float() * 20 - 10
    back = frame.logits(target).numpy() > 0
    assert 2 * (mask & back).sum() / (mask.sum() + back.sum()) > 0.96
    centre = np.argwhere(mask).mean(axis=0)[::-1]
    x, y = frame.points(centre)
    assert frame.label(mask)[int(y) // 4, int(x) // 4]


def test_the_padding_is_outside():
    frame = Frame(50, 100, 64, pixels=SAM)
    target = frame.label(np.ones((50, 100), np.uint8), fill=255)
    assert frame.size == (32, 64)
    assert (target[:8] == 1).all() and (target[8:] == 255).all() and np.array_equal(frame.inside, target == 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("through", [None, 48])
def test_classes_are_those_of_predict_slices(shape, through):
    class Fixed(nn.Module):
        pixels, fill, logit_side = SAMED, (0, 0, 0), 16

        def forward(self, images):
            return F.avg_pool2d(images, 4) * torch.tensor([1.0, 1.3, -2.0])[:, None, None]

    image = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    wanted = predict_slices(Fixed(), image[None], 64, through)[0]
    frame = Frame(*shape, 64, through=through)
    logits = Fixed()(torch.from_numpy(frame.image(image))[None])
    assert (frame.classes(logits)[0].numpy() == wanted).mean() > 0.9999


def test_padded_classes_follow_the_logits():
    frame, logits = Frame(37, 90, 64, pixels=SAM), torch.randn(5, 16, 16)
    assert torch.equal(frame.classes(logits), frame.logits(logits).argmax(dim=0))


def test_weights_of_a_pixel_sum_to_one():
    for source, target in ((7, 20), (20, 7), (16, 64)):
        for antialias in (False, True):
            np.testing.assert_allclose(bilinear_matrix(source, target, antialias).sum(axis=1), 1, rtol=1e-12)


def test_eight_bit_and_float_agree():
    image = np.random.default_rng(5).integers(0, 256, (90, 37), np.uint8)
    for pad in (False, True):
        frame = Frame(90, 37, 64, pixels=SAM if pad else SAMED)
        tolerance = 1 / 255 if pad else 1e-6  # Pillow rounds, once along each axis
        np.testing.assert_allclose(frame.image(image), frame.image(image / np.float32(255)), atol=tolerance)


@pytest.mark.parametrize("shape, pixels", [((60, 100), LITE_MEDSAM), ((60, 100), SAMED), ((300, 512), LITE_MEDSAM)])
def test_a_box_of_whole_pixels_is_the_box_of_the_resized_mask(shape, pixels):
    """MedSAM and LiteMedSAM take the box of the mask as it lies in the model's square."""
    frame = Frame(*shape, 256, pixels, low=256)
    mask = np.zeros(shape, np.uint8)
    mask[11:40, 23:71] = 1
    found = frame.boxes(frame.whole_pixels(tight_box(mask)))
    wanted = tight_box(frame.label(mask))
    assert np.abs(found - wanted).max() <= 1
    if max(shape) > 256:
        assert np.array_equal(frame.whole_pixels(tight_box(mask)), tight_box(mask))
