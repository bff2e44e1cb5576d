"""Label maps made clean: what each step does, and what none may do."""

import time

import numpy as np
import pytest

from samlora.errors import InputError
from samlora.inference.postprocess import Postprocess

SPACING = (2.5, 0.7, 0.8)
STEPS = ["largest", "drop=20", "fill", "close=2", "smooth=1"]


def run(words, labels, spacing=SPACING, **kwargs):
    return Postprocess.parse(words.split())(labels, spacing, **kwargs)


def blobs(seed, shape=(9, 24, 26), classes=3):
    """A label map with specks, holes and neighbours: the largest of smoothed noises, labels 1, 3, 5, ..."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).normal(size=(classes + 1, *shape))
    return (np.stack([gaussian_filter(x, 1) for x in noise]).argmax(0) * 2 - 1).clip(0).astype(np.uint8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("words", [*STEPS, " ".join(STEPS)])
def test_laws_of_every_step(words, seed):
    labels = blobs(seed)
    before = labels.copy()
    out = run(words, labels)
    np.testing.assert_array_equal(labels, before)
    assert out.dtype == labels.dtype and out.shape == labels.shape
    assert set(np.unique(out)) <= {0, 1, 3, 5} and (out != labels).any()
    assert not run(words, np.zeros_like(labels)).any()
    if words in ("largest", "drop=20", "fill"):
        np.testing.assert_array_equal(run(words, out), out)
    if words in ("fill", "close=2"):  # they change background alone
        np.testing.assert_array_equal(out[labels > 0], labels[labels > 0])
    treated = run(f"{words} labels=3,7", labels)
    others = np.isin(labels, (1, 5))
    np.testing.assert_array_equal(treated[others], labels[others])
    assert set(np.unique(treated[~others])) <= {0, 3}


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_the_order_of_axes_does_not_matter(axes):
    labels = blobs(0)
    turned = run(" ".join(STEPS), labels.transpose(axes), np.take(SPACING, axes), slice_axis=axes.index(0))
    np.testing.assert_array_equal(turned, run(" ".join(STEPS), labels).transpose(axes))


def test_largest_and_drop_count_volumes():
    labels = np.zeros((4, 12, 12), np.uint16)
    labels[:, 1:4, 1:4] = 300  # 36 voxels
    labels[0, 8:10, 8:10] = 300  # 4
    labels[1, 10, 10] = 300  # joined to them by a corner only
    labels[3, 6, 6] = 2
    assert (run("largest", labels) == 300).sum() == 36 and run("largest", labels)[3, 6, 6] == 2
    assert (run("drop=4", labels, None) == 300).sum() == 40 and not (run("drop=4", labels, None) == 2).any()
    voxel = np.prod(SPACING)
    assert (run(f"drop={4 * voxel}", labels) == 300).sum() == 40
    assert (run(f"drop={4.1 * voxel}", labels) == 300).sum() == 36


def test_fill_takes_enclosed_background_alone():
    labels = np.zeros((5, 9, 9), np.uint8)
    labels[:, 1:8, 1:8] = 1
    labels[:, 3:6, 3:6] = 0  # a canal: enclosed in every slice, open at its ends
    labels[2, 3:6, 3:6] = 2
    labels[2, 4, 4] = 0  # enclosed by both: the inner one gets it
    out = run("fill", labels)
    assert out[2, 4, 4] == 2 and (out[2, 3:6, 3:6] == 2).all()
    assert (out[[0, 1, 3, 4], 1:8, 1:8] == 1).all() and not out[:, 0].any()
    assert (run("fill", labels, slice_axis=1)[0] == labels[0]).all()  # across the canal it is open


def test_close_is_a_ball_in_millimetres():
    labels = np.zeros((21, 21, 21), np.uint8)
    labels[:, :, :8] = 1
    labels[:, :, 12:] = 1  # a crack of 4 voxels of 0.8 mm, 3.2 mm
    crack = labels[10, 10, 8:12]
    assert not run("close=1.5", labels)[10, 10, 8:12].any() and not crack.any()
    assert (run("close=2.5", labels)[4:17, 5:16] == 1).all()
    cut = np.moveaxis(labels, 2, 0)  # the same crack across slices of 2.5 mm is 10 mm wide
    assert not run("close=2.5", cut)[8:12].any() and run("close=5.1", cut)[8:12, 9:12, 9:12].all()
    labels[10, 10, 9] = 2
    assert run("close=3", labels)[10, 10, 9] == 2


@pytest.mark.parametrize("radius", [0.7, 0.8, 2.1, 2.5, 5.0])
def test_close_equals_the_definition(radius):
    from scipy.ndimage import binary_closing

    reach = [int(radius / s + 1e-6) for s in SPACING]
    grid = np.ogrid[tuple(slice(-n, n + 1) for n in reach)]
    ball = sum((g * s) ** 2 for g, s in zip(grid, SPACING)) <= (radius * (1 + 1e-6)) ** 2
    mask = blobs(4, classes=1) > 0
    pad = [(2 * n + 1,) * 2 for n in reach]
    wanted = binary_closing(np.pad(mask, pad), ball)[tuple(slice(p, -p) for p, _ in pad)]
    np.testing.assert_array_equal(run(f"close={radius}", mask.astype(np.uint8)), wanted)


def test_smooth_keeps_plane_borders_and_neighbours():
    labels = np.zeros((8, 20, 20), np.uint8)
    labels[:, 4:10], labels[:, 10:16] = 1, 2
    np.testing.assert_array_equal(run("smooth=1", labels), labels)
    rough = labels.copy()
    rough[3, 9, 5] = 2  # a dent at the border of the two
    rough[3, 4, 5] = 0  # and one at the background
    out = run("smooth=1", rough)
    np.testing.assert_array_equal(out, labels)
    junction = np.zeros((1, 21, 21), np.uint8)  # three classes of 120 degrees: no hole where they meet
    y, x = np.mgrid[-10:11, -10:11]
    junction[0] = (np.arctan2(y, x) + np.pi) // (2 * np.pi / 3) % 3 + 1
    assert run("smooth=2", junction, None).all()


def test_smooth_makes_a_rough_ball_rounder():
    z, y, x = np.mgrid[-12:13, -20:21, -20:21]
    ball = (z * 2.0) ** 2 + y**2 + x**2 < 15**2
    rng = np.random.default_rng(0)
    rough = ball ^ (rng.random(ball.shape) < 0.1)
    out = run("largest smooth=1.5", rough.astype(np.uint8), (2, 1, 1)) > 0
    assert (out ^ ball).sum() < 0.1 * (rough ^ ball).sum()


def test_words_and_steps_are_the_same_thing():
    words = ["smooth=1.5", "fill", "labels=3,1", "largest", "close=2", "drop=500"]
    steps = Postprocess.parse(words)
    assert steps == Postprocess(True, 500.0, True, 2.0, 1.5, (1, 3))
    assert str(steps) == "largest drop=500 fill close=2 smooth=1.5 labels=1,3"
    assert Postprocess.parse(str(steps).split()) == steps
    assert str(Postprocess()) == "" and Postprocess.parse([]) == Postprocess()
    labels = blobs(1)
    np.testing.assert_array_equal(Postprocess()(labels, None), labels)


@pytest.mark.parametrize(
    "words, named",
    [
        ("clean", "--postprocess clean: there is no such step"),
        ("drop", "--postprocess drop: there is no such step"),
        ("largest=2", "--postprocess largest=2"),
        ("drop=-3", "drop needs a volume in mm3 above 0"),
        ("close=wide", "close needs a radius"),
        ("smooth=inf", "smooth needs a standard deviation"),
        ("labels=0 fill", "numbers of classes from 1 on"),
        ("labels=liver fill", "labels=liver"),
        ("labels=1", "nothing to do"),
        ("fill fill", "twice"),
    ],
)
def test_errors(words, named):
    with pytest.raises(InputError, match=r"^--postprocess [^\n]*$") as error:
        Postprocess.parse(words.split())
    assert named in str(error.value)


@pytest.mark.parametrize("labels", [np.zeros((3, 3), int), np.zeros((3, 3, 3))])
def test_other_arrays_are_refused(labels):
    with pytest.raises(ValueError, match="3D integers"):
        Postprocess(fill=True)(labels, None)


@pytest.mark.slow
def test_a_whole_scan_takes_seconds():
    labels = np.zeros((148, 512, 512), np.uint8)
    z, y, x = np.ogrid[:148, :512, :512]
    for n in range(8):
        labels[((z - 74) / 60) ** 2 + ((y - 256) / 110) ** 2 + ((x - 50 * n - 60) / 50) ** 2 < 1] = n + 1
    labels[np.random.default_rng(0).random(labels.shape) < 1e-5] = 3
    began = time.process_time()
    run(" ".join(STEPS), labels, (2.5, 0.75, 0.75))
    assert time.process_time() - began < 30
