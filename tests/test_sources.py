"""Images and labels of a case become a volume and a map of classes, whatever files they are stored in."""

import numpy as np
import pytest

from samlora.data.folders import Pair
from samlora.data.grid import Volume
from samlora.data.layouts import find_pairs
from samlora.data.recipe import Recipe
from samlora.data.sources import label_values, read_image, read_label, resolve_classes
from samlora.data.volume import write_volume
from samlora.errors import InputError

AFFINE = np.diag([-1.0, -1, 2, 1])
CLASSES = dict(percentiles=(0, 100), classes=("a", "b"), label_values=((1,), (2,)))


def put(path, array, affine=AFFINE, **options):
    write_volume(Volume(np.asarray(array), affine, 1, 1, **options), path)
    return path


def test_channels_are_stacked_on_one_grid(tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
    one = put(tmp_path / "a_0000.nii", array)
    turned = put(
        tmp_path / "a_0001.nii", array[::-1] + 100, AFFINE @ [[-1, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    image = read_image(Pair("a", (one, turned), None))
    assert image.array.shape == (5, 4, 3, 2) and np.array_equal(image.array[..., 1], array + 100)
    other = put(tmp_path / "a_0002.nii", array[:-1])
    with pytest.raises(InputError, match="a_0002.nii: its grid .* resample the channels of a case onto one grid"):
        read_image(Pair("a", (one, other), None))


def test_a_label_map_becomes_classes(tmp_path):
    image = put(tmp_path / "i.nii", np.zeros((5, 4, 3), np.int16))
    values = np.zeros((5, 4, 3), np.uint8)
    values[0], values[1], values[2] = 1, 2, 7
    pair = Pair("x", (image,), put(tmp_path / "l.nii", values))
    label, remarks = read_label(pair, read_image(pair), Recipe("r", "mr", **CLASSES))
    assert np.array_equal(label.array, np.where(values == 7, 0, values)) and label.array.dtype == np.uint8
    assert remarks == ["label values that no class lists became background: 7"]
    assert label_values(pair) == {1: 12, 2: 12, 7: 12}


def test_masks_are_painted_in_the_order_of_the_classes(tmp_path):
    image = put(tmp_path / "i.nii", np.zeros((10, 4, 3), np.int16))
    masks = {}
    for name, (start, stop), value in (("liver", (0, 4), 255), ("left", (3, 6), 1), ("right", (7, 9), 0.6)):
        array = np.zeros((10, 4, 3), np.float32)
        array[start:stop] = value
        masks[name] = (put(tmp_path / f"{name}.nii", array),)
    pair = Pair("x", (image,), masks)
    recipe = Recipe(
        "r", "mr", percentiles=(0, 100), classes=("organ", "pair"), label_values=(("liver",), ("left", "right"))
    )
    label, remarks = read_label(pair, read_image(pair), recipe)
    assert label.array[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2, 0, 2, 2, 0]
    assert remarks == ["organ and pair overlap; the voxels became pair, more than 10 % of it"]
    assert label_values(pair) == {"liver": 48, "left": 36, "right": 24}
    absent = Pair("y", (image,), {"liver": masks["liver"]})
    assert set(np.unique(read_label(absent, read_image(absent), recipe)[0].array)) == {0, 1}


def test_masks_of_pictures_have_their_size(tmp_path):
    image = put(tmp_path / "i.png", np.zeros((9, 7, 1), np.uint8))
    pair = Pair("x", (image,), put(tmp_path / "m.png", np.ones((7, 9, 1), np.uint8)))
    with pytest.raises(InputError, match="m.png: 7 x 9 pixels .*i.png has 9 x 7; save the mask"):
        read_label(pair, read_image(pair), Recipe("r", "image", **CLASSES))
    scan = Pair(
        "x",
        (put(tmp_path / "i.nii", np.zeros((9, 7, 2), np.int16)),),
        put(tmp_path / "m.npy", np.ones((9, 7, 2), np.uint8)),
    )
    with pytest.raises(InputError, match="its grid"):  # which way an array runs in space is not known
        read_label(scan, read_image(scan), Recipe("r", "image", **CLASSES))


def layout_of(tmp_path, text, classes=None):
    for file in text.split():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    layout = find_pairs(tmp_path)
    layout.classes = classes or {}
    return layout


def chosen(**classes):
    return Recipe.from_dict({"name": "r", "modality": "image", "classes": classes})


def test_names_become_what_the_labels_have(tmp_path):
    maps = layout_of(tmp_path / "a", "images/a.nii labels/a.nii", {"right kidney": [2], "tumour": [3, 4]})
    recipe = resolve_classes(chosen(kidney="Right_Kidney", rest=["tumour", 9]), maps)
    assert recipe.label_values == ((2,), (3, 4, 9))
    assert resolve_classes(chosen(a=5), maps).label_values == ((5,),)
    masks = layout_of(tmp_path / "b", "images/a.nii labels/a/kidney_right.nii labels/a/liver.nii")
    assert resolve_classes(chosen(k="kidney right", l="liver"), masks).label_values == (("kidney_right",), ("liver",))


@pytest.mark.parametrize(
    "text, classes, given, said",
    [
        ("images/a.nii labels/a.nii", {"liver": [1]}, {"x": "livr"}, "'livr'; did you mean 'liver'"),
        ("images/a.nii labels/a.nii", {}, {"x": "liver"}, "no dataset.json says which value 'liver' has"),
        ("images/a.nii labels/a/liver.nii", {}, {"x": "lever"}, "no masks named 'lever'; did you mean 'liver'"),
        ("images/a.nii labels/a/liver.nii", {}, {"x": 1}, "every structure has masks of its own; give their names"),
        ("images/a.nii labels/a.nii", {"a": [1, 2], "b": [2]}, {}, "regions overlap"),
    ],
)
def test_unknown_names_are_told_with_the_closest(text, classes, given, said, tmp_path):
    with pytest.raises(InputError) as error:
        resolve_classes(chosen(**given), layout_of(tmp_path, text, classes))
    assert said in str(error.value)


def test_classes_come_from_the_data_where_the_recipe_has_none(tmp_path):
    bare, maps = chosen(), layout_of(tmp_path / "a", "images/a.nii labels/a.nii", {"x": [2], "y": [4, 5]})
    recipe = resolve_classes(bare, maps)
    assert (recipe.classes, recipe.label_values) == (("x", "y"), ((2,), (4, 5)))
    maps.classes = {}
    recipe = resolve_classes(bare, maps, lambda pairs: [{7: 1, -1: 5, 3: 1} for _ in pairs])
    assert (recipe.classes, recipe.label_values) == (("label_3", "label_7"), ((3,), (7,)))
    with pytest.raises(InputError, match="labels: 0 different label values"):
        resolve_classes(bare, maps, lambda pairs: [{}])
    soft = Recipe("r", "image", mask_threshold=127)
    assert resolve_classes(soft, maps).classes == ("foreground",)
    named = Recipe.from_dict({"name": "r", "modality": "image", "mask_threshold": 127, "classes": ["ring"]})
    assert resolve_classes(named, maps).label_values == ((1,),)
    with pytest.raises(InputError, match="makes one class of label maps, not 2 classes"):
        resolve_classes(Recipe("r", "image", mask_threshold=127, classes=("a", "b"), label_values=((1,), (2,))), maps)
    masks = layout_of(tmp_path / "b", "images/a.nii labels/a/b.nii labels/a/a.nii")
    assert resolve_classes(bare, masks).label_values == (("a",), ("b",))


REAL = {  # folder -> mask_threshold, cases, test cases, class -> voxels
    "ct_png": (
        None,
        2,
        0,
        {"aorta": 713, "inferior_vena_cava": 629, "liver": 20023, "spleen": 1473, "colon": 223, "femur_right": 276}
        | {"gluteus_maximus_left": 830, "gluteus_maximus_right": 1006, "hip_left": 744, "hip_right": 688},
    ),
    "mr/brain_tumour": (None, 1, 0, {"label_1": 4137}),
    "mr/prostate_png": (127, 3, 0, {"foreground": 10827 + 9061 + 3233}),
    "mr/tiny_big_endian": (None, 1, 0, {"label_1": 330}),
    "ultrasound/busi": (None, 1, 0, {"label_1": 246}),
    "ultrasound/nerves_vessels": (None, 49, 8, {"label_1": 334245 + 67999, "label_2": 353717 + 164143}),
    "xray/hip": (0.5, 3, 0, {"foreground": 15589 + 13760 + 12054}),
    "dicom_ct": (None, 1, 0, {"liver": 366708, "spleen": 130634, "aorta": 11723}),
}


@pytest.mark.real
@pytest.mark.parametrize("folder", REAL)
def test_real_labels_are_what_their_readme_says(folder, real_data):
    threshold, cases, test_cases, voxels = REAL[folder]
    layout = find_pairs(real_data / folder)
    assert (len(layout.pairs), sum(pair.test for pair in layout.pairs)) == (cases, test_cases)
    recipe = resolve_classes(Recipe("r", "image", mask_threshold=threshold), layout)
    counts = np.zeros(recipe.num_classes + 1, int)
    for pair in layout.pairs:
        label, remarks = read_label(pair, read_image(pair), recipe)
        counts += np.bincount(label.array.ravel(), minlength=len(counts))
        assert not remarks
    found = dict(zip(recipe.classes, counts[1:].tolist()))
    assert {name: found[name] for name in voxels} == voxels
