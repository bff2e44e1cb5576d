"""Weights that are none, answers that are not finite, mirror images, and whatever callers hand to public functions."""

import argparse
import pathlib
import shutil

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import samlora
from samlora.cli import main
from samlora.data.grid import Case, Volume
from samlora.data.recipe import Recipe
from samlora.errors import InputError
from samlora.inference.ensemble import FLIPS, Averaged, sided, without_exchanges
from samlora.inference.slices import predict_slices
from samlora.model.bases import find_base
from samlora.model.checkpoint import Spec, open_base
from samlora.model.tensors import read_tensors
from samlora.pixels import SAMED

TWO = dict(classes=("x", "y"), label_values=((1,), (2,)))


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text and "\x1b" not in text and len(text) < 400, text
    return text


@pytest.fixture(scope="module")
def adapters(shared_path):
    """Adapters of random weights: of MR, of colour pictures, and one whose classes have sides."""
    mr = Recipe("m", "mr", percentiles=(0.5, 99.5), orientation="LPS", **TWO)
    rgb = Recipe("i", "image", channels="rgb", **TWO)
    for name, recipe, names in (("mr", mr, ("x", "y")), ("rgb", rgb, ("x", "y")), ("sides", mr, ("kidney_left", "kidney_right"))):
        torch.manual_seed(0)
        values = recipe.to_dict() | {"classes": dict(zip(names, (1, 2)))}
        model = samlora.build_model(
            variant="vit_ti", image_size=64, num_classes=2, class_names=names, recipe=values
        )
        samlora.save_adapter(model, shared_path / f"{name}.safetensors")
    return shared_path


@pytest.fixture(scope="module")
def models(adapters):
    return {name: samlora.load_model(adapters / f"{name}.safetensors") for name in ("mr", "rgb")}


@pytest.fixture(scope="module")
def predictor(models):
    return samlora.Predictor(models["rgb"])


def spoiled(path, to, value, prefix="w_a"):
    tensors = load_file(path)
    key = next(name for name in tensors if name.startswith(prefix))
    tensors[key].view(-1)[-1] = value
    with safe_open(path, "pt") as file:
        save_file(tensors, to, file.metadata())
    return to


@pytest.fixture
def scan(tmp_path):
    array = np.random.default_rng(0).integers(0, 900, (40, 36, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1, 3, 1])), tmp_path / "p1.nii.gz")
    return tmp_path / "p1.nii.gz"


# --- A17: what stands in a weights file that is none ----------------------------------------------------------------

STATE = {"a": torch.zeros(2)}


def write(path, content):
    path.write_bytes(content)


WEIGHTS = {
    "pointer.pth": (lambda p: write(p, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
    "pointer.safetensors": (lambda p: write(p, b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "page.pth": (lambda p: write(p, b"<!DOCTYPE html><html><body>Login"), "is a web page"),
    "denied.safetensors": (lambda p: write(p, b'{"message":"Not Found"}'), "is the message of a web server"),
    "empty.pth": (lambda p: write(p, b""), "is empty"),
    "zeros.safetensors": (lambda p: write(p, bytes(5000)), "begins with zeros only"),
    "text.pth": (lambda p: write(p, b"hello, these are no weights"), "is a text file"),
    "args.pth": (lambda p: torch.save({"model": STATE, "args": argparse.Namespace(lr=1)}, p), r"Python objects \(argparse.Namespace\)"),
    "path.pth": (lambda p: torch.save({"model": STATE, "out": pathlib.Path("x")}, p), r"model.state_dict\(\)"),
    "module.pth": (lambda p: torch.save(nn.Linear(2, 2), p), r"Python objects \(torch.nn"),
    "folder.pth": (lambda p: p.mkdir(), "is a folder"),
    "numbers.pth": (lambda p: torch.save({"a": 3}, p), "something else than named tensors"),
    "archive.pth": (lambda p: p.open("wb").write(b"PK\x03\x04" + bytes(300)), "no archive of PyTorch"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_no_file_of_weights_is_named(tmp_path, name):
    """A17. What belongs to it: pointers of Git LFS and git-annex, pages and messages of servers, empty and cut files, text,
    pickled modules and objects, TorchScript, folders; as base, as adapter and as --ckpt; one line without terminal codes."""
    make, words = WEIGHTS[name]
    make(tmp_path / name)
    for read in (read_tensors, samlora.load_model, open_base):
        with pytest.raises(InputError, match=words) as refused:
            read(tmp_path / name)
        assert name in one_line(refused)


def test_the_command_says_it_in_one_line(tmp_path, scan, adapters, capsys):
    WEIGHTS["args.pth"][0](tmp_path / "args.pth")
    words = ["predict", scan, "-o", tmp_path / "o", "--adapter", adapters / "mr.safetensors", "--ckpt", tmp_path / "args.pth"]
    assert main(list(map(str, words))) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "model.state_dict()" in said


@pytest.mark.parametrize("name", ["base.pth", "base.pt", "base.bin", "base.safetensors"])
@pytest.mark.parametrize("kind", ["plain", "earlier", "wrapped", "safetensors"])
def test_weights_are_what_they_hold(tmp_path, name, kind):
    """Kind 11, of weights: any ending, checkpoints that keep the weights under a key, both forms of PyTorch's files."""
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    path = tmp_path / name
    if kind == "safetensors":
        save_file(tensors, tmp_path / "x")
        shutil.move(tmp_path / "x", path)
    elif kind == "earlier":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        wrapped = {"state_dict": {f"module.{n}": t for n, t in tensors.items()}, "epoch": 3}
        torch.save(wrapped if kind == "wrapped" else tensors, path)
    read, _ = read_tensors(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], tensors[n]) for n in tensors)


# --- A18: values that are not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("prefix", ["w_a", "w_b", "mask_decoder"])
def test_an_adapter_that_is_not_finite_is_refused(tmp_path, adapters, scan, capsys, value, prefix):
    """A18. What belongs to it: adapters, bases, LoRA files, images, volumes and cases in memory, answers of half precision,
    of slices, patches and the Predictor: argmax of NaN is background, NaN > 0 is an empty mask."""
    bad = spoiled(adapters / "mr.safetensors", tmp_path / "bad.safetensors", value, prefix)
    assert main(["predict", str(scan), "-o", str(tmp_path / "o"), "--adapter", str(bad)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bad.safetensors" in said and "is not finite" in said
    assert not list(tmp_path.glob("o/*.nii.gz"))


def test_a_base_that_is_not_finite_is_refused(tmp_path):
    base = spoiled(find_base("vit_ti"), tmp_path / "base.safetensors", float("nan"), "image_encoder")
    with pytest.raises(InputError, match="is not finite") as refused:
        samlora.build_model(base=base, image_size=64)
    assert "base.safetensors" in one_line(refused)


def test_lora_parameters_that_are_not_finite_are_refused(tmp_path, models):
    lora = samlora.LoRA_sam(samlora.build_model("sam", image_size=64, variant="vit_ti"), 2)
    lora.save_lora_parameters(tmp_path / "l.safetensors")
    spoiled(tmp_path / "l.safetensors", tmp_path / "bad.safetensors", float("inf"))
    with pytest.raises(InputError, match="is not finite"):
        lora.load_lora_parameters(tmp_path / "bad.safetensors")


class Fake(nn.Module):
    """Logits by a function of the images; a spec as models have one."""

    def __init__(self, answer, names=("one", "two")):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer, self.pixels, self.fill, self.logit_side = answer, SAMED, (0.0, 0.0, 0.0), 16
        recipe = Recipe("f", "image", classes=names, label_values=((1,), (2,))).to_dict()
        self.spec = Spec("samed", "vit_ti", 4, (), 16, 2, names, "none", recipe=recipe)

    def forward(self, images):
        return self.answer(images)


def overflowing(images):
    logits = torch.zeros(len(images), 3, 16, 16)
    logits[:, 1, 2, 2] = torch.tensor(1e6).half().float()  # infinite
    return logits


@pytest.mark.parametrize("answer", [overflowing, lambda images: torch.full((len(images), 3, 16, 16), torch.nan)])
def test_answers_that_are_not_finite_are_refused(answer):
    with pytest.raises(InputError, match="answer is not finite") as refused:
        predict_slices(Fake(answer), np.zeros((2, 16, 16), np.float32), 16)
    one_line(refused)


def test_the_predictor_refuses_answers_that_are_not_finite(models):
    model = samlora.build_model("sam", variant="vit_ti", image_size=64)
    predictor = samlora.Predictor(model)
    with torch.no_grad():
        next(model.mask_decoder.parameters()).fill_(float("inf"))
    predictor.set_image(np.zeros((20, 30), np.uint8))
    with pytest.raises(InputError, match="answer is not finite"):
        predictor.predict(box=[2, 2, 9, 9])


# --- A12: mirror images ---------------------------------------------------------------------------------------------


def by_side(images):
    """Class 1 is what is bright in the left half of the picture, class 2 in the right half."""
    bright = torch.nn.functional.adaptive_avg_pool2d(images[:, :1], 16) * 10
    left = (torch.arange(16) < 8).float()
    return torch.cat([torch.full_like(bright, 3.0), bright * left, bright * (1 - left)], dim=1)


def everywhere(images):
    bright = torch.nn.functional.adaptive_avg_pool2d(images[:, :1], 16) * 10
    return torch.cat([torch.full_like(bright, 3.0), bright, bright * 0.5], dim=1)


@pytest.fixture
def sides():
    image = np.zeros((3, 16, 16), np.float32)
    image[:, 4:12, 2:6] = 1
    image[:, 4:12, 10:15] = 1
    return image


def test_mirror_images_that_exchange_classes_are_not_averaged(sides):
    """A12, where names say nothing of sides. What belongs to it: left and right by names in any language, flips of both
    axes, averages of several adapters, predict, test.py and the library."""
    model = Fake(by_side)
    plain = predict_slices(model, sides, 16)
    assert set(np.unique(plain)) == {0, 1, 2}
    averaged = Averaged([model], flips=True).eval()
    mixed = predict_slices(averaged, sides, 16)
    assert not np.array_equal(mixed, plain)  # what the fault was
    labels, remark = without_exchanges(averaged, lambda model: predict_slices(model, sides, 16))
    assert np.array_equal(labels, plain) and "--tta is not used here" in remark
    assert averaged.flips == FLIPS


def test_mirror_images_that_agree_are_averaged(sides):
    averaged = Averaged([Fake(everywhere), Fake(everywhere)], flips=True).eval()
    expected = predict_slices(averaged, sides, 16)
    labels, remark = without_exchanges(averaged, lambda model: predict_slices(model, sides, 16))
    assert remark == "" and np.array_equal(labels, expected) and labels.any()


SIDED = ["kidney_left", "Right Kidney", "LeftLung", "lung-r", "linke Niere", "rein_gauche", "左肾", "atrium sinistrum"]
PLAIN = ["liver", "bright_spot", "straight_sinus", "portal_vein", "label_1", "upright", "color", "rectum", "uterus"]


def test_sides_are_known_by_their_names():
    assert sided([*SIDED, *PLAIN]) == SIDED


def test_tta_is_not_used_where_classes_have_sides(tmp_path, adapters, scan):
    words = ["predict", str(scan), "--adapter", str(adapters / "sides.safetensors"), "--device", "cpu"]
    assert main([*words, "-o", str(tmp_path / "plain")]) == 0 and main([*words, "-o", str(tmp_path / "tta"), "--tta"]) == 0
    plain, tta = (nibabel.load(tmp_path / folder / "p1.nii.gz").get_fdata() for folder in ("plain", "tta"))
    assert np.array_equal(plain, tta)
    said = (tmp_path / "tta/log.txt").read_text()
    assert "--tta is not used" in said and "kidney_left, kidney_right" in said and "4 flips" not in said


# --- A20: what callers hand to public functions ---------------------------------------------------------------------

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)


@pytest.mark.parametrize("image", [np.dstack([PICTURE, PICTURE[..., :1]]), PICTURE[..., :1], PICTURE[..., :2], PICTURE[..., 0]])
def test_transparency_is_dropped_as_of_files(predictor, image):
    """A20. What belongs to it: (H, W, 4), (H, W, 2), (H, W, 1); the rest is one line: channels first, lists, PIL, torch, None,
    text, paths of nothing, empty arrays, wrong types; for Predictor, predict_volume, evaluate, build_model, load_model,
    LoRA_sam, Samprocessor, DatasetSegmentation, save_adapter."""
    predictor.set_image(image)
    wanted = predictor.image.copy()
    predictor.set_image(PICTURE if image.shape[2:] == (4,) else PICTURE[..., 0])
    assert np.array_equal(wanted, predictor.image)


IMAGES = {
    "channels first": PICTURE.transpose(2, 0, 1),
    "five channels": np.zeros((40, 50, 5), np.uint8),
    "one axis": np.zeros(9, np.uint8),
    "four axes": np.zeros((2, 40, 50, 3), np.uint8),
    "empty": np.zeros((0, 50), np.uint8),
    "int16": np.zeros((40, 50), np.int16),
    "above 1": np.full((40, 50), 3.5),
    "nan": np.full((40, 50), np.nan),
    "text": np.full((4, 5), "a"),
    "objects": np.full((4, 5), None),
    "complex": np.zeros((4, 5), np.complex64),
    "list": PICTURE.tolist(),
    "pil": Image.fromarray(PICTURE),
    "torch": torch.zeros(3, 40, 50),
    "none": None,
    "number": 3,
    "bytes": b"abc",
    "no file": "not/there.png",
    "path": pathlib.Path("not/there.nii.gz"),
    "volume of a list": Volume([[1]], np.eye(4)),
    "volume without places": Volume(np.zeros((4, 5, 2)), np.eye(3)),
    "volume of nan": Volume(np.full((4, 5, 2), np.nan), np.eye(4)),
    "flat volume": Volume(np.zeros((4, 5), np.float32), np.eye(4)),
    "volume in one place": Volume(np.zeros((4, 5, 2), np.float32), np.zeros((4, 4))),
    "case": Case(np.full((2, 4, 5), np.nan, np.float32)),
    "case of a list": Case([1, 2]),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("kind", ["rgb", "mr"])
def test_the_predictor_checks_its_image(models, name, kind):
    with pytest.raises(InputError) as refused:
        samlora.Predictor(models[kind]).set_image(IMAGES[name])
    one_line(refused)


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in ("above 1",)] + ["array"])
def test_predict_volume_checks_its_volume(models, name):
    volume = PICTURE if name == "array" else IMAGES[name]
    with pytest.raises(InputError) as refused:
        samlora.predict_volume(models["mr"], volume)
    one_line(refused)


def test_predict_volume_checks_the_rest(models, scan):
    for arguments in ((None, scan), (nn.Linear(2, 2), scan), ("model", scan)):
        with pytest.raises(InputError, match="is no model of samlora"):
            samlora.predict_volume(*arguments)
    for more in ({"batch_size": 0}, {"batch_size": "2"}, {"batch_size": 1.5}, {"recipe": "generic_ct"}):
        with pytest.raises(InputError) as refused:
            samlora.predict_volume(models["mr"], scan, **more)
        one_line(refused)


PROMPTS = [
    {"points": "a"}, {"points": [[1, 2], [3]]}, {"points": [1, 2]}, {"points": [[1, 2]], "labels": ["x"]},
    {"points": [[1, 2]], "labels": [0.5]}, {"points": [[np.nan, 2]]}, {"box": "wide"}, {"box": [1, 2, 3]},
    {"box": [[1, 2, 3, 4], [1]]}, {"box": [np.nan, 0, 4, 4]}, {"mask": "a"}, {"mask": np.full((16, 16), np.nan)},
    {"mask": np.zeros((3, 3))}, {"box": [1, 2, 5, 6], "index": 1.5}, {"box": [1, 2, 5, 6], "index": "0"},
    {"box": [1, 2, 5, 6], "index": 7}, {},
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_the_predictor_checks_prompts(prompt):
    predictor = samlora.Predictor(samlora.build_model("sam", variant="vit_ti", image_size=64))
    predictor.set_image(PICTURE)
    with pytest.raises(InputError) as refused:
        predictor.predict(**prompt)
    one_line(refused)


def test_the_predictor_checks_its_model_and_index(models, predictor):
    for model in (None, "adapter.safetensors", nn.Linear(2, 2)):
        with pytest.raises(InputError, match="is no model of samlora"):
            samlora.Predictor(model)
    predictor.set_image(PICTURE)
    for index in ("0", None and 0, 2.0, 9):
        if index is not None:
            with pytest.raises(InputError):
                predictor.classes(index)
    with pytest.raises(InputError):
        samlora.Predictor.load(np.zeros(3))


LABELS = np.ones((4, 5, 6), np.uint8)


@pytest.mark.parametrize(
    "arguments",
    [
        ("a.nii.gz", LABELS, (1, 1, 1)), (None, LABELS, (1, 1, 1)), ([[1, 2], [3]], LABELS, (1, 1, 1)),
        (LABELS, LABELS, None), (LABELS, LABELS, "abc"), (LABELS, LABELS, (1, 1)), (LABELS, LABELS, 1.0),
        (LABELS, LABELS[:2], (1, 1, 1)), (LABELS.astype(float), LABELS, (1, 1, 1)), (LABELS, LABELS, (1, 1, 1), 1),
        (LABELS, LABELS, (1, 1, 1), "12"), (LABELS, LABELS, (1, 1, 1), ["a"]), (LABELS, LABELS, (1, 1, 1), None, "nice"),
        (LABELS, LABELS, (1, 1, 1), None, "strict", "2"), (pathlib.Path("a"), LABELS, (1, 1, 1)),
        (LABELS[..., None], LABELS[..., None], (1, 1, 1, 1)), (LABELS[:0], LABELS[:0], (1, 1, 1)),
    ],
    ids=lambda a: str(len(a)),
)  # fmt: skip
def test_evaluate_checks_its_arrays(arguments):
    with pytest.raises(InputError) as refused:
        samlora.evaluate(*arguments)
    one_line(refused)


@pytest.mark.parametrize("labels", [LABELS.tolist(), torch.from_numpy(LABELS)])
def test_evaluate_takes_what_is_an_array(labels):
    """A control, which no fault showed: what the checks above must not refuse."""
    assert samlora.evaluate(labels, LABELS, [1, 1, 1])[1]["dice"] == 1


@pytest.mark.parametrize(
    "given",
    [
        {"num_classes": "8"}, {"num_classes": 2.5}, {"num_classes": 0}, {"num_classes": None}, {"rank": "4"}, {"rank": 0},
        {"image_size": "64"}, {"image_size": 64.0}, {"image_size": 63}, {"image_size": True}, {"in_channels": "3"},
        {"variant": "vit_x"}, {"system": "samurai"}, {"system": None}, {"base": 3}, {"base": np.zeros(3)}, {"base": "."},
        {"class_names": ["a"]}, {"lora_layers": [99]}, {"lora_layers": "all"}, {"lora_layers": 3}, {"options": "dora"},
        {"class_names": 5},
    ],
    ids=str,
)  # fmt: skip
def test_build_model_checks_its_arguments(given):
    arguments = {"variant": "vit_ti", "image_size": 64, "num_classes": 2} | given
    with pytest.raises(InputError) as refused:
        samlora.build_model(**arguments)
    one_line(refused)


@pytest.mark.parametrize("adapter", [None, 3, np.zeros(3), [], "", ".", "not/there.safetensors", pathlib.Path(".")])
def test_load_model_checks_its_path(adapter):
    with pytest.raises(InputError) as refused:
        samlora.load_model(adapter)
    one_line(refused)


def test_load_model_checks_the_rest(adapters):
    for more in ({"base": 3}, {"base": "."}, {"image_size": "64"}, {"image_size": 63}):
        with pytest.raises(InputError) as refused:
            samlora.load_model(adapters / "mr.safetensors", **more)
        one_line(refused)


def test_lora_sam_checks_its_arguments():
    for arguments in ((None, 4), (nn.Linear(2, 2), 4), ("sam", 4)):
        with pytest.raises(InputError, match="no SAM"):
            samlora.LoRA_sam(*arguments)
    for rank, layers in ((0, None), ("4", None), (2.5, None), (None, None), (4, [99]), (4, 3), (4, ["a"])):
        with pytest.raises(InputError) as refused:
            samlora.LoRA_sam(samlora.build_model("sam", variant="vit_ti", image_size=64), rank, layers)
        one_line(refused)


def test_save_adapter_checks_its_path(models):
    for path in (None, 3, np.zeros(2)):
        with pytest.raises(InputError) as refused:
            samlora.save_adapter(models["mr"], path)
        one_line(refused)


@pytest.fixture(scope="module")
def processor():
    return samlora.Samprocessor(samlora.build_model("sam_lora", variant="vit_ti", image_size=64))


@pytest.mark.parametrize("name", [name for name in IMAGES if "volume" not in name])
def test_the_processor_checks_its_image(processor, name):
    with pytest.raises(InputError) as refused:
        processor(IMAGES[name], np.ones((40, 50), np.uint8))
    one_line(refused)


@pytest.mark.parametrize("mask", [np.ones((9, 9)), "mask", [[1]], np.ones((40, 50, 3)), torch.ones(40, 50), np.zeros((40, 50))])
def test_the_processor_checks_its_mask(processor, mask):
    with pytest.raises(InputError) as refused:
        processor(PICTURE, mask)
    one_line(refused)


def test_the_processor_drops_transparency(processor):
    mask = np.zeros((40, 50), np.uint8)
    mask[4:20, 6:30] = 1
    one, other = (processor(image, mask) for image in (PICTURE, np.dstack([PICTURE, PICTURE[..., :1]])))
    assert torch.equal(one["image"], other["image"])


def test_models_and_folders_of_the_processor(processor, tmp_path):
    for model in (None, nn.Linear(2, 2), "sam"):
        with pytest.raises(InputError):
            samlora.Samprocessor(model)
    (tmp_path / "a.png").write_bytes(b"x")
    for source in (None, 3, np.zeros(3), tmp_path / "a.png", "not/there"):
        with pytest.raises(InputError) as refused:
            samlora.DatasetSegmentation(source, processor)
        one_line(refused)
    with pytest.raises(InputError, match="Samprocessor is needed"):
        samlora.DatasetSegmentation(tmp_path, None)
