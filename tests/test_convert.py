"""Adapters in other formats, and merged: nothing is lost, and what does not fit is said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from weights import randomised

import samlora
from samlora.cli import main
from samlora.errors import InputError
from samlora.model import huggingface
from samlora.model.build import build_model
from samlora.model.checkpoint import open_base
from samlora.model.config import ConvertConfig, MergeConfig
from samlora.model.convert import convert, open_adapter
from samlora.model.lora import decoder_names, lora_names
from samlora.model.merge_file import merge_file
from samlora.model.sam import Prompts, build_sam, state_shapes
from samlora.model.tensors import read_tensors
from samlora.training.setup import start_from

SIDE = 64
BOXES = torch.tensor([[8.0, 9, 40, 50]])


@pytest.fixture(scope="module")
def base(shared_path):
    """A vit_ti base of random weights for images of 256 px."""
    path = shared_path / "base.pth"
    torch.save(randomised(build_sam("vit_ti", 256)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vit_b(shared_path):
    """A file with the names and shapes of ViT-B that takes a few kilobytes."""
    path = shared_path / "vit_b.pth"
    numbers = torch.linspace(0.001, 0.02, len(state_shapes("vit_b")))
    shapes = state_shapes("vit_b").items()
    torch.save({name: number.expand(shape) for (name, shape), number in zip(shapes, numbers)}, path)
    return path


@pytest.fixture(scope="module")
def real_adapters():
    """The adapters of Sam_LoRA in the folder of real data."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "lora_weights"
    if not folder.is_dir():
        pytest.skip(f"no real adapters: {folder} is missing")
    return sorted(folder.glob("*.safetensors"))


def trained(base, system="samed", side=SIDE, **options):
    """A model whose trained parameters are random."""
    model = build_model(system, base, image_size=side, **{"num_classes": 2, "rank": 3, **options})
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def write_samed(model, path):
    """Writes a model as SAMed does: LoRA factors, and what the format has beside them."""
    state = model.state_dict()
    names = lora_names(model) | {name: name for name in decoder_names(model)}
    torch.save({short: state[name].clone() for short, name in names.items()}, path)


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def logits(model, prompts=None, side=SIDE):
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(images, prompts)


CHAINS = (("samed",), ("peft",), ("samed", "peft", "sam_lora", "peft", "samed"))


def test_real_adapters_come_back_byte_equal(real_adapters, tmp_path):
    for source in real_adapters:
        for chain in CHAINS:
            go_through(source, (*chain, "sam_lora"), tmp_path)


@pytest.mark.slow
def test_a_real_adapter_comes_back_from_samlora(real_adapters, vit_b, tmp_path):
    """Only once, as this builds a ViT-B."""
    chain = ("samlora", "samed", "sam_lora")
    there = go_through(real_adapters[0], chain, tmp_path, str(vit_b))
    go_through(there[0], ("peft", "samlora", "sam_lora"), tmp_path / "again")
    again = tmp_path / "again" / "2_sam_lora.safetensors"
    assert again.read_bytes() == real_adapters[0].read_bytes()


def go_through(source, chain, folder, base=None):
    """Converts a file from format to format; the last is equal to it. Returns all outputs."""
    endings = {"samed": ".pth", "peft": "", "samlora": ".safetensors", "sam_lora": ".safetensors"}
    outputs = []
    for number, kind in enumerate(chain):
        outputs.append(folder / f"{number}_{kind}{endings[kind]}")
        before = outputs[-2] if number else source
        convert(before, outputs[-1], ConvertConfig(kind, base, 1024, overwrite=True))
        assert open_adapter(outputs[-1]).kind == kind
    if open_adapter(source).kind == chain[-1]:
        assert outputs[-1].read_bytes() == source.read_bytes()
    return outputs


@pytest.mark.parametrize("system", ["samed", "samed_s"])
def test_samed_files_come_back_with_every_tensor(base, tmp_path, system):
    model = trained(base, system)
    # What SAMed's file holds and no loss of it ever touched: here other than in the base.
    model.mask_decoder.iou_prediction_head.layers[0].weight.data += 1
    model.prompt_encoder.point_embeddings[0].weight.data += 1
    write_samed(model, tmp_path / "epoch_159.pth")
    config = ConvertConfig("samlora", str(base), SIDE)
    convert(tmp_path / "epoch_159.pth", tmp_path / "a.safetensors", config)
    convert(tmp_path / "a.safetensors", tmp_path / "back.pth", ConvertConfig("samed"))
    original = torch.load(tmp_path / "epoch_159.pth", weights_only=True)
    assert_same(original, torch.load(tmp_path / "back.pth", weights_only=True))
    again = samlora.load_model(tmp_path / "a.safetensors", base)
    assert again.spec.holds == "decoders" and again.spec.image_size == SIDE
    assert torch.equal(logits(again), logits(model))
    if system == "samed":
        assert torch.equal(logits(again, Prompts(boxes=BOXES)), logits(model, Prompts(boxes=BOXES)))


@pytest.mark.parametrize("system", ["samed", "samed_s"])
def test_adapters_go_to_samed_and_keep_their_logits(base, tmp_path, system):
    model = trained(base, system)
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.pth", ConvertConfig("samed", str(base)))
    again = samlora.load_model(tmp_path / "a.pth", base, SIDE)
    assert torch.equal(logits(again), logits(model))
    convert(
        tmp_path / "a.pth", tmp_path / "b.safetensors", ConvertConfig("samlora", str(base), SIDE)
    )
    kept = load_file(tmp_path / "b.safetensors")
    assert all(
        torch.equal(kept[name], tensor)
        for name, tensor in load_file(tmp_path / "a.safetensors").items()
    )


def test_training_starts_from_a_converted_file_and_not_from_a_merged_one(base, tmp_path):
    write_samed(trained(base), tmp_path / "epoch_159.pth")
    adapter, merged = tmp_path / "a.safetensors", tmp_path / "m.safetensors"
    convert(tmp_path / "epoch_159.pth", adapter, ConvertConfig("samlora", str(base), SIDE))
    fresh = build_model("samed", base, image_size=SIDE, num_classes=2, rank=3).eval()
    start_from(fresh, str(adapter))
    assert fresh.spec.holds == "trained" and torch.equal(logits(fresh), logits(trained(base)))
    merge_file(MergeConfig(str(adapter), str(base), str(merged)))
    with pytest.raises(InputError, match="its LoRA is merged"):
        start_from(fresh, str(merged))


def test_the_page_opens_a_merged_file_without_its_base(base, tmp_path):
    from samlora.app.models import Models

    adapter, merged = tmp_path / "a.safetensors", tmp_path / "m.safetensors"
    samlora.save_adapter(trained(base), adapter)
    merge_file(MergeConfig(str(adapter), str(base), str(merged)))
    (entry,) = Models([str(merged)], device="cpu").entries
    torch.testing.assert_close(logits(entry.model), logits(trained(base)), atol=1e-5, rtol=0)


def test_a_shared_base_stays_as_it_is(base, tmp_path):
    """SAMed's file brings a prompt encoder, buffers and all."""
    model = trained(base)
    model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix += 1
    model.prompt_encoder.point_embeddings[0].weight.data += 1
    write_samed(model, tmp_path / "epoch_159.pth")
    opened = open_base(base)
    convert(
        tmp_path / "epoch_159.pth",
        tmp_path / "a.safetensors",
        ConvertConfig("samlora", str(base), SIDE),
    )
    for name in ("epoch_159.pth", "a.safetensors"):
        samlora.load_model(tmp_path / name, opened, SIDE)
        assert_same(opened.state, open_base(base).state)


def test_a_description_survives_peft(base, tmp_path):
    model = trained(
        base, side=1024, num_classes=3, class_names=["a", "b", "c"], recipe={"name": "x"}
    )
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", ConvertConfig("peft", str(base)))
    convert(tmp_path / "folder", tmp_path / "b.safetensors", ConvertConfig("samlora"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_folders_that_peft_trained_itself_become_q_k_and_v(base, tmp_path):
    """B is then dense, and k is adapted too; there is a decoder, but no prompt encoder."""
    generator = torch.Generator().manual_seed(4)
    config = huggingface.peft_config(
        5, 10, 0.0, tuple(range(12)), "vit_ti", ("mask_decoder",), None
    )
    prefix = "base_model.model.vision_encoder.layers"
    content, state = {}, open_base(base).state
    for layer in range(12):
        content[f"{prefix}.{layer}.attn.qkv.lora_A.weight"] = torch.randn(
            5, 192, generator=generator
        )
        content[f"{prefix}.{layer}.attn.qkv.lora_B.weight"] = torch.randn(
            576, 5, generator=generator
        )
    decoder = {
        name: tensor + 0.01 for name, tensor in state.items() if name.startswith("mask_decoder.")
    }
    content |= huggingface.saved_modules(decoder)
    folder = tmp_path / "folder"
    folder.mkdir()
    from safetensors.torch import save_file

    save_file(content, folder / huggingface.WEIGHTS)
    (folder / huggingface.CONFIG).write_text(json.dumps(config))
    convert(folder, tmp_path / "a.safetensors", ConvertConfig("samlora", str(base)))
    model = samlora.load_model(tmp_path / "a.safetensors", base)
    assert model.spec.options["targets"] == ["q", "k", "v"] and model.spec.image_size == 1024
    product = (
        2
        * content[f"{prefix}.3.attn.qkv.lora_B.weight"]
        @ content[f"{prefix}.3.attn.qkv.lora_A.weight"]
    )
    merged = samlora.merge(model).image_encoder.blocks[3].attn.qkv.weight
    expected = state["image_encoder.blocks.3.attn.qkv.weight"] + product
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in decoder.items())


@pytest.mark.parametrize("name", ["image_encoder", "mask_decoder", "prompt_encoder"])
def test_names_go_to_hugging_face_and_back(name):
    names = [known for known in state_shapes("vit_ti") if known.startswith(name)]
    there = [huggingface.hugging_face_name(known) for known in names]
    assert (
        len(set(there)) == len(names) and [huggingface.meta_name(known) for known in there] == names
    )


def test_bases_with_hugging_face_names(base, tmp_path):
    state = read_tensors(base)[0]
    renamed = {huggingface.hugging_face_name(name): tensor for name, tensor in state.items()}
    renamed["shared_image_embedding.positional_embedding"] = renamed.pop(
        "prompt_encoder.shared_embedding.positional_embedding"
    )
    torch.save(renamed, tmp_path / "model.bin")
    assert_same(open_base(tmp_path / "model.bin").state, open_base(base).state)


@pytest.mark.parametrize(
    "system, classes", [("samed", 2), ("samlora_joint", 2), ("msa", 2), ("samed_s", 3)]
)
def test_model_files_need_no_base(base, tmp_path, system, classes):
    options = {} if system == "msa" else {"rank": 3}
    model = trained(base, system, num_classes=classes, **options)
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    merged = tmp_path / "m.safetensors"
    merge_file(MergeConfig(str(tmp_path / "a.safetensors"), str(base), str(merged)))
    again = samlora.load_model(merged)
    prompts = Prompts(boxes=BOXES) if system == "msa" else None
    torch.testing.assert_close(logits(again, prompts), logits(model, prompts), atol=1e-5, rtol=0)
    samlora.save_adapter(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == merged.read_bytes()
    if system == "samed":
        larger = samlora.load_model(tmp_path / "a.safetensors", base, 96)
        whole = samlora.load_model(merged, image_size=96)
        assert logits(whole, side=96).shape == logits(larger, side=96).shape
    with pytest.raises(InputError, match="takes no base"):
        samlora.load_model(merged, base)
    predictor = samlora.Predictor.load(merged)
    assert predictor.model.spec.class_names == model.spec.class_names


def test_checkpoints_load_in_segment_anything(base, tmp_path):
    """With an adapter of 64 px the position tables stay those of the base, for its own 256 px."""
    from functools import partial

    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        TwoWayTransformer,
    )
    from segment_anything.modeling import Sam as StockSam

    model = trained(base, "sam_lora")
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    merge_file(MergeConfig(str(tmp_path / "a.safetensors"), str(base), str(tmp_path / "m.pth")))
    encoder = ImageEncoderViT(
        img_size=256,
        embed_dim=192,
        num_heads=3,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(2, 5, 8, 11),
        out_chans=256,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    stock = StockSam(
        encoder,
        PromptEncoder(256, (16, 16), (256, 256), 16),
        MaskDecoder(transformer_dim=256, transformer=transformer),
    )
    stock.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))
    ours = samlora.load_model(tmp_path / "a.safetensors", base, 256)
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    asked = {"image": images[0] * 255, "original_size": (256, 256), "boxes": 4 * BOXES}
    with torch.no_grad():
        theirs = stock.eval()([asked], multimask_output=False)[0]["low_res_logits"]
        own = ours(images, Prompts(boxes=4 * BOXES))
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)
    as_base = build_model("sam", tmp_path / "m.pth", image_size=SIDE).eval()
    prompts = Prompts(boxes=BOXES)
    torch.testing.assert_close(
        logits(as_base, prompts), logits(model, prompts), atol=1e-5, rtol=1e-5
    )


def test_outputs_are_kept_and_whole(base, tmp_path, monkeypatch, files_end_at):
    samlora.save_adapter(trained(base, "sam_lora", side=1024), tmp_path / "a.safetensors")
    folder = tmp_path / "folder"
    convert(tmp_path / "a.safetensors", folder, ConvertConfig("peft"))
    before = (folder / huggingface.WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        convert(tmp_path / "a.safetensors", folder, ConvertConfig("peft"))

    def fail(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr("samlora.model.convert.write_tensors", fail)
    with pytest.raises(RuntimeError):
        convert(tmp_path / "a.safetensors", folder, ConvertConfig("peft", overwrite=True))
    assert (folder / huggingface.WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "folder"]
    monkeypatch.undo()
    convert(tmp_path / "a.safetensors", folder, ConvertConfig("peft", overwrite=True))
    with (
        files_end_at(10_000),
        pytest.raises(InputError, match="folder/adapter_model.safetensors: cannot be written"),
    ):
        convert(tmp_path / "a.safetensors", folder, ConvertConfig("peft", overwrite=True))
    assert (folder / huggingface.WEIGHTS).read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not delete")
    with pytest.raises(InputError, match="other things"):
        convert(
            tmp_path / "a.safetensors", tmp_path / "mine", ConvertConfig("peft", overwrite=True)
        )


def test_what_a_format_cannot_hold_is_said(base, tmp_path, capsys):
    """One line each, exit code 2, and no file."""

    def adapter(name, system="samed", **options):
        path = tmp_path / f"{name}.safetensors"
        samlora.save_adapter(trained(base, system, **options), path)
        return str(path)

    joint, three = adapter("joint", "samlora_joint"), adapter("three", num_classes=3)
    eight = adapter("eight", side=1024, num_classes=8)
    alpha, dora = (
        adapter("alpha", options={"alpha": 6}),
        adapter("dora", "sam_lora", options={"dora": True}),
    )
    layers, plain = adapter("layers", "sam_lora", lora_layers=[1, 2]), adapter("plain", "sam_lora")
    decoder, four = adapter("decoder", "samed_decoder"), adapter("four", in_channels=4)
    write_samed(trained(base, num_classes=3), tmp_path / "epoch.pth")
    epoch, out = str(tmp_path / "epoch.pth"), str(tmp_path / "out")
    cases = [
        ([joint, f"{out}.pth", "--to", "samed"], "two mask decoders"),
        ([eight, out, "--to", "peft"], "8 classes"),
        ([three, out, "--to", "peft"], "64 px"),
        ([epoch, out, "--to", "peft"], "--img_size 1024"),
        ([alpha, f"{out}.pth", "--to", "samed"], "alpha 6"),
        ([dora, out, "--to", "peft"], "DoRA"),
        ([layers, f"{out}.safetensors", "--to", "sam_lora"], "lora_layers [1, 2]"),
        ([three, f"{out}.safetensors", "--to", "sam_lora"], "trains more than LoRA"),
        ([decoder, out, "--to", "peft"], "samed_decoder, which has no LoRA"),
        ([four, f"{out}.pth", "--to", "samed"], "4 channels"),
        ([plain, f"{out}.pth", "--to", "peft"], "without .pth"),
        ([plain, out, "--to", "samlora"], ".safetensors"),
        ([plain, f"{out}.safetensors", "--to", "onnx"], "invalid choice"),
        ([plain, f"{out}.safetensors"], "--to is missing"),
        ([str(base), f"{out}.safetensors", "--to", "samlora"], "is not an adapter"),
        ([str(tmp_path), f"{out}.safetensors", "--to", "samlora"], "is a folder"),
        ([plain, f"{out}.safetensors", "--to", "samlora", "--img_size", "128"], "--img_size 128"),
    ]
    for arguments, words in cases:
        assert main(["convert", *arguments]) == 2, arguments
        message = capsys.readouterr().err.strip()
        assert words in message and "\n" not in message, message
    assert main(["merge", "--adapter", joint, "--ckpt", str(base), "-o", f"{out}.pth"]) == 2
    assert ".safetensors" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "system, options", [("samed", {}), ("sam_lora", {"alpha": 6.0, "targets": ["q", "k", "v"]})]
)
def test_transformers_and_peft_give_the_same_logits(base, tmp_path, system, options):
    """At 1024 px on the small variant, with a decoder of classes and with scaled LoRA alone."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft", minversion="0.20")
    model = trained(base, system, 1024, num_classes=3, options=options)
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", ConvertConfig("peft", str(base)))
    theirs = peft.PeftModel.from_pretrained(
        hugging_face_sam(transformers, base), tmp_path / "folder"
    ).eval()
    images = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        if system == "samed":
            embeddings = theirs.base_model.model.get_image_embeddings(images)
            parts = [
                theirs(image_embeddings=embeddings, multimask_output=many).pred_masks
                for many in (False, True)
            ]
            found, expected = torch.cat(parts, dim=2)[0], model(images)
        else:
            embeddings = theirs.base_model.model.get_image_embeddings(normalised(images))
            boxes = 16 * BOXES
            answer = theirs(
                image_embeddings=embeddings, input_boxes=boxes[None], multimask_output=False
            )
            found, expected = answer.pred_masks[0], model(images, Prompts(boxes=boxes))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "saved")  # by peft itself, which drops the description
    saved, original = open_adapter(tmp_path / "saved"), load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in original.items())
    assert saved.spec is None and saved.known["options"]["alpha"] == options.get("alpha")


def normalised(images):
    """Images in 0..1 as SAM's processor gives them."""
    from samlora.model.sam import PIXEL_MEAN, PIXEL_STD

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (images * 255 - mean) / std


def hugging_face_sam(transformers, base):
    """transformers' SamModel of vit_ti for 1024 px, with the base's weights."""
    from samlora.model.checkpoint import resize_positions

    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 192,
            "num_attention_heads": 3,
            "image_size": 1024,
            "global_attn_indexes": [2, 5, 8, 11],
        },
    )
    model = transformers.SamModel(config)
    state = resize_positions(open_base(base).state, "vit_ti", 1024)
    renamed = {huggingface.hugging_face_name(name): tensor for name, tensor in state.items()}
    shared = "prompt_encoder.shared_embedding.positional_embedding"
    renamed["shared_image_embedding.positional_embedding"] = renamed[shared]
    model.load_state_dict(renamed)
    return model.eval()
