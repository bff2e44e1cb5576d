"""The measures are SAMed's and MedPy's, to the last digits, and say NaN where nothing is defined."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from medpy.metric import binary as medpy

from samlora.errors import InputError
from samlora.evaluation.metrics import (
    DISTANCES,
    METRICS,
    OVERLAP,
    evaluate,
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
    for seed in range(30 * block, 30 * block + 30):
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


def test_surface_dice_equals_monai():
    torch = pytest.importorskip("torch")
    from monai.metrics import compute_surface_dice

    for seed in range(60):
        prediction, truth, spacing = random_pair(seed)
        batch = [torch.from_numpy(mask[None, None]) for mask in (prediction, truth)]
        for tolerance in (0.0, 1.0, 2.75):
            theirs = compute_surface_dice(*batch, [tolerance], include_background=True, spacing=spacing)
            ours = evaluate(prediction, truth, spacing, tolerance_mm=tolerance)[1]["nsd"]
            assert ours == pytest.approx(float(theirs), abs=1e-6), (seed, tolerance)


def test_surface_dice_does_not_hang_on_rounding():
    prediction, truth = np.zeros((2, 1, 9), dtype=bool)
    prediction[0, 0] = truth[0, 3] = True
    assert 3 * 0.1 > 0.3
    assert evaluate(prediction, truth, (1, 0.1), tolerance_mm=0.3)[1]["nsd"] == 1
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
    assert summary["classes"][1]["dice"] == pytest.approx({"mean": 0.7, "sd": 0.2, "n": 3, "n_excluded": 0})
    lone = summary["classes"][2]["hd95"]
    assert (lone["mean"], lone["n"], lone["n_excluded"]) == (9.0, 1, 2) and math.isnan(lone["sd"])
    overall = summary["overall"]["dice"]
    assert (overall["n"], overall["n_excluded"]) == (4, 2)
    assert overall["mean"] == pytest.approx((0.7 + 0.2) / 2)
    assert overall["sd"] == pytest.approx(np.std([0.5, 0.45, 0.9], ddof=1))


def test_summary_without_exclusions_is_the_published_mean():
    values = np.random.default_rng(0).random((5, 8))
    cases = {
        str(case): {label: {"dice": dice} for label, dice in enumerate(row, start=1)}
        for case, row in enumerate(values)
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
