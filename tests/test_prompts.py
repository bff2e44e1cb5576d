"""Laws of prompts that are drawn from masks."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from samlora.data.prompts import (
    STRATEGIES,
    central_point,
    distant_points,
    full_box,
    jittered_box,
    next_click,
    objects,
    random_points,
    sample_points,
    tight_box,
    uncertain_points,
)
from samlora.errors import InputError


def blobs(seed: int, shape=(40, 56), share: float = 0.2) -> np.ndarray:
    """A mask of a few smooth parts of any form."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3)
    return field > np.quantile(field, 1 - share)


def inside(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    return mask[points[:, 1].astype(int), points[:, 0].astype(int)]


@pytest.mark.parametrize("seed", range(5))
def test_a_tight_box_holds_the_mask_and_no_smaller_one_does(seed):
    mask = blobs(seed)
    x0, y0, x1, y1 = tight_box(mask).astype(int)
    assert mask.sum() == mask[y0 : y1 + 1, x0 : x1 + 1].sum()
    assert mask[y0, :].any() and mask[y1, :].any() and mask[:, x0].any() and mask[:, x1].any()


def test_jitter_moves_outwards_within_bounds_and_reaches_them():
    mask = np.zeros((30, 50), bool)
    mask[8:20, 3:44] = True
    tight = tight_box(mask)
    boxes = np.stack([jittered_box(mask, 5, np.random.default_rng(seed)) for seed in range(200)])
    moved = (tight - boxes) * (1, 1, -1, -1)
    assert (moved.min(axis=0) == 0).all()
    assert moved.max(axis=0).tolist() == [3, 5, 5, 5]  # the image ends 3 px to the left
    assert (jittered_box(mask, 0, np.random.default_rng(0)) == tight).all()
    assert full_box(mask.shape).tolist() == [0, 0, 49, 29]


@pytest.mark.parametrize("seed", range(5))
def test_the_centre_is_in_the_mask_and_nothing_is_deeper(seed):
    mask = blobs(seed)
    mask[:, -1] |= mask[:, -2]  # a part that the image's border cuts
    depth = np.pad(mask, 1)
    depth = distance_transform_edt(depth)[1:-1, 1:-1]
    x, y = central_point(mask).astype(int)
    assert mask[y, x] and depth[y, x] == depth.max()


def test_the_centre_of_a_mask_that_fills_the_image_is_the_image_s():
    assert central_point(np.ones((9, 15), bool))[1] == 4


@pytest.mark.parametrize("seed", range(3))
def test_each_distant_point_is_the_farthest_there_is(seed):
    mask, rng = blobs(seed), np.random.default_rng(seed)
    points = distant_points(mask, 6, rng)
    places = np.argwhere(mask)[:, ::-1]
    for n in range(1, 6):
        nearest = np.linalg.norm(places[:, None] - points[None, :n], axis=2).min(axis=1)
        assert np.linalg.norm(points[n] - points[:n], axis=1).min() == pytest.approx(nearest.max())
    away = distant_points(mask, 1, rng, given=points[:1])
    assert (away[0] == points[1]).all()


def test_entropy_takes_what_is_closest_to_one_half():
    rng = np.random.default_rng(0)
    probability = rng.random((20, 30))
    points = uncertain_points(probability, 7, rng)
    doubt = np.sort(np.abs(probability - 0.5).ravel())
    found = np.abs(probability[points[:, 1].astype(int), points[:, 0].astype(int)] - 0.5)
    np.testing.assert_allclose(np.sort(found), doubt[:7])
    spread = uncertain_points(probability, 7, rng, apart=6)
    assert (spread[0] == points[0]).all()
    gaps = np.linalg.norm(spread[:, None] - spread[None], axis=2)[~np.eye(7, dtype=bool)]
    assert gaps.min() > 6


def test_entropy_s_labels_are_those_of_the_truth():
    mask, rng = blobs(1), np.random.default_rng(1)
    points, labels = sample_points(mask, 5, 4, "entropy", rng, probability=rng.random(mask.shape))
    assert len(points) == 9 and np.array_equal(inside(mask, points), labels == 1) and 0 < labels.sum() < 9


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "entropy"])
def test_positive_points_lie_on_the_mask_negative_ones_beside_it(strategy):
    mask = blobs(2)
    points, labels = sample_points(mask, 4, 3, strategy, np.random.default_rng(0))
    assert labels.tolist() == [1] * 4 + [0] * 3 and points.dtype == np.float32
    assert inside(mask, points[:4]).all() and not inside(mask, points[4:]).any()
    assert len(np.unique(points, axis=0)) == 7


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_seed_decides_everything(strategy):
    mask, probability = blobs(3), np.full((40, 56), 0.5)
    draws = [sample_points(mask, 3, 2, strategy, np.random.default_rng(s), probability)[0] for s in (7, 7, 8)]
    assert np.array_equal(draws[0], draws[1])
    assert strategy == "centre" or not np.array_equal(draws[0], draws[2])  # nothing about the centre is random
    small = np.zeros((40, 56), bool)
    small[15:20, 15:20] = True
    boxes = [jittered_box(small, 9, np.random.default_rng(s)) for s in (7, 7, 8)]
    assert np.array_equal(boxes[0], boxes[1]) and not np.array_equal(boxes[0], boxes[2])


def test_a_small_mask_gives_as_many_points_as_asked():
    mask = np.zeros((5, 6), bool)
    mask[2, 3:5] = True
    points = random_points(mask, 7, np.random.default_rng(0))
    assert points.shape == (7, 2) and inside(mask, points).all()
    assert {tuple(p) for p in random_points(mask, 2, np.random.default_rng(1))} == {(3, 2), (4, 2)}


def test_where_there_is_no_background_there_is_no_negative_point():
    points, labels = sample_points(np.ones((4, 4), bool), 1, 2, "random", np.random.default_rng(0))
    assert labels.tolist() == [1, -1, -1] and points.shape == (3, 2)


def test_objects_are_the_connected_parts():
    label_map = np.zeros((10, 12), np.uint8)
    label_map[1:3, 1:3], label_map[5:9, 1:6], label_map[1:9, 8:11], label_map[0, 11] = 2, 2, 1, 1
    found = objects(label_map, min_pixels=2)
    assert [(value, int(mask.sum())) for value, mask in found] == [(1, 24), (2, 20), (2, 4)]
    assert [value for value, _ in objects(label_map, parts=False)] == [1, 2]
    united = np.zeros((10, 12), np.uint8)
    for value, mask in objects(label_map):
        assert not united[mask].any()
        united[mask] = value
    assert np.array_equal(united, label_map)
    assert objects(np.zeros((3, 3), np.uint8)) == []


@pytest.mark.parametrize("seed", range(4))
def test_every_click_answered_perfectly_reduces_the_error_to_nothing(seed):
    """Whoever answers a click by correcting its connected region is done after as many clicks as there were regions."""
    from scipy.ndimage import label

    truth, prediction = blobs(seed), blobs(seed + 50)
    count = label(truth & ~prediction)[1] + label(prediction & ~truth)[1]
    errors = int((truth ^ prediction).sum())
    for _ in range(count):
        (x, y), positive = next_click(truth, prediction)
        assert (truth & ~prediction if positive else prediction & ~truth)[int(y), int(x)]
        parts, _ = label(truth & ~prediction if positive else prediction & ~truth)
        region = parts == parts[int(y), int(x)]
        for errors_left in (truth & ~prediction, prediction & ~truth):
            assert region.sum() >= np.bincount(label(errors_left)[0].ravel())[1:].max(initial=0)
        prediction = np.where(region, truth, prediction)
        assert (truth ^ prediction).sum() == errors - region.sum()
        errors -= int(region.sum())
    assert errors == 0 and next_click(truth, prediction) is None


def test_no_pixel_is_clicked_twice():
    truth, clicked = np.zeros((9, 9), bool), []
    truth[3:6, 3:6] = True
    for _ in range(9):
        point, _ = next_click(truth, np.zeros_like(truth), clicked)
        clicked.append(point)
    assert clicked[0].tolist() == [4, 4] and len({tuple(p) for p in clicked}) == 9


@pytest.mark.parametrize(
    "call",
    [
        tight_box,
        central_point,
        lambda m: jittered_box(m, 3, np.random.default_rng(0)),
        lambda m: random_points(m, 1, np.random.default_rng(0)),
        lambda m: distant_points(m, 1, np.random.default_rng(0)),
        lambda m: sample_points(m, 1, 1, "entropy", np.random.default_rng(0), np.ones((4, 5))),
    ],
)
def test_an_empty_mask_is_refused(call):
    with pytest.raises(InputError, match="4 x 5"):
        call(np.zeros((4, 5), bool))


def test_an_unknown_strategy_is_refused():
    with pytest.raises(InputError, match="nearest.*random"):
        sample_points(np.ones((4, 5), bool), 1, 0, "nearest", np.random.default_rng(0))


def test_entropy_without_an_answer_is_refused_not_taken_for_random():
    with pytest.raises(InputError, match="entropy.*random, distance, centre"):
        sample_points(blobs(2), 2, 0, "entropy", np.random.default_rng(0))


@pytest.mark.real
def test_points_on_the_scribbles_of_people_lie_in_the_bone(real_data):
    for folder in sorted((real_data / "xray" / "hip").iterdir()):
        scribble, mask = (np.load(folder / name, allow_pickle=False) for name in ("scribble_0.npy", "seg.npy"))
        points = random_points(scribble[0] > 0.5, 300, np.random.default_rng(0))
        assert inside(mask.squeeze() > 0.5, points).mean() >= 0.99, folder.name
