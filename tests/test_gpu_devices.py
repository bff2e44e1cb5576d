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


GPU = torch.device("cuda", 0)


@pytest.fixture
def fake_gpu():
    """A context in which tensors have no data, and one operation on two devices raises as on a GPU."""
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            torch.zeros(1, device=GPU) + 1
    except Exception as error:
        pytest.skip(f"this PyTorch cannot imitate a GPU: {error}")
    yield mode
    frame_of.cache_clear()  # frames keep tensors on devices, here such without data


def test_tensors_of_two_devices_are_noticed(fake_gpu):
    with fake_gpu, pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device=GPU) + torch.zeros(2)


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
def test_forward(fake_gpu, system, variant):
    with fake_gpu:
        with GPU:
            model = samlora.build_model(system, "random:0", variant, 64, 2)
            boxes, index = torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)
        prompts = None if system.startswith("samed") else Prompts(boxes=boxes, image_index=index)
        answer = model(torch.rand(2, 3, 64, 64, device=GPU), prompts, details=True)
    found = [tensor for tensor in answer if tensor is not None]
    assert found and all(tensor.device == GPU for tensor in found)


@pytest.mark.parametrize("pixels", [SAMED, LITE_MEDSAM])
def test_batches_and_labels(fake_gpu, pixels):
    images = [torch.rand(40, 30), torch.rand(64, 64), torch.rand(30, 40)]
    labels = [torch.zeros(image.shape, dtype=torch.uint8) for image in images]
    turns = [Transform(angle=7), Transform(quarter_turns=1, flip_axis=0), Transform()]
    make_batch(images, labels, turns, 64, "cpu", pixels)  # matrices are made of real numbers
    frame, logits = Frame(40, 30, 64, pixels), torch.zeros(2, 3, 16, 16)
    wanted = frame.logits(logits).shape, frame.classes(logits).shape
    with fake_gpu:
        squares, targets = make_batch(images, labels, turns, 64, GPU, pixels)
        logits = logits.to(GPU)
        found = frame.logits(logits), frame.classes(logits)
    assert {tensor.device for tensor in (squares, targets, *found)} == {GPU}
    assert tuple(tensor.shape for tensor in found) == wanted
