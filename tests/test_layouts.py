"""Cases are found in folders as the world has them, by names alone; what is ambiguous is an error that says so."""

import json

import numpy as np
import pytest

from samlora.data.folders import Pair
from samlora.data.grid import Volume
from samlora.data.layouts import find_pairs
from samlora.data.recipe import Recipe
from samlora.data.sources import find_images, label_values, read_image, read_label, resolve_classes
from samlora.data.volume import write_volume
from samlora.errors import InputError, MissingFileError


def grow(folder, files):
    """Empty files: finding cases opens none of them."""
    for file in files.split():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def shown(pairs, folder):
    """Case -> its files, "*" in front of test cases."""

    def name(path):
        return str(path.relative_to(folder))

    return {
        ("*" if p.test else "") + p.name: (
            *map(name, p.images),
            {s: tuple(map(name, fs)) for s, fs in p.label.items()} if isinstance(p.label, dict) else name(p.label),
        )
        for p in pairs
    }


LAYOUTS = {
    "BTCV": (
        "img/img0001.nii.gz label/label0001.nii.gz img/img0038.nii.gz label/label0038.nii.gz",
        {
            "case0001": ("img/img0001.nii.gz", "label/label0001.nii.gz"),
            "case0038": ("img/img0038.nii.gz", "label/label0038.nii.gz"),
        },
    ),
    "names that differ in their endings": (
        "images/a_0000.nii.gz masks/a.nii images/b.png masks/b_seg.png images/c_0001.nrrd masks/c_0001.mha "
        "images/d_image.nii masks/d_label.nii images/e.jpg masks/e_msk.png images/._e.jpg",
        {
            "a": ("images/a_0000.nii.gz", "masks/a.nii"),
            "b": ("images/b.png", "masks/b_seg.png"),
            "c_0001": ("images/c_0001.nrrd", "masks/c_0001.mha"),
            "d": ("images/d_image.nii", "masks/d_label.nii"),
            "e": ("images/e.jpg", "masks/e_msk.png"),
        },
    ),
    "folders of other names": (
        "JPEGImages/a.jpg SegmentationClass/a.png",
        {"a": ("JPEGImages/a.jpg", "SegmentationClass/a.png")},
    ),
    "numbered channels": (
        "imagesTr/p1_0000.nii.gz imagesTr/p1_0001.nii.gz labelsTr/p1.nii.gz "
        "imagesTr/p2_0001.nii.gz imagesTr/p2_0000.nii.gz labelsTr/p2.nii.gz",
        {
            "p1": ("imagesTr/p1_0000.nii.gz", "imagesTr/p1_0001.nii.gz", "labelsTr/p1.nii.gz"),
            "p2": ("imagesTr/p2_0000.nii.gz", "imagesTr/p2_0001.nii.gz", "labelsTr/p2.nii.gz"),
        },
    ),
    "validation and test, as far as they have labels": (
        "imagesTr/a.nii labelsTr/a.nii imagesVa/b.nii labelsVa/b.nii imagesTs/c.nii labelsTs/readme.txt",
        {"a": ("imagesTr/a.nii", "labelsTr/a.nii"), "*b": ("imagesVa/b.nii", "labelsVa/b.nii")},
    ),
    "one mask for each structure, by name": (
        "images/s_1.png masks/s_1_liver_000.png masks/s_1_liver_001.png masks/s_1_hip_left.png "
        "images/s_1_2.png masks/s_1_2_liver_000.png",
        {
            "s_1": (
                "images/s_1.png",
                {
                    "hip_left": ("masks/s_1_hip_left.png",),
                    "liver": ("masks/s_1_liver_000.png", "masks/s_1_liver_001.png"),
                },
            ),
            "s_1_2": ("images/s_1_2.png", {"liver": ("masks/s_1_2_liver_000.png",)}),
        },
    ),
    "one mask for each structure, in a folder per case": (
        "images/a.nii labels/a/liver.nii labels/a/spleen.nii images/b.nii labels/b/liver.nii",
        {
            "a": ("images/a.nii", {"liver": ("labels/a/liver.nii",), "spleen": ("labels/a/spleen.nii",)}),
            "b": ("images/b.nii", {"liver": ("labels/b/liver.nii",)}),
        },
    ),
    "train and test": (
        "train/images/a.png train/masks/a.png test/images/b.png test/masks/b.png",
        {"a": ("train/images/a.png", "train/masks/a.png"), "*b": ("test/images/b.png", "test/masks/b.png")},
    ),
    "train and test with the same names": (
        "train/images/1.png train/masks/1.png val/images/1.png val/masks/1.png",
        {
            "train_1": ("train/images/1.png", "train/masks/1.png"),
            "*val_1": ("val/images/1.png", "val/masks/1.png"),
        },
    ),
    "train, val and test": (
        "d/train/images/a.png d/train/masks/a.png d/val/images/b.png d/val/masks/b.png "
        "d/test/images/c.png d/test/masks/c.png",
        {
            "a": ("d/train/images/a.png", "d/train/masks/a.png"),
            "b": ("d/val/images/b.png", "d/val/masks/b.png"),
            "*c": ("d/test/images/c.png", "d/test/masks/c.png"),
        },
    ),
    "train and test within images": (
        "images/train/a.png labels/train/a.png images/val/b.png labels/val/b.png",
        {"a": ("images/train/a.png", "labels/train/a.png"), "*b": ("images/val/b.png", "labels/val/b.png")},
    ),
    "a folder per case, masks beside the image": (
        "s01/ct.nii.gz s01/segmentations/liver.nii.gz s02/ct.nii.gz s02/segmentations/liver.nii.gz",
        {
            "s01": ("s01/ct.nii.gz", {"liver": ("s01/segmentations/liver.nii.gz",)}),
            "s02": ("s02/ct.nii.gz", {"liver": ("s02/segmentations/liver.nii.gz",)}),
        },
    ),
    "a folder per case, frames and films": (
        "training/p1/p1_4d.nii.gz training/p1/p1_frame01.nii.gz training/p1/p1_frame01_gt.nii.gz training/p1/Info.cfg "
        "testing/p2/p2_frame09.nii.gz testing/p2/p2_frame09_gt.nii.gz",
        {
            "p1_frame01": ("training/p1/p1_frame01.nii.gz", "training/p1/p1_frame01_gt.nii.gz"),
            "*p2_frame09": ("testing/p2/p2_frame09.nii.gz", "testing/p2/p2_frame09_gt.nii.gz"),
        },
    ),
    "a folder per case, files that say what they are": (
        "c1/img.npy c1/seg.npy c1/scribble_0.npy c2/imaging.nii.gz c2/segmentation.nii.gz c3/c3.nii.gz c3/GT.nii.gz",
        {
            "c1": ("c1/img.npy", "c1/seg.npy"),
            "c2": ("c2/imaging.nii.gz", "c2/segmentation.nii.gz"),
            "c3": ("c3/c3.nii.gz", "c3/GT.nii.gz"),
        },
    ),
    "weightings": (
        "b/b1/b1_t1ce.nii.gz b/b1/b1_flair.nii.gz b/b1/b1_seg.nii.gz b/b2/flair.nii.gz b/b2/t1ce.nii.gz b/b2/seg.nii.gz",
        {
            "b1": ("b/b1/b1_flair.nii.gz", "b/b1/b1_t1ce.nii.gz", "b/b1/b1_seg.nii.gz"),
            "b2": ("b/b2/flair.nii.gz", "b/b2/t1ce.nii.gz", "b/b2/seg.nii.gz"),
        },
    ),
    "side by side": (
        "brain1_image.nrrd brain1_label.nrrd b2.nii b2_label.nii.gz volume-3.nii segmentation-3.nii extra.nii",
        {
            "b2": ("b2.nii", "b2_label.nii.gz"),
            "brain1": ("brain1_image.nrrd", "brain1_label.nrrd"),
            "volume-3": ("volume-3.nii", "segmentation-3.nii"),
        },
    ),
    "several masks of one object": (
        "benign/n_1.png benign/n_1_mask.png benign/n_1_mask_1.png normal/n_2.png normal/n_2_mask.png",
        {
            "n_1": ("benign/n_1.png", {"mask": ("benign/n_1_mask.png", "benign/n_1_mask_1.png")}),
            "n_2": ("normal/n_2.png", {"mask": ("normal/n_2_mask.png",)}),
        },
    ),
    "the only two files": (
        "a/scan_of_a.nii a/seg_dicom_a.nii",
        {"scan_of_a": ("a/scan_of_a.nii", "a/seg_dicom_a.nii")},
    ),
    "images beside a folder of masks": ("a.png b.png masks/a.png", {"a": ("a.png", "masks/a.png")}),
    "data sets in a folder": (
        "x/images/1.png x/masks/1.png y/images/1.png y/masks/1.png",
        {"x_1": ("x/images/1.png", "x/masks/1.png"), "y_1": ("y/images/1.png", "y/masks/1.png")},
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_cases_are_found(kind, tmp_path):
    files, cases = LAYOUTS[kind]
    layout = find_pairs(grow(tmp_path, files))
    assert shown(layout.pairs, tmp_path) == cases and layout.kind
    assert [p.name for p in layout.pairs] == sorted(p.name for p in layout.pairs)


def test_what_is_left_out_is_said(tmp_path):
    grow(tmp_path, "a.nii a_seg.nii b.nii c_seg.nii")
    notes = find_pairs(tmp_path).notes
    assert notes[0].endswith("left out: b.nii") and notes[1].endswith("left out: c_seg.nii") and len(notes) == 2
    grow(tmp_path / "n", "imagesTr/a.nii labelsTr/a.nii imagesTs/c.nii")
    assert find_pairs(tmp_path / "n").notes == ["imagesTs has no labels and is left out"]
    grow(tmp_path / "t", "train/a.nii train/a_seg.nii test/b.nii")
    assert find_pairs(tmp_path / "t").notes == ["test/ has no labels and is left out"]
    grow(tmp_path / "v", "train/a.nii train/a_seg.nii val/b.nii val/b_seg.nii test/c.nii")
    layout = find_pairs(tmp_path / "v")
    assert [p.test for p in layout.pairs] == [False, True] and layout.notes == ["test/ has no labels and is left out"]
    grow(tmp_path / "m", "images/a.nii labels/a.nii masks/a.nii")
    assert "masks/ is not used" in find_pairs(tmp_path / "m").notes[0]


def test_dataset_json_gives_classes_and_channels(tmp_path):
    grow(tmp_path, "imagesTr/a_0000.nii.gz labelsTr/a.nii.gz")
    description = tmp_path / "dataset.json"
    description.write_text(json.dumps({"labels": {"background": 0, "organ": [1, 2]}, "channel_names": {"0": "CT"}}))
    layout = find_pairs(tmp_path)
    assert (layout.kind, layout.classes, layout.channels) == ("nnU-Net", {"organ": [1, 2]}, ("CT",))
    grow(tmp_path / "d", "imagesTr/a.nii.gz imagesTr/._a.nii.gz labelsTr/a.nii.gz")
    values = {"labels": {"0": "background", "1": "edema"}, "modality": {"1": "T1w", "0": "FLAIR"}, "training": []}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(values))
    layout = find_pairs(tmp_path / "d")
    assert (layout.kind, layout.classes, layout.channels) == ("Decathlon", {"edema": [1]}, ("FLAIR", "T1w"))


def test_dataset_json_may_list_the_files(tmp_path):
    grow(tmp_path, "x/1.nii x/2.nii y/1.nii y/2.nii")
    listed = {
        "labels": {"a": 1},
        "training": [{"image": "./x/1.nii", "label": "./y/1.nii"}],
        "validation": [{"image": ["x/2.nii"], "label": "y/2.nii"}],
        "test": ["x/3.nii"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    assert shown(find_pairs(tmp_path).pairs, tmp_path) == {"1": ("x/1.nii", "y/1.nii"), "*2": ("x/2.nii", "y/2.nii")}
    listed["training"][0]["label"] = "y/9.nii"
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    with pytest.raises(MissingFileError, match="9.nii: no such file"):
        find_pairs(tmp_path)


def test_archives_hold_image_and_label(tmp_path):
    array = np.zeros((2, 8, 9), np.uint8)
    for folder, name in (("train", "CT_a"), ("test", "CT_b")):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / f"{name}.npz", imgs=array, gts=array + 1, spacing=np.ones(3))
    np.savez(tmp_path / "train" / "other.npz", imgs=array)
    layout = find_pairs(tmp_path)
    assert [(p.name, p.test, p.images == (p.label,)) for p in layout.pairs] == [
        ("CT_a", False, True),
        ("CT_b", True, True),
    ]
    assert "other.npz" in layout.notes[0] and label_values(layout.pairs[0]) == {1: 144}


def test_meta_csv_keeps_cases_for_testing(tmp_path):
    grow(tmp_path, "s1/ct.nii.gz s1/segmentations/a.nii.gz s2/mri.nii.gz s2/segmentations/a.nii.gz")
    (tmp_path / "meta.csv").write_bytes(b"\xef\xbb\xbfimage_id;age;split\ns1;80;train\ns2;;test\n")
    assert [(p.name, p.test) for p in find_pairs(tmp_path).pairs] == [("s1", False), ("s2", True)]


def test_a_dicom_folder_is_an_image(tmp_path):
    grow(tmp_path, "images/p1/IM1 labels/p1.nii.gz case/dicom/1.dcm case/seg.nii.gz")
    (tmp_path / "images" / "p1" / "IM1").write_bytes(bytes(128) + b"DICM" + bytes(200))
    assert find_pairs(tmp_path).pairs[0].images == (tmp_path / "images/p1",)
    assert find_pairs(tmp_path / "case").pairs[0].images == (tmp_path / "case/dicom",)


WRONG = {
    "nothing": ("notes.txt", "two folders such as images"),
    "images alone": ("a.nii b.nii", "are needed; found a.nii, b.nii"),
    "unusual names": ("x_organ-1_msk.nii x_organ.nii y.nii", "none is named x_organ-1 (there are x_organ.nii, y.nii)"),
    "several could be meant": ("e_ct.nii e_ct_sm.nii e_seg.nii", "e_seg.nii: which image it belongs to is not clear"),
    "an image without a label": ("images/a.nii images/b.nii labels/a.nii", "images/b.nii: has no label"),
    "no labels": ("images/a.nii labels/a.txt", "labels: no volumes"),
    "two endings": ("images/a.nii images/a.nii.gz labels/a.nii", "a.nii.gz: a.nii has the same name"),
    "image and channel": ("images/a.nii images/a_0001.nii labels/a.nii", "a.nii and a_0001.nii belong to it"),
    "two labels": ("images/a.nii labels/a_seg.nii labels/a_mask.nii", "is a label of the same image"),
    "missing channel": (
        "imagesTr/a_0000.nii imagesTr/b_0000.nii imagesTr/b_0001.nii labelsTr/a.nii labelsTr/b.nii",
        "case a has 1 channels, case b 2",
    ),
    "label maps and masks": (
        "images/a.png images/b.png masks/a.png masks/b_liver.png",
        "case a has one label file, case b one for each structure",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_clear_is_named_in_one_line(kind, tmp_path):
    files, said = WRONG[kind]
    with pytest.raises(InputError) as error:
        find_pairs(grow(tmp_path, files))
    assert said in str(error.value) and "\n" not in str(error.value), error.value


def names(pairs):
    return {pair.name: tuple(path.name for path in pair.images) for pair in pairs}


def test_images_are_found_without_labels(tmp_path):
    grow(tmp_path, "imagesTs/a_0000.nii imagesTs/a_0001.nii imagesTs/b_0000.nii imagesTs/b_0001.nii labelsTs/a.nii")
    both = {"a": ("a_0000.nii", "a_0001.nii"), "b": ("b_0000.nii", "b_0001.nii")}
    assert names(find_images(tmp_path)) == names(find_images([tmp_path / "imagesTs"])) == both
    assert names(find_images(sorted((tmp_path / "imagesTs").iterdir()))) == both
    assert all(pair.label is None for pair in find_images(tmp_path))

    grow(tmp_path / "flat", "a.nii a_seg.nii b.nii seg_fast_b.nii notes.txt labels/b.nii")
    assert names(find_images(tmp_path / "flat")) == {"a": ("a.nii",), "b": ("b.nii",)}
    grow(tmp_path / "cases", "p1/img.npy p1/seg.npy p1/scribble.npy p2/ct.nii.gz p2/segmentations/a.nii.gz")
    assert names(find_images(tmp_path / "cases")) == {"p1": ("img.npy",), "p2": ("ct.nii.gz",)}
    grow(tmp_path / "frames", "f_0000.png f_0001.png g_0000.png g_0001.png")
    assert len(find_images(tmp_path / "frames")) == 4
    grow(tmp_path / "mr", "p_t1.nii p_t2.nii q_t1.nii q_t2.nii")
    assert names(find_images(tmp_path / "mr")) == {"p": ("p_t1.nii", "p_t2.nii"), "q": ("q_t1.nii", "q_t2.nii")}


def test_images_of_one_name_take_their_folders(tmp_path):
    grow(tmp_path, "x/a.nii y/a.nii y/b.nii empty/c.txt only/a_seg.nii")
    assert list(names(find_images([tmp_path / "x", tmp_path / "y"]))) == ["x_a", "y_a", "y_b"]
    assert list(names(find_images([tmp_path / "x", tmp_path / "x/a.nii"]))) == ["a"]
    for folder in ("empty", "only"):
        with pytest.raises(InputError, match="no images in it"):
            find_images(tmp_path / folder)
    with pytest.raises(MissingFileError, match="no such file or folder"):
        find_images(tmp_path / "z")


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
    layout = find_pairs(grow(tmp_path, text))
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
    "dicom_ct": (None, 1, 0, {"label_5": 366708, "label_1": 130634, "label_52": 11723}),
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


@pytest.mark.real
def test_real_folders_that_are_not_clear_say_what_to_do(real_data):
    for folder in ("ct_abdomen", "mr/spine_t2"):
        with pytest.raises(InputError, match="which image it belongs to is not clear.*name both alike"):
            find_pairs(real_data / folder)
    assert list(names(find_images(real_data / "dicom_ct"))) == ["example_ct_dicom"]
    assert len(find_images(real_data / "photos/rings/test")) == 1
