"""The measures are SAMed's and MedPy's, to the last digits, and say NaN where nothing is defined."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from medpy.metric import binary as medpy

from samlora.errors import InputError
from samlora.evaluation.bootstrap import mean_intervals, overall_interval
from samlora.evaluation.metrics import (
    DISTANCES,
    METRICS,
    OVERLAP,
    SurfaceDistances,
    evaluate,
    evaluate_case,
    summarise,
    surface_distances,
)

GOLDEN = Path(__file__).parent / "golden"
MEDPY = {
    "hd95": medpy.hd95, "hd": medpy.hd, "asd": medpy.asd, "assd": medpy.assd, "dice": medpy.dc,
    "iou": medpy.jc, "precision": medpy.precision, "recall": medpy.recall, "specificity": medpy.specificity,
}  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    """(inputs module, reference arrays)."""
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDEN / "inputs.py")
    inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inputs)
    with np.load(GOLDEN / "samed_reference.npz", allow_pickle=False) as reference:
        yield inputs, {name: reference[name] for name in reference.files if name.startswith("metric_")}


@pytest.mark.parametrize("index", range(6))
def test_golden_pairs_in_samed_convention(golden, index):
    inputs, reference = golden
    prediction, truth = inputs.metric_masks(reference, index)
    values = evaluate(prediction, truth, inputs.METRIC_SPACING, labels=[1], policy="samed")[1]
    assert list(values) == ["dice", "hd95"]
    np.testing.assert_allclose(list(values.values()), reference["metric_samed"][index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", range(4))
def test_golden_pairs_in_mm(golden, index):
    inputs, reference = golden
    values = evaluate(*inputs.metric_masks(reference, index), inputs.METRIC_SPACING)[1]
    ours = [values[name] for name in MEDPY]
    np.testing.assert_allclose(ours, reference[f"metric_{index}_spaced"], rtol=0, atol=1e-6)


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Two masks of one kind out of noise, blobs, boxes up to the edge and single voxels, 2D or 3D."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 24, size=rng.integers(2, 4)))

    def mask() -> np.ndarray:
        kind = rng.integers(4)
        mask = np.zeros(shape, dtype=bool)
        if kind == 0:
            mask = rng.random(shape) < rng.choice([0.02, 0.3, 0.9])
        elif kind == 1:
            corner = [sorted(rng.integers(0, n + 1, size=2)) for n in shape]
            mask[tuple(slice(*ends) for ends in corner)] = True
        elif kind == 2:
            centre, radius = rng.random(len(shape)) * shape, rng.uniform(1, 12, len(shape))
            grid = np.indices(shape).T
            mask = ((((grid - centre) / radius) ** 2).sum(-1) <= 1).T
        mask[tuple(rng.integers(0, shape))] = True
        return mask

    return mask(), mask(), tuple(float(step) for step in rng.uniform(0.3, 5, len(shape)).round(2))


@pytest.mark.parametrize("block", range(10))
def test_random_masks_equal_medpy(block):
    """600 pairs: noise, blobs, boxes that touch the edges, single voxels, with spacings of 0.3 to 5 mm."""
    for seed in range(60 * block, 60 * block + 60):
        prediction, truth, spacing = random_pair(seed)
        values = evaluate(prediction, truth, spacing)[1]
        assert tuple(values) == METRICS
        for name, function in MEDPY.items():
            if name == "specificity" and truth.all():
                assert math.isnan(values[name]), "without a negative voxel there is no specificity"
                continue
            theirs = function(prediction, truth, **({"voxelspacing": spacing} if name in DISTANCES else {}))
            assert values[name] == pytest.approx(theirs, rel=0, abs=1e-9), (seed, name)
        assert values["accuracy"] == pytest.approx((prediction == truth).mean())
        assert values["volume_error_percent"] == pytest.approx(100 * medpy.ravd(prediction, truth))
        assert values["recall"] == medpy.sensitivity(prediction, truth) == medpy.true_positive_rate(prediction, truth)
        assert values["precision"] == medpy.positive_predictive_value(prediction, truth)
        published = evaluate(prediction, truth, spacing, policy="samed")[1]
        assert published["hd95"] == pytest.approx(medpy.hd95(prediction, truth), rel=0, abs=1e-9)


def test_both_ways_to_the_distances_agree(monkeypatch):
    from samlora.evaluation import metrics

    for seed in range(40):
        pair = random_pair(seed)
        readings = []
        for voxels_per_query in (0, math.inf):  # always the KD-tree, always the distance transform
            monkeypatch.setattr(metrics, "_VOXELS_PER_QUERY", voxels_per_query)
            distances = surface_distances(*pair)
            readings.append((distances.to_reference, distances.to_prediction))
        for tree, transform in zip(*readings, strict=True):
            np.testing.assert_allclose(tree, transform, rtol=0, atol=1e-9)


def test_an_empty_mask_is_worst_where_medpy_gives_up():
    """MedPy raises for distances, and MONAI says inf or NaN, when one mask is empty."""
    for seed in range(40):
        mask, _, spacing = random_pair(seed)
        empty = np.zeros_like(mask)
        for pair in ((mask, empty), (empty, mask)):
            with pytest.raises(RuntimeError):
                medpy.hd95(*pair)
            values = evaluate(*pair, spacing)[1]
            assert values["hd95"] == values["hd"] == pytest.approx(np.linalg.norm(np.multiply(mask.shape, spacing)))
            assert {values[name] for name in ("dice", "iou", "precision", "recall", "nsd")} == {0}
            assert values["dice"] == medpy.dc(*pair) and values["iou"] == medpy.jc(*pair)


def larger_percentile(distances: SurfaceDistances, percent: float) -> float:
    """HD95 as MONAI takes it: the larger of the two directions' percentiles. Ours pools the directions."""
    return max(np.percentile(each, percent) for each in (distances.to_reference, distances.to_prediction))


def test_surface_measures_equal_monai():
    torch = pytest.importorskip("torch")
    from monai.metrics import (
        compute_average_surface_distance,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    differ = 0
    for seed in range(200):
        prediction, truth, spacing = random_pair(seed)
        batch = [torch.from_numpy(mask[None, None]) for mask in (prediction, truth)]
        values = evaluate(prediction, truth, spacing, tolerance_mm=0, tolerances_mm=(1.0, 2.75))[1]
        given = {"include_background": True, "spacing": spacing}
        for key, tolerance in (("nsd", 0.0), ("nsd_1mm", 1.0), ("nsd_2.75mm", 2.75)):
            theirs = compute_surface_dice(*batch, [tolerance], **given)
            assert values[key] == pytest.approx(float(theirs), abs=1e-6), (seed, tolerance)
        hd, hd95 = (compute_hausdorff_distance(*batch, percentile=p, **given) for p in (None, 95))
        asd, assd = (compute_average_surface_distance(*batch, symmetric=both, **given) for both in (False, True))
        for key, theirs in (("hd", hd), ("asd", asd), ("assd", assd)):
            assert values[key] == pytest.approx(float(theirs), abs=1e-4), (seed, key)
        distances = surface_distances(prediction, truth, spacing)
        assert larger_percentile(distances, 95) == pytest.approx(float(hd95), abs=1e-4), seed
        differ += abs(values["hd95"] - float(hd95)) > 1e-3
    assert differ > 100, "the two definitions of HD95 are not the same, as docs/metrics.md says"


def test_surface_distance_of_deepmind_is_the_same_up_to_a_voxel():
    """Their surface lies on the corners between voxels, half a diagonal from ours, and is weighted by area."""
    theirs = pytest.importorskip("surface_distance")
    for seed in range(150):
        prediction, truth, spacing = random_pair(seed)
        distances = theirs.compute_surface_distances(truth, prediction, spacing)
        ours = surface_distances(prediction, truth, spacing)
        diagonal = np.linalg.norm(spacing)
        assert abs(ours.hd() - theirs.compute_robust_hausdorff(distances, 100)) <= diagonal + 1e-6, seed
        # The same readings of the same distances, area left out: so areas are all that differs.
        same = {"distances_pred_to_gt": np.sort(ours.to_reference), "distances_gt_to_pred": np.sort(ours.to_prediction)}
        same |= {
            "surfel_areas_pred": np.ones(ours.to_reference.size),
            "surfel_areas_gt": np.ones(ours.to_prediction.size),
        }
        assert theirs.compute_robust_hausdorff(same, 100) == ours.hd()
        for tolerance in (0.5, 2.0):
            assert theirs.compute_surface_dice_at_tolerance(same, tolerance) == pytest.approx(ours.nsd(tolerance))
        both = np.sort(ours.to_reference), np.sort(ours.to_prediction)
        ranked = [each[min(len(each) - 1, math.ceil(round(0.95 * len(each), 9)) - 1)] for each in both]
        assert theirs.compute_robust_hausdorff(same, 95) == max(ranked)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.8, 0.8)])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_shifted_boxes_are_the_same_for_all(spacing, steps):
    """Boxes moved along an axis: every definition of a surface agrees on the extremes."""
    theirs = pytest.importorskip("surface_distance")
    truth = np.zeros((20, 24, 24), dtype=bool)
    truth[5:12, 6:15, 6:15] = True
    prediction = np.roll(truth, steps, axis=0)
    distances = theirs.compute_surface_distances(truth, prediction, spacing)
    values = evaluate(prediction, truth, spacing, tolerance_mm=steps * spacing[0])[1]
    assert values["hd"] == pytest.approx(theirs.compute_robust_hausdorff(distances, 100)) == steps * spacing[0]
    assert values["nsd"] == theirs.compute_surface_dice_at_tolerance(distances, steps * spacing[0] + 1e-9) == 1


def test_surface_dice_does_not_hang_on_rounding():
    prediction, truth = np.zeros((2, 1, 9), dtype=bool)
    prediction[0, 0] = truth[0, 3] = True
    assert 3 * 0.1 > 0.3
    assert evaluate(prediction, truth, (1, 0.1), tolerance_mm=0.3)[1]["nsd"] == 1
    assert evaluate(prediction, truth, (1, float(np.float32(0.1))), tolerance_mm=0.3)[1]["nsd"] == 1
    assert evaluate(prediction, truth, (1, 0.1), tolerance_mm=0.29)[1]["nsd"] == 0


NOTHING = np.zeros((4, 5, 6), dtype=np.uint8)
SOMETHING = NOTHING.copy()
SOMETHING[1:3, 1:3, 1:3] = 2
DIAGONAL = math.sqrt((4 * 3) ** 2 + 5**2 + 6**2)


@pytest.mark.parametrize(
    ("prediction", "truth", "samed", "overlap", "distance"),
    [
        (SOMETHING, SOMETHING, (1, 0), 1, 0),
        (SOMETHING, NOTHING, (1, 0), 0, DIAGONAL),
        (NOTHING, SOMETHING, (0, 0), 0, DIAGONAL),
        (NOTHING, NOTHING, (0, 0), math.nan, math.nan),
    ],
    ids=["both", "prediction only", "reference only", "neither"],
)
def test_present_or_absent(prediction, truth, samed, overlap, distance):
    published = evaluate(prediction, truth, (3, 1, 1), labels=[2], policy="samed")
    assert published == {2: {"dice": samed[0], "hd95": samed[1]}}

    values = evaluate(prediction, truth, (3, 1, 1), labels=[2])[2]
    for name in ("dice", "iou", "precision", "recall", "nsd"):
        assert values[name] == pytest.approx(overlap, nan_ok=True), name
    for name in DISTANCES:
        assert values[name] == pytest.approx(distance, nan_ok=True), name
    wrong, false_alarms = (prediction != truth).sum(), ((prediction > 0) & (truth == 0)).sum()
    assert values["accuracy"] == pytest.approx(1 - wrong / 120)
    assert values["specificity"] == pytest.approx(1 - false_alarms / (truth == 0).sum())
    assert values["volume_ml"] == pytest.approx((prediction > 0).sum() * 0.003)
    assert values["volume_error_ml"] == pytest.approx(values["volume_ml"] - values["reference_ml"])


def test_more_tolerances_read_the_same_distances():
    rng = np.random.default_rng(5)
    pair = rng.random((2, 9, 9, 9)) < 0.3
    values = evaluate(*pair, (2, 1, 1), tolerances_mm=(0.5, 1, 3))[1]
    assert list(values) == [*METRICS[:11], "nsd_0.5mm", "nsd_1mm", "nsd_3mm", *METRICS[11:]]
    for tolerance in (0.5, 1, 3):
        alone = evaluate(*pair, (2, 1, 1), tolerance_mm=tolerance)[1]["nsd"]
        assert values[f"nsd_{tolerance:g}mm"] == alone
    absent = evaluate(NOTHING, SOMETHING, (1, 1, 1), tolerances_mm=(1,))[2]
    assert absent["nsd_1mm"] == 0


def test_a_picture_is_measured_by_its_outline():
    """As one slice of a volume each of its pixels has a face outside, and every pixel would be surface."""
    rng = np.random.default_rng(2)
    prediction, truth = (rng.random((2, 30, 40)) < 0.7).astype(np.uint8)
    flat = evaluate(prediction, truth, (0.5, 0.7))[1]
    for axis in range(3):
        stack = [np.expand_dims(array, axis) for array in (prediction, truth)]
        spacing = np.insert([0.5, 0.7], axis, 4.0)
        values = evaluate_case(*stack, tuple(spacing))
        for name in (*OVERLAP, *DISTANCES, "nsd", "volume_error_percent"):
            assert values["strict"][1][name] == flat[name], name
        assert values["strict"][1]["volume_ml"] == pytest.approx(prediction.sum() * 0.5 * 0.7 * 4 / 1000)
        assert values["samed"] == evaluate(prediction, truth, (1, 1), policy="samed")
        assert evaluate(*stack, spacing)[1]["hd95"] != flat["hd95"]


def test_without_millimetres_pixels_count():
    rng = np.random.default_rng(3)
    prediction, truth = (rng.random((2, 1, 30, 40)) < 0.1).astype(np.uint8)
    values = evaluate_case(prediction, truth, None, tolerances=(2, 1))["strict"][1]
    pixels = evaluate(prediction[0], truth[0], (1, 1), tolerances_mm=(1,))[1]
    assert values["hd95"] == pixels["hd95"] and values["nsd_1px"] == pixels["nsd_1mm"] and "nsd_1mm" not in values
    assert all(math.isnan(values[name]) for name in ("volume_ml", "reference_ml", "volume_error_ml"))
    assert values["volume_error_percent"] == pixels["volume_error_percent"]


def test_case_is_every_policy():
    rng = np.random.default_rng(4)
    pair, spacing = rng.integers(0, 3, (2, 6, 7, 8)), (3, 1, 1)
    values = evaluate_case(*pair, spacing, [1, 2, 9], tolerances=(1.0,))
    assert values["strict"] == {
        label: pytest.approx(entry, nan_ok=True)
        for label, entry in evaluate(*pair, spacing, [1, 2, 9], tolerance_mm=1.0).items()
    }
    assert values["samed"] == evaluate(*pair, spacing, [1, 2, 9], policy="samed")
    with pytest.raises(InputError, match="shape"):
        evaluate_case(pair[0], pair[1][1:], spacing)


def test_label_maps_equal_masks_label_by_label():
    rng = np.random.default_rng(1)
    prediction, truth = rng.integers(0, 4, (2, 7, 11, 13))
    prediction[prediction == 3] = 300
    spacing = (2.5, 0.7, 0.9)
    values = evaluate(prediction, truth.astype(">i2"), spacing)
    assert list(values) == [1, 2, 3, 300]
    for label, entry in values.items():
        assert entry == evaluate(prediction == label, truth == label, spacing)[1]
    assert evaluate(prediction, truth, spacing, labels=(2,)) == {2: values[2]}
    fortran = evaluate(np.asfortranarray(prediction), truth, spacing)
    assert fortran == values


def test_area_is_no_volume_and_masks_are_label_one():
    values = evaluate(NOTHING[0] > 0, NOTHING[0] > 0, (1, 1))
    assert list(values) == [1] and math.isnan(values[1]["volume_ml"]) and math.isnan(values[1]["dice"])


def test_measures_are_plain_floats():
    for policy in ("strict", "samed"):
        entry = evaluate(SOMETHING, SOMETHING, (3, 1, 1), policy=policy)[2]
        assert {type(value) for value in entry.values()} == {float}


def test_summary_leaves_undefined_values_out_and_counts_them():
    nan = math.nan
    cases = {
        "a": {1: {"dice": 0.5, "hd95": 2.0}, 2: {"dice": nan, "hd95": nan}},
        "b": {1: {"dice": 0.7, "hd95": 4.0}, 2: {"dice": 0.2, "hd95": 9.0}},
        "c": {1: {"dice": 0.9, "hd95": 6.0}},
    }
    summary = summarise(cases)
    assert summary["n_cases"] == 3
    figures = {"mean": 0.7, "sd": 0.2, "median": 0.7, "ci_low": 0.5, "ci_high": 0.9, "n": 3, "n_excluded": 0}
    assert summary["classes"][1]["dice"] == pytest.approx(figures)
    lone = summary["classes"][2]["hd95"]
    assert (lone["mean"], lone["n"], lone["n_excluded"]) == (9.0, 1, 2) and math.isnan(lone["sd"])
    overall = summary["overall"]["dice"]
    assert (overall["n"], overall["n_excluded"]) == (4, 2)
    assert overall["mean"] == pytest.approx((0.7 + 0.2) / 2)
    assert overall["sd"] == pytest.approx(np.std([0.5, 0.45, 0.9], ddof=1))


def test_bootstrap_is_the_percentile_interval():
    """scipy's, but for its random draws; the same numbers every time; NaN left out; nothing from one value."""
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)
    values = np.column_stack([rng.normal(0.8, 0.1, 25), rng.exponential(5, 25), np.full(25, 0.1), rng.random(25)])
    values[4:, 3] = math.nan
    low, high = mean_intervals(values)
    for column in range(4):
        kept = values[~np.isnan(values[:, column]), column]
        assert low[column] <= kept.mean() + 1e-15 and kept.mean() - 1e-15 <= high[column]
        if np.ptp(kept):
            theirs = bootstrap((kept,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
            width = theirs.high - theirs.low
            assert (low[column], high[column]) == pytest.approx(tuple(theirs), abs=0.05 * width)
    assert low[2] == high[2] == 0.1
    np.testing.assert_array_equal(mean_intervals(values), (low, high))
    np.testing.assert_array_equal(mean_intervals(values[:, 3:]), ([low[3]], [high[3]]))
    assert np.isnan(mean_intervals(values[:1])).all() and mean_intervals(values[:0]).shape == (2, 4)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    """95 % in the limit; a little less from 40 cases. Too narrow or too wide intervals fail."""
    draws = np.random.default_rng(7).normal(0.8, 0.05, (40, 2000))
    low, high = mean_intervals(draws)
    assert 0.92 < np.mean((low <= 0.8) & (0.8 <= high)) < 0.96


def test_overall_interval_draws_cases_with_all_their_classes():
    rng = np.random.default_rng(1)
    values = rng.random((12, 3))
    whole_cases = overall_interval(values)
    np.testing.assert_allclose(whole_cases, mean_intervals(values.mean(axis=1)[:, None])[:, 0], atol=1e-12)
    values[:5, 1] = math.nan
    low, high = overall_interval(values)
    assert low < np.nanmean(values, axis=0).mean() < high
    assert np.isnan(overall_interval(values[:1])).all() and np.isnan(overall_interval(np.full((3, 2), math.nan))).all()


def test_summary_without_exclusions_is_the_published_mean():
    values = np.random.default_rng(0).random((5, 8))
    cases = {
        str(case): {label: {"dice": dice} for label, dice in enumerate(row, start=1)} for case, row in enumerate(values)
    }
    assert summarise(cases)["overall"]["dice"]["mean"] == pytest.approx(values.mean(axis=1).mean())


def test_summary_of_nothing_is_undefined():
    assert summarise({}) == {"n_cases": 0, "classes": {}, "overall": {}}
    absent = summarise({"a": evaluate(NOTHING, NOTHING, (1, 1, 1), labels=[1])})
    for name in (*OVERLAP[:4], *DISTANCES, "nsd"):
        assert math.isnan(absent["overall"][name]["mean"]) and absent["overall"][name]["n_excluded"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt": NOTHING[1:]}, "shape"),
        ({"pred": NOTHING.astype(np.float32)}, "float32"),
        ({"pred": np.full((4, 5, 6), None)}, "object"),
        ({"pred": NOTHING.astype(np.int8) - 1}, "-1"),
        ({"gt": NOTHING.astype(np.int64) + 70000}, "70000"),
        ({"pred": NOTHING[:0], "gt": NOTHING[:0]}, "no voxels"),
        ({"pred": NOTHING[None], "gt": NOTHING[None]}, "4 dimensions"),
        ({"spacing": (1, 1)}, "spacing"),
        ({"spacing": (1, 0, 1)}, "spacing"),
        ({"spacing": (1, math.nan, 1)}, "spacing"),
        ({"labels": [0]}, "label 0"),
        ({"labels": [1.5]}, "label 1.5"),
        ({"policy": "lenient"}, "lenient"),
        ({"tolerance_mm": -1}, "tolerance_mm"),
        ({"tolerances_mm": (1, math.inf)}, "tolerance_mm"),
    ],
)
def test_unusable_input_is_one_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        evaluate(**{"pred": NOTHING, "gt": NOTHING, "spacing": (1, 1, 1), **change})
    assert "\n" not in str(caught.value)


def test_surface_distances_need_two_surfaces():
    with pytest.raises(InputError, match="empty"):
        surface_distances(SOMETHING, NOTHING, (1, 1, 1))


def test_distances_can_be_left_out():
    rng = np.random.default_rng(3)
    pred, gt = (rng.integers(0, 3, (6, 7, 8)) for _ in range(2))
    full, quick = (evaluate(pred, gt, (3, 1, 1), [1, 2, 5], distances=flag) for flag in (True, False))
    surface = {"hd", "hd95", "asd", "assd", "nsd"}
    for label in full:
        assert quick[label].keys() == full[label].keys() - surface
        for name, value in quick[label].items():
            np.testing.assert_equal(value, full[label][name])


def test_benchmark_asserts_equal_values(monkeypatch):
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # scripts import their neighbours
    spec = importlib.util.spec_from_file_location("bench", folder / "metrics.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    result = bench.whole_volume((24, 48, 48), 1)
    assert len(result["hd95"]["organs"]) == 8 and len(result["dice_and_hd95_as_samed"]["organs"]) == 4
    pair = bench.draw((24, 48, 48), bench.SPACING)
    with pytest.raises(AssertionError):
        bench.compare(lambda p, r: 1.0, lambda p, r: 1.0 + 1e-6, pair, 1, 1)
