"""samlora info: what files and folders of weights are; what is none is one line."""

import json

import pytest
import torch
from weights import randomised

import samlora
from samlora.cli import main
from samlora.model import huggingface
from samlora.model.config import ConvertConfig, MergeConfig
from samlora.model.convert import convert
from samlora.model.merge_file import merge_file
from samlora.model.methods import SYSTEMS
from samlora.model.sam import build_sam


@pytest.fixture(scope="module")
def folder(shared_path):
    """A base, and adapters of each format for it."""
    torch.save(randomised(build_sam("vit_ti", 256)).state_dict(), shared_path / "base.pth")
    for name, system, options in (("ours", "samed", {"alpha": 8.0}), ("plain", "sam_lora", {})):
        model = samlora.build_model(
            system,
            shared_path / "base.pth",
            image_size=1024,
            num_classes=3,
            options=options,
            class_names=("liver", "spleen", "aorta"),
            recipe={"name": "abdomen", "modality": "ct"},
        )
        samlora.save_adapter(model, shared_path / f"{name}.safetensors")
    for kind, name in (
        ("samed", "plain.pth"),
        ("sam_lora", "factors.safetensors"),
        ("peft", "peft"),
    ):
        convert(shared_path / "plain.safetensors", shared_path / name, ConvertConfig(kind))
    files = [
        str(shared_path / name) for name in ("ours.safetensors", "base.pth", "merged.safetensors")
    ]
    merge_file(MergeConfig(*files))
    return shared_path


def described(path, capsys):
    """What the command says of a path, as JSON; its text is tried too."""
    assert main(["info", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
    assert main(["info", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_adapters_of_samlora(folder, capsys):
    found = described(folder / "ours.safetensors", capsys)
    assert found["kind"] == "adapter of samlora"
    known = {
        name: found[name]
        for name in ("system", "rank", "image_size", "class_names", "base", "holds")
    }
    assert known == {
        "system": "samed",
        "rank": 4,
        "image_size": 1024,
        "class_names": ["liver", "spleen", "aorta"],
        "base": "base.pth",
        "holds": "trained",
    }
    assert found["recipe"]["name"] == "abdomen" and found["options"]["alpha"] == 8
    model = samlora.load_model(folder / "ours.safetensors", folder / "base.pth")
    assert found["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["bytes"] == (folder / "ours.safetensors").stat().st_size
    assert "--ckpt" in found["needs"][0] and found["base_sha256"] == model.spec.base_sha256


@pytest.mark.parametrize(
    "name, kind",
    [
        ("plain.pth", "adapter of SAMed"),
        ("factors.safetensors", "adapter of Sam_LoRA"),
        ("peft", "adapter of peft, for transformers' SamModel"),
    ],
)
def test_adapters_of_others(folder, capsys, name, kind):
    found = described(folder / name, capsys)
    assert (found["kind"], found["system"], found["variant"], found["rank"]) == (
        kind,
        "sam_lora",
        "vit_ti",
        4,
    )
    assert found["lora_layers"] == list(range(12)) and found["parameters"] == 12 * 4 * 4 * 192
    assert found["image_size"] == (1024 if name == "peft" else None)


def test_bases_and_model_files(folder, capsys):
    found = described(folder / "base.pth", capsys)
    assert (found["variant"], found["image_size"], found["masks"]) == ("vit_ti", 256, 4)
    merged = described(folder / "merged.safetensors", capsys)
    assert (
        merged["kind"].startswith("model file")
        and merged["needs"] == []
        and merged["base"] == "base.pth"
    )
    state = torch.load(folder / "base.pth", weights_only=True)
    renamed = {huggingface.hugging_face_name(name): tensor for name, tensor in state.items()}
    torch.save(renamed, folder / "model.bin")
    assert described(folder / "model.bin", capsys)["names"] == "Hugging Face's"


def test_run_folders(folder, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("max_epochs: 3\ndataset: mine\n")
    (tmp_path / "run.json").write_text(json.dumps({"steps": 12, "device": "CPU"}))
    found = described(tmp_path, capsys)
    assert (found["dataset"], found["steps"], found["adapters"], found["adapter"]) == (
        "mine",
        12,
        [],
        None,
    )
    (tmp_path / "adapter_last.safetensors").write_bytes((folder / "ours.safetensors").read_bytes())
    assert described(tmp_path, capsys)["adapter"]["system"] == "samed"


def test_every_system_is_listed(capsys):
    assert main(["info", "--systems", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(SYSTEMS)
    assert rows[0]["options"]["alpha"] is None
    assert main(["info", "--systems"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SYSTEMS)


def test_what_is_none_of_these_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("some words")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"a": object}, tmp_path / "objects.pth")
    (tmp_path / "state.pt").write_bytes(b"any")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "ours.safetensors").read_bytes()[:9000])
    broken = tmp_path / "peft"
    broken.mkdir()
    (broken / huggingface.CONFIG).write_text('{"peft_type": "LOHA"}')
    cases = [
        ([str(tmp_path / "notes.txt")], "text file"),
        ([str(tmp_path / "empty.pth")], "is empty"),
        ([str(tmp_path / "other.pth")], "neither an adapter nor a SAM"),
        ([str(tmp_path / "objects.pth")], "not loaded"),
        ([str(tmp_path / "state.pt")], "give its folder"),
        ([str(cut)], "cut.safetensors"),
        ([str(broken)], "LOHA"),
        ([str(tmp_path)], "no folder of a training run"),
        ([str(tmp_path / "nothing")], "no such file"),
        ([], "--systems"),
        ([str(cut), "--systems"], "either"),
    ]
    for arguments, words in cases:
        assert main(["info", *arguments]) == 2
        message = capsys.readouterr().err.strip()
        assert words in message and "\n" not in message, message
