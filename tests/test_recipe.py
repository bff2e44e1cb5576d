"""A recipe says what it does, does it, and survives being stored."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from samlora.data.grid import Volume, neighbours
from samlora.data.parts import drop_small_parts
from samlora.data.recipe import Recipe
from samlora.errors import InputError, MissingFileError
from samlora.files import shipped

CT = {"name": "r", "modality": "ct", "window": [-125, 275]}


def test_synapse_is_what_was_published():
    recipe = Recipe.load("synapse")
    assert recipe.window == (-125, 275) and recipe.orientation is None and recipe.slice_axis == 2
    assert recipe.classes == (
        "spleen", "right_kidney", "left_kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas",
    )  # fmt: skip
    assert recipe.num_classes == 8
    assert recipe.map_labels(np.arange(14)).tolist() == [0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0]
    numbers = [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert recipe.test_cases == tuple(f"case{n:04d}" for n in numbers)


@pytest.mark.parametrize("name", sorted(path.stem for path in shipped("datasets").glob("*.yaml")))
def test_shipped_recipes_load_and_survive_json_and_yaml(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict(), sort_keys=False))) == recipe


def test_a_class_may_have_several_values():
    recipe = Recipe.from_dict(CT | {"classes": {"tumour": [2, 3], "liver": 1, "cyst": -4}})
    labels = np.array([[-4, 0, 1], [2, 3, 9]], np.int32)
    mapped = recipe.map_labels(labels)
    assert mapped.tolist() == [[3, 0, 2], [1, 1, 0]] and mapped.dtype == np.uint8
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.map_labels(np.array([[5.0, 7.0]])).tolist() == [[0, 0]]


def test_the_window_becomes_0_to_1():
    hu = np.array([-1000, -125, 75, 275, 3000], np.int16)
    assert Recipe.from_dict(CT).normalise(hu).tolist() == [0, 0, 0.5, 1, 1]
    noise = np.random.default_rng(0).integers(-300, 500, (3, 40, 50)).astype(np.int16)
    published = (np.clip(noise.astype(np.float32), -125, 275) + 125) / 400
    normalised = Recipe.from_dict(CT).normalise(noise)
    assert normalised.dtype == np.float32 and np.array_equal(normalised, published)


def test_percentiles_are_those_of_the_voxels_that_are_not_zero():
    recipe = Recipe("r", "mr", percentiles=(0, 50))
    array = np.array([0, 0, 0, 0, 0, 100, 200, 300], np.uint16)
    assert recipe.normalise(array).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert not recipe.normalise(np.zeros(4)).any() and not recipe.normalise(np.full(4, 7.0)).any()


def test_images_have_the_range_of_their_type():
    recipe = Recipe("r", "image")
    for array in (np.array([0, 51], np.uint8), np.array([0, 13107], np.uint16), np.array([0, 0.2])):
        assert recipe.normalise(array) == pytest.approx(np.array([0, 0.2]))
    with pytest.raises(InputError, match="-3..200 .* set window or percentiles"):
        recipe.normalise(np.array([-3.0, 200.0]))


def test_slices_are_cut_as_samed_does():
    volume = Volume(np.arange(24).reshape(2, 3, 4), np.diag([1.0, 1, 1, 1]))  # RAS
    recipe = Recipe.from_dict(CT)
    assert np.array_equal(recipe.to_slices(volume), volume.array.transpose(2, 1, 0))
    turned = dataclasses.replace(recipe, orientation="LPS").to_slices(volume)
    assert np.array_equal(turned, volume.array[::-1, ::-1].transpose(2, 1, 0))
    assert dataclasses.replace(recipe, slice_axis=0).to_slices(volume).shape == (2, 4, 3)
    assert dataclasses.replace(recipe, slice_axis=1).to_slices(volume).shape == (3, 4, 2)


def test_recipes_tell_what_a_model_would_see_differently():
    recipe = Recipe.from_dict(CT | {"classes": {"liver": 1}})
    elsewhere = Recipe.from_dict(CT | {"name": "b", "classes": {"liver": 6}, "test_cases": ["a"]})
    assert recipe.differences(elsewhere) == [] and recipe != elsewhere
    other = dataclasses.replace(recipe, window=(-160, 240), size=224)
    assert recipe.differences(other) == [
        "window (-125.0, 275.0) here, (-160.0, 240.0) there", "size None here, 224 there",
    ]  # fmt: skip


WRONG = {
    "windows: [0, 1]": ("unknown key windows",),
    "window: [275, -125]": ("window", "low < high"),
    "window: 400": ("window", "400"),
    "window: null": ("ct", "window or percentiles"),
    "percentiles: [0.5, 99.5]": ("both set",),
    "modality: xray": ("xray", "ct, mr, image"),
    "modality: null": ("missing key modality",),
    "orientation: LLS": ("LLS", "L/R"),
    "orientation: 3": ("'3'", "L/R"),
    "slice_axis: 3": ("slice_axis 3", "0, 1, 2"),
    "size: 2.5": ("size 2.5",),
    "keep: some": ("some", "foreground"),
    "classes: [liver, 6]": ("['liver', 6]", "name: value"),
    "classes: {liver: 1.5}": ("liver", "1.5"),
    "classes: {liver: a, spleen: a}": ("liver and spleen", "value a"),
    "window: {level: 40}": ("window", "level"),
    "channels: four": ("four", "neighbours"),
    "channels: [0, -1]": ("-1", "numbers"),
    "channels: []": ("()", "numbers"),
    "mask_threshold: half": ("half", "number"),
    "keep: 1.5": ("1.5", "share"),
    "min_voxels: -1": ("min_voxels -1", "0 or more"),
    "patient: 'p[0-9]+'": ("group",),
    "cases: '['": ("regular expression",),
    "classes: {liver: 0}": ("liver", "0"),
    "classes: {liver: []}": ("liver",),
    "classes: {background: 0}": ("background is class 0",),
    "classes: {liver: 1, spleen: [2, 1]}": ("liver and spleen", "value 1"),
    "classes: {liver: 1, liver: 2}": ("'liver' is given twice",),
    "classes: {1: 1}": ("quote",),
    "test_cases: case0001": ("list",),
    "test_cases: [1, 2]": ("quote",),
    "[a": ("not readable as YAML",),
    "- a": ("not readable as YAML",),
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_recipes_are_named_in_one_line(line, tmp_path):
    given = {key: str(value) for key, value in CT.items()}
    given.pop(line.split(":")[0], None)
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*(f"{key}: {value}" for key, value in given.items()), line]))
    with pytest.raises(InputError) as error:
        Recipe.load(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(part in message for part in WRONG[line]), message


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path):
    for name in ("sinapse", tmp_path / "none.yaml"):
        with pytest.raises(MissingFileError, match="generic_ct, .*synapse"):
            Recipe.load(name)
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(InputError, match="a mapping"):
        Recipe.load(tmp_path / "empty.yaml")


def test_importing_recipes_loads_no_heavy_library():
    heavy = "{'torch', 'nibabel', 'SimpleITK', 'h5py', 'scipy', 'tqdm', 'monai'}"
    code = f"import sys, samlora.data.recipe, samlora.data.prepare; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_level_and_width_are_a_window():
    values = {"name": "x", "modality": "ct", "window": {"level": 40, "width": 400}}
    assert Recipe.from_dict(values).window == (-160, 240)


def test_a_plain_list_of_classes_means_the_names_of_the_data_set():
    recipe = Recipe.from_dict({"name": "x", "modality": "image", "classes": ["liver", "spleen"]})
    assert recipe.label_values == (("liver",), ("spleen",))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(InputError, match="'liver' is not known here"):
        recipe.map_labels(np.zeros((2, 2), np.uint8))


def test_patients_are_found_in_the_names_of_cases():
    recipe = Recipe(name="x", modality="image", patient=r"(patient\d+)_frame\d+")
    assert recipe.patient_of("patient001_frame12") == "patient001"
    assert recipe.patient_of("phantom") == "phantom"


def image_recipe(**changes):
    return Recipe(name="x", modality="image", **changes)


def test_channels_become_what_the_recipe_asks_for():
    colours = np.random.default_rng(0).integers(0, 256, (5, 4, 1, 3)).astype(np.uint8)  # i, j, k, c
    gray = Volume(colours[..., 0], np.diag([-1, -1, 1, 1]), path="a.png")
    colour = Volume(colours, np.diag([-1, -1, 1, 1]), path="b.png")
    np.testing.assert_allclose(image_recipe().image_stack(gray)[0], colours[:, :, 0, 0].T / 255, atol=1e-6)
    luma = colours[:, :, 0] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(image_recipe().image_stack(colour)[0], luma.T / 255, atol=1e-5)
    rgb = image_recipe(channels="rgb")
    np.testing.assert_allclose(rgb.image_stack(colour)[0], colours[:, :, 0].transpose(1, 0, 2) / 255, atol=1e-6)
    assert (rgb.image_stack(gray) == rgb.image_stack(gray)[..., :1]).all()
    assert rgb.image_stack(gray).shape == (1, 4, 5, 3)


def test_chosen_channels_keep_their_order_and_their_own_percentiles():
    rng = np.random.default_rng(0)
    array = rng.uniform(1, 2, (6, 5, 4, 4)) * [1, 10, 100, 1000]
    recipe = Recipe(name="x", modality="mr", percentiles=(0, 100), channels=[3, 1])
    stack = recipe.image_stack(Volume(array, np.eye(4)))
    assert stack.shape == (4, 5, 6, 2) and recipe.in_channels == 2
    alone = Recipe(name="x", modality="mr", percentiles=(0, 100))
    np.testing.assert_array_equal(stack[..., 0], alone.image_stack(Volume(array[..., 3], np.eye(4))))
    assert stack.min() == 0 and stack.max() == 1


@pytest.mark.parametrize(
    "recipe, shape, said",
    [
        (
            Recipe(name="x", modality="mr", percentiles=(0, 100)),
            (4, 4, 4, 4),
            r"4 channels; .*channels: \[0, 1, 2, 3\]",
        ),
        (
            Recipe(name="x", modality="mr", percentiles=(0, 100), channels=[4]),
            (4, 4, 4, 4),
            "has 4 channels, .*counted",
        ),
        (Recipe(name="x", modality="ct", window=(-160, 240)), (4, 4, 4), "no Hounsfield units"),
    ],
)
def test_volumes_that_do_not_fit_are_named(recipe, shape, said):
    with pytest.raises(InputError, match=f"scan.nii.gz: .*{said}"):
        recipe.image_stack(Volume(np.ones(shape, np.uint8), np.eye(4), path="scan.nii.gz"))


def test_neighbours_are_the_slices_before_and_after():
    stack = np.arange(4.0)[:, None, None] * np.ones((2, 3))
    assert neighbours(stack, [0, 2, 3])[:, 0, 0].tolist() == [[0, 0, 1], [1, 2, 3], [2, 3, 3]]


def test_small_parts_are_dropped_in_3d_and_then_in_slices():
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[:, :3, :3] = 1  # 36 voxels
    labels[1, 6, 6] = 1  # a part of one voxel
    labels[2, 3, 0] = 1  # belongs to the first part
    labels[3, 5:7, 5:7] = 2
    kept = drop_small_parts(labels, min_voxels=4, min_pixels=0)
    assert kept[1, 6, 6] == 0 and np.count_nonzero(kept) == np.count_nonzero(labels) - 1
    kept = drop_small_parts(labels, min_voxels=0, min_pixels=5)
    assert np.count_nonzero(kept == 2) == 0 and np.count_nonzero(kept == 1) == 37


def body_recipe(**changes):
    return Recipe(name="x", modality="ct", window=(-125, 275), crop="body", **changes)


@pytest.mark.parametrize("size", [60, 512])
def test_the_body_is_found_without_table_and_arms(size):
    stack = np.zeros((3, size, size), np.float32)
    unit = size // 20
    stack[:, 5 * unit : 12 * unit, 6 * unit : 15 * unit] = 0.5  # the body
    stack[:, 7 * unit : 9 * unit, unit : 2 * unit] = 0.5  # an arm
    stack[:, 15 * unit, :] = 0.9  # the table, a line
    top, bottom, left, right = body_recipe().crop_box(stack)
    slack = 2 * max(1, size // 128)
    for found, wanted in ((top, 5), (left, 6)):
        assert wanted * unit - slack <= found <= wanted * unit
    for found, wanted in ((bottom, 12), (right, 15)):
        assert wanted * unit <= found <= wanted * unit + slack
    assert body_recipe().crop_box(np.zeros((2, 8, 8))) is None
    assert Recipe(name="x", modality="ct", window=(-125, 275)).crop_box(stack) is None


def ellipse(size, centre, half_axes):
    rows, cols = np.mgrid[:size, :size]
    return ((rows - centre[0]) / half_axes[0]) ** 2 + ((cols - centre[1]) / half_axes[1]) ** 2 <= 1


def test_an_arm_that_touches_the_body_is_cut_off():
    """The skin of arms beside the trunk touches it in most scans of patients who keep them down."""
    stack = np.zeros((3, 256, 256), np.float32)
    stack[:, ellipse(256, (128, 128), (55, 75))] = 0.5  # 73..183 x 53..203
    stack[:, ellipse(256, (110, 128), (20, 50))] = 0  # lungs
    stack[1, ellipse(256, (140, 30), (25, 24))] = 0.5  # an arm, which touches the trunk on one slice
    top, bottom, left, right = body_recipe().crop_box(stack)
    assert (stack[1, 140, 10:180] > 0).all(), "the arm should touch the trunk"
    for found, wanted in ((top, 73), (left, 53), (bottom, 184), (right, 204)):
        assert abs(found - wanted) <= 6


def test_both_legs_are_kept():
    stack = np.zeros((2, 256, 256), np.float32)
    for centre in ((128, 80), (128, 170)):
        stack[:, ellipse(256, centre, (35, 35))] = 0.5
    box = body_recipe().crop_box(stack)
    assert np.abs(np.subtract(box, (93, 164, 45, 206))).max() <= 6


def test_a_body_that_reaches_beyond_the_field_of_view_is_kept_whole():
    stack = np.full((2, 64, 64), 0.5, np.float32)
    assert body_recipe().crop_box(stack) == (0, 64, 0, 64)


def test_another_crop_is_another_recipe():
    assert body_recipe().differences(body_recipe()) == []
    (difference,) = body_recipe().differences(Recipe(name="x", modality="ct", window=(-125, 275)))
    assert "crop" in difference
    with pytest.raises(InputError, match="crop 'head'"):
        Recipe(name="x", modality="ct", window=(-125, 275), crop="head")
