"""SAMed's exact numbers (see golden/inputs.py), through the public functions."""

import importlib.util
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

import samlora
from samlora.evaluation.metrics import evaluate
from samlora.inference.slices import predict_slices
from samlora.model.checkpoint import adapter_tensors
from samlora.model.config import ConvertConfig, MergeConfig
from samlora.model.convert import convert
from samlora.model.merge_file import merge_file

HERE = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_models", HERE / "golden_models.py")
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)
inputs = models.inputs


@pytest.fixture(scope="module")
def reference():
    return np.load(HERE / "samed_reference.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def golden_model(shared_path):
    """Builds the model of a case by way of an adapter file as SAMed writes it."""
    base = models.write_base(shared_path / "vit_b.pth")
    return lambda *case, **options: models.golden_model(base, *case, **options)


@pytest.mark.parametrize("system, size, classes", models.LOGIT_CASES)
def test_logits(reference, golden_model, system, size, classes):
    model = golden_model(system, size, classes)
    assert (model.spec.system, model.spec.rank, model.spec.num_classes) == (system, 4, classes)
    image = models.golden_image(size)
    entry = f"{system}_S{size}_K{classes}"
    with torch.no_grad():
        logits = model(image)
        _, iou = model.decode(model.image_encoder(image), *model.embed_prompts(None, 1))
        merged = samlora.merge(model)(image)
    torch.testing.assert_close(logits[0], torch.from_numpy(reference[f"{entry}_logits"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(merged, logits, atol=1e-4, rtol=0)
    if f"{entry}_iou" in reference:
        torch.testing.assert_close(iou[0], torch.from_numpy(reference[f"{entry}_iou"]), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("system, size, classes", [("samed", 256, 1), ("samed_s", 256, 8)])
def test_logits_after_conversion_and_merge(reference, golden_model, shared_path, tmp_path, system, size, classes):
    """SAMed's file as samlora's and back, and merged into one file with its base."""
    golden_model(system, size, classes)
    base, adapter, back = shared_path / "vit_b.pth", tmp_path / "a.safetensors", tmp_path / "back.pth"
    convert(shared_path / "epoch_159.pth", adapter, ConvertConfig("samlora", str(base), size))
    convert(adapter, back, ConvertConfig("samed"))
    merge_file(MergeConfig(str(adapter), str(base), str(tmp_path / "m.safetensors")))
    expected = torch.from_numpy(reference[f"{system}_S{size}_K{classes}_logits"])
    for path, needed in ((adapter, base), (back, base), (tmp_path / "m.safetensors", "default")):
        model = samlora.load_model(path, needed, size)
        with torch.no_grad():
            logits = model(models.golden_image(size))
            _, iou = model.decode(model.image_encoder(models.golden_image(size)), *model.embed_prompts(None, 1))
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)
        if f"{system}_S{size}_K{classes}_iou" in reference:
            known = torch.from_numpy(reference[f"{system}_S{size}_K{classes}_iou"])
            torch.testing.assert_close(iou[0], known, atol=1e-4, rtol=0)


@pytest.fixture
def two_threads():
    """The reference was made with two; the order of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["samed", "samed_s"])
def test_eight_training_steps(reference, golden_model, system, two_threads):
    model = golden_model(system, 256, 3, zero_b=True).train()
    losses, rates = models.train_steps(model, torch.device("cpu"))
    # At these rates AdamW amplifies rounding a thousandfold: one thread instead of two moves the last losses
    # by 2e-4. Where the processor's arithmetic is another, the first steps alone can be compared that closely.
    same_arithmetic = platform.machine() == "x86_64"
    expected = reference[f"{system}_train_losses"]
    np.testing.assert_allclose(losses[:3], expected[:3], atol=1e-5, rtol=0)
    np.testing.assert_allclose(losses, expected, atol=1e-5 if same_arithmetic else 1e-3, rtol=0)
    np.testing.assert_allclose(rates, reference[f"{system}_train_lrs"], rtol=1e-12)
    tensors = adapter_tensors(model)
    norms = [float(tensors[f"w_b_{i:03d}"].norm()) for i in range(24)]
    np.testing.assert_allclose(norms, reference[f"{system}_train_wb_norms"], rtol=1e-3)


@pytest.mark.parametrize("system", ["samed", "samed_s"])
def test_number_of_trained_parameters(reference, system):
    with pytest.warns(UserWarning, match="random weights"):
        model = samlora.build_model(system, base=None, variant="vit_b", image_size=256, num_classes=3)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    untouched = [
        p
        for n, p in model.named_parameters()
        if n.startswith(("prompt_encoder.", "mask_decoder.iou_prediction_head.")) and not p.requires_grad
    ]
    # SAMed marks 21 tensors trainable that its forward never touches; they are frozen here.
    assert len(untouched) == 21
    assert trained + sum(p.numel() for p in untouched) == int(reference[f"{system}_n_trainable"])


@pytest.mark.real
def test_volume(reference, golden_model, real_data):
    import nibabel

    ct, truth = (
        np.asanyarray(nibabel.load(real_data / "ct_abdomen" / name).dataobj)
        for name in ("example_ct_sm.nii.gz", "example_seg.nii.gz")
    )
    image, label = inputs.abdominal_volume(ct, truth)
    model = golden_model("samed", 256, 8)
    prediction = predict_slices(samlora.merge(model), image, 256, input_size=224)
    assert (prediction == reference["volume_prediction"]).mean() >= 0.999
    measured = evaluate(reference["volume_prediction"], label, (1, 1, 1), range(1, 9), policy="samed")
    figures = [[measured[i]["dice"], measured[i]["hd95"]] for i in range(1, 9)]
    np.testing.assert_allclose(figures, reference["volume_metrics"], atol=1e-6)
