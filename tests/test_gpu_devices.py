"""Everything a GPU computes stays on it: passes on tensors that have a CUDA device and no data, without a GPU."""

import pytest
import torch

import samlora
from samlora.data.augment import Transform
from samlora.data.batch import frame_of, make_batch
from samlora.data.frame import Frame
from samlora.model.sam import Prompts
from samlora.pixels import LITE_MEDSAM, SAMED

fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")


@pytest.fixture
def fake_gpu():
    """Tensors without data; an operation on tensors of two devices raises as on a GPU."""
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            torch.zeros(1, device="cuda") + 1
    except Exception as error:
        pytest.skip(f"this PyTorch cannot imitate a GPU: {error}")
    with mode:
        yield torch.device("cuda", 0)
    frame_of.cache_clear()  # frames keep tensors on devices, here such without data


def test_tensors_of_two_devices_are_noticed(fake_gpu):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device=fake_gpu) + torch.zeros(2)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "system, variant",
    [
        ("samed", "vit_ti"),
        ("samed_s", "vit_ti"),
        ("samed", "lite_medsam"),
        ("medsam_decoder", "lite_medsam"),
        ("samlora_joint", "vit_ti"),
        ("msa", "vit_ti"),
    ],
)
def test_forward(fake_gpu, system, variant, half):
    with fake_gpu:
        model = samlora.build_model(system, "random:0", variant, 64, 2)
        boxes, index = torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)
    prompts = None if system.startswith("samed") else Prompts(boxes=boxes, image_index=index)
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        answer = model(torch.rand(2, 3, 64, 64, device=fake_gpu), prompts, details=True)
    found = [tensor for tensor in answer if tensor is not None]
    assert found and all(tensor.device == fake_gpu for tensor in found)


@pytest.mark.parametrize("pixels", [SAMED, LITE_MEDSAM])
def test_batches_and_labels(fake_gpu, pixels):
    images = [torch.rand(40, 30), torch.rand(64, 64), torch.rand(40, 30)]
    labels = [torch.zeros(image.shape, dtype=torch.uint8) for image in images]
    turns = [Transform(angle=7), Transform(quarter_turns=1, flip_axis=0), Transform()]
    squares, targets = make_batch(images, labels, turns, 64, fake_gpu, pixels)
    assert squares.device == targets.device == fake_gpu
    frame = Frame(40, 30, 64, pixels)
    logits = torch.zeros(2, 3, 16, 16, device=fake_gpu)
    assert frame.logits(logits).device == frame.classes(logits).device == fake_gpu
