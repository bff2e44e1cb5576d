"""Weight files: strict, verified, never unpickled."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import samlora
from samlora.errors import InputError, MissingFileError
from samlora.model import checkpoint
from samlora.model.bases import BASES, find_base
from samlora.model.sam import Prompts, build_sam


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock-shaped vit_ti base at 128 px, as a .pth file."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    torch.save(randomised(build_sam("vit_ti", 128)).state_dict(), path)
    return path


def randomised(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def trained(base, system="samed", **options):
    model = samlora.build_model(system, base=base, image_size=64, **{"num_classes": 2, **options})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def edited(source, target, change, metadata=None):
    tensors = load_file(source)
    change(tensors)
    with open(source, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    save_file(tensors, target, metadata or header["__metadata__"])
    return target


@pytest.mark.parametrize("system", ["samed", "samed_s"])
def test_save_load_predict_is_bit_identical(base, tmp_path, system):
    model = trained(base, system, rank=3, class_names=["liver", "tumour"], recipe={"name": "x", "window": [0, 1]})
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    again = samlora.load_model(tmp_path / "a.safetensors", base=base)
    assert again.spec == model.spec
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_file_holds_what_was_trained_and_only_that(base, tmp_path):
    model = trained(base)
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    sizes = sum(t.numel() for t in load_file(tmp_path / "a.safetensors").values())
    assert sizes == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not any("image_encoder" in n or "iou_prediction" in n for n in load_file(tmp_path / "a.safetensors"))


def test_random_base_is_rebuilt_from_its_seed(tmp_path):
    with pytest.warns(UserWarning, match="random weights"):
        model = samlora.build_model("samed", base=None, variant="vit_ti", image_size=64, num_classes=1)
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(samlora.load_model(tmp_path / "a.safetensors")(x), model(x))


def test_loading_leaves_the_callers_random_numbers_alone(base, tmp_path):
    samlora.save_adapter(trained(base), tmp_path / "a.safetensors")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    samlora.load_model(tmp_path / "a.safetensors", base=base)
    assert torch.equal(torch.rand(1), expected)


def test_half_precision_safetensors_base_gives_float32(base, tmp_path):
    half = {n: t.half() for n, t in torch.load(base, weights_only=True).items()}
    save_file(half, tmp_path / "half.safetensors")
    model = samlora.build_model("samed", base=tmp_path / "half.safetensors", image_size=64, num_classes=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_image_size_may_change_after_training(base, tmp_path):
    samlora.save_adapter(trained(base), tmp_path / "a.safetensors")
    model = samlora.load_model(tmp_path / "a.safetensors", base=base, image_size=96)
    assert model(torch.rand(1, 3, 96, 96)).shape == (1, 3, 24, 24)


@pytest.mark.parametrize("system", ["samed", "samed_s"])
def test_samed_files_load_and_tell_rank_and_classes(base, tmp_path, system):
    model = trained(base, system, rank=2, num_classes=5)
    names = checkpoint.lora_names(model)
    state = model.state_dict()
    tensors = {short: state[name] for short, name in names.items()}
    for name in state:
        if name.startswith(("prompt_encoder.", "mask_decoder.")) and not (
            system == "samed_s" and ".transformer." in name
        ):
            tensors[name] = state[name]
    torch.save(
        tensors if system == "samed_s" else {n: t for n, t in tensors.items() if "linear_" not in n},
        tmp_path / "epoch_159.pth",
    )
    again = samlora.load_model(tmp_path / "epoch_159.pth", base=base, image_size=64)
    assert (again.spec.system, again.spec.rank, again.spec.num_classes, again.spec.variant) == (
        system,
        2,
        5,
        "vit_ti",
    )
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_plain_lora_file_goes_with_the_bases_own_decoder(base, tmp_path):
    lora = samlora.LoRA_sam(build_sam("vit_ti", 64), 3)
    lora.save_lora_parameters(tmp_path / "lora.safetensors")
    model = samlora.load_model(tmp_path / "lora.safetensors", base=base, image_size=64)
    assert (model.spec.system, model.spec.rank, model.num_masks) == ("sam_lora", 3, 4)
    assert torch.equal(
        model.mask_decoder.mask_tokens.weight,
        torch.load(base, weights_only=True)["mask_decoder.mask_tokens.weight"],
    )


def decoder_of_base(base) -> dict[str, torch.Tensor]:
    """The tensors of a base's mask decoder under their names in it."""
    prefix = "mask_decoder."
    state = torch.load(base, weights_only=True)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def kept_from(stored: dict[str, torch.Tensor], decoder: nn.Module) -> set[str]:
    """Names of the tensors of a decoder that are those of the base."""
    return {n for n, t in decoder.state_dict().items() if n in stored and torch.equal(t, stored[n])}


@pytest.mark.parametrize("system", ["samed", "samed_decoder", "samed_s", "samlora_joint"])
def test_the_class_decoder_starts_as_samed_s(base, system):
    """What fits: SAM's hypernetworks 0 to 3 and the first two layers of its IoU head; the rest is fresh."""
    stored = decoder_of_base(base)
    decoder = samlora.build_model(system, base=base, image_size=64, num_classes=8).mask_decoder
    heads = {n for n in decoder.state_dict() if n.startswith("output_hypernetworks_mlps.")}
    from_sam = {n for n in heads if n.split(".")[1] in "0123"}
    fresh = {"mask_tokens.weight", "iou_prediction_head.layers.2.weight", "iou_prediction_head.layers.2.bias"}
    assert len(from_sam) == 4 * 6 and len(heads) == 9 * 6
    names = {n for n in decoder.state_dict() if ".linear_" not in n}  # LoRA of samed_s is no part of SAM
    assert names - kept_from(stored, decoder) == (heads - from_sam) | fresh
    assert decoder.mask_tokens.weight.shape == (9, 256)


@pytest.mark.parametrize("system", ["samed", "samlora_joint"])
def test_with_three_classes_the_class_decoder_starts_as_sam_s_own(base, system):
    stored = decoder_of_base(base)
    decoder = samlora.build_model(system, base=base, image_size=64, num_classes=3).mask_decoder
    assert kept_from(stored, decoder) == decoder.state_dict().keys() == stored.keys()


@pytest.mark.parametrize("system", ["samed", "samlora_joint", "sam_lora"])
def test_adapters_of_format_3_load_with_the_same_logits(base, tmp_path, system):
    """They state no pixels: those were a matter of the system alone. And no adapter holds the IoU head."""
    model, new, old = trained(base, system, num_classes=8), tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    samlora.save_adapter(model, new)
    with open(new, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    description = json.loads(header["__metadata__"]["samlora"]) | {"format_version": 3}
    del description["pixels"], description["base_pixels"]
    edited(new, old, lambda tensors: None, {"samlora": json.dumps(description)})
    assert not any("iou_prediction_head" in name for name in load_file(old))
    again = samlora.load_model(old, base=base)
    assert (again.spec.pixels, again.spec.base_pixels) == (model.spec.pixels, model.spec.base_pixels)
    x, prompts = torch.rand(2, 3, 64, 64), Prompts(boxes=torch.tensor([[8.0, 9, 40, 50], [3, 3, 60, 30]]))
    with torch.no_grad():
        if system != "sam_lora":
            assert torch.equal(again(x), model(x))
        if system != "samed":
            assert torch.equal(again(x, prompts), model(x, prompts))


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_errors(base, tmp_path, capsys):
    """One line each: which file, what is wrong, what to do."""
    good = tmp_path / "good.safetensors"
    samlora.save_adapter(trained(base), good)
    state = torch.load(base, weights_only=True)
    other = tmp_path / "other.pth"
    torch.save({n: t + 1 for n, t in state.items()}, other)
    torch.save(Evil(), tmp_path / "evil.pth")
    torch.save({k: v for k, v in state.items() if k != "image_encoder.neck.0.weight"}, tmp_path / "missing.pth")
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "extra.pth")
    torch.save(state | {"image_encoder.neck.0.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "nosam.pth")
    (tmp_path / "sam_vit_b_01ec64.pth").write_bytes(b"not meta's")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("hello")
    build = lambda name, **kw: lambda: samlora.build_model(base=tmp_path / name, image_size=64, **kw)  # noqa: E731
    load = lambda name, b=base: lambda: samlora.load_model(tmp_path / name, base=b)  # noqa: E731
    newer = json.dumps({"format_version": 99, "samlora_version": "9.9"})
    edited(good, tmp_path / "newer.safetensors", lambda t: None, {"samlora": newer})
    edited(good, tmp_path / "nojson.safetensors", lambda t: None, {"samlora": "{half"})
    edited(good, tmp_path / "flat.safetensors", lambda t: t.update(w_a_000=torch.zeros(8)), {"a": "b"})
    edited(good, tmp_path / "lacks.safetensors", lambda t: t.pop("w_a_000"))
    edited(good, tmp_path / "more.safetensors", lambda t: t.update(w_a_999=torch.zeros(1)))
    edited(good, tmp_path / "misshapen.safetensors", lambda t: t.update(w_a_000=torch.zeros(5, 192)))
    cases = [
        (build("none.pth"), "none.pth", "samlora download"),
        (build("sam_vit_l_0b3195.pth"), "sam_vit_l_0b3195.pth", "samlora download vit_l"),
        (build("sam_vit_b_01ec64.pth"), "01ec64", "samlora download vit_b"),
        (build("missing.pth"), "missing.pth", "image_encoder.neck.0.weight"),
        (build("extra.pth"), "extra.pth", "unexpected extra"),
        (build("shape.pth"), "shape.pth", "shape (1,)"),
        (build("nosam.pth"), "nosam.pth", "not a SAM checkpoint"),
        (build("evil.pth"), "evil.pth", "cannot be read"),
        (build("text.pth"), "text.pth", "cannot be read"),
        (lambda: samlora.build_model(base=base, variant="vit_b", image_size=64), "vit_ti", "vit_b"),
        (load("none.safetensors"), "none.safetensors", "no adapter"),
        (load("cut.safetensors"), "cut.safetensors", "fetch or save it again"),
        (load("newer.safetensors"), "newer.safetensors", "upgrade"),
        (load("nojson.safetensors"), "nojson.safetensors", "description is damaged"),
        (load("flat.safetensors"), "flat.safetensors", "fit no SAM variant"),
        (load("lacks.safetensors"), "lacks.safetensors", "lacks w_a_000"),
        (load("more.safetensors"), "more.safetensors", "unexpected w_a_999"),
        (load("misshapen.safetensors"), "misshapen.safetensors", "(5, 192)"),
        (load("good.safetensors", other), "good.safetensors", "SHA-256"),
        (
            lambda: samlora.save_adapter(build_sam("vit_ti", 64), tmp_path / "x.safetensors"),
            "model.spec",
            "build_model",
        ),
        (lambda: samlora.save_adapter(trained(base), tmp_path / "x.pth"), "x.pth", ".safetensors"),
    ]
    for call, *words in cases:
        with pytest.raises(InputError) as error:
            call()
        message = str(error.value)
        assert all(word in message for word in words) and "\n" not in message, message
    assert "unpickled" not in capsys.readouterr().out


def test_missing_default_base_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="samlora download vit_h"):
        samlora.build_model("samed_h")


def test_the_demo_base_is_vit_tis_default(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)  # found beside the package, not in the current folder
    model = samlora.build_model("samed", variant="vit_ti", num_classes=2)
    assert (model.spec.base, model.spec.image_size) == (BASES["vit_ti"].file, 256) and not recwarn.list
    file = find_base("vit_ti")
    assert file.stat().st_size <= 24e6
    assert {t.dtype for t in checkpoint.read_tensors(file)[0].values()} == {torch.float16}
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    again = samlora.load_model(tmp_path / "a.safetensors")
    x = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
