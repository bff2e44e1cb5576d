"""From files of several channels, or slices with their neighbours, to a trained adapter and its prediction."""

import json

import numpy as np
import pytest

import samlora
from samlora.cli import main
from samlora.data.grid import Volume
from samlora.data.recipe import Recipe
from samlora.data.volume import read_slice, read_volume, write_volume
from samlora.model.checkpoint import read_adapter

CLASSES = {"a": 1, "b": 2}


@pytest.fixture
def write(tmp_path):
    """Writes cases a, b, c below tmp_path/source, every image of the shape given; values 1..1000 or 8 bit."""

    def write(shape, ending, dtype):
        rng = np.random.default_rng(0)
        affine = np.diag([-1.0, -1, 1, 1]) if ending == ".png" else np.diag([0.8, 0.8, 2, 1])
        for name in "abc":
            image = rng.integers(1, 256 if dtype == np.uint8 else 1000, shape).astype(dtype)
            label = rng.integers(0, 3, shape[:3]).astype(np.uint8)
            write_volume(Volume(image, affine, 1, 1), tmp_path / f"source/images/{name}{ending}")
            write_volume(Volume(label, affine, 1, 1), tmp_path / f"source/labels/{name}{ending}")
        return tmp_path / "source"

    return write


KINDS = {
    "neighbours": ((24, 20, 4), ".nii.gz", np.int16, 3),
    "[0, 1, 2, 3]": ((24, 20, 4, 4), ".nii.gz", np.int16, 4),
    "[2]": ((24, 20, 4, 4), ".nii.gz", np.int16, 3),
    "rgb": ((24, 20, 1, 3), ".png", np.uint8, 3),
    "repeat": ((24, 20, 1, 3), ".png", np.uint8, 3),
}


@pytest.mark.parametrize("channels", KINDS)
def test_channels_go_all_the_way(channels, write, tmp_path, capsys):
    shape, ending, dtype, count = KINDS[channels]
    source, recipe = write(shape, ending, dtype), tmp_path / "r.yaml"
    values = "modality: image" if ending == ".png" else "modality: mr\npercentiles: [0.5, 99.5]"
    recipe.write_text(f"name: r\n{values}\nchannels: {channels}\nsize: 16\nclasses: {json.dumps(CLASSES)}\n")
    data, runs = tmp_path / "data", tmp_path / "runs"
    assert main(f"prepare {source} -o {data} --dataset {recipe} --test_cases c --workers 1".split()) == 0
    image, label = read_slice(sorted((data / "train_npz").glob("*.npz"))[0])
    stored = {"[2]": (), "repeat": ()}.get(channels, (count,))
    assert image.shape == (16, 16, *stored) and label.shape == (16, 16)
    assert main(["check", str(data)]) == 0

    train = f"train --root_path {data} --vit_name vit_ti --img_size 64 --max_epochs 1 --batch_size 3 --device cpu"
    assert main(f"{train} --val_cases b --output {runs}".split()) == 0
    (run,) = runs.iterdir()
    spec = read_adapter(run / "adapter_last.safetensors")[1]
    assert spec.in_channels == count and Recipe.from_dict(spec.recipe).in_channels == count
    assert main(f"test --volume_path {data} --config {run}/config.yaml --device cpu --output_dir {tmp_path}/test".split()) == 0
    assert (tmp_path / "test/report.html").is_file() and (tmp_path / "test/overlays/c.png").is_file()

    out = tmp_path / "out"
    adapter = run / "adapter_best.safetensors"
    assert main(f"predict {source}/images -o {out} --adapter {adapter} --overlay gif --device cpu".split()) == 0
    found = read_volume(out / f"c{ending}", labels=True).array
    prepared = samlora.predict_volume(samlora.load_model(adapter), data / "test_vol_h5/c.npy.h5").array
    assert found.shape == shape[:3] and np.array_equal(found, prepared)


def test_medsam_s_files_are_written_and_read_again(write, tmp_path):
    source = write((24, 20, 4), ".nii.gz", np.int16)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\nmodality: mr\npercentiles: [0.5, 99.5]\nclasses: {json.dumps(CLASSES)}\n")
    data, again = tmp_path / "data", tmp_path / "again"
    assert main(f"prepare {source} -o {data} --dataset {recipe} --test_cases c --medsam --workers 1".split()) == 0
    with np.load(data / "medsam_npz/train/a.npz") as archive:
        assert archive["imgs"].shape == archive["gts"].shape == (4, 20, 24) and archive["imgs"].dtype == np.uint8
        assert archive["spacing"].tolist() == pytest.approx([0.8, 0.8, 2.0])
    recipe.write_text("name: again\nmodality: image\n")
    command = f"prepare {data}/medsam_npz/train -o {again} --dataset {recipe} --test_fraction 0 --workers 1"
    assert main(command.split()) == 0
    for path in sorted((data / "train_npz").glob("a_*.npz")):
        (first, label), (second, other) = read_slice(path), read_slice(again / "train_npz" / path.name)
        np.testing.assert_allclose(first, second, atol=0.5 / 255 + 1e-6)
        assert np.array_equal(label, other)


def test_keeping_a_share_of_the_empty_slices_and_dropping_specks(tmp_path):
    image, label = np.full((12, 12, 10), 100, np.int16), np.zeros((12, 12, 10), np.uint8)
    label[2:6, 2:6, :4], label[10, 10, 7] = 1, 1
    for kind, array in (("images", image), ("labels", label)):
        write_volume(Volume(array, np.diag([1.0, 1, 3, 1]), 1, 1), tmp_path / f"source/{kind}/x.nii.gz")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodality: mr\npercentiles: [0, 100]\nkeep: 0.5\nmin_voxels: 2\nclasses: {a: 1}\ntest_cases: []\n"
    )
    assert main(f"prepare {tmp_path}/source -o {tmp_path}/data --dataset {recipe} --workers 1".split()) == 0
    kept = [int(path.stem[-3:]) for path in sorted((tmp_path / "data/train_npz").glob("*.npz"))]
    assert kept == [0, 1, 2, 3, 4, 6, 9]  # four with the class, half of the six without
    assert json.loads((tmp_path / "data/cases/x.json").read_text())["voxels"] == [1375, 65]
