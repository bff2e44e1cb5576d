"""Cases are found in folders as the world has them, by names alone; what is ambiguous is an error that says so."""

import json

import numpy as np
import pytest

from samlora.data.layouts import find_pairs
from samlora.data.sources import find_images, label_values
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


@pytest.mark.real
def test_real_folders_that_are_not_clear_say_what_to_do(real_data):
    for folder in ("ct_abdomen", "mr/spine_t2"):
        with pytest.raises(InputError, match="which image it belongs to is not clear.*name both alike"):
            find_pairs(real_data / folder)
    assert list(names(find_images(real_data / "dicom_ct"))) == ["example_ct_dicom"]
    assert len(find_images(real_data / "photos/rings/test")) == 1
