"""`samlora check`: each planted defect is found and named, and clean data give no findings."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from samlora.data.check import check
from samlora.data.findings import runs
from samlora.data.grid import Volume, reorient
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import read_case, read_volume, write_case, write_medsam, write_slice, write_volume
from samlora.errors import InputError, MissingFileError

RECIPE = Recipe(
    "toy",
    "ct",
    window=(-160, 240),
    orientation="LPS",
    classes=("liver", "spleen"),
    label_values=((1,), (2,)),
    patient=r"(p\d)_",
    test_cases=("p3_a",),
)
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
PICTURE = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_source(folder, names=("p0_a", "p1_a", "p2_a", "p3_a")):
    """Images in HU and labels of both classes, the lowest slice empty."""
    for seed, name in enumerate(names):
        image = np.random.default_rng(seed).integers(-200, 300, (16, 14, 4)).astype(np.int16)
        label = np.zeros(image.shape, np.uint8)
        label[2:5, 2:5, 1:], label[8:, 8:, 2:] = 1, 2
        write_volume(Volume(image, AFFINE, 1, 1), folder / "images" / f"{name}.nii.gz")
        write_volume(Volume(label, AFFINE, 1, 1), folder / "labels" / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    prepare(write_source(folder / "source"), folder / "data", RECIPE, workers=1)
    return folder


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made / "data", tmp_path / "data")


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made / "source", tmp_path / "source")


def slice_file(data, case="p0_a", n=1):
    return data / "train_npz" / f"{case}_slice{n:03d}.npz"


def rewrite(path, drop=(), **arrays):
    """A training slice with other arrays."""
    with np.load(path, allow_pickle=False) as archive:
        kept = {key: archive[key] for key in archive.files if key not in drop}
    np.savez(path, **kept | arrays)


def change_images(data, case, change):
    for n in range(4):
        with np.load(slice_file(data, case, n)) as archive:
            image = archive["image"]
        rewrite(slice_file(data, case, n), image=change(image).astype(np.float32))


def change_labels(data, cases, label):
    for case in cases:
        for n in range(4):
            rewrite(slice_file(data, case, n), label=np.full((14, 16), label, np.uint8))


def change_case(data, **changes):
    case = read_case(data / "test_vol_h5" / "p3_a.npy.h5")
    for key, value in changes.items():
        setattr(case, key, value(getattr(case, key)))
    write_case(case, data / "test_vol_h5" / "p3_a.npy.h5")


def edit(path, change):
    path.write_text(change(path.read_text()))


def edit_recipe(data, **changes):
    edit(data / "recipe.yaml", lambda text: yaml.safe_dump(yaml.safe_load(text) | changes))


def stack(data, case):
    layers = []
    for n in range(4):
        with np.load(slice_file(data, case, n)) as archive:
            layers.append(archive["image"])
    return np.stack(layers)


def copy_case(data, case):
    images = iter(stack(data, "p0_a"))
    change_images(data, case, lambda image: next(images))


PROBLEMS = {
    "cut slice": (lambda d: slice_file(d).write_bytes(b"PK\x03\x04abc"), "p0_a_slice001.npz: cannot be read as npz"),
    "cut volume": (lambda d: (d / "test_vol_h5" / "p3_a.npy.h5").write_bytes(b"\x89HDF"), "p3_a.npy.h5: cannot be read"),
    "shapes": (lambda d: rewrite(slice_file(d), label=np.zeros((14, 15), np.uint8)), "(14, 16), label of shape (14, 15)"),
    "nan": (lambda d: rewrite(slice_file(d), image=np.full((14, 16), np.nan)), "NaN"),
    "inf": (lambda d: rewrite(slice_file(d), image=np.full((14, 16), np.inf)), "infinite"),
    "one axis": (lambda d: rewrite(slice_file(d), image=np.zeros(14), label=np.zeros(14, int)), "'image' has shape (14,)"),
    "no pixels": (lambda d: rewrite(slice_file(d), image=np.zeros((0, 9)), label=np.zeros((0, 9), int)), "shape (0, 9)"),
    "objects": (lambda d: rewrite(slice_file(d), image=np.array([{}])), "p0_a_slice001.npz"),
    "no label": (lambda d: rewrite(slice_file(d), drop=["label"]), "no array named 'label'"),
    "fractions": (lambda d: rewrite(slice_file(d), label=np.full((14, 16), 0.5)), "0.5 are not whole"),
    "outside": (lambda d: change_labels(d, ["p1_a"], 7), "p1_a_slice001.npz, train_npz/p1_a_slice002.npz"),
    "negative": (lambda d: rewrite(slice_file(d), label=np.full((14, 16), -1)), "values -1 are outside 0..2"),
    "volume outside": (lambda d: change_case(d, label=lambda x: x + 2), "p3_a.npy.h5: label values 3 4 are outside 0..2"),
    "volume without label": (lambda d: change_case(d, label=lambda x: None), "holds no label"),
    "channels": (lambda d: rewrite(slice_file(d), image=np.random.default_rng(0).random((14, 16, 3))), "3 channels, the others have 1"),
    "another geometry": (lambda d: change_case(d, image=lambda x: x[:3], label=lambda x: x[:3]), "do not fit their source"),
    "another recipe": (lambda d: change_case(d, recipe=lambda r: r | {"window": [0, 80]}), "window (-160.0, 240.0) here, (0.0, 80.0) there"),
    "recipe of a record": (lambda d: edit(d / "cases" / "p1_a.json", lambda t: json.dumps((r := json.loads(t)) | {"recipe": r["recipe"] | {"slice_axis": 0}})), "cases/p1_a.json: another recipe"),
    "broken recipe": (lambda d: edit(d / "recipe.yaml", lambda t: t + "\nwindw: 3"), "recipe.yaml: unknown key windw"),
    "not finished": (lambda d: (d / "recipe.yaml").unlink(), "recipe.yaml is missing"),
    "no record": (lambda d: (d / "cases" / "p1_a.json").unlink(), "p1_a: no record in cases/"),
    "broken record": (lambda d: (d / "cases" / "p1_a.json").write_text("{}"), "cases/p1_a.json: is no record"),
    "file gone": (lambda d: [slice_file(d, "p2_a", 3).unlink(), edit(d / "lists" / "train.txt", lambda t: t.replace("p2_a_slice003\n", ""))], "1 of its files are not there (train_npz/p2_a_slice003.npz)"),
    "list": (lambda d: edit(d / "lists" / "train.txt", lambda t: t + "p9_a_slice000\n"), "p9_a_slice000: lists/train.txt names"),
    "list of volumes": (lambda d: edit(d / "lists" / "test_vol.txt", lambda t: t + "p9_a\n"), "p9_a: lists/test_vol.txt names"),
    "patient on both sides": (lambda d: edit_recipe(d, patient=r"p(?:0|3)(_a)"), "p3_a and p0_a: the same patient"),
    "images on both sides": (lambda d: change_case(d, image=lambda x: stack(d, "p1_a")[[0, 3, 1, 1]]), "p3_a and p1_a (3 of 4 slices): the same images"),
    "nothing to learn": (lambda d: change_labels(d, ["p0_a", "p1_a", "p2_a"], 0), "nothing to learn"),
}  # fmt: skip

WARNINGS = {
    "doubles": (lambda d: copy_case(d, "p2_a"), "p2_a and p0_a (4 of 4 slices): the same images"),
    "empty case": (lambda d: change_labels(d, ["p1_a"], 0), "p1_a: shows no class"),
    "class never trained": (lambda d: change_labels(d, ["p0_a", "p1_a", "p2_a"], 1), "class 2 spleen occurs in no training case, though in p3_a"),
    "not 0..1": (lambda d: change_images(d, "p1_a", lambda x: x * 3 - 1), "p1_a (-1..2): values far outside 0..1"),
    "another range": (lambda d: change_images(d, "p1_a", lambda x: x / 50), "p1_a (0..0.02): a range of values"),
    "flat": (lambda d: change_images(d, "p1_a", lambda x: x * 0), "p1_a: every pixel"),
    "sizes": (lambda d: rewrite(slice_file(d), image=np.random.default_rng(0).random((20, 16)), label=np.zeros((20, 16), int)), "2 sizes, 14 x 16 to 20 x 16"),
    "sizes in a case": (lambda d: rewrite(slice_file(d), image=np.random.default_rng(0).random((20, 16)), label=np.zeros((20, 16), int)), "p0_a: slices of several sizes in one case"),
    "background": (lambda d: [change_labels(d, ["p1_a", "p2_a"], 0), rewrite(slice_file(d), label=np.zeros((14, 16), int)), rewrite(slice_file(d, n=2), label=np.zeros((14, 16), int))], "92 % of the training slices"),
    "one patient": (lambda d: edit_recipe(d, patient=r"(p)[012]"), "one training patient only"),
    "no test cases": (lambda d: [shutil.rmtree(d / "test_vol_h5"), (d / "cases" / "p3_a.json").unlink()], "no test cases"),
    "not listed": (lambda d: edit(d / "lists" / "train.txt", lambda t: t.replace("p0_a_slice002\n", "")), "p0_a_slice002: lists/train.txt does not name"),
}  # fmt: skip


def test_clean_data_give_no_findings(data):
    for folder, cases in ((data, 4), (data / "train_npz", 3), (data / "test_vol_h5", 1)):
        report = check(folder)
        assert not report.findings and not report.failed and len(report.rows) == cases
    text = str(check(data))
    row = next(line for line in text.splitlines() if line.startswith("p3_a"))
    assert row.split() == "p3_a test 4 1 4 x 14 x 16 float32 / uint8 0..1 0-2".split()
    assert [line.split() for line in text.splitlines() if "liver" in line] == [["1", "liver", "3", "81", "1", "27"]]
    assert text.splitlines()[-1] == f"{data}: 4 cases, no problems, no warnings"


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(data, name):
    spoil, words = PROBLEMS[name]
    spoil(data)
    report = check(data)
    assert report.failed
    assert [words in str(finding) for finding in report.problems] == [True], str(report)
    assert str(report.problems[0]) in str(report).splitlines()


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings(data, name):
    spoil, words = WARNINGS[name]
    spoil(data)
    report = check(data)
    assert not report.failed, str(report)
    assert sum(words in str(finding) for finding in report.warnings) == 1, str(report)


def test_files_with_the_same_trouble_are_one_finding(data):
    for n, broken in enumerate((2, 30, 4)):
        image = np.zeros((14, 16))
        image.flat[:broken] = np.nan
        rewrite(slice_file(data, "p0_a", n), image=image)
    (problem,) = check(data).problems
    assert len(problem.names) == 3 and "values are NaN" in str(problem) and "numbers differ" in str(problem)


@pytest.mark.parametrize("channels", ["repeat", "neighbours", "rgb"])
def test_resized_slices_of_a_test_case_are_recognised(made, tmp_path, channels):
    """A part of a scan under another name: its slices are trained on, at another size."""
    source = shutil.copytree(made / "source", tmp_path / "source")
    for kind in ("images", "labels"):
        part = read_volume(source / kind / "p1_a.nii.gz")
        part.array = part.array[:, :, 1:3]
        write_volume(part, source / kind / "p3_a.nii.gz")
    prepare(source, tmp_path / "data", replace(RECIPE, channels=channels), size=24, workers=1)
    (problem,) = check(tmp_path / "data").problems
    assert "p3_a and p1_a (2 of 2 slices)" in str(problem)


def source_file(source, kind="images", case="p1_a"):
    return source / kind / f"{case}.nii.gz"


def change_source(source, change, kind="images", cases=("p1_a",)):
    """Other voxels (or another whole Volume) in source files."""
    for case in cases:
        volume = read_volume(source_file(source, kind, case))
        changed = change(volume)
        write_volume(
            changed if isinstance(changed, Volume) else replace(volume, array=changed), source_file(source, kind, case)
        )


def half_a_voxel_off(volume):
    between = volume.affine.copy()
    between[:3, 3] += volume.affine[:3, 0] / 2
    return replace(volume, affine=between)


CASES = ("p0_a", "p1_a", "p2_a", "p3_a")
SOURCE_PROBLEMS = {
    "cut image": (lambda s: source_file(s).write_bytes(b"no"), "images/p1_a.nii.gz: cannot be read as NIfTI"),
    "cut labels": (lambda s: [source_file(s, "labels", c).write_bytes(b"no") for c in ("p0_a", "p2_a")], "labels/p0_a.nii.gz, labels/p2_a.nii.gz: cannot be read"),
    "nan": (lambda s: change_source(s, lambda v: np.full(v.array.shape, np.nan)), "images/p1_a.nii.gz: 896 of 896 values are NaN"),
    "between voxels": (lambda s: change_source(s, half_a_voxel_off, "labels"), "labels/p1_a.nii.gz: its grid (shape 16 x 14 x 4"),
    "other place": (lambda s: change_source(s, lambda v: replace(v, affine=v.affine @ np.diag([1, 1, 2, 1])), "labels", CASES[:3]), "labels/p1_a.nii.gz, labels/p2_a.nii.gz: its grid"),
    "fractions": (lambda s: change_source(s, lambda v: v.array * 0.3, "labels"), "labels/p1_a.nii.gz: label values"),
    "no HU": (lambda s: change_source(s, lambda v: v.array % 256), "images/p1_a.nii.gz: its values 0..255 are no Hounsfield units"),
    "no labels": (lambda s: change_source(s, lambda v: v.array * 0, "labels", CASES), "nothing to learn"),
    "same images": (lambda s: shutil.copy(source_file(s), source_file(s, case="p3_a")), "p3_a and p1_a (4 of 4 slices): the same images"),
}  # fmt: skip

SOURCE_WARNINGS = {
    "unlisted values": (lambda s: change_source(s, lambda v: v.array + 5 * (v.array == 0), "labels"), "p1_a: label values that no class lists became background: 5"),
    "no intercept": (lambda s: change_source(s, lambda v: v.array + 1024), "p1_a (825..1323): no value below 0"),
    "absent test case": (lambda s: [source_file(s, k, "p3_a").unlink() for k in ("images", "labels")], "p3_a: test cases of recipe toy"),
    "lonely label": (lambda s: shutil.copy(source_file(s, "labels"), source_file(s, "labels", "p7_a")), "1 labels without an image"),
    "empty label": (lambda s: change_source(s, lambda v: v.array * 0, "labels"), "p1_a: shows no class"),
}  # fmt: skip


def test_clean_sources_give_no_findings(source):
    report = check(source, recipe=RECIPE)
    assert not report.findings and [row.side for row in report.rows] == ["train"] * 3 + ["test"]
    row = next(line for line in str(report).splitlines() if line.startswith("p3_a"))
    assert row.split() == "p3_a test 4 1 16 x 14 x 4, 1 x 1 x 2 mm LPS int16 -200..299 0-2".split()
    assert report.class_names == {1: "liver (1)", 2: "spleen (2)"}
    change_source(
        source, lambda v: v.array * 3, "labels", CASES
    )  # without a recipe the values of the files are classes
    report = check(source)
    assert not report.findings and report.class_names == {3: "", 6: ""} and report.rows[0].voxels[6] == 96


@pytest.mark.parametrize("name", SOURCE_PROBLEMS)
def test_problems_of_sources(source, name):
    spoil, words = SOURCE_PROBLEMS[name]
    spoil(source)
    report = check(source, recipe=RECIPE)
    assert [words in str(finding) for finding in report.problems] == [True], str(report)
    assert str(source) not in str(report.problems[0])  # files are named as they lie below the source


@pytest.mark.parametrize("name", SOURCE_WARNINGS)
def test_warnings_about_sources(source, name):
    spoil, words = SOURCE_WARNINGS[name]
    spoil(source)
    report = check(source, recipe=RECIPE)
    assert not report.failed and [words in str(finding) for finding in report.warnings] == [True], str(report)


def test_recipes_that_do_not_fit_a_source(source):
    def problem(**changes):
        (found,) = check(source, recipe=replace(RECIPE, **changes)).problems
        return str(found)

    assert "which value 'liver'" in problem(label_values=(("liver",), (2,)))
    assert "p3_a and p0_a: the same patient" in problem(patient=r"p(?:0|3)(_a)")
    assert "--num_classes 3: there are 2 classes" in str(check(source, num_classes=3).problems[0])
    report = check(source, recipe=Recipe("mr", "mr", percentiles=(1, 99)))
    assert not report.failed and report.class_names == {1: "label_1 (1)", 2: "label_2 (2)"}
    change_source(source, lambda v: np.where(v.array == v.array.min(), -1000, v.array))
    assert "p1_a (-1000..299): values like those of CT" in str(
        check(source, recipe=Recipe("mr", "mr", percentiles=(1, 99)))
    )
    with pytest.raises(InputError, match="fits none of those found: p0_a, p1_a"):
        check(source, recipe=replace(RECIPE, cases="q.*"))
    assert len(check(source, recipe=replace(RECIPE, cases="p[012].*", test_cases=())).rows) == 3


def test_orientations_that_differ(source):
    change_source(source, lambda v: reorient(v, "RAI"), "images")
    assert "p1_a (RAI): images are stored along 2 different axes" in str(check(source))
    assert not check(source, recipe=RECIPE).findings


def test_masks_as_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(2):
        picture = Volume(rng.integers(0, 256, (20, 12, 1)).astype(np.uint8), PICTURE, has_spacing=False)
        mask = Volume((255 * (picture.array > 99)).astype(np.uint8), PICTURE, has_spacing=False)
        mask.array[:, 0] = 254
        write_volume(picture, tmp_path / "images" / f"{n}.png")
        write_volume(mask, tmp_path / "masks" / f"{n}.png")
    (warning,) = check(tmp_path).findings
    assert "label values 254 255 look like one mask" in str(warning)
    report = check(tmp_path, recipe=Recipe("one", "image", mask_threshold=127))
    assert not report.findings and report.rows[0].size == "20 x 12" and report.rows[0].slices == 1
    assert report.class_names == {1: "foreground (1)"}


def test_medsam_archives_are_sources(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(2):
        image, label = rng.integers(0, 256, (5, 12, 14)).astype(np.uint8), np.zeros((5, 12, 14), np.uint8)
        label[n + 1 :, 3:6] = 1
        write_medsam(tmp_path / f"{n}.npz", image, label, (1, 1, 3))
    report = check(tmp_path)
    assert not report.findings and [(r.case, r.slices, r.empty) for r in report.rows] == [("0", 5, 1), ("1", 5, 2)]


@pytest.mark.real
@pytest.mark.parametrize(
    "folder, recipe, cases, words",
    [
        ("ct_png", {}, 2, ()),
        ("mr/prostate_png", {}, 3, ("254 255 look like one mask",)),
        ("mr/prostate_png", {"mask_threshold": 127}, 3, ()),
        ("ultrasound/nerves_vessels", {}, 49, ()),
        ("ultrasound/busi", {}, 1, ("one training patient",)),
        ("photos/rings", {}, 7, ("JPEG changes label values",)),
        ("photos/rings", {"mask_threshold": 127}, 7, ()),
        ("xray/hip", {}, 3, ("are not whole", "scribble_0.npy")),
        ("xray/hip", {"mask_threshold": 0.5}, 3, ("scribble_0.npy",)),
        ("mr/brain_tumour", {"modality": "mr", "percentiles": (1, 99)}, 1, ("one training patient",)),
        ("mr/tiny_big_endian", {"modality": "mr", "percentiles": (1, 99)}, 1, ("96 % of", "one training patient")),
    ],
)  # fmt: skip
def test_real_sources(real_data, folder, recipe, cases, words):
    report = check(real_data / folder, recipe=Recipe("real", **{"modality": "image"} | recipe) if recipe else None)
    assert len(report.rows) == cases
    assert [sum(word in str(finding) for finding in report.findings) for word in words] == [1] * len(words)
    assert len(report.findings) == len(words), str(report)


@pytest.mark.real
def test_a_part_of_a_real_scan_under_another_name(real_data, tmp_path):
    """example_ct_sm is slices 82 to 111 of example_ct, with another origin and another type of numbers."""
    folder = real_data / "ct_abdomen"
    whole, part = read_volume(folder / "example_ct.nii.gz"), read_volume(folder / "example_ct_sm.nii.gz")
    labels = read_volume(folder / "example_seg.nii.gz", labels=True)
    placed = np.zeros(whole.array.shape, np.uint8)
    placed[:, :, 82:112] = labels.array
    for name, image, label in (("whole", whole, placed), ("part", part, labels.array)):
        write_volume(image, tmp_path / "source" / "images" / f"{name}.nii.gz")
        write_volume(replace(image, array=label), tmp_path / "source" / "labels" / f"{name}.nii.gz")
    recipe = replace(Recipe.load("generic_ct"), crop=None, test_cases=("part",))
    (problem,) = check(tmp_path / "source", recipe=recipe).problems
    assert "part and whole (30 of 30 slices): the same images" in str(problem)
    prepare(tmp_path / "source", tmp_path / "data", recipe, size=64, workers=1)
    (problem,) = check(tmp_path / "data").problems
    assert "part and whole (30 of 30 slices): the same images" in str(problem)


@pytest.mark.real
def test_a_real_dicom_series(real_data, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    shutil.copytree(real_data / "dicom_ct" / "example_ct_dicom", tmp_path / "images" / "scan")
    shutil.copy(real_data / "dicom_ct" / "example_seg_dicom.nii.gz", tmp_path / "labels" / "scan.nii.gz")
    report = check(tmp_path, recipe="generic_ct")
    assert not report.failed and report.rows[0].slices == 20 and len(report.class_names) == 31


def test_number_of_classes(data, tmp_path):
    assert "leave the flag out" in str(check(data, num_classes=3).problems[0])
    flat = tmp_path / "published"  # no recipe beside it, no folders in it
    for case in range(2):
        image = np.random.default_rng(case).random((8, 8))
        write_slice(flat / f"case{case}_slice000.npz", image, np.full((8, 8), 9 + case, np.uint8))
    assert not check(flat, num_classes=10, recipe=None).failed
    assert "9 10 are outside 0..4" not in str(check(flat, num_classes=10))
    assert "10 are outside 0..9" in str(check(flat, num_classes=9).problems[0])
    assert "outside 0..2" in str(check(flat, recipe=RECIPE).problems[0])
    assert "far from 1, 2, 3" in str(check(flat).warnings[0])
    write_slice(flat / "case2.npz", np.random.default_rng(3).random((8, 8)), np.arange(64).reshape(8, 8) % 11)
    assert "give --num_classes 10 here" in str(check(flat).warnings[0])


def test_long_tables_are_cut(tmp_path):
    for case in range(203):
        write_slice(tmp_path / "train_npz" / f"c{case:03d}.npz", np.eye(4) * case / 203, np.eye(4, dtype=np.uint8))
    text = str(check(tmp_path))
    assert "c199" in text and "... and 3 more cases" in text and "203 cases" in text


def test_label_sets_in_few_characters():
    assert runs({0: 1, 1: 1, 2: 1, 4: 1, 6: 1, 7: 1}) == "0-2 4 6 7"
    assert runs([*range(0, 40, 2)]) == "0 2 4 6 8 10 ... (20)"
    assert runs([3, "liver", "aorta"]) == "3 aorta liver"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: check(d / "nowhere"), "nowhere: there is no such folder"),
        (lambda d: check(d, num_classes=0), "--num_classes 0"),
        (lambda d: check(d, recipe="nowhere"), "no such recipe"),
        (lambda d: [p.unlink() for p in d.glob("t*/*")] and check(d), "holds neither"),
    ],
)
def test_nothing_to_look_at(data, call, words):
    with pytest.raises((InputError, MissingFileError)) as error:
        call(data)
    assert words in str(error.value) and "\n" not in str(error.value)
