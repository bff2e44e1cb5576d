"""Samprocessor and DatasetSegmentation: pictures and masks as a prompted SAM takes them."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import samlora
from samlora.data.recipe import Recipe
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


def folder_of_masks(folder, masks, ending="png"):
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for number, mask in enumerate(masks):
        Image.fromarray(picture(number)[0]).save(folder / "images" / f"p{number}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"p{number}.{ending}")
    return folder


def test_masks_in_nearly_white_and_in_jpeg_are_one_class(model, tmp_path):
    """As `samlora plan` would have it: an object is not cut in two because 254 and 255 are both white."""
    mask = picture()[1]
    mixed = mask * np.where(np.arange(50) % 2, 254, 255)
    for name, ending in (("gray", "png"), ("jpeg", "jpg")):
        (tmp_path / name).mkdir()
        data = samlora.DatasetSegmentation(folder_of_masks(tmp_path / name, [mixed, mixed], ending), samlora.Samprocessor(model, "box"))
        assert [sample["label"] for sample in data] == [1, 1] and data.recipe.classes == ("foreground",)
        expected = samlora.Samprocessor(model, "box")(picture()[0], mask)
        torch.testing.assert_close(data[0]["boxes"], expected["boxes"], atol=SIDE / 50, rtol=0)


def test_a_recipe_says_what_masks_mean(model, tmp_path):
    mask = picture()[1].astype(int) * 100
    mask[5:10, 10:20] = 200
    mask[28, 40:42] = 255
    folder, processor = folder_of_masks(tmp_path, [mask, mask]), samlora.Samprocessor(model, "box")
    with pytest.raises(InputError, match="label values 100 200 255 may be .*recipe=.*mask_threshold: 127") as error:
        samlora.DatasetSegmentation(folder, processor)
    assert "\n" not in str(error.value)
    recipe = Recipe("mine", "image", channels="rgb", classes=("vessel", "nerve"), label_values=((200, 255), (100,)))
    data = samlora.DatasetSegmentation(folder, processor, recipe=recipe)
    assert [sample["label"] for sample in data] == [1, 2, 1, 2] and data.recipe == recipe
    torch.testing.assert_close(data[1]["boxes"], processor(picture()[0], mask == 100)["boxes"])
    soft = dataclasses.replace(recipe, classes=(), label_values=(), mask_threshold=150)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(soft.to_dict()))
    for given in (soft, tmp_path / "mine.yaml", str(tmp_path / "mine.yaml")):
        data = samlora.DatasetSegmentation(folder, processor, recipe=given)
        assert [sample["label"] for sample in data] == [1, 1]
        torch.testing.assert_close(data[0]["boxes"], processor(picture()[0], mask > 150)["boxes"])
    one = dataclasses.replace(recipe, min_pixels=3, cases="p1")
    data = samlora.DatasetSegmentation(folder, processor, recipe=one)
    assert [sample["name"] for sample in data] == ["p1", "p1"]
    torch.testing.assert_close(data[0]["boxes"], processor(picture()[0], mask == 200)["boxes"])
    unsaid = dataclasses.replace(recipe, classes=(), label_values=())
    with pytest.raises(InputError, match="may be classes"):
        samlora.DatasetSegmentation(folder, processor, recipe=unsaid)


def test_small_label_values_are_classes_without_a_recipe(model, tmp_path):
    mask = picture()[1]
    mask[5:10, 10:20] = 3
    data = samlora.DatasetSegmentation(folder_of_masks(tmp_path, [mask]), samlora.Samprocessor(model, "box"))
    assert [sample["label"] for sample in data] == [1, 2] and data.recipe.classes == ("label_1", "label_3")


def test_no_recipe_applies_to_prepared_slices(model, tmp_path):
    image, mask = picture()
    write_medsam(tmp_path / "case.npz", image[None], mask[None], None)
    assert samlora.DatasetSegmentation(tmp_path, samlora.Samprocessor(model)).recipe is None
    with pytest.raises(InputError, match="leave recipe out"):
        samlora.DatasetSegmentation(tmp_path, samlora.Samprocessor(model), recipe=Recipe("mine", "image"))


@pytest.mark.real
@pytest.mark.parametrize("folder, count", [("photos/rings/train", 6), ("mr/prostate_png", 3)])
def test_real_pictures_show_one_object_each(model, real_data, folder, count):
    """Masks in JPEG; and masks in which 254 and 255 are mixed."""
    data = samlora.DatasetSegmentation(real_data / folder, samlora.Samprocessor(model, "box"))
    assert [sample["label"] for sample in data] == [1] * count and data.recipe.mask_threshold == 127
    masks = sorted((real_data / folder / "masks").iterdir())
    shares = [float((np.asarray(Image.open(path).convert("L")) > 127).mean()) for path in masks]
    seen = [float(sample["ground_truth_mask"].sum() / sample["inside"].sum()) for sample in data]
    assert seen == pytest.approx(shares, abs=0.03)


def test_folders_that_hold_nothing(model, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        samlora.DatasetSegmentation(tmp_path / "nowhere", samlora.Samprocessor(model))
    with pytest.raises(InputError, match="prompt 'x'"):
        samlora.Samprocessor(model, "x")
