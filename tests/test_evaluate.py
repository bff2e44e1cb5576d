"""Measuring files: pairs are found by name and in space, figures are those of the arrays, nothing is half done."""

import base64
import csv
import io
import json
import math
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from samlora.data.grid import Volume, reorient
from samlora.data.volume import read_volume, write_volume
from samlora.errors import InputError, MissingFileError
from samlora.evaluation.folders import evaluate_folders
from samlora.evaluation.matching import case_name, match_files
from samlora.evaluation.metrics import evaluate, evaluate_case, summarise
from samlora.evaluation.names import named_labels, read_names

AFFINE = np.diag([-0.8, -0.9, 2.5, 1.0])
SPACING = (0.8, 0.9, 2.5)
SHAPE = (14, 12, 6)


def label_map(seed: int, values=(0, 1, 2)) -> np.ndarray:
    """Two boxes with ragged edges, a little different for every seed."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(SHAPE, np.uint8)
    for value, start in zip(values[1:], (1, 6)):
        low = rng.integers(start, start + 2, 3) // (1, 1, 4)
        labels[low[0] : low[0] + 5, low[1] : low[1] + 4, low[2] : low[2] + 4] = value
    labels[rng.random(SHAPE) < 0.02] = values[1]
    return labels


def put(path, array, affine=AFFINE):
    write_volume(Volume(array, affine, 1, 1), path)


def same(measures, others) -> bool:
    """Equal up to what a header in float32 rounds."""
    return measures.keys() == others.keys() and all(
        measures[label] == pytest.approx(others[label], rel=1e-6, nan_ok=True) for label in measures
    )


@pytest.fixture
def folders(tmp_path):
    """pred/ and gt/ with cases a, b, c; the predictions of b are stored with other axes."""
    for number, case in enumerate("abc"):
        put(tmp_path / "gt" / f"{case}.nii.gz", label_map(number))
        volume = Volume(label_map(number + 10), AFFINE, 1, 1)
        write_volume(reorient(volume, "SPR") if case == "b" else volume, tmp_path / "pred" / f"{case}.nii.gz")
    return tmp_path


def run(folder, **options):
    return evaluate_folders(folder / "pred", folder / "gt", folder / "out", workers=1, **options)


def test_files_hold_the_figures_of_the_arrays(folders):
    result = run(folders)
    cases = {
        case: evaluate_case(label_map(n + 10), label_map(n), SPACING, tolerances=(2.0, 1.0, 3.0))
        for n, case in enumerate("abc")
    }
    for policy in ("strict", "samed"):
        for case, values in cases.items():
            assert same(result.results[policy][case], values[policy])
        assert result.summaries[policy] == summarise(result.results[policy])
    with open(folders / "out" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == [(c, f"class {n}") for c in "abc" for n in (1, 2)]
    strict = cases["b"]["strict"][2]
    assert {"nsd_1mm", "nsd_3mm", "volume_error_percent"} <= strict.keys()
    for name, value in strict.items():
        assert float(rows[3][name]) == pytest.approx(value)
    assert float(rows[3]["samed_hd95"]) == pytest.approx(cases["b"]["samed"][2]["hd95"])
    stored = json.loads((folders / "out" / "summary.json").read_text())
    assert stored["policies"]["strict"]["classes"]["class 1"]["dice"]["ci_low"] == pytest.approx(
        result.summaries["strict"]["classes"][1]["dice"]["ci_low"]
    )
    assert stored["about"]["tolerances"] == [2, 1, 3] and stored["about"]["unit"] == "mm"
    assert sorted(path.name for path in (folders / "out").iterdir()) == ["metrics.csv", "report.html", "summary.json"]


def test_table_for_people(folders):
    lines = str(run(folders, labels=["liver=1", "spleen=2"])).splitlines()
    assert lines[0] == "policy strict, 3 cases" and len({len(line) for line in lines[1:6]}) == 1
    assert lines[3].startswith("liver") and lines[4].startswith("spleen") and lines[5].startswith("all classes")
    assert lines[6].startswith("policy samed: Dice") and lines[6].endswith("voxels")
    published = str(run(folders, policy="samed")).splitlines()
    assert "HD95 [voxels]" in published[1] and "mm" in published[-2]


def test_processes_do_not_change_a_figure(folders):
    alone = run(folders)
    page = (folders / "out" / "report.html").read_text()
    shared = evaluate_folders(folders / "pred", folders / "gt", folders / "out", workers=2)
    assert shared.results == alone.results and shared.summaries == alone.summaries
    assert re.sub(r"<dd>\d{4}-.*?</dd>", "", page) == re.sub(
        r"<dd>\d{4}-.*?</dd>", "", (folders / "out" / "report.html").read_text()
    )


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("case1", "case1"),
        ("case1_pred", "case1_gt"),
        ("case1", "case1_seg"),
        ("case1_pred", "case1"),
        ("case1_0000", "case1"),
        ("img0001", "label0001"),
        ("img0001_pred", "label0001"),
        ("case1_mask", "case1_label"),
        ("CASE_PRED", "CASE_GT"),
    ],
)
def test_names_that_belong_together(tmp_path, prediction, reference):
    put(tmp_path / "p" / f"{prediction}.nii.gz", label_map(1))
    put(tmp_path / "g" / f"{reference}.nrrd", label_map(2))
    (trio,) = match_files(tmp_path / "p", tmp_path / "g").trios
    assert trio.prediction.name.startswith(prediction) and trio.reference.name.startswith(reference)
    assert trio.name == case_name(reference)


def test_one_folder_as_test_py_leaves_it(tmp_path):
    for case in ("a", "b"):
        for kind, seed in (("pred", 1), ("gt", 2), ("img", 3)):
            put(tmp_path / f"{case}_{kind}.nii.gz", label_map(seed))
    matched = match_files(tmp_path, tmp_path)
    names = [(t.name, t.prediction.name, t.reference.name, t.image.name) for t in matched.trios]
    assert names == [(c, f"{c}_pred.nii.gz", f"{c}_gt.nii.gz", f"{c}_img.nii.gz") for c in ("a", "b")]
    assert not matched.extra


def test_predictions_in_two_formats_count_once(tmp_path):
    for name in ("a.nii.gz", "a.mha"):
        put(tmp_path / "p" / name, label_map(1))
    put(tmp_path / "g" / "a.nii.gz", label_map(1))
    matched = match_files(tmp_path / "p", tmp_path / "g")
    assert matched.trios[0].prediction.name == "a.nii.gz" and not matched.extra


def test_images_are_found_by_case(tmp_path):
    for kind in ("p/x_pred", "g/x", "i/x_0001", "i/x_0000"):
        put(tmp_path / f"{kind}.nii.gz", label_map(1))
    (trio,) = match_files(tmp_path / "p", tmp_path / "g", tmp_path / "i").trios
    assert trio.image.name == "x_0000.nii.gz"
    (trio,) = match_files(tmp_path / "p/x_pred.nii.gz", tmp_path / "g/x.nii.gz", tmp_path / "i/x_0001.nii.gz").trios
    assert trio.image.name == "x_0001.nii.gz" and trio.name == "x"


def test_missing_predictions_are_named_or_count_as_empty(folders):
    (folders / "pred" / "b.nii.gz").unlink()
    (folders / "pred" / "c.nii.gz").unlink()
    with pytest.raises(InputError, match=r"2 of 3 references: b.nii.gz, c.nii.gz; .*--allow_missing"):
        run(folders)
    assert not (folders / "out").exists()
    result = run(folders, allow_missing=True)
    assert result.results["strict"]["b"][1]["dice"] == 0 and result.results["strict"]["a"][1]["dice"] > 0
    assert result.notes == ["2 predictions missing, counted as empty: b, c"]


def test_predictions_without_reference_are_a_note(folders):
    put(folders / "pred" / "z.nii.gz", label_map(3))
    result = run(folders)
    assert (
        result.notes == ["1 prediction without a reference, left out: z.nii.gz"] and "z" not in result.results["strict"]
    )
    assert "note: 1 prediction" in str(result)


def test_another_grid_is_an_error_with_both(folders):
    put(folders / "pred" / "b.nii.gz", label_map(1), np.diag([-0.8, -0.9, 3.0, 1.0]))
    with pytest.raises(InputError, match=r"b.nii.gz.*0.8 0.9 3 mm.*0.8 0.9 2.5 mm") as caught:
        run(folders)
    assert "\n" not in str(caught.value) and not (folders / "out").exists()


def test_broken_files_are_one_line_and_leave_nothing(folders):
    whole_file = (folders / "pred" / "c.nii.gz").read_bytes()
    for content in (whole_file[: len(whole_file) // 2], b"", b"words"):
        (folders / "pred" / "c.nii.gz").write_bytes(content)
        with pytest.raises(InputError, match="c.nii.gz") as caught:
            run(folders)
        assert "\n" not in str(caught.value) and not (folders / "out").exists()


def test_output_of_others_is_left_alone(folders):
    run(folders)
    run(folders)
    (folders / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds notes.txt"):
        run(folders)
    run(folders, overwrite=True)
    (folders / "out" / "notes.txt").unlink()
    for content in ("{}", "[]", "no JSON", '{"about": {"adapter": "a"}}'):
        (folders / "out" / "summary.json").write_text(content)
        with pytest.raises(InputError, match="holds summary.json"):
            run(folders)
    with pytest.raises(InputError, match="is a file"):
        evaluate_folders(folders / "pred", folders / "gt", folders / "gt" / "a.nii.gz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "lenient"}, "--policy lenient"),
        ({"tolerances": ()}, "--tolerance"),
        ({"tolerances": (1, -2)}, "--tolerance"),
        ({"tolerances": (math.nan,)}, "--tolerance"),
        ({"cases_shown": -1}, "--cases_shown -1"),
        ({"labels": ["liver"]}, "--labels liver"),
        ({"labels": ["0"]}, "--labels 0"),
        ({"labels": ["a=1", "b=1"]}, "given twice"),
        ({"labels": []}, "no label"),
        ({"names": "nowhere.json"}, "nowhere.json"),
        ({"images": "nowhere"}, "nowhere"),
        ({"recipe": "nowhere"}, "nowhere"),
    ],
)
def test_unusable_options_are_one_line(folders, options, message):
    with pytest.raises(InputError, match=message) as caught:
        run(folders, **options)
    assert "\n" not in str(caught.value) and not (folders / "out").exists()


def test_nothing_to_measure(tmp_path, folders):
    with pytest.raises(MissingFileError, match="nowhere"):
        evaluate_folders(tmp_path / "nowhere", folders / "gt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no label maps"):
        evaluate_folders(tmp_path / "empty", folders / "gt", tmp_path / "out")
    put(tmp_path / "other" / "x.nii.gz", label_map(1))
    with pytest.raises(InputError, match=r"x.nii.gz.*a.nii.gz, b.nii.gz"):
        evaluate_folders(tmp_path / "other", folders / "gt", tmp_path / "out", allow_missing=True)
    put(tmp_path / "zero.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(InputError, match="no label in any"):
        evaluate_folders(tmp_path / "zero.nii.gz", tmp_path / "zero.nii.gz", tmp_path / "out", workers=1)


@pytest.mark.parametrize("kind", ["gt", "pred"])
def test_two_files_for_one_case_are_refused(folders, kind):
    put(folders / kind / "d_seg.nii.gz", label_map(3))
    put(folders / kind / "d_mask.nii.gz", label_map(3))
    with pytest.raises(InputError, match=r"d_\w+.nii.gz: d_\w+.nii.gz belongs to the case d too"):
        run(folders)


def test_labels_missing_from_a_case_are_undefined_there(folders):
    """A label found anywhere is a label of every case, as if it had been asked for."""
    put(folders / "gt" / "c.nii.gz", label_map(2, (0, 1, 9)))
    found = run(folders)
    asked = run(folders, labels=[1, 2, 9])
    for policy in ("strict", "samed"):
        for case in "abc":
            assert found.results[policy][case].keys() == {1, 2, 9}
            assert same(found.results[policy][case], asked.results[policy][case])
    assert found.summaries["strict"]["classes"][9]["dice"]["n_excluded"] == 2
    assert found.summaries["samed"]["classes"][9]["dice"]["n"] == 3
    assert run(folders, labels=[2]).summaries["strict"]["classes"].keys() == {2}


def test_recipe_maps_the_references(folders):
    """Predictions hold classes from 1 on, the files of a data set its own values."""
    for number, case in enumerate("abc"):
        put(folders / "gt" / f"{case}.nii.gz", label_map(number, (0, 6, 4)))
    recipe = {"name": "mine", "modality": "ct", "window": [-160, 240], "classes": {"liver": 6, "spleen": 4}}
    (folders / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run(folders, recipe=folders / "mine.yaml")
    assert result.names == {1: "liver", 2: "spleen"}
    expected = evaluate(label_map(10), label_map(0), SPACING)
    assert result.results["strict"]["a"][2]["dice"] == expected[2]["dice"]


def test_names_of_labels(tmp_path):
    files = {
        "numbers.json": {"1": "liver", "52": "aorta"},
        "names.json": {"background": 0, "liver": 1, "aorta": 52},
        "dataset.json": {"labels": {"background": 0, "liver": 1, "aorta": [52]}, "numTraining": 3},
        "old.json": {"labels": {"0": "background", "1": "liver", "52": "aorta"}},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
        assert read_names(tmp_path / name) == {1: "liver", 52: "aorta"}, name
    recipe = {"name": "mine", "modality": "image", "classes": {"liver": 6, "aorta": [8, 9]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert read_names(tmp_path / "mine.yaml") == {1: "liver", 2: "aorta"}
    safetensors = pytest.importorskip("safetensors.numpy")
    spec = {"samlora": json.dumps({"class_names": ["liver", "aorta"]})}
    safetensors.save_file({"w": np.zeros(1)}, tmp_path / "a.safetensors", spec)
    assert read_names(tmp_path / "a.safetensors") == {1: "liver", 2: "aorta"}
    safetensors.save_file({"w": np.zeros(1)}, tmp_path / "bare.safetensors")
    for name, content in (("list.json", b"[1, 2]"), ("broken.json", b"{"), ("a.json", b'{"1": {}, "x": null}')):
        (tmp_path / name).write_bytes(content)
    for name in ("list.json", "broken.json", "a.json", "bare.safetensors"):
        with pytest.raises(InputError, match=name) as caught:
            read_names(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_labels_to_measure():
    names = {1: "liver", 5: "kidney"}
    assert named_labels(None, names) == (None, names)
    assert named_labels(["kidney", "2", "gall bladder=7", 9], names) == ((5, 2, 7, 9), names | {7: "gall bladder"})
    with pytest.raises(InputError, match="known names: liver, kidney"):
        named_labels(["spleen"], names)


def test_names_beside_the_references_are_used(folders):
    (folders / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    result = run(folders)
    assert result.names == {1: "liver"} and "class 2" in str(result) and "liver" in str(result)


def draw(path, array):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path)


def test_pictures_are_measured_in_pixels(tmp_path):
    rng = np.random.default_rng(0)
    masks = {kind: np.kron(rng.random((6, 8)) < 0.4, np.ones((5, 4))).astype(np.uint8) for kind in ("pred", "gt")}
    for kind, mask in masks.items():
        draw(tmp_path / kind / "scan.png", mask)
    draw(tmp_path / "img" / "scan.png", rng.integers(0, 255, (30, 32, 3)).astype(np.uint8))
    result = run(tmp_path, images=tmp_path / "img")
    expected = evaluate(masks["pred"], masks["gt"], (1, 1), tolerances_mm=(1, 3))[1]
    values = result.results["strict"]["scan"][1]
    assert values["hd95"] == expected["hd95"] and values["nsd_1px"] == expected["nsd_1mm"]
    assert math.isnan(values["volume_ml"]) and result.unit == "px" and result.notes == []
    table = "\n".join(str(result).splitlines()[:-1])
    assert "HD95 [px]" in table and "mm" not in table
    page = (tmp_path / "out" / "report.html").read_text()
    assert "HD95 [px]" in page and "HD95 [mm]" not in page and "pixels: the files say nothing" in page


def test_soft_masks_need_a_threshold(tmp_path):
    rng = np.random.default_rng(1)
    soft = rng.integers(0, 255, (2, 20, 30)).astype(np.uint8)
    for kind, mask in zip(("pred", "gt"), soft):
        draw(tmp_path / kind / "scan.png", mask)
    result = run(tmp_path, threshold=127)
    expected = evaluate((soft[0] > 127).astype(np.uint8), (soft[1] > 127).astype(np.uint8), (1, 1))
    assert result.results["strict"]["scan"].keys() == {1}
    assert result.results["strict"]["scan"][1]["hd95"] == expected[1]["hd95"]


def test_arrays_without_place_are_laid_on_the_reference(tmp_path):
    """What nibabel or SimpleITK users save as npy is the array (D, H, W)."""
    put(tmp_path / "gt" / "a.nii.gz", label_map(0))
    (tmp_path / "pred").mkdir()
    np.save(tmp_path / "pred" / "a.npy", label_map(10).T)
    result = run(tmp_path)
    expected = evaluate(label_map(10), label_map(0), SPACING, tolerances_mm=(1, 3))
    assert same(result.results["strict"]["a"], expected)
    assert result.unit == "mm" and result.notes == ["without millimetres, laid voxel by voxel on the other map: a.npy"]
    np.save(tmp_path / "pred" / "a.npy", label_map(10).T[1:])
    with pytest.raises(InputError, match="14 x 12 x 5 voxels"):
        run(tmp_path)


def test_millimetres_and_pixels_do_not_mix(tmp_path):
    for kind in ("pred", "gt"):
        put(tmp_path / kind / "a.nii.gz", label_map(0))
        np.save(tmp_path / kind / "b.npy", label_map(1).T)
    with pytest.raises(InputError, match=r"b.npy.*millimetres.*a.nii.gz"):
        run(tmp_path)


def put_masks(folder, labels, names):
    for value, name in names.items():
        put(folder / f"{name}.nii.gz", (labels == value).astype(np.uint8))


def test_masks_of_structures_are_one_label_map(tmp_path):
    """A folder per case with a file per structure, on either side or on both."""
    names = {1: "liver", 2: "spleen"}
    for number, case in enumerate("ab"):
        put(tmp_path / "maps" / f"{case}.nii.gz", label_map(number))
        put_masks(tmp_path / "masks" / case, label_map(number), names)
        put_masks(tmp_path / "pred" / case, label_map(number + 10), names)
    out = tmp_path / "out"
    both = evaluate_folders(tmp_path / "pred", tmp_path / "masks", out, workers=1)
    mixed = evaluate_folders(tmp_path / "pred", tmp_path / "maps", out, names=names, workers=1)
    assert both.results == mixed.results and both.names == names
    assert same(both.results["strict"]["b"], evaluate(label_map(11), label_map(1), SPACING, tolerances_mm=(1, 3)))
    single = evaluate_folders(tmp_path / "maps" / "a.nii.gz", tmp_path / "masks" / "a", out, names=names, workers=1)
    assert single.results["strict"].keys() == {"a"} and single.summaries["strict"]["overall"]["dice"]["mean"] == 1
    with pytest.raises(InputError, match="--names: is needed to know which value.* liver, spleen"):
        evaluate_folders(tmp_path / "pred", tmp_path / "maps", out, workers=1)
    with pytest.raises(InputError, match="says nothing about spleen"):
        evaluate_folders(tmp_path / "pred", tmp_path / "maps", out, names={1: "liver"}, workers=1)
    put(tmp_path / "pred" / "b" / "spleen.nii.gz", np.ones(SHAPE, np.uint8))
    with pytest.raises(InputError, match="spleen.nii.gz: overlaps"):
        evaluate_folders(tmp_path / "pred", tmp_path / "masks", out, workers=1)


def test_recipe_takes_masks_by_name(tmp_path):
    put(tmp_path / "pred" / "a.nii.gz", label_map(10))
    put_masks(tmp_path / "gt" / "a", label_map(0), {2: "right_lung", 1: "Liver", 7: "heart"})
    recipe = {"name": "mine", "modality": "ct", "window": [-160, 240], "classes": ["Liver", "right_lung"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run(tmp_path, recipe=tmp_path / "mine.yaml")
    assert same(result.results["strict"]["a"], evaluate(label_map(10), label_map(0), SPACING, tolerances_mm=(1, 3)))
    assert result.names == {1: "Liver", 2: "right_lung"}


def test_recipe_thresholds_the_references_only(tmp_path):
    """Predictions are 0 and 1 whatever the masks of the data set are."""
    mask = np.zeros((20, 30), np.uint8)
    mask[4:12, 5:20] = 1
    draw(tmp_path / "pred" / "scan.png", mask)
    draw(tmp_path / "gt" / "scan.png", np.where(mask, 254, 3).astype(np.uint8))
    recipe = {"name": "mine", "modality": "image", "mask_threshold": 127, "classes": {"ring": 1}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    result = run(tmp_path, recipe=tmp_path / "mine.yaml")
    assert result.results["strict"]["scan"][1]["dice"] == 1 and result.names == {1: "ring"} and not result.notes


def test_values_that_mean_different_things_are_noted(folders):
    """The usual accident: masks of 0 and 255 against labels of 0 and 1."""
    for case in "abc":
        volume = read_volume(folders / "pred" / f"{case}.nii.gz", labels=True)
        volume.array = np.where(volume.array == 2, 255, volume.array).astype(np.uint8)
        write_volume(volume, folders / "pred" / f"{case}.nii.gz")
    assert run(folders).notes == [
        "never in a prediction: class 2; do both number classes alike?",
        "never in a reference: class 255; do both number classes alike?",
    ]


def test_an_image_is_no_label_map(folders):
    noise = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    put(folders / "gt" / "b.nii.gz", noise)
    with pytest.raises(InputError, match=r"b.nii.gz: 1008 different values; is it an image"):
        run(folders)
    assert run(folders, labels=[1, 2]).results["strict"]["b"][1]["reference_ml"] > 0


@pytest.mark.real
def test_volumes_equal_the_independent_statistics(real_data):
    """TotalSegmentator's own volumes of the organs whose masks lie beside them."""
    folder = real_data / "ct_abdomen" / "example_seg_fast"
    statistics = json.loads((folder / "statistics.json").read_text())
    names = {name: int(n) for n, name in json.loads((folder.parent / "labels_total.json").read_text()).items()}
    labels = read_volume(folder.parent / "example_seg_fast.nii.gz", labels=True)
    values = evaluate(labels.array, labels.array, labels.spacing, labels=sorted(names.values()), distances=False)
    masks = sorted(folder.glob("*.nii.gz"))
    assert len(masks) == 12
    for path in masks:
        organ = path.name.removesuffix(".nii.gz")
        mask = read_volume(path, labels=True)
        single = evaluate(mask.array, mask.array, mask.spacing, labels=[1], distances=False)[1]
        assert single["volume_ml"] == values[names[organ]]["volume_ml"] == single["reference_ml"]
    compared = 0
    for organ, figures in statistics.items():
        if organ in names:
            assert values[names[organ]]["volume_ml"] * 1000 == pytest.approx(figures["volume"], rel=1e-6), organ
            compared += 1
    assert compared > 30


@pytest.mark.real
def test_two_models_on_one_patient(real_data, tmp_path):
    folder = real_data / "ct_abdomen"
    result = evaluate_folders(
        folder / "example_seg_fast.nii.gz",
        folder / "example_seg.nii.gz",
        tmp_path / "out",
        names=folder / "labels_total.json",
        images=folder / "example_ct_sm.nii.gz",
        workers=1,
    )
    classes = {result.names[label]: figures for label, figures in result.summaries["strict"]["classes"].items()}
    known = {"liver": 0.98, "spleen": 0.98, "stomach": 0.95, "pancreas": 0.81, "gallbladder": 0.92, "aorta": 0.92}
    for organ, dice in known.items():
        assert classes[organ]["dice"]["mean"] == pytest.approx(dice, abs=0.011), organ
    assert result.notes == ["never in a prediction: lung_middle_lobe_right; do both number classes alike?"]
    missed = result.results["strict"]["example"][13]
    assert missed["dice"] == 0 and missed["hd95"] == pytest.approx(3 * np.linalg.norm([122, 101, 30]))


@pytest.mark.real
def test_surface_dice_of_deepmind_is_near_on_real_organs(real_data):
    theirs = pytest.importorskip("surface_distance")
    maps = [read_volume(real_data / "ct_abdomen" / f"example_seg{kind}.nii.gz", labels=True) for kind in ("_fast", "")]
    prediction, reference = (volume.array for volume in maps)
    values = evaluate(prediction, reference, maps[1].spacing, tolerance_mm=3)
    surface, hd95 = [], []
    for label in sorted(set(np.unique(prediction)) & set(np.unique(reference)) - {0}):
        distances = theirs.compute_surface_distances(reference == label, prediction == label, maps[1].spacing)
        theirs_at_3 = theirs.compute_surface_dice_at_tolerance(distances, 3 * (1 + 1e-6))
        surface.append(abs(values[label]["nsd"] - theirs_at_3))
        hd95.append(abs(values[label]["hd95"] - theirs.compute_robust_hausdorff(distances, 95)) > 1e-3)
    assert len(surface) == 40 and max(surface) < 0.03 and np.mean(surface) < 0.005
    assert 0.4 < np.mean(hd95) < 0.6


@pytest.mark.real
def test_dicom_series_lies_under_its_labels(real_data, tmp_path):
    """The series runs along other axes than the label file; the page shows both on one grid."""
    folder = real_data / "dicom_ct"
    labels = folder / "example_seg_dicom.nii.gz"
    result = evaluate_folders(
        labels, labels, tmp_path, images=folder / "example_ct_dicom", workers=1, labels=["liver=5"]
    )
    assert result.notes == [] and result.summaries["strict"]["overall"]["dice"]["mean"] == 1
    page = (tmp_path / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    (frames,) = data["frames"]
    where = frames["slices"].index(10)
    image, liver = (
        Image.open(io.BytesIO(base64.b64decode(frames[layer][where].split(",")[1]))).convert("RGBA")
        for layer in ("background", "prediction")
    )
    inside = np.asarray(image.resize(liver.size))[..., 0][np.asarray(liver)[..., 3] > 0] / 255 * 400 - 160
    assert 80 < inside.mean() < 100, "the liver's mean is 89 HU"
