"""Folders of volumes become SAMed's layout, the same each time, and nothing is made twice."""

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from samlora.data.grid import case_to_volume
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import read_case, read_slice, read_volume
from samlora.errors import InputError, MissingFileError

RECIPE = Recipe("r", "ct", (-125, 275), classes=("liver", "spleen"), label_values=((2,), (1, 5)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stored(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_btcv_becomes_samed_s_layout(make_case, tmp_path):
    for number in (5, 8):
        src = make_case(f"src/img/img{number:04d}.nii.gz", f"src/label/label{number:04d}.nii.gz", seed=number)
    src, dst = src / "src", tmp_path / "dst"
    summary = prepare(src, dst, "synapse", workers=1)
    assert (dst / "lists/train.txt").read_text().split() == [f"case0005_slice{n:03d}" for n in range(5)]
    assert (dst / "lists/test_vol.txt").read_text().split() == ["case0008"]
    assert sorted(p.name for p in (dst / "train_npz").iterdir()) == [
        f"case0005_slice{n:03d}.npz" for n in range(5)
    ]
    hu, values = stored(src / "img/img0005.nii.gz"), stored(src / "label/label0005.nii.gz")
    image, label = read_slice(dst / "train_npz/case0005_slice003.npz")
    assert np.array_equal(image, (np.clip(hu[:, :, 3].T.astype(np.float32), -125, 275) + 125) / 400)
    assert np.array_equal(label, np.where(values == 5, 0, values)[:, :, 3].T) and label.dtype == np.uint8

    case = read_case(dst / "test_vol_h5/case0008.npy.h5")
    assert case.image.shape == (5, 8, 9) and case.spacing == (2.5, 0.75, 0.75)
    source = read_volume(src / "label/label0008.nii.gz")
    back = case_to_volume(case, case.label)
    assert np.array_equal(back.array, np.where(source.array == 5, 0, source.array))
    assert np.array_equal(back.affine, source.affine) and (back.qform_code, back.sform_code) == (1, 1)

    used = Recipe.load(dst / "recipe.yaml")
    assert used == summary.recipe and used.test_cases == ("case0008",)
    assert used.differences(Recipe.from_dict(case.recipe)) == []
    record = json.loads((dst / "cases/case0005.json").read_text())
    assert record["geometry"]["affine"] == source.affine.tolist() and sum(record["voxels"]) == 360
    text = str(summary)
    assert "warning: class 3 left_kidney occurs in no case" in text and "became background: 5" in text
    assert "1 training cases (5 slices), 1 test cases" in text
    assert "case0005  train      5 x 8 x 9  0 1 2" in text


def test_pairs_of_folders(make_case, tmp_path):
    make_case("src/images/a_0000.nii.gz", "src/masks/a.nii.gz")
    make_case("src/images/b.nii", "src/masks/b_seg.nii.gz", seed=1)
    make_case("src/images/c_0001.nrrd", "src/masks/c_0001.mha", seed=2)
    (tmp_path / "src/images/._b.nii").write_text("left by macOS")
    summary = prepare(tmp_path / "src", tmp_path / "dst", RECIPE, workers=1, test_cases=["b"])
    sides = {r["name"]: r["split"] for r in summary.records}
    assert sides == {"a": "train", "b": "test", "c_0001": "train"}


def test_nnunet_brings_its_classes_and_its_test_cases(make_case, tmp_path):
    make_case("src/imagesTr/a_0000.nii.gz", "src/labelsTr/a.nii.gz")
    make_case("src/imagesTs/z_0000.nii.gz", "src/labelsTs/z.nii.gz", seed=1)
    forms = {
        "v2": ({"background": 0, "tumour": 5, "liver": 1, "ignore": 2}, ("liver", "tumour"), ((1,), (5,))),
        "v1": ({"0": "background", "1": "liver", "2": "spleen"}, ("liver", "spleen"), ((1,), (2,))),
        "groups": ({"background": 0, "organ": [1, 2], "rest": 5}, ("organ", "rest"), ((1, 2), (5,))),
    }
    for name, (labels, classes, values) in forms.items():
        (tmp_path / "src/dataset.json").write_text(json.dumps({"labels": labels}))
        summary = prepare(tmp_path / "src", tmp_path / name, "generic_ct", workers=1)
        assert (summary.recipe.classes, summary.recipe.label_values) == (classes, values)
        assert [r["split"] for r in summary.records] == ["train", "test"]


def test_without_a_list_of_classes_every_value_is_one(make_case, tmp_path):
    make_case("src/images/a.nii", "src/labels/a.nii", values=(0, 255))
    make_case("src/images/b.nii", "src/labels/b.nii", values=(0, 3))
    recipe = prepare(tmp_path / "src", tmp_path / "dst", "generic_ct", workers=1).recipe
    assert recipe.classes == ("label_3", "label_255") and recipe.label_values == ((3,), (255,))
    again = prepare(tmp_path / "src", tmp_path / "dst", "generic_ct", workers=1)
    assert again.recipe == recipe and again.skipped == 2


def test_a_second_run_makes_only_what_is_missing_or_changed(make_case, tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    for n, name in enumerate("abc"):
        make_case(f"src/images/{name}.nii", f"src/labels/{name}.nii", seed=n)

    def run(**options) -> int:
        return prepare(src, dst, RECIPE, workers=1, **options).skipped

    assert run(test_cases=["c"]) == 0
    first = contents(dst)
    times = {p: p.stat().st_mtime_ns for p in dst.glob("*/*.npz")}
    assert run(test_cases=["c"]) == 3 and contents(dst) == first
    assert {p: p.stat().st_mtime_ns for p in times} == times

    (dst / "train_npz/a_slice002.npz").unlink()
    assert run(test_cases=["c"]) == 2 and contents(dst) == first
    (dst / "cases/b.json").write_text("{ cut off")
    assert run(test_cases=["c"]) == 2 and contents(dst) == first
    assert run(test_cases=["c"], overwrite=True) == 0 and contents(dst) == first

    assert run(test_cases=["a"]) == 1  # a and c change sides, and leave nothing on the old one
    assert {p.name[0] for p in (dst / "train_npz").iterdir()} == {"b", "c"}
    assert [p.name for p in (dst / "test_vol_h5").iterdir()] == ["a.npy.h5"]
    assert run(test_cases=["a"], size=16) == 0
    make_case("src/images/b.nii", "src/labels/b.nii", seed=9)
    os.utime(src / "labels/b.nii", (1, 1))
    assert run(test_cases=["a"], size=16) == 2

    for folder in ("images", "labels"):
        (src / folder / "b.nii").unlink()
    with pytest.raises(InputError, match="1 cases that the source has not .b.; .*--overwrite"):
        run(test_cases=["a"])
    run(test_cases=["a"], overwrite=True)
    assert {p.name[0] for p in (dst / "train_npz").iterdir()} == {"c"}


def test_processes_give_what_one_gives(make_case, tmp_path):
    for n in range(3):
        make_case(f"src/images/{n}.nii.gz", f"src/labels/{n}.nii.gz", seed=n)
    one = prepare(tmp_path / "src", tmp_path / "one", "generic_ct", workers=1, test_fraction=0.3)
    two = prepare(tmp_path / "src", tmp_path / "two", "generic_ct", workers=2, test_fraction=0.3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and one.records == two.records
    assert len(one.recipe.test_cases) == 1


def test_training_slices_are_resized_and_test_volumes_are_not(make_case, tmp_path):
    from scipy.ndimage import zoom

    for n, name in enumerate("ab"):
        make_case(f"src/images/{name}.nii", f"src/labels/{name}.nii", shape=(40, 50, 3), seed=n)
    prepare(tmp_path / "src", tmp_path / "full", RECIPE, workers=1, test_cases=["b"])
    prepare(tmp_path / "src", tmp_path / "small", RECIPE, workers=1, test_cases=["b"], size=24)
    image, label = read_slice(tmp_path / "full/train_npz/a_slice001.npz")
    small, small_label = read_slice(tmp_path / "small/train_npz/a_slice001.npz")
    factors = 24 / image.shape[0], 24 / image.shape[1]
    np.testing.assert_allclose(small, zoom(image, factors, order=3), atol=1e-6)
    assert np.array_equal(small_label, zoom(label, factors, order=0)) and small.shape == (24, 24)
    assert read_case(tmp_path / "small/test_vol_h5/b.npy.h5").image.shape == (3, 50, 40)
    assert Recipe.load(tmp_path / "small/recipe.yaml").size == 24


def test_slices_without_foreground_can_be_left_out(make_case, tmp_path):
    make_case("src/images/a.nii", "src/labels/a.nii")
    label = nibabel.load(tmp_path / "src/labels/a.nii")
    array = np.zeros(label.shape, np.uint8)
    array[2, 2, 1] = 2
    nibabel.save(nibabel.Nifti1Image(array, label.affine, label.header), tmp_path / "src/labels/a.nii")
    recipe = Recipe.from_dict(RECIPE.to_dict() | {"keep": "foreground"})
    prepare(tmp_path / "src", tmp_path / "dst", recipe, workers=1)
    assert (tmp_path / "dst/lists/train.txt").read_text() == "a_slice001\n"


def _turned(src):
    image = nibabel.load(src / "labels/a.nii")
    between = image.affine.copy()
    between[:3, 3] += image.affine[:3, 0] / 2
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), between), src / "labels/a.nii")


def _values(src, value):
    image = nibabel.load(src / "labels/a.nii")
    array = np.full(image.shape, value, np.float32)
    nibabel.save(nibabel.Nifti1Image(array, image.affine), src / "labels/a.nii")


def _json(text):
    def write(src):
        for old, new in (("images", "imagesTr"), ("labels", "labelsTr")):
            (src / old).rename(src / new)
        (src / "dataset.json").write_text(text)

    return write


WRONG = {
    "image without label": (lambda s: (s / "images/q.nii").touch(), {}, "images/q.nii: has no label"),
    "no labels at all": (lambda s: (s / "labels/a.nii").unlink(), {}, "labels: no volumes"),
    "empty folder": (lambda s: [p.unlink() for p in s.glob("*/*")], {}, "images: no volumes"),
    "no layout": (lambda s: (s / "labels").rename(s / "truth"), {}, "src: two folders"),
    "no source": (lambda s: s.rename(s.with_name("moved")), {}, "src: no such folder"),
    "two of a name": (lambda s: (s / "images/a.nii.gz").touch(), {}, "a.nii.gz: a.nii has the same name"),
    "two channels": (lambda s: (s / "images/a_0001.nii").touch(), {}, "a.nii and a_0001.nii"),
    "broken image": (lambda s: (s / "images/a.nii").write_text("no"), {}, "images/a.nii: cannot be read"),
    "other grid": (_turned, {}, "labels/a.nii: its grid"),
    "soft label": (lambda s: _values(s, 0.5), {}, "labels/a.nii: label values 0.5"),
    "overlap": (_json('{"labels": {"a": [1, 2], "b": [2]}}'), {"recipe": "generic_ct"}, "regions overlap"),
    "dataset.json": (_json('{"label": {}}'), {"recipe": "generic_ct"}, 'dataset.json: no usable "labels"'),
    "no classes": (lambda s: _values(s, 0), {"recipe": "generic_ct"}, "labels: 0 different label values"),
    "unknown test case": (lambda s: None, {"test_cases": ["x"]}, "--test_cases x: no such case; there are a"),
    "fraction": (lambda s: None, {"test_fraction": 20}, "--test_fraction 20"),
    "both splits": (lambda s: None, {"test_cases": ["a"], "test_fraction": 0.5}, "both given"),
    "workers": (lambda s: None, {"workers": 0}, "--workers 0"),
    "size": (lambda s: None, {"size": 3}, "size 3"),
    "recipe": (lambda s: None, {"recipe": "synaps"}, "synaps: no such recipe"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_in_one_line(kind, make_case, tmp_path):
    spoil, options, said = WRONG[kind]
    src = make_case("src/images/a.nii", "src/labels/a.nii") / "src"
    spoil(src)
    options = {"recipe": RECIPE, "workers": 1} | options
    with pytest.raises(InputError) as error:
        prepare(src, tmp_path / "dst", options.pop("recipe"), **options)
    message = str(error.value)
    assert said in message and "\n" not in message, message
    assert isinstance(error.value, MissingFileError) == ("no such" in message and "case" not in message)
    assert not (tmp_path / "dst").exists()


def test_an_error_in_a_process_is_the_same_line(make_case, tmp_path):
    make_case("src/images/a.nii", "src/labels/a.nii")
    make_case("src/images/b.nii", "src/labels/b.nii")
    (tmp_path / "src/images/b.nii").write_text("no image")
    with pytest.raises(InputError, match="b.nii: cannot be read"):
        prepare(tmp_path / "src", tmp_path / "dst", RECIPE, workers=2)
    assert not (tmp_path / "dst/recipe.yaml").exists() and not (tmp_path / "dst/lists").exists()


@pytest.mark.real
def test_two_patients_stored_differently_lie_the_same_way_up(real_data, tmp_path):
    ct, dicom = real_data / "ct_abdomen", real_data / "dicom_ct"
    for folder, name, file in (
        ("images", "a.nii.gz", ct / "example_ct.nii.gz"),
        ("labels", "a.nii.gz", ct / "example_seg_fast_force_split.nii.gz"),
        ("images", "b", dicom / "example_ct_dicom"),
        ("labels", "b.nii.gz", dicom / "example_seg_dicom.nii.gz"),
    ):
        (tmp_path / "src" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / folder / name).symlink_to(file)
    recipe = Path(__file__).parent / "datasets" / "ct_abdomen.yaml"
    summary = prepare(tmp_path / "src", tmp_path / "dst", recipe, test_fraction=1.0, workers=1)
    assert summary.recipe.classes == Recipe.load("synapse").classes
    voxels = {r["name"]: r["voxels"][1:] for r in summary.records}
    assert voxels["a"] == [9668, 7134, 5090, 1319, 41692, 4836, 1839, 695]
    assert voxels["b"] == [130634, 0, 0, 0, 366708, 74102, 11723, 1327]
    for name in "ab":
        case = read_case(tmp_path / f"dst/test_vol_h5/{name}.npy.h5")
        centre = {c: np.argwhere(case.label == c).mean(0) for c in (1, 5, 6, 7)}
        spleen, liver, stomach, aorta = centre.values()
        assert liver[2] < aorta[2] < spleen[2]  # the patient's right is on the left
        assert stomach[1] < spleen[1] and stomach[1] < aorta[1]  # the front is up
        assert 0.3 < case.image[case.label == 5].mean() < 0.6
        source = read_volume(tmp_path / "src/images" / ("b" if name == "b" else "a.nii.gz"))
        back = case_to_volume(case, case.label)
        assert back.array.shape == source.array.shape and np.array_equal(back.affine, source.affine)
    a = read_volume(ct / "example_seg_fast_force_split.nii.gz").array
    case = read_case(tmp_path / "dst/test_vol_h5/a.npy.h5")
    assert np.array_equal(case_to_volume(case, case.label).array == 5, a == 5)


def test_recipe_yaml_reads_like_the_shipped_ones(make_case, tmp_path):
    make_case("src/images/a.nii", "src/labels/a.nii")
    prepare(tmp_path / "src", tmp_path / "dst", RECIPE, workers=1)
    values = yaml.safe_load((tmp_path / "dst/recipe.yaml").read_text())
    assert values["classes"] == {"liver": 2, "spleen": [1, 5]} and values["window"] == [-125, 275]
