"""Label maps for images without labels: on their own grid, resumable, shared out, refused where they do not fit."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import samlora
from samlora.cli import main
from samlora.data.grid import Volume, reorient
from samlora.data.recipe import Recipe
from samlora.data.volume import read_volume, write_volume
from samlora.errors import InputError
from samlora.inference.predict import predict_volume

CT = Recipe("ct", "ct", (-160, 240), orientation="LPS", size=None, classes=("a", "b"), label_values=((1,), (2,)))


def lively(model, seed):
    """The model, its class heads large, so that a random adapter predicts all of its classes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.mask_decoder.named_parameters():
            if "hypernetworks" in name or "mask_tokens" in name:
                parameter.normal_(std=0.4)
    return model


def adapter_for(folder, recipe, name="adapter", seed=0, **changes):
    torch.manual_seed(seed)
    options = {"variant": "vit_ti", "image_size": 64, "num_classes": 2, "class_names": ("a", "b")} | changes
    model = samlora.build_model(recipe=None if recipe is None else recipe.to_dict(), **options)
    path = folder / f"{name}.safetensors"
    samlora.save_adapter(lively(model, seed), path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return adapter_for(tmp_path_factory.mktemp("adapter"), CT)


def scan(seed=0, axes="RAI", shape=(20, 17, 6)):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(-300, 500, [-(-n // 4) for n in shape])
    hu = np.kron(blocks, np.ones((4, 4, 4)))[: shape[0], : shape[1], : shape[2]].astype(np.int16)
    affine = np.array([[0.9, 0.1, 0, -3], [-0.1, 0.9, 0, 8], [0, 0, 2.5, 4], [0, 0, 0, 1.0]])
    qform = affine + np.array([[0, 0, 0, 5.0], [0] * 4, [0] * 4, [0] * 4])
    return reorient(Volume(hu, affine, 1, 2, qform), axes)


@pytest.fixture
def scans(tmp_path):
    (tmp_path / "in").mkdir()
    for name, axes in (("one", "RAS"), ("two", "PIR"), ("three", "LPS")):
        write_volume(scan(len(name), axes), tmp_path / "in" / f"{name}.nii.gz")
    return tmp_path / "in"


def run(*words) -> int:
    return main(["predict", *map(str, words), "--device", "cpu"])


def test_adapters_of_different_systems_are_averaged(scans, adapter, tmp_path):
    """A U-Net's logits have the size of the slice, SAM's a quarter of it."""
    torch.manual_seed(1)
    unet = samlora.build_model("unet", None, image_size=64, num_classes=2, class_names=("a", "b"), recipe=CT.to_dict())
    samlora.save_adapter(unet, tmp_path / "unet.safetensors")
    out = tmp_path / "out"
    assert run(scans / "one.nii.gz", "-o", out, "--adapter", adapter, tmp_path / "unet.safetensors") == 0
    assert read_volume(out / "one.nii.gz").array.shape == read_volume(scans / "one.nii.gz").array.shape


def test_results_lie_on_the_grid_of_their_input(scans, adapter, tmp_path):
    assert run(scans, "-o", tmp_path / "out", "--adapter", adapter) == 0
    for path in scans.iterdir():
        image, found = read_volume(path), read_volume(tmp_path / "out" / path.name)
        assert found.array.dtype == np.uint8 and found.array.shape == image.array.shape
        assert np.array_equal(found.affine, image.affine)
        assert (found.qform_code, found.sform_code) == (image.qform_code, image.sform_code) == (1, 2)
        np.testing.assert_allclose(found.qform, image.qform, atol=1e-4)
        assert len(np.unique(found.array)) > 1
        record = json.loads((tmp_path / "out" / "cases" / f"{path.name[:-7]}.json").read_text())
        ml = np.prod(image.spacing) / 1000
        assert record["found"]["b"] == pytest.approx(np.count_nonzero(found.array == 2) * ml)


def test_the_way_up_does_not_matter(adapter):
    model = samlora.load_model(adapter)
    first = predict_volume(model, scan(3, "RAS"))
    for axes in ("LPS", "PIR", "SLA"):
        turned = predict_volume(model, scan(3, axes))
        assert np.array_equal(reorient(turned, "RAS").array, first.array)


def test_the_python_call_gives_the_file_of_the_command(scans, adapter, tmp_path):
    model = samlora.load_model(adapter)
    assert run(scans / "two.nii.gz", "-o", tmp_path / "out", "--adapter", adapter) == 0
    stored = read_volume(tmp_path / "out/two.nii.gz").array
    assert np.array_equal(samlora.predict_volume(model, scans / "two.nii.gz").array, stored)
    assert np.array_equal(samlora.predict_volume(model, read_volume(scans / "two.nii.gz"), CT).array, stored)
    with pytest.raises(InputError, match="window"):
        samlora.predict_volume(model, scans / "two.nii.gz", Recipe("x", "ct", (0, 1), orientation="LPS"))


def test_prepared_volumes_are_predicted_as_their_sources(make_case, adapter, tmp_path):
    from samlora.data.prepare import prepare

    make_case("src/images/x.nii.gz", "src/labels/x.nii.gz", shape=(20, 17, 6), values=(0, 1, 2))
    prepare(tmp_path / "src", tmp_path / "data", CT, test_fraction=1, workers=1)
    model = samlora.load_model(adapter)
    prepared = samlora.predict_volume(model, tmp_path / "data/test_vol_h5/x.npy.h5")
    assert np.array_equal(prepared.array, samlora.predict_volume(model, tmp_path / "src/images/x.nii.gz").array)


def test_no_label_is_opened(scans, adapter, tmp_path):
    source = tmp_path / "nnunet"
    source.mkdir()
    scans.rename(source / "imagesTs")
    (source / "labelsTs").mkdir()
    (source / "labelsTs" / "one.nii.gz").write_text("not a volume")
    assert run(source / "imagesTs", "-o", tmp_path / "out", "--adapter", adapter) == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3


def test_a_half_done_folder_is_finished(scans, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(scans, "-o", out, "--adapter", adapter) == 0
    (out / "two.nii.gz").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    capsys.readouterr()
    assert run(scans, "-o", out, "--adapter", adapter) == 0
    said = capsys.readouterr().out
    assert said.count("is there already") == 2 and "two: 6 slices" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_results_of_another_adapter_are_not_replaced_unasked(scans, adapter, tmp_path, capsys):
    out, other = tmp_path / "out", adapter_for(tmp_path, CT, seed=5)
    assert run(scans, "-o", out, "--adapter", adapter) == 0
    kept = (out / "one.nii.gz").read_bytes()
    assert run(scans, "-o", out, "--adapter", other) == 2
    assert "--overwrite" in capsys.readouterr().err and (out / "one.nii.gz").read_bytes() == kept
    assert run(scans, "-o", out, "--adapter", other, "--overwrite") == 0
    assert (out / "one.nii.gz").read_bytes() != kept


def test_a_file_in_the_way_is_not_replaced(scans, adapter, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "one.nii.gz").write_text("mine")
    assert run(scans, "-o", tmp_path / "out", "--adapter", adapter) == 2
    assert (tmp_path / "out" / "one.nii.gz").read_text() == "mine"
    assert "one.nii.gz: is there already" in capsys.readouterr().err


def test_a_broken_input_is_named_and_the_others_go_on(scans, adapter, tmp_path, capsys):
    (scans / "two.nii.gz").write_bytes((scans / "two.nii.gz").read_bytes()[:200])
    assert run(scans, "-o", tmp_path / "out", "--adapter", adapter) == 2
    said = capsys.readouterr()
    assert "two.nii.gz: cannot be read" in said.out and said.err.startswith("samlora: 1 of 3 inputs failed: two")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["one.nii.gz", "three.nii.gz"]


def test_adapters_without_a_recipe_need_one(scans, tmp_path, capsys):
    bare = adapter_for(tmp_path, None)
    assert run(scans, "-o", tmp_path / "out", "--adapter", bare) == 2
    assert "--recipe" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run(scans / "one.nii.gz", "-o", tmp_path / "out", "--adapter", bare, "--recipe", "generic_ct") == 0


def test_values_that_are_no_hu_are_refused(adapter, tmp_path, capsys):
    write_volume(Volume(np.full((8, 8, 2), 200, np.uint8), np.eye(4)), tmp_path / "x.nii.gz")
    assert run(tmp_path / "x.nii.gz", "-o", tmp_path / "out", "--adapter", adapter) == 2
    error = capsys.readouterr().err
    assert "x.nii.gz: its values 200..200 are no Hounsfield units" in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_averages_and_postprocessing_are_applied(scans, adapter, tmp_path):
    source, outs = scans / "one.nii.gz", [tmp_path / name for name in ("plain", "twice", "tta", "clean")]
    assert run(source, "-o", outs[0], "--adapter", adapter) == 0
    assert run(source, "-o", outs[1], "--adapter", adapter, adapter) == 0
    assert run(source, "-o", outs[2], "--adapter", adapter, "--tta") == 0
    assert run(source, "-o", outs[3], "--adapter", adapter, "--postprocess", "largest", "drop=1e9") == 0
    plain, twice, tta, clean = (read_volume(out / "one.nii.gz").array for out in outs)
    assert (plain == twice).mean() > 0.999 and not np.array_equal(plain, tta) and not clean.any()


def test_every_kind_of_result_is_drawn(scans, adapter, tmp_path):
    from PIL import Image

    for kind in ("png", "gif"):
        assert run(scans / "one.nii.gz", "-o", tmp_path / kind, "--adapter", adapter, "--overlay", kind) == 0
    with Image.open(tmp_path / "gif/overlays/one.gif") as picture:
        assert picture.n_frames == 6
    with Image.open(tmp_path / "png/overlays/one.png") as picture:
        assert min(picture.size) > 200


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".npy", ".png", ".jpg", ".nii"])
def test_results_are_written_as_the_input_is(ending, tmp_path):
    flat = ending in (".png", ".jpg")
    array = np.random.default_rng(0).integers(0, 255, (40, 31, 1 if flat else 3)).astype(np.uint8)
    affine = np.diag([-1.0, -1, 1, 1])
    recipe = Recipe("p", "image", classes=("a", "b"), label_values=((1,), (2,)))
    if ending == ".jpg":
        from PIL import Image

        Image.fromarray(array[:, :, 0].T).save(tmp_path / "x.jpg")
    else:
        write_volume(Volume(array, affine, has_spacing=False), tmp_path / f"x{ending}")
    assert run(tmp_path / f"x{ending}", "-o", tmp_path / "out", "--adapter", adapter_for(tmp_path, recipe)) == 0
    found = read_volume(tmp_path / "out" / f"x{'.png' if flat else ending}", labels=True)
    assert found.array.shape == array.shape and set(np.unique(found.array)) <= {0, 1, 2}
    np.testing.assert_allclose(found.affine, affine)


def test_channels_and_neighbours_are_taken_from_the_recipe(tmp_path):
    rng = np.random.default_rng(0)
    write_volume(Volume(rng.uniform(1, 9, (20, 18, 4, 4)).astype(np.float32), np.eye(4), 1, 1), tmp_path / "x.nii.gz")
    write_volume(Volume(rng.uniform(1, 9, (20, 18, 4)).astype(np.float32), np.eye(4), 1, 1), tmp_path / "y.nii.gz")
    for name, channels, count in (("x", (0, 1, 2, 3), 4), ("x", (3,), 3), ("y", "neighbours", 3)):
        recipe = Recipe(
            "mr", "mr", percentiles=(0.5, 99.5), channels=channels, classes=("a", "b"), label_values=((1,), (2,))
        )
        adapter = adapter_for(tmp_path, recipe, in_channels=count)
        found = samlora.predict_volume(samlora.load_model(adapter), tmp_path / f"{name}.nii.gz")
        assert found.array.shape == (20, 18, 4) and found.array.any()


@pytest.mark.slow
def test_processes_share_the_inputs(scans, adapter, tmp_path):
    def command(out, *more):
        return [
            str(w) for w in ("predict", scans, "-o", tmp_path / out, "--adapter", adapter, "--device", "cpu", *more)
        ]

    assert main(command("alone")) == 0
    shared = [sys.executable, "-m", "samlora", *command("shared", "--n_gpu", 2)]
    done = subprocess.run(shared, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for path in scans.iterdir():
        alone, shared = (read_volume(tmp_path / out / path.name).array for out in ("alone", "shared"))
        assert np.array_equal(alone, shared)
