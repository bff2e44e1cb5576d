"""Every shipped recipe prepares a small folder of the layout that its data set is published in."""

import json

import numpy as np
import pytest

from samlora.data.grid import Volume
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import read_case, read_slice, write_volume
from samlora.files import shipped

AFFINE = np.diag([-1.5, -1.5, 3, 1])


def image(path, low=-1000, high=400, shape=(20, 18, 3), affine=AFFINE):
    array = (
        np.random.default_rng(0).integers(low, high, shape).astype(np.uint8 if low >= 0 and high <= 256 else np.int16)
    )
    write_volume(Volume(array, affine, 1, 1), path)


def label(path, values, shape=(20, 18, 3), affine=AFFINE):
    array = np.zeros(shape, np.uint8)
    for n, value in enumerate(values):  # a row of voxels for each
        array[n % 18 + 1, 2:9, -1] = value
    write_volume(Volume(array, affine, 1, 1), path)


def mask(path, row):
    array = np.zeros((20, 18, 3), np.uint8)
    array[row, 2:9, -1] = 1
    write_volume(Volume(array, AFFINE, 1, 1), path)


def pairs(folder, names, images="imagesTr", labels="labelsTr", values=range(16), ending="", **options):
    for name in names:
        image(folder / images / f"{name}{ending}.nii.gz", **options)
        label(folder / labels / f"{name}.nii.gz", values)


def synapse(folder):
    for n in (5, 8):
        image(folder / f"img/img{n:04d}.nii.gz")
        label(folder / f"label/label{n:04d}.nii.gz", range(14))


def amos(folder):
    pairs(folder, ["amos_0001", "amos_0499", "amos_0507"])
    pairs(folder, ["amos_0008", "amos_0600"], "imagesVa", "labelsVa")
    image(folder / "imagesTs/amos_0500.nii.gz")
    (folder / "labelsTs").mkdir()
    names = {"0": "background", "1": "spleen", "8": "arota", "9": "postcava"}
    (folder / "dataset.json").write_text(json.dumps({"labels": names, "training": [], "modality": {"0": "CT"}}))


def flare22(folder):
    pairs(folder, ["FLARE22_Tr_0001", "FLARE22_Tr_0002"], "images", "labels", range(14), ending="_0000")


def msd(folder):
    four = {"low": 0, "high": 900, "shape": (20, 18, 3, 4)}
    pairs(folder, ["BRATS_001", "BRATS_002"], values=range(4), **four)
    (folder / "imagesTr" / "._BRATS_001.nii.gz").write_text("left by macOS")
    image(folder / "imagesTs/BRATS_485.nii.gz", **four)
    description = {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
        "test": ["./imagesTs/BRATS_485.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def totalsegmentator(folder):
    organs = ["spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "aorta", "pancreas"]
    for case in ("s0000", "s0001"):
        image(folder / case / "ct.nii.gz")
        for row, organ in enumerate([*organs, "vertebrae_L1"], start=1):
            mask(folder / case / "segmentations" / f"{organ}.nii.gz", row)
    head = "image_id;age;gender;institute;study_type;split"
    (folder / "meta.csv").write_text(f"\ufeff{head}\ns0000;64;m;I;ct thorax;train\ns0001;70;f;I;ct abdomen;test\n", encoding="utf-8")


def acdc(folder):
    for part, patient in (("training", "patient001"), ("training", "patient002"), ("testing", "patient101")):
        place = folder / part / patient
        image(place / f"{patient}_4d.nii.gz", 0, 900, (20, 18, 3, 5))
        for frame in ("frame01", "frame12"):
            image(place / f"{patient}_{frame}.nii.gz", 0, 900)
            label(place / f"{patient}_{frame}_gt.nii.gz", range(4))
        (place / "Info.cfg").write_text("ED: 1\n")


def camus(folder):
    for patient in ("patient0001", "patient0002"):
        for view in ("2CH", "4CH"):
            for part, depth in (("ED", 1), ("ES", 1), ("half_sequence", 4)):
                stem = f"{patient}/{patient}_{view}_{part}"
                image(folder / f"{stem}.nii.gz", 0, 256, (20, 18, depth))
                label(folder / f"{stem}_gt.nii.gz", range(4), (20, 18, depth))


def generic_ct(folder):
    pairs(folder, ["a", "b"], "images", "labels", range(3))


def generic_mr(folder):
    for name in ("a", "b"):
        image(folder / f"{name}.nii.gz", 0, 3000)
        label(folder / f"{name}_seg.nii.gz", range(3))


def generic_image(folder):
    flat = {"shape": (20, 18, 1), "affine": np.diag([-1.0, -1, 1, 1])}
    for name in ("a", "b"):
        image(folder / f"images/{name}.png", 0, 256, **flat)
        label(folder / f"masks/{name}.png", (1, 2), **flat)


# recipe -> folder, training cases, test cases, classes found
RECIPES = {
    "synapse": (synapse, ["case0005"], ["case0008"], 8),
    "demo_abdomen": (synapse, ["case0005", "case0008"], [], 8),
    "amos": (amos, ["amos_0001", "amos_0499"], ["amos_0008"], 15),
    "flare22": (flare22, ["FLARE22_Tr_0001", "FLARE22_Tr_0002"], [], 13),
    "msd": (msd, ["BRATS_001", "BRATS_002"], [], 3),
    "totalsegmentator": (totalsegmentator, ["s0000"], ["s0001"], 8),
    "acdc": (
        acdc,
        [f"patient00{n}_{frame}" for n in (1, 2) for frame in ("frame01", "frame12")],
        ["patient101_frame01", "patient101_frame12"],
        3,
    ),
    "camus": (camus, [f"patient000{n}_{v}CH_E{p}" for n in (1, 2) for v in (2, 4) for p in "DS"], [], 3),
    "generic_ct": (generic_ct, ["a", "b"], [], 2),
    "generic_mr": (generic_mr, ["a", "b"], [], 2),
    "generic_image": (generic_image, ["a", "b"], [], 2),
}


def test_every_recipe_is_tried():
    assert {path.stem for path in shipped("datasets").glob("*.yaml")} == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_prepares_its_data_set(name, tmp_path):
    make, train, test, classes = RECIPES[name]
    make(tmp_path / "src")
    summary = prepare(tmp_path / "src", tmp_path / "dst", name, workers=1)
    sides = {side: [r["name"] for r in summary.records if r["split"] == side] for side in ("train", "test")}
    assert sides == {"train": train, "test": test}
    assert summary.recipe.num_classes == classes
    for record in summary.records:
        assert all(record["voxels"]), f"a class of {name} was not found in {record['name']}"
    for path in (tmp_path / "dst" / "train_npz").iterdir():
        values, _ = read_slice(path)
        assert 0 <= values.min() and values.max() <= 1
    for path in (tmp_path / "dst").glob("test_vol_h5/*"):
        assert Recipe.from_dict(read_case(path).recipe).classes == summary.recipe.classes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_its_data_are_and_how_to_use_it(name):
    text = (shipped("datasets") / f"{name}.yaml").read_text(encoding="utf-8")
    head = text.split("\n\n")[0]
    assert "samlora prepare " in head and f"--dataset {name}" in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert name.startswith(("generic", "demo")) or "Download" in head


def test_patients_stay_on_one_side():
    for name, one, other, stranger in (
        ("acdc", "patient001_frame01", "patient001_frame12", "patient002_frame01"),
        ("camus", "patient0001_2CH_ED", "patient0001_4CH_ES", "patient0011_2CH_ED"),
    ):
        recipe = Recipe.load(name)
        assert recipe.patient_of(one) == recipe.patient_of(other) != recipe.patient_of(stranger)
