"""Every folder of real images: planned, prepared, checked, predicted and measured once, by the commands."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import samlora
from samlora.cli import main
from samlora.data.grid import match_grid
from samlora.data.recipe import Recipe
from samlora.data.sources import find_images, read_image
from samlora.data.volume import read_volume

pytestmark = [pytest.mark.real, pytest.mark.slow]


def two_folders(root, image, label):
    """images/case + labels/case, for folders that have no layout of their own."""
    for kind, path in (("images", image), ("labels", label)):
        (root / kind).mkdir(parents=True)
        target = root / kind / ("case" + ("" if path.is_dir() else ".nii.gz"))
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    return root


def abdomen(data, root):
    folder = data / "ct_abdomen"
    return two_folders(root, folder / "example_ct_sm.nii.gz", folder / "example_seg.nii.gz")


def dicom(data, root):
    folder = data / "dicom_ct"
    return two_folders(root, folder / "example_ct_dicom", folder / "example_seg_dicom.nii.gz")


def spine(data, root):
    folder = data / "mr/spine_t2"
    image, label = "sub-mri_label-6_T2w.nii.gz", "sub-mri_seg-vert_label-6_msk.nii.gz"
    return two_folders(root, folder / image, folder / label)


FOLDERS = {
    "ct_abdomen": (abdomen, "ct", 1),
    "dicom_ct": (dicom, "ct", 1),
    "spine_t2": (spine, "mr", 1),
    "mr/brain_tumour": (None, "mr", 1),
    "mr/tiny_big_endian": (None, "mr", 1),
    "mr/prostate_png": (None, "image", 3),
    "ct_png": (None, "image", 2),
    "ultrasound/nerves_vessels": (None, "image", 49),
    "ultrasound/busi": (None, "image", 1),
    "xray/hip": (None, "image", 3),
    "photos/rings": (None, "image", 7),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_from_the_folder_to_the_report(name, real_data, tmp_path, capsys):
    build, modality, cases = FOLDERS[name]
    source = build(real_data, tmp_path / "source") if build else real_data / name
    plan, prepared, out = tmp_path / "plan.yaml", tmp_path / "prepared", tmp_path / "out"

    assert main(["plan", str(source), "-o", str(plan)]) == 0
    recipe = Recipe.load(plan)
    assert recipe.modality == modality and recipe.classes

    command = ["prepare", str(source), "-o", str(prepared), "--dataset", str(plan), "--workers", "1"]
    assert main(command + ["--test_fraction", "1"]) == 0
    records = [json.loads(path.read_text()) for path in (prepared / "cases").glob("*.json")]
    assert len(records) == cases and all(sum(r["voxels"][1:]) for r in records)

    assert main(["prepare", str(source), "-o", str(tmp_path / "train"), "--dataset", str(plan), "--test_fraction", "0"]) == 0
    assert main(["check", str(tmp_path / "train")]) == 0, capsys.readouterr().out
    assert main(["check", str(source), "--dataset", str(plan)]) == 0, capsys.readouterr().out

    used = Recipe.load(prepared / "recipe.yaml")
    torch.manual_seed(0)
    model = samlora.build_model(
        variant="vit_ti",
        image_size=64,
        num_classes=used.num_classes,
        class_names=used.classes,
        recipe=used.to_dict(),
        in_channels=used.in_channels,
    )
    samlora.save_adapter(model, tmp_path / "adapter.safetensors")
    inputs = find_images(source)
    command = ["predict", str(source), "-o", str(out), "--adapter", str(tmp_path / "adapter.safetensors")]
    assert main(command + ["--device", "cpu", "--overlay", "png"]) == 0
    written = {path.name.split(".")[0]: path for path in out.iterdir() if path.is_file() and path.name != "log.txt"}
    assert len(written) == len(inputs)
    for pair in inputs:
        image, found = read_image(pair), read_volume(written[pair.name], labels=True)
        assert found.array.shape == image.array.shape[:3] and found.array.max() <= used.num_classes
        if image.has_spacing:
            assert np.array_equal(match_grid(found, image).array, found.array)

    if build:
        command = ["evaluate", str(out / "case.nii.gz"), str(source / "labels/case.nii.gz"), "-o", str(tmp_path / "report")]
        assert main(command) == 0
        with open(tmp_path / "report/metrics.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) >= used.num_classes
