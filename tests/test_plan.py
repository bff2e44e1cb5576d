"""`samlora plan` says what is in a folder and writes a recipe that can be used as it stands."""

import json

import numpy as np
import pytest

from samlora.cli import main
from samlora.data.grid import Volume
from samlora.data.layouts import find_pairs
from samlora.data.plan import plan, write_plan
from samlora.data.recipe import Recipe
from samlora.data.sources import read_image, read_label, resolve_classes
from samlora.data.volume import write_volume
from samlora.errors import InputError

FLAT = np.diag([-1.0, -1, 1, 1])


def put(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array)
    affine = (FLAT if path.suffix in (".png", ".npy") else np.diag([-1.0, -1, 3, 1])) if affine is None else affine
    write_volume(Volume(array, affine, 1, 1), path)


def ct(shape=(24, 22, 6)):
    array = np.full(shape, -1000, np.int16)
    array[4:-4, 4:-4] = np.random.default_rng(0).integers(-100, 200, array[4:-4, 4:-4].shape)
    return array


def block(shape, value=1, dtype=np.uint8):
    array = np.zeros(shape, dtype)
    array[6:12, 6:12, -1] = value
    return array


def cases(folder, image, label, count=3, ending=".nii.gz", affine=None, name="p{}"):
    for n in range(count):
        put(folder / "images" / f"{name.format(n)}{ending}", image, affine)
        put(folder / "labels" / f"{name.format(n)}{ending}", label, affine)
    return folder


def choices(folder, **expected):
    made = plan(folder)
    assert {key: getattr(made.recipe, key) for key in expected} == expected, str(made)
    assert made.recipe == Recipe.from_dict(made.recipe.to_dict())
    return made


def test_a_ct(tmp_path):
    made = choices(
        cases(tmp_path, ct(), block((24, 22, 6), 5)),
        modality="ct",
        window=(-160, 240),
        percentiles=None,
        orientation="LPS",
        slice_axis=2,
        crop="body",
        channels="repeat",
        keep=0.1,
        classes=("label_5",),
        label_values=((5,),),
    )
    text = str(made)
    assert "3 cases; images + labels" in text and "axial: slices are 3 mm apart, pixels 1 mm" in text
    assert "label_5             5      3     108        0.108" in text
    assert "-500 or less" in text and "24 x 22 x 6" in text


def test_the_window_follows_the_names(tmp_path):
    for name, window in (("lung_left", (-1000, 400)), ("femur_right", (-500, 1300)), ("liver", (-160, 240))):
        folder = tmp_path / name
        put(folder / "s1" / "ct.nii.gz", ct())
        put(folder / "s1" / "segmentations" / f"{name}.nii.gz", block((24, 22, 6)))
        choices(folder, window=window, classes=(name,), label_values=((name,),))


def test_an_mr_with_thick_sagittal_slices(tmp_path):
    rng = np.random.default_rng(0)
    image, affine = (
        rng.integers(0, 900, (20, 21, 7)).astype(np.uint16),
        np.array([[0, 0, -4, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]]),
    )
    made = choices(
        cases(tmp_path, image, block((20, 21, 7)), affine=affine),
        modality="mr",
        percentiles=(0.5, 99.5),
        slice_axis=0,
        orientation="LPS",
        crop=None,
    )
    assert "sagittal: slices are 4 mm apart" in str(made)


def test_a_few_negative_values_make_no_ct(tmp_path):
    image = np.random.default_rng(0).integers(0, 900, (20, 20, 20)).astype(np.int16)
    image[0, 0, :5] = -610
    choices(cases(tmp_path, image, block(image.shape)), modality="mr", size=None)


def test_a_mixture_of_ct_and_mr_is_told(tmp_path):
    cases(tmp_path, ct(), block((24, 22, 6)))
    put(tmp_path / "images" / "p1.nii.gz", np.abs(ct()))
    assert "2 of 3 images look like CT, the others do not; set cases" in str(plan(tmp_path))


def test_channels_have_their_names(tmp_path):
    four = np.random.default_rng(0).integers(0, 900, (20, 18, 3, 4)).astype(np.int16)
    cases(tmp_path, four, block((20, 18, 3), 2))
    (tmp_path / "images").rename(tmp_path / "imagesTr")
    (tmp_path / "labels").rename(tmp_path / "labelsTr")
    values = {
        "modality": {"0": "FLAIR", "1": "T1", "2": "T1c", "3": "T2"},
        "labels": {"0": "bg", "1": "a b", "2": "no"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(values | {"training": []}))
    made = choices(tmp_path, channels=(0, 1, 2, 3), modality="mr", classes=("a b", "no"), label_values=((1,), (2,)))
    assert "0 FLAIR, 1 T1, 2 T1c, 3 T2" in made.yaml() and "in no case: a b" in str(made)


def test_regions_and_unnamed_values_are_told(tmp_path):
    cases(tmp_path, ct(), block((24, 22, 6), 3))
    (tmp_path / "images").rename(tmp_path / "imagesTr")
    (tmp_path / "labels").rename(tmp_path / "labelsTr")
    for labels, classes, said in (
        ({"background": 0, "whole": [1, 3], "core": [3]}, ("label_3",), "unites labels into regions (whole, core)"),
        ({"background": 0, "liver": 1}, ("liver", "label_3"), "dataset.json does not name: 3"),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": {"0": "CT"}}))
        assert said in str(choices(tmp_path, classes=classes))


@pytest.mark.parametrize(
    "values, threshold, classes",
    [
        ((0, 254, 255), 127, ("foreground",)),
        ((0, 255), None, ("label_255",)),
        ((0, 1, 2), None, ("label_1", "label_2")),
        ((0, 1, 255), None, ("label_1", "label_255")),
        ((0.0, 0.3, 1.0), 0.5, ("foreground",)),
    ],
)
def test_masks_say_whether_they_need_a_threshold(values, threshold, classes, tmp_path):
    mask = np.resize(np.asarray(values, np.float32 if 0.3 in values else np.uint8), (20, 18, 1))
    image = np.arange(360, dtype=np.uint16).reshape(20, 18, 1).astype(np.uint8)
    ending = ".npy" if 0.3 in values else ".png"
    for n in range(3):
        put(tmp_path / "images" / f"{n}.png", image)
        put(tmp_path / "masks" / f"{n}{ending}", mask)
    choices(tmp_path, modality="image", mask_threshold=threshold, classes=classes, orientation=None, channels="repeat")


def test_pictures_are_coloured_or_not(tmp_path):
    rng = np.random.default_rng(0)
    gray = np.repeat(rng.integers(0, 255, (20, 18, 1, 1)).astype(np.uint8), 3, axis=3)
    for name, image, channels in (
        ("gray", gray, "repeat"),
        ("colour", rng.integers(0, 255, gray.shape).astype(np.uint8), "rgb"),
    ):
        choices(cases(tmp_path / name, image, block((20, 18, 1)), ending=".png"), channels=channels, modality="image")


def test_twelve_bits_in_sixteen_get_percentiles(tmp_path):
    image = np.arange(360, dtype=np.uint16).reshape(20, 18, 1) * 11
    made = choices(cases(tmp_path, image, block(image.shape), ending=".png"), modality="image", percentiles=(0.5, 99.5))
    assert "fill the range of their type (uint16) only in part" in made.yaml()


def test_patients_are_guessed_from_names(tmp_path):
    image, label = np.zeros((20, 18, 1), np.uint8), block((20, 18, 1))
    for n in range(4):
        cases(tmp_path / "slices", image, label, 2, ".png", name=f"s{n}_{{}}")
    made = plan(tmp_path / "slices")
    assert made.recipe.patient_of("s2_0") == made.recipe.patient_of("s2_1") == "s2"
    assert "s0_0 s0_1 may be the same patient" in str(made)
    for name in ("FLARE22_Tr_{:04}", "case{}"):
        assert plan(cases(tmp_path / name[:4], image, label, 3, ".png", name=name)).recipe.patient is None


def test_broken_files_are_listed_and_the_others_go_on(tmp_path):
    cases(tmp_path, ct(), block((24, 22, 6)))
    (tmp_path / "labels" / "p0.nii.gz").write_text("cut")
    put(tmp_path / "images" / "p1.nii.gz", ct((24, 22, 5)))
    made = plan(tmp_path)
    assert len(made.broken) == 2 and made.recipe.classes == ("label_1",)
    assert "cannot be used: " in str(made) and "p0.nii.gz: cannot be read" in str(made) and "its grid" in str(made)
    for n in (1, 2):
        (tmp_path / "labels" / f"p{n}.nii.gz").write_text("cut")
    with pytest.raises(InputError, match="p0.nii.gz: cannot be read"):
        plan(tmp_path)


def test_images_are_no_labels(tmp_path):
    many = np.arange(1200, dtype=np.int16).reshape(20, 20, 3)
    with pytest.raises(InputError, match="1199 different values in the labels"):
        plan(cases(tmp_path, ct((20, 20, 3)), many))


def test_the_recipe_is_written_once(tmp_path):
    made = plan(cases(tmp_path / "my data", ct(), block((24, 22, 6))))
    file = tmp_path / "mine.yaml"
    write_plan(made, file)
    assert Recipe.load(file) == made.recipe and made.recipe.name == "my_data"
    assert f"samlora prepare {tmp_path / 'my data'} -o data/my_data --dataset {file}" in file.read_text()
    with pytest.raises(InputError, match="mine.yaml: is there already"):
        write_plan(made, file)
    with pytest.raises(InputError, match="ends in .yaml"):
        write_plan(made, tmp_path / "mine.txt")


def test_the_command_plans_and_the_next_one_prepares(tmp_path, capsys):
    source, file = cases(tmp_path / "src", ct(), block((24, 22, 6))), tmp_path / "mine.yaml"
    assert main(["plan", str(source), "-o", str(file)]) == 0
    assert "modality     ct" in capsys.readouterr().out
    assert main(["prepare", str(source), "-o", str(tmp_path / "dst"), "--dataset", str(file), "--workers", "1"]) == 0
    assert main(["plan", str(source), "-o", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize(
    "folder, expected",
    {
        "ct_png": {"modality": "image", "channels": "repeat", "mask_threshold": None},
        "dicom_ct": {"modality": "ct", "window": (-160, 240), "slice_axis": 2},
        "mr/brain_tumour": {"modality": "mr", "slice_axis": 2, "orientation": "LPS"},
        "mr/prostate_png": {"modality": "image", "mask_threshold": 127},
        "mr/tiny_big_endian": {"modality": "mr", "keep": 0.1},
        "photos/rings": {"modality": "image", "channels": "rgb", "mask_threshold": 127, "size": 512},
        "ultrasound/busi": {"modality": "image", "channels": "repeat", "classes": ("label_1",)},
        "ultrasound/nerves_vessels": {"modality": "image", "channels": "repeat", "classes": ("label_1", "label_2")},
        "xray/hip": {"modality": "image", "mask_threshold": 0.5, "percentiles": None},
    }.items(),
)
def test_real_folders_get_recipes_that_fit(folder, expected, real_data):
    made = choices(real_data / folder, **expected)
    layout = find_pairs(real_data / folder)
    recipe = resolve_classes(made.recipe, layout)
    voxels = np.zeros(recipe.num_classes + 1, int)
    for pair in layout.pairs:
        image = read_image(pair)
        label, _ = read_label(pair, image, recipe)
        case = recipe.to_case(image, label, pair.name)
        assert case.image.max() <= 1 and case.label.shape == case.image.shape[:3]
        voxels += np.bincount(label.array.ravel(), minlength=len(voxels))
    assert voxels[1:].tolist() == [found.voxels for found in made.classes]
