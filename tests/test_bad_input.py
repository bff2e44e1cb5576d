"""Whatever is wrong with what a user hands in: one line that names it, exit code 2, nothing half-written."""

import errno
import gzip
import json
import os
import pickle
import shutil

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image
from safetensors.torch import save_file
from test_dicom import write_file

import samlora
from samlora.cli import main
from samlora.data.grid import Volume
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import write_slice, write_volume

SHAPE = (16, 14, 4)
AFFINE = np.diag([0.8, 0.8, 2.0, 1.0])


class World:
    """A folder of two scans with labels, the prepared data and an adapter, to be broken in one place."""

    def __init__(self, root):
        self.root, self.source = root, root / "source"
        rng = np.random.default_rng(0)
        for name in ("a", "b"):
            image = rng.integers(-500, 500, SHAPE).astype(np.int16)
            self.write(f"images/{name}.nii.gz", image)
            self.write(f"labels/{name}.nii.gz", rng.integers(0, 3, SHAPE).astype(np.uint8))
        recipe = Recipe("r", "ct", (-160, 240), orientation="LPS", classes=("x", "y"), label_values=((1,), (2,)))
        prepare(self.source, root / "data", recipe, test_cases=["b"], workers=1)
        (root / "recipe.yaml").write_text((root / "data/recipe.yaml").read_text().replace("- b\n", ""))
        torch.manual_seed(0)
        model = samlora.build_model(variant="vit_ti", image_size=64, num_classes=2, recipe=recipe.to_dict())
        samlora.save_adapter(model, root / "adapter.safetensors")
        (root / "gt").mkdir()
        shutil.copy(self.source / "labels/a.nii.gz", root / "gt/a.nii.gz")

    def write(self, name, array, affine=AFFINE, header=None):
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine, header), path)
        return path

    def picture(self, name, array, **options):
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, **options)
        return path

    def pictures_only(self):
        shutil.rmtree(self.source)
        self.picture("images/p.png", np.zeros((14, 16), np.uint8))

    def prepare(self, *more):
        return [
            "prepare",
            self.source,
            "-o",
            self.root / "new",
            "--dataset",
            self.root / "recipe.yaml",
            "--workers",
            1,
            *more,
        ]

    def pictures(self):
        return ["prepare", self.source, "-o", self.root / "new", "--dataset", "generic_image", "--workers", 1]

    def train(self, *more):
        return [
            "train", "--root_path", self.root / "data", "--output", self.root / "new", "--vit_name", "vit_ti",
            "--img_size", 64, "--device", "cpu", "--max_epochs", 1, *more,
        ]  # fmt: skip

    def test(self, *more):
        adapter = self.root / "adapter.safetensors"
        data = self.root / "data"
        return [
            "test",
            "--volume_path",
            data,
            "--lora_ckpt",
            adapter,
            "--output_dir",
            self.root / "new",
            "--device",
            "cpu",
            *more,
        ]

    def predict(self, *inputs, **flags):
        flags = {"adapter": self.root / "adapter.safetensors", "device": "cpu"} | flags
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        return ["predict", *inputs, "-o", self.root / "new", *words]

    def evaluate(self, prediction, *more):
        return ["evaluate", prediction, self.root / "gt", "-o", self.root / "new", *more]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(template, tmp_path):
    copied = object.__new__(World)
    copied.root = tmp_path / "w"
    shutil.copytree(template.root, copied.root)
    copied.source = copied.root / "source"
    return copied


CASES = {}


def bad(*words):
    """The command that the function returns after breaking the world must fail in one line with these words."""

    def take(function):
        CASES[function.__name__] = (function, words)
        return function

    return take


# --- volumes ---------------------------------------------------------------------------------------------


@bad("images/a.nii.gz", "cannot be read as NIfTI")
def truncated_gzip(w):
    path = w.source / "images/a.nii.gz"
    path.write_bytes(path.read_bytes()[:300])
    return w.prepare()


@bad("images/a.nii.gz", "cannot be read as NIfTI")
def truncated_voxels(w):
    path = w.source / "images/a.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    return w.prepare()


@bad("images/a.nii.gz", "cannot be read as NIfTI")
def text_named_nifti(w):
    (w.source / "images/a.nii.gz").write_text("<html>404 not found</html>")
    return w.prepare()


@bad("images/a.nii.gz", "cannot be read")
def empty_file(w):
    (w.source / "images/a.nii.gz").write_bytes(b"")
    return w.prepare()


@bad("images/a.nii.gz", "NaN or infinite")
def nan_voxels(w):
    image = np.zeros(SHAPE, np.float32)
    image[0, 0, 0] = np.nan
    w.write("images/a.nii.gz", image)
    return w.prepare()


@bad("images/a.nii.gz", "NaN or infinite")
def infinite_voxels(w):
    w.write("images/a.nii.gz", np.full(SHAPE, np.inf, np.float32))
    return w.prepare()


@bad("images/a.nii.gz", "axes")
def five_axes(w):
    w.write("images/a.nii.gz", np.zeros((*SHAPE, 2, 2), np.int16))
    return w.prepare()


@bad("images/a.nii.gz", "channels", "recipe")
def time_series_without_channels(w):
    w.write("images/a.nii.gz", np.full((*SHAPE, 2), -50, np.int16))
    return w.prepare()


@bad("images/a.nii.gz", "shape")
def no_voxels(w):
    w.write("images/a.nii.gz", np.zeros((0, 14, 4), np.int16))
    return w.prepare()


def write_affine(w, affine):
    """An image with an affine that nibabel itself would not write."""
    image = nibabel.Nifti1Image(np.full(SHAPE, -50, np.int16), None)
    image.header["sform_code"] = 1
    for name, row in zip(("srow_x", "srow_y", "srow_z"), affine):
        image.header[name] = row
    nibabel.save(image, w.source / "images/a.nii.gz")


@bad("images/a.nii.gz", "affine")
def singular_affine(w):
    write_affine(w, np.diag([0.8, 0, 2.0, 1.0]))
    return w.prepare()


@bad("images/a.nii.gz")
def affine_of_nan(w):
    write_affine(w, np.full((4, 4), np.nan))
    return w.prepare()


@bad("images/a.nii.gz", "3 channels")
def colours_per_voxel(w):
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, AFFINE), w.source / "images/a.nii.gz")
    return w.prepare()


@bad("images/a.mha")
def negative_spacing(w):
    (w.source / "images/a.nii.gz").unlink()
    path = w.source / "images/a.mha"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((4, 14, 16), np.int16)), str(path))
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = -1 1 1"))
    return w.prepare()


@bad("images/a.nrrd")
def nrrd_without_its_data(w):
    (w.source / "images/a.nii.gz").unlink()
    image = SimpleITK.GetImageFromArray(np.zeros((4, 14, 16), np.int16))
    SimpleITK.WriteImage(image, str(w.source / "images/a.nrrd"))
    path = w.source / "images/a.nrrd"
    path.write_bytes(path.read_bytes()[:-500])
    return w.prepare()


@bad("images/a.nii.gz", "no Hounsfield units")
def picture_values_for_a_ct_recipe(w):
    w.write("images/a.nii.gz", np.full(SHAPE, 100, np.uint8))
    return w.prepare()


# --- labels ----------------------------------------------------------------------------------------------


@bad("labels/a.nii.gz", "0.5", "not whole")
def fractions_as_labels(w):
    w.write("labels/a.nii.gz", np.full(SHAPE, 0.5, np.float32))
    return w.prepare()


@bad("labels/a.nii.gz", "70000", "0..65535")
def labels_too_large(w):
    w.write("labels/a.nii.gz", np.full(SHAPE, 70000, np.int32))
    return w.prepare()


@bad("labels/a.nii.gz", "shape 16 x 14 x 5", "shape 16 x 14 x 4")
def label_on_another_grid(w):
    w.write("labels/a.nii.gz", np.zeros((16, 14, 5), np.uint8))
    return w.prepare()


@bad("labels/a.nii.gz", "origin")
def label_somewhere_else(w):
    moved = AFFINE.copy()
    moved[2, 3] = 30
    w.write("labels/a.nii.gz", np.zeros(SHAPE, np.uint8), moved)
    return w.prepare()


@bad("labels/a.nii.gz")
def label_with_channels(w):
    w.write("labels/a.nii.gz", np.zeros((*SHAPE, 3), np.uint8))
    return w.prepare()


@bad("a.nii.gz", "label")
def image_without_label(w):
    (w.source / "labels/a.nii.gz").unlink()
    return w.prepare()


@bad("different label values", "1 to 255")
def more_than_255_labels(w):
    w.write("labels/a.nii.gz", np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16))
    return ["prepare", w.source, "-o", w.root / "new", "--dataset", "generic_ct", "--workers", 1]


@bad("p.jpg", "mask_threshold: 127")
def jpeg_mask(w):
    w.pictures_only()
    w.picture("masks/p.jpg", np.full((14, 16), 255, np.uint8))
    return w.pictures()


@bad("masks/p.png", "colours")
def mask_in_colours(w):
    w.pictures_only()
    w.picture("masks/p.png", np.random.default_rng(0).integers(0, 9, (14, 16, 3)).astype(np.uint8))
    return w.pictures()


@bad("masks/p.png")
def mask_of_another_size(w):
    w.pictures_only()
    w.picture("masks/p.png", np.ones((14, 17), np.uint8))
    return w.pictures()


@bad("images/p.png", "cannot be read as picture")
def truncated_picture(w):
    w.pictures_only()
    w.picture("masks/p.png", np.ones((14, 16), np.uint8))
    path = w.source / "images/p.png"
    path.write_bytes(path.read_bytes()[:40])
    return w.pictures()


# --- DICOM -----------------------------------------------------------------------------------------------


def dicom(folder, places=(0, 2, 4, 6), spacings=(0.8,), uid="1.2.3", start=0):
    """A CT series with slices at these places."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, z in enumerate(places):
        spacing = spacings[n % len(spacings)]
        write_file(
            folder / f"{start + n:03d}.dcm",
            np.full((14, 16), 974, np.uint16),
            SeriesInstanceUID=uid,
            SeriesDescription=f"series {uid}",
            ImagePositionPatient=[0, 0, z],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[spacing, spacing],
            RescaleSlope=1,
            RescaleIntercept=-1024,
        )
    return folder


@bad("scan", "mm", "slice is missing")
def dicom_with_a_missing_slice(w):
    return w.predict(dicom(w.root / "scan", (0, 2, 6, 8)))


@bad("scan", "001.dcm and 002.dcm lie at the same place")
def dicom_with_a_doubled_slice(w):
    return w.predict(dicom(w.root / "scan", (0, 2, 2, 4)))


@bad("scan")
def dicom_with_two_spacings(w):
    return w.predict(dicom(w.root / "scan", spacings=(0.8, 0.7)))


@bad("scan", "--series", "1.2.3", "1.2.4")
def dicom_with_two_series(w):
    dicom(w.root / "scan")
    return w.predict(dicom(w.root / "scan", uid="1.2.4", start=10))


@bad("--series", "9.9")
def dicom_series_that_is_not_there(w):
    return w.predict(dicom(w.root / "scan"), series="9.9")


@bad("scan")
def dicom_slice_cut_short(w):
    folder = dicom(w.root / "scan")
    path = folder / "001.dcm"
    path.write_bytes(path.read_bytes()[:-200])
    return w.predict(folder)


# --- prepared data ---------------------------------------------------------------------------------------


def train_slice(w):
    return sorted((w.root / "data/train_npz").glob("*.npz"))[0]


@bad("slice000.npz", "Object arrays")
def object_array_in_npz(w):
    np.savez(train_slice(w), image=np.array([{}, None], object), label=np.zeros((2, 2), np.uint8))
    return w.train()


@bad("slice000.npz", "label values 3", "--num_classes")
def label_without_a_class(w):
    write_slice(train_slice(w), np.zeros((14, 16)), np.full((14, 16), 3, np.uint8))
    return w.train()


@bad("slice000.npz", "must be equal")
def slice_and_label_of_two_sizes(w):
    write_slice(train_slice(w), np.zeros((14, 16)), np.zeros((14, 15), np.uint8))
    return w.train()


@bad("slice000.npz", "channels")
def slices_of_mixed_channels(w):
    path = train_slice(w)
    write_slice(path, np.zeros((14, 16, 3)), np.zeros((14, 16), np.uint8))
    return w.train()


@bad("slice000.npz", "no array named 'label'")
def slice_without_a_label(w):
    np.savez(train_slice(w), image=np.zeros((4, 4)))
    return w.train()


@bad("slice000.npz", "NaN")
def slice_of_nan(w):
    write_slice(train_slice(w), np.full((14, 16), np.nan), np.zeros((14, 16), np.uint8))
    return w.train()


@bad("slice000.npz", "cannot be read")
def slice_cut_short(w):
    path = train_slice(w)
    path.write_bytes(path.read_bytes()[:100])
    return w.train()


@bad("b.npy.h5", "cannot be read as HDF5")
def volume_cut_short(w):
    path = w.root / "data/test_vol_h5/b.npy.h5"
    path.write_bytes(path.read_bytes()[:1000])
    return w.test()


@bad("b.npy.h5", "no label")
def volume_without_a_label(w):
    with h5py.File(w.root / "data/test_vol_h5/b.npy.h5", "a") as file:
        del file["label"]
    return w.test()


@bad("--num_classes 5", "2 classes")
def another_number_of_classes(w):
    return w.train("--num_classes", 5)


@bad("holds no training slices", "samlora prepare")
def no_slices(w):
    shutil.rmtree(w.root / "data/train_npz")
    (w.root / "data/train_npz").mkdir()
    return w.train()


# --- recipes and layouts ---------------------------------------------------------------------------------


@bad("sinapse", "synapse")
def unknown_recipe(w):
    return ["prepare", w.source, "-o", w.root / "new", "--dataset", "sinapse"]


@bad("recipe.yaml", "not readable as YAML")
def recipe_that_is_no_yaml(w):
    (w.root / "recipe.yaml").write_text("a: [")
    return w.prepare()


@bad("recipe.yaml", "unknown key windows")
def misspelt_key(w):
    text = (w.root / "recipe.yaml").read_text()
    (w.root / "recipe.yaml").write_text(text.replace("window:", "windows:"))
    return w.prepare()


@bad("lung")
def class_that_the_data_does_not_name(w):
    text = (w.root / "recipe.yaml").read_text()
    (w.root / "recipe.yaml").write_text(text.replace("x: 1", "x: lung"))
    return w.prepare()


@bad("nowhere", "no such folder")
def missing_source(w):
    return ["prepare", w.root / "nowhere", "-o", w.root / "new", "--dataset", "synapse"]


@bad("empty")
def empty_source(w):
    (w.root / "empty").mkdir()
    return ["prepare", w.root / "empty", "-o", w.root / "new", "--dataset", "synapse"]


@bad("--test_cases c", "a, b")
def unknown_test_case(w):
    return w.prepare("--test_cases", "c")


@bad("--test_cases a", "b", "same patient")
def one_patient_on_both_sides(w):
    with open(w.root / "recipe.yaml", "a") as file:
        file.write("patient: '()[ab]'\n")
    text = (w.root / "recipe.yaml").read_text().replace("patient: null\n", "")
    (w.root / "recipe.yaml").write_text(text)
    return w.prepare("--test_cases", "a")


@bad("--test_fraction 2")
def impossible_share(w):
    return w.prepare("--test_fraction", 2)


@bad("new")
def output_below_a_file(w):
    (w.root / "new").write_text("a file")
    return w.prepare()


@bad("dataset.json", "labels")
def broken_dataset_json(w):
    (w.source / "images").rename(w.source / "imagesTr")
    (w.source / "labels").rename(w.source / "labelsTr")
    (w.source / "dataset.json").write_text(json.dumps({"labels": 3}))
    return ["plan", w.source, "-o", w.root / "new"]


@bad("recipe.yaml", "is there already")
def plan_over_a_file(w):
    return ["plan", w.source, "-o", w.root / "recipe.yaml"]


@bad("nowhere")
def check_of_nothing(w):
    return ["check", w.root / "nowhere"]


# --- adapters and flags ----------------------------------------------------------------------------------


@bad("no adapter at", "nowhere")
def missing_adapter(w):
    return w.predict(w.source / "images", adapter=w.root / "nowhere.safetensors")


@bad("adapter.safetensors")
def truncated_adapter(w):
    path = w.root / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return w.predict(w.source / "images")


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.trace),)


@bad("evil.pth")
def pickled_code(w):
    Evil.trace = w.root / "ran"
    with open(w.root / "evil.pth", "wb") as file:
        pickle.dump({"w_a_000": Evil()}, file)
    return w.predict(w.source / "images", adapter=w.root / "evil.pth")


@bad("other.safetensors", "is not an adapter")
def file_that_is_no_adapter(w):
    save_file({"x": torch.zeros(1)}, w.root / "other.safetensors")
    return w.predict(w.source / "images", adapter=w.root / "other.safetensors")


@bad("--recipe", "classes")
def recipe_that_is_not_the_adapter_s(w):
    return w.predict(w.source / "images", recipe="generic_ct")


@bad("notes.txt")
def unknown_kind_of_file(w):
    (w.root / "notes.txt").write_text("x")
    return w.predict(w.root / "notes.txt")


@bad("nowhere")
def missing_input(w):
    return w.predict(w.root / "nowhere.nii.gz")


@bad("--format dicom-seg", "nii.gz")
def dicom_seg_of_nifti(w):
    return w.predict(w.source / "images/a.nii.gz", format="dicom-seg")


@bad("shrink", "largest")
def unknown_postprocessing(w):
    return w.predict(w.source / "images", postprocess="shrink")


@bad("--adapter is missing")
def no_adapter_given(w):
    return ["predict", w.source / "images", "-o", w.root / "new"]


@bad("--batchsize", "--help")
def misspelt_flag(w):
    return w.train("--batchsize", 3)


@bad("--base_lr")
def flag_of_the_wrong_type(w):
    return w.train("--base_lr", "fast")


@bad("config.yaml: max_epochs", "int")
def config_of_the_wrong_type(w):
    (w.root / "config.yaml").write_text("max_epochs: many\n")
    return w.train("--config", w.root / "config.yaml")


# --- evaluation ------------------------------------------------------------------------------------------


def predictions(w, array, name="a.nii.gz", affine=AFFINE):
    (w.root / "pred").mkdir()
    write_volume(Volume(array, affine, 1, 1), w.root / "pred" / name)
    return w.evaluate(w.root / "pred")


@bad("pred", "a")
def missing_prediction(w):
    return predictions(w, np.zeros(SHAPE, np.uint8), "other.nii.gz")


@bad("pred/a.nii.gz", "not whole")
def probabilities_as_predictions(w):
    return predictions(w, np.full(SHAPE, 0.3, np.float32))


@bad("a.nii.gz", "spacing 0.8 0.8 3")
def prediction_on_another_grid(w):
    return predictions(w, np.zeros(SHAPE, np.uint8), affine=np.diag([0.8, 0.8, 3.0, 1.0]))


@bad("--tolerance")
def negative_tolerance(w):
    return w.evaluate(w.root / "gt", "--tolerance", "-1")


def files_below(root):
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name not in ("log.txt",)}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_in_one_line(name, world, capsys, monkeypatch):
    breaks, words = CASES[name]
    monkeypatch.chdir(world.root)
    command = [str(word) for word in breaks(world)]
    before = files_below(world.root)
    assert main(command) == 2
    error = capsys.readouterr().err.split("\r")[-1]
    line = error[error.index("samlora: ") :]
    assert line.count("\n") == 1 and line.endswith("\n"), error
    assert "Traceback" not in error and "Error(" not in error
    for word in words:
        assert word in line, line
    left = files_below(world.root) - before
    assert not [path for path in left if ".part-" in path]
    # Cases that were fine before the broken one may be there, whole; results of the broken one may not.
    assert not [path for path in left if path.endswith(("recipe.yaml", ".safetensors", ".html", ".csv"))], left
    assert not (world.root / "ran").exists()


def test_there_are_many_kinds():
    assert len(CASES) >= 60


@pytest.mark.parametrize("command", ["prepare", "predict", "evaluate"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing(command, reason, world, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(reason, os.strerror(reason))

    commands = {
        "prepare": world.prepare(),
        "predict": world.predict(world.source / "images/a.nii.gz"),
        "evaluate": world.evaluate(world.root / "gt"),
    }
    before = files_below(world.root)
    monkeypatch.setattr("samlora.files.os.fsync", full)
    assert main([str(word) for word in commands[command]]) == 2
    line = capsys.readouterr().err
    assert line.count("samlora: ") == 1 and os.strerror(reason) in line, line
    assert files_below(world.root) == before


def test_labels_that_are_nearly_whole_are_whole(world):
    labels = np.asarray(nibabel.load(world.source / "labels/a.nii.gz").dataobj)
    world.write("labels/a.nii.gz", labels * np.float32(1.0000001))
    assert main([str(word) for word in world.prepare()]) == 0
    with np.load(world.root / "new/train_npz/a_slice001.npz") as archive:
        with np.load(world.root / "data/train_npz/a_slice001.npz") as expected:
            assert np.array_equal(archive["label"], expected["label"])


def test_the_world_is_sound_before_it_is_broken(world, capsys):
    for command in (
        world.prepare("--test_cases", "b"),
        world.predict(world.source / "images"),
        world.evaluate(world.root / "gt"),
    ):
        assert main([str(word) for word in command]) == 0
        shutil.rmtree(world.root / "new")
    assert main(["check", str(world.root / "data")]) == 0
