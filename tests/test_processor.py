"""Samprocessor and DatasetSegmentation: pictures and masks as a prompted SAM takes them."""

import numpy as np
import pytest
import torch
from PIL import Image

import samlora
from samlora.data.volume import write_medsam
from samlora.errors import InputError
from samlora.model.sam import Prompts

SIDE = 64


@pytest.fixture(scope="module")
def model():
    return samlora.build_model("sam_lora", "random:0", "vit_ti", SIDE, num_classes=1).eval()


def picture(seed: int = 0, shape=(30, 50)):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    mask[5:20, 10:35] = 1
    return rng.integers(0, 256, (*shape, 3)).astype(np.uint8), mask


@pytest.mark.parametrize(
    "prompt, keys",
    [("no", set()), ("box", {"boxes"}), ("full_box", {"boxes"}), ("pt_box", {"boxes", "point_coords", "point_labels"}), (None, {"boxes", "point_coords", "point_labels"})],
)
def test_a_sample_is_what_the_model_takes(model, prompt, keys):
    image, mask = picture()
    sample = samlora.Samprocessor(model, prompt)(image, mask)
    assert sample.keys() == {"image", "original_size", "ground_truth_mask", "inside"} | keys
    assert sample["image"].shape == (3, SIDE, SIDE) and sample["original_size"] == (30, 50)
    assert (sample["ground_truth_mask"].bool() & ~sample["inside"]).sum() == 0 < sample["ground_truth_mask"].sum()
    given = Prompts(sample.get("point_coords"), sample.get("point_labels"), sample.get("boxes"), None, torch.tensor([0]))
    assert model(sample["image"][None], given).shape == (1, 1, 16, 16)


def test_the_whole_picture_is_the_full_box(model):
    image, mask = picture()
    sample = samlora.Samprocessor(model, "full_box")(image, mask)
    assert sample["boxes"][0].tolist() == pytest.approx([0, 0, 49 * 64 / 50, 29 * 38 / 30], abs=0.1)


def test_an_empty_mask_has_no_box(model):
    image, mask = picture()
    with pytest.raises(InputError, match="empty mask"):
        samlora.Samprocessor(model, "box")(image, mask * 0)
    assert "boxes" not in samlora.Samprocessor(model, "no")(image)


def test_samples_of_medsams_files(model, tmp_path):
    image, mask = picture(0)
    stack = np.stack([image, picture(1)[0], picture(2)[0]])
    labels = np.stack([mask, mask * 0, mask * 3])
    labels[2, 25:, 40:] = 1
    write_medsam(tmp_path / "case.npz", stack, labels, None)
    data = samlora.DatasetSegmentation(tmp_path, samlora.Samprocessor(model))
    assert [(s["name"], s["label"]) for s in data] == [("case_slice000", 1), ("case_slice002", 1), ("case_slice002", 3)]
    expected = samlora.Samprocessor(model)(stack[2], labels[2] == 3)
    torch.testing.assert_close(data[2]["ground_truth_mask"], expected["ground_truth_mask"])
    torch.testing.assert_close(data[2]["boxes"], data[2]["boxes"])
    assert all(torch.equal(a, b) for a, b in zip(data[0]["point_coords"], data[0]["point_coords"]))


def test_samples_of_pictures_and_masks(model, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(2):
        image, mask = picture(number)
        Image.fromarray(image).save(tmp_path / "images" / f"p{number}.png")
        Image.fromarray(mask * 255).save(tmp_path / "masks" / f"p{number}.png")
    data = samlora.DatasetSegmentation(tmp_path, samlora.Samprocessor(model, "box"))
    assert len(data) == 2 and data[0]["label"] == 1
    expected = samlora.Samprocessor(model, "box")(picture(0)[0], picture(0)[1])
    torch.testing.assert_close(data[0]["boxes"], expected["boxes"])
    torch.testing.assert_close(data[0]["image"], expected["image"], atol=0.02, rtol=0)  # floats, not rounded by Pillow


def test_folders_that_hold_nothing(model, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        samlora.DatasetSegmentation(tmp_path / "nowhere", samlora.Samprocessor(model))
    with pytest.raises(InputError, match="prompt 'x'"):
        samlora.Samprocessor(model, "x")
