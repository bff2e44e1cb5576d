"""Systems on LiteMedSAM's network, with generated weights: trained, saved, loaded, used and measured."""

import json

import numpy as np
import pytest
import torch
from weights import randomised

import samlora
from samlora.data.grid import Case
from samlora.data.volume import write_case, write_slice
from samlora.inference.config import TestConfig
from samlora.inference.testing import test as measure
from samlora.model.build import build_model
from samlora.model.lora import LoRA_linear, LoRA_qkv
from samlora.model.methods import system_row
from samlora.model.sam import build_sam
from samlora.options import make
from samlora.pixels import LITE_MEDSAM
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.loop import train

SIDE = 64
BLOCKS = 10  # with attention
SYSTEMS = ("samed", "samed_decoder", "sam_lora", "medsam", "medsam_decoder", "lite_medsam", "samlora_joint")


@pytest.fixture(scope="module")
def base(shared_path):
    """A file of LiteMedSAM's names and shapes."""
    path = shared_path / "generated.pth"
    torch.save(randomised(build_sam("lite_medsam", SIDE)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def data(shared_path):
    """Two slices to train on, of other proportions than the model's square, and a volume of two to test on."""
    rng = np.random.default_rng(0)
    label = np.zeros((40, 56), np.uint8)
    label[6:20, 8:28] = 1
    label[24:36, 30:50] = 2
    images = [(0.3 * label + 0.2 + rng.normal(0, 0.05, label.shape)).clip(0, 1).astype(np.float32) for _ in range(4)]
    folder = shared_path / "data"
    for number in range(2):
        write_slice(folder / "train_npz" / f"case0_slice{number:03d}.npz", images[number], label)
    case = Case(np.stack(images[2:]), np.stack([label, label]))
    write_case(case, folder / "test_vol_h5" / "case1.npy.h5")
    return folder


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_trains_and_its_adapter_is_loaded_used_and_measured(base, data, tmp_path, system):
    options = {
        "root_path": str(data), "output": str(tmp_path / "runs"), "system": system, "vit_name": "lite_medsam",
        "ckpt": str(base), "img_size": SIDE, "num_classes": 2, "batch_size": 2, "max_iterations": 1, "device": "cpu",
    }  # fmt: skip
    run = train(make(TrainConfig, options))
    adapter = run / "adapter_last.safetensors"
    model = samlora.load_model(adapter, base=base)
    assert model.spec.variant == "lite_medsam" and model.spec.base_pixels == LITE_MEDSAM
    assert json.loads((run / "run.json").read_text())["steps"] == 1
    row, images = system_row(system), torch.rand(1, 3, SIDE, SIDE)
    if row.automatic:
        with torch.no_grad():
            assert model(images).shape == (1, 3, SIDE, SIDE)  # a stride of 4: logits as fine as the image
        config = TestConfig(
            volume_path=str(data), lora_ckpt=str(adapter), ckpt=str(base), output_dir=str(tmp_path / "out"), device="cpu"
        )
        assert set(measure(config)["strict"]["classes"]) == {1, 2}
    if row.promptable:
        predictor = samlora.Predictor.load(adapter, base=base)
        answer = predictor.set_image(np.random.default_rng(0).random((40, 56))).predict(box=[4, 4, 30, 30])
        assert answer.masks.shape[-2:] == (40, 56)


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v", "proj", "lin1", "lin2"]])
def test_lora_lies_on_attention_and_on_the_mlp_where_that_is_asked_for(base, targets):
    model = build_model("samed", base, image_size=SIDE, num_classes=2, options={"targets": targets})
    blocks = model.image_encoder.attention_blocks
    assert model.spec.lora_layers == tuple(range(BLOCKS)) == tuple(range(len(blocks)))
    for block in blocks:
        assert isinstance(block.attn.qkv, LoRA_qkv)
        for linear in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert isinstance(linear, LoRA_linear) == (len(targets) > 2)


def test_lite_medsam_trains_as_its_authors_do(base):
    model = build_model("lite_medsam", base, image_size=SIDE, num_classes=2)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    # What boxes do not touch: points, masks as prompts, and the masks for ambiguous prompts.
    parts = ("not_a_point", "point_embeddings.0", "point_embeddings.1", "mask_downscaling")
    assert all(any(part in name for part in (*parts, "hypernetworks_mlps")) for name in frozen)
    assert not any("image_encoder" in name for name in frozen) and model.pixels == LITE_MEDSAM
    assert system_row("lite_medsam").prompting == Prompting("box", box_jitter=5)
